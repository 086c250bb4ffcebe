//! Policies in a cluster of namespaces: who is sent where, and who is not let in. Hand-written EndpointSlices say what a
//! cluster's controllers would. Rows of the specification are named at each check. Needs root.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::{Duration, Instant},
};

use shunt_lab::{Agent, AgentOptions, Answer, Client, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

const BOTH: [Proto; 2] = [Proto::Tcp, Proto::Udp];
const APP: u16 = 8080;
const PODS: [(&str, &str); 4] = [
    ("web-a", "node-a"),
    ("web-b", "node-b"),
    ("web-c", "node-b"),
    ("web-d", "node-a"),
];
/// Hooked pod and unhooked pod on node-a, a process on node-a, a host outside.
const CLIENTS: [&str; 4] = ["hooked", "packets", "node-a", "client"];
const NODES: [&str; 2] = ["node-a", "node-b"];

/// Two nodes with an agent each, four servers, and the manifests that the agents follow.
struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    manifests: TempDir,
    changes: AtomicU16,
}

/// One endpoint of a slice.
#[derive(Clone, Copy)]
struct Endpoint {
    pod: &'static str,
    /// `ready`, `serving`, `terminating`.
    conditions: [bool; 3],
    /// The rest of it.
    more: &'static str,
}

const READY: [bool; 3] = [true, true, false];
const NOT_READY: [bool; 3] = [false, false, false];
const TERMINATING: [bool; 3] = [false, true, true];
const DEAD: [bool; 3] = [false, false, true];

fn endpoint(pod: &'static str, conditions: [bool; 3]) -> Endpoint {
    Endpoint {
        pod,
        conditions,
        more: "",
    }
}

fn ready(pods: &[&'static str]) -> Vec<Endpoint> {
    pods.iter().map(|pod| endpoint(pod, READY)).collect()
}

impl Cluster {
    fn start_with(xdp: &str, extra: &[&str], documents: impl FnOnce(&Self) -> Vec<String>) -> Self {
        let lab = Lab::new().unwrap();
        let ports = [Port::tcp(APP), Port::udp(APP)];
        for (pod, node) in PODS {
            lab.add_pod(&PodSpec::new(pod, node, &ports)).unwrap();
        }
        for pod in ["hooked", "packets"] {
            lab.add_pod(&PodSpec::new(pod, "node-a", &[])).unwrap();
        }
        let mut cluster = Self {
            agents: Vec::new(),
            lab,
            manifests: TempDir::new().unwrap(),
            changes: AtomicU16::new(0),
        };
        cluster.apply(&documents(&cluster));
        let options = AgentOptions::manifests(cluster.manifests.path())
            .xdp(xdp)
            .args(extra)
            .shunt(env!("CARGO_BIN_EXE_shunt"));
        for node in NODES {
            let agent = cluster.lab.start_agent(node, &options).unwrap();
            cluster.agents.push(agent);
        }
        cluster
    }

    /// Replaces all manifests at once, and waits until every agent has brought them into its maps: the Service that comes
    /// last by name has another port each time.
    fn apply(&self, documents: &[String]) {
        let port = 1 + self.changes.fetch_add(1, Ordering::Relaxed);
        let marker = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: zz-marker }}\n\
             spec: {{ clusterIP: 10.96.0.250, ports: [{{ port: {port} }}] }}\n"
        );
        let path = self.manifests.path().join("all.yaml");
        let hidden = path.with_extension("new");
        fs::write(&hidden, [documents, &[marker]].concat().join("---\n")).unwrap();
        fs::rename(hidden, path).unwrap();
        let began = Instant::now();
        for agent in &self.agents {
            while !has(agent, "10.96.0.250", port) {
                assert!(
                    began.elapsed() < Duration::from_secs(10),
                    "{}: change {port} is not in the maps",
                    agent.node()
                );
                thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// The slices of a Service, one per family.
    fn slices(&self, service: &str, endpoints: &[Endpoint]) -> Vec<String> {
        let of_family = |v6: bool| {
            let mut text = format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{ name: {service}-{family}, labels: {{ kubernetes.io/service-name: {service} }} }}\n\
                 addressType: IPv{family}\n\
                 ports: [{{ name: t, protocol: TCP, port: {APP} }}, {{ name: u, protocol: UDP, port: {APP} }}]\n\
                 endpoints:\n",
                family = if v6 { 6 } else { 4 },
            );
            for Endpoint { pod, conditions, more } in endpoints {
                let [ready, serving, terminating] = conditions;
                let node = PODS.iter().find(|(name, _)| name == pod).unwrap().1;
                text += &format!(
                    "- {{ addresses: ['{}'], nodeName: {node}, \
                     conditions: {{ ready: {ready}, serving: {serving}, terminating: {terminating} }}{more} }}\n",
                    self.ip(pod, v6),
                );
            }
            text
        };
        vec![of_family(false), of_family(true)]
    }

    /// A Service and its slices.
    fn documents(&self, name: &str, number: u8, spec: &str, endpoints: &[Endpoint]) -> Vec<String> {
        let mut documents = vec![service(name, number, spec)];
        documents.extend(self.slices(name, endpoints));
        documents
    }

    fn client(&self, name: &str) -> Client {
        let sockets = if ["hooked", "node-a", "node-b"].contains(&name) {
            Sockets::Hooked
        } else {
            Sockets::Unhooked
        };
        self.lab.client(name, sockets).unwrap()
    }

    fn clients(&self) -> Vec<Client> {
        CLIENTS.iter().map(|name| self.client(name)).collect()
    }

    fn ip(&self, name: &str, v6: bool) -> IpAddr {
        let ips = self.lab.ips(name).unwrap();
        ips.into_iter().find(|ip| ip.is_ipv6() == v6).unwrap()
    }
}

