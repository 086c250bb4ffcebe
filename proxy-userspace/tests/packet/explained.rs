//! What `shunt explain` decides over copies of the maps is what the programs do: random packets,
//! each decided first and run then.

use etherparse::PacketBuilder;
use shunt::explain::{Copied, CopiedFamily, Pinned, Tuple, tuple, words};
use shunt_common::{
    balance::{arriving, leaving},
    event::Event,
    family::{V4, V6},
    layout::{TCP, UDP},
    verdict::{Arrival, Origin, Verdict},
};
use std::net::{IpAddr, SocketAddr};

use crate::loaded::{BACKEND, CLIENT, EMPTY, FAR, KEPT, Loaded, NODE, REMOTE, WEB, kept_backend};

const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_SHOT: u32 = 2;
const TC_ACT_REDIRECT: u32 = 7;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

/// Numbers that look random and are the same in each run (xorshift64, Marsaglia 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % end
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// A packet and where it is seen.
struct Case {
    program: &'static str,
    tuple: Tuple,
    flags: u8,
}

fn case(random: &mut Random) -> Case {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    let program = random.of(&[
        "xdp_node",
        "tc_node_in",
        "tc_pod_in",
        "tc_node_out",
        "tc_pod_out",
    ]);
    let v6 = random.below(2);
    // Clients that are few, so that flows are met again, and answers to them.
    let clients = [CLIENT, ["203.0.113.11", "2001:db8:113::11"], BACKEND, NODE];
    let kept = kept_backend(v6 == 1, 1);
    let servers = [
        WEB[v6],
        FAR[v6],
        KEPT[v6],
        EMPTY[v6],
        BACKEND[v6],
        REMOTE[v6],
        NODE[v6],
        ["10.96.7.7", "fd96::7:7"][v6],
        ["192.0.2.7", "2001:db8::7"][v6],
        &kept,
    ];
    let client = SocketAddr::new(
        random.of(&clients)[v6].parse().unwrap(),
        random.of(&[10_240, 20_000, 20_001, 40_000, 40_001, 50_000]),
    );
    let server = SocketAddr::new(
        random.of(&servers).parse().unwrap(),
        random.of(&[80, 80, 80, 8080, 8080, 81]),
    );
    let (src, dst) = if random.below(3) == 0 {
        (server, client)
    } else {
        (client, server)
    };
    let proto = random.of(&[TCP, UDP]);
    let flags = if proto == TCP {
        random.of(&[SYN, SYN, SYN, ACK, SYN | ACK, 0x11, 0x04, 0x14])
    } else {
        0
    };
    Case {
        program,
        tuple: Tuple { src, dst, proto },
        flags,
    }
}

fn packet(tuple: &Tuple, flags: u8) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [0; 6]);
    let builder = match (tuple.src.ip(), tuple.dst.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
        _ => unreachable!("one family"),
    };
    let (from, to) = (tuple.src.port(), tuple.dst.port());
    let mut bytes = Vec::new();
    let payload = b"0123456789abcdef0123456789abcdef";
    if tuple.proto == UDP {
        builder.udp(from, to).write(&mut bytes, payload).unwrap();
    } else {
        let mut header = etherparse::TcpHeader::new(from, to, 1, 64_000);
        header.fin = flags & 0x01 != 0;
        header.syn = flags & 0x02 != 0;
        header.rst = flags & 0x04 != 0;
        header.ack = flags & 0x10 != 0;
        builder
            .tcp_header(header)
            .write(&mut bytes, payload)
            .unwrap();
    }
    bytes
}

