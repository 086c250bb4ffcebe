//! `shunt trace`: what the programs decide, as they decide it.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use shunt_common::{
    event::Event,
    layout::{
        TCP, TRACE_AT_SOCKET, TRACE_AT_TC, TRACE_BACKEND_CLOSES, TRACE_CLIENT_CLOSES,
        TRACE_HAS_BACKEND, TRACE_HAS_SERVICE, TRACE_HAS_SOURCE, TraceFilter, TraceRecord, UDP,
    },
    trace::{DROPPED, REFUSED},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    Common, Output, Peer, block_on, open,
    pods::{self, PodSource},
    print, service_name, service_names,
};
use crate::{
    datapath::{
        maps::Maps,
        rtnl,
        trace::{self, LEASE, Tracer},
    },
    object::ObjectName,
};

/// How often the ring buffer is looked at: nobody is woken for a record.
const LOOK: Duration = Duration::from_millis(20);

/// So many records that are not told are enough to say that there are many.
const MANY: u64 = 100_000;

/// `shunt trace`.
#[derive(Clone, Debug, Args)]
pub struct TraceArgs {
    /// Only of this Service: [NAMESPACE/]NAME. Closes and packets that no frontend takes are of
    /// none.
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// Only to and from this Pod: ADDRESS or NAMESPACE/NAME.
    #[arg(long, value_name = "POD")]
    pod: Option<String>,
    /// Only this protocol.
    #[arg(long, value_enum, ignore_case = true)]
    proto: Option<pods::ProtocolArg>,
    /// Only what is dropped, refused or reset.
    #[arg(long)]
    drop: bool,
    /// Only between these two: ADDRESS or ADDRESS:PORT ([ADDRESS]:PORT for IPv6); DST is a
    /// frontend or a backend.
    #[arg(long, num_args = 2, value_names = ["SRC", "DST"])]
    flow: Option<Vec<Peer>>,
    /// End after so many lines [default: end with Ctrl-C].
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    #[command(flatten)]
    pods: PodSource,
    #[command(flatten)]
    common: Common,
}

/// One decision, for scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    /// RFC 3339, to a tick of the kernel's.
    time: String,
    /// What it is: see [`TraceKind`].
    kind: &'static str,
    protocol: String,
    /// `None` at sockets, which have no address yet.
    source: Option<SocketAddr>,
    destination: SocketAddr,
    /// `namespace/name`, where a frontend was found.
    service: Option<String>,
    backend: Option<SocketAddr>,
    /// What the backend sees as the source, where that is translated.
    translated_source: Option<SocketAddr>,
    /// `socket`, `tc` or `xdp`.
    hook: &'static str,
    device: Option<String>,
    /// What was counted, as `shunt status` and the metrics call it.
    events: Vec<&'static str>,
}

fn address(octets: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(octets).to_canonical()
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// What numbers mean here.
struct Names<'a> {
    maps: &'a Maps,
    services: HashMap<u32, (String, String)>,
    devices: HashMap<u32, String>,
    /// What a time of the kernel's is more at the wall, in ns.
    wall: i128,
}

impl<'a> Names<'a> {
    fn new(maps: &'a Maps) -> anyhow::Result<Self> {
        Ok(Self {
            maps,
            services: service_names(maps)?,
            devices: HashMap::new(),
            wall: Timestamp::now().as_nanosecond() - i128::from(trace::now()),
        })
    }

    fn service(&mut self, number: u32) -> anyhow::Result<String> {
        if !self.services.contains_key(&number) {
            self.services = service_names(self.maps)?;
        }
        let (namespace, name) = service_name(&self.services, number);
        Ok(format!("{namespace}/{name}"))
    }

    fn device(&mut self, index: u32) -> String {
        let name = || match rtnl::device_name(index) {
            Ok(Some(name)) => name,
            _ => format!("#{index}"),
        };
        self.devices.entry(index).or_insert_with(name).clone()
    }

