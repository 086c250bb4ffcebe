//! `--socket-lb`: whose sockets the hook serves (SPEC N7), and that changing it breaks none. Needs root.

use std::{net::SocketAddr, time::Duration};

use crate::web::{self, APP};
use shunt_lab::{Agent, AgentOptions, Client, Conn, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

/// Services of a pod on this node, and of one on another.
const SERVICES: [(u8, &str, &str); 2] = [(1, "near", "node-a"), (2, "far", "node-b")];
const SOON: Duration = Duration::from_secs(2);

struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    _manifests: TempDir,
}

fn manifest(lab: &Lab, number: u8, pod: &str, node: &str) -> String {
    let port = |proto: &str| {
        format!(
            "{{ name: {}, protocol: {proto}, port: 80, targetPort: {APP} }}",
            proto.to_lowercase()
        )
    };
    let ips = lab.ips(pod).unwrap();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {pod} }}\nspec:\n  clusterIP: 10.96.0.{number}\n  \
         clusterIPs: [10.96.0.{number}, 'fd96::{number}']\n  ipFamilies: [IPv4, IPv6]\n  selector: {{ app: {pod} }}\n  \
         ports: [{}, {}]\n---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {pod}, labels: {{ app: {pod} }} }}\n\
         spec: {{ nodeName: {node}, containers: [{{ name: app }}] }}\n\
         status: {{ podIP: '{}', podIPs: [{{ ip: '{}' }}, {{ ip: '{}' }}], \
         conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
        port("TCP"),
        port("UDP"),
        ips[0],
        ips[0],
        ips[1],
    )
}

impl Cluster {
    fn start(socket_lb: &str) -> Self {
        let lab = Lab::builder().strict_rp_filter().build().unwrap();
        let ports = [Port::tcp(APP), Port::udp(APP)];
        for (_, pod, node) in SERVICES {
            lab.add_pod(&PodSpec::new(pod, node, &ports)).unwrap();
        }
        lab.add_pod(&PodSpec::new("pod", "node-a", &[])).unwrap();
        let manifests = TempDir::new().unwrap();
        let objects = SERVICES.map(|(number, pod, node)| manifest(&lab, number, pod, node));
        web::write(manifests.path(), "all.yaml", &objects.join("---\n"));
        let options = AgentOptions::manifests(manifests.path())
            .args(&["--socket-lb", socket_lb])
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        let agents = ["node-a", "node-b"]
            .map(|node| lab.start_agent(node, &options).unwrap())
            .into();
        Self {
            agents,
            lab,
            _manifests: manifests,
        }
    }

    fn client(&self, name: &str) -> Client {
        self.lab.client(name, Sockets::Hooked).unwrap()
    }

    /// Starts the agent of node-a again with another setting.
    fn restart(&mut self, socket_lb: &str) {
        let agent = &mut self.agents[0];
        agent.set_option("--socket-lb", socket_lb);
        agent.stop().unwrap();
        agent.restart().unwrap();
    }

    /// New flows of the socket hook, and of packets.
    fn flows(&self) -> [u64; 2] {
        let status = self.agents[0].json(&["status"]).unwrap();
        ["socket_flow", "tc_flow"].map(|event| status["events"][event].as_u64().unwrap())
    }

    /// Programs at the cgroup.
    fn hooks(&self) -> Vec<String> {
        let status = self.agents[0].json(&["status"]).unwrap();
        let links = status["links"].as_array().unwrap().iter();
        let mut hooks: Vec<_> = links
            .filter(|link| link["target"] == "cgroup")
            .map(|link| link["program"].as_str().unwrap().to_owned())
            .collect();
        hooks.sort();
        hooks
    }

    fn frontends() -> Vec<(SocketAddr, &'static str)> {
        let of = |(number, pod, _)| {
            [format!("10.96.0.{number}"), format!("fd96::{number}")]
                .map(|ip| (SocketAddr::new(ip.parse().unwrap(), 80), pod))
        };
        SERVICES.into_iter().flat_map(of).collect()
    }
}

fn dials() -> [(Proto, bool); 3] {
    [(Proto::Tcp, true), (Proto::Udp, true), (Proto::Udp, false)]
}