/// What the program is to return, the packet it is to leave if it passes one on, and in which tick
/// that was decided.
fn decided<F: CopiedFamily>(pinned: &Pinned, case: &Case) -> (u32, Option<Tuple>, u32) {
    let maps = Copied::<F>::new(pinned, false).unwrap();
    let words = words::<F>(&case.tuple).unwrap();
    let xdp = case.program == "xdp_node";
    let verdict = if case.program.ends_with("_out") {
        leaving(&maps, &words, case.flags)
    } else {
        let origin = if case.program == "tc_pod_in" {
            Origin::Pod
        } else {
            Origin::Network
        };
        arriving(
            &maps,
            &Arrival {
                tuple: words,
                tcp_flags: case.flags,
                origin,
                sends_on: xdp,
            },
        )
    };
    let seen = maps.take_seen();
    assert!(seen.errors.is_empty(), "{:?}", seen.errors);
    let [pass, drop, back] = if xdp {
        [XDP_PASS, XDP_DROP, XDP_REDIRECT]
    } else {
        [TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT]
    };
    let (action, left) = match verdict {
        Verdict::Pass => (pass, Some(case.tuple)),
        // There are no routes here: what is for elsewhere is left to tc, as it came.
        Verdict::Translate(to) if xdp && !to.local => (pass, Some(case.tuple)),
        Verdict::Translate(to) => (pass, Some(tuple::<F>(&to.tuple))),
        Verdict::Drop => (drop, None),
        Verdict::Refuse | Verdict::Reset => (back, None),
    };
    let why = matches!(verdict, Verdict::Drop | Verdict::Refuse | Verdict::Reset);
    assert!(
        !why || seen
            .events
            .iter()
            .any(|event| *event != Event::PortCollision),
        "{verdict:?} of {:?} has no reason",
        case.tuple
    );
    (action, left, maps.tick())
}

fn ends(bytes: &[u8]) -> &[u8] {
    if bytes[12..14] == [0x86, 0xdd] {
        &bytes[22..58]
    } else {
        &bytes[26..38]
    }
}

/// How many answers the programs have left out because they had sent enough.
fn limited_answers(pinned: &Pinned) -> u64 {
    let events = pinned.maps.events().unwrap();
    let found = events
        .iter()
        .find(|(event, _)| *event == Event::AnswerLimited);
    found.expect("it is counted").1
}

/// A7.
#[test]
fn explain_decides_as_the_programs_do() {
    let loaded = Loaded::new("explain");
    loaded.serve_kept(3);
    let pinned = Pinned::open(&loaded.root).unwrap();
    let mut random = Random(0x5eed_0000_0000_0001);
    let mut met = std::collections::BTreeMap::new();
    for number in 0..10_000 {
        let case = case(&mut random);
        let (action, left, tick) = match case.tuple.dst {
            SocketAddr::V4(_) => decided::<V4>(&pinned, &case),
            SocketAddr::V6(_) => decided::<V6>(&pinned, &case),
        };
        let sent = packet(&case.tuple, case.flags);
        let limited = limited_answers(&pinned);
        let (verdict, out) = loaded.run(case.program, &sent);
        if Copied::<V4>::new(&pinned, false).unwrap().tick() != tick {
            continue;
        }
        let told = format!(
            "packet {number}: {} of {:?}, flags {:#x}",
            case.program, case.tuple, case.flags
        );
        // Few of those packets are answered (SPEC H4), the rest of them dropped.
        let is_limited = [XDP_REDIRECT, TC_ACT_REDIRECT].contains(&action)
            && [XDP_DROP, TC_ACT_SHOT].contains(&verdict)
            && limited_answers(&pinned) > limited;
        assert!(
            verdict == action || is_limited,
            "{told}: {left:?}: {verdict}, not {action}"
        );
        if let Some(left) = &left {
            let expected = packet(left, case.flags);
            assert_eq!(ends(&out), ends(&expected), "{told}: {left:?}");
        }
        let changed = left.is_none_or(|left| left != case.tuple);
        *met.entry((case.program, action, changed)).or_insert(0) += 1;
    }
    println!("{met:?}");
    // Every program has passed packets on and translated some, and those that packets come in by
    // have dropped and refused some.
    assert!(met.len() >= 5 * 2 + 3 * 2, "{met:?}");
}
