//! Services in a cluster of namespaces: real clients, real servers, an agent per node. Rows of the specification are
//! named at each check. Needs root.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use shunt::datapath::maps::Maps;
use shunt_common::layout::LAYOUT_VERSION;
use shunt_lab::{Agent, AgentOptions, Answer, Client, Cni, Dial, DialError, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

const BOTH: [Proto; 2] = [Proto::Tcp, Proto::Udp];
const APP: u16 = 8080;
const NODE_PORT: u16 = 30080;

/// Two nodes with an agent each, and the manifests they follow.
struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    manifests: TempDir,
}

impl Cluster {
    /// Pods `web-a`, `web-b` behind Service `web`, `solo` alone behind `solo`, nobody behind `empty`.
    fn start(xdp: &str, extra: &[&str]) -> Self {
        Self::start_in(Lab::new().unwrap(), xdp, extra)
    }

    fn start_in(lab: Lab, xdp: &str, extra: &[&str]) -> Self {
        let ports = [Port::tcp(APP), Port::udp(APP)];
        for (pod, node) in [
            ("web-a", "node-a"),
            ("web-b", "node-b"),
            ("web-c", "node-b"),
            ("solo", "node-a"),
        ] {
            lab.add_pod(&PodSpec::new(pod, node, &ports)).unwrap();
        }
        for pod in ["hooked", "packets"] {
            lab.add_pod(&PodSpec::new(pod, "node-a", &[])).unwrap();
        }
        let manifests = TempDir::new().unwrap();
        let mut cluster = Self {
            agents: Vec::new(),
            lab,
            manifests,
        };
        cluster.serve(&["web-a", "web-b"]);
        cluster.write(
            "solo.yaml",
            &[service("solo", 2, ""), cluster.pod("solo", "solo", "node-a")],
        );
        cluster.write("empty.yaml", &[service("empty", 3, "  type: NodePort\n")]);
        let options = AgentOptions::manifests(cluster.manifests.path())
            .xdp(xdp)
            .args(extra)
            .shunt(env!("CARGO_BIN_EXE_shunt"));
        for node in ["node-a", "node-b"] {
            let agent = cluster.lab.start_agent(node, &options).unwrap();
            cluster.agents.push(agent);
        }
        cluster
    }

    fn write(&self, file: &str, documents: &[String]) {
        let path = self.manifests.path().join(file);
        let hidden = path.with_extension("new");
        fs::write(&hidden, documents.join("---\n")).unwrap();
        fs::rename(hidden, path).unwrap();
    }

    /// Puts pods behind `web`.
    fn serve(&self, pods: &[&str]) {
        let extra = "  type: LoadBalancer\n  externalIPs: [198.51.100.2, '2001:db8:198::2']\n";
        let status = "status: { loadBalancer: { ingress: [{ ip: 198.51.100.1 }, { ip: '2001:db8:198::1' }] } }\n";
        let mut documents = vec![service("web", 1, extra) + status];
        for pod in pods {
            let node = if *pod == "web-a" { "node-a" } else { "node-b" };
            documents.push(self.pod(pod, "web", node));
        }
        self.write("web.yaml", &documents);
    }

