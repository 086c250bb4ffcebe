//! What came between two looks at the maps.
//!
//! A look costs what the counters of all backends cost to read, and then by the Services that have
//! something to tell: lines are made of these alone.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    mem,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use serde::{Serialize, Serializer};
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
        maps::{BackendStates, Maps},
        trace::{LEASE, Tracer},
    },
    gc,
    object::Protocol,
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
    /// Those that have something to tell or are wanted, the one with the most new connections first.
    pub services: Vec<ServiceLine>,
    /// How many of them have something to tell; one that is only looked at has not.
    #[serde(skip)]
    pub active: usize,
    /// The others, by name.
    #[serde(skip)]
    pub idle: Vec<Rc<Named>>,
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

/// A Service, and its place among all.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Named {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub service: String,
    /// Its number in the maps.
    #[serde(skip)]
    pub number: u32,
    /// How many come before it by name.
    #[serde(skip)]
    pub rank: u32,
}

/// What a Service got.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceLine {
    /// Which it is.
    #[serde(flatten, serialize_with = "pointed")]
    pub name: Rc<Named>,
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
    /// Its backends, the one with the most new connections first, where they are asked for.
    pub backends: Vec<BackendLine>,
    /// New connections at the last looks, oldest first, where its backends are asked for.
    #[serde(skip)]
    pub history: Vec<u64>,
}

/// Serde has no `Rc` without a feature of its own.
fn pointed<S: Serializer>(name: &Rc<Named>, serializer: S) -> Result<S::Ok, S::Error> {
    name.as_ref().serialize(serializer)
}

/// What a backend got.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BackendLine {
    /// Address and port.
    pub address: SocketAddr,
    /// `TCP`, `UDP` or `SCTP`.
    #[serde(serialize_with = "shown")]
    pub protocol: Protocol,
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

fn shown<S: Serializer>(protocol: &Protocol, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(protocol)
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
    /// That of a Service that got nothing.
    pub(super) fn idle(name: Rc<Named>, report: &Report) -> Self {
        let nothing = report.no_tracer.is_none().then_some(0);
        let no_traffic = report.counts_traffic.then_some(0);
        Self {
            name,
            retries: nothing,
            refusals: nothing,
            packets: no_traffic,
            bytes: no_traffic,
            ..Self::default()
        }
    }
}

/// Of which Services there are to be lines, and whose backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Those that have something to tell, with their backends.
    Active,
    /// All, with their backends.
    All,
    /// Those that have something to tell; the Service with this number with its backends.
    Opened(Option<u32>),
}

impl Wanted {
    fn backends_of(self, number: u32) -> bool {
        match self {
            Self::Active | Self::All => true,
            Self::Opened(opened) => opened == Some(number),
        }
    }
}

/// A backend, and whose it is.
struct Known {
    service: u32,
    address: SocketAddr,
    protocol: Protocol,
    local: bool,
}

/// What there is beside the counters: changes only with objects.
#[derive(Default)]
struct Objects {
    names: HashMap<u32, Rc<Named>>,
    /// By name.
    sorted: Vec<Rc<Named>>,
    /// By id.
    backends: Vec<Option<Known>>,
    /// Ids by number of the Service.
    members: HashMap<u32, Vec<u32>>,
}

impl Objects {
    fn read(maps: &Maps, ids: u32) -> anyhow::Result<Self> {
        let mut known: HashMap<u32, (String, String)> = service_names(maps)?;
        let mut objects = Self::default();
        objects.backends.resize_with(ids as usize, || None);
        backends::for_each_choice(maps, |_, protocol, service, backend| {
            let Some(place @ None) = objects.backends.get_mut(backend.id as usize) else {
                return;
            };
            *place = Some(Known {
                service,
                address: SocketAddr::new(backend.address, backend.port),
                protocol,
                local: backend.local,
            });
            objects.members.entry(service).or_default().push(backend.id);
        })?;
        for &number in objects.members.keys() {
            let name = service_name(&known, number);
            known.entry(number).or_insert(name);
        }
        let mut sorted: Vec<(String, String, u32)> = known
            .into_iter()
            .map(|(number, (namespace, service))| (namespace, service, number))
            .collect();
        sorted.sort_unstable();
        for (rank, (namespace, service, number)) in (0..).zip(sorted) {
            let name = Rc::new(Named {
                namespace,
                service,
                number,
                rank,
            });
            objects.sorted.push(name.clone());
            objects.names.insert(number, name);
        }
        Ok(objects)
    }

