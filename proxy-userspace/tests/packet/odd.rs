//! Packets that others forget, through the loaded programs: ICMP errors, pings, unknown ports and
//! addresses, fragments, options and extension headers, SCTP. Needs root.

use std::net::IpAddr;

use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4, icmpv6};

use crate::loaded::{BACKEND, CLIENT, EMPTY, FAR, Loaded, NODE, REMOTE, WEB};

const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_SHOT: u32 = 2;
const TC_ACT_REDIRECT: u32 = 7;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

/// A router on the way.
const ROUTER: [&str; 2] = ["172.16.0.1", "2001:db8:aaaa::1"];
const FAMILIES: [usize; 2] = [0, 1];
const ETHERNET: usize = 14;
const IP: [usize; 2] = [20, 40];

fn builder(from: &str, to: &str) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [0; 6]);
    match (from.parse().unwrap(), to.parse().unwrap()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        _ => unreachable!("one family"),
    }
}

/// A segment or datagram.
fn packet(from: (&str, u16), to: (&str, u16), udp: bool) -> Vec<u8> {
    let builder = builder(from.0, to.0);
    let mut bytes = Vec::new();
    let payload = b"0123456789abcdef0123456789abcdef";
    if udp {
        builder
            .udp(from.1, to.1)
            .write(&mut bytes, payload)
            .unwrap();
    } else {
        builder
            .tcp(from.1, to.1, 1, 64_000)
            .syn()
            .write(&mut bytes, payload)
            .unwrap();
    }
    bytes
}

/// What an error says.
#[derive(Clone, Copy, Debug)]
enum Error {
    TooBig,
    PortUnreachable,
    TimeExceeded,
}

const ERRORS: [Error; 3] = [Error::TooBig, Error::PortUnreachable, Error::TimeExceeded];

/// An ICMP error that quotes the first `quote` bytes of a packet.
fn error(from: &str, to: &str, kind: Error, about: &[u8], quote: usize) -> Vec<u8> {
    let quoted = &about[ETHERNET..about.len().min(ETHERNET + quote)];
    let mut bytes = Vec::new();
    let builder = builder(from, to);
    if from.contains(':') {
        let kind = match kind {
            Error::TooBig => Icmpv6Type::PacketTooBig { mtu: 1300 },
            Error::PortUnreachable => {
                Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port)
            }
            Error::TimeExceeded => {
                Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded)
            }
        };
        builder.icmpv6(kind).write(&mut bytes, quoted).unwrap();
    } else {
        let kind = match kind {
            Error::TooBig => Icmpv4Type::DestinationUnreachable(
                icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1300 },
            ),
            Error::PortUnreachable => {
                Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port)
            }
            Error::TimeExceeded => {
                Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit)
            }
        };
        builder.icmpv4(kind).write(&mut bytes, quoted).unwrap();
    }
    bytes
}

/// A packet through one program, which passes it.
fn through(loaded: &Loaded, program: &str, packet: &[u8]) -> Vec<u8> {
    let (verdict, out) = loaded.run(program, packet);
    let pass = if program == "xdp_node" {
        XDP_PASS
    } else {
        TC_ACT_UNSPEC
    };
    assert_eq!(verdict, pass, "{program}: {packet:02x?}");
    out
}

/// A packet from the network as the kernel hands it on: XDP, then tc.
fn arrives(loaded: &Loaded, packet: &[u8]) -> Vec<u8> {
    through(loaded, "tc_node_in", &through(loaded, "xdp_node", packet))
}

/// The source port of a packet.
fn source_port(packet: &[u8], v6: usize) -> u16 {
    let l4 = ETHERNET + IP[v6];
    u16::from_be_bytes([packet[l4], packet[l4 + 1]])
}

/// Every length of quote that a router may choose: eight bytes of the transport header at least
/// (RFC 792), the whole packet at most.
fn quotes(v6: usize, udp: bool) -> impl Iterator<Item = usize> {
    let whole = IP[v6] + if udp { 8 } else { 20 } + 32;
    // One that ends within TCP's checksum keeps what it has of it, and nobody could check it.
    (IP[v6] + 8..=whole)
        .filter(move |&quote| udp || quote != IP[v6] + 17)
        .chain([576])
}

