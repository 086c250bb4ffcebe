//! The loaded programs under `BPF_PROG_TEST_RUN`: a packet in, a verdict and a packet out, byte for
//! byte. Needs root.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya_obj::{
    Object,
    generated::{
        BPF_ADD, BPF_ALU, BPF_ALU64, BPF_CALL, BPF_JMP, BPF_K, BPF_LDX, BPF_MOV, BPF_PSEUDO_CALL,
        BPF_ST, BPF_STX, BPF_X, bpf_insn,
    },
};
use etherparse::{
    Icmpv4Type, Icmpv6Type, IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
    icmpv4, icmpv6,
};

use shunt::datapath::{
    bpf::{self, MappedArray},
    load::{self, LoadConfig, SocketLb},
    maps::Maps,
};
use shunt_common::layout::{
    FLOW_BACKEND_FIN, FLOW_RESET, Flow, FlowKey, LAYOUT_VERSION, LOADS, SnatSlot, TCP,
};

use crate::loaded::{
    BACKEND, CLIENT, EMPTY, FAR, KEPT, LOOPBACK, Loaded, NODE, REMOTE, WEB, kept_backend,
};

/// Most instructions that the verifier may walk through in one program.
const MOST_VERIFIED: u32 = 150_000;
/// The same on kernels that prune less.
const MOST_VERIFIED_BEFORE_6_18: u32 = 400_000;

const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_REDIRECT: u32 = 7;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

pub(crate) fn packet(from: &str, from_port: u16, to: &str, to_port: u16, udp: bool) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [0; 6]);
    let builder = match (from.parse().unwrap(), to.parse().unwrap()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
        _ => unreachable!("one family"),
    };
    let mut bytes = Vec::new();
    let payload = b"0123456789abcdef0123456789abcdef";
    if udp {
        builder
            .udp(from_port, to_port)
            .write(&mut bytes, payload)
            .unwrap();
    } else {
        builder
            .tcp(from_port, to_port, 1, 64_000)
            .syn()
            .write(&mut bytes, payload)
            .unwrap();
    }
    bytes
}

/// Every program that packets arrive at, with its verdicts for "not ours" and "sent back".
const ARRIVING: [(&str, u32, u32); 3] = [
    ("xdp_node", XDP_PASS, XDP_REDIRECT),
    ("tc_node_in", TC_ACT_UNSPEC, TC_ACT_REDIRECT),
    ("tc_pod_in", TC_ACT_UNSPEC, TC_ACT_REDIRECT),
];

#[test]
fn a_new_flow_is_rewritten_and_its_reply_back() {
    let loaded = Loaded::new("rewrite");
    for (n, (program, pass, _)) in ARRIVING.into_iter().enumerate() {
        for v6 in [0, 1] {
            for udp in [false, true] {
                let port = 40_000 + n as u16;
                let (verdict, out) =
                    loaded.run(program, &packet(CLIENT[v6], port, WEB[v6], 80, udp));
                assert_eq!(verdict, pass, "{program}");
                assert_eq!(
                    out,
                    packet(CLIENT[v6], port, BACKEND[v6], 8080, udp),
                    "{program}, IPv{}",
                    4 + 2 * v6
                );
                let leaving = if program == "tc_pod_in" {
                    "tc_pod_out"
                } else {
                    "tc_node_out"
                };
                let (verdict, out) =
                    loaded.run(leaving, &packet(BACKEND[v6], 8080, CLIENT[v6], port, udp));
                assert_eq!(verdict, TC_ACT_UNSPEC);
                assert_eq!(
                    out,
                    packet(WEB[v6], 80, CLIENT[v6], port, udp),
                    "{leaving}, IPv{}",
                    4 + 2 * v6
                );
            }
        }
    }
}

/// A kernel refuses a program of which its verifier has walked through a million instructions.
/// Kernels differ in what they prune: what is close to that on one is over it on another, or with
/// the next feature.
fn assert_far_from_the_verifiers_limit(loaded: &Loaded) {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let version = || {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    };
    let version: (u32, u32) =
        version().unwrap_or_else(|| panic!("{release} is no kernel's release"));
    let most = if version >= (6, 18) {
        MOST_VERIFIED
    } else {
        MOST_VERIFIED_BEFORE_6_18
    };
    let mut counts = BTreeMap::new();
    for (name, program) in loaded.programs() {
        let count = bpf::program::info(program).unwrap().verified_instructions;
        if count == 0 {
            println!("skipped: Linux {release} does not say how many instructions it verified");
            return;
        }
        counts.insert(name, count);
    }
    println!("verified instructions on Linux {release}: {counts:?}");
    assert!(counts.len() >= 14, "{counts:?}");
    assert!(
        counts.values().all(|&count| count <= most),
        "more than {most}: {counts:?}"
    );
}