    fn pod(&self, name: &str, app: &str, node: &str) -> String {
        let ips = self.lab.ips(name).unwrap();
        let list: Vec<_> = ips.iter().map(|ip| format!("{{ ip: '{ip}' }}")).collect();
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, labels: {{ app: {app} }} }}\n\
             spec: {{ nodeName: {node}, containers: [{{ name: app, ports: [{{ name: app, containerPort: {APP} }}] }}] }}\n\
             status: {{ podIP: '{}', podIPs: [{}], conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
            ips[0],
            list.join(", "),
        )
    }

    fn client(&self, name: &str) -> Client {
        let sockets = if ["hooked", "node-a"].contains(&name) {
            Sockets::Hooked
        } else {
            Sockets::Unhooked
        };
        self.lab.client(name, sockets).unwrap()
    }

    fn ip(&self, name: &str, v6: bool) -> IpAddr {
        self.lab
            .ips(name)
            .unwrap()
            .into_iter()
            .find(|ip| ip.is_ipv6() == v6)
            .unwrap()
    }

    fn node_ip(&self, node: &str, v6: bool) -> IpAddr {
        self.lab.node_ips(node).unwrap()[usize::from(v6)]
    }

    /// Waits until both agents' maps lead to so many backends for a frontend of `web`.
    fn wait_for_backends(&self, count: usize) {
        let began = Instant::now();
        loop {
            let all = self.agents.iter().all(|agent| {
                let rows = agent.json(&["services"]).unwrap();
                let row = rows
                    .as_array()
                    .unwrap()
                    .iter()
                    .find(|row| row["address"] == "10.96.0.1")
                    .cloned();
                row.is_some_and(|row| row["internal"]["backends"] == count)
            });
            if all {
                return;
            }
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "no agent came to {count} backends"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Flows by hook over all backends and agents: socket, tc, XDP.
    fn flows(&self) -> [u64; 3] {
        let mut sum = [0; 3];
        for agent in &self.agents {
            for row in agent.json(&["backends"]).unwrap().as_array().unwrap() {
                for (sum, hook) in sum.iter_mut().zip(["socket", "tc", "xdp"]) {
                    *sum += row["flows"][hook].as_u64().unwrap();
                }
            }
        }
        sum
    }
}

/// A dual-stack Service with one port number on TCP and UDP (F8).
fn service(name: &str, number: u8, extra: &str) -> String {
    let node_port = if extra.contains("type:") {
        format!(", nodePort: {}", NODE_PORT + u16::from(number) - 1)
    } else {
        String::new()
    };
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec:\n{extra}  clusterIP: 10.96.0.{number}\n  \
         clusterIPs: [10.96.0.{number}, 'fd96::{number}']\n  ipFamilies: [IPv4, IPv6]\n  selector: {{ app: {name} }}\n  ports:\n  \
         - {{ name: t, protocol: TCP, port: 80, targetPort: app{node_port} }}\n  \
         - {{ name: u, protocol: UDP, port: 80, targetPort: {APP}{node_port} }}\n"
    )
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

fn dial(client: &Client, proto: Proto, to: SocketAddr) -> Answer {
    match client.once(proto, to, &Dial::default()) {
        Ok(answer) => answer,
        Err(error) => panic!("{proto} {to} from {}: {error}", client.name()),
    }
}

/// Dials until every server has answered, and checks each answer.
fn every_backend(client: &Client, proto: Proto, to: SocketAddr, servers: &[&str], check: impl Fn(&Answer)) {
    let mut seen = BTreeSet::new();
    for _ in 0..64 {
        let answer = dial(client, proto, to);
        assert_eq!(
            answer.peer,
            to,
            "{proto} {to} from {}: peer is not what was dialled",
            client.name()
        );
        check(&answer);
        seen.insert(answer.server);
        if seen.len() == servers.len() {
            break;
        }
    }
    assert_eq!(
        seen,
        servers.iter().map(|&s| s.to_owned()).collect(),
        "{proto} {to} from {}",
        client.name()
    );
}

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
            vec![at("fd96::1", 80), at("2001:db8:198::1", 80), at("2001:db8:198::2", 80)]
        } else {
            vec![at("10.96.0.1", 80), at("198.51.100.1", 80), at("198.51.100.2", 80)]
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
                        // P7: an outside client comes in at node-a, and is translated towards node-b only.
                        if name == "client" && answer.server == "web-b" {
                            assert_eq!(seen, node_a, "{proto} {to}");
                        } else if name != "node-a" {
                            assert!(own.contains(&seen), "{proto} {to} from {name} is seen as {seen}");
                        }
                    });
                }
                // F2, on the own node and on the other.
                every_backend(&client, proto, SocketAddr::new(node_a, NODE_PORT), &web, |_| ());
                every_backend(&client, proto, SocketAddr::new(node_b, NODE_PORT), &web, |answer| {
                    let seen = answer.seen_peer.ip();
                    match answer.server.as_str() {
                        "web-a" if name != "node-a" => assert_eq!(seen, node_b, "{proto} from {name}"),
                        "web-b" if name != "node-a" => assert!(own.contains(&seen), "{proto} from {name}: {seen}"),
                        _ => {}
                    }
                });
                if name == "node-a" {
                    every_backend(&client, proto, SocketAddr::new(loopback, NODE_PORT), &web, |_| ());
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
        xdp == "native",
        "XDP translated {xdp_flows} flows with --xdp {xdp}"
    );
}

#[test]
fn frontends_are_reached_from_everywhere_with_xdp() {
    frontends(Lab::new().unwrap(), "native");
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
        Lab::builder().strict_rp_filter().checksum_offload().build().unwrap(),
        "off",
    );
}