    fn backend(&self, id: u32) -> Option<&Known> {
        self.backends.get(id as usize)?.as_ref()
    }

    fn members(&self, number: u32) -> &[u32] {
        self.members.get(&number).map_or(&[], Vec::as_slice)
    }
}

/// Counters of all backends, and what was added since the look before.
#[derive(Default)]
struct Counters {
    /// New flows so far, by id.
    connections: Vec<u64>,
    /// New flows since the last look, by id.
    more: Vec<u64>,
    /// Those that had any.
    changed: Vec<u32>,
    /// Those that leave connections unanswered.
    failing: HashMap<u32, BackendState>,
    /// Packets and bytes, both ways, so far.
    carried: HashMap<u32, (u64, u64)>,
    /// The same since the last look, where there were any.
    more_carried: HashMap<u32, (u64, u64)>,
}

impl Counters {
    fn new(ids: u32) -> Self {
        Self {
            connections: vec![0; ids as usize],
            more: vec![0; ids as usize],
            ..Self::default()
        }
    }

    fn read(&mut self, states: &BackendStates<'_>) -> anyhow::Result<()> {
        for id in self.changed.drain(..) {
            self.more[id as usize] = 0;
        }
        self.failing.clear();
        states.for_each(|id, state| {
            let Some(before) = self.connections.get_mut(id as usize) else {
                return;
            };
            let now = connections(state);
            if now != *before {
                self.more[id as usize] = since(now, mem::replace(before, now));
                self.changed.push(id);
            }
            if state.failures != 0 {
                self.failing.insert(id, *state);
            }
        })?;
        // An id that was given to another backend, which has had nothing yet.
        self.changed.retain(|&id| self.more[id as usize] != 0);
        Ok(())
    }

