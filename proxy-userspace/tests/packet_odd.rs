//! Packets that others forget, through the loaded programs: ICMP errors. Needs root.

use std::net::IpAddr;

use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4, icmpv6};

#[path = "support/loaded.rs"]
mod loaded;

use loaded::{BACKEND, CLIENT, FAR, Loaded, NODE, REMOTE, WEB};

const TC_ACT_UNSPEC: u32 = u32::MAX;
const XDP_PASS: u32 = 2;

/// A router on the way.
const ROUTER: [&str; 2] = ["172.16.0.1", "2001:db8:aaaa::1"];
const FAMILIES: [usize; 2] = [0, 1];
const ETHERNET: usize = 14;
const IP: [usize; 2] = [20, 40];

fn builder(from: &str, to: &str) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
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
        builder.udp(from.1, to.1).write(&mut bytes, payload).unwrap();
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
            Error::PortUnreachable => Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port),
            Error::TimeExceeded => Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded),
        };
        builder.icmpv6(kind).write(&mut bytes, quoted).unwrap();
    } else {
        let kind = match kind {
            Error::TooBig => Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::FragmentationNeeded {
                next_hop_mtu: 1300,
            }),
            Error::PortUnreachable => Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port),
            Error::TimeExceeded => Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit),
        };
        builder.icmpv4(kind).write(&mut bytes, quoted).unwrap();
    }
    bytes
}

/// A packet through one program, which passes it.
fn through(loaded: &Loaded, program: &str, packet: &[u8]) -> Vec<u8> {
    let (verdict, out) = loaded.run(program, packet);
    let pass = if program == "xdp_node" { XDP_PASS } else { TC_ACT_UNSPEC };
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

/// Every length of quote that a router may choose: eight bytes of the transport header at least (RFC 792), the whole packet
/// at most.
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
            assert_eq!((seen.len(), shown), (reply.len(), packet((WEB[v6], 80), client, udp)));
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
                    assert_eq!(inside, error(sender, BACKEND[v6], Error::TooBig, &reply, quote));
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
            // Another port of the client's, another backend, and a quote that another machine is said to have sent.
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
        packets.extend((0..IP[v6] + 4).map(|quote| error(ROUTER[v6], CLIENT[v6], Error::TooBig, &seen, quote)));
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
            for program in ["xdp_node", "tc_node_in", "tc_node_out", "tc_pod_in", "tc_pod_out"] {
                assert_eq!(through(&loaded, program, &packet), packet, "{program}");
            }
        }
        assert_ne!(through(&loaded, "tc_node_out", &ours), ours);
    }
}
