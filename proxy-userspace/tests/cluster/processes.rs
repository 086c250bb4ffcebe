//! SPEC N3: processes of the node reach every frontend without the socket hook. Needs root.
//!
//! `networks` has every frontend on every network; here is what they do beside dialling.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    time::Duration,
};

use shunt_lab::{Agent, AgentOptions, Client, Cni, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

const APP: u16 = 8080;
/// Where a process of node-a is a backend, and another Service's node port at once: what goes there
/// by a Service is not translated again.
const HOST_APP: u16 = 30_099;
/// Where a process of node-b is one.
const OTHER_HOST_APP: u16 = 8090;
const WAIT: Duration = Duration::from_millis(1500);
/// Less than a SYN's first time-out.
const BEFORE_RESENDING: Duration = Duration::from_millis(950);
const SOON: Duration = Duration::from_millis(400);

/// Services by the last byte of their cluster IPs: of a pod on node-a, of one on node-b, of a process
/// of node-a, of one of node-b, and of nobody.
const SERVICES: [(u8, &str); 5] = [
    (1, "near"),
    (2, "far"),
    (3, "host-a"),
    (4, "host-b"),
    (5, "none"),
];

struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    manifests: TempDir,
    /// They serve as long as they live.
    _servers: Vec<Client>,
}

fn node_port(number: u8) -> u16 {
    30_080 + u16::from(number)
}

fn cluster_ip(number: u8, v6: bool) -> IpAddr {
    match v6 {
        false => IpAddr::from([10, 96, 0, number]),
        true => format!("fd96::{number}").parse().unwrap(),
    }
}

impl Cluster {
    fn start(xdp: &str) -> Self {
        Self::start_in(Self::strict(), xdp, "off")
    }

    fn strict() -> Lab {
        Lab::builder().strict_rp_filter().build().unwrap()
    }

    /// With pods on bridges, whose ports get frames that are addressed to the bridge.
    fn start_bridged(xdp: &str) -> Self {
        let lab = Lab::builder().cni(Cni::Bridge).build().unwrap();
        let cluster = Self::start_in(lab, xdp, "off");
        // By itself it takes a port's address.
        let bridge = ["link", "set", "cni0", "address", "02:00:00:00:00:fe"];
        for node in ["node-a", "node-b"] {
            cluster.ip(node, &bridge);
        }
        cluster
    }

    /// Runs `ip` on a node.
    fn ip(&self, node: &str, args: &[&str]) {
        let command = || Command::new("ip").args(args).status();
        let status = self.lab.ns(node).unwrap().run(command).unwrap();
        assert!(status.success(), "ip {args:?} on {node}: {status}");
    }

    fn start_in(lab: Lab, xdp: &str, socket_lb: &str) -> Self {
        let ports = [Port::tcp(APP), Port::udp(APP)];
        lab.add_pod(&PodSpec::new("near", "node-a", &ports))
            .unwrap();
        lab.add_pod(&PodSpec::new("far", "node-b", &ports)).unwrap();
        let manifests = TempDir::new().unwrap();
        let servers = ["node-a", "node-b"].map(|node| {
            let client = lab.client(node, Sockets::Unhooked).unwrap();
            let listen: Vec<_> = lab
                .node_ips(node)
                .unwrap()
                .into_iter()
                .flat_map(|ip| {
                    let app = if node == "node-a" {
                        HOST_APP
                    } else {
                        OTHER_HOST_APP
                    };
                    [Proto::Tcp, Proto::Udp].map(|proto| (proto, SocketAddr::new(ip, app)))
                })
                .collect();
            client
                .serve(&node.replace("node", "host"), &listen)
                .unwrap();
            client
        });
        let cluster = Self {
            agents: Vec::new(),
            lab,
            manifests,
            _servers: servers.into(),
        };
        for (number, name) in SERVICES {
            cluster.write(number, name, name);
        }
        let options = AgentOptions::manifests(cluster.manifests.path())
            .xdp(xdp)
            .args(&["--socket-lb", socket_lb])
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        let agents = ["node-a", "node-b"]
            .map(|node| cluster.lab.start_agent(node, &options).unwrap())
            .into();
        Self { agents, ..cluster }
    }