    fn read_traffic(&mut self, maps: &Maps) -> anyhow::Result<()> {
        self.more_carried.clear();
        maps.for_each_traffic(|id, traffic| {
            let now = carried(&traffic);
            let before = self.carried.insert(id, now).unwrap_or_default();
            if now != before {
                let more = (since(now.0, before.0), since(now.1, before.1));
                self.more_carried.insert(id, more);
            }
        })?;
        Ok(())
    }
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
    states: BackendStates<'a>,
    tracer: Result<Tracer, String>,
    renewed: Instant,
    lost: u64,
    told: HashMap<u32, Told>,
    objects: Objects,
    objects_since: Instant,
    /// Ids that had connections, and that no frontend leads to.
    ownerless: HashSet<u32>,
    counts_traffic: bool,
    counters: Counters,
    events: Vec<(Event, u64)>,
    looked: Instant,
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
        let states = maps.backend_states();
        let mut sampler = Self {
            maps,
            counters: Counters::new(states.ids()),
            states,
            tracer: Tracer::start(maps.root(), filter).map_err(|error| error.to_string()),
            renewed: Instant::now(),
            lost: 0,
            told: HashMap::new(),
            objects: Objects::default(),
            objects_since: Instant::now(),
            ownerless: HashSet::new(),
            counts_traffic: false,
            events: Vec::new(),
            looked: Instant::now(),
            history: VecDeque::new(),
            histories: HashMap::new(),
        };
        sampler.learn()?;
        sampler.look()?;
        Ok(sampler)
    }

    /// Whose the backends are.
    fn learn(&mut self) -> anyhow::Result<()> {
        self.objects = Objects::read(self.maps, self.states.ids())?;
        self.objects_since = Instant::now();
        self.counts_traffic = self.maps.counts_traffic()?;
        Ok(())
    }

    fn look(&mut self) -> anyhow::Result<()> {
        self.looked = Instant::now();
        self.events = self.maps.events()?;
        self.counters.read(&self.states)?;
        if self.counts_traffic {
            self.counters.read_traffic(self.maps)?;
        }
        Ok(())
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
    pub(super) fn sample(&mut self, wanted: Wanted) -> anyhow::Result<Report> {
        let before = mem::take(&mut self.events);
        let then = self.looked;
        self.look()?;
        self.keep_up()?;
        let lost = self.tracer.as_ref().map_or(0, Tracer::lost);
        let connections = self.connections();
        self.remember(&connections);
        let numbers = self.numbers(&connections);
        let active = numbers.len();
        let services = self.services(&connections, numbers, wanted);
        let told: HashSet<u32> = services.iter().map(|line| line.name.number).collect();
        let is_idle = |name: &&Rc<Named>| !told.contains(&name.number);
        let report = Report {
            seconds: (self.looked - then).as_secs_f64(),
            idle: self
                .objects
                .sorted
                .iter()
                .filter(is_idle)
                .cloned()
                .collect(),
            services,
            active,
            events: events_since(&before, &self.events),
            counts_traffic: self.counts_traffic,
            lost: lost - self.lost,
            no_tracer: self.tracer.as_ref().err().cloned(),
            history: self.history.iter().copied().collect(),
        };
        self.lost = lost;
        self.told.clear();
        Ok(report)
    }

    /// New connections of the Services that had any, by number.
    fn connections(&self) -> HashMap<u32, u64> {
        let mut sums = HashMap::new();
        for &id in &self.counters.changed {
            if let Some(known) = self.objects.backend(id) {
                *sums.entry(known.service).or_default() += self.counters.more[id as usize];
            }
        }
        sums
    }

    /// Reads the objects anew when something was counted that they do not explain, or after a time.
    fn keep_up(&mut self) -> anyhow::Result<()> {
        let is_strange = |id: &u32| self.objects.backend(*id).is_none();
        let is_new = |id: &u32| is_strange(id) && !self.ownerless.contains(id);
        let is_nameless = |number: &u32| !self.objects.names.contains_key(number);
        let is_old = self.objects_since.elapsed() > KNOWN_FOR;
        if is_old || self.counters.changed.iter().any(is_new) || self.told.keys().any(is_nameless) {
            self.learn()?;
            if is_old {
                self.ownerless.clear();
            }
            let changed = self.counters.changed.iter().copied();
            let objects = &self.objects;
            let ownerless = changed.filter(|id| objects.backend(*id).is_none());
            self.ownerless.extend(ownerless);
        }
        Ok(())
    }

    /// The numbers of the Services that there is something to tell of.
    fn numbers(&self, connections: &HashMap<u32, u64>) -> HashSet<u32> {
        let service = |id: &u32| self.objects.backend(*id).map(|known| known.service);
        let counters = &self.counters;
        let mut numbers: HashSet<u32> = connections.keys().copied().collect();
        numbers.extend(self.told.keys());
        numbers.extend(self.histories.keys());
        numbers.extend(counters.failing.keys().filter_map(service));
        numbers.extend(counters.more_carried.keys().filter_map(service));
        numbers.retain(|number| self.objects.names.contains_key(number));
        numbers
    }

    fn services(
        &self,
        connections: &HashMap<u32, u64>,
        mut numbers: HashSet<u32>,
        wanted: Wanted,
    ) -> Vec<ServiceLine> {
        match wanted {
            Wanted::Active => {}
            Wanted::All => numbers.extend(self.objects.names.keys()),
            Wanted::Opened(opened) => numbers.extend(opened),
        }
        let mut lines: Vec<ServiceLine> = numbers
            .into_iter()
            .filter_map(|number| {
                let name = self.objects.names.get(&number)?;
                let count = connections.get(&number).copied().unwrap_or(0);
                Some(self.service(name, count, wanted.backends_of(number)))
            })
            .collect();
        lines.sort_unstable_by_key(|line| (std::cmp::Reverse(line.connections), line.name.rank));
        lines
    }

    fn service(&self, name: &Rc<Named>, connections: u64, with_backends: bool) -> ServiceLine {
        let number = name.number;
        let members = self.objects.members(number);
        let told = self.told.get(&number).copied().unwrap_or_default();
        let traces = self.tracer.is_ok();
        let carried = members
            .iter()
            .filter_map(|id| self.counters.more_carried.get(id))
            .fold((0, 0), |sum, more| (sum.0 + more.0, sum.1 + more.1));
        let mut line = ServiceLine {
            name: name.clone(),
            connections,
            retries: traces.then_some(told.retries),
            refusals: traces.then_some(told.refusals),
            packets: self.counts_traffic.then_some(carried.0),
            bytes: self.counts_traffic.then_some(carried.1),
            backends: Vec::new(),
            history: Vec::new(),
        };
        if with_backends {
            self.detail(&mut line);
        }
        line
    }

    /// Adds a Service's backends and last minute.
    fn detail(&self, line: &mut ServiceLine) {
        let number = line.name.number;
        line.backends = self.backends(self.objects.members(number), line.connections);
        let counts = self.histories.get(&number).into_iter().flatten();
        line.history = counts.copied().collect();
    }

    /// Adds a Service's backends and last minute to the last report, which somebody opens it in.
    pub(super) fn open(&self, report: &mut Report, number: u32) {
        if let Some(at) = report.idle.iter().position(|name| name.number == number) {
            let name = report.idle.remove(at);
            report.services.push(self.service(&name, 0, false));
        }
        let mut lines = report.services.iter_mut();
        if let Some(line) = lines.find(|line| line.name.number == number) {
            self.detail(line);
        }
    }

    /// The backends with these ids, of a Service that got so many new connections.
    fn backends(&self, ids: &[u32], all: u64) -> Vec<BackendLine> {
        let time = gc::now_in(AFFINITY_TICK_NS);
        let line = |&id: &u32| {
            let known = self.objects.backend(id)?;
            let connections = self.counters.more[id as usize];
            let share = connections as f64 / all.max(1) as f64;
            let state = self.counters.failing.get(&id);
            Some(BackendLine {
                address: known.address,
                protocol: known.protocol,
                local: known.local,
                quarantine: state.and_then(|state| Quarantine::of(state, time)),
                connections,
                share: (share * 1000.0).round() / 10.0,
            })
        };
        let mut lines: Vec<BackendLine> = ids.iter().filter_map(line).collect();
        lines.sort_unstable_by_key(|line| {
            let most_first = std::cmp::Reverse(line.connections);
            (most_first, line.address, line.protocol as u8)
        });
        lines
    }

    /// Adds what came to the last minute's.
    fn remember(&mut self, connections: &HashMap<u32, u64>) {
        fn push(history: &mut VecDeque<u64>, count: u64) {
            if history.len() == HISTORY {
                history.pop_front();
            }
            history.push_back(count);
        }
        push(&mut self.history, connections.values().sum());
        for &number in connections.keys() {
            self.histories.entry(number).or_default();
        }
        self.histories.retain(|number, history| {
            push(history, connections.get(number).copied().unwrap_or(0));
            history.iter().any(|&count| count > 0)
        });
    }
}