fn has(agent: &Agent, address: &str, port: u16) -> bool {
    let rows = agent.json(&["services"]).unwrap();
    rows.as_array()
        .unwrap()
        .iter()
        .any(|row| row["address"] == address && row["port"] == port)
}

/// A dual-stack LoadBalancer Service without selector; `spec` is more of it.
fn service(name: &str, number: u8, spec: &str) -> String {
    let node_port = node_port(number);
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec:\n  type: LoadBalancer\n{spec}  \
         clusterIP: 10.96.0.{number}\n  clusterIPs: [10.96.0.{number}, 'fd96::{number}']\n  \
         ipFamilies: [IPv4, IPv6]\n  externalIPs: [198.51.100.1{number:02}, '2001:db8:198::1{number:02}']\n  ports:\n  \
         - {{ name: t, protocol: TCP, port: 80, nodePort: {node_port} }}\n  \
         - {{ name: u, protocol: UDP, port: 80, nodePort: {node_port} }}\n\
         status: {{ loadBalancer: {{ ingress: [{{ ip: 198.51.100.{number} }}, {{ ip: '2001:db8:198::{number}' }}] }} }}\n"
    )
}

fn node_port(number: u8) -> u16 {
    30_080 + u16::from(number)
}

fn cluster_ip(number: u8, v6: bool) -> SocketAddr {
    at(["10.96.0.", "fd96::"][usize::from(v6)], number)
}

fn load_balancer_ip(number: u8, v6: bool) -> SocketAddr {
    at(["198.51.100.", "2001:db8:198::"][usize::from(v6)], number)
}

fn external_ip(number: u8, v6: bool) -> SocketAddr {
    at(["198.51.100.", "2001:db8:198::"][usize::from(v6)], 100 + number)
}

fn at(prefix: &str, number: u8) -> SocketAddr {
    SocketAddr::new(format!("{prefix}{number}").parse().unwrap(), 80)
}

