//! What tracers are told of packets that are run through the loaded programs.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use shunt::{
    datapath::{
        bpf::{self, MappedArray, map},
        maps::{Maps, maps_dir},
        trace::{LEASE, TraceError, Tracer},
    },
    object::{ObjectName, Protocol},
    plan::{Frontend, Scope, ServicePlan},
};
use shunt_common::{
    event::Event,
    layout::{
        FLOW_SEEN_REPLY, FRONTEND_DROP, FRONTEND_SOURCE_RANGES, MAX_TRACERS, Octets, SnatSlot,
        TAIL_CALLS, TRACE_AT_TC, TRACE_AT_XDP, TRACE_BACKEND_CLOSES, TRACE_CLIENT_CLOSES,
        TRACE_HAS_SERVICE, TraceFilter, TraceRecord, UDP, names,
    },
    trace::{DROPPED, REFUSED, TraceKind},
};

use crate::{
    loaded::{
        BACKEND, CLIENT, EMPTY, FAR, KEPT, Loaded, NODE, REMOTE, WEB, frontend, kept_backend,
    },
    odd::{UNALLOCATED, fragments, sctp},
    packets::{packet, segment},
};

type Record = TraceRecord<[u8; 16]>;

/// A Service whose policy leaves this node without a backend.
const LOCAL: [&str; 2] = ["10.96.0.4", "fd96::4"];
/// A Service that [`CLIENT`] may not dial.
const CLOSED: [&str; 2] = ["10.96.0.5", "fd96::5"];

fn everything() -> TraceFilter<[u8; 16]> {
    TraceFilter {
        events: u64::MAX,
        closes: TRACE_CLIENT_CLOSES | TRACE_BACKEND_CLOSES,
        ..TraceFilter::default()
    }
}

