//! What objects mean to kube-proxy's users: fields that are left out, addresses that several
//! endpoints have, families that a Service is not of, numbers as they are stored.

use super::*;

/// The same slices with these conditions instead of those.
fn with_conditions(documents: &[String], from: [bool; 3], to: &str) -> Vec<String> {
    let [ready, serving, terminating] = from;
    let from =
        format!("conditions: {{ ready: {ready}, serving: {serving}, terminating: {terminating} }}");
    documents
        .iter()
        .map(|text| text.replace(&from, &format!("conditions: {{ {to} }}")))
        .collect()
}

/// B3: what is left out of `serving` is true and of `terminating` false, so an endpoint that goes
/// is the last resort, one that is not ready is none for new flows, and an open UDP flow stays with
/// it.
pub(super) fn conditions_left_out(cluster: &Cluster) {
    cluster.apply(&cluster.documents("web", 1, "", &ready(&["web-b"])));
    let clients = cluster.clients();
    // A datagram's flow for each client, and one that stays open for as long as it gets answers.
    let mut open = Vec::new();
    for client in &clients {
        for v6 in [false, true] {
            let to = cluster_ip(1, v6);
            let dial = how(Proto::Udp, to);
            assert_eq!(client.once(Proto::Udp, to, &dial).unwrap().server, "web-b");
            // A socket that the hook has led away is done after one answer.
            if client.name() == "packets" || client.name() == "client" {
                open.push((client, to, dial));
            }
        }
    }
    let documents = |endpoints: &[Endpoint]| cluster.documents("web", 1, "", endpoints);
    let unready = documents(&[endpoint("web-b", NOT_READY), endpoint("web-a", READY)]);
    cluster.apply(&with_conditions(&unready, NOT_READY, "ready: false"));
    for (client, to, dial) in &open {
        let answer = client.once(Proto::Udp, *to, dial).unwrap();
        assert_eq!(
            answer.server,
            "web-b",
            "the flow of {} to {to} stays",
            client.name()
        );
    }
    each_case(|v6, proto| {
        for client in &clients {
            reaches(client, proto, cluster_ip(1, v6), &["web-a"]);
        }
    });
    // Nobody is ready.
    let leaving = documents(&[endpoint("web-b", TERMINATING), endpoint("web-a", NOT_READY)]);
    let leaving = with_conditions(&leaving, TERMINATING, "ready: false, terminating: true");
    cluster.apply(&with_conditions(&leaving, NOT_READY, "ready: false"));
    each_case(|v6, proto| {
        for client in &clients {
            reaches(client, proto, cluster_ip(1, v6), &["web-b"]);
            reaches(client, proto, load_balancer_ip(1, v6), &["web-b"]);
        }
    });
    cluster.apply(&with_conditions(
        &documents(&[endpoint("web-a", NOT_READY)]),
        NOT_READY,
        "ready: false",
    ));
    each_case(|v6, proto| {
        for client in &clients {
            is_refused(client, proto, cluster_ip(1, v6));
        }
    });
    // Neither `ready` nor anything else.
    cluster.apply(&with_conditions(&documents(&ready(&["web-a"])), READY, ""));
    each_case(|v6, proto| {
        for client in &clients {
            reaches(client, proto, cluster_ip(1, v6), &["web-a"]);
        }
    });
}

/// B8: a pod that hangs in termination on one node and its successor with the same address on
/// another: the successor counts, with its node, or its answers to a node port would not come back
/// this way.
pub(super) fn one_address_in_two_endpoints(cluster: &Cluster) {
    // In the order of names before and after.
    for old in ["a-old", "z-old"] {
        for (conditions, policy) in [
            (DEAD, ""),
            (NOT_READY, ""),
            (TERMINATING, "  externalTrafficPolicy: Local\n"),
        ] {
            let mut documents = cluster.documents("web", 1, policy, &ready(&["web-b"]));
            let twin = cluster.slices("web", &[endpoint("web-b", conditions)]);
            documents.extend(twin.iter().map(|text| {
                text.replace("name: web-", &format!("name: {old}-"))
                    .replace("nodeName: node-b", "nodeName: node-a")
            }));
            cluster.apply(&documents);
            each_case(|v6, proto| {
                let at_node = |node: &str| SocketAddr::new(cluster.ip(node, v6), node_port(1));
                for client in cluster.clients() {
                    reaches(&client, proto, cluster_ip(1, v6), &["web-b"]);
                    if policy.is_empty() {
                        reaches(&client, proto, at_node("node-a"), &["web-b"]);
                        reaches(&client, proto, load_balancer_ip(1, v6), &["web-b"]);
                    }
                }
                let outside = cluster.client("client");
                reaches(&outside, proto, at_node("node-b"), &["web-b"]);
                if !policy.is_empty() {
                    silence(&outside, proto, at_node("node-a"));
                }
            });
        }
    }
}

