//! Session affinity.

use etherparse::PacketBuilderStep;

use super::*;
use crate::forged::Forger;

const AFFINITY: &str = "  sessionAffinity: ClientIP\n";

/// P1: every frontend of a Service port leads a client to one backend, an outside client through
/// whichever node; when that backend goes, to one other; and a new agent knows it still.
fn affinity(source: Source, xdp: &str) {
    let all = ["web-a", "web-b", "web-c", "web-d"];
    let mut cluster = Cluster::start(source, xdp, &[], |cluster| {
        cluster.documents("web", 1, AFFINITY, &ready(&all))
    });
    let clients = cluster.clients();
    let frontends = |cluster: &Cluster, v6| {
        [
            SocketAddr::new(cluster.ip("node-a", v6), node_port(1)),
            cluster_ip(1, v6),
            load_balancer_ip(1, v6),
            external_ip(1, v6),
        ]
    };
    for client in &clients {
        for v6 in [false, true] {
            for proto in BOTH {
                let mut kept = BTreeSet::new();
                for to in frontends(&cluster, v6) {
                    kept.insert(one_server(client, proto, to));
                }
                if client.name() == "client" {
                    // The other node knows nothing of it, and chooses alike.
                    let other = SocketAddr::new(cluster.ip("node-b", v6), node_port(1));
                    kept.insert(one_server(client, proto, other));
                }
                assert_eq!(kept.len(), 1, "{proto} from {}: {kept:?}", client.name());
                let first = kept.first().unwrap().as_str();

                let others: Vec<_> = all.into_iter().filter(|pod| *pod != first).collect();
                cluster.apply(&cluster.documents("web", 1, AFFINITY, &ready(&others)));
                let to = frontends(&cluster, v6)[0];
                let second = one_server(client, proto, to);
                assert_ne!(second, first);
                // The first is back, and is nothing to this client any more.
                cluster.apply(&cluster.documents("web", 1, AFFINITY, &ready(&all)));
                for to in frontends(&cluster, v6) {
                    assert_eq!(
                        one_server(client, proto, to),
                        second,
                        "{proto} {to} from {}",
                        client.name()
                    );
                }
            }
        }
    }
    // Off and on again.
    cluster.apply(&cluster.documents("web", 1, "", &ready(&all)));
    for client in &clients {
        let spread = servers(client, Proto::Udp, cluster_ip(1, true), 24);
        assert!(spread.len() > 1, "{}: {spread:?}", client.name());
    }
    cluster.apply(&cluster.documents("web", 1, AFFINITY, &ready(&all)));
    let to = cluster_ip(1, false);
    let before: Vec<_> = clients
        .iter()
        .map(|client| one_server(client, Proto::Tcp, to))
        .collect();
    for agent in &mut cluster.agents {
        agent.restart().unwrap();
    }
    let after: Vec<_> = clients
        .iter()
        .map(|client| one_server(client, Proto::Tcp, to))
        .collect();
    assert_eq!(after, before);
}

#[test]
fn a_client_keeps_its_backend_with_xdp() {
    affinity(Source::Manifests, "native");
}

#[test]
fn a_client_keeps_its_backend_without_xdp() {
    affinity(Source::ApiServer, "off");
}

/// P1: each new flow starts the time-out anew; when it has passed, the choice is free again.
#[test]
fn affinity_ends_when_the_client_is_idle_for_the_time_out() {
    let spec = "  sessionAffinity: ClientIP\n  sessionAffinityConfig: { clientIP: { timeoutSeconds: 5 } }\n";
    let all = ["web-a", "web-b", "web-c", "web-d"];
    let cluster = Cluster::start(Source::Manifests, "native", &[], |cluster| {
        cluster.documents("web", 1, spec, &ready(&all))
    });
    // An outside client's backend follows from its address, so that all nodes agree.
    let clients: Vec<_> = cluster.clients().into_iter().take(3).collect();
    let dial_all = || -> Vec<(String, String)> {
        let cases = clients
            .iter()
            .flat_map(|client| BOTH.map(|proto| (client, proto)));
        cases
            .flat_map(|(client, proto)| {
                [false, true].map(|v6| {
                    let server = dial(client, proto, cluster_ip(1, v6)).server;
                    (
                        format!("{} {proto} IPv{}", client.name(), 4 + 2 * u8::from(v6)),
                        server,
                    )
                })
            })
            .collect()
    };
    let first = dial_all();
    for _ in 0..6 {
        thread::sleep(Duration::from_secs(1));
        assert_eq!(dial_all(), first, "a new flow each second");
    }
    let mut changed = BTreeSet::new();
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(5100));
        let now = dial_all();
        let moved = first.iter().zip(&now).filter(|(first, now)| first != now);
        changed.extend(moved.map(|(_, (case, _))| case.clone()));
    }
    // Each of twelve stays where it was for all three times with probability 1/64.
    assert!(changed.len() >= 9, "only these moved: {changed:?}");
}

