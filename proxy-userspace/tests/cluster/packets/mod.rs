//! Packets that others forget, in a cluster of namespaces. Rows of the specification are named at
//! each check. Needs root.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
};

use shunt_lab::{Agent, AgentOptions, Answer, Client, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

mod bulk;
mod frames;
mod path;
mod service_addresses;

const BOTH: [Proto; 2] = [Proto::Tcp, Proto::Udp];
const APP: u16 = 8080;
/// Of Service `near`; `far` has the next, `none` the one after.
const NODE_PORT: u16 = 30080;

/// Two nodes with an agent each. Service `near` has a backend on node-a, `far` one on node-b,
/// `none` nobody. Clients are on node-a (`packets` is a pod there whose sockets no hook sees) and
/// outside.
struct Cluster {
    _agents: Vec<Agent>,
    lab: Lab,
    _manifests: TempDir,
}

impl Cluster {
    fn start(lab: Lab, xdp: &str, extra: &[&str]) -> Self {
        let ports = [Port::tcp(APP), Port::udp(APP)];
        let manifests = TempDir::new().unwrap();
        for (number, (name, node)) in [("near", "node-a"), ("far", "node-b"), ("none", "")]
            .into_iter()
            .enumerate()
        {
            let mut text = service(name, number as u16 + 1);
            if !node.is_empty() {
                lab.add_pod(&PodSpec::new(name, node, &ports)).unwrap();
                text += &pod(name, node, &lab.ips(name).unwrap());
            }
            fs::write(manifests.path().join(format!("{name}.yaml")), text).unwrap();
        }
        lab.add_pod(&PodSpec::new("packets", "node-a", &[]))
            .unwrap();
        lab.add_pod(&PodSpec::new("hooked", "node-a", &[])).unwrap();
        let options = AgentOptions::manifests(manifests.path())
            .xdp(xdp)
            .args(extra)
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        let agents = ["node-a", "node-b"].map(|node| lab.start_agent(node, &options).unwrap());
        Self {
            _agents: agents.into(),
            lab,
            _manifests: manifests,
        }
    }

    fn client(&self, name: &str) -> Client {
        let sockets = match name {
            "hooked" | "node-a" => Sockets::Hooked,
            _ => Sockets::Unhooked,
        };
        self.lab.client(name, sockets).unwrap()
    }

    fn ip(&self, name: &str, v6: bool) -> IpAddr {
        let ips = self.lab.ips(name).unwrap();
        ips.into_iter().find(|ip| ip.is_ipv6() == v6).unwrap()
    }

    /// The node port of the Service with this number on node-a.
    fn node_port(&self, number: u16, v6: bool) -> SocketAddr {
        let ip = self.lab.node_ips("node-a").unwrap()[usize::from(v6)];
        SocketAddr::new(ip, NODE_PORT + number - 1)
    }

    /// How many packets a node or the fabric would not forward because they were too big.
    fn too_big(&self, router: &str, v6: bool) -> u64 {
        let router = self.lab.ns(router).unwrap();
        let read = |path: &str| router.run(|| fs::read_to_string(path)).unwrap();
        if v6 {
            let text = read("/proc/thread-self/net/snmp6");
            let line = text
                .lines()
                .find(|line| line.starts_with("Icmp6OutPktTooBigs"))
                .unwrap();
            return line.split_whitespace().nth(1).unwrap().parse().unwrap();
        }
        let text = read("/proc/thread-self/net/snmp");
        let mut lines = text.lines().filter(|line| line.starts_with("Ip: "));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let mut both = names.split(' ').zip(values.split(' '));
        both.find(|(name, _)| *name == "FragFails")
            .unwrap()
            .1
            .parse()
            .unwrap()
    }
}

fn cluster_ip(number: u16, v6: bool) -> SocketAddr {
    let text = if v6 {
        format!("[fd96::{number}]:80")
    } else {
        format!("10.96.0.{number}:80")
    };
    text.parse().unwrap()
}

fn service(name: &str, number: u16) -> String {
    let node_port = NODE_PORT + number - 1;
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec:\n  type: NodePort\n  clusterIP: 10.96.0.{number}\n  \
         clusterIPs: [10.96.0.{number}, 'fd96::{number}']\n  ipFamilies: [IPv4, IPv6]\n  selector: {{ app: {name} }}\n  ports:\n  \
         - {{ name: t, protocol: TCP, port: 80, targetPort: {APP}, nodePort: {node_port} }}\n  \
         - {{ name: u, protocol: UDP, port: 80, targetPort: {APP}, nodePort: {node_port} }}\n---\n"
    )
}

fn pod(name: &str, node: &str, ips: &[IpAddr]) -> String {
    let list: Vec<_> = ips.iter().map(|ip| format!("{{ ip: '{ip}' }}")).collect();
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, labels: {{ app: {name} }} }}\n\
         spec: {{ nodeName: {node}, containers: [{{ name: app }}] }}\n\
         status: {{ podIP: '{}', podIPs: [{}], conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
        ips[0],
        list.join(", "),
    )
}

/// A request and an answer of so many bytes.
fn transfer(client: &Client, proto: Proto, to: SocketAddr, bytes: usize) -> Answer {
    let dial = Dial {
        padding: bytes,
        ..Dial::default()
    };
    match client.once(proto, to, &dial) {
        Ok(answer) => answer,
        Err(error) => panic!(
            "{proto} {to} from {}, {bytes} bytes: {error}",
            client.name()
        ),
    }
}
