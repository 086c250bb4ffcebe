//! Policies in a cluster of namespaces: who is sent where, and who is not let in. Hand-written
//! EndpointSlices say what a cluster's controllers would. Rows of the specification are named at
//! each check. Needs root.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::{Duration, Instant},
};

use shunt_lab::{Agent, AgentOptions, Answer, Client, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

mod affinity;
mod endpoints;
mod health_checks;
mod meaning;
mod source_ranges;
mod traffic;

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
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        for node in NODES {
            let agent = cluster.lab.start_agent(node, &options).unwrap();
            cluster.agents.push(agent);
        }
        cluster
    }

    /// Replaces all manifests at once, and waits until every agent has brought them into its maps:
    /// the Service that comes last by name has another port each time.
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
            for Endpoint {
                pod,
                conditions,
                more,
            } in endpoints
            {
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
    at(
        ["198.51.100.", "2001:db8:198::"][usize::from(v6)],
        100 + number,
    )
}

fn at(prefix: &str, number: u8) -> SocketAddr {
    SocketAddr::new(format!("{prefix}{number}").parse().unwrap(), 80)
}

/// How to dial: UDP from a port that no dial had before, for a flow that the node remembers goes
/// where it went.
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
    assert_eq!(
        servers.len(),
        1,
        "{proto} {to} from {}: {servers:?}",
        client.name()
    );
    servers.into_iter().next().unwrap()
}

/// Dials that must come to nothing: no answer, and nothing that says so.
fn silence(client: &Client, proto: Proto, to: SocketAddr) {
    let dial = Dial {
        timeout: Duration::from_millis(400),
        connected: true,
        ..how(proto, to)
    };
    match client.once(proto, to, &dial) {
        Ok(answer) => panic!(
            "{proto} {to} from {}: answered by {}",
            client.name(),
            answer.server
        ),
        Err(error) => assert!(
            error.is_timeout(),
            "{proto} {to} from {}: {error}",
            client.name()
        ),
    }
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
        Ok(answer) => panic!(
            "{proto} {to} from {}: answered by {}",
            client.name(),
            answer.server
        ),
        // IPv6 keeps an early error until the first retransmission: see `services`.
        Err(error) => {
            let quick = error
                .after()
                .is_some_and(|after| after < Duration::from_millis(1500));
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
