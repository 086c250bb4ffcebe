//! New flows, open flows, and what they share.

use super::*;

/// L2: a full conntrack refuses nobody, and a live flow that was evicted finds its backend and its
/// source port again.
#[test]
fn a_full_conntrack_refuses_nobody() {
    let cluster = Cluster::start("native", &["--max-flows", "256", "--max-new-flows", "256"]);
    for name in ["packets", "client"] {
        let client = cluster.client(name);
        for to in [at("10.96.0.1", 80), at("fd96::1", 80)] {
            let open: Vec<_> = (0..4).map(|_| client.open_tcp(to).unwrap()).collect();
            let before: Vec<_> = open.iter().map(|conn| conn.ask("first").unwrap()).collect();
            let counts = client.tcp_many(to, 2000).unwrap();
            assert_eq!(counts.values().sum::<u64>(), 2000, "{to} from {name}");
            for (conn, before) in open.iter().zip(before) {
                let answer = conn.ask("again").unwrap();
                assert_eq!(
                    (answer.server, answer.seen_peer),
                    (before.server, before.seen_peer),
                    "{to} from {name}"
                );
            }
        }
    }
}

/// P6 and P8.
#[test]
fn nobody_is_refused_at_once_and_oneself_is_reached() {
    for xdp in ["native", "off"] {
        let cluster = Cluster::start(xdp, &[]);
        for v6 in [false, true] {
            let cluster_ip = |n: u8| {
                at(
                    &if v6 {
                        format!("fd96::{n}")
                    } else {
                        format!("10.96.0.{n}")
                    },
                    80,
                )
            };
            let node_port = SocketAddr::new(cluster.node_ip("node-a", v6), NODE_PORT + 2);
            for proto in BOTH {
                for name in ["hooked", "packets", "node-a", "client"] {
                    let client = cluster.client(name);
                    // So that no neighbour must be found first.
                    dial(&client, proto, cluster_ip(2));
                    for to in [cluster_ip(3), node_port] {
                        let dial = Dial {
                            connected: true,
                            ..Dial::default()
                        };
                        let error = client.once(proto, to, &dial).unwrap_err();
                        // In a cluster of namespaces the ICMPv6 error is back before `connect` lets
                        // go of its socket, and Linux then keeps it until the first retransmission,
                        // a second later (IPv4 does not).
                        let limit = if v6 && proto == Proto::Tcp { 1500 } else { 500 };
                        let quick = error
                            .after()
                            .is_some_and(|after| after < Duration::from_millis(limit));
                        assert!(
                            error.is_refused() && quick,
                            "{proto} {to} from {name}, --xdp {xdp}: {error}"
                        );
                    }
                }
                for sockets in [Sockets::Hooked, Sockets::Unhooked] {
                    let client = cluster.lab.client("solo", sockets).unwrap();
                    let answer = dial(&client, proto, cluster_ip(2));
                    assert_eq!(
                        (answer.server.as_str(), answer.peer),
                        ("solo", cluster_ip(2)),
                        "{proto} {sockets:?}"
                    );
                }
            }
        }
    }
}

/// P9: 2,000 flows over two backends; chi-squared with one degree of freedom, p > 0.001.
#[test]
fn flows_spread_evenly() {
    let cluster = Cluster::start("native", &[]);
    for name in ["hooked", "packets", "client"] {
        let counts = cluster
            .client(name)
            .tcp_many(at("10.96.0.1", 80), 2000)
            .unwrap();
        let chi: f64 = counts
            .values()
            .map(|&n| (n as f64 - 1000.0).powi(2) / 1000.0)
            .sum();
        assert!(counts.len() == 2 && chi < 10.83, "{name}: {counts:?}");
    }
}

/// L1, B1: backends come and go while connections are open.
#[test]
fn open_flows_keep_their_backend() {
    let cluster = Cluster::start("native", &[]);
    let frontends = [
        ("hooked", at("10.96.0.1", 80)),
        ("packets", at("10.96.0.1", 80)),
        ("packets", at("fd96::1", 80)),
        (
            "client",
            SocketAddr::new(cluster.node_ip("node-a", false), NODE_PORT),
        ),
        (
            "client",
            SocketAddr::new(cluster.node_ip("node-a", true), NODE_PORT),
        ),
    ];
    let clients: Vec<Client> = frontends
        .iter()
        .map(|(name, _)| cluster.client(name))
        .collect();
    let mut open = Vec::new();
    for (client, (_, to)) in clients.iter().zip(frontends) {
        for proto in BOTH {
            let conn = client.open(proto, to, &Dial::default()).unwrap();
            let server = conn.ask("first").unwrap().server;
            open.push((conn, server, client, proto, to));
        }
    }
    for (pods, count) in [
        (vec!["web-a", "web-b", "web-c"], 3),
        (vec!["web-c"], 1),
        (vec!["web-a", "web-b"], 2),
    ] {
        cluster.serve(&pods);
        cluster.wait_for_backends(count);
        for (conn, server, client, proto, to) in &open {
            // B7 lets a UDP flow leave a backend that is gone; TCP stays, for the pod still
            // answers.
            if *proto == Proto::Tcp || pods.contains(&server.as_str()) {
                let answer = conn
                    .ask("again")
                    .unwrap_or_else(|error| panic!("{to} from {}: {error}", client.name()));
                if *proto == Proto::Tcp {
                    assert_eq!(
                        &answer.server,
                        server,
                        "{proto} {to} from {}",
                        client.name()
                    );
                }
            }
            // New flows reach who is there now.
            assert!(
                pods.contains(&dial(client, *proto, *to).server.as_str()),
                "{proto} {to} from {}",
                client.name()
            );
        }
    }
}

/// One client port, two frontends, one backend at the same time.
#[test]
fn one_source_port_serves_two_frontends_at_once() {
    let cluster = Cluster::start("off", &[]);
    cluster.serve(&["web-b"]);
    cluster.wait_for_backends(1);
    let client = cluster.client("packets");
    for v6 in [false, true] {
        let from = SocketAddr::new(cluster.ip("packets", v6), 45_000);
        let to = if v6 {
            [
                at("fd96::1", 80),
                at("2001:db8:198::1", 80),
                at("2001:db8:198::2", 80),
            ]
        } else {
            [
                at("10.96.0.1", 80),
                at("198.51.100.1", 80),
                at("198.51.100.2", 80),
            ]
        };
        for proto in BOTH {
            // Connected, so that the client's own kernel tells the three UDP sockets apart.
            let dial = Dial {
                connected: true,
                ..Dial::from(from)
            };
            let open = to.map(|to| client.open(proto, to, &dial).unwrap());
            for _ in 0..3 {
                let mut ports = BTreeSet::new();
                for (conn, to) in open.iter().zip(to) {
                    let answer = conn.ask("hello").unwrap_or_else(|error| {
                        let flows = cluster.agents[0].json(&["conntrack", "list"]).unwrap();
                        panic!("{proto} {to}: {error}; flows of node-a: {flows:#}")
                    });
                    ports.insert(answer.seen_peer.port());
                }
                assert_eq!(
                    ports.len(),
                    to.len(),
                    "{proto}: the backend takes two connections for one"
                );
            }
        }
    }
}
