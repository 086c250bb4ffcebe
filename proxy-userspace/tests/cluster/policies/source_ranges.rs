//! `loadBalancerSourceRanges`.

use super::*;

/// P5: sources outside of the ranges are dropped on the load balancer addresses, pods included, and
/// nowhere else; the node is let through; changes are followed.
fn source_ranges(source: Source, xdp: &str) {
    let cluster = Cluster::start(source, xdp, &[], |cluster| {
        cluster.documents("web", 1, "", &ready(&["web-a", "web-b"]))
    });
    let clients = cluster.clients();
    let ranges =
        |ranges: &[String]| format!("  loadBalancerSourceRanges: [{}]\n", ranges.join(", "));
    let ip = |name: &str, v6| format!("'{}/{}'", cluster.ip(name, v6), if v6 { 128 } else { 32 });
    let wide = |cidrs: [&str; 2]| cidrs.map(|cidr| format!("'{cidr}'")).to_vec();
    // Each step: the ranges, and who may dial the load balancer addresses, by family.
    let everyone = vec!["hooked", "packets", "node-a", "client"];
    let steps = [
        (
            wide(["203.0.113.0/24", "2001:db8:113::/64"]),
            [vec!["node-a", "client"], vec!["node-a", "client"]],
        ),
        (
            vec![ip("hooked", false), ip("packets", true)],
            [vec!["hooked", "node-a"], vec!["packets", "node-a"]],
        ),
        // Each family by itself, and everybody is everybody.
        (
            vec!["0.0.0.0/0".to_owned()],
            [everyone.clone(), everyone.clone()],
        ),
        (
            vec!["'::/0'".to_owned()],
            [everyone.clone(), everyone.clone()],
        ),
        (
            vec![ip("hooked", false)],
            [vec!["hooked", "node-a"], everyone.clone()],
        ),
        (
            vec![ip("packets", true)],
            [everyone.clone(), vec!["packets", "node-a"]],
        ),
        (
            wide(["10.44.0.0/16", "fd44::/48"]),
            [
                vec!["hooked", "packets", "node-a"],
                vec!["hooked", "packets", "node-a"],
            ],
        ),
        (Vec::new(), [everyone.clone(), everyone.clone()]),
    ];
    for (list, allowed) in steps {
        let spec = if list.is_empty() {
            String::new()
        } else {
            ranges(&list)
        };
        cluster.apply(&cluster.documents("web", 1, &spec, &ready(&["web-a", "web-b"])));
        for client in &clients {
            for v6 in [false, true] {
                for proto in BOTH {
                    let to = load_balancer_ip(1, v6);
                    if allowed[usize::from(v6)].contains(&client.name()) {
                        let answer = dial(client, proto, to);
                        assert_eq!(answer.peer, to, "{proto} from {}", client.name());
                    } else {
                        silence(client, proto, to);
                    }
                    let node_port = SocketAddr::new(cluster.ip("node-a", v6), node_port(1));
                    for to in [cluster_ip(1, v6), external_ip(1, v6), node_port] {
                        dial(client, proto, to);
                    }
                }
            }
        }
    }
    let denied: u64 = cluster
        .agents
        .iter()
        .map(|agent| event(agent, "source_denied"))
        .sum();
    assert!(denied > 0, "drops are counted");
}

fn event(agent: &Agent, name: &str) -> u64 {
    let status = agent.json(&["status"]).unwrap();
    status["events"][name].as_u64().unwrap()
}

#[test]
fn source_ranges_are_enforced_with_xdp() {
    source_ranges(Source::Manifests, "native");
}

#[test]
fn source_ranges_are_enforced_without_xdp() {
    source_ranges(Source::ApiServer, "off");
}