    fn line(&mut self, record: &TraceRecord<[u8; 16]>) -> anyhow::Result<Line> {
        let has = |flag| record.flags & flag != 0;
        let time = Timestamp::from_nanosecond(self.wall + i128::from(record.time))
            .context("a time that no calendar has")?;
        Ok(Line {
            time: format!("{time:.3}"),
            kind: record.kind().name(),
            protocol: match record.proto {
                TCP => "TCP",
                UDP => "UDP",
                shunt_common::layout::SCTP => "SCTP",
                1 | 58 => "ICMP",
                _ => "other",
            }
            .to_owned(),
            source: (record.hook != TRACE_AT_SOCKET)
                .then(|| SocketAddr::new(address(record.src), record.src_port)),
            destination: SocketAddr::new(address(record.dst), record.dst_port),
            service: match has(TRACE_HAS_SERVICE) {
                true => Some(self.service(record.service)?),
                false => None,
            },
            backend: has(TRACE_HAS_BACKEND)
                .then(|| SocketAddr::new(address(record.backend), record.backend_port)),
            translated_source: has(TRACE_HAS_SOURCE)
                .then(|| SocketAddr::new(address(record.snat), record.snat_port)),
            hook: match record.hook {
                TRACE_AT_SOCKET => "socket",
                TRACE_AT_TC => "tc",
                _ => "xdp",
            },
            device: (record.device != 0).then(|| self.device(record.device)),
            events: Event::ALL
                .iter()
                .filter(|event| record.events & event.bit() != 0)
                .map(|event| event.name())
                .collect(),
        })
    }
}

impl Line {
    /// One line for people; its parts that are always there have a place of their own.
    fn text(&self) -> String {
        let clock = self.time.get(11..23).unwrap_or(&self.time);
        let mut text = format!("{clock} {:<8}{:<5}", self.kind, self.protocol);
        if let Some(source) = self.source {
            text += &format!("{source} > ");
        }
        text += &self.destination.to_string();
        if let Some(service) = &self.service {
            text += &format!(" {service}");
        }
        if let Some(backend) = self.backend {
            text += &format!(" > {backend}");
        }
        if let Some(source) = self.translated_source {
            text += &format!(" from {source}");
        }
        text += &format!("  {}", self.hook);
        if let Some(device) = &self.device {
            text += &format!(" {device}");
        }
        let plain = [
            Event::SocketFlow,
            Event::TcFlow,
            Event::XdpFlow,
            Event::Retry,
        ];
        let why: Vec<&str> = (self.events.iter().copied())
            .filter(|name| !plain.iter().any(|event| event.name() == *name))
            .collect();
        if !why.is_empty() {
            text += &format!("  {}", why.join(", "));
        }
        text
    }
}

/// The number of a Service.
fn service_number(maps: &Maps, wanted: &str) -> anyhow::Result<u32> {
    let (namespace, name) = wanted.split_once('/').unwrap_or(("default", wanted));
    let names = service_names(maps)?;
    let found = names
        .iter()
        .find(|(_, (of, is))| of == namespace && is == name);
    match found {
        Some((&number, _)) => Ok(number),
        None => bail!(
            "no Service {namespace}/{name} in the maps{}; `shunt services` lists all",
            pods::nearest(name, names.into_values())
        ),
    }
}

fn filter(
    args: &TraceArgs,
    maps: &Maps,
    pod: Option<IpAddr>,
) -> anyhow::Result<TraceFilter<[u8; 16]>> {
    let mut filter = TraceFilter {
        events: u64::MAX,
        closes: TRACE_CLIENT_CLOSES | TRACE_BACKEND_CLOSES,
        ..TraceFilter::default()
    };
    if args.drop {
        filter.events = DROPPED | REFUSED | Event::BackendGone.bit() | Event::RefusalHeld.bit();
        filter.closes = 0;
    }
    if let Some(proto) = args.proto {
        filter.proto = proto.number();
    }
    if let Some(service) = &args.service {
        filter.has_service = 1;
        filter.service = service_number(maps, service)?;
    }
    if let Some(pod) = pod {
        filter.pod = octets(pod);
    }
    if let Some([from, to]) = args.flow.as_deref() {
        filter.src = octets(from.address);
        filter.src_port = from.port.unwrap_or(0);
        filter.dst = octets(to.address);
        filter.dst_port = to.port.unwrap_or(0);
    }
    Ok(filter)
}

async fn pod(args: &TraceArgs) -> anyhow::Result<Option<IpAddr>> {
    let Some(pod) = &args.pod else {
        return Ok(None);
    };
    if let Ok(address) = pod.parse() {
        return Ok(Some(address));
    }
    let pod = pod.strip_prefix("pod/").unwrap_or(pod);
    let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
    let name = ObjectName::new(namespace, name);
    let addresses = args.pods.addresses(&name).await?;
    Ok(addresses.first().copied())
}