/// Settings choose what the verifier sees of the programs: this kernel's takes them all. With each,
/// flows are translated, and counted where that is asked for.
#[test]
fn programs_load_with_every_setting() {
    for (fast_path, count_traffic) in [(false, false), (false, true), (true, false), (true, true)] {
        let loaded = Loaded::with("settings", |config| {
            (config.socket_lb, config.fast_path, config.count_traffic) =
                (SocketLb::On, fast_path, count_traffic);
        });
        assert_far_from_the_verifiers_limit(&loaded);
        let maps = Maps::open(&loaded.root).unwrap();
        for (n, (arriving, leaving)) in [("tc_node_in", "tc_node_out"), ("tc_pod_in", "tc_pod_out")]
            .into_iter()
            .enumerate()
        {
            for v6 in [0, 1] {
                for udp in [false, true] {
                    let case = format!(
                        "{arriving}, IPv{}, UDP {udp}, fast path {fast_path}, counted {count_traffic}",
                        4 + 2 * v6
                    );
                    let port = 42_000 + n as u16;
                    let packet = |from: [&str; 2], from_port, to: [&str; 2], to_port| {
                        packet(from[v6], from_port, to[v6], to_port, udp)
                    };
                    // Whether the fast path finds a way, which costs a hop, is up to this machine's
                    // routes.
                    let carries = |bytes: &[u8]| bytes[[26..38, 22..58][v6].clone()].to_vec();
                    let before = traffic(&maps);
                    let request = packet(CLIENT, port, WEB, 80);
                    let (_, out) = loaded.run(arriving, &request);
                    assert_eq!(
                        carries(&out),
                        carries(&packet(CLIENT, port, BACKEND, 8080)),
                        "{case}"
                    );
                    let reply = packet(BACKEND, 8080, CLIENT, port);
                    let (_, out) = loaded.run(arriving, &reply);
                    assert_eq!(carries(&out), carries(&reply), "{case}");
                    let (_, out) = loaded.run(leaving, &out);
                    assert_eq!(
                        carries(&out),
                        carries(&packet(WEB, 80, CLIENT, port)),
                        "{case}"
                    );
                    let other = packet(CLIENT, port, BACKEND, 80);
                    assert_eq!(
                        loaded.run(arriving, &other),
                        (TC_ACT_UNSPEC, other),
                        "{case}"
                    );

                    let more: Vec<u64> = traffic(&maps)
                        .iter()
                        .zip(before)
                        .map(|(now, before)| now - before)
                        .collect();
                    let bytes = request.len() as u64 - 14;
                    let expected = if count_traffic {
                        [1, bytes, 1, bytes]
                    } else {
                        [0; 4]
                    };
                    assert_eq!(more, expected, "{case}");
                }
            }
        }
    }
}

/// A13: programs stay on their devices until the last is replaced, and meanwhile find those that
/// they hand packets over to, though others were loaded, once and once more.
#[test]
fn programs_that_are_replaced_open_flows_to_the_end() {
    let mut loaded = Loaded::new("replaced");
    let maps = Maps::open(&loaded.root).unwrap();
    let mut earlier = Vec::new();
    let mut counts = false;
    for n in 0..5 {
        let set = |config: &mut LoadConfig| config.count_traffic = !counts;
        earlier.push((loaded.load_again("tc_node_in", set), counts));
        counts = !counts;
        // Three loads take turns: of those before this one, two are still to be found.
        for (back, (old, counts)) in earlier.iter().rev().take(LOADS as usize - 1).enumerate() {
            for v6 in [0, 1] {
                let case = format!("{n}, {back} loads ago, IPv{}", 4 + 2 * v6);
                let port = 43_000 + 10 * n + back as u16;
                let packet =
                    |to: [&str; 2], to_port| packet(CLIENT[v6], port, to[v6], to_port, true);
                let before = traffic(&maps)[0];
                let (_, out) =
                    loaded.run_program(old.as_fd(), LOOPBACK, "tc_node_in", &packet(WEB, 80));
                assert_eq!(out, packet(BACKEND, 8080), "{case}");
                // Which says that it was handed over to one of its own load.
                assert_eq!(traffic(&maps)[0] - before, u64::from(*counts), "{case}");
            }
        }
    }
}