/// New flows so far, whichever hook chose the backend.
fn connections(state: &BackendState) -> u64 {
    state.socket_flows + state.tc_flows + state.xdp_flows
}

/// Packets and bytes, both ways.
fn carried(traffic: &Traffic) -> (u64, u64) {
    (
        traffic.to_packets + traffic.from_packets,
        traffic.to_bytes + traffic.from_bytes,
    )
}

/// What was counted since; less than before: the id was given to another backend meanwhile.
fn since(now: u64, before: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

fn events_since(before: &[(Event, u64)], now: &[(Event, u64)]) -> BTreeMap<&'static str, u64> {
    let more = |(&(event, now), &(_, then)): (&(Event, u64), &(Event, u64))| {
        (event.name(), now.saturating_sub(then))
    };
    now.iter().zip(before).map(more).collect()
}

/// A rate in few characters.
pub(super) fn rate(count: u64, seconds: f64) -> String {
    let rate = count as f64 / seconds.max(0.001);
    match rate {
        0.0 => "0".to_owned(),
        ..9.95 => format!("{rate:.1}"),
        ..999.5 => format!("{rate:.0}"),
        ..999_500.0 => format!("{:.1}k", rate / 1e3),
        ..999_500_000.0 => format!("{:.1}M", rate / 1e6),
        _ => format!("{:.1}G", rate / 1e9),
    }
}
