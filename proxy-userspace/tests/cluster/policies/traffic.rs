//! `externalTrafficPolicy` and `internalTrafficPolicy`.

use super::*;

/// P2, at every hook: outside clients reach local backends only and are seen with their own
/// address, also those that serve while they terminate when no other is local; none local is
/// silence, none anywhere a refusal; clients inside get all.
fn external_policy_local(source: Source, xdp: &str) {
    const LOCAL: &str = "  externalTrafficPolicy: Local\n";
    let cluster = Cluster::start(source, xdp, &[], |cluster| {
        cluster.documents("web", 1, LOCAL, &ready(&["web-a", "web-b"]))
    });
    let outside = cluster.client("client");
    let inside = ["hooked", "packets", "node-a"].map(|name| cluster.client(name));
    let at_node = |node: &str, v6| SocketAddr::new(cluster.ip(node, v6), node_port(1));
    // All of these come in at node-a.
    let frontends = |v6| {
        [
            at_node("node-a", v6),
            load_balancer_ip(1, v6),
            external_ip(1, v6),
        ]
    };
    each_case(|v6, proto| {
        for to in frontends(v6) {
            reaches(&outside, proto, to, &["web-a"]);
            let seen = dial(&outside, proto, to).seen_peer.ip();
            assert_eq!(seen, cluster.ip("client", v6), "{proto} {to}");
            for client in &inside {
                reaches(client, proto, to, &["web-a", "web-b"]);
            }
        }
        let to = at_node("node-b", v6);
        reaches(&outside, proto, to, &["web-b"]);
        assert_eq!(
            dial(&outside, proto, to).seen_peer.ip(),
            cluster.ip("client", v6),
            "{proto} {to}"
        );
        // Who dials another node's port is an external client there, pods and the node's processes.
        for client in &inside {
            reaches(client, proto, to, &["web-b"]);
            assert_eq!(
                dial(client, proto, to).seen_peer.ip(),
                cluster.ip(client.name(), v6),
                "{proto} {to}"
            );
        }
        // The policy is the external one.
        for client in inside.iter().chain([&outside]) {
            reaches(client, proto, cluster_ip(1, v6), &["web-a", "web-b"]);
        }
    });

    cluster.apply(&cluster.documents(
        "web",
        1,
        LOCAL,
        &[
            endpoint("web-a", TERMINATING),
            endpoint("web-d", NOT_READY),
            endpoint("web-b", READY),
        ],
    ));
    each_case(|v6, proto| {
        for to in frontends(v6) {
            reaches(&outside, proto, to, &["web-a"]);
            for client in &inside {
                reaches(client, proto, to, &["web-b"]);
            }
        }
    });

    cluster.apply(&cluster.documents(
        "web",
        1,
        LOCAL,
        &[endpoint("web-a", DEAD), endpoint("web-b", READY)],
    ));
    each_case(|v6, proto| {
        for to in frontends(v6) {
            silence(&outside, proto, to);
            for client in &inside {
                reaches(client, proto, to, &["web-b"]);
            }
        }
        reaches(&outside, proto, at_node("node-b", v6), &["web-b"]);
    });

    // No endpoint on the other node: its port drops what is sent there, its load balancer and external addresses do not.
    cluster.apply(&cluster.documents("web", 1, LOCAL, &ready(&["web-a"])));
    each_case(|v6, proto| {
        for client in inside.iter().chain([&outside]) {
            silence(client, proto, at_node("node-b", v6));
        }
        for client in &inside {
            reaches(client, proto, external_ip(1, v6), &["web-a"]);
        }
    });

    cluster.apply(&cluster.documents("web", 1, LOCAL, &[endpoint("web-a", DEAD)]));
    each_case(|v6, proto| {
        // So that no neighbour must be found first.
        for to in frontends(v6) {
            for client in inside.iter().chain([&outside]) {
                is_refused(client, proto, to);
            }
        }
    });

    // The policy is changed while the Service stands.
    cluster.apply(&cluster.documents("web", 1, "", &ready(&["web-b"])));
    each_case(|v6, proto| {
        for to in frontends(v6) {
            reaches(&outside, proto, to, &["web-b"]);
        }
    });
}