/// A chain of calls has 512 bytes of stack. Kernels before 6.8 round every function's share up to
/// 32 bytes ([`stack`]), so what this one loads may be too much for them.
#[test]
fn chains_of_calls_fit_the_stack_of_older_kernels() {
    let mut object = Object::parse(load::object()).unwrap();
    let sections = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    object.relocate_calls(&sections).unwrap();
    assert!(object.programs.len() >= 10);
    for (name, program) in &object.programs {
        let needed = stack(&object.functions[&program.function_key()].instructions);
        assert!(
            (32..=512).contains(&needed),
            "{name} needs {needed} bytes of stack"
        );
    }
}

/// The stack that a program needs where kernels round up (`check_max_stack_depth` of
/// kernel/bpf/verifier.c), were all of its branches taken. It begins with its main function; the
/// others stand behind it.
fn stack(program: &[bpf_insn]) -> usize {
    const STACK: u8 = 10;
    const CALL: u32 = BPF_JMP | BPF_CALL;
    const COPY: u32 = BPF_ALU64 | BPF_MOV | BPF_X;
    const ADD: u32 = BPF_ALU64 | BPF_ADD | BPF_K;
    // Its own share, and what it calls, by a function's first instruction.
    let mut functions = BTreeMap::from([(0, (0, BTreeSet::new()))]);
    let called = |at: usize, insn: &bpf_insn| {
        let is_call = u32::from(insn.code) == CALL && u32::from(insn.src_reg()) == BPF_PSEUDO_CALL;
        is_call.then(|| (at as i32 + 1 + insn.imm) as usize)
    };
    for (at, insn) in program.iter().enumerate() {
        if let Some(callee) = called(at, insn) {
            functions.entry(callee).or_default();
        }
    }
    let mut pointers = BTreeSet::new();
    for (at, insn) in program.iter().enumerate() {
        let (_, (own, calls)) = functions.range_mut(..=at).next_back().unwrap();
        calls.extend(called(at, insn));
        let (code, to, from) = (u32::from(insn.code), insn.dst_reg(), insn.src_reg());
        let below = match code & 7 {
            BPF_LDX if from == STACK => -i32::from(insn.off),
            BPF_ST | BPF_STX if to == STACK => -i32::from(insn.off),
            _ if code == ADD && pointers.contains(&to) => -insn.imm,
            _ => 0,
        };
        *own = below.max(*own);
        if code == COPY && from == STACK {
            pointers.insert(to);
        } else if [BPF_LDX, BPF_ALU, BPF_ALU64].contains(&(code & 7)) {
            pointers.remove(&to);
        }
    }
    // Nothing calls itself.
    fn deepest(functions: &BTreeMap<usize, (i32, BTreeSet<usize>)>, at: usize) -> usize {
        let (own, calls) = &functions[&at];
        let own = usize::try_from(*own).unwrap().max(1).next_multiple_of(32);
        own + calls
            .iter()
            .map(|&callee| deepest(functions, callee))
            .max()
            .unwrap_or(0)
    }
    deepest(&functions, 0)
}

/// Packets and bytes to all backends, and from them.
fn traffic(maps: &Maps) -> [u64; 4] {
    (0..64).fold([0; 4], |[to, to_bytes, from, from_bytes], backend| {
        let more = maps.traffic(backend).unwrap();
        [
            to + more.to_packets,
            to_bytes + more.to_bytes,
            from + more.from_packets,
            from_bytes + more.from_bytes,
        ]
    })
}

pub(crate) fn segment(from: &str, from_port: u16, to: &str, to_port: u16, flags: &str) -> Vec<u8> {
    let mut bytes = packet(from, from_port, to, to_port, false);
    let at = 14 + if from.contains(':') { 40 } else { 20 } + 13;
    bytes[at] = match flags {
        "SYN" => 0x02,
        "SYN ACK" => 0x12,
        "FIN ACK" => 0x11,
        "ACK" => 0x10,
        "RST" => 0x04,
        other => panic!("{other}"),
    };
    bytes
}

