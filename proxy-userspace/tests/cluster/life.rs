//! What becomes of open flows when their backend goes. Needs root.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use crate::forged::Forger;
use crate::web::{self, APP, NODE_PORT};
use etherparse::PacketBuilderStep;
use shunt::datapath::maps::Maps;
use shunt_common::{
    family::{Family, V4},
    filter,
    layout::{TCP, UDP},
};
use shunt_lab::{
    Agent, AgentOptions, Client, Conn, Dial, DialError, Lab, NetNs, PodSpec, Port, Proto, Sockets,
};
use tempfile::TempDir;

const PODS: [(&str, &str); 2] = [("web-a", "node-a"), ("web-b", "node-b")];

/// Two nodes, a Service with endpoints by hand, and clients whose sockets no hook sees.
struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    manifests: TempDir,
}

impl Cluster {
    fn start(xdp: &str) -> Self {
        let lab = Lab::new().unwrap();
        for (pod, node) in PODS {
            lab.add_pod(&PodSpec::new(pod, node, &[Port::tcp(APP), Port::udp(APP)]))
                .unwrap();
        }
        for pod in ["packets", "hooked"] {
            lab.add_pod(&PodSpec::new(pod, "node-a", &[])).unwrap();
        }
        let manifests = TempDir::new().unwrap();
        let mut cluster = Self {
            agents: Vec::new(),
            lab,
            manifests,
        };
        cluster.write("service.yaml", &web::service());
        cluster.endpoints(&[("web-a", ""), ("web-b", "")]);
        let options = AgentOptions::manifests(cluster.manifests.path())
            .xdp(xdp)
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        for node in ["node-a", "node-b"] {
            let agent = cluster.lab.start_agent(node, &options).unwrap();
            cluster.agents.push(agent);
        }
        cluster
    }

    fn write(&self, file: &str, text: &str) {
        web::write(self.manifests.path(), file, text);
    }

    /// The endpoints of `web`, with conditions other than ready.
    fn endpoints(&self, pods: &[(&str, &str)]) {
        let node = |pod: &str| PODS.iter().find(|(name, _)| *name == pod).unwrap().1;
        let pods: Vec<_> = pods
            .iter()
            .map(|&(pod, conditions)| (pod, node(pod), conditions))
            .collect();
        self.write("endpoints.yaml", &web::slices(&self.lab, &pods));
    }

    /// Takes a pod off the network without a word.
    fn cut(&self, pod: &str) {
        let node = PODS.iter().find(|(name, _)| *name == pod).unwrap().1;
        let device = self.lab.device(pod).unwrap();
        self.lab
            .ns(node)
            .unwrap()
            .ip(&[format!("link set {device} down")])
            .unwrap();
    }

    fn ip(&self, name: &str, v6: bool) -> IpAddr {
        let ips = self.lab.ips(name).unwrap();
        ips.into_iter().find(|ip| ip.is_ipv6() == v6).unwrap()
    }

    /// Where each client finds the Service.
    fn ways(&self) -> Vec<(Client, SocketAddr)> {
        let mut ways = Vec::new();
        for v6 in [false, true] {
            let cluster_ip: IpAddr = ["10.96.0.1", "fd96::1"][usize::from(v6)].parse().unwrap();
            let client = |name| self.lab.client(name, Sockets::Unhooked).unwrap();
            ways.push((client("packets"), SocketAddr::new(cluster_ip, 80)));
            let node = self.lab.node_ips("node-a").unwrap()[usize::from(v6)];
            ways.push((client("client"), SocketAddr::new(node, NODE_PORT)));
        }
        ways
    }
}

/// A flow to a pod of that name.
fn open_to(client: &Client, proto: Proto, to: SocketAddr, pod: &str) -> Conn {
    open_with(client, proto, to, pod, &Dial::default())
}