/// How to dial: UDP from a port that no dial had before, for a flow that the node remembers goes where it went.
fn how(proto: Proto, to: SocketAddr) -> Dial {
    const FIRST: u16 = 1024;
    /// Up to where node ports and the kernel's own choice begin.
    const PORTS: u16 = 30_000 - FIRST;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let port = || FIRST + NEXT.fetch_add(1, Ordering::Relaxed) % PORTS;
    Dial {
        bind: (proto == Proto::Udp).then(|| SocketAddr::new(any, port())),
        ..Dial::default()
    }
}

fn dial(client: &Client, proto: Proto, to: SocketAddr) -> Answer {
    match client.once(proto, to, &how(proto, to)) {
        Ok(answer) => answer,
        Err(error) => panic!("{proto} {to} from {}: {error}", client.name()),
    }
}

/// The servers that answer so many dials.
fn servers(client: &Client, proto: Proto, to: SocketAddr, dials: usize) -> BTreeSet<String> {
    (0..dials).map(|_| dial(client, proto, to).server).collect()
}

/// The one server that answers several dials.
fn one_server(client: &Client, proto: Proto, to: SocketAddr) -> String {
    let servers = servers(client, proto, to, 6);
    assert_eq!(servers.len(), 1, "{proto} {to} from {}: {servers:?}", client.name());
    servers.into_iter().next().unwrap()
}

const AFFINITY: &str = "  sessionAffinity: ClientIP\n";

/// P1: every frontend of a Service port leads a client to one backend, an outside client through whichever node; when that
/// backend goes, to one other; and a new agent knows it still.
fn affinity(xdp: &str) {
    let all = ["web-a", "web-b", "web-c", "web-d"];
    let mut cluster = Cluster::start_with(xdp, &[], |cluster| cluster.documents("web", 1, AFFINITY, &ready(&all)));
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
    affinity("native");
}

#[test]
fn a_client_keeps_its_backend_without_xdp() {
    affinity("off");
}

