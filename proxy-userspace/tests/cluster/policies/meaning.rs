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
#[test]
fn conditions_left_out_mean_what_the_api_says() {
    let cluster = Cluster::start_with("native", &[], |cluster| {
        cluster.documents("web", 1, "", &ready(&["web-b"]))
    });
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
#[test]
fn one_address_in_two_endpoints_is_where_it_serves() {
    let cluster = Cluster::start_with("native", &CLUSTER_CIDRS, |_| Vec::new());
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
#[test]
fn addresses_of_another_family_are_left_to_their_owner() {
    let cluster = Cluster::start_with("native", &CLUSTER_CIDRS, |_| Vec::new());
    // The owner is a pod of node-b that has them all.
    let owner = cluster.lab.client("web-c", Sockets::Unhooked).unwrap();
    let owned = |v6| [load_balancer_ip(1, v6), external_ip(1, v6)];
    let device = cluster.lab.device("web-c").unwrap();
    for v6 in [false, true] {
        let family = if v6 { "-6" } else { "-4" };
        for address in owned(v6) {
            let host = format!("{}/{}", address.ip(), if v6 { 128 } else { 32 });
            let run = |name: &str, line: String| {
                let words: Vec<&str> = line.split(' ').collect();
                cluster.lab.ns(name).unwrap().output("ip", &words).unwrap();
            };
            let nodad = if v6 { " nodad" } else { "" };
            run("web-c", format!("addr add {host} dev lo{nodad}"));
            run(
                "node-a",
                format!("{family} route add {host} via {}", cluster.ip("node-b", v6)),
            );
            run(
                "node-b",
                format!(
                    "{family} route add {host} via {} dev {device} onlink",
                    cluster.ip("web-c", v6)
                ),
            );
        }
    }
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
}

/// Leading zeros are only zeros, and a load balancer's address may be link-local: what the API
/// server has stored is served.
#[test]
fn stored_numbers_and_link_local_balancers_are_served() {
    let odd = |cluster: &Cluster, text: &str| {
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
    let cluster = Cluster::start_with("native", &CLUSTER_CIDRS, |cluster| {
        let documents = cluster.documents("web", 1, ranges, &ready(&["web-b"]));
        documents.iter().map(|text| odd(cluster, text)).collect()
    });
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

/// L9: two Services swap their addresses, and one is renamed and keeps all of its own, while
/// clients dial without a pause: every dial is answered by one or the other, whichever name comes
/// first.
#[test]
fn frontends_change_their_service_while_they_are_dialled() {
    let cluster = Cluster::start_with("native", &CLUSTER_CIDRS, |_| Vec::new());
    let external = |number: u8| {
        format!("externalIPs: [198.51.100.1{number:02}, '2001:db8:198::1{number:02}']")
    };
    let state = |first: &str, swapped: bool| {
        let mut documents = cluster.documents(first, 1, "", &ready(&["web-a"]));
        let mut others = cluster.documents("mm", 2, "", &ready(&["web-b"]));
        if swapped {
            documents[0] = documents[0].replace(&external(1), &external(2));
            others[0] = others[0].replace(&external(2), &external(1));
        }
        [documents, others].concat()
    };
    cluster.apply(&state("aa", false));
    let done = std::sync::atomic::AtomicBool::new(false);
    let swapping = |v6| [external_ip(1, v6), external_ip(2, v6)];
    let renamed = |v6| {
        [
            cluster_ip(1, v6),
            load_balancer_ip(1, v6),
            SocketAddr::new(cluster.ip("node-a", v6), node_port(1)),
        ]
    };
    thread::scope(|scope| {
        let mut dialling = Vec::new();
        for name in CLIENTS {
            for v6 in [false, true] {
                let (client, done) = (cluster.client(name), &done);
                dialling.push(scope.spawn(move || {
                    let mut dials = 0;
                    while !done.load(Ordering::Relaxed) {
                        for to in swapping(v6).into_iter().chain(renamed(v6)) {
                            for proto in BOTH {
                                dial(&client, proto, to);
                                dials += 1;
                            }
                        }
                    }
                    dials
                }));
            }
        }
        // The taker sorts first, then the giver.
        for (first, swapped) in [
            ("aa", true),
            ("aa", false),
            ("zy", false),
            ("zy", true),
            ("aa", true),
            ("ab", false),
            ("zy", true),
            ("aa", false),
        ] {
            cluster.apply(&state(first, swapped));
        }
        done.store(true, Ordering::Relaxed);
        for client in dialling {
            assert!(client.join().unwrap() > 20);
        }
    });
    for agent in &cluster.agents {
        assert!(
            !agent.output().contains("already belongs"),
            "{}",
            agent.output()
        );
    }
}