/// L3: first packets without end, from everywhere, and every open flow is still there; also when
/// the backend answers them all, as a server with SYN cookies does.
#[test]
fn a_flood_of_first_packets_evicts_no_open_flow() {
    const OPEN: u16 = 700;
    const FLOOD: u16 = 4_000;
    let loaded = Loaded::new("flood");
    let leaving = "tc_node_out";
    for program in ["tc_node_in", "xdp_node"] {
        for v6 in [0, 1] {
            let (client, web, backend) = (CLIENT[v6], WEB[v6], BACKEND[v6]);
            let ports = 20_000..20_000 + OPEN;
            for (udp, answered) in [(false, false), (false, true), (true, false), (true, true)] {
                let case = format!(
                    "{program}, IPv{}, UDP {udp}, answered {answered}",
                    4 + 2 * v6
                );
                for port in ports.clone() {
                    loaded.run(program, &segment(client, port, web, 80, "SYN"));
                    loaded.run(leaving, &segment(backend, 8080, client, port, "SYN ACK"));
                    loaded.run(program, &segment(client, port, web, 80, "ACK"));
                }
                for n in 0..FLOOD {
                    let source = match v6 {
                        0 => format!("198.18.{}.{}", n >> 8, n & 255),
                        _ => format!("2001:db8:18::{n:x}"),
                    };
                    let port = 1000 + n;
                    let (request, answer) = if udp {
                        let packet = |from, from_port, to, to_port| {
                            packet(from, from_port, to, to_port, true)
                        };
                        (
                            packet(&source, port, web, 80),
                            packet(backend, 8080, &source, port),
                        )
                    } else {
                        let answer = segment(backend, 8080, &source, port, "SYN ACK");
                        (segment(&source, port, web, 80, "SYN"), answer)
                    };
                    loaded.run(program, &request);
                    if answered {
                        let (_, out) = loaded.run(leaving, &answer);
                        assert_ne!(out, answer, "{case}: a reply is translated");
                    }
                }
                let maps = Maps::open(&loaded.root).unwrap();
                let left: BTreeSet<u16> = match v6 {
                    0 => tcp_ports(maps.v4.flows.entries().unwrap()),
                    _ => tcp_ports(maps.v6.flows.entries().unwrap()),
                };
                let lost = ports.clone().filter(|port| !left.contains(port)).count();
                assert_eq!(lost, 0, "{case}");
            }
        }
    }
}

/// L3: and every client that was ever there keeps its backend (P1), though others are eligible by
/// now.
#[test]
fn a_flood_of_first_packets_changes_no_clients_backend() {
    const CLIENTS: u8 = 100;
    const FLOOD: u16 = 4_000;
    let loaded = Loaded::new("affinity");
    for (program, leaving, port) in [
        ("tc_pod_in", "tc_pod_out", 20_000),
        ("tc_node_in", "tc_node_out", 20_010),
        ("xdp_node", "tc_node_out", 20_020),
    ] {
        for v6 in [0, 1] {
            let web = KEPT[v6];
            let client = |n| match v6 {
                0 => format!("10.44.0.{n}"),
                _ => format!("fd44::{n:x}"),
            };
            let destination = |frame: &[u8]| match v6 {
                0 => IpAddr::from(<[u8; 4]>::try_from(&frame[14 + 16..14 + 20]).unwrap()),
                _ => IpAddr::from(<[u8; 16]>::try_from(&frame[14 + 24..14 + 40]).unwrap()),
            };
            // A whole connection, or an exchange of datagrams: whom it is with.
            let dial = |client: &str, port, udp: bool| {
                let sent = |from: &str, from_port, to: &str, to_port, flags| {
                    if udp {
                        packet(from, from_port, to, to_port, true)
                    } else {
                        segment(from, from_port, to, to_port, flags)
                    }
                };
                let (_, out) = loaded.run(program, &sent(client, port, web, 80, "SYN"));
                let server = destination(&out);
                loaded.run(
                    leaving,
                    &sent(&server.to_string(), 8080, client, port, "SYN ACK"),
                );
                let (_, out) = loaded.run(program, &sent(client, port, web, 80, "ACK"));
                assert_eq!(destination(&out), server);
                server
            };
            for udp in [false, true] {
                let what = format!("{program}, IPv{}, UDP {udp}", 4 + 2 * v6);
                loaded.serve_kept(1);
                let kept: IpAddr = kept_backend(v6 == 1, 1).parse().unwrap();
                for n in 1..=CLIENTS {
                    assert_eq!(dial(&client(n), port, udp), kept, "{what}");
                }
                loaded.serve_kept(8);
                for n in 0..FLOOD {
                    let source = match v6 {
                        0 => format!("198.18.{}.{}", n >> 8, n & 255),
                        _ => format!("2001:db8:18::{n:x}"),
                    };
                    let first = if udp {
                        packet(&source, 1000, web, 80, true)
                    } else {
                        segment(&source, 1000, web, 80, "SYN")
                    };
                    let (_, out) = loaded.run(program, &first);
                    if n % 2 == 0 {
                        let server = destination(&out).to_string();
                        let answer = segment(&server, 8080, &source, 1000, "SYN ACK");
                        loaded.run(
                            leaving,
                            &if udp {
                                packet(&server, 8080, &source, 1000, true)
                            } else {
                                answer
                            },
                        );
                    }
                }
                let lost = (1..=CLIENTS)
                    .filter(|&n| dial(&client(n), port + 1, udp) != kept)
                    .count();
                assert_eq!(lost, 0, "{what}");
            }
        }
    }
}

