//! `--socket-lb`: whose sockets the hook serves (SPEC N7), and that changing it breaks none. Needs root.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use crate::web::{self, APP};
use shunt_lab::{Agent, AgentOptions, Client, Conn, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

/// Services of a pod on this node, and of one on another.
const SERVICES: [(u8, &str, &str); 2] = [(1, "near", "node-a"), (2, "far", "node-b")];
const SOON: Duration = Duration::from_secs(2);
/// A label is read and its pod's cgroup found long before.
const LABEL_TIMEOUT: Duration = Duration::from_secs(10);

struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    manifests: TempDir,
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
        Self::start_with(&["--socket-lb", socket_lb])
    }

    fn start_with(args: &[&str]) -> Self {
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
            .args(args)
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        let agents = ["node-a", "node-b"]
            .map(|node| lab.start_agent(node, &options).unwrap())
            .into();
        Self {
            agents,
            lab,
            manifests,
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
    open_from(&cluster.client(name), when)
}

fn open_from(client: &Client, when: &str) -> Vec<Open> {
    let name = client.name().to_owned();
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

/// Pods' cgroups, as a kubelet with the systemd and with the cgroupfs driver names them.
const PODS: [(&str, &str); 2] = [
    (
        "uid-1",
        "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-poduid_1.slice/cri-containerd-1.scope",
    ),
    ("uid-2", "kubepods/poduid-2/2"),
];

/// Writes the Pods that the clients run in, and their Namespace, with these labels.
fn write_pods(cluster: &Cluster, pods: Option<&str>, namespace: Option<&str>) {
    let labels = |label: Option<&str>| {
        label.map_or_else(String::new, |label| {
            format!("labels: {{ shunt.dev/socket-lb: '{label}' }}, ")
        })
    };
    let ip = cluster.lab.ips("pod").unwrap()[0];
    let pod = |(uid, _): (&str, &str)| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{ {}name: client-{uid}, uid: {uid} }}\n\
             spec: {{ nodeName: node-a, containers: [{{ name: app }}] }}\nstatus: {{ podIP: '{ip}' }}\n---\n",
            labels(pods)
        )
    };
    let of_namespace = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ {}name: default }}\n",
        labels(namespace)
    );
    let text = PODS.map(pod).concat() + &of_namespace;
    web::write(cluster.manifests.path(), "pods.yaml", &text);
}

/// Local address, peer and inode of the client's sockets, as `ss` would show them.
fn sockets_of(client: &Client, proto: Proto, to: SocketAddr) -> Vec<[String; 3]> {
    let name = proto.to_string().to_lowercase();
    let six = if to.is_ipv6() { "6" } else { "" };
    let table = format!("/proc/{}/net/{name}{six}", client.pid());
    let text = std::fs::read_to_string(&table).unwrap_or_else(|error| panic!("{table}: {error}"));
    let lines = text.lines().map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        [1, 2, 9].map(|n| words.get(n).copied().unwrap_or_default().to_owned())
    });
    lines.collect()
}

/// Opens a socket, and whether its peer is what was dialled to the kernel too; `getpeername` says so in any
/// case. Others, open or closed, may have its port towards another peer.
fn open_shown(client: &Client, proto: Proto, to: SocketAddr, dial: &Dial) -> bool {
    let before = sockets_of(client, proto, to);
    let conn = client.open(proto, to, dial).unwrap();
    let word = |bytes: &[u8]| format!("{:08X}", u32::from_ne_bytes(bytes.try_into().unwrap()));
    let octets = match to.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let address: String = octets.chunks(4).map(word).collect();
    let peer = format!("{address}:{:04X}", to.port());
    let local = format!(":{:04X}", conn.local.port());
    let now = sockets_of(client, proto, to);
    let is_new = |[at, _, inode]: &&[String; 3]| {
        at.ends_with(&local) && inode != "0" && !before.iter().any(|old| old[2] == *inode)
    };
    let found = now.iter().find(is_new);
    let found = found.unwrap_or_else(|| panic!("{local} is not new in {now:?}"));
    found[1] == peer
}

/// Opens a socket of each kind when the hook leaves the client out, or serves it: as soon as it does.
fn open_once(client: &Client, is_left_out: bool, when: &str) -> Vec<Open> {
    let connected = Dial {
        connected: true,
        timeout: SOON,
        ..Dial::default()
    };
    let (probe, _) = Cluster::frontends()[0];
    let deadline = Instant::now() + LABEL_TIMEOUT;
    loop {
        let shows = open_shown(client, Proto::Tcp, probe, &connected);
        if shows == is_left_out {
            break;
        }
        assert!(Instant::now() < deadline, "{when}: left out: {shows}");
        std::thread::sleep(Duration::from_millis(20));
    }
    for (to, _) in Cluster::frontends() {
        for proto in [Proto::Tcp, Proto::Udp] {
            // Connected UDP of the node goes by packets always.
            if proto == Proto::Udp && client.name() == "node-a" {
                continue;
            }
            let shows = open_shown(client, proto, to, &connected);
            assert_eq!(shows, is_left_out, "{when}: {proto} to {to}");
        }
    }
    open_from(client, when)
}

/// The labelled pod's sockets are connected to the Service, others' to a backend; labels come and go, on
/// the Pod and on its Namespace, and whatever was open before goes on.
#[test]
fn pods_are_left_out_by_label() {
    let mut cluster = Cluster::start_with(&["--socket-lb-labels", "on"]);
    write_pods(&cluster, Some("off"), None);
    std::thread::sleep(Duration::from_secs(1));
    let clients = PODS.map(|(_, cgroup)| cluster.lab.client_in("pod", cgroup).unwrap());
    for client in &clients {
        drop(open_once(client, true, "its cgroup comes after its label"));
    }
    for (n, client) in clients.iter().enumerate() {
        let mut all: Vec<Open> = Vec::new();
        for (pods, namespace, is_left_out) in [
            (None, None, false),
            (Some("off"), None, true),
            (None, None, false),
            (None, Some("off"), true),
            (Some("on"), Some("off"), false),
            (Some("off"), Some("off"), true),
            (None, None, false),
        ] {
            write_pods(&cluster, pods, namespace);
            let when = format!("client {n}, Pod {pods:?}, Namespace {namespace:?}");
            let opened = open_once(client, is_left_out, &when);
            for open in &all {
                open.goes_on(&when);
            }
            all.extend(opened);
            if namespace.is_some() {
                cluster.agents[0].restart().unwrap();
                all.extend(open_once(
                    client,
                    is_left_out,
                    &format!("{when}, restarted"),
                ));
            }
            // The node itself and what is in no pod's cgroup are served as before.
            for name in ["pod", "node-a"] {
                let client = cluster.client(name);
                drop(open_once(&client, false, &when));
            }
        }
    }
}
