//! What came between two looks at the maps.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use serde::Serialize;
use shunt_common::{
    event::Event,
    layout::{AFFINITY_TICK_NS, BackendState, TRACE_HAS_SERVICE, TraceFilter, Traffic},
    trace::{DROPPED, REFUSED},
};

use super::super::{
    backends::{self, Quarantine},
    service_name, service_names,
};
use crate::{
    datapath::{
        maps::Maps,
        trace::{LEASE, Tracer},
    },
    gc,
};

/// Looks that the sparklines show.
pub(super) const HISTORY: usize = 60;
/// How old the knowledge may be of whose backends are.
const KNOWN_FOR: Duration = Duration::from_secs(30);
/// Records of a tracer that are read at once, so that a flood does not stop the rest.
const MOST_RECORDS: usize = 32_768;

/// What came within an interval, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    /// How long the interval was.
    pub seconds: f64,
    /// The one with the most new connections first.
    pub services: Vec<ServiceLine>,
    /// What the datapath counted, as `shunt status` calls it.
    pub events: BTreeMap<&'static str, u64>,
    /// Whether packets and bytes are counted (`--count-traffic on`).
    pub counts_traffic: bool,
    /// Retries and refusals that were too many to be told whose they are: `events` has them.
    pub lost: u64,
    /// Why nothing is known of whose retries and refusals are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_tracer: Option<String>,
    /// New connections of all Services at the last looks, oldest first.
    #[serde(skip)]
    pub history: Vec<u64>,
}

/// What a Service got.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceLine {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub service: String,
    /// New connections, and flows of datagrams.
    pub connections: u64,
    /// SYNs that went to another backend; `None`: not known.
    pub retries: Option<u64>,
    /// Connections and packets that were refused or dropped.
    pub refusals: Option<u64>,
    /// Packets both ways, where they are counted.
    pub packets: Option<u64>,
    /// Their bytes.
    pub bytes: Option<u64>,
    /// Its backends, the one with the most new connections first.
    pub backends: Vec<BackendLine>,
    /// Its number in the maps.
    #[serde(skip)]
    pub number: u32,
    /// New connections at the last looks, oldest first.
    #[serde(skip)]
    pub history: Vec<u64>,
}

/// What a backend got.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BackendLine {
    /// Address and port.
    pub address: SocketAddr,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Whether it runs on this node.
    pub local: bool,
    /// It leaves connections unanswered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quarantine: Option<Quarantine>,
    /// New connections, and flows of datagrams.
    pub connections: u64,
    /// Its part of the Service's connections in percent; 0 while there are none.
    pub share: f64,
}

impl Report {
    /// What is missing, and why.
    pub(super) fn note(&self) -> Option<String> {
        if let Some(why) = &self.no_tracer {
            return Some(format!("no retries and refusals by Service: {why}"));
        }
        (self.lost > 0).then(|| {
            format!(
                "{} retries and refusals were too many to be told by Service",
                self.lost
            )
        })
    }

    /// How often something was refused, dropped or reset in the interval.
    pub(super) fn refused(&self) -> u64 {
        let is_meant = |event: &&Event| (DROPPED | REFUSED) & event.bit() != 0;
        let names = Event::ALL.iter().filter(is_meant).map(|event| event.name());
        names.filter_map(|name| self.events.get(name)).sum()
    }
}

impl ServiceLine {
    /// Whether there is anything to tell of it.
    pub(super) fn is_active(&self) -> bool {
        let some = |count: Option<u64>| count.is_some_and(|count| count > 0);
        self.connections > 0
            || some(self.retries)
            || some(self.refusals)
            || some(self.packets)
            || self.history.iter().any(|&count| count > 0)
            || self
                .backends
                .iter()
                .any(|backend| backend.quarantine.is_some())
    }
}

/// A backend, and whose it is.
struct Known {
    service: u32,
    address: SocketAddr,
    protocol: String,
    local: bool,
}

/// Counters at one moment.
struct Look {
    at: Instant,
    backends: HashMap<u32, (BackendState, Traffic)>,
    events: Vec<(Event, u64)>,
}

/// What a tracer told of a Service.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    retries: u64,
    refusals: u64,
}