/// L2: a stream of datagrams that was silent for longer than its time-out goes on with a source
/// port of its own, when its old one is another client's by now.
#[test]
fn a_stream_whose_source_port_is_gone_gets_another() {
    let loaded = Loaded::new("stream");
    let maps = Maps::open(&loaded.root).unwrap();
    let mut config = maps.config().unwrap();
    config.timeouts.udp_stream = 1;
    maps.set_config(&config).unwrap();
    for v6 in [0, 1] {
        let other = ["203.0.113.11", "2001:db8:113::11"][v6];
        // A port of the range, which both keep if they can.
        let port = 20_000;
        let through = |packet: &[u8]| {
            let (_, inside) = loaded.run("tc_node_in", packet);
            loaded.run("tc_node_out", &inside).1
        };
        let ask = |client: &str| {
            let sent = through(&packet(client, port, FAR[v6], 80, true));
            let at = 14 + [20, 40][v6];
            let source = u16::from_be_bytes([sent[at], sent[at + 1]]);
            assert_eq!(sent, packet(NODE[v6], source, REMOTE[v6], 8080, true));
            let answer = through(&packet(REMOTE[v6], 8080, NODE[v6], source, true));
            assert_eq!(
                answer,
                packet(FAR[v6], 80, client, port, true),
                "IPv{}, {client}",
                4 + 2 * v6
            );
            source
        };
        assert_eq!((ask(CLIENT[v6]), ask(CLIENT[v6])), (port, port));
        thread::sleep(Duration::from_secs(4));
        assert_eq!((ask(other), ask(other)), (port, port));
        let moved = ask(CLIENT[v6]);
        assert_ne!(moved, port);
        assert_eq!(ask(CLIENT[v6]), moved);
        assert_eq!(ask(other), port);
    }
}

/// The clients' ports of the connections among some flows.
fn tcp_ports<A>(flows: Vec<(FlowKey<A>, Flow<A>)>) -> BTreeSet<u16> {
    let tcp = flows.iter().filter(|(key, _)| key.proto == TCP);
    tcp.map(|(key, _)| key.client_port).collect()
}

