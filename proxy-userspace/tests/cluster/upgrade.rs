//! From one map layout to another while clients are served (SPEC L4). Needs root.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use crate::web::{self, APP, NODE_PORT};
use shunt_common::layout::LAYOUT_VERSION;
use shunt_lab::{Agent, AgentOptions, Client, Conn, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

fn write(lab: &Lab, manifests: &Path) {
    let endpoints = web::slices(lab, &[("web-a", "node-a", ""), ("web-b", "node-b", "")]);
    web::write(manifests, "web.yaml", &[web::service(), endpoints].join("---\n"));
}

/// What the node's programs are attached to.
fn links(agent: &Agent) -> Vec<(String, String)> {
    let status = agent.json(&["status"]).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let links = status["links"].as_array().unwrap();
    let mut links: Vec<_> = links
        .iter()
        .map(|link| {
            assert_eq!(link["attached"], true, "{link}");
            (text(&link["target"]), text(&link["program"]))
        })
        .collect();
    links.sort();
    links
}

struct Open {
    conn: Conn,
    server: String,
    what: String,
}

fn open(client: &Client, to: SocketAddr) -> Vec<Open> {
    let connected = Dial {
        connected: true,
        ..Dial::default()
    };
    [Proto::Tcp, Proto::Udp]
        .into_iter()
        .cycle()
        .take(8)
        .map(|proto| {
            let conn = client.open(proto, to, &connected).unwrap();
            conn.ask("first").unwrap();
            Open {
                server: conn.ask("second").unwrap().server,
                what: format!("{proto} {to} from {}", client.name()),
                conn,
            }
        })
        .collect()
}

/// Agents of this layout take over from ones whose pins have another layout's number: open flows keep their backends, new ones are
/// answered all the while, and nothing of the other layout is left.
fn another_layout_is_taken_over_under_load(xdp: &str) {
    let lab = Lab::new().unwrap();
    for (pod, node) in [("web-a", "node-a"), ("web-b", "node-b")] {
        lab.add_pod(&PodSpec::new(pod, node, &[Port::tcp(APP), Port::udp(APP)]))
            .unwrap();
    }
    for pod in ["hooked", "packets"] {
        lab.add_pod(&PodSpec::new(pod, "node-a", &[])).unwrap();
    }
    let manifests = TempDir::new().unwrap();
    write(&lab, manifests.path());
    let options = AgentOptions::manifests(manifests.path())
        .xdp(xdp)
        .args(&["--max-flows", "16384", "--max-snat", "40000"])
        .shunt(env!("CARGO_BIN_EXE_shunt"));
    let mut agents = ["node-a", "node-b"].map(|node| lab.start_agent(node, &options).unwrap());

    let mut ways = Vec::new();
    for (i, cluster_ip) in ["10.96.0.1", "fd96::1"].into_iter().enumerate() {
        let to = SocketAddr::new(cluster_ip.parse().unwrap(), 80);
        ways.push(("hooked", Sockets::Hooked, to));
        ways.push(("packets", Sockets::Unhooked, to));
        let node = lab.node_ips("node-a").unwrap()[i];
        ways.push(("client", Sockets::Unhooked, SocketAddr::new(node, NODE_PORT)));
    }
    let flows: Vec<Open> = ways
        .iter()
        .flat_map(|&(name, sockets, to)| open(&lab.client(name, sockets).unwrap(), to))
        .collect();
    let done = AtomicBool::new(false);
    let answered = AtomicU64::new(0);
    thread::scope(|scope| {
        for &(name, sockets, to) in &ways {
            let client = lab.client(name, sockets).unwrap();
            let (done, answered) = (&done, &answered);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    client
                        .tcp(to)
                        .unwrap_or_else(|error| panic!("{to} from {name}: {error}"));
                    answered.fetch_add(1, Ordering::Relaxed);
                    // The agents need some of the machine too.
                    thread::sleep(Duration::from_millis(3));
                }
            });
        }
        for agent in &mut agents {
            thread::sleep(Duration::from_secs(1));
            let before = links(agent);
            agent.kill().unwrap();
            let root = agent.bpf_root().to_owned();
            let (ours, other) = (root.join(format!("v{LAYOUT_VERSION}")), root.join("v1"));
            fs::rename(&ours, &other).unwrap();
            agent.restart().unwrap();
            for _ in 0..2 {
                for Open { conn, server, what } in &flows {
                    let answer = conn.ask("again").unwrap_or_else(|error| panic!("{what}: {error}"));
                    assert_eq!(answer.server, *server, "{what}");
                }
            }
            assert!(ours.join("maps/flows4").exists() && !other.exists());
            assert_eq!(links(agent), before);
        }
        thread::sleep(Duration::from_secs(1));
        done.store(true, Ordering::Relaxed);
    });
    let answered = answered.into_inner();
    assert!(answered > 500, "{answered} new connections were answered");
}

#[test]
fn another_layout_is_taken_over_under_load_with_xdp() {
    another_layout_is_taken_over_under_load("native");
}

#[test]
fn another_layout_is_taken_over_under_load_without_xdp() {
    another_layout_is_taken_over_under_load("off");
}
