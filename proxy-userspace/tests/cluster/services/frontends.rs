//! Every frontend from everywhere, in clusters of several kinds.

use shunt::datapath::maps::Maps;
use shunt_lab::Cni;

use super::*;

/// F1–F4, F8, F9, P7 from everywhere, both families and protocols.
fn frontends(lab: Lab, xdp: &str) {
    frontends_with(lab, xdp, &[]);
}

/// The same with further arguments of the agents.
fn frontends_with(lab: Lab, xdp: &str, extra: &[&str]) {
    let cluster = Cluster::start_in(lab, xdp, extra);
    let web = ["web-a", "web-b"];
    for v6 in [false, true] {
        let addresses: Vec<SocketAddr> = if v6 {
            vec![
                at("fd96::1", 80),
                at("2001:db8:198::1", 80),
                at("2001:db8:198::2", 80),
            ]
        } else {
            vec![
                at("10.96.0.1", 80),
                at("198.51.100.1", 80),
                at("198.51.100.2", 80),
            ]
        };
        let [node_a, node_b] = ["node-a", "node-b"].map(|node| cluster.node_ip(node, v6));
        let loopback: IpAddr = if v6 {
            "::1".parse().unwrap()
        } else {
            "127.0.0.1".parse().unwrap()
        };
        for proto in BOTH {
            for name in ["hooked", "packets", "node-a", "client"] {
                let client = cluster.client(name);
                let own = cluster.lab.ips(name).unwrap();
                for to in &addresses {
                    every_backend(&client, proto, *to, &web, |answer| {
                        let seen = answer.seen_peer.ip();
                        // P7: an outside client comes in at node-a, and is translated towards
                        // node-b only.
                        if name == "client" && answer.server == "web-b" {
                            assert_eq!(seen, node_a, "{proto} {to}");
                        } else if name != "node-a" {
                            assert!(
                                own.contains(&seen),
                                "{proto} {to} from {name} is seen as {seen}"
                            );
                        }
                    });
                }
                // F2, on the own node and on the other.
                every_backend(
                    &client,
                    proto,
                    SocketAddr::new(node_a, NODE_PORT),
                    &web,
                    |_| (),
                );
                every_backend(
                    &client,
                    proto,
                    SocketAddr::new(node_b, NODE_PORT),
                    &web,
                    |answer| {
                        let seen = answer.seen_peer.ip();
                        match answer.server.as_str() {
                            "web-a" if name != "node-a" => {
                                assert_eq!(seen, node_b, "{proto} from {name}")
                            }
                            "web-b" if name != "node-a" => {
                                assert!(own.contains(&seen), "{proto} from {name}: {seen}")
                            }
                            _ => {}
                        }
                    },
                );
                if name == "node-a" {
                    every_backend(
                        &client,
                        proto,
                        SocketAddr::new(loopback, NODE_PORT),
                        &web,
                        |_| (),
                    );
                }
                if name == "hooked" {
                    // A pod's loopback is the pod.
                    let dialled = SocketAddr::new(loopback, NODE_PORT);
                    let dial = Dial {
                        connected: true,
                        ..Dial::default()
                    };
                    let error = client.once(proto, dialled, &dial).unwrap_err();
                    assert!(error.is_refused(), "{proto} {dialled} in a pod: {error}");
                }
            }
        }
    }
    let [socket, tc, xdp_flows] = cluster.flows();
    assert!(socket > 0 && tc > 0, "socket {socket}, tc {tc}");
    assert_eq!(
        xdp_flows > 0,
        xdp != "off",
        "XDP translated {xdp_flows} flows with --xdp {xdp}"
    );
}

#[test]
fn frontends_are_reached_from_everywhere_with_xdp() {
    frontends(Lab::new().unwrap(), "native");
}

/// For devices whose driver has no XDP: the kernel runs it on socket buffers.
#[test]
fn frontends_are_reached_from_everywhere_with_generic_xdp() {
    frontends(Lab::new().unwrap(), "generic");
}

#[test]
fn frontends_are_reached_from_everywhere_without_xdp() {
    frontends(Lab::new().unwrap(), "off");
}

/// Replies of pods on one bridge never see the node's IP layer.
#[test]
fn frontends_are_reached_in_a_bridged_network() {
    frontends(Lab::builder().cni(Cni::Bridge).build().unwrap(), "off");
}