    /// Writes a Service, and who is behind it.
    fn write(&self, number: u8, name: &str, backend: &str) {
        // The last one's node port is where the nodes' own backends listen.
        let node_port = if number == 5 {
            HOST_APP
        } else {
            node_port(number)
        };
        let port = |proto: &str| {
            format!(
                "{{ name: {}, protocol: {proto}, port: 80, nodePort: {node_port} }}",
                proto.to_lowercase()
            )
        };
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec:\n  type: NodePort\n  \
             clusterIP: 10.96.0.{number}\n  clusterIPs: [10.96.0.{number}, 'fd96::{number}']\n  \
             ipFamilies: [IPv4, IPv6]\n  ports: [{}, {}]\n",
            port("TCP"),
            port("UDP"),
        );
        let (ips, app) = match backend {
            "none" => (Vec::new(), APP),
            "near" | "far" => (self.lab.ips(backend).unwrap(), APP),
            host => (
                self.lab
                    .node_ips(&host.replace("host", "node"))
                    .unwrap()
                    .to_vec(),
                if host == "host-a" {
                    HOST_APP
                } else {
                    OTHER_HOST_APP
                },
            ),
        };
        let node = match backend {
            "near" | "host-a" => "node-a",
            _ => "node-b",
        };
        for ip in ips {
            let family = if ip.is_ipv6() { 6 } else { 4 };
            text += &format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{ name: {name}-{family}, \
                 labels: {{ kubernetes.io/service-name: {name} }} }}\naddressType: IPv{family}\n\
                 ports: [{{ name: tcp, protocol: TCP, port: {app} }}, {{ name: udp, protocol: UDP, port: {app} }}]\n\
                 endpoints: [{{ addresses: ['{ip}'], nodeName: {node}, conditions: {{ ready: true }} }}]\n",
            );
        }
        let path = self.manifests.path().join(format!("{name}.yaml"));
        replace(&path, &text);
    }

    fn client(&self) -> Client {
        self.lab.client("node-a", Sockets::Unhooked).unwrap()
    }

    /// Addresses by which node-a reaches a Service.
    fn frontends(&self, number: u8, v6: bool) -> Vec<SocketAddr> {
        let port = node_port(number);
        let node = self.lab.node_ips("node-a").unwrap()[usize::from(v6)];
        // `connect` to none means this host.
        let (loopback, none) = match v6 {
            false => ("127.0.0.1", "0.0.0.0"),
            true => ("::1", "::"),
        };
        vec![
            SocketAddr::new(cluster_ip(number, v6), 80),
            SocketAddr::new(node, port),
            SocketAddr::new(loopback.parse().unwrap(), port),
            SocketAddr::new(none.parse().unwrap(), port),
        ]
    }
}

fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