fn open_with(client: &Client, proto: Proto, to: SocketAddr, pod: &str, dial: &Dial) -> Conn {
    for _ in 0..64 {
        let conn = client.open(proto, to, dial).unwrap();
        if conn.ask("first").unwrap().server == pod {
            return conn;
        }
    }
    panic!("{proto} {to}: {pod} was never chosen");
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{what}: not within 10 s"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// B7: while an endpoint serves its flows stay; when it does not, datagrams move on and connections
/// stay; when it is gone, connections are reset.
fn flows_of_a_backend_that_goes(xdp: &str) {
    let cluster = Cluster::start(xdp);
    let ways = cluster.ways();
    for leaving in ["web-b", "web-a"] {
        let other = if leaving == "web-a" { "web-b" } else { "web-a" };
        let open: Vec<_> = ways
            .iter()
            .map(|(client, to)| {
                (
                    open_to(client, Proto::Tcp, *to, leaving),
                    open_to(client, Proto::Udp, *to, leaving),
                    to,
                )
            })
            .collect();
        let server = |conn: &Conn| conn.ask("again").unwrap().server;

        // Terminating, and serving still: no flow moves.
        cluster.endpoints(&[
            (leaving, "ready: false, serving: true, terminating: true"),
            (other, ""),
        ]);
        let new_only_to_other = |(client, to): &(Client, SocketAddr)| {
            let counts = client.tcp_many(*to, 16).unwrap();
            counts.len() == 1 && counts.contains_key(other)
        };
        wait_until("new flows go elsewhere", || {
            ways.iter().all(new_only_to_other)
        });
        for (tcp, udp, to) in &open {
            assert_eq!(server(tcp), leaving, "{to}");
            assert_eq!(server(udp), leaving, "{to}");
        }

        // It serves no more, though it answers: the next datagram goes elsewhere.
        cluster.endpoints(&[
            (leaving, "ready: false, serving: false, terminating: true"),
            (other, ""),
        ]);
        for (tcp, udp, to) in &open {
            wait_until(&format!("{to}: datagrams move on"), || server(udp) == other);
            assert_eq!(server(tcp), leaving, "{to}");
        }

        // No endpoint any more, but it answers: connections go on.
        cluster.endpoints(&[(other, "")]);
        std::thread::sleep(Duration::from_millis(500));
        for _ in 0..3 {
            for (tcp, udp, to) in &open {
                assert_eq!(server(tcp), leaving, "{to}");
                assert_eq!(server(udp), other, "{to}");
            }
            std::thread::sleep(Duration::from_millis(1200));
        }

        // Gone without a word: connections end all the same.
        cluster.cut(leaving);
        std::thread::scope(|scope| {
            for (tcp, _, to) in &open {
                scope.spawn(move || {
                    let error = tcp
                        .ask_within("still there?", Duration::from_secs(30))
                        .unwrap_err();
                    assert!(error.is_reset(), "{to}: {error}");
                });
            }
        });

        if leaving == "web-b" {
            cluster.lab.remove(leaving).unwrap();
            let node = PODS.iter().find(|(name, _)| *name == leaving).unwrap().1;
            let ports = [Port::tcp(APP), Port::udp(APP)];
            cluster
                .lab
                .add_pod(&PodSpec::new(leaving, node, &ports))
                .unwrap();
            cluster.endpoints(&[("web-a", ""), ("web-b", "")]);
            wait_until("both are back", || {
                ways.iter().all(|(client, to)| {
                    client
                        .tcp_many(*to, 64)
                        .is_ok_and(|counts| counts.len() == 2)
                })
            });
        } else {
            // From some to none: the datagram is refused, not lost.
            cluster.endpoints(&[]);
            for (_, udp, to) in &open {
                wait_until(&format!("{to}: nobody left"), || {
                    udp.ask("anybody?").is_err_and(|error| error.is_refused())
                });
            }
        }
    }
}

#[test]
fn flows_of_a_backend_that_goes_with_xdp() {
    flows_of_a_backend_that_goes("native");
}

#[test]
fn flows_of_a_backend_that_goes_without_xdp() {
    flows_of_a_backend_that_goes("off");
}

/// Sends an RST that the receiver does not believe: almost every sequence number is out of its
/// window.
fn stray_reset(ns: &NetNs, from: SocketAddr, to: SocketAddr) {
    let send = || Forger::new()?.send(from, to, 0x1234_5678, PacketBuilderStep::rst);
    ns.run(send).unwrap();
}

/// L1: a connection that a stranger tries to reset, in the name of either side, is not forgotten
/// while it lives on.
fn stray_resets(xdp: &str) {
    let cluster = Cluster::start(xdp);
    let ways = cluster.ways();
    let open: Vec<Vec<Conn>> = PODS
        .iter()
        .map(|(pod, _)| {
            ways.iter()
                .map(|(client, to)| open_to(client, Proto::Tcp, *to, pod))
                .collect()
        })
        .collect();
    for ((pod, _), conns) in PODS.iter().zip(&open) {
        for (conn, (client, to)) in conns.iter().zip(&ways) {
            let seen = conn.ask("second").unwrap().seen_peer;
            stray_reset(&cluster.lab.ns(client.name()).unwrap(), conn.local, *to);
            let server = SocketAddr::new(cluster.ip(pod, to.is_ipv6()), APP);
            stray_reset(&cluster.lab.ns(pod).unwrap(), server, seen);
            assert_eq!(conn.ask("third").unwrap().server, *pod, "{to}");
        }
    }
    // What counts as closed goes after ten seconds, and is looked for every ten.
    std::thread::sleep(Duration::from_secs(22));
    for ((pod, _), conns) in PODS.iter().zip(&open) {
        // Forgotten, it would be taken for a new one, which goes elsewhere now.
        let other = PODS.iter().find(|(other, _)| other != pod).unwrap().0;
        cluster.endpoints(&[
            (other, ""),
            (pod, "ready: false, serving: true, terminating: true"),
        ]);
        let moved = |(client, to): &(Client, SocketAddr)| {
            let counts = client.tcp_many(*to, 16).unwrap();
            counts.len() == 1 && counts.contains_key(other)
        };
        wait_until("new flows go elsewhere", || ways.iter().all(moved));
        for (conn, (_, to)) in conns.iter().zip(&ways) {
            let answer = conn
                .ask("fourth")
                .unwrap_or_else(|error| panic!("{to} to {pod}: {error}"));
            assert_eq!(answer.server, *pod, "{to}");
        }
    }
}

#[test]
fn a_stray_reset_breaks_no_connection_with_xdp() {
    stray_resets("native");
}

#[test]
fn a_stray_reset_breaks_no_connection_without_xdp() {
    stray_resets("off");
}

/// B7 for sockets that are connected to nobody, where the hook sees each datagram: it goes where
/// the one before went while that endpoint serves, to another when it does not, and is refused when
/// there is none. In pods and on nodes, by every kind of frontend.
#[test]
fn datagrams_of_a_socket_leave_a_backend_that_goes() {
    let cluster = Cluster::start("off");
    let mut ways = Vec::new();
    for name in ["hooked", "node-a", "node-b"] {
        let client = || cluster.lab.client(name, Sockets::Hooked).unwrap();
        let node = if name == "node-b" { name } else { "node-a" };
        let node_ips = cluster.lab.node_ips(node).unwrap();
        let mut frontends: Vec<SocketAddr> = ["10.96.0.1", "fd96::1", "::ffff:10.96.0.1"]
            .map(|ip| SocketAddr::new(ip.parse().unwrap(), 80))
            .into();
        frontends.extend(node_ips.iter().map(|ip| SocketAddr::new(*ip, NODE_PORT)));
        if name != "hooked" {
            frontends.push(SocketAddr::from(([127, 0, 0, 1], NODE_PORT)));
        }
        ways.extend(frontends.into_iter().map(|to| (client(), to)));
    }
    let server = |conn: &Conn| conn.ask("again").unwrap().server;
    for (leaving, other) in [("web-b", "web-a"), ("web-a", "web-b")] {
        cluster.endpoints(&[("web-a", ""), ("web-b", "")]);
        wait_until("somebody is there", || {
            ways.iter().all(|(client, to)| client.udp(*to).is_ok())
        });
        let open: Vec<Conn> = ways
            .iter()
            .map(|(client, to)| open_to(client, Proto::Udp, *to, leaving))
            .collect();
        let new_only_to_other = || {
            ways.iter().all(|(client, to)| {
                let counts = client.udp_many(*to, 16).unwrap();
                counts.len() == 1 && counts.contains_key(other)
            })
        };
        cluster.endpoints(&[
            (leaving, "ready: false, serving: true, terminating: true"),
            (other, ""),
        ]);
        wait_until("new flows go elsewhere", new_only_to_other);
        for conn in &open {
            assert_eq!(server(conn), leaving, "{}", conn.peer);
        }
        cluster.endpoints(&[
            (leaving, "ready: false, serving: false, terminating: true"),
            (other, ""),
        ]);
        for conn in &open {
            wait_until(&format!("{}: datagrams move on", conn.peer), || {
                server(conn) == other
            });
        }
        cluster.endpoints(&[(leaving, "")]);
        for (conn, (_, to)) in open.iter().zip(&ways) {
            wait_until(&format!("{to}: and back"), || server(conn) == leaving);
            assert_eq!(conn.ask("who").unwrap().peer, *to, "the frontend answers");
        }
        cluster.endpoints(&[]);
        for conn in &open {
            wait_until(&format!("{}: nobody left", conn.peer), || {
                conn.ask("anybody?").is_err_and(|error| error.is_refused())
            });
        }
    }
}

/// What an application with the socket notices, if it tries until then.
fn error_within(conn: &Conn, time: Duration) -> DialError {
    let began = Instant::now();
    loop {
        match conn.ask_within("still there?", Duration::from_secs(10)) {
            Err(error) => return error,
            Ok(_) if began.elapsed() < time => std::thread::sleep(Duration::from_millis(50)),
            Ok(answer) => panic!("{} still answers", answer.server),
        }
    }
}

/// Asks until another server answers, as a client does that sends something now and then.
fn moves(conn: &Conn, to: &str) -> bool {
    (0..50).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        conn.ask_within("again", Duration::from_millis(400))
            .is_ok_and(|answer| answer.server == to)
    })
}