/// Strict reverse path filters, and checksums that are still to be filled in (`CHECKSUM_PARTIAL`).
#[test]
fn frontends_are_reached_with_strict_filters_and_offloads() {
    frontends(
        Lab::builder()
            .strict_rp_filter()
            .checksum_offload()
            .build()
            .unwrap(),
        "off",
    );
}

/// `--fast-path on`, with routed and bridged pods, strict filters and offloads: everything is
/// reached as without it, ...
#[test]
fn frontends_are_reached_by_the_fast_path() {
    let strict = Lab::builder().strict_rp_filter().checksum_offload();
    for lab in [strict, Lab::builder().cni(Cni::Bridge)] {
        frontends_with(lab.build().unwrap(), "off", &["--fast-path", "on"]);
    }
}

/// ... packets between pods, or a pod and the network, do not meet the node's own stack on their
/// way, and are counted all the same.
#[test]
fn the_fast_path_leaves_the_nodes_stack_out() {
    for on in [false, true] {
        let fast_path = if on { "on" } else { "off" };
        let cluster = Cluster::start("off", &["--fast-path", fast_path, "--count-traffic", "on"]);
        let maps = Maps::open(cluster.agents[0].bpf_root()).unwrap();
        for v6 in [false, true] {
            let address = if v6 { "fd96::2" } else { "10.96.0.2" };
            let node_port = SocketAddr::new(cluster.node_ip("node-a", v6), NODE_PORT);
            for (name, to) in [("packets", at(address, 80)), ("client", node_port)] {
                let client = cluster.client(name);
                // Neighbours are known from then on.
                for proto in BOTH {
                    dial(&client, proto, to);
                }
                let before = forwarded(&cluster, v6);
                for proto in BOTH {
                    let traffic_before = traffic(&maps);
                    for _ in 0..10 {
                        dial(&client, proto, to);
                    }
                    let [to_backend, from_backend] = traffic(&maps);
                    let counted = [
                        to_backend - traffic_before[0],
                        from_backend - traffic_before[1],
                    ];
                    // A datagram each way; of a connection three packets at least.
                    let as_sent = if proto == Proto::Udp {
                        counted == [10, 10]
                    } else {
                        counted[0] >= 30 && counted[1] >= 30
                    };
                    assert!(
                        as_sent,
                        "{proto} {to} from {name}, fast path {on}: counted {counted:?}"
                    );
                }
                let packets = forwarded(&cluster, v6) - before;
                let expected = if on { packets == 0 } else { packets >= 100 };
                assert!(
                    expected,
                    "{to} from {name}, fast path {on}: node-a forwarded {packets} packets"
                );
            }
        }
        for v6 in [false, true] {
            for proto in BOTH {
                // P8: the second half of the translation is done although the pod's own device is
                // left out.
                let to = at(if v6 { "fd96::2" } else { "10.96.0.2" }, 80);
                let answer = dial(
                    &cluster.lab.client("solo", Sockets::Unhooked).unwrap(),
                    proto,
                    to,
                );
                assert_eq!(
                    (answer.server.as_str(), answer.peer),
                    ("solo", to),
                    "{proto}"
                );
            }
        }
    }
}

/// Packets to all backends, and from them.
fn traffic(maps: &Maps) -> [u64; 2] {
    (0..64).fold([0; 2], |[to, from], backend| {
        let more = maps.traffic(backend).unwrap();
        [to + more.to_packets, from + more.from_packets]
    })
}

/// Packets that node-a's stack has forwarded.
fn forwarded(cluster: &Cluster, v6: bool) -> u64 {
    let ns = cluster.lab.ns("node-a").unwrap();
    if v6 {
        let text = ns.output("cat", &["/proc/net/snmp6"]).unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with("Ip6OutForwDatagrams"))
            .unwrap();
        return line.split_whitespace().nth(1).unwrap().parse().unwrap();
    }
    let text = ns.output("cat", &["/proc/net/snmp"]).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("Ip: "));
    let names = lines.next().unwrap().split_whitespace();
    let mut values = names.zip(lines.next().unwrap().split_whitespace());
    values
        .find(|(name, _)| *name == "ForwDatagrams")
        .unwrap()
        .1
        .parse()
        .unwrap()
}
