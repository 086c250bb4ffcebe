//! Policies in a cluster of namespaces: who is sent where, and who is not let in. Hand-written
//! EndpointSlices say what a cluster's controllers would. Rows of the specification are named at
//! each check. Needs root.
//!
//! Objects come from manifests or from an API server, and mean the same: every table is gone through
//! with both, over IPv4 and IPv6. [`TABLES`] have a lab for each source. What runs with XDP and
//! without has manifests in the one lab and the API server in the other, for no program knows where
//! an entry came from. These have manifests alone: tables about a setting of the agent instead of
//! objects; the one over Pods, of which an API server's controllers make slices; and the affinity
//! that ends for clients inside, whose objects are those of the one that ends for clients outside.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU16, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use shunt_lab::{Agent, Answer, Client, Dial, DialError, Lab, PodSpec, Port, Proto, Sockets};

use dials::{dial, how, is_refused, one_server, reaches, servers, silence};
use objects::{Objects, Source};

mod affinity;
mod dials;
mod endpoints;
mod health_checks;
mod meaning;
mod objects;
mod source_ranges;
mod swaps;
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
const ZONES: [&str; 2] = ["east", "west"];

/// Two nodes with an agent each, four servers, and the objects that the agents follow.
struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    source: Source,
    objects: Mutex<Objects>,
    changes: AtomicU16,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the agents had their objects {}", self.source);
        }
    }
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
    fn start(
        source: Source,
        xdp: &str,
        extra: &[&str],
        documents: impl FnOnce(&Self) -> Vec<String>,
    ) -> Self {
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
            source,
            objects: Mutex::new(Objects::new(source, &lab)),
            lab,
            changes: AtomicU16::new(0),
        };
        cluster.apply(&documents(&cluster));
        let options = cluster.objects.get_mut().unwrap().options();
        let options = options
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

    /// Replaces all objects but the Nodes, and waits until every agent has brought them into its
    /// maps: the Service that comes last, by name too, has another port and another number of
    /// endpoints each time.
    fn apply(&self, documents: &[String]) {
        let change = self.changes.fetch_add(1, Ordering::Relaxed);
        let (port, backends) = (1 + change, 1 + change % 2);
        let endpoints = ["{ addresses: [192.0.2.1] }, ", "{ addresses: [192.0.2.2] }"];
        let endpoints = endpoints[..usize::from(backends)].concat();
        let marker = [
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{ name: zz-marker }}\n\
                 spec: {{ clusterIP: 10.96.0.250, ports: [{{ port: {port} }}] }}\n"
            ),
            format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{ name: zz-marker, labels: {{ kubernetes.io/service-name: zz-marker }} }}\n\
                 addressType: IPv4\nports: [{{ port: {APP} }}]\nendpoints: [{endpoints}]\n"
            ),
        ];
        let nodes = self.nodes();
        let mut objects = self.objects.lock().unwrap();
        objects.replace(&[&nodes, documents].concat(), &marker);
        drop(objects);
        let began = Instant::now();
        for agent in &self.agents {
            while !has(agent, "10.96.0.250", port, backends) {
                assert!(
                    began.elapsed() < Duration::from_secs(10),
                    "{}: change {port} is not in the maps",
                    agent.node()
                );
                thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// The nodes, each in a zone of its own.
    fn nodes(&self) -> Vec<String> {
        let node = |(node, zone): (&str, &str)| {
            let [v4, v6] = [false, true].map(|v6| self.ip(node, v6));
            format!(
                "apiVersion: v1\nkind: Node\n\
                 metadata: {{ name: {node}, labels: {{ topology.kubernetes.io/zone: {zone} }} }}\n\
                 status: {{ addresses: [{{ type: InternalIP, address: {v4} }}, {{ type: InternalIP, address: '{v6}' }}] }}\n"
            )
        };
        NODES.into_iter().zip(ZONES).map(node).collect()
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

/// Tables of cases that need nothing of a lab but its source of objects.
type Table = (&'static str, fn(&Cluster));

/// Names the tables as their functions are named.
macro_rules! tables {
    ($($module:ident::$table:ident),* $(,)?) => {
        [$((concat!(stringify!($module), "::", stringify!($table)), $module::$table)),*]
    };
}

/// The tables in two halves, which run side by side.
const TABLES: [&[Table]; 2] = [
    &tables![
        meaning::conditions_left_out,
        meaning::one_address_in_two_endpoints,
        meaning::addresses_of_another_family,
        meaning::stored_numbers_and_link_local_balancers,
        swaps::frontends_change_their_service,
    ],
    &tables![
        endpoints::conditions,
        endpoints::hints,
        traffic::internal_policy_local,
        health_checks::local_endpoints,
    ],
];

/// Goes through tables one after the other in one lab: agents take longer to start than a table
/// takes.
fn go_through(tables: &[Table], source: Source) {
    let cluster = Cluster::start(source, "native", &[], |_| Vec::new());
    let fails = |(name, table): &&Table| {
        println!("{name} {source}");
        let result = catch_unwind(AssertUnwindSafe(|| table(&cluster)));
        cluster.apply(&[]);
        result.is_err()
    };
    let failed: Vec<&str> = tables.iter().filter(fails).map(|(name, _)| *name).collect();
    assert!(failed.is_empty(), "{source}: {}", failed.join(", "));
}

#[test]
fn objects_mean_what_the_api_says_through_manifests() {
    go_through(TABLES[0], Source::Manifests);
}

#[test]
fn objects_mean_what_the_api_says_through_an_api_server() {
    go_through(TABLES[0], Source::ApiServer);
}

#[test]
fn eligible_endpoints_serve_through_manifests() {
    go_through(TABLES[1], Source::Manifests);
}

#[test]
fn eligible_endpoints_serve_through_an_api_server() {
    go_through(TABLES[1], Source::ApiServer);
}

fn has(agent: &Agent, address: &str, port: u16, backends: u16) -> bool {
    let rows = agent.json(&["services"]).unwrap();
    rows.as_array().unwrap().iter().any(|row| {
        row["address"] == address && row["port"] == port && row["internal"]["backends"] == backends
    })
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

fn each_case(mut check: impl FnMut(bool, Proto)) {
    for v6 in [false, true] {
        for proto in BOTH {
            check(v6, proto);
        }
    }
}