/// P1: each new flow starts the time-out anew; when it has passed, the choice is free again.
#[test]
fn affinity_ends_when_the_client_is_idle_for_the_time_out() {
    let spec = "  sessionAffinity: ClientIP\n  sessionAffinityConfig: { clientIP: { timeoutSeconds: 5 } }\n";
    let all = ["web-a", "web-b", "web-c", "web-d"];
    let cluster = Cluster::start_with("native", &[], |cluster| cluster.documents("web", 1, spec, &ready(&all)));
    // An outside client's backend follows from its address, so that all nodes agree.
    let clients: Vec<_> = cluster.clients().into_iter().take(3).collect();
    let dial_all = || -> Vec<(String, String)> {
        let cases = clients.iter().flat_map(|client| BOTH.map(|proto| (client, proto)));
        cases
            .flat_map(|(client, proto)| {
                [false, true].map(|v6| {
                    let server = dial(client, proto, cluster_ip(1, v6)).server;
                    (format!("{} {proto} IPv{}", client.name(), 4 + 2 * u8::from(v6)), server)
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

/// P1 for a client outside, whose backend follows from its address and is the same through both nodes: it leaves a backend that
/// goes, does not come back to it while it opens flows, and does once it has been idle for the time-out.
fn affinity_of_outside_clients(xdp: &str) {
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
    let cluster = Cluster::start_with(xdp, &[], |cluster| documents(cluster, &[]));
    let client = cluster.client("client");
    let servers = || -> Vec<String> {
        let of = |&(number, v6, proto): &(u8, bool, Proto)| {
            let dialled = NODES.map(|node| SocketAddr::new(cluster.ip(node, v6), node_port(number)));
            let [first, second] = dialled.map(|to| dial(&client, proto, to).server);
            assert_eq!(first, second, "{proto} to {dialled:?}");
            first
        };
        cases.iter().map(of).collect()
    };
    let first = servers();
    cluster.apply(&documents(&cluster, &first));
    let second = servers();
    assert!(first.iter().zip(&second).all(|(first, second)| first != second));
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
    affinity_of_outside_clients("native");
}

#[test]
fn affinity_of_outside_clients_ends_with_the_time_out_without_xdp() {
    affinity_of_outside_clients("off");
}

/// Dials that must come to nothing: no answer, and nothing that says so.
fn silence(client: &Client, proto: Proto, to: SocketAddr) {
    let dial = Dial {
        timeout: Duration::from_millis(400),
        connected: true,
        ..how(proto, to)
    };
    match client.once(proto, to, &dial) {
        Ok(answer) => panic!("{proto} {to} from {}: answered by {}", client.name(), answer.server),
        Err(error) => assert!(error.is_timeout(), "{proto} {to} from {}: {error}", client.name()),
    }
}

/// P5: sources outside of the ranges are dropped on the load balancer addresses, pods included, and nowhere else; the node
/// is let through; changes are followed.
fn source_ranges(xdp: &str) {
    let cluster = Cluster::start_with(xdp, &[], |cluster| {
        cluster.documents("web", 1, "", &ready(&["web-a", "web-b"]))
    });
    let clients = cluster.clients();
    let ranges = |ranges: &[String]| format!("  loadBalancerSourceRanges: [{}]\n", ranges.join(", "));
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
        // All of one family: none of the other.
        (vec!["0.0.0.0/0".to_owned()], [everyone.clone(), vec!["node-a"]]),
        (
            wide(["10.44.0.0/16", "fd44::/48"]),
            [vec!["hooked", "packets", "node-a"], vec!["hooked", "packets", "node-a"]],
        ),
        (Vec::new(), [everyone.clone(), everyone.clone()]),
    ];
    for (list, allowed) in steps {
        let spec = if list.is_empty() { String::new() } else { ranges(&list) };
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
    let denied: u64 = cluster.agents.iter().map(|agent| event(agent, "source_denied")).sum();
    assert!(denied > 0, "drops are counted");
}

fn event(agent: &Agent, name: &str) -> u64 {
    let status = agent.json(&["status"]).unwrap();
    status["events"][name].as_u64().unwrap()
}

#[test]
fn source_ranges_are_enforced_with_xdp() {
    source_ranges("native");
}

#[test]
fn source_ranges_are_enforced_without_xdp() {
    source_ranges("off");
}

/// An HTTP response from a process on a node: status line and headers, body. `None` when nobody answers.
fn get(cluster: &Cluster, node: &str, to: SocketAddr, request: &str) -> Option<(String, String)> {
    let ns = cluster.lab.ns(node).unwrap();
    let request = request.to_owned();
    ns.run(move || {
        let mut stream = TcpStream::connect(to).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        stream.write_all(request.as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        Some((head.to_lowercase(), body.to_owned()))
    })
}

/// P4: as node ports, health checks are answered on the addresses that are admitted, as kube-proxy's `nodePortAddresses`
/// says.
#[test]
fn load_balancers_are_answered_on_admitted_addresses() {
    let spec = "  externalTrafficPolicy: Local\n  healthCheckNodePort: 32001\n";
    let extra = ["--nodeport-addresses", "fd50::/64"];
    let cluster = Cluster::start_with("off", &extra, |cluster| {
        cluster.documents("web", 1, spec, &ready(&["web-a"]))
    });
    let asked = |v6| {
        let to = SocketAddr::new(cluster.ip("node-a", v6), 32_001);
        get(
            &cluster,
            "node-b",
            to,
            "GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n",
        )
    };
    let began = Instant::now();
    while asked(true).is_none_or(|(head, _)| !head.starts_with("http/1.1 200")) {
        assert!(began.elapsed() < Duration::from_secs(5));
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(asked(false), None);
}

/// P4: `healthCheckNodePort` follows the Service and its ready local endpoints, on each node, over IPv4 and IPv6.
#[test]
fn load_balancers_are_told_about_local_endpoints() {
    const REQUEST: &str = "GET /any/path?x HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
    let spec = |port: u16| format!("  externalTrafficPolicy: Local\n  healthCheckNodePort: {port}\n");
    let cluster = Cluster::start_with("off", &[], |cluster| {
        cluster.documents("web", 1, &spec(32_001), &ready(&["web-a", "web-b", "web-c"]))
    });
    let status = |node: &str, v6: bool, port: u16| -> Option<u16> {
        let to = SocketAddr::new(cluster.ip(node, v6), port);
        let (head, _) = get(&cluster, "node-b", to, REQUEST)?;
        Some(head.split(' ').nth(1)?.parse().unwrap())
    };
    let all = |port: u16| NODES.map(|node| [false, true].map(|v6| status(node, v6, port)));
    // A listener opens and closes a moment after the maps are written.
    let until = |port: u16, wanted: [[Option<u16>; 2]; 2]| {
        let began = Instant::now();
        while all(port) != wanted {
            assert!(began.elapsed() < Duration::from_secs(5), "port {port}: {:?}", all(port));
            thread::sleep(Duration::from_millis(50));
        }
    };
    until(32_001, [[Some(200); 2]; 2]);
    for (node, count) in [("node-a", 1), ("node-b", 2)] {
        for v6 in [false, true] {
            for method in ["GET", "POST"] {
                let request = REQUEST.replace("GET", method);
                let to = SocketAddr::new(cluster.ip(node, v6), 32_001);
                let (head, body) = get(&cluster, "node-a", to, &request).unwrap();
                for line in [
                    "http/1.1 200 ok",
                    "content-type: application/json",
                    "x-content-type-options: nosniff",
                    &format!("x-load-balancing-endpoint-weight: {count}"),
                ] {
                    assert!(head.lines().any(|found| found == line), "{node}: no {line} in {head}");
                }
                let body: serde_json::Value = serde_json::from_str(&body).unwrap();
                let expected = serde_json::json!({
                    "service": { "namespace": "default", "name": "web" },
                    "localEndpoints": count, "serviceProxyHealthy": true,
                });
                assert_eq!(body, expected);
            }
        }
    }
    // Terminating and unready endpoints do not count, though new flows may still reach them.
    for conditions in [NOT_READY, TERMINATING] {
        let endpoints = [endpoint("web-a", conditions), endpoint("web-b", READY)];
        cluster.apply(&cluster.documents("web", 1, &spec(32_001), &endpoints));
        until(32_001, [[Some(503); 2], [Some(200); 2]]);
    }
    // Another port, and a second Service that wants the same.
    cluster.apply(&cluster.documents("web", 1, &spec(32_002), &ready(&["web-b"])));
    until(32_002, [[Some(503); 2], [Some(200); 2]]);
    until(32_001, [[None; 2]; 2]);
    let mut both = cluster.documents("web", 1, &spec(32_002), &ready(&["web-b"]));
    both.extend(cluster.documents("web2", 2, &spec(32_002), &ready(&["web-a"])));
    cluster.apply(&both);
    let warning = "Service default/web2: spec.healthCheckNodePort: cannot listen on 0.0.0.0:32002";
    cluster.agents[0].wait_for(warning, Duration::from_secs(5)).unwrap();
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(cluster.agents[0].output().matches(warning).count(), 1, "said once");
    until(32_002, [[Some(503); 2], [Some(200); 2]]);
    // The first is gone: the second has the port.
    cluster.apply(&cluster.documents("web2", 2, &spec(32_002), &ready(&["web-a"])));
    until(32_002, [[Some(200); 2], [Some(503); 2]]);
    cluster.apply(&[]);
    until(32_002, [[None; 2]; 2]);
}

/// Networks of pods, so that those of the other node are known to be the cluster's own.
const CLUSTER_CIDRS: [&str; 3] = ["--cluster-cidr", "10.44.0.0/16", "fd44::/48"];

/// Asserts that a client reaches exactly these servers, and that each dial shows what was dialled.
fn reaches(client: &Client, proto: Proto, to: SocketAddr, wanted: &[&str]) {
    let mut seen = BTreeSet::new();
    for _ in 0..48 {
        let answer = dial(client, proto, to);
        assert_eq!(answer.peer, to, "{proto} from {}", client.name());
        assert!(
            wanted.contains(&answer.server.as_str()),
            "{proto} {to} from {}: answered by {}, not one of {wanted:?}",
            client.name(),
            answer.server
        );
        seen.insert(answer.server);
        // Whether others answer as well shows only by and by.
        if seen.len() == wanted.len() && seen.len() > 1 {
            break;
        }
        if wanted.len() == 1 {
            let again: BTreeSet<_> = (0..7).map(|_| dial(client, proto, to).server).collect();
            assert_eq!(again, seen, "{proto} {to} from {}", client.name());
            break;
        }
    }
    assert_eq!(
        seen,
        wanted.iter().map(|&server| server.to_owned()).collect(),
        "{proto} {to} from {}",
        client.name()
    );
}

/// Asserts that a client is refused at once.
fn is_refused(client: &Client, proto: Proto, to: SocketAddr) {
    let dial = Dial {
        connected: true,
        ..how(proto, to)
    };
    match client.once(proto, to, &dial) {
        Ok(answer) => panic!("{proto} {to} from {}: answered by {}", client.name(), answer.server),
        // IPv6 keeps an early error until the first retransmission: see `cluster_services.rs`.
        Err(error) => {
            let quick = error.after().is_some_and(|after| after < Duration::from_millis(1500));
            assert!(
                error.is_refused() && quick,
                "{proto} {to} from {}: {error}",
                client.name()
            );
        }
    }
}

fn each_case(mut check: impl FnMut(bool, Proto)) {
    for v6 in [false, true] {
        for proto in BOTH {
            check(v6, proto);
        }
    }
}

/// P2, at every hook: outside clients reach local backends only and are seen with their own address, also those that serve
/// while they terminate when no other is local; none local is silence, none anywhere a refusal; clients inside get all.
fn external_policy_local(xdp: &str) {
    const LOCAL: &str = "  externalTrafficPolicy: Local\n";
    let cluster = Cluster::start_with(xdp, &CLUSTER_CIDRS, |cluster| {
        cluster.documents("web", 1, LOCAL, &ready(&["web-a", "web-b"]))
    });
    let outside = cluster.client("client");
    let inside = ["hooked", "packets", "node-a"].map(|name| cluster.client(name));
    let at_node = |node: &str, v6| SocketAddr::new(cluster.ip(node, v6), node_port(1));
    // All of these come in at node-a.
    let frontends = |v6| [at_node("node-a", v6), load_balancer_ip(1, v6), external_ip(1, v6)];
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
        // A pod's packets to the other node's port are the cluster's own there.
        for client in &inside[..2] {
            reaches(client, proto, to, &["web-a", "web-b"]);
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

    cluster.apply(&cluster.documents("web", 1, LOCAL, &[endpoint("web-a", DEAD), endpoint("web-b", READY)]));
    each_case(|v6, proto| {
        for to in frontends(v6) {
            silence(&outside, proto, to);
            for client in &inside {
                reaches(client, proto, to, &["web-b"]);
            }
        }
        reaches(&outside, proto, at_node("node-b", v6), &["web-b"]);
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
    external_policy_local("native");
}

#[test]
fn external_traffic_stays_local_without_xdp() {
    external_policy_local("off");
}

/// P3: clients inside reach backends of their node only, and are refused when it has none; other frontends of the
/// Service go by the other policy.
#[test]
fn internal_traffic_stays_local() {
    const LOCAL: &str = "  internalTrafficPolicy: Local\n";
    let cluster = Cluster::start_with("native", &CLUSTER_CIDRS, |cluster| {
        cluster.documents("web", 1, LOCAL, &ready(&["web-a", "web-b", "web-c"]))
    });
    let clients = cluster.clients();
    let far = [Sockets::Hooked, Sockets::Unhooked].map(|sockets| cluster.lab.client("web-d", sockets).unwrap());
    let other_node = [Sockets::Hooked, Sockets::Unhooked].map(|sockets| cluster.lab.client("web-b", sockets).unwrap());
    each_case(|v6, proto| {
        for client in clients.iter().chain(&far) {
            reaches(client, proto, cluster_ip(1, v6), &["web-a"]);
            reaches(client, proto, load_balancer_ip(1, v6), &["web-a", "web-b", "web-c"]);
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

/// B3 and B4: only ready endpoints get new flows; when none is, those that serve while they terminate; then nobody.
/// `publishNotReadyAddresses` makes all of them ready.
#[test]
fn endpoints_are_eligible_by_their_conditions() {
    let cluster = Cluster::start_with("native", &[], |cluster| {
        cluster.documents(
            "web",
            1,
            "",
            &[
                endpoint("web-a", TERMINATING),
                endpoint("web-b", READY),
                endpoint("web-c", NOT_READY),
                endpoint("web-d", DEAD),
            ],
        )
    });
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
    cluster.apply(&cluster.documents("web", 1, "  publishNotReadyAddresses: true\n", &none_serving));
    expect(&["web-c", "web-d"]);
    cluster.apply(&cluster.documents("web", 1, "", &ready(&["web-a"])));
    expect(&["web-a"]);
}

fn nodes_in_zones() -> Vec<String> {
    let node = |(node, zone): (&str, &str)| {
        format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{ name: {node}, labels: {{ topology.kubernetes.io/zone: {zone} }} }}\n"
        )
    };
    [("node-a", "east"), ("node-b", "west")].map(node).to_vec()
}

/// B5: hints keep new flows of clients inside in their zone or on their node, when all endpoints have them and some are
/// for this node; clients outside reach all.
#[test]
fn hints_keep_flows_near() {
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
    let cluster = Cluster::start_with("native", &CLUSTER_CIDRS, |_| nodes_in_zones());
    let inside = ["hooked", "packets", "node-a"].map(|name| cluster.client(name));
    let other_node = [Sockets::Hooked, Sockets::Unhooked].map(|sockets| cluster.lab.client("web-b", sockets).unwrap());
    let outside = cluster.client("client");
    let expect = |endpoints: &[(&'static str, &'static str)], on_a: &[&str], on_b: &[&str]| {
        let documents = cluster.documents("web", 1, "", &hinted(endpoints));
        cluster.apply(&[nodes_in_zones(), documents].concat());
        let all: Vec<&str> = endpoints.iter().map(|(pod, _)| *pod).collect();
        each_case(|v6, proto| {
            for client in &inside {
                for to in [cluster_ip(1, v6), external_ip(1, v6)] {
                    reaches(client, proto, to, on_a);
                }
            }
            for client in &other_node {
                reaches(client, proto, cluster_ip(1, v6), on_b);
            }
            reaches(&outside, proto, external_ip(1, v6), &all);
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
    expect(&[("web-a", EAST), ("web-b", WEST), ("web-c", "")], &all, &all);
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

/// B5 without an EndpointSlice controller: `trafficDistribution` over the manifests' own Pods and Nodes.
#[test]
fn traffic_distribution_keeps_flows_near() {
    let cluster = Cluster::start_with("native", &[], |_| nodes_in_zones());
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
        let text =
            service("web", 1, &spec).replace("protocol: TCP, port: 80", "protocol: TCP, port: 80, targetPort: 8080");
        let text = text.replace("protocol: UDP, port: 80", "protocol: UDP, port: 80, targetPort: 8080");
        cluster.apply(&[nodes_in_zones(), pods.clone(), vec![text]].concat());
        each_case(|v6, proto| {
            for client in &inside {
                reaches(client, proto, cluster_ip(1, v6), wanted);
            }
        });
    }
    let warning = "Service default/web: spec.trafficDistribution: \"Nearby\" is no distribution";
    cluster.agents[0].wait_for(warning, Duration::from_secs(5)).unwrap();
}