/// Addresses of a family that the Service is not of are left to their owner, and go to it again.
pub(super) fn addresses_of_another_family(cluster: &Cluster) {
    // The owner is a pod of node-b that has them all.
    let owner = cluster.lab.client("web-c", Sockets::Unhooked).unwrap();
    let owned = |v6| [load_balancer_ip(1, v6), external_ip(1, v6)];
    let device = cluster.lab.device("web-c").unwrap();
    let ip = |name: &str, line: String| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        cluster.lab.ns(name).unwrap().output("ip", &words).unwrap();
    };
    // `add` or `del`.
    let own = |verb: &str, v6| {
        let (family, bits) = if v6 { ("-6", 128) } else { ("-4", 32) };
        let nodad = if v6 && verb == "add" { "nodad" } else { "" };
        let [node, pod] = ["node-b", "web-c"].map(|name| cluster.ip(name, v6));
        for address in owned(v6) {
            let host = format!("{}/{bits}", address.ip());
            ip("web-c", format!("addr {verb} {host} dev lo {nodad}"));
            ip("node-a", format!("{family} route {verb} {host} via {node}"));
            let onlink = format!("{family} route {verb} {host} via {pod} dev {device} onlink");
            ip("node-b", onlink);
        }
    };
    [false, true].into_iter().for_each(|v6| own("add", v6));
    let listen: Vec<(Proto, SocketAddr)> = [false, true]
        .into_iter()
        .flat_map(owned)
        .flat_map(|address| BOTH.map(|proto| (proto, address)))
        .collect();
    owner.serve("owner", &listen).unwrap();
    let clients: Vec<Client> = ["hooked", "packets", "node-a"]
        .iter()
        .map(|name| cluster.client(name))
        .collect();
    for mine in [false, true] {
        let both = cluster.documents("web", 1, "", &ready(&["web-a"]));
        let single: Vec<String> = both
            .iter()
            .map(|text| {
                let (ip, family) = [("10.96.0.1", "IPv4"), ("fd96::1", "IPv6")][usize::from(mine)];
                text.replace(
                    "clusterIPs: [10.96.0.1, 'fd96::1']",
                    &format!("clusterIPs: ['{ip}']"),
                )
                .replace("clusterIP: 10.96.0.1\n", &format!("clusterIP: '{ip}'\n"))
                .replace(
                    "ipFamilies: [IPv4, IPv6]",
                    &format!("ipFamilies: [{family}]"),
                )
            })
            .collect();
        cluster.apply(&single);
        for client in &clients {
            for v6 in [false, true] {
                for proto in BOTH {
                    for to in owned(v6) {
                        reaches(
                            client,
                            proto,
                            to,
                            &[if v6 == mine { "web-a" } else { "owner" }],
                        );
                    }
                }
            }
        }
    }
    cluster.apply(&cluster.documents("web", 1, "", &ready(&["web-a"])));
    each_case(|v6, proto| {
        for client in &clients {
            for to in owned(v6) {
                reaches(client, proto, to, &["web-a"]);
            }
        }
    });
    [false, true].into_iter().for_each(|v6| own("del", v6));
}

/// Leading zeros are only zeros, and a load balancer's address may be link-local: what the API
/// server has stored is served.
pub(super) fn stored_numbers_and_link_local_balancers(cluster: &Cluster) {
    let odd = |text: &str| {
        let zeros = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().map(|octet| format!("{octet:03}")).join("."),
            IpAddr::V6(ip) => ip
                .segments()
                .map(|segment| format!("{segment:05x}"))
                .join(":"),
        };
        let mut text = text.to_owned();
        for v6 in [false, true] {
            let ip = cluster.ip("web-b", v6);
            text = text.replace(&format!("'{ip}'"), &format!("'{}'", zeros(ip)));
            for address in [cluster_ip(1, v6), external_ip(1, v6)].map(|address| address.ip()) {
                for (before, after) in [("[", ","), (", '", "'"), (": ", "\n")] {
                    let number = if before == ", '" || !v6 {
                        zeros(address)
                    } else {
                        format!("'{}'", zeros(address))
                    };
                    text = text.replace(
                        &format!("{before}{address}{after}"),
                        &format!("{before}{number}{after}"),
                    );
                }
            }
        }
        text.replace("ip: 198.51.100.1 }", "ip: 169.254.7.7 }")
    };
    let ranges = "  loadBalancerSourceRanges: [010.044.0.0/016, 'fd44::/048', 169.254.0.0/16]\n";
    let documents = cluster.documents("web", 1, ranges, &ready(&["web-b"]));
    let documents: Vec<String> = documents.iter().map(|text| odd(text)).collect();
    cluster.apply(&documents);
    let warning = "spec.clusterIPs[0]: \"010.096.000.001\" has leading zeros; write 10.96.0.1, as which it is served";
    for agent in &cluster.agents {
        agent.wait_for(warning, Duration::from_secs(5)).unwrap();
    }
    let link_local: SocketAddr = "169.254.7.7:80".parse().unwrap();
    each_case(|v6, proto| {
        for client in cluster.clients() {
            for to in [cluster_ip(1, v6), external_ip(1, v6)] {
                reaches(&client, proto, to, &["web-b"]);
            }
        }
        for name in ["hooked", "packets", "node-a"] {
            let to = if v6 {
                load_balancer_ip(1, true)
            } else {
                link_local
            };
            reaches(&cluster.client(name), proto, to, &["web-b"]);
        }
        silence(&cluster.client("client"), proto, load_balancer_ip(1, true));
    });
}