fn octets(address: &str) -> [u8; 16] {
    match address.parse().unwrap() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn shown(octets: [u8; 16]) -> String {
    Ipv6Addr::from(octets).to_canonical().to_string()
}

/// All that was told since the last time. The tracer says that it lives.
fn told(tracer: &mut Tracer) -> Vec<Record> {
    tracer.renew();
    std::iter::from_fn(|| tracer.receive()).collect()
}

/// The one thing that was told, whose packet this was. (A tc program runs twice where a checksum
/// ends up in another place than it was.)
fn only(tracer: &mut Tracer, from: (&str, u16), to: (&str, u16)) -> Record {
    let records = told(tracer);
    let first = *records.first().expect("nothing was told");
    for record in &records {
        assert_eq!(
            (shown(record.src).as_str(), record.src_port),
            from,
            "{record:?}"
        );
        assert_eq!(
            (shown(record.dst).as_str(), record.dst_port),
            to,
            "{record:?}"
        );
        assert_eq!(record.kind(), first.kind(), "{records:?}");
    }
    first
}

/// A8: one line a flow, with all that was decided; packets of open flows are not told of.
#[test]
fn a_new_flow_is_told_once_with_its_backend_and_source() {
    let loaded = Loaded::new("told");
    let mut tracer = Tracer::start(&loaded.root, everything()).unwrap();
    for (n, (program, hook)) in [
        ("xdp_node", TRACE_AT_XDP),
        ("tc_node_in", TRACE_AT_TC),
        ("tc_pod_in", TRACE_AT_TC),
    ]
    .into_iter()
    .enumerate()
    {
        for v6 in [0, 1] {
            for udp in [false, true] {
                let port = 40_000 + n as u16;
                let from = (CLIENT[v6], port);
                loaded.run(program, &packet(CLIENT[v6], port, FAR[v6], 80, udp));
                let record = only(&mut tracer, from, (FAR[v6], 80));
                assert_eq!(record.kind(), TraceKind::New, "{program}");
                assert_eq!(record.hook, hook, "{program}");
                assert_eq!(record.proto == UDP, udp);
                assert_eq!(shown(record.backend), REMOTE[v6], "{program}");
                assert_eq!(record.backend_port, 8080);
                assert_ne!(record.flags & TRACE_HAS_SERVICE, 0);
                if program != "tc_pod_in" {
                    assert_eq!(shown(record.snat), NODE[v6], "{program}");
                }
            }
            let leaving = ["tc_node_out", "tc_node_out", "tc_pod_out"][n];
            let port = 41_000 + n as u16;
            let ack = || {
                let packet = segment(CLIENT[v6], port, WEB[v6], 80, "ACK");
                loaded.run(program, &packet);
            };
            loaded.run(program, &packet(CLIENT[v6], port, WEB[v6], 80, false));
            let answer = segment(BACKEND[v6], 8080, CLIENT[v6], port, "SYN ACK");
            loaded.run(leaving, &answer);
            ack();
            only(&mut tracer, (CLIENT[v6], port), (WEB[v6], 80));
            for _ in 0..10 {
                ack();
                assert_eq!(told(&mut tracer), []);
            }
        }
    }
    // An open connection whose entry was lost has one again.
    for v6 in [0, 1] {
        let ack = segment(CLIENT[v6], 42_000, WEB[v6], 80, "ACK");
        loaded.run("tc_node_in", &ack);
        let record = only(&mut tracer, (CLIENT[v6], 42_000), (WEB[v6], 80));
        assert_eq!(record.kind(), TraceKind::Remade);
    }
    assert_eq!(tracer.lost(), 0);
}

/// Services with what [`Loaded`] lacks.
fn special() -> ServicePlan {
    let mut frontends = Vec::new();
    for v6 in [0, 1] {
        for scope in [Scope::Internal, Scope::External] {
            for (address, flags, backend) in [
                (LOCAL[v6], FRONTEND_DROP, None),
                (
                    CLOSED[v6],
                    FRONTEND_SOURCE_RANGES,
                    Some((BACKEND[v6], true)),
                ),
            ] {
                frontends.push(Frontend {
                    flags,
                    ..frontend(address, Protocol::Tcp, scope, backend)
                });
            }
        }
    }
    frontends.sort_by_key(|frontend| frontend.id);
    ServicePlan {
        frontends,
        source_ranges: ["192.0.2.0/24", "2001:db8:2::/48"]
            .map(|net| net.parse().unwrap())
            .into(),
        ..ServicePlan::empty(ObjectName::new("default", "special"))
    }
}

/// A8, T4: every reason that an event names can be seen, with the packet that it is about.
#[test]
fn every_reason_is_told_with_its_packet() {
    let loaded = Loaded::new("reasons");
    loaded.apply(&special());
    let mut seen = [0u64; 2];
    for v6 in [0, 1] {
        let mut tracer = Tracer::start(&loaded.root, everything()).unwrap();
        let tcp = |to: &str, port| packet(CLIENT[v6], 43_000, to, port, false);
        let late = &fragments(&packet(CLIENT[v6], 43_000, WEB[v6], 80, true), v6, 10, 24)[1];
        let first = &fragments(&sctp((CLIENT[v6], 43_000), (WEB[v6], 80)), v6, 9, 24)[0];
        for (frame, to, kind, event) in [
            (
                tcp(EMPTY[v6], 80),
                (EMPTY[v6], 80),
                TraceKind::Refused,
                Event::NoBackend,
            ),
            (
                tcp(WEB[v6], 81),
                (WEB[v6], 81),
                TraceKind::Refused,
                Event::UnknownPort,
            ),
            (
                tcp(LOCAL[v6], 80),
                (LOCAL[v6], 80),
                TraceKind::Dropped,
                Event::PolicyDrop,
            ),
            (
                tcp(CLOSED[v6], 80),
                (CLOSED[v6], 80),
                TraceKind::Dropped,
                Event::SourceDenied,
            ),
            (
                tcp(UNALLOCATED[v6], 80),
                (UNALLOCATED[v6], 80),
                TraceKind::Dropped,
                Event::UnknownAddress,
            ),
            (
                segment(CLIENT[v6], 43_000, WEB[v6], 80, "SYN ACK"),
                (WEB[v6], 80),
                TraceKind::Dropped,
                Event::NoFlow,
            ),
            // The sum of a datagram that is not here whole covers its ports.
            (
                first.clone(),
                (WEB[v6], 80),
                TraceKind::Dropped,
                Event::RewriteFailed,
            ),
        ] {
            loaded.run("tc_node_in", &frame);
            let record = only(&mut tracer, (CLIENT[v6], 43_000), to);
            assert_eq!(record.kind(), kind, "{event:?}");
            assert_ne!(record.events & event.bit(), 0, "{event:?}: {record:?}");
            seen[v6] |= record.events;
        }
        loaded.run("tc_node_in", late);
        let record = only(&mut tracer, (CLIENT[v6], 0), (WEB[v6], 0));
        assert_ne!(record.events & Event::FragmentLost.bit(), 0, "{record:?}");
        seen[v6] |= record.events;

        let limited = (0..200).find_map(|_| {
            loaded.run("tc_node_in", &tcp(EMPTY[v6], 80));
            told(&mut tracer)
                .into_iter()
                .find(|record| record.kind() == TraceKind::Dropped)
        });
        let record = limited.expect("200 SYNs, and all were answered");
        seen[v6] |= record.events;

        seen[v6] |= refused_by_its_backend(&loaded, &mut tracer, v6);
        seen[v6] |= reset_with_its_backend(&loaded, &mut tracer, v6);
        seen[v6] |= without_a_source(&loaded, &mut tracer, v6);
        let wanted = DROPPED
            | REFUSED
            | [Event::BackendGone, Event::RefusalHeld, Event::Retry]
                .map(Event::bit)
                .iter()
                .sum::<u64>();
        let missing: BTreeSet<_> = Event::ALL
            .iter()
            .filter(|event| wanted & !seen[v6] & event.bit() != 0)
            .collect();
        assert!(missing.is_empty(), "IPv{}: {missing:?}", 4 + 2 * v6);
    }
}

/// A backend says no, of which the client does not hear; its next SYN goes elsewhere.
fn refused_by_its_backend(loaded: &Loaded, tracer: &mut Tracer, v6: usize) -> u64 {
    loaded.serve_kept(2);
    let syn = packet(CLIENT[v6], 44_000, KEPT[v6], 80, false);
    loaded.run("tc_node_in", &syn);
    let first = only(tracer, (CLIENT[v6], 44_000), (KEPT[v6], 80));
    let backend = shown(first.backend);
    let refusal = segment(&backend, 8080, CLIENT[v6], 44_000, "RST");
    loaded.run("tc_node_out", &refusal);
    let held = only(tracer, (&backend, 8080), (CLIENT[v6], 44_000));
    assert_eq!(held.kind(), TraceKind::Held, "{held:?}");
    assert_eq!(shown(held.backend), backend);
    loaded.run("tc_node_in", &syn);
    let retry = only(tracer, (CLIENT[v6], 44_000), (KEPT[v6], 80));
    assert_eq!(retry.kind(), TraceKind::Retry);
    assert_ne!(shown(retry.backend), backend);
    assert!(
        [1, 2]
            .iter()
            .any(|&n| kept_backend(v6 == 1, n) == shown(retry.backend))
    );
    held.events | retry.events
}

/// The backend of an open connection goes, and nobody answers.
fn reset_with_its_backend(loaded: &Loaded, tracer: &mut Tracer, v6: usize) -> u64 {
    let ack = segment(CLIENT[v6], 45_000, WEB[v6], 80, "ACK");
    loaded.run(
        "tc_node_in",
        &packet(CLIENT[v6], 45_000, WEB[v6], 80, false),
    );
    let answer = segment(BACKEND[v6], 8080, CLIENT[v6], 45_000, "SYN ACK");
    loaded.run("tc_node_out", &answer);
    loaded.run("tc_node_in", &ack);
    told(tracer);
    loaded.serve(false);
    let began = Instant::now();
    let events = loop {
        assert!(began.elapsed() < Duration::from_secs(20), "not reset");
        // Not tc's, where it could run twice for one packet.
        loaded.run("xdp_node", &ack);
        if let Some(record) = told(tracer).first() {
            assert_eq!(record.kind(), TraceKind::Reset, "{record:?}");
            break record.events;
        }
        thread::sleep(Duration::from_millis(100));
    };
    loaded.serve(true);
    events
}

/// Every port of the range belongs to an open flow, of others or of the client itself; then the node
/// has no address.
fn without_a_source(loaded: &Loaded, tracer: &mut Tracer, v6: usize) -> u64 {
    let syn = |port| packet(CLIENT[v6], port, FAR[v6], 80, false);
    loaded.run("xdp_node", &syn(20_000));
    told(tracer);
    let mut refused = |port, event: Event| {
        loaded.run("xdp_node", &syn(port));
        let record = only(tracer, (CLIENT[v6], port), (FAR[v6], 80));
        assert_ne!(record.events & event.bit(), 0, "{event:?}: {record:?}");
        assert_eq!(record.kind(), TraceKind::Refused);
        assert_eq!(shown(record.backend), REMOTE[v6]);
        record.events
    };
    let mut events = 0;
    for (n, event) in [Event::SnatExhausted, Event::SnatLimited]
        .into_iter()
        .enumerate()
    {
        match CLIENT[v6].parse().unwrap() {
            IpAddr::V4(own) => take_all(loaded, v6, (n == 1).then_some(own.octets())),
            IpAddr::V6(own) => take_all(loaded, v6, (n == 1).then_some(own.octets())),
        }
        events |= refused(20_001 + n as u16, event);
    }
    let maps = Maps::open(&loaded.root).unwrap();
    let config = maps.config().unwrap();
    let mut without = config;
    (without.v4.node, without.v6.node) = Default::default();
    maps.set_config(&without).unwrap();
    events |= refused(20_003, Event::NoSourceAddress);
    maps.set_config(&config).unwrap();
    events
}

/// Makes every source port one of a flow that is open, of this client or of another.
fn take_all<A: Octets + Default>(loaded: &Loaded, v6: usize, client: Option<A>) {
    let pin = maps_dir(&loaded.root).join(names::SNAT[v6]);
    let slots = MappedArray::<SnatSlot<A>>::new(bpf::open(&pin).unwrap().as_fd(), 20_000).unwrap();
    let used = (0..slots.len())
        .map(|index| slots.get(index))
        .find(|slot| slot.last_seen != 0)
        .expect("a flow has a port");
    let other = SnatSlot {
        owner: !used.owner,
        state: used.state | FLOW_SEEN_REPLY,
        client: client.unwrap_or_default(),
        ..used
    };
    (0..slots.len()).for_each(|index| slots.set(index, other));
}

/// A packet whose program somebody has taken out of `tail_calls` goes on as it is; that is counted, and
/// told.
#[test]
fn a_program_that_is_missing_is_told() {
    let loaded = Loaded::new("missing");
    let mut tracer = Tracer::start(&loaded.root, everything()).unwrap();
    let tail_calls = bpf::open(&maps_dir(&loaded.root).join(names::TAIL_CALLS)).unwrap();
    for place in 0..TAIL_CALLS as u32 {
        map::delete(tail_calls.as_fd(), &place).unwrap();
    }
    for v6 in [0, 1] {
        for (n, program) in ["tc_node_in", "tc_pod_in"].into_iter().enumerate() {
            let sent = packet(CLIENT[v6], 47_000 + n as u16, WEB[v6], 80, false);
            let (_, after) = loaded.run(program, &sent);
            assert_eq!(after, sent, "{program}");
            let records = told(&mut tracer);
            assert!(!records.is_empty(), "{program}");
            for record in records {
                assert_eq!(record.events, Event::ProgramMissing.bit());
                assert_eq!(record.kind(), TraceKind::Other);
                assert_ne!(record.device, 0);
            }
        }
    }
    let events = Maps::open(&loaded.root).unwrap().events().unwrap();
    let missing = events
        .iter()
        .find(|(event, _)| *event == Event::ProgramMissing);
    assert!(missing.is_some_and(|&(_, count)| count >= 4), "{events:?}");
}

/// A8: filters run in the kernel, one for each tracer, and none takes another's records.
#[test]
fn tracers_get_what_each_wants() {
    let loaded = Loaded::new("filters");
    let mut all = Tracer::start(&loaded.root, everything()).unwrap();
    let mut drops = Tracer::start(
        &loaded.root,
        TraceFilter {
            events: DROPPED,
            closes: 0,
            ..everything()
        },
    )
    .unwrap();
    let mut flow = Tracer::start(
        &loaded.root,
        TraceFilter {
            src: octets(CLIENT[0]),
            src_port: 46_001,
            dst: octets(BACKEND[0]),
            ..everything()
        },
    )
    .unwrap();
    let mut pod = Tracer::start(
        &loaded.root,
        TraceFilter {
            pod: octets(BACKEND[1]),
            ..everything()
        },
    )
    .unwrap();
    let taken = Tracer::start(&loaded.root, everything()).err();
    assert!(
        matches!(taken, Some(TraceError::Taken)),
        "{MAX_TRACERS} are"
    );
    for v6 in [0, 1] {
        for port in [46_000, 46_001] {
            loaded.run("tc_node_in", &packet(CLIENT[v6], port, WEB[v6], 80, true));
        }
        loaded.run(
            "tc_node_in",
            &packet(CLIENT[v6], 46_000, UNALLOCATED[v6], 80, true),
        );
    }
    let ports = |tracer: &mut Tracer| -> BTreeSet<(String, u16)> {
        told(tracer)
            .iter()
            .map(|record| (shown(record.dst), record.src_port))
            .collect()
    };
    let set = |wanted: &[(&str, u16)]| -> BTreeSet<(String, u16)> {
        wanted
            .iter()
            .map(|&(to, port)| (to.to_owned(), port))
            .collect()
    };
    assert_eq!(ports(&mut all).len(), 6);
    let dropped = [(UNALLOCATED[0], 46_000), (UNALLOCATED[1], 46_000)];
    assert_eq!(ports(&mut drops), set(&dropped));
    assert_eq!(ports(&mut flow), set(&[(WEB[0], 46_001)]));
    assert_eq!(ports(&mut pod), set(&[(WEB[1], 46_000), (WEB[1], 46_001)]));
    drop(all);
    Tracer::start(&loaded.root, everything()).expect("a place is free again");
}

/// A8: a tracer that is killed leaves nothing on, and what is lost is counted.
#[test]
fn a_lease_ends_by_itself_and_losses_are_counted() {
    let loaded = Loaded::new("lease");
    let mut tracer = Tracer::start(&loaded.root, everything()).unwrap();
    let open = |n: u32| {
        let from = format!("198.18.{}.{}", n / 250, n % 250 + 1);
        loaded.run("xdp_node", &packet(&from, 20_000, WEB[0], 80, true));
    };
    let mut sent = 0;
    while tracer.lost() == 0 {
        assert!(sent < 200_000, "a ring buffer without end");
        // Nobody reads it, and it lives.
        if sent % 1000 == 0 {
            tracer.renew();
        }
        open(sent % 60_000);
        sent += 1;
    }
    let kept = told(&mut tracer).len() as u64;
    assert_eq!(kept + tracer.lost(), u64::from(sent));
    thread::sleep(LEASE + Duration::from_millis(100));
    open(0);
    assert_eq!(told(&mut tracer), [], "its lease is over");
    tracer.renew();
    open(60_001);
    assert_eq!(told(&mut tracer).len(), 1);
}