/// Looks at the maps again and again.
pub(super) struct Sampler<'a> {
    maps: &'a Maps,
    tracer: Result<Tracer, String>,
    renewed: Instant,
    lost: u64,
    told: HashMap<u32, Told>,
    names: HashMap<u32, (String, String)>,
    known: HashMap<u32, Known>,
    known_since: Instant,
    counts_traffic: bool,
    before: Look,
    history: VecDeque<u64>,
    histories: HashMap<u32, VecDeque<u64>>,
}

impl<'a> Sampler<'a> {
    /// The first look, from which on is counted.
    pub(super) fn new(maps: &'a Maps) -> anyhow::Result<Self> {
        let filter = TraceFilter {
            events: DROPPED | REFUSED | Event::Retry.bit(),
            ..TraceFilter::default()
        };
        let mut sampler = Self {
            maps,
            tracer: Tracer::start(maps.root(), filter).map_err(|error| error.to_string()),
            renewed: Instant::now(),
            lost: 0,
            told: HashMap::new(),
            names: HashMap::new(),
            known: HashMap::new(),
            known_since: Instant::now(),
            counts_traffic: false,
            before: Look {
                at: Instant::now(),
                backends: HashMap::new(),
                events: Vec::new(),
            },
            history: VecDeque::new(),
            histories: HashMap::new(),
        };
        sampler.learn()?;
        sampler.before = sampler.look()?;
        Ok(sampler)
    }

    /// Whose the backends are.
    fn learn(&mut self) -> anyhow::Result<()> {
        self.names = service_names(self.maps)?;
        let numbers: HashMap<&(String, String), u32> = self
            .names
            .iter()
            .map(|(&number, name)| (name, number))
            .collect();
        self.known = backends::list(self.maps)?
            .into_iter()
            .filter_map(|row| {
                let service = *numbers.get(&(row.namespace, row.service))?;
                let known = Known {
                    service,
                    address: SocketAddr::new(row.address, row.port),
                    protocol: row.protocol,
                    local: row.local,
                };
                Some((row.id, known))
            })
            .collect();
        self.known_since = Instant::now();
        self.counts_traffic = self.maps.counts_traffic()?;
        Ok(())
    }

    fn look(&self) -> anyhow::Result<Look> {
        let mut backends = HashMap::with_capacity(self.before.backends.len());
        self.maps.backends.for_each_batch(|ids, states| {
            for (&id, &state) in ids.iter().zip(states) {
                if state != BackendState::default() {
                    let traffic = match self.counts_traffic {
                        true => self.maps.traffic(id)?,
                        false => Traffic::default(),
                    };
                    backends.insert(id, (state, traffic));
                }
            }
            Ok(())
        })?;
        Ok(Look {
            at: Instant::now(),
            backends,
            events: self.maps.events()?,
        })
    }

    /// Takes in what the tracer was told, and lets it live on.
    pub(super) fn listen(&mut self) {
        let Ok(tracer) = &mut self.tracer else { return };
        for _ in 0..MOST_RECORDS {
            let Some(record) = tracer.receive() else {
                break;
            };
            if record.flags & TRACE_HAS_SERVICE == 0 {
                continue;
            }
            let told = self.told.entry(record.service).or_default();
            told.retries += u64::from(record.events & Event::Retry.bit() != 0);
            told.refusals += u64::from(record.events & (DROPPED | REFUSED) != 0);
        }
        if self.renewed.elapsed() > LEASE / 6 {
            tracer.renew();
            self.renewed = Instant::now();
        }
    }

    /// What came since the last look.
    pub(super) fn sample(&mut self) -> anyhow::Result<Report> {
        let now = self.look()?;
        let changed = |id: &u32, state: &BackendState| {
            let before = self.before.backends.get(id);
            before.is_none_or(|(before, _)| connections(before) != connections(state))
        };
        let is_strange = now
            .backends
            .iter()
            .any(|(id, (state, _))| !self.known.contains_key(id) && changed(id, state));
        let is_old = self.known_since.elapsed() > KNOWN_FOR;
        let is_nameless = self
            .told
            .keys()
            .any(|number| !self.names.contains_key(number));
        if is_strange || is_old || is_nameless {
            self.learn()?;
        }
        let lost = self.tracer.as_ref().map_or(0, Tracer::lost);
        let mut report = Report {
            seconds: (now.at - self.before.at).as_secs_f64(),
            services: self.services(&now),
            events: since(&self.before.events, &now.events),
            counts_traffic: self.counts_traffic,
            lost: lost - self.lost,
            no_tracer: self.tracer.as_ref().err().cloned(),
            history: Vec::new(),
        };
        (self.before, self.lost) = (now, lost);
        self.told.clear();
        self.remember(&mut report);
        Ok(report)
    }

