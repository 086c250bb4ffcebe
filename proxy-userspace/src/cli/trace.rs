//! `shunt trace`: what the programs decide, as they decide it.

use std::{net::IpAddr, time::Duration};

use anyhow::bail;
use clap::Args;
use shunt_common::{
    event::Event,
    layout::{TRACE_BACKEND_CLOSES, TRACE_CLIENT_CLOSES, TraceFilter},
    trace::{DROPPED, REFUSED},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    Common, Output, Peer, block_on, open,
    pods::{self, PodSource},
    print, service_names,
};
use crate::{
    datapath::{
        maps::Maps,
        trace::{LEASE, Tracer},
    },
    object::ObjectName,
    record::{Names, octets},
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