/// L6: the backend's side, source kept. Leaving through node and pod devices.
#[test]
fn errors_about_requests_reach_the_client_as_the_frontends() {
    let loaded = Loaded::new("requests");
    for (n, (arriving, leaving)) in [
        ("tc_node_in", "tc_node_out"),
        ("xdp_node", "tc_node_out"),
        ("tc_pod_in", "tc_pod_out"),
    ]
    .into_iter()
    .enumerate()
    {
        for v6 in FAMILIES {
            for udp in [false, true] {
                let client = (CLIENT[v6], 40_000 + n as u16);
                let dialled = packet(client, (WEB[v6], 80), udp);
                let seen = through(&loaded, arriving, &dialled);
                assert_eq!(seen, packet(client, (BACKEND[v6], 8080), udp));
                for sender in [BACKEND[v6], ROUTER[v6], NODE[v6]] {
                    for kind in ERRORS {
                        for quote in quotes(v6, udp) {
                            let sent = error(sender, CLIENT[v6], kind, &seen, quote);
                            let wanted = error(WEB[v6], CLIENT[v6], kind, &dialled, quote);
                            assert_eq!(
                                through(&loaded, leaving, &sent),
                                wanted,
                                "{kind:?} from {sender}, {quote} bytes"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// L6: the backend's side, source translated: the error comes to this node's address.
#[test]
fn errors_about_translated_requests_find_the_client() {
    let loaded = Loaded::new("snat");
    for v6 in FAMILIES {
        for udp in [false, true] {
            let client = (CLIENT[v6], 41_000);
            let dialled = packet(client, (FAR[v6], 80), udp);
            let routed = through(&loaded, "tc_node_in", &dialled);
            let sent = through(&loaded, "tc_node_out", &routed);
            let port = source_port(&sent, v6);
            assert_eq!(sent, packet((NODE[v6], port), (REMOTE[v6], 8080), udp));
            for sender in [REMOTE[v6], ROUTER[v6]] {
                for kind in ERRORS {
                    for quote in quotes(v6, udp) {
                        let inside = arrives(&loaded, &error(sender, NODE[v6], kind, &sent, quote));
                        assert_eq!(
                            inside,
                            error(sender, CLIENT[v6], kind, &routed, quote),
                            "{kind:?}, {quote} bytes"
                        );
                        let shown = through(&loaded, "tc_node_out", &inside);
                        assert_eq!(
                            shown,
                            error(FAR[v6], CLIENT[v6], kind, &dialled, quote),
                            "{kind:?}, {quote} bytes"
                        );
                    }
                }
            }
            // The node's own error comes before its source translation.
            let own = error(NODE[v6], CLIENT[v6], Error::TooBig, &routed, 576);
            assert_eq!(
                through(&loaded, "tc_node_out", &own),
                error(FAR[v6], CLIENT[v6], Error::TooBig, &dialled, 576)
            );
        }
    }
}

/// L6: the client's side. The reply was too big, or nobody was there any more to take it.
#[test]
fn errors_about_replies_reach_the_backend() {
    let loaded = Loaded::new("replies");
    for v6 in FAMILIES {
        for udp in [false, true] {
            let client = (CLIENT[v6], 42_000);
            // Source kept: the error needs nothing on its way out.
            let seen = arrives(&loaded, &packet(client, (WEB[v6], 80), udp));
            let reply = packet((BACKEND[v6], 8080), client, udp);
            let shown = through(&loaded, "tc_node_out", &reply);
            assert_eq!(
                (seen.len(), shown),
                (reply.len(), packet((WEB[v6], 80), client, udp))
            );
            for sender in [CLIENT[v6], ROUTER[v6]] {
                for quote in quotes(v6, udp) {
                    let sent = error(
                        sender,
                        WEB[v6],
                        Error::TooBig,
                        &packet((WEB[v6], 80), client, udp),
                        quote,
                    );
                    let inside = arrives(&loaded, &sent);
                    assert_eq!(
                        inside,
                        error(sender, BACKEND[v6], Error::TooBig, &reply, quote)
                    );
                    assert_eq!(through(&loaded, "tc_pod_out", &inside), inside);
                }
            }
            // Source translated: the backend knows this node only.
            let sent = through(
                &loaded,
                "tc_node_out",
                &through(&loaded, "tc_node_in", &packet(client, (FAR[v6], 80), udp)),
            );
            let port = source_port(&sent, v6);
            let reply = packet((REMOTE[v6], 8080), (NODE[v6], port), udp);
            let routed = through(&loaded, "tc_node_in", &reply);
            assert_eq!(routed, packet((REMOTE[v6], 8080), (CLIENT[v6], port), udp));
            let shown = through(&loaded, "tc_node_out", &routed);
            assert_eq!(shown, packet((FAR[v6], 80), client, udp));
            for sender in [CLIENT[v6], ROUTER[v6]] {
                for kind in ERRORS {
                    for quote in quotes(v6, udp) {
                        let inside = arrives(&loaded, &error(sender, FAR[v6], kind, &shown, quote));
                        assert_eq!(inside, error(sender, REMOTE[v6], kind, &routed, quote));
                        let out = through(&loaded, "tc_node_out", &inside);
                        assert_eq!(out, error(NODE[v6], REMOTE[v6], kind, &reply, quote));
                    }
                }
            }
        }
    }
}

/// What an error does not prove to be about one of our flows, it is not about.
#[test]
fn other_errors_pass_untouched() {
    let loaded = Loaded::new("others");
    for v6 in FAMILIES {
        let client = (CLIENT[v6], 43_000);
        let seen = arrives(&loaded, &packet(client, (WEB[v6], 80), true));
        let whole = IP[v6] + 8 + 32;
        let mut packets = vec![
            // Another port of the client's, another backend, and a quote that another machine is
            // said to have sent.
            error(
                ROUTER[v6],
                CLIENT[v6],
                Error::TooBig,
                &packet((CLIENT[v6], 43_001), (BACKEND[v6], 8080), true),
                whole,
            ),
            error(
                ROUTER[v6],
                CLIENT[v6],
                Error::TooBig,
                &packet(client, (REMOTE[v6], 8080), true),
                whole,
            ),
            error(ROUTER[v6], ROUTER[v6], Error::TooBig, &seen, whole),
        ];
        // Quotes that end before the ports.
        packets.extend(
            (0..IP[v6] + 4).map(|quote| error(ROUTER[v6], CLIENT[v6], Error::TooBig, &seen, quote)),
        );
        let ours = error(ROUTER[v6], CLIENT[v6], Error::TooBig, &seen, whole);
        let icmp = ETHERNET + IP[v6];
        // An echo request, a redirect, and a quote of another version.
        for (offset, value) in [
            (icmp, if v6 == 0 { 8 } else { 128 }),
            (icmp, if v6 == 0 { 5 } else { 137 }),
            (icmp + 8, 0x25),
        ] {
            let mut odd = ours.clone();
            odd[offset] = value;
            packets.push(odd);
        }
        for packet in packets {
            for program in [
                "xdp_node",
                "tc_node_in",
                "tc_node_out",
                "tc_pod_in",
                "tc_pod_out",
            ] {
                assert_eq!(through(&loaded, program, &packet), packet, "{program}");
            }
        }
        assert_ne!(through(&loaded, "tc_node_out", &ours), ours);
    }
}

/// Every program that packets arrive at, with its verdicts for "dropped" and "sent back".
const ARRIVING: [(&str, u32, u32); 3] = [
    ("xdp_node", XDP_DROP, XDP_REDIRECT),
    ("tc_node_in", TC_ACT_SHOT, TC_ACT_REDIRECT),
    ("tc_pod_in", TC_ACT_SHOT, TC_ACT_REDIRECT),
];
/// In the Service range, and nobody's.
pub(crate) const UNALLOCATED: [&str; 2] = ["10.96.7.7", "fd96::77"];

/// An echo request (or its answer, which comes by fewer hops).
pub(crate) fn echo(from: &str, to: &str, hops: u8, is_answer: bool) -> Vec<u8> {
    let (id, seq) = (0x1234, 7);
    let ethernet = match is_answer {
        false => PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [0; 6]),
        true => PacketBuilder::ethernet2([0; 6], [2, 0, 0, 0, 0, 1]),
    };
    let mut bytes = Vec::new();
    let payload = b"how are you today?!";
    match (from.parse().unwrap(), to.parse().unwrap()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let ip = ethernet.ipv4(from.octets(), to.octets(), hops);
            match is_answer {
                false => ip
                    .icmpv4_echo_request(id, seq)
                    .write(&mut bytes, payload)
                    .unwrap(),
                true => ip
                    .icmpv4_echo_reply(id, seq)
                    .write(&mut bytes, payload)
                    .unwrap(),
            }
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let ip = ethernet.ipv6(from.octets(), to.octets(), hops);
            match is_answer {
                false => ip
                    .icmpv6_echo_request(id, seq)
                    .write(&mut bytes, payload)
                    .unwrap(),
                true => ip
                    .icmpv6_echo_reply(id, seq)
                    .write(&mut bytes, payload)
                    .unwrap(),
            }
        }
        _ => unreachable!("one family"),
    }
    bytes
}

/// F11: whatever its hop limit; the answer has a new one, so it does not go in circles with what is
/// left of the old.
#[test]
fn pings_of_services_with_a_backend_are_answered() {
    let loaded = Loaded::new("echo");
    for v6 in FAMILIES {
        for hops in [0, 1, 2, 64, 255] {
            let request = echo(CLIENT[v6], WEB[v6], hops, false);
            assert_eq!(
                through(&loaded, "xdp_node", &request),
                request,
                "left to tc"
            );
            for program in ["tc_node_in", "tc_pod_in", "tc_node_out"] {
                let (verdict, out) = loaded.run(program, &request);
                assert_eq!(
                    (verdict, out),
                    (TC_ACT_REDIRECT, echo(WEB[v6], CLIENT[v6], 64, true)),
                    "{program}"
                );
            }
        }
        for program in ["tc_node_in", "tc_pod_in"] {
            // Nobody behind it, nobody at all, and somebody else.
            for (to, wanted) in [
                (EMPTY[v6], TC_ACT_SHOT),
                (UNALLOCATED[v6], TC_ACT_SHOT),
                (ROUTER[v6], TC_ACT_UNSPEC),
            ] {
                let request = echo(CLIENT[v6], to, 64, false);
                assert_eq!(
                    loaded.run(program, &request),
                    (wanted, request),
                    "{program}, {to}"
                );
            }
            // Nobody can be answered there.
            let group = ["224.0.0.1", "ff02::1"][v6];
            assert_eq!(
                loaded.run(program, &echo(group, WEB[v6], 64, false)).0,
                TC_ACT_SHOT
            );
            // An answer to a ping that nobody sent.
            let mut unasked = echo(CLIENT[v6], WEB[v6], 64, true);
            unasked[..6].fill(0);
            assert_eq!(loaded.run(program, &unasked).0, TC_ACT_SHOT);
        }
    }
}

/// F12
#[test]
fn unknown_ports_are_refused_and_unknown_addresses_dropped() {
    let loaded = Loaded::new("unknown");
    for (program, dropped, back) in ARRIVING {
        for v6 in FAMILIES {
            for udp in [false, true] {
                let to = |address, port| {
                    loaded.run(program, &packet((CLIENT[v6], 44_000), (address, port), udp))
                };
                let (verdict, answer) = to(WEB[v6], 81);
                assert_eq!(verdict, back, "{program}");
                // Port unreachable, from the address that was dialled.
                let (source, icmp) = ([26, 22][v6], ETHERNET + IP[v6]);
                let wanted: Vec<u8> = match WEB[v6].parse().unwrap() {
                    IpAddr::V4(address) => address.octets().into(),
                    IpAddr::V6(address) => address.octets().into(),
                };
                assert_eq!(answer[source..source + wanted.len()], wanted);
                assert_eq!(answer[icmp..icmp + 2], [[3, 3], [1, 4]][v6], "{program}");
                assert_eq!(to(UNALLOCATED[v6], 80).0, dropped, "{program}");
                let pass = if program == "xdp_node" {
                    XDP_PASS
                } else {
                    TC_ACT_UNSPEC
                };
                assert_eq!(to(ROUTER[v6], 80).0, pass, "{program}");
                assert_eq!(to(NODE[v6], 80).0, pass, "{program}");
            }
        }
    }
    // A protocol that no Service speaks (here ESP) goes nowhere either.
    for v6 in FAMILIES {
        for (to, wanted) in [
            (WEB[v6], TC_ACT_SHOT),
            (UNALLOCATED[v6], TC_ACT_SHOT),
            (ROUTER[v6], TC_ACT_UNSPEC),
        ] {
            let mut esp = Vec::new();
            builder(CLIENT[v6], to)
                .write(
                    &mut esp,
                    etherparse::IpNumber::ENCAPSULATING_SECURITY_PAYLOAD,
                    &[7; 64],
                )
                .unwrap();
            assert_eq!(loaded.run("tc_node_in", &esp), (wanted, esp), "{to}");
        }
    }
}

/// The frame with another IP payload behind more header: IPv4 options, or IPv6 extension headers of
/// which the first has this number.
fn with_header(frame: &[u8], v6: usize, first: u8, more: &[u8], payload: &[u8]) -> Vec<u8> {
    let l4 = ETHERNET + IP[v6];
    let mut new = [&frame[..l4], more, payload].concat();
    if v6 == 0 {
        new[14] = 0x40 | ((20 + more.len()) / 4) as u8;
        let total = (new.len() - ETHERNET) as u16;
        new[16..18].copy_from_slice(&total.to_be_bytes());
        fill_ipv4_checksum(&mut new);
    } else {
        let length = (new.len() - l4) as u16;
        new[18..20].copy_from_slice(&length.to_be_bytes());
        if !more.is_empty() {
            new[20] = first;
        }
    }
    new
}

fn fill_ipv4_checksum(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let header = ETHERNET + usize::from(frame[14] & 15) * 4;
    let sum: u32 = frame[ETHERNET..header]
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[24..26].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
}

/// The frame in fragments of at most `size` bytes of payload (a multiple of eight).
pub(crate) fn fragments(frame: &[u8], v6: usize, id: u16, size: usize) -> Vec<Vec<u8>> {
    let payload = &frame[ETHERNET + IP[v6]..];
    let parts: Vec<_> = payload.chunks(size).collect();
    let last = parts.len() - 1;
    let fragment = |(n, part): (usize, &&[u8])| {
        let (offset, more) = ((n * size / 8) as u16, u16::from(n != last));
        if v6 == 0 {
            let mut new = with_header(frame, 0, 0, &[], part);
            new[18..20].copy_from_slice(&id.to_be_bytes());
            new[20..22].copy_from_slice(&(more << 13 | offset).to_be_bytes());
            fill_ipv4_checksum(&mut new);
            new
        } else {
            let place = (offset << 3 | more).to_be_bytes();
            let header = [
                frame[20],
                0,
                place[0],
                place[1],
                0,
                7,
                id.to_be_bytes()[0],
                id.to_be_bytes()[1],
            ];
            with_header(frame, 1, 44, &header, part)
        }
    };
    parts.iter().enumerate().map(fragment).collect()
}

/// L7: translating and fragmenting commute, wherever a datagram is translated; TCP segments too.
#[test]
fn fragments_follow_their_first() {
    let loaded = Loaded::new("fragments");
    for v6 in FAMILIES {
        for udp in [true, false] {
            let client = (CLIENT[v6], 45_000);
            let all = |program: &str, from: &[u8], to: &[u8], id: u16| {
                for (n, (sent, wanted)) in fragments(from, v6, id, 24)
                    .iter()
                    .zip(fragments(to, v6, id, 24))
                    .enumerate()
                {
                    assert_eq!(&through(&loaded, "xdp_node", sent), sent, "left to tc");
                    assert_eq!(
                        through(&loaded, program, sent),
                        wanted,
                        "{program}, fragment {n}, UDP {udp}"
                    );
                }
            };
            // A backend on this node, and its answer.
            let (dialled, seen) = (
                packet(client, (WEB[v6], 80), udp),
                packet(client, (BACKEND[v6], 8080), udp),
            );
            all("tc_node_in", &dialled, &seen, 1);
            all("tc_pod_in", &dialled, &seen, 2);
            all("tc_pod_out", &seen, &seen, 2);
            let (reply, shown) = (
                packet((BACKEND[v6], 8080), client, udp),
                packet((WEB[v6], 80), client, udp),
            );
            all("tc_node_out", &reply, &shown, 3);
            all("tc_pod_out", &reply, &shown, 3);
            // One on another node, by this node's address, and its answer.
            let dialled = packet(client, (FAR[v6], 80), udp);
            let whole = through(&loaded, "tc_node_in", &dialled);
            let port = source_port(&whole, v6);
            let inside = packet((CLIENT[v6], port), (REMOTE[v6], 8080), udp);
            all("tc_node_in", &dialled, &inside, 4);
            all(
                "tc_node_out",
                &inside,
                &packet((NODE[v6], port), (REMOTE[v6], 8080), udp),
                4,
            );
            let reply = packet((REMOTE[v6], 8080), (NODE[v6], port), udp);
            let inside = packet((REMOTE[v6], 8080), (CLIENT[v6], port), udp);
            all("tc_node_in", &reply, &inside, 5);
            all(
                "tc_node_out",
                &inside,
                &packet((FAR[v6], 80), client, udp),
                5,
            );
        }
    }
}

/// H5: what is noted of a datagram does not touch a later one of the same name that is nobody's, or
/// another's.
#[test]
fn a_datagram_with_the_name_of_another_keeps_its_fragments() {
    let loaded = Loaded::new("names");
    for v6 in FAMILIES {
        let client = (CLIENT[v6], 45_002);
        for fragment in fragments(&packet(client, (WEB[v6], 80), true), v6, 12, 24) {
            assert_ne!(through(&loaded, "tc_node_in", &fragment), fragment);
        }
        // Nobody's, to the same address: refused, and the rest dropped.
        let nobody = fragments(&packet(client, (WEB[v6], 81), true), v6, 12, 24);
        assert_eq!(loaded.run("tc_node_in", &nobody[0]).0, TC_ACT_REDIRECT);
        assert_eq!(loaded.run("tc_node_in", &nobody[1]).0, TC_ACT_SHOT);
        // An answer through the Service, and a datagram that the backend sends to the same client
        // by itself.
        for fragment in fragments(&packet((BACKEND[v6], 8080), client, true), v6, 13, 24) {
            assert_ne!(through(&loaded, "tc_node_out", &fragment), fragment);
        }
        for fragment in fragments(&packet((BACKEND[v6], 9090), client, true), v6, 13, 24) {
            assert_eq!(through(&loaded, "tc_node_out", &fragment), fragment);
        }
    }
}

/// L7: what has no first fragment yet goes nowhere, and never half translated.
#[test]
fn fragments_before_their_first_are_dropped() {
    let loaded = Loaded::new("early");
    for v6 in FAMILIES {
        let sent = fragments(
            &packet((CLIENT[v6], 45_001), (WEB[v6], 80), true),
            v6,
            9,
            24,
        );
        let elsewhere = fragments(
            &packet((CLIENT[v6], 45_001), (ROUTER[v6], 80), true),
            v6,
            9,
            24,
        );
        for (program, ..) in &ARRIVING[1..] {
            assert_eq!(
                loaded.run(program, &sent[1]),
                (TC_ACT_SHOT, sent[1].clone()),
                "{program}"
            );
            for fragment in &elsewhere {
                assert_eq!(&through(&loaded, program, fragment), fragment, "{program}");
            }
        }
        through(&loaded, "tc_node_in", &sent[0]);
        assert_ne!(through(&loaded, "tc_node_in", &sent[1]), sent[1]);
        // Another datagram, and one of another protocol.
        let other = fragments(
            &packet((CLIENT[v6], 45_001), (WEB[v6], 80), true),
            v6,
            10,
            24,
        );
        assert_eq!(loaded.run("tc_node_in", &other[1]).0, TC_ACT_SHOT);
        // To nobody: the first is refused, the rest dropped.
        let nobody = fragments(
            &packet((CLIENT[v6], 45_001), (EMPTY[v6], 80), true),
            v6,
            11,
            24,
        );
        assert_eq!(loaded.run("tc_node_in", &nobody[0]).0, TC_ACT_REDIRECT);
        assert_eq!(loaded.run("tc_node_in", &nobody[1]).0, TC_ACT_SHOT);
        // Too short for ports.
        let tiny = with_header(
            &sent[0],
            v6,
            44,
            &sent[0][ETHERNET + IP[v6]..][..8 * v6],
            &[0x12, 0x34],
        );
        assert_eq!(loaded.run("tc_node_in", &tiny).1, tiny);
    }
}

/// IPv4 options and IPv6 extension headers: translating and inserting them commute.
#[test]
fn options_and_extension_headers_are_stepped_over() {
    let loaded = Loaded::new("headers");
    // No operations, and a record route option that is full.
    let options: [Vec<u8>; 3] = [
        vec![1; 4],
        [vec![7, 39, 40], vec![0; 36], vec![0]].concat(),
        vec![1; 40],
    ];
    // Each names the next header first; padding fills them up.
    let (hop, routing, destination, tcp, udp) = (0, 43, 60, 6, 17);
    let padded = |next: u8, words: u8| {
        [vec![next, words, 1, 4], vec![0; 4 + 8 * usize::from(words)]].concat()
    };
    let routed = |next: u8, left: u8| {
        vec![
            next, 2, 2, left, 0, 0, 0, 0, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
        ]
    };
    let extensions = |proto: u8| -> Vec<(u8, Vec<u8>)> {
        vec![
            (hop, padded(proto, 0)),
            (destination, padded(proto, 3)),
            (routing, routed(proto, 0)),
            (44, vec![proto, 0, 0, 0, 1, 2, 3, 4]),
            (
                hop,
                [
                    padded(destination, 0),
                    padded(routing, 1),
                    routed(destination, 0),
                    padded(proto, 0),
                ]
                .concat(),
            ),
            (
                hop,
                [
                    (0..7).flat_map(|_| padded(destination, 0)).collect(),
                    padded(proto, 31),
                ]
                .concat(),
            ),
        ]
    };
    for v6 in FAMILIES {
        for is_udp in [false, true] {
            let client = (CLIENT[v6], 46_000);
            let cases = match v6 {
                0 => options.iter().map(|options| (0, options.clone())).collect(),
                _ => extensions(if is_udp { udp } else { tcp }),
            };
            for (first, more) in cases {
                let extended = |frame: Vec<u8>| {
                    with_header(&frame, v6, first, &more, &frame[ETHERNET + IP[v6]..])
                };
                let dialled = extended(packet(client, (WEB[v6], 80), is_udp));
                let seen = extended(packet(client, (BACKEND[v6], 8080), is_udp));
                for (program, ..) in &ARRIVING[1..] {
                    assert_eq!(
                        through(&loaded, program, &dialled),
                        seen,
                        "{program}: {more:02x?}"
                    );
                }
                assert_eq!(arrives(&loaded, &dialled), seen);
                let reply = extended(packet((BACKEND[v6], 8080), client, is_udp));
                let shown = extended(packet((WEB[v6], 80), client, is_udp));
                assert_eq!(
                    through(&loaded, "tc_node_out", &reply),
                    shown,
                    "{more:02x?}"
                );
                // A quote of it, in an error.
                let about = error(ROUTER[v6], CLIENT[v6], Error::TooBig, &seen, 1200);
                assert_eq!(
                    through(&loaded, "tc_node_out", &about),
                    error(WEB[v6], CLIENT[v6], Error::TooBig, &dialled, 1200)
                );
                // Cut anywhere: never half translated.
                for length in (ETHERNET + IP[v6]..dialled.len().min(400)).step_by(3) {
                    let cut = &dialled[..length];
                    let (_, out) = loaded.run("tc_node_in", cut);
                    assert!(
                        out == cut || out == seen[..length],
                        "{length} bytes: {more:02x?}"
                    );
                }
            }
        }
    }
    // More stops to make, more headers than anybody has, and headers past the end.
    let plain = packet((CLIENT[1], 46_001), (WEB[1], 80), true);
    for (first, more) in [
        (routing, routed(udp, 1)),
        (
            hop,
            [
                (0..9).flat_map(|_| padded(destination, 0)).collect(),
                padded(udp, 0),
            ]
            .concat(),
        ),
        (hop, padded(udp, 200)[..64].to_vec()),
    ] {
        let odd = with_header(&plain, 1, first, &more, &plain[ETHERNET + IP[1]..]);
        for program in ["xdp_node", "tc_node_in", "tc_pod_in", "tc_node_out"] {
            assert_eq!(loaded.run(program, &odd).1, odd, "{program}: {more:02x?}");
        }
    }
    // A port unreachable quotes a packet with options too.
    for v6 in FAMILIES {
        let plain = packet((CLIENT[v6], 46_002), (EMPTY[v6], 80), true);
        let (first, more) = [(0, vec![1; 8]), (destination, padded(udp, 0))][v6].clone();
        let odd = with_header(&plain, v6, first, &more, &plain[ETHERNET + IP[v6]..]);
        let (verdict, answer) = loaded.run("tc_node_in", &odd);
        assert_eq!(verdict, TC_ACT_REDIRECT);
        let quote = &answer[ETHERNET + IP[v6] + 8..];
        assert_eq!(quote[..IP[v6] + 8 + 4], odd[ETHERNET..][..IP[v6] + 8 + 4]);
    }
}

/// Packets that lie about their lengths, whose payload does not fit their checksum, or that are at
/// their last hop: translated as any other, and as wrong as before, so that whoever would have
/// noticed does.
#[test]
fn lies_are_passed_on_as_they_are() {
    let loaded = Loaded::new("lies");
    // Offset from the IP header, and what is written there.
    let lies = |v6: usize, udp: bool| -> Vec<(usize, Vec<u8>)> {
        let (length, hops, l4) = ([2, 4][v6], [8, 7][v6], IP[v6]);
        let mut lies: Vec<_> = [0, 7, 19, 20, 27, 0xffff]
            .map(|claimed: u16| (length, claimed.to_be_bytes().to_vec()))
            .into();
        lies.extend([0, 1, 255].map(|left| (hops, vec![left])));
        // A payload that the checksum does not fit.
        lies.push((l4 + 25, b"?".to_vec()));
        if udp {
            lies.extend(
                [0, 7, 0xffff].map(|claimed: u16| (l4 + 4, claimed.to_be_bytes().to_vec())),
            );
        } else {
            lies.extend([0x00, 0x40, 0xf0].map(|offset| (l4 + 12, vec![offset])));
        }
        lies
    };
    for v6 in FAMILIES {
        for udp in [false, true] {
            let client = (CLIENT[v6], 46_500);
            let requests = [
                (
                    packet(client, (WEB[v6], 80), udp),
                    packet(client, (BACKEND[v6], 8080), udp),
                ),
                (
                    packet((BACKEND[v6], 8080), client, udp),
                    packet((WEB[v6], 80), client, udp),
                ),
            ];
            // The flow is there.
            through(&loaded, "tc_node_in", &requests[0].0);
            for (offset, bytes) in lies(v6, udp) {
                let lie = |frame: &[u8]| {
                    let mut frame = frame.to_vec();
                    frame[ETHERNET + offset..][..bytes.len()].copy_from_slice(&bytes);
                    frame
                };
                let case = format!("IPv{}, UDP {udp}, {bytes:02x?} at {offset}", 4 + 2 * v6);
                for (program, n) in [
                    ("xdp_node", 0),
                    ("tc_node_in", 0),
                    ("tc_pod_in", 0),
                    ("tc_node_out", 1),
                    ("tc_pod_out", 1),
                ] {
                    let (sent, wanted) = &requests[n];
                    assert_eq!(
                        through(&loaded, program, &lie(sent)),
                        lie(wanted),
                        "{program}: {case}"
                    );
                }
                // To nobody: refused or dropped.
                for (program, dropped, back) in ARRIVING {
                    let (verdict, _) =
                        loaded.run(program, &lie(&packet(client, (EMPTY[v6], 80), udp)));
                    assert!(
                        [dropped, back].contains(&verdict),
                        "{program}: {case}: {verdict}"
                    );
                }
            }
        }
    }
}

/// An SCTP INIT.
pub(crate) fn sctp(from: (&str, u16), to: (&str, u16)) -> Vec<u8> {
    chunk(1, from, to)
}

/// An SCTP packet with a chunk of this type.
fn chunk(kind: u8, from: (&str, u16), to: (&str, u16)) -> Vec<u8> {
    let mut packet = [
        &from.1.to_be_bytes()[..],
        &to.1.to_be_bytes(),
        &[0; 8],
        &[kind, 0, 0, 21],
        &[7; 17],
        &[0; 3],
    ]
    .concat();
    // RFC 9260 appendix A, bit by bit.
    let crc = packet.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ (0x82f6_3b78 * (crc & 1))
        })
    });
    packet[8..12].copy_from_slice(&(!crc).to_le_bytes());
    let mut frame = Vec::new();
    builder(from.0, to.0)
        .write(&mut frame, etherparse::IpNumber::SCTP, &packet)
        .unwrap();
    frame
}

/// F10: like TCP and UDP, with a checksum that covers the ports. XDP leaves it to tc.
#[test]
fn sctp_is_translated_with_its_checksum() {
    let loaded = Loaded::new("sctp");
    for v6 in FAMILIES {
        let dialled = sctp((CLIENT[v6], 46_999), (WEB[v6], 80));
        assert_eq!(through(&loaded, "xdp_node", &dialled), dialled);
        for (n, (program, ..)) in ARRIVING.into_iter().enumerate().skip(1) {
            let client = (CLIENT[v6], 47_000 + n as u16);
            assert_eq!(
                through(&loaded, program, &sctp(client, (WEB[v6], 80))),
                sctp(client, (BACKEND[v6], 8080)),
                "{program}"
            );
            for out in ["tc_node_out", "tc_pod_out"] {
                assert_eq!(
                    through(&loaded, out, &sctp((BACKEND[v6], 8080), client)),
                    sctp((WEB[v6], 80), client),
                    "{out}"
                );
            }
        }
        let client = (CLIENT[v6], 47_100);
        let routed = through(&loaded, "tc_node_in", &sctp(client, (FAR[v6], 80)));
        let sent = through(&loaded, "tc_node_out", &routed);
        let port = source_port(&sent, v6);
        assert_eq!(sent, sctp((NODE[v6], port), (REMOTE[v6], 8080)));
        let reply = arrives(&loaded, &sctp((REMOTE[v6], 8080), (NODE[v6], port)));
        assert_eq!(
            through(&loaded, "tc_node_out", &reply),
            sctp((FAR[v6], 80), client)
        );
        let client = (CLIENT[v6], 47_200);
        // Behind options and extension headers; in fragments not at all, for the first does not say
        // how long all are.
        let (first, more) = [(0, vec![1; 8]), (60, vec![132, 0, 1, 4, 0, 0, 0, 0])][v6].clone();
        let extended =
            |frame: Vec<u8>| with_header(&frame, v6, first, &more, &frame[ETHERNET + IP[v6]..]);
        assert_eq!(
            through(&loaded, "tc_pod_in", &extended(sctp(client, (WEB[v6], 80)))),
            extended(sctp(client, (BACKEND[v6], 8080)))
        );
        let parts = fragments(&sctp(client, (WEB[v6], 80)), v6, 21, 16);
        assert_eq!(
            loaded.run("tc_node_in", &parts[0]),
            (TC_ACT_SHOT, parts[0].clone())
        );
        // `CHECKSUM_PARTIAL` in a veth: a zero is not a checksum yet, and whoever computes it
        // starts from zero.
        let unfinished = |mut frame: Vec<u8>| {
            frame[ETHERNET + IP[v6] + 8..][..4].fill(0);
            frame
        };
        assert_eq!(
            through(
                &loaded,
                "tc_pod_in",
                &unfinished(sctp((CLIENT[v6], 47_300), (WEB[v6], 80)))
            ),
            unfinished(sctp((CLIENT[v6], 47_300), (BACKEND[v6], 8080)))
        );
        // Refused, and unknown: with the INIT's tag quoted, or its sender does not believe it.
        for to in [(EMPTY[v6], 80), (WEB[v6], 81)] {
            let init = sctp(client, to);
            let (verdict, answer) = loaded.run("tc_node_in", &init);
            assert_eq!(verdict, TC_ACT_REDIRECT);
            assert_eq!(
                answer[ETHERNET + IP[v6] + 8..],
                init[ETHERNET..][..IP[v6] + 20]
            );
        }
    }
}

/// L1 and F10: an association stays with its backend when that leaves its Service; the next from
/// the same port finds another.
#[test]
fn sctp_associations_stay_with_their_backend() {
    let [data, init, init_ack, abort] = [0, 1, 2, 6];
    for ends in [false, true] {
        let loaded = Loaded::new(if ends { "sctp-ends" } else { "sctp-stays" });
        let clients = [0, 1].map(|v6| (CLIENT[v6], 47_500));
        let ask = |kind, v6: usize| {
            through(
                &loaded,
                "tc_pod_in",
                &chunk(kind, clients[v6], (WEB[v6], 80)),
            )
        };
        let at = |kind, v6: usize, pod: [&str; 2]| chunk(kind, clients[v6], (pod[v6], 8080));
        for v6 in FAMILIES {
            assert_eq!(ask(init, v6), at(init, v6, BACKEND));
            let reply = through(
                &loaded,
                "tc_pod_out",
                &chunk(init_ack, (BACKEND[v6], 8080), clients[v6]),
            );
            assert_eq!(reply, chunk(init_ack, (WEB[v6], 80), clients[v6]));
            assert_eq!(ask(data, v6), at(data, v6, BACKEND));
        }
        loaded.serve(false);
        for v6 in FAMILIES {
            assert_eq!(ask(data, v6), at(data, v6, BACKEND));
            if ends {
                assert_eq!(ask(abort, v6), at(abort, v6, BACKEND));
            }
            assert_eq!(ask(init, v6), at(init, v6, REMOTE));
            assert_eq!(ask(data, v6), at(data, v6, REMOTE));
        }
    }
}

/// A tag in the frame: XDP leaves it to tc, for which the kernel takes it out.
#[test]
fn tagged_frames_are_left_to_tc() {
    let loaded = Loaded::new("vlan");
    for v6 in FAMILIES {
        let plain = packet((CLIENT[v6], 48_000), (WEB[v6], 80), false);
        for tag in [[0x81, 0x00, 0, 100], [0x88, 0xa8, 0, 100]] {
            let tagged = [&plain[..12], &tag[..], &plain[12..]].concat();
            assert_eq!(through(&loaded, "xdp_node", &tagged), tagged);
        }
    }
}