/// B7 in a pod and on the node: a connected UDP socket goes on with another backend when its endpoint
/// does not serve any more, a TCP one that the hook connected is reset or closed when its pod is gone
/// and does not answer. Nobody touches a socket that dialled the pod itself.
#[test]
fn connected_sockets_do_not_stay_with_a_backend_that_goes() {
    let cluster = Cluster::start("off");
    let connected = Dial {
        connected: true,
        ..Dial::default()
    };
    let clients =
        ["hooked", "node-a"].map(|name| cluster.lab.client(name, Sockets::Hooked).unwrap());
    let ways: Vec<(&Client, SocketAddr, bool)> = clients
        .iter()
        .flat_map(|client| {
            [
                ("10.96.0.1", false),
                ("fd96::1", true),
                ("::ffff:10.96.0.1", false),
            ]
            .map(|(ip, v6)| (client, SocketAddr::new(ip.parse().unwrap(), 80), v6))
        })
        .collect();
    let server = |conn: &Conn| conn.ask("again").unwrap().server;
    let open_all = |pod| -> Vec<(Conn, Conn)> {
        let open = |&(client, to, _): &(&Client, SocketAddr, bool)| {
            (
                open_to(client, Proto::Tcp, to, pod),
                open_with(client, Proto::Udp, to, pod, &connected),
            )
        };
        ways.iter().map(open).collect()
    };

    let open = open_all("web-b");
    let direct: Vec<[Conn; 2]> = ways
        .iter()
        .map(|&(client, _, v6)| {
            let to = SocketAddr::new(cluster.ip("web-b", v6), APP);
            [Proto::Tcp, Proto::Udp].map(|proto| open_with(client, proto, to, "web-b", &connected))
        })
        .collect();
    let direct_ones_live = || {
        direct
            .iter()
            .flatten()
            .for_each(|conn| assert_eq!(server(conn), "web-b"))
    };

    // While it serves, nothing happens.
    cluster.endpoints(&[
        ("web-b", "ready: false, serving: true, terminating: true"),
        ("web-a", ""),
    ]);
    std::thread::sleep(Duration::from_secs(1));
    for (tcp, udp) in &open {
        assert_eq!((server(tcp), server(udp)), ("web-b".into(), "web-b".into()));
    }

    cluster.endpoints(&[
        ("web-b", "ready: false, serving: false, terminating: true"),
        ("web-a", ""),
    ]);
    for ((tcp, udp), (client, to, _)) in open.iter().zip(&ways) {
        assert!(moves(udp, "web-a"), "{to}");
        assert_eq!(client.udp_connected(*to).unwrap().server, "web-a");
        assert_eq!(server(tcp), "web-b", "{to}");
    }
    // No endpoint any more, but the pod answers.
    cluster.endpoints(&[("web-a", "")]);
    std::thread::sleep(Duration::from_secs(2));
    open.iter()
        .for_each(|(tcp, _)| assert_eq!(server(tcp), "web-b"));
    direct_ones_live();

    // From one to none.
    let last = open_all("web-a");
    cluster.endpoints(&[]);
    for ((tcp, udp), (client, to, _)) in last.iter().zip(&ways) {
        let error = error_within(udp, Duration::from_secs(10));
        assert!(error.is_refused(), "{to}: {error}");
        assert!(client.udp_connected(*to).unwrap_err().is_refused(), "{to}");
        assert_eq!(server(tcp), "web-a", "{to}");
    }
    // And back: the same sockets, twice without a backend by now.
    cluster.endpoints(&[("web-b", "")]);
    for ((_, udp), (_, to, _)) in last.iter().chain(&open).zip(ways.iter().chain(&ways)) {
        assert!(moves(udp, "web-b"), "{to}");
    }
    cluster.endpoints(&[]);
    direct_ones_live();

    // Gone without a word: the kernel would try for a quarter of an hour.
    cluster.cut("web-b");
    cluster.cut("web-a");
    std::thread::scope(|scope| {
        for ((tcp, _), (client, to, _)) in open.iter().chain(&last).zip(ways.iter().chain(&ways)) {
            // The node's own are closed by the agent.
            let (expected, within) = if std::ptr::eq(*client, &clients[0]) {
                (libc::ECONNRESET, 15)
            } else {
                (libc::ECONNABORTED, 60)
            };
            scope.spawn(move || {
                let error = tcp
                    .ask_within("still there?", Duration::from_secs(within))
                    .unwrap_err();
                assert!(
                    matches!(error, DialError::Os { errno, .. } if errno == expected),
                    "{to}: {error}"
                );
            });
        }
        for [tcp, _] in &direct {
            scope.spawn(move || {
                let error = tcp
                    .ask_within("still there?", Duration::from_secs(20))
                    .unwrap_err();
                assert!(error.is_timeout(), "{}: {error}", tcp.peer);
            });
        }
    });

    // Packets to those addresses are looked at as long as there are such sockets.
    let maps = Maps::open(cluster.agents[0].bpf_root()).unwrap();
    let IpAddr::V4(ip) = cluster.ip("web-b", false) else {
        unreachable!("asked for IPv4")
    };
    let is_seen = || {
        [TCP, UDP].map(|proto| {
            let bit = filter::stale::<V4>(V4::words(ip.octets()), APP, proto);
            let (word, mask) = filter::word_and_mask(bit);
            maps.filter.get(word).unwrap() & mask != 0
        })
    };
    assert_eq!(is_seen(), [true, true]);
    drop((open, last));
    let began = Instant::now();
    while is_seen() != [false, false] {
        assert!(began.elapsed() < Duration::from_secs(60), "for good");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A pod's sockets need no program on its device, which it does not get while there is no agent.
#[test]
fn a_pod_that_comes_without_an_agent_is_served_by_the_socket_hook() {
    let mut cluster = Cluster::start("off");
    for agent in &mut cluster.agents {
        agent.stop().unwrap();
    }
    cluster
        .lab
        .add_pod(&PodSpec::new("late", "node-a", &[]))
        .unwrap();
    let client = cluster.lab.client("late", Sockets::Hooked).unwrap();
    let connected = Dial {
        connected: true,
        ..Dial::default()
    };
    for ip in ["10.96.0.1", "fd96::1", "::ffff:10.96.0.1"] {
        let to = SocketAddr::new(ip.parse().unwrap(), 80);
        for proto in [Proto::Tcp, Proto::Udp] {
            let conn = client.open(proto, to, &connected).unwrap();
            assert_eq!(conn.ask("who").unwrap().peer, to, "{proto}");
        }
        assert_eq!(client.udp(to).unwrap().peer, to);
    }
}