/// L1: an RST closes a connection for the node until its sender says something else; the other side
/// may have been in the middle of it.
#[test]
fn a_reset_is_taken_back_by_its_own_side_only() {
    let loaded = Loaded::new("reset");
    let maps = Maps::open(&loaded.root).unwrap();
    for (n, (arriving, ..)) in ARRIVING.into_iter().enumerate() {
        let leaving = if arriving == "tc_pod_in" {
            "tc_pod_out"
        } else {
            "tc_node_out"
        };
        for v6 in [0, 1] {
            for client in [true, false] {
                let port = 30_000 + 2 * n as u16 + u16::from(client);
                let send = |client, flags| {
                    let (program, sent, wanted) = if client {
                        let wanted = segment(CLIENT[v6], port, BACKEND[v6], 8080, flags);
                        (
                            arriving,
                            segment(CLIENT[v6], port, WEB[v6], 80, flags),
                            wanted,
                        )
                    } else {
                        let wanted = segment(WEB[v6], 80, CLIENT[v6], port, flags);
                        (
                            leaving,
                            segment(BACKEND[v6], 8080, CLIENT[v6], port, flags),
                            wanted,
                        )
                    };
                    let (_, out) = loaded.run(program, &sent);
                    // All but the checksum, which the helper has left as wrong as it was.
                    let addresses = 14..14 + 20 + 20 * v6 + 4;
                    assert_eq!(
                        out[addresses.clone()],
                        wanted[addresses],
                        "{program}: {flags}"
                    );
                    let state = match v6 {
                        0 => state_of(maps.v4.flows.entries().unwrap(), port),
                        _ => state_of(maps.v6.flows.entries().unwrap(), port),
                    };
                    state & FLOW_RESET != 0
                };
                let case = format!("{arriving}, IPv{}, by the client {client}", 4 + 2 * v6);
                for (from_client, flags) in [(true, "SYN"), (false, "SYN ACK"), (true, "ACK")] {
                    assert!(!send(from_client, flags), "{case}");
                }
                assert!(send(client, "RST"), "{case}");
                assert!(send(!client, "ACK"), "{case}");
                assert!(send(client, "RST"), "{case}");
                assert!(!send(client, "ACK"), "{case}");
            }
        }
    }
}

/// A FIN that a program notes is not lost when others change the same state, nor is what they note:
/// here this process, in the memory that the map shares with it.
#[test]
fn a_state_that_others_change_meanwhile_loses_nothing() {
    const OURS: u32 = 1 << 31;
    let loaded = Loaded::new("race");
    let through = |packet: &[u8]| {
        let (_, inside) = loaded.run("tc_node_in", packet);
        loaded.run("tc_node_out", &inside);
    };
    let port = 20_000;
    let answer = |flags| segment(REMOTE[0], 8080, NODE[0], port, flags);
    through(&segment(CLIENT[0], port, FAR[0], 80, "SYN"));
    through(&answer("SYN ACK"));
    through(&segment(CLIENT[0], port, FAR[0], 80, "ACK"));
    let map = bpf::open(&loaded.root.join(format!("v{LAYOUT_VERSION}/maps/snat4"))).unwrap();
    let info = bpf::map::map_info(map.as_fd()).unwrap();
    let slots = MappedArray::<SnatSlot<[u8; 4]>>::new(map.as_fd(), info.max_entries).unwrap();
    let slot = (0..slots.len()).find(|&index| slots.get(index).client_port == port);
    let state = slots.state(slot.expect("a translated source port"));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let toggles = scope.spawn(|| {
            let (mut expected, mut lost) = (0, 0);
            while !done.load(Ordering::Relaxed) {
                state.fetch_and(!FLOW_BACKEND_FIN, Ordering::Relaxed);
                let before = state.fetch_xor(OURS, Ordering::Relaxed) & OURS;
                lost += u32::from(before != expected);
                expected = before ^ OURS;
            }
            lost
        });
        let fin = answer("FIN ACK");
        for _ in 0..20_000 {
            loaded.run("tc_node_in", &fin);
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(toggles.join().unwrap(), 0);
    });
    loaded.run("tc_node_in", &answer("FIN ACK"));
    assert_ne!(state.load(Ordering::Relaxed) & FLOW_BACKEND_FIN, 0);
}

/// `FLOW_*` bits of the flow from that port.
fn state_of<A>(flows: Vec<(FlowKey<A>, Flow<A>)>, port: u16) -> u32 {
    let flow = flows.iter().find(|(key, _)| key.client_port == port);
    flow.expect("a flow").1.state
}

#[test]
fn a_udp_checksum_of_zero_stays_zero() {
    let loaded = Loaded::new("zero");
    for (program, ..) in ARRIVING {
        let mut sent = packet(CLIENT[0], 41_000, WEB[0], 80, true);
        sent[14 + 20 + 6..14 + 20 + 8].fill(0);
        let (_, out) = loaded.run(program, &sent);
        assert_eq!(out[14 + 20 + 6..14 + 20 + 8], [0, 0], "{program}");
        assert_eq!(out[14 + 16..14 + 20], [10, 44, 0, 7], "{program}");
    }
}