async fn follow(args: &TraceArgs) -> anyhow::Result<()> {
    let root = &args.common.bpf_root;
    let maps = open(root)?;
    let filter = filter(args, &maps, pod(args).await?)?;
    let mut names = Names::new(&maps)?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut tracer = Tracer::start(root, filter)?;
    if args.common.output.is_table() {
        eprintln!("tracing; Ctrl-C ends it");
    }
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut told, mut lost, mut renewed) = (0, 0, Instant::now());
    loop {
        tokio::select! {
            _ = look.tick() => {}
            _ = interrupted.recv() => break,
            _ = terminated.recv() => break,
        }
        let mut lines = String::new();
        // A flood must not keep the lease from being put off.
        for _ in 0..8192 {
            let Some(record) = tracer.receive() else {
                break;
            };
            let line = names.line(&record)?;
            lines += &match args.common.output {
                Output::Table | Output::Wide => line.text(),
                Output::Json => serde_json::to_string(&line)?,
                Output::Yaml => format!("---\n{}", serde_saphyr::to_string(&line)?.trim_end()),
            };
            lines.push('\n');
            told += 1;
            if args.count.is_some_and(|count| told >= count) {
                break;
            }
        }
        if !lines.is_empty() {
            print(lines.trim_end())?;
        }
        if renewed.elapsed() > LEASE / 6 {
            tracer.renew();
            renewed = Instant::now();
        }
        let now_lost = tracer.lost();
        if now_lost != lost {
            eprintln!("{} lost: more than this could print", now_lost - lost);
            lost = now_lost;
        }
        if args.count.is_some_and(|count| told >= count) {
            break;
        }
    }
    eprintln!("{told} told, {} lost", tracer.lost());
    Ok(())
}

/// What the programs decide within a time, as lines of JSON, and how many there were more.
///
/// # Errors
/// No maps, too many tracers, or the kernel's.
pub(super) fn record(maps: &Maps, time: Duration, most: usize) -> anyhow::Result<String> {
    let filter = TraceFilter {
        events: u64::MAX,
        closes: TRACE_CLIENT_CLOSES | TRACE_BACKEND_CLOSES,
        ..TraceFilter::default()
    };
    let mut names = Names::new(maps)?;
    let mut tracer = Tracer::start(maps.root(), filter)?;
    // Shorter than a lease.
    std::thread::sleep(time.min(LEASE / 2));
    let (mut text, mut more) = (String::new(), tracer.lost());
    let mut told = 0;
    while let Some(record) = tracer.receive() {
        if told < most {
            text += &serde_json::to_string(&names.line(&record)?)?;
            text.push('\n');
            told += 1;
        } else if more < MANY {
            more += 1;
        } else {
            // Of a flood the rest is not followed for ever.
            break;
        }
    }
    if more > 0 {
        text += &format!("{{\"notTold\":{more}}}\n");
    }
    Ok(text)
}

/// Runs the verb.
///
/// # Errors
/// No maps, a name that nothing has, too many tracers, or the kernel's.
pub fn run(args: &TraceArgs) -> anyhow::Result<()> {
    block_on(follow(args))
}

#[cfg(test)]
mod tests {
    use shunt_common::trace::TraceKind;

    use super::*;

    #[test]
    fn a_line_fits_a_hundred_columns() {
        let socket = |text: &str| Some(text.parse().unwrap());
        let line = Line {
            time: "2026-11-28T05:47:01.123Z".to_owned(),
            kind: TraceKind::Refused.name(),
            protocol: "TCP".to_owned(),
            source: socket("203.0.113.10:40000"),
            destination: "10.96.0.1:80".parse().unwrap(),
            service: Some("default/kubia".to_owned()),
            backend: None,
            translated_source: None,
            hook: "tc",
            device: Some("eth0".to_owned()),
            events: vec![Event::NoBackend.name()],
        };
        assert_eq!(
            line.text(),
            "05:47:01.123 refused TCP  203.0.113.10:40000 > 10.96.0.1:80 default/kubia  tc eth0  no_backend"
        );
        assert!(line.text().len() <= 100);
    }
}