/// Backends with addresses of nodes, a socket that asks two Services, `0.0.0.0`, refusals, and what
/// nobody has.
fn packets_alone_are_enough(cluster: &Cluster) {
    let client = cluster.client();
    let dial = Dial::within(WAIT);
    let mut failures = Vec::new();
    for (number, name) in &SERVICES[..4] {
        for v6 in [false, true] {
            for to in cluster.frontends(*number, v6) {
                for proto in [Proto::Tcp, Proto::Udp] {
                    let unspecified = to.ip().is_unspecified();
                    for connected in [false, true] {
                        if connected && proto == Proto::Tcp {
                            continue;
                        }
                        let answer = if connected {
                            client.udp_connected(to)
                        } else {
                            client.once(proto, to, &dial)
                        };
                        match answer {
                            Ok(answer)
                                if answer.server == *name && (unspecified || answer.peer == to) => {
                            }
                            Ok(answer) => failures.push(format!(
                                "{proto} {to}: {} answered as {}",
                                answer.server, answer.peer
                            )),
                            Err(error) => failures.push(format!(
                                "{proto} {to} ({name}, connected {connected}): {error}"
                            )),
                        }
                    }
                }
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{}\n{}",
        failures.join("\n"),
        cluster.agents[0].output()
    );

    for v6 in [false, true] {
        // P6: at once.
        let nobody = SocketAddr::new(cluster_ip(5, v6), 80);
        let no_port = SocketAddr::new(cluster_ip(1, v6), 81);
        for to in [nobody, no_port] {
            for _ in 0..100 {
                let began = std::time::Instant::now();
                let error = client.tcp(to).unwrap_err().to_string();
                assert!(error.contains("refused"), "{to}: {error}");
                assert!(began.elapsed() < SOON, "{to}: {:?}", began.elapsed());
            }
            let error = client.udp_connected(to).unwrap_err().to_string();
            assert!(error.contains("refused"), "{to}: {error}");
        }
        // F12: it goes nowhere.
        let unknown = SocketAddr::new(cluster_ip(200, v6), 80);
        let before = dropped(&cluster.agents[0]);
        client
            .once(Proto::Udp, unknown, &Dial::within(SOON))
            .unwrap_err();
        assert!(dropped(&cluster.agents[0]) > before, "{unknown}");
    }
}

fn dropped(agent: &Agent) -> u64 {
    let status = agent.json(&["status"]).unwrap();
    status["events"]["unknown_address"].as_u64().unwrap()
}

#[test]
fn packets_alone_are_enough_with_tc() {
    packets_alone_are_enough(&Cluster::start("off"));
}

#[test]
fn packets_alone_are_enough_with_xdp() {
    packets_alone_are_enough(&Cluster::start("native"));
}

#[test]
fn packets_alone_are_enough_where_pods_are_bridged() {
    packets_alone_are_enough(&Cluster::start_bridged("off"));
}

/// `connect` to no address means this host, for sockets that the hook sees too: it leaves them to
/// packets.
#[test]
fn the_unspecified_address_is_this_host_with_the_socket_hook() {
    let cluster = Cluster::start_in(Cluster::strict(), "off", "on");
    for sockets in [Sockets::Hooked, Sockets::Unhooked] {
        let client = cluster.lab.client("node-a", sockets).unwrap();
        for (number, name) in &SERVICES[..4] {
            for v6 in [false, true] {
                let to = cluster.frontends(*number, v6)[3];
                for (proto, connected) in
                    [(Proto::Tcp, true), (Proto::Udp, false), (Proto::Udp, true)]
                {
                    let dial = Dial {
                        connected,
                        ..Dial::within(WAIT)
                    };
                    let answer = client.once(proto, to, &dial).unwrap_or_else(|error| {
                        panic!("{sockets:?}, {proto} {to} ({name}, connected {connected}): {error}")
                    });
                    assert_eq!(answer.server, *name, "{sockets:?}, {proto} {to}");
                }
            }
        }
    }
}

/// The first packet goes where it should though the kernel does not know the next hop's MAC address
/// yet, and has another way for it: no datagram is lost, and no SYN sent again.
#[test]
fn first_packets_wait_for_their_neighbour() {
    for cluster in [Cluster::start("native"), Cluster::start_bridged("off")] {
        let client = cluster.client();
        for (number, name) in &SERVICES[..4] {
            for v6 in [false, true] {
                for to in cluster.frontends(*number, v6) {
                    for proto in [Proto::Udp, Proto::Tcp] {
                        cluster.ip("node-a", &["neigh", "flush", "all"]);
                        let answer = client.once(proto, to, &Dial::within(BEFORE_RESENDING));
                        let answer =
                            answer.unwrap_or_else(|e| panic!("{proto} {to} ({name}): {e}"));
                        assert_eq!(answer.server, *name, "{proto} {to}");
                    }
                }
            }
        }
    }
}

/// B7 and L4: open connections of processes go on through a restart of the agent, and datagrams go
/// to another backend when theirs is gone, by the same socket.
#[test]
fn connections_of_processes_outlive_the_agent() {
    let mut cluster = Cluster::start("off");
    let client = cluster.client();
    let dial = Dial::within(WAIT);
    let mut open = Vec::new();
    for (number, name) in &SERVICES[..4] {
        for v6 in [false, true] {
            for to in cluster.frontends(*number, v6) {
                for proto in [Proto::Tcp, Proto::Udp] {
                    let conn = client.open(proto, to, &dial).unwrap();
                    assert_eq!(conn.ask("one").unwrap().server, *name, "{proto} {to}");
                    open.push((conn, *name, proto, to));
                }
            }
        }
    }
    cluster.agents[0].kill().unwrap();
    for (conn, name, proto, to) in &open {
        assert_eq!(conn.ask("two").unwrap().server, *name, "{proto} {to}");
    }
    cluster.agents[0].restart().unwrap();
    for (conn, name, proto, to) in &open {
        assert_eq!(conn.ask("three").unwrap().server, *name, "{proto} {to}");
    }
    // Another backend for one Service: connections stay, datagrams go.
    cluster.write(1, "near", "far");
    let moved = |conn: &shunt_lab::Conn| {
        (0..50).any(|_| {
            std::thread::sleep(Duration::from_millis(100));
            conn.ask_within("four", SOON)
                .is_ok_and(|answer| answer.server == "far")
        })
    };
    for (conn, name, proto, to) in &open {
        if *name != "near" {
            assert_eq!(conn.ask("four").unwrap().server, *name, "{proto} {to}");
        } else if *proto == Proto::Udp {
            assert!(moved(conn), "{to} stays");
        }
    }
    for (conn, name, proto, to) in &open {
        if *name == "near" && *proto == Proto::Tcp {
            assert_eq!(conn.ask("five").unwrap().server, "near", "{to}");
        }
    }
}