#[test]
fn nobody_behind_it_is_answered_with_port_unreachable() {
    let loaded = Loaded::new("refuse");
    for (program, _, back) in ARRIVING {
        for v6 in [0, 1] {
            for udp in [false, true] {
                let (verdict, out) =
                    loaded.run(program, &packet(CLIENT[v6], 42_000, EMPTY[v6], 80, udp));
                assert_eq!(verdict, back, "{program}");
                let answer = SlicedPacket::from_ethernet(&out).unwrap();
                assert_eq!(
                    (&out[0..6], &out[6..12]),
                    (&[2, 0, 0, 0, 0, 1][..], &[0; 6][..])
                );
                let quoted = match (answer.net.unwrap(), answer.transport.unwrap()) {
                    (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
                        let header = ip.header();
                        assert_eq!(
                            header.header_checksum(),
                            header.to_header().calc_header_checksum()
                        );
                        assert_eq!(header.source_addr().to_string(), EMPTY[0]);
                        assert_eq!(header.destination_addr().to_string(), CLIENT[0]);
                        let unreachable =
                            Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
                        assert_eq!(icmp.icmp_type(), unreachable);
                        assert_eq!(
                            icmp.checksum(),
                            unreachable.calc_checksum(icmp.payload()),
                            "{program}"
                        );
                        icmp.payload().to_vec()
                    }
                    (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
                        let header = ip.header();
                        assert_eq!(header.next_header(), IpNumber::IPV6_ICMP);
                        assert_eq!(header.source_addr().to_string(), EMPTY[1]);
                        assert_eq!(header.destination_addr().to_string(), CLIENT[1]);
                        let unreachable =
                            Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
                        assert_eq!(icmp.icmp_type(), unreachable);
                        let (from, to) = (header.source(), header.destination());
                        let sum = unreachable.calc_checksum(from, to, icmp.payload()).unwrap();
                        assert_eq!(icmp.checksum(), sum, "{program}");
                        icmp.payload().to_vec()
                    }
                    other => panic!("{program}: {other:?}"),
                };
                // The client finds its socket by the quoted addresses, ports and sequence number.
                let header = [20, 40][v6];
                let sent = packet(CLIENT[v6], 42_000, EMPTY[v6], 80, udp);
                let same = header + if udp { 4 } else { 8 };
                assert_eq!(quoted[..same], sent[14..14 + same], "{program}");
            }
        }
    }
}

/// H4: a stranger who makes up sources does not have this node send to them as much as comes in.
#[test]
fn answers_of_our_own_are_few_and_only_for_frames_to_us() {
    let loaded = Loaded::new("answers");
    for (program, _, back) in &ARRIVING[..2] {
        for v6 in [0, 1] {
            // All together have what they may have again.
            thread::sleep(Duration::from_millis(150));
            let is_answered = |packet: &[u8]| loaded.run(program, packet).0 == *back;
            let syn = |source: &str| packet(source, 42_001, EMPTY[v6], 80, false);
            let own = packet(CLIENT[v6], 42_000, EMPTY[v6], 80, program == &"xdp_node");
            for (to, may) in [
                ([0; 6], true),
                ([0xff; 6], false),
                ([1, 0, 0x5e, 0, 0, 9], false),
                // What XDP knows of the device's address takes a route back.
                ([2, 0, 0, 0, 0, 9], program == &"xdp_node"),
            ] {
                let mut frame = syn(["192.0.2.80", "2001:db8::80"][v6]);
                frame[..6].copy_from_slice(&to);
                assert_eq!(is_answered(&frame), may, "{program} {to:?}");
            }
            // One source, that each program sees anew. A tc program runs twice for a packet whose
            // checksum ends up in another place than it was.
            let one = match (v6, *program) {
                (0, "xdp_node") => "192.0.2.81",
                (0, _) => "192.0.2.82",
                (_, "xdp_node") => "2001:db8::81",
                _ => "2001:db8::82",
            };
            let began = Instant::now();
            let answered = (0..90).filter(|_| is_answered(&syn(one))).count();
            let more = began.elapsed().as_millis() as usize / 100 + 1;
            assert!(
                (20..=50 + more).contains(&answered),
                "{program}: {answered}"
            );
            // Many: what one may have is not what all may have together.
            let began = Instant::now();
            let answered = (0..2000u32)
                .filter(|n| {
                    is_answered(&syn(&match v6 {
                        0 => format!("198.18.{}.{}", n / 250, n % 250 + 1),
                        _ => format!("2001:db8:18::{n:x}"),
                    }))
                })
                .count();
            let most = 100 + began.elapsed().as_millis() as usize + 4;
            assert!(
                answered <= most,
                "{program}: {answered} in {:?}",
                began.elapsed()
            );
            // An honest client is told a moment later.
            thread::sleep(Duration::from_millis(50));
            assert!(is_answered(&own), "{program}");
        }
    }
}

