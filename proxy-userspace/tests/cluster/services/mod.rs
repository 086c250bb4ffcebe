//! Services in a cluster of namespaces: real clients, real servers, an agent per node. Rows of the
//! specification are named at each check. Needs root.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use shunt_lab::{Agent, AgentOptions, Answer, Client, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

mod eligible;
mod explain;
mod flows;
mod frontends;
mod life;
mod maps;
mod top;
mod trace;
mod watch;

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
    /// Pods `web-a`, `web-b` behind Service `web`, `solo` alone behind `solo`, nobody behind
    /// `empty`.
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
            &[
                service("solo", 2, ""),
                cluster.pod("solo", "solo", "node-a"),
            ],
        );
        cluster.write("empty.yaml", &[service("empty", 3, "  type: NodePort\n")]);
        let options = AgentOptions::manifests(cluster.manifests.path())
            .xdp(xdp)
            .args(extra)
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
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
fn every_backend(
    client: &Client,
    proto: Proto,
    to: SocketAddr,
    servers: &[&str],
    check: impl Fn(&Answer),
) {
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

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "timed out: {what}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}