/// `--fast-path on`, with routed and bridged pods, strict filters and offloads: everything is reached as without it, ...
#[test]
fn frontends_are_reached_by_the_fast_path() {
    let strict = Lab::builder().strict_rp_filter().checksum_offload();
    for lab in [strict, Lab::builder().cni(Cni::Bridge)] {
        frontends_with(lab.build().unwrap(), "off", &["--fast-path", "on"]);
    }
}

/// ... and packets between pods, or a pod and the network, do not meet the node's own stack on their way.
#[test]
fn the_fast_path_leaves_the_nodes_stack_out() {
    for on in [false, true] {
        let cluster = Cluster::start("off", &["--fast-path", if on { "on" } else { "off" }]);
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
                    for _ in 0..10 {
                        dial(&client, proto, to);
                    }
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
                // P8: the second half of the translation is done although the pod's own device is left out.
                let to = at(if v6 { "fd96::2" } else { "10.96.0.2" }, 80);
                let answer = dial(&cluster.lab.client("solo", Sockets::Unhooked).unwrap(), proto, to);
                assert_eq!((answer.server.as_str(), answer.peer), ("solo", to), "{proto}");
            }
        }
    }
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

/// L2: a full conntrack refuses nobody, and a live flow that was evicted finds its backend and its source port again.
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
                        // In a cluster of namespaces the ICMPv6 error is back before `connect` lets go of its socket, and
                        // Linux then keeps it until the first retransmission, a second later (IPv4 does not).
                        let limit = if v6 && proto == Proto::Tcp { 1500 } else { 500 };
                        let quick = error.after().is_some_and(|after| after < Duration::from_millis(limit));
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
        let counts = cluster.client(name).tcp_many(at("10.96.0.1", 80), 2000).unwrap();
        let chi: f64 = counts.values().map(|&n| (n as f64 - 1000.0).powi(2) / 1000.0).sum();
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
        ("client", SocketAddr::new(cluster.node_ip("node-a", false), NODE_PORT)),
        ("client", SocketAddr::new(cluster.node_ip("node-a", true), NODE_PORT)),
    ];
    let clients: Vec<Client> = frontends.iter().map(|(name, _)| cluster.client(name)).collect();
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
            // B7 lets a UDP flow leave a backend that is gone; TCP stays, for the pod still answers.
            if *proto == Proto::Tcp || pods.contains(&server.as_str()) {
                let answer = conn
                    .ask("again")
                    .unwrap_or_else(|error| panic!("{to} from {}: {error}", client.name()));
                if *proto == Proto::Tcp {
                    assert_eq!(&answer.server, server, "{proto} {to} from {}", client.name());
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

/// L4: no agent, no difference; a new one, none either.
#[test]
fn the_datapath_outlives_its_agents() {
    let mut cluster = Cluster::start("native", &[]);
    let to = [
        at("10.96.0.1", 80),
        at("fd96::1", 80),
        SocketAddr::new(cluster.node_ip("node-a", false), NODE_PORT),
    ];
    let clients = ["hooked", "packets", "client"].map(|name| cluster.client(name));
    let open: Vec<_> = clients
        .iter()
        .flat_map(|client| to.map(|to| client.open_tcp(to).unwrap()))
        .collect();
    let links = |cluster: &Cluster| -> BTreeSet<String> {
        let path = cluster.lab.bpf_root("node-a").join(format!("v{LAYOUT_VERSION}/links"));
        fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    let before = links(&cluster);
    let all_answer = || {
        for client in &clients {
            for to in to {
                for proto in BOTH {
                    dial(client, proto, to);
                }
            }
        }
        for conn in &open {
            conn.ask("still there").unwrap();
        }
    };
    all_answer();
    for agent in &mut cluster.agents {
        agent.kill().unwrap();
    }
    all_answer();
    for agent in &mut cluster.agents {
        agent.restart().unwrap();
    }
    all_answer();
    for agent in &mut cluster.agents {
        agent.stop().unwrap();
    }
    all_answer();
    assert_eq!(links(&cluster), before);
}

/// Update and delete: a frontend that is gone is nobody's, and comes back.
#[test]
fn services_change_and_go() {
    let cluster = Cluster::start("native", &[]);
    let client = cluster.client("packets");
    let to = at("10.96.0.2", 80);
    dial(&client, Proto::Tcp, to);
    fs::remove_file(cluster.manifests.path().join("solo.yaml")).unwrap();
    let short = Dial::within(Duration::from_millis(300));
    let gone = |error: &DialError| error.is_timeout() || error.is_refused() || !error.to_string().is_empty();
    wait_until("the Service is gone", || {
        client.once(Proto::Tcp, to, &short).as_ref().is_err_and(gone)
    });
    cluster.write(
        "solo.yaml",
        &[
            service("solo", 2, "").replace("port: 80", "port: 81"),
            cluster.pod("solo", "solo", "node-a"),
        ],
    );
    wait_until("the port has moved", || {
        client.once(Proto::Tcp, at("10.96.0.2", 81), &short).is_ok()
    });
    assert!(client.once(Proto::Tcp, to, &short).is_err());
    // Bad input: one clear message, and what was goes on.
    cluster.write("solo.yaml", &["kind: Service\nspec: [\n".to_owned()]);
    cluster.agents[0].wait_for("solo.yaml", Duration::from_secs(5)).unwrap();
    dial(&client, Proto::Tcp, at("10.96.0.2", 81));
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
            [at("fd96::1", 80), at("2001:db8:198::1", 80), at("2001:db8:198::2", 80)]
        } else {
            [at("10.96.0.1", 80), at("198.51.100.1", 80), at("198.51.100.2", 80)]
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

/// A hand-written slice of one Service.
fn slice(name: &str, service: &str, endpoints: &[String]) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{ name: {name}, labels: {{ kubernetes.io/service-name: {service} }} }}\n\
         addressType: IPv4\nports: [{{ name: t, port: {APP}, protocol: TCP }}, {{ name: u, port: {APP}, protocol: UDP }}]\n\
         endpoints: [{}]\n",
        endpoints.join(", ")
    )
}

/// B1, B2, B3, B4, B6, F3 and F7: who is a backend, and who is a frontend at all.
#[test]
fn only_eligible_endpoints_are_reached() {
    let cluster = Cluster::start("native", &[]);
    let [a, b, c] = ["web-a", "web-b", "web-c"].map(|pod| cluster.ip(pod, false));
    let endpoint = |ip: IpAddr, conditions: &str| format!("{{ addresses: ['{ip}'], conditions: {{ {conditions} }} }}");
    let bare =
        |name: &str, number: u8| service(name, number, "").replace(&format!("  selector: {{ app: {name} }}\n"), "");
    let ready = "ready: true";
    let leaving = "ready: false, serving: true, terminating: true";
    let labelled = bare("foreign", 15).replace(
        "name: foreign",
        "name: foreign, labels: { service.kubernetes.io/service-proxy-name: other }",
    );
    let forbidden: IpAddr = "127.0.0.1".parse().unwrap();
    cluster.write("rows.yaml", &[
        bare("union", 10),
        slice("union-1", "union", &[endpoint(a, ""), endpoint(b, ready)]),
        slice("union-2", "union", &[endpoint(b, ready), endpoint(c, ready)]),
        bare("some", 11),
        slice("some-1", "some", &[endpoint(a, ready), endpoint(b, "ready: false"), endpoint(c, leaving)]),
        bare("last", 12),
        slice("last-1", "last", &[endpoint(b, "ready: false"), endpoint(c, leaving)]),
        bare("hand", 13),
        format!(
            "apiVersion: v1\nkind: Endpoints\nmetadata: {{ name: hand }}\nsubsets: [{{ addresses: [{{ ip: '{b}' }}], \
             ports: [{{ name: t, port: {APP} }}, {{ name: u, port: {APP}, protocol: UDP }}] }}]\n"
        ),
        bare("odd", 14),
        slice("odd-1", "odd", &[endpoint(forbidden, ready), endpoint(c, ready)]),
        labelled,
        slice("foreign-1", "foreign", &[endpoint(a, ready)]),
        bare("early", 16).replace("spec:\n", "spec:\n  publishNotReadyAddresses: true\n"),
        slice("early-1", "early", &[endpoint(b, "ready: false")]),
        service("proxied", 17, "  type: LoadBalancer\n")
            + "status: { loadBalancer: { ingress: [{ ip: 198.51.100.17, ipMode: Proxy }] } }\n",
    ]);
    cluster.agents[0].wait_for("odd-1", Duration::from_secs(5)).unwrap();
    let rows: [(u8, &[&str]); 6] = [
        (10, &["web-a", "web-b", "web-c"]),
        (11, &["web-a"]),
        (12, &["web-c"]),
        (13, &["web-b"]),
        (14, &["web-c"]),
        (16, &["web-b"]),
    ];
    let short = Dial {
        connected: true,
        ..Dial::within(Duration::from_millis(500))
    };
    for name in ["hooked", "packets", "client"] {
        let client = cluster.client(name);
        wait_until("the rows are served", || {
            client.once(Proto::Tcp, at("10.96.0.16", 80), &short).is_ok()
        });
        for proto in BOTH {
            for (number, servers) in rows {
                every_backend(&client, proto, at(&format!("10.96.0.{number}"), 80), servers, |_| ());
            }
            for nobodys in ["10.96.0.15", "198.51.100.17"] {
                assert!(
                    client.once(proto, at(nobodys, 80), &short).is_err(),
                    "{proto} {nobodys} from {name}"
                );
            }
        }
    }
}

/// A4: everything is pinned, named, and printed with field names by `bpftool`.
/// What connected sockets dialled is remembered while they are open, and not longer; when there is no room for it, they
/// connect all the same.
#[test]
fn connected_sockets_are_remembered_until_they_close() {
    let cluster = Cluster::start("off", &["--max-sockets", "16"]);
    let maps = Maps::open(cluster.agents[0].bpf_root()).unwrap();
    let client = cluster.client("hooked");
    let dial = Dial {
        connected: true,
        ..Dial::default()
    };
    for proto in BOTH {
        for frontend in ["10.96.0.1", "fd96::1"] {
            let to = at(frontend, 80);
            let open: Vec<_> = (0..5).map(|_| client.open(proto, to, &dial).unwrap()).collect();
            for conn in &open {
                conn.ask("who").unwrap();
                assert_eq!(conn.peer, to);
            }
            assert_eq!(maps.sockets.count(|peer| peer.frontend_port == 80).unwrap(), 5);
            drop(open);
            wait_until("closed sockets are forgotten", || {
                maps.sockets.count(|_| true).unwrap() == 0
            });
        }
    }
    let open: Vec<_> = (0..20).map(|_| client.open_tcp(at("10.96.0.1", 80)).unwrap()).collect();
    assert_eq!(maps.sockets.count(|_| true).unwrap(), 16);
    let status = cluster.agents[0].json(&["status"]).unwrap();
    assert_eq!(status["events"]["sockets_full"], 4, "{status}");
    drop(open);
}

#[test]
fn bpftool_reads_the_maps() {
    let cluster = Cluster::start("native", &[]);
    let root = cluster.lab.bpf_root("node-a").join(format!("v{LAYOUT_VERSION}"));
    let bpftool = |args: &[&str], path: &Path| -> serde_json::Value {
        let output = std::process::Command::new("bpftool")
            .args(["-j"])
            .args(args)
            .arg(path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    for entry in fs::read_dir(root.join("maps")).unwrap() {
        let path = entry.unwrap().path();
        let map = bpftool(&["map", "show", "pinned"], &path);
        assert_eq!(map["name"].as_str(), path.file_name().unwrap().to_str(), "{map}");
        assert!(map["btf_id"].as_u64().is_some_and(|id| id > 0), "{map} has no BTF");
    }
    for entry in fs::read_dir(root.join("progs")).unwrap() {
        let path = entry.unwrap().path();
        let program = bpftool(&["prog", "show", "pinned"], &path);
        assert!(
            program["btf_id"].as_u64().is_some_and(|id| id > 0),
            "{program} has no BTF"
        );
    }
    let dump = bpftool(&["map", "dump", "pinned"], &root.join("maps/frontends4"));
    let found = dump.as_array().unwrap().iter().any(|entry| {
        let key = &entry["formatted"]["key"];
        key["addr"] == serde_json::json!([10, 96, 0, 1]) && key["port"] == 80 && key["proto"] == 6
    });
    assert!(found, "no 10.96.0.1:80 in {dump}");
}

/// A6: `cleanup` removes everything, and only then do Services end.
#[test]
fn cleanup_leaves_nothing() {
    let mut cluster = Cluster::start("native", &[]);
    let client = cluster.client("hooked");
    let root = cluster.lab.bpf_root("node-a");
    let refused = cluster.agents[0].cli(&["cleanup"]).unwrap();
    assert!(!refused.status.success(), "cleanup beside a running agent");
    cluster.agents[0].stop().unwrap();
    dial(&client, Proto::Tcp, at("10.96.0.1", 80));
    assert!(cluster.agents[0].cli(&["cleanup"]).unwrap().status.success());
    assert!(is_empty(&root), "{} is not empty", root.display());
    let short = Dial::within(Duration::from_millis(300));
    assert!(client.once(Proto::Tcp, at("10.96.0.1", 80), &short).is_err());
}

fn is_empty(path: &Path) -> bool {
    fs::read_dir(path).map_or(true, |mut entries| entries.next().is_none())
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(10), "timed out: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