#[test]
fn what_is_not_ours_or_not_whole_passes_untouched() {
    let loaded = Loaded::new("pass");
    let whole = packet(CLIENT[0], 43_000, WEB[0], 80, false);
    let mut packets = vec![
        packet(CLIENT[0], 43_000, "192.0.2.1", 80, false),
        packet(CLIENT[1], 43_000, "2001:db8::1", 80, true),
    ];
    // Cut anywhere within its headers, but long enough for the kernel to run the program.
    packets.extend((34..14 + 20 + 20).map(|length| whole[..length].to_vec()));
    // A header that claims to be longer than the packet, and one of another version.
    for (offset, value) in [(14, 0x4f), (14, 0x65)] {
        let mut odd = whole[..14 + 40].to_vec();
        odd[offset] = value;
        packets.push(odd);
    }
    for (program, pass, _) in ARRIVING {
        for sent in &packets {
            let (verdict, out) = loaded.run(program, sent);
            assert_eq!(verdict, pass, "{program}: {sent:02x?}");
            assert_eq!(&out, sent, "{program}");
        }
    }
}

/// N3: a process's packet is sent on with another source port, and its answer is handed back by the
/// loopback device; XDP leaves that to tc.
#[test]
fn processes_of_the_node_are_clients_by_packets() {
    const XDP_PASS: u32 = 2;
    const TC_ACT_REDIRECT: u32 = 7;
    let loaded = Loaded::new("processes");
    let l3 = 14;
    for v6 in [0, 1] {
        let (node, web, backend) = (NODE[v6], WEB[v6], BACKEND[v6]);
        for udp in [false, true] {
            let frame = |from: &str, from_port, to: &str, to_port, flags| {
                if udp {
                    packet(from, from_port, to, to_port, true)
                } else {
                    segment(from, from_port, to, to_port, flags)
                }
            };
            let ports = |frame: &[u8]| {
                let l4 = l3 + if v6 == 1 { 40 } else { 20 };
                [l4, l4 + 2].map(|at| u16::from_be_bytes([frame[at], frame[at + 1]]))
            };
            let request = frame(node, 40_000, web, 80, "SYN");
            let (verdict, sent) = loaded.run_sent("tc_node_out", &request);
            assert_eq!(verdict, TC_ACT_REDIRECT);
            let [port, app] = ports(&sent);
            assert!((10_240..30_000).contains(&port), "{port}");
            assert_eq!(app, 8080);
            assert_eq!(sent[l3..], frame(node, port, backend, app, "SYN")[l3..]);
            // What it was before is a client's from elsewhere: that leaves as it is.
            assert_eq!(loaded.run("tc_node_out", &request).1, request);

            let answer = frame(backend, 8080, node, port, "SYN ACK");
            assert_eq!(loaded.run("xdp_node", &answer), (XDP_PASS, answer.clone()));
            let back = frame(web, 80, node, 40_000, "SYN ACK");
            for program in ["tc_node_in", "tc_pod_in"] {
                let (verdict, out) = loaded.run(program, &answer);
                assert_eq!(verdict, TC_ACT_REDIRECT, "{program}");
                assert_eq!(out[l3..], back[l3..], "{program}");
            }
            // The next packet goes the same way, from the same port.
            let (_, sent) = loaded.run_sent("tc_node_out", &frame(node, 40_000, web, 80, "ACK"));
            assert_eq!(ports(&sent), [port, 8080]);
        }
    }
}