    fn services(&self, now: &Look) -> Vec<ServiceLine> {
        let traces = self.tracer.is_ok();
        let mut lines: HashMap<u32, ServiceLine> = self
            .names
            .iter()
            .map(|(&number, (namespace, service))| {
                let told = self.told.get(&number).copied().unwrap_or_default();
                let line = ServiceLine {
                    namespace: namespace.clone(),
                    service: service.clone(),
                    retries: traces.then_some(told.retries),
                    refusals: traces.then_some(told.refusals),
                    packets: self.counts_traffic.then_some(0),
                    bytes: self.counts_traffic.then_some(0),
                    number,
                    ..ServiceLine::default()
                };
                (number, line)
            })
            .collect();
        let time = gc::now_in(AFFINITY_TICK_NS);
        for (id, known) in &self.known {
            let line = lines.entry(known.service).or_insert_with(|| {
                let (namespace, service) = service_name(&self.names, known.service);
                ServiceLine {
                    namespace,
                    service,
                    number: known.service,
                    ..ServiceLine::default()
                }
            });
            let (state, traffic) = now.backends.get(id).copied().unwrap_or_default();
            let (before, carried) = self.before.backends.get(id).copied().unwrap_or_default();
            // Less than before: the id was given to another backend meanwhile.
            let more = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
            let count = more(connections(&state), connections(&before));
            line.connections += count;
            let packets = |traffic: &Traffic| traffic.to_packets + traffic.from_packets;
            let bytes = |traffic: &Traffic| traffic.to_bytes + traffic.from_bytes;
            if let (Some(all_packets), Some(all_bytes)) = (&mut line.packets, &mut line.bytes) {
                *all_packets += more(packets(&traffic), packets(&carried));
                *all_bytes += more(bytes(&traffic), bytes(&carried));
            }
            line.backends.push(BackendLine {
                address: known.address,
                protocol: known.protocol.clone(),
                local: known.local,
                quarantine: Quarantine::of(&state, time),
                connections: count,
                share: 0.0,
            });
        }
        let mut lines: Vec<ServiceLine> = lines.into_values().collect();
        for line in &mut lines {
            for backend in &mut line.backends {
                let share = backend.connections as f64 / line.connections.max(1) as f64;
                backend.share = (share * 1000.0).round() / 10.0;
            }
            line.backends.sort_by(|a, b| {
                let key = |it: &BackendLine| (it.address, it.protocol.clone());
                b.connections
                    .cmp(&a.connections)
                    .then_with(|| key(a).cmp(&key(b)))
            });
        }
        lines.sort_by(|a, b| {
            let name = |it: &ServiceLine| (it.namespace.clone(), it.service.clone());
            b.connections
                .cmp(&a.connections)
                .then_with(|| name(a).cmp(&name(b)))
        });
        lines
    }

    /// Adds the report to the last minute's, and the last minute to the report.
    fn remember(&mut self, report: &mut Report) {
        fn push(history: &mut VecDeque<u64>, count: u64) {
            if history.len() == HISTORY {
                history.pop_front();
            }
            history.push_back(count);
        }
        push(
            &mut self.history,
            report.services.iter().map(|line| line.connections).sum(),
        );
        report.history = self.history.iter().copied().collect();
        for line in &mut report.services {
            if line.connections > 0 || self.histories.contains_key(&line.number) {
                let history = self.histories.entry(line.number).or_default();
                push(history, line.connections);
                line.history = history.iter().copied().collect();
            }
        }
        self.histories
            .retain(|_, history| history.iter().any(|&count| count > 0));
    }
}

/// New flows so far, whichever hook chose the backend.
fn connections(state: &BackendState) -> u64 {
    state.socket_flows + state.tc_flows + state.xdp_flows
}

fn since(before: &[(Event, u64)], now: &[(Event, u64)]) -> BTreeMap<&'static str, u64> {
    let more = |(&(event, now), &(_, then)): (&(Event, u64), &(Event, u64))| {
        (event.name(), now.saturating_sub(then))
    };
    now.iter().zip(before).map(more).collect()
}
