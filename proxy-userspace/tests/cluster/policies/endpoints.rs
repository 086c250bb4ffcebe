//! Which endpoints are eligible, and which are near.

use super::*;

/// B3 and B4: only ready endpoints get new flows; when none is, those that serve while they
/// terminate; then nobody. `publishNotReadyAddresses` makes all of them ready.
pub(super) fn conditions(cluster: &Cluster) {
    let clients = cluster.clients();
    let frontends = |v6| {
        [
            cluster_ip(1, v6),
            load_balancer_ip(1, v6),
            SocketAddr::new(cluster.ip("node-a", v6), node_port(1)),
        ]
    };
    let expect = |wanted: &[&str]| {
        each_case(|v6, proto| {
            for client in &clients {
                for to in frontends(v6) {
                    match wanted {
                        [] => is_refused(client, proto, to),
                        wanted => reaches(client, proto, to, wanted),
                    }
                }
            }
        });
    };
    let one_ready = [
        endpoint("web-a", TERMINATING),
        endpoint("web-b", READY),
        endpoint("web-c", NOT_READY),
        endpoint("web-d", DEAD),
    ];
    cluster.apply(&cluster.documents("web", 1, "", &one_ready));
    expect(&["web-b"]);
    let none_ready = [
        endpoint("web-a", TERMINATING),
        endpoint("web-b", TERMINATING),
        endpoint("web-c", NOT_READY),
        endpoint("web-d", DEAD),
    ];
    cluster.apply(&cluster.documents("web", 1, "", &none_ready));
    expect(&["web-a", "web-b"]);
    let none_serving = [endpoint("web-c", NOT_READY), endpoint("web-d", DEAD)];
    cluster.apply(&cluster.documents("web", 1, "", &none_serving));
    expect(&[]);
    cluster.apply(&cluster.documents(
        "web",
        1,
        "  publishNotReadyAddresses: true\n",
        &none_serving,
    ));
    expect(&["web-c", "web-d"]);
    cluster.apply(&cluster.documents("web", 1, "", &ready(&["web-a"])));
    expect(&["web-a"]);
}

/// B5: hints keep new flows of clients inside in their zone or on their node, when all endpoints
/// have them and some are for this node; clients outside likewise, through whichever node of the
/// zone they come.
pub(super) fn hints(cluster: &Cluster) {
    const EAST: &str = ", hints: { forZones: [{ name: east }] }";
    const WEST: &str = ", hints: { forZones: [{ name: west }] }";
    const NODE_A: &str = ", hints: { forNodes: [{ name: node-a }], forZones: [{ name: east }] }";
    const NODE_B: &str = ", hints: { forNodes: [{ name: node-b }], forZones: [{ name: west }] }";
    let hinted = |pairs: &[(&'static str, &'static str)]| -> Vec<Endpoint> {
        pairs
            .iter()
            .map(|&(pod, more)| Endpoint {
                more,
                ..endpoint(pod, READY)
            })
            .collect()
    };
    let inside = ["hooked", "packets", "node-a"].map(|name| cluster.client(name));
    let other_node = [Sockets::Hooked, Sockets::Unhooked]
        .map(|sockets| cluster.lab.client("web-b", sockets).unwrap());
    let outside = cluster.client("client");
    let expect = |endpoints: &[(&'static str, &'static str)], on_a: &[&str], on_b: &[&str]| {
        cluster.apply(&cluster.documents("web", 1, "", &hinted(endpoints)));
        each_case(|v6, proto| {
            for client in &inside {
                for to in [cluster_ip(1, v6), external_ip(1, v6)] {
                    reaches(client, proto, to, on_a);
                }
            }
            for client in &other_node {
                reaches(client, proto, cluster_ip(1, v6), on_b);
            }
            // These come in at node-a, its node ports where they are dialled.
            let at_node = |node: &str| SocketAddr::new(cluster.ip(node, v6), node_port(1));
            for to in [
                cluster_ip(1, v6),
                external_ip(1, v6),
                load_balancer_ip(1, v6),
                at_node("node-a"),
            ] {
                reaches(&outside, proto, to, on_a);
            }
            reaches(&outside, proto, at_node("node-b"), on_b);
        });
    };
    // A hint is not a place: web-c runs on node-b, and is for the other zone.
    expect(
        &[("web-a", EAST), ("web-b", WEST), ("web-c", EAST)],
        &["web-a", "web-c"],
        &["web-b"],
    );
    // One without: hints are not to be trusted.
    let all = ["web-a", "web-b", "web-c"];
    expect(
        &[("web-a", EAST), ("web-b", WEST), ("web-c", "")],
        &all,
        &all,
    );
    // None for the west.
    expect(
        &[("web-a", EAST), ("web-c", EAST)],
        &["web-a", "web-c"],
        &["web-a", "web-c"],
    );
    expect(
        &[("web-a", NODE_A), ("web-b", NODE_B), ("web-d", EAST)],
        &["web-a", "web-d"],
        &["web-b"],
    );
    expect(
        &[("web-a", NODE_A), ("web-b", NODE_B), ("web-c", NODE_A)],
        &["web-a", "web-c"],
        &["web-b"],
    );
}

/// B5 without an EndpointSlice controller: `trafficDistribution` over the manifests' own Pods and
/// Nodes.
#[test]
fn traffic_distribution_keeps_flows_near() {
    let cluster = Cluster::start(Source::Manifests, "native", &[], |_| Vec::new());
    let inside = ["hooked", "packets", "node-a"].map(|name| cluster.client(name));
    let pods: Vec<String> = PODS
        .iter()
        .map(|(pod, node)| {
            let ips = cluster.lab.ips(pod).unwrap();
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {pod}, labels: {{ app: web }} }}\n\
                 spec: {{ nodeName: {node}, containers: [{{ name: app }}] }}\n\
                 status: {{ podIP: '{}', podIPs: [{{ ip: '{}' }}, {{ ip: '{}' }}], \
                 conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
                ips[0], ips[0], ips[1]
            )
        })
        .collect();
    let all = ["web-a", "web-b", "web-c", "web-d"];
    for (distribution, wanted) in [
        ("Nearby", &all[..]),
        ("PreferClose", &["web-a", "web-d"]),
        ("PreferSameZone", &["web-a", "web-d"]),
        ("''", &all),
        ("PreferSameNode", &["web-a", "web-d"]),
    ] {
        let spec = format!("  trafficDistribution: {distribution}\n  selector: {{ app: web }}\n");
        let text = service("web", 1, &spec).replace(
            "protocol: TCP, port: 80",
            "protocol: TCP, port: 80, targetPort: 8080",
        );
        let text = text.replace(
            "protocol: UDP, port: 80",
            "protocol: UDP, port: 80, targetPort: 8080",
        );
        cluster.apply(&[pods.clone(), vec![text]].concat());
        each_case(|v6, proto| {
            for client in &inside {
                reaches(client, proto, cluster_ip(1, v6), wanted);
            }
        });
    }
    let warning = "Service default/web: spec.trafficDistribution: \"Nearby\" is no distribution";
    cluster.agents[0]
        .wait_for(warning, Duration::from_secs(5))
        .unwrap();
}