#[test]
fn external_traffic_stays_local_with_xdp() {
    external_policy_local(Source::Manifests, "native");
}

#[test]
fn external_traffic_stays_local_without_xdp() {
    external_policy_local(Source::ApiServer, "off");
}

/// P3: clients inside reach backends of their node only, and are refused when it has none; other
/// frontends of the Service go by the other policy.
pub(super) fn internal_policy_local(cluster: &Cluster) {
    const LOCAL: &str = "  internalTrafficPolicy: Local\n";
    cluster.apply(&cluster.documents("web", 1, LOCAL, &ready(&["web-a", "web-b", "web-c"])));
    let clients = cluster.clients();
    let far = [Sockets::Hooked, Sockets::Unhooked]
        .map(|sockets| cluster.lab.client("web-d", sockets).unwrap());
    let other_node = [Sockets::Hooked, Sockets::Unhooked]
        .map(|sockets| cluster.lab.client("web-b", sockets).unwrap());
    each_case(|v6, proto| {
        for client in clients.iter().chain(&far) {
            reaches(client, proto, cluster_ip(1, v6), &["web-a"]);
            reaches(
                client,
                proto,
                load_balancer_ip(1, v6),
                &["web-a", "web-b", "web-c"],
            );
        }
        for client in &other_node {
            reaches(client, proto, cluster_ip(1, v6), &["web-b", "web-c"]);
        }
    });
    // As if it had no endpoints; one that serves while it terminates is one.
    cluster.apply(&cluster.documents(
        "web",
        1,
        LOCAL,
        &[endpoint("web-a", NOT_READY), endpoint("web-b", READY)],
    ));
    each_case(|v6, proto| {
        for client in &clients {
            is_refused(client, proto, cluster_ip(1, v6));
            reaches(client, proto, external_ip(1, v6), &["web-b"]);
        }
        reaches(&other_node[0], proto, cluster_ip(1, v6), &["web-b"]);
    });
    cluster.apply(&cluster.documents(
        "web",
        1,
        LOCAL,
        &[endpoint("web-a", TERMINATING), endpoint("web-b", READY)],
    ));
    each_case(|v6, proto| {
        for client in &clients {
            reaches(client, proto, cluster_ip(1, v6), &["web-a"]);
        }
    });
}

/// P7 with `masqueradeAll`: whoever dials, local and remote backends see the node's address; where
/// `externalTrafficPolicy: Local` keeps the client's, it is kept.
#[test]
fn all_sources_are_translated_when_asked_to() {
    let args = ["--masquerade-all"];
    let cluster = Cluster::start(Source::Manifests, "native", &args, |cluster| {
        let local = "  externalTrafficPolicy: Local\n";
        let mut all = cluster.documents("web", 1, "", &ready(&["web-a", "web-b"]));
        all.extend(cluster.documents("kept", 2, local, &ready(&["web-a"])));
        all
    });
    let outside = cluster.client("client");
    let inside = ["hooked", "packets"].map(|name| cluster.client(name));
    each_case(|v6, proto| {
        let node = cluster.ip("node-a", v6);
        let port = SocketAddr::new(node, node_port(1));
        for to in [cluster_ip(1, v6), port, load_balancer_ip(1, v6)] {
            for client in inside.iter().chain([&outside]) {
                reaches(client, proto, to, &["web-a", "web-b"]);
                for _ in 0..4 {
                    let seen = dial(client, proto, to).seen_peer.ip();
                    assert_eq!(seen, node, "{proto} {to} from {}", client.name());
                }
            }
        }
        let to = load_balancer_ip(2, v6);
        let seen = dial(&outside, proto, to).seen_peer.ip();
        assert_eq!(seen, cluster.ip("client", v6), "{proto} {to}");
    });
}