/// P1 for a client outside, whose backend follows from its address and is the same through both
/// nodes: it leaves a backend that goes, does not come back to it while it opens flows, and does
/// once it has been idle for the time-out.
fn affinity_of_outside_clients(source: Source, xdp: &str) {
    const TIME_OUT: Duration = Duration::from_secs(3);
    let spec = format!(
        "  sessionAffinity: ClientIP\n  sessionAffinityConfig: {{ clientIP: {{ timeoutSeconds: {} }} }}\n",
        TIME_OUT.as_secs()
    );
    let all = PODS.map(|(pod, _)| pod);
    // A Service for each family and protocol, with endpoints of its own.
    let cases = [
        (1, false, Proto::Tcp),
        (2, true, Proto::Tcp),
        (3, false, Proto::Udp),
        (4, true, Proto::Udp),
    ];
    let documents = |cluster: &Cluster, without: &[String]| -> Vec<String> {
        let of = |(i, &(number, ..)): (usize, &(u8, bool, Proto))| {
            let left = |pod: &&str| without.get(i).is_none_or(|gone| gone != pod);
            let pods: Vec<_> = all.into_iter().filter(left).collect();
            cluster.documents(&format!("web{number}"), number, &spec, &ready(&pods))
        };
        cases.iter().enumerate().flat_map(of).collect()
    };
    let cluster = Cluster::start(source, xdp, &[], |cluster| documents(cluster, &[]));
    let client = cluster.client("client");
    let servers = || -> Vec<String> {
        let of = |&(number, v6, proto): &(u8, bool, Proto)| {
            let dialled =
                NODES.map(|node| SocketAddr::new(cluster.ip(node, v6), node_port(number)));
            let [first, second] = dialled.map(|to| dial(&client, proto, to).server);
            assert_eq!(first, second, "{proto} to {dialled:?}");
            first
        };
        cases.iter().map(of).collect()
    };
    let first = servers();
    cluster.apply(&documents(&cluster, &first));
    let second = servers();
    assert!(
        first
            .iter()
            .zip(&second)
            .all(|(first, second)| first != second)
    );
    cluster.apply(&documents(&cluster, &[]));
    let began = Instant::now();
    while began.elapsed() < 2 * TIME_OUT {
        assert_eq!(servers(), second, "after {:?}", began.elapsed());
        thread::sleep(TIME_OUT / 4);
    }
    thread::sleep(TIME_OUT);
    assert_eq!(servers(), first);
}

#[test]
fn affinity_of_outside_clients_ends_with_the_time_out_with_xdp() {
    affinity_of_outside_clients(Source::Manifests, "native");
}

#[test]
fn affinity_of_outside_clients_ends_with_the_time_out_without_xdp() {
    affinity_of_outside_clients(Source::ApiServer, "off");
}

/// First packets to a frontend from so many addresses that nobody has.
fn flood(cluster: &Cluster, to: SocketAddr, count: u32) {
    let send = || {
        let forger = Forger::new().unwrap();
        for n in 0..count {
            let from = match to {
                SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::from(0xc612_0000 + n)),
                SocketAddr::V6(_) => {
                    IpAddr::from(Ipv6Addr::from((0x2001_0db8_0018 << 80) + u128::from(n)))
                }
            };
            let from = SocketAddr::new(from, 1024 + (n % 60_000) as u16);
            // A full queue is waited for.
            while forger.send(from, to, n, PacketBuilderStep::syn).is_err() {
                thread::sleep(Duration::from_millis(1));
            }
        }
    };
    cluster.lab.ns("packets").unwrap().run(send);
}

/// P1, L3: a client that was heard after an answer keeps its backend, whoever knocks meanwhile.
fn affinity_under_a_flood(source: Source, xdp: &str) {
    const CLIENTS: u32 = 1024;
    let limits = format!("--max-affinity={CLIENTS}");
    let all = PODS.map(|(pod, _)| pod);
    let documents = |cluster: &Cluster, pods: &[&'static str]| {
        let flooded = cluster.documents("flooded", 2, AFFINITY, &ready(&all));
        [cluster.documents("web", 1, AFFINITY, &ready(pods)), flooded].concat()
    };
    let cluster = Cluster::start(source, xdp, &[&limits], |cluster| {
        documents(cluster, &all[..1])
    });
    let mut ways = Vec::new();
    for v6 in [false, true] {
        ways.push((cluster.client("packets"), cluster_ip(1, v6)));
        let node = SocketAddr::new(cluster.ip("node-a", v6), node_port(1));
        ways.push((cluster.client("client"), node));
    }
    for (client, to) in &ways {
        for proto in BOTH {
            let conn = client.open(proto, *to, &how(proto, *to)).unwrap();
            for text in ["first", "second"] {
                assert_eq!(conn.ask(text).unwrap().server, all[0], "{proto} {to}");
            }
        }
    }
    cluster.apply(&documents(&cluster, &all));
    for v6 in [false, true] {
        flood(&cluster, cluster_ip(2, v6), 8 * CLIENTS);
    }
    for (client, to) in &ways {
        for proto in BOTH {
            assert_eq!(
                one_server(client, proto, *to),
                all[0],
                "{proto} {to} from {}",
                client.name()
            );
        }
    }
}

#[test]
fn a_flood_changes_no_clients_backend_with_xdp() {
    affinity_under_a_flood(Source::Manifests, "native");
}

#[test]
fn a_flood_changes_no_clients_backend_without_xdp() {
    affinity_under_a_flood(Source::ApiServer, "off");
}
