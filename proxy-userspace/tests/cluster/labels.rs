//! Each answer bears the address that was asked, whatever else the same socket or source port has
//! asked: SPEC N5 and N6. Needs root.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::web;
use shunt_lab::{Agent, AgentOptions, Client, Conn, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

/// Services, in turn of the one pod and the other.
const SERVICES: u8 = 12;
const PODS: [(&str, &str); 2] = [("near", "node-a"), ("far", "node-b")];
const SOON: Duration = Duration::from_secs(2);
/// Who asks: from where, and whether by the socket hook.
const CLIENTS: [(&str, Sockets); 4] = [
    ("pod", Sockets::Hooked),
    ("pod", Sockets::Unhooked),
    ("node-a", Sockets::Hooked),
    ("node-a", Sockets::Unhooked),
];

struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    _manifests: TempDir,
}

impl Cluster {
    fn start() -> Self {
        let lab = Lab::new().unwrap();
        let ports = [Port::tcp(web::APP), Port::udp(web::APP)];
        for (pod, node) in PODS {
            lab.add_pod(&PodSpec::new(pod, node, &ports)).unwrap();
        }
        lab.add_pod(&PodSpec::new("pod", "node-a", &[])).unwrap();
        let manifests = TempDir::new().unwrap();
        let mut text = String::new();
        for number in 1..=SERVICES {
            let (app, _) = PODS[usize::from(number) % 2];
            let ips = ["10.96.0.", "fd96::"].map(|net| format!("'{net}{number}'"));
            let port = |proto: &str| {
                format!(
                    "{{ name: {}, protocol: {proto}, port: 53, targetPort: {} }}",
                    proto.to_lowercase(),
                    web::APP
                )
            };
            write!(
                text,
                "apiVersion: v1\nkind: Service\nmetadata: {{ name: s{number} }}\nspec:\n  clusterIP: {}\n  \
                 clusterIPs: [{}]\n  ipFamilies: [IPv4, IPv6]\n  selector: {{ app: {app} }}\n  ports: [{}, {}]\n---\n",
                ips[0],
                ips.join(", "),
                port("TCP"),
                port("UDP"),
            )
            .unwrap();
        }
        for (pod, node) in PODS {
            let ips = lab.ips(pod).unwrap();
            write!(
                text,
                "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {pod}, labels: {{ app: {pod} }} }}\n\
                 spec: {{ nodeName: {node}, containers: [{{ name: app }}] }}\n\
                 status: {{ podIP: '{}', podIPs: [{{ ip: '{}' }}, {{ ip: '{}' }}], \
                 conditions: [{{ type: Ready, status: \"True\" }}] }}\n---\n",
                ips[0], ips[0], ips[1],
            )
            .unwrap();
        }
        web::write(manifests.path(), "services.yaml", &text);
        let options = AgentOptions::manifests(manifests.path())
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

    fn client(&self, (name, sockets): (&str, Sockets)) -> Client {
        self.lab.client(name, sockets).unwrap()
    }

    /// An address of a client's own.
    fn source(&self, name: &str, v6: bool) -> IpAddr {
        if name == "pod" {
            self.pod(name, v6)
        } else {
            self.lab.node_ips(name).unwrap()[usize::from(v6)]
        }
    }

    fn pod(&self, name: &str, v6: bool) -> IpAddr {
        let ips = self.lab.ips(name).unwrap();
        *ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap()
    }

    /// The pods themselves.
    fn direct(&self, v6: bool) -> [SocketAddr; 2] {
        PODS.map(|(pod, _)| SocketAddr::new(self.pod(pod, v6), web::APP))
    }
}

/// Numbers that look random and are the same in each run (xorshift64, Marsaglia 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// A Service.
fn service(number: u8, v6: bool) -> SocketAddr {
    let ip = if v6 {
        format!("fd96::{number}").parse().unwrap()
    } else {
        IpAddr::from([10, 96, 0, number])
    };
    SocketAddr::new(ip, 53)
}

/// One question by a socket that stays open, and who is said to have answered.
fn asks(conn: &Conn, to: SocketAddr, case: &str) {
    let answer = conn
        .ask_within("who", SOON)
        .unwrap_or_else(|error| panic!("{case}, to {to}: {error}"));
    assert_eq!(answer.peer, to, "{case}");
}

/// Asks one after the other: the answers to a pod's unconnected socket that are under way when it turns
/// from a Service to the pod itself are the pod's.
fn turns_to_each(socket: &Conn, to: &[SocketAddr], case: &str) {
    for _ in 0..2 {
        for &to in to {
            socket.turn(to).unwrap();
            asks(socket, to, case);
        }
    }
}

/// N6: a resolver with many upstreams, a sender of metrics. All questions are under way at once,
/// and the pods behind the Services are asked among them.
#[test]
fn one_socket_asks_any_number_of_services() {
    let cluster = Cluster::start();
    for (name, sockets) in CLIENTS {
        let client = cluster.client((name, sockets));
        for v6 in [false, true] {
            let case = format!("{name}, {sockets:?}");
            let mut to: Vec<_> = (1..=SERVICES).map(|n| service(n, v6)).collect();
            to.extend(cluster.direct(v6));
            let socket = client.open_udp(to[0], &Dial::default()).unwrap();
            turns_to_each(&socket, &to, &case);
            for round in 0..4 {
                let answers = socket.ask_all(&to, SOON).unwrap();
                for (answer, to) in answers.iter().zip(&to) {
                    let answer = answer
                        .as_ref()
                        .unwrap_or_else(|error| panic!("{case}, {to}, round {round}: {error}"));
                    assert_eq!(answer.peer, *to, "{case}, round {round}");
                }
                to.reverse();
            }
        }
    }
}

/// N5: a UDP socket that asks a Service, then the pod behind it, and the Service again; one that is
/// connected is connected anew.
#[test]
fn a_socket_that_turns_to_another_peer_sees_that_one() {
    let cluster = Cluster::start();
    for (name, sockets) in CLIENTS {
        let client = cluster.client((name, sockets));
        for v6 in [false, true] {
            let [near, far] = cluster.direct(v6);
            let (of_far, of_near) = (service(1, v6), service(2, v6));
            for connected in [false, true] {
                let dial = Dial {
                    connected,
                    ..Dial::default()
                };
                let socket = client.open_udp(of_far, &dial).unwrap();
                assert_eq!(socket.peer, of_far);
                for (turn, to) in [of_far, far, of_near, near, of_far, of_near, far, near]
                    .into_iter()
                    .enumerate()
                {
                    let case = format!("{name}, {sockets:?}, connected {connected}, turn {turn}");
                    assert_eq!(socket.turn(to).unwrap(), to, "{case}");
                    asks(&socket, to, &case);
                }
            }
        }
    }
}

/// N5: connections from one source port to the pod and to Services of that pod at once, whichever
/// was first.
#[test]
fn one_source_port_asks_the_service_and_its_pod_at_once() {
    let cluster = Cluster::start();
    let mut port = 40_000;
    for (name, sockets) in CLIENTS {
        let client = cluster.client((name, sockets));
        for v6 in [false, true] {
            let [near, far] = cluster.direct(v6);
            let ways = [
                [service(1, v6), far, service(3, v6)],
                [far, service(1, v6), service(3, v6)],
                [service(2, v6), service(4, v6), near],
                [near, service(2, v6), service(4, v6)],
            ];
            for to in ways {
                for proto in [Proto::Tcp, Proto::Udp] {
                    port += 1;
                    let dial = Dial {
                        connected: true,
                        timeout: SOON,
                        ..Dial::from(SocketAddr::new(cluster.source(name, v6), port))
                    };
                    let case = format!("{name}, {sockets:?}, {proto} from {port} to {to:?}");
                    let mut open = Vec::new();
                    for to in to {
                        match client.open(proto, to, &dial) {
                            Ok(conn) => open.push((conn, to)),
                            // The kernel itself does not have it twice.
                            Err(error)
                                if proto == Proto::Tcp
                                    && (name, sockets) == ("node-a", Sockets::Hooked) =>
                            {
                                assert!(error.to_string().contains("assign"), "{case}: {error}");
                            }
                            Err(error) => panic!("{case}: {error}"),
                        }
                        for (conn, to) in &open {
                            assert_eq!(conn.peer, *to, "{case}");
                            asks(conn, *to, &case);
                        }
                    }
                    for (conn, to) in open.iter().rev() {
                        asks(conn, *to, &case);
                    }
                }
            }
        }
    }
}

/// N5 and N6: questions to Services and to the pods behind them in any order, from two source ports;
/// datagrams many at once, connections open at once. Each answer bears the address that was asked,
/// and comes from a pod that is behind it.
#[test]
fn each_answer_bears_the_address_that_was_asked() {
    const STEPS: usize = 150;
    let cluster = Cluster::start();
    let mut random = Random(0x5eed);
    for (name, sockets) in CLIENTS {
        let client = cluster.client((name, sockets));
        for v6 in [false, true] {
            let mut to: Vec<_> = (1..=6)
                .map(|n| (service(n, v6), PODS[usize::from(n) % 2].0))
                .collect();
            to.extend(cluster.direct(v6).into_iter().zip(PODS.map(|(pod, _)| pod)));
            let source = cluster.source(name, v6);
            let ports = [41_001, 41_002].map(|port| SocketAddr::new(source, port));
            let datagrams = ports.map(|from| client.open_udp(to[0].0, &Dial::from(from)).unwrap());
            let addresses: Vec<_> = to.iter().map(|(to, _)| *to).collect();
            for socket in &datagrams {
                turns_to_each(socket, &addresses, name);
            }
            let mut open: Vec<(Conn, usize, usize)> = Vec::new();
            let mut done = String::new();
            for step in 0..STEPS {
                let case = format!("{name}, {sockets:?}, step {step}");
                if random.below(2) == 0 {
                    let asked: Vec<_> = (0..=random.below(6))
                        .map(|_| to[random.below(to.len())])
                        .collect();
                    let addresses: Vec<_> = asked.iter().map(|(to, _)| *to).collect();
                    let answers = datagrams[random.below(2)]
                        .ask_all(&addresses, SOON)
                        .unwrap();
                    for (answer, (to, pod)) in answers.iter().zip(asked) {
                        let answer = answer
                            .as_ref()
                            .unwrap_or_else(|error| panic!("{case}, {to}: {error}"));
                        let is = (answer.peer, answer.server.as_str());
                        assert_eq!(is, (to, pod), "{case}");
                    }
                    continue;
                }
                let (port, choice) = (random.below(2), random.below(to.len()));
                let address = to[choice].0;
                let known = open.iter().position(|(_, p, c)| (*p, *c) == (port, choice));
                match known {
                    Some(index) if random.below(3) == 0 => {
                        writeln!(done, "{step}: close {port} {address}").unwrap();
                        drop(open.swap_remove(index));
                    }
                    Some(_) => {}
                    None => {
                        let dial = Dial {
                            timeout: SOON,
                            ..Dial::from(ports[port])
                        };
                        match client.open(Proto::Tcp, address, &dial) {
                            Ok(conn) => {
                                writeln!(done, "{step}: open {port} {address}").unwrap();
                                open.push((conn, port, choice));
                            }
                            // The kernel has that connection, or has just had it.
                            Err(error) if error.to_string().contains("assign") => {}
                            Err(error) => panic!("{case}, {address}: {error}"),
                        }
                    }
                }
                for (conn, _, choice) in &open {
                    let (address, pod) = (to[*choice].0, to[*choice].1);
                    let answer = conn.ask_within("who", SOON).unwrap_or_else(|error| {
                        let flows = cluster.agents[0].json(&["conntrack", "list"]).unwrap();
                        panic!("{case}, {address}: {error} after\n{done}with {flows:#}")
                    });
                    assert_eq!(
                        (answer.peer, answer.server.as_str()),
                        (address, pod),
                        "{case}"
                    );
                }
            }
            // Most were not refused by the kernel itself.
            assert!(open.len() >= 3, "{name}, {sockets:?}: {}", open.len());
        }
    }
}
