//! Translated source ports beside the node's own sockets, which may bind one, or be given one, that an
//! open flow has towards the same backend: SPEC L10 and N4. Needs root.

use std::{
    net::SocketAddr,
    ops::RangeInclusive,
    process::Command,
    time::{Duration, Instant},
};

use crate::web::{self, APP, NODE_PORT};
use shunt_lab::{Agent, AgentOptions, Client, Conn, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

/// Source ports per backend.
const PORTS: RangeInclusive<u16> = 20_000..=20_063;
/// How often the agent looks at the node's sysctls, and a little.
const LOOKED: Duration = Duration::from_secs(15);

/// The Service `web` of one pod, on this node.
fn start(xdp: &str, node: &str) -> (Lab, Agent, TempDir) {
    let lab = Lab::new().unwrap();
    let ports = [Port::tcp(APP), Port::udp(APP)];
    lab.add_pod(&PodSpec::new("web", node, &ports)).unwrap();
    let manifests = TempDir::new().unwrap();
    let endpoints = web::slices(&lab, &[("web", node, "")]);
    let objects = [web::service(), endpoints].join("---\n");
    web::write(manifests.path(), "web.yaml", &objects);
    let options = AgentOptions::manifests(manifests.path())
        .xdp(xdp)
        .args(&[
            "--snat-ports",
            &format!("{}-{}", PORTS.start(), PORTS.end()),
        ])
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps();
    let agent = lab.start_agent("node-a", &options).unwrap();
    (lab, agent, manifests)
}

/// Asks once, and returns the client's address as the pod sees it.
fn asks(conn: &Conn, text: &str, case: &str) -> SocketAddr {
    let answer = conn
        .ask(text)
        .unwrap_or_else(|error| panic!("{case}, {text}: {error}"));
    assert_eq!(
        (answer.server.as_str(), answer.echo.trim()),
        ("web", text),
        "{case}"
    );
    answer.seen_peer
}

/// A process binds the very address and port that a flow to the pod is translated to, and dials the
/// pod, or its Service.
fn a_process_binds(lab: &Lab, holder: &Client, held: SocketAddr, proto: Proto, pod: SocketAddr) {
    let service = web::CLUSTER_IPS[usize::from(pod.is_ipv6())]
        .parse()
        .unwrap();
    for to in [pod, SocketAddr::new(service, 80)] {
        for sockets in [Sockets::Hooked, Sockets::Unhooked] {
            for connected in [true, false] {
                if !connected && proto == Proto::Tcp {
                    continue;
                }
                let case =
                    format!("{proto} to {held}, and to {to}, {sockets:?}, connected {connected}");
                let theirs = holder.open(proto, held, &Dial::default()).unwrap();
                let seen = asks(&theirs, "theirs", &case);
                assert!(PORTS.contains(&seen.port()), "{case}: {seen}");
                asks(&theirs, "theirs", &case);
                let process = lab.client("node-a", sockets).unwrap();
                let dial = Dial {
                    connected,
                    ..Dial::from(seen)
                };
                let mine = process
                    .open(proto, to, &dial)
                    .unwrap_or_else(|error| panic!("{case} from {seen}: {error}"));
                assert_eq!(mine.local, seen, "{case}");
                for round in 0..3 {
                    let moved = asks(&mine, &format!("mine {round}"), &case);
                    assert_ne!(moved, seen, "{case}");
                    assert_eq!(
                        asks(&theirs, &format!("theirs {round}"), &case),
                        seen,
                        "{case}"
                    );
                }
            }
        }
    }
}

fn processes_share_no_port_with_flows(xdp: &str, node: &str) {
    let (lab, agent, _manifests) = start(xdp, node);
    for v6 in [false, true] {
        let ips = lab.ips("web").unwrap();
        let pod = *ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
        let pod = SocketAddr::new(pod, APP);
        let node_ip = lab.node_ips("node-a").unwrap()[usize::from(v6)];
        for proto in [Proto::Tcp, Proto::Udp] {
            // A client outside, and a process that dials by packets.
            for name in ["client", "node-a"] {
                if name == "client" && node == "node-a" {
                    // It keeps its own address and port.
                    continue;
                }
                let holder = lab.client(name, Sockets::Unhooked).unwrap();
                let held = SocketAddr::new(node_ip, NODE_PORT);
                a_process_binds(&lab, &holder, held, proto, pod);
            }
        }
    }
    drop(agent);
}

#[test]
fn processes_share_no_port_with_flows_with_xdp() {
    processes_share_no_port_with_flows("native", "node-b");
}

#[test]
fn processes_share_no_port_with_flows_without_xdp() {
    processes_share_no_port_with_flows("off", "node-b");
}

#[test]
fn processes_share_no_port_with_flows_to_pods_of_their_node() {
    processes_share_no_port_with_flows("off", "node-a");
}

/// A socket with an address of its own, where the way to the pod has another, keeps its port: what was
/// translated, and is seen once more where it leaves, is not taken for what the socket sends.
#[test]
fn what_leaves_by_another_address_is_translated_once() {
    let (lab, _agent, _manifests) = start("off", "node-b");
    let port = *PORTS.start();
    for (v6, own, len) in [(false, "192.0.2.77", "32"), (true, "2001:db8::77", "128")] {
        let add = ["address", "add", &format!("{own}/{len}"), "dev", "lo"];
        let node = lab.ns("node-a").unwrap();
        let status = node.run(|| Command::new("ip").args(add).status()).unwrap();
        assert!(status.success(), "ip {add:?}: {status}");
        let node_ip = lab.node_ips("node-a").unwrap()[usize::from(v6)];
        let to = SocketAddr::new(web::CLUSTER_IPS[usize::from(v6)].parse().unwrap(), 80);
        let process = lab.client("node-a", Sockets::Unhooked).unwrap();
        for (proto, connected) in [(Proto::Tcp, true), (Proto::Udp, true), (Proto::Udp, false)] {
            let case = format!("{proto} from {own}, connected {connected}");
            let dial = Dial {
                connected,
                ..Dial::from(SocketAddr::new(own.parse().unwrap(), port))
            };
            let conn = process.open(proto, to, &dial).unwrap();
            for round in 0..3 {
                let seen = asks(&conn, &format!("round {round}"), &case);
                assert_eq!(seen, SocketAddr::new(node_ip, port), "{case}");
            }
        }
    }
}

/// What `shunt status` says: how many ports no socket is given.
fn of_their_own(agent: &Agent) -> u64 {
    let status = agent.json(&["status"]).unwrap();
    status["snatPortsOfTheirOwn"].as_u64().unwrap()
}

/// Another `ip_local_port_range`, or other reserved ports, are seen without a restart: new flows keep
/// off what sockets are given, and open ones stay as they are.
#[test]
fn new_flows_keep_off_the_ports_that_sockets_are_given() {
    let (lab, agent, _manifests) = start("off", "node-b");
    let client = lab.client("client", Sockets::Unhooked).unwrap();
    let open = || {
        let ips = lab.node_ips("node-a").unwrap();
        let each = ips.map(|ip| {
            [Proto::Tcp, Proto::Udp].map(|proto| {
                let to = SocketAddr::new(ip, NODE_PORT);
                let conn = client.open(proto, to, &Dial::default()).unwrap();
                let seen = asks(&conn, "one", "opened");
                (conn, seen)
            })
        });
        each.into_iter().flatten()
    };
    let node = lab.ns("node-a").unwrap();
    let ports = PORTS.len() as u64;
    assert_eq!(of_their_own(&agent), ports);
    let mut conns: Vec<_> = (0..4).flat_map(|_| open()).collect();
    let cases = [
        ("20000 20055", "\n", 8, 20_056..=20_063),
        ("20000 20063", "20000-20011", 12, 20_000..=20_011),
        ("1024 65535", "\n", 0, PORTS),
        ("32768 60999", "\n", 64, PORTS),
    ];
    for (range, reserved, own, expected) in cases {
        node.sysctl(&[
            ("ipv4.ip_local_port_range", range),
            ("ipv4.ip_local_reserved_ports", reserved),
        ])
        .unwrap();
        let begun = Instant::now();
        while of_their_own(&agent) != own {
            assert!(
                begun.elapsed() < LOOKED,
                "{range}: {}",
                of_their_own(&agent)
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        for (conn, seen) in open() {
            assert!(expected.contains(&seen.port()), "{range}: {seen}");
            conns.push((conn, seen));
        }
        for (conn, seen) in &conns {
            assert_eq!(asks(conn, "on", range), *seen, "{range}");
        }
    }
    let check = |range: &str| {
        node.sysctl(&[("ipv4.ip_local_port_range", range)]).unwrap();
        String::from_utf8(agent.cli(&["check"]).unwrap().stdout).unwrap()
    };
    let text = check("1024 65535");
    assert!(
        text.contains("0 of 20000-20063; sockets are given 64 of them"),
        "{text}"
    );
    let text = check("32768 60999");
    assert!(
        text.contains("64 of 20000-20063; sockets are given 0 of them"),
        "{text}"
    );
}