/// Opens a socket of each kind to each Service, and asks once.
fn open(cluster: &Cluster, name: &'static str, when: &str) -> Vec<Open> {
    let client = cluster.client(name);
    let mut open = Vec::new();
    for (to, pod) in Cluster::frontends() {
        for (proto, connected) in dials() {
            let dial = Dial {
                connected,
                timeout: SOON,
                ..Dial::default()
            };
            let conn = client
                .open(proto, to, &dial)
                .unwrap_or_else(|error| panic!("{when}: {name}, {proto} to {to}: {error}"));
            let case = format!("{name}, {proto} to {to}, connected {connected}, opened {when}");
            open.push(Open {
                conn,
                to,
                pod,
                case,
            });
        }
    }
    for open in &open {
        open.goes_on(when);
    }
    open
}

struct Open {
    conn: Conn,
    to: SocketAddr,
    pod: &'static str,
    case: String,
}

impl Open {
    fn goes_on(&self, when: &str) {
        let answer = self
            .conn
            .ask_within("who", SOON)
            .unwrap_or_else(|error| panic!("{}, {when}: {error}", self.case));
        let is = (answer.server.as_str(), answer.peer);
        assert_eq!(is, (self.pod, self.to), "{}, {when}", self.case);
    }
}

/// The node's sockets by the hook, pods' by packets, whatever they dial; refusals at once.
#[test]
fn host_serves_the_nodes_own_sockets_only() {
    let cluster = Cluster::start("host");
    assert_eq!(cluster.hooks().len(), 9);
    let before = cluster.flows();
    let of_pod = open(&cluster, "pod", "host");
    let after = cluster.flows();
    assert_eq!(after[0], before[0], "a pod's socket was served");
    assert!(after[1] >= before[1] + of_pod.len() as u64, "{after:?}");
    let of_node = open(&cluster, "node-a", "host");
    let last = cluster.flows();
    // Connected UDP goes by packets there, and so may what is not connected.
    assert!(last[0] >= after[0] + of_node.len() as u64 / 3, "{last:?}");
    for name in ["pod", "node-a"] {
        let client = cluster.client(name);
        for (to, _) in Cluster::frontends() {
            let no_port = SocketAddr::new(to.ip(), 81);
            for error in [
                client.tcp(no_port).unwrap_err(),
                client.udp_connected(no_port).unwrap_err(),
            ] {
                assert!(error.is_refused(), "{name} to {no_port}: {error}");
            }
        }
    }
    let explained = cluster.agents[0]
        .json(&[
            "explain",
            "tcp",
            &format!("{}", cluster.lab.ips("pod").unwrap()[0]),
            "10.96.0.1:80",
        ])
        .unwrap();
    assert!(
        explained["hooks"].to_string().contains("--socket-lb host"),
        "{explained:#}"
    );
}

/// What is open goes on under each setting, by the name that it was dialled by; hooks that nobody
/// needs any more go.
#[test]
fn changing_it_breaks_no_open_socket() {
    let mut cluster = Cluster::start("on");
    let mut all: Vec<Open> = Vec::new();
    for (round, socket_lb) in ["on", "host", "off", "on", "off"].into_iter().enumerate() {
        if round != 0 {
            cluster.restart(socket_lb);
        }
        let when = format!("{socket_lb} ({round})");
        for open in &all {
            open.goes_on(&when);
        }
        for name in ["pod", "node-a"] {
            all.extend(open(&cluster, name, &when));
        }
        let status = cluster.agents[0].json(&["status"]).unwrap();
        assert_eq!(status["socketLb"], socket_lb, "{when}");
        let hooks = cluster.hooks().len();
        assert_eq!(hooks, if socket_lb == "off" { 5 } else { 9 }, "{when}");
    }
    drop(all);
    let sockets = cluster.agents[0].json(&["status"]).unwrap();
    let maps = sockets["maps"].as_array().unwrap();
    let sockets = maps.iter().find(|map| map["map"] == "sockets").unwrap();
    assert_eq!(sockets["entries"], 0, "they are forgotten while it is off");
    cluster.restart("off");
    assert_eq!(cluster.hooks(), Vec::<String>::new());
}
