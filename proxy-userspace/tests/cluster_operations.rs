//! What an operator sees of an agent that follows an API server: health (SPEC A2). Needs root.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use shunt_apiserver::{ApiServer, Kind};
use shunt_lab::{Agent, AgentOptions, Lab};

/// The fabric, as seen from the nodes.
const SERVER: &str = "192.168.50.1:6443";
/// Longest wait for something that should come at once.
const PATIENCE: Duration = Duration::from_secs(20);
const HEALTHZ: u16 = 10_256;
const NODE: &str = "node-a";

struct World {
    agent: Agent,
    api: ApiServer,
    lab: Lab,
}

impl World {
    /// A cluster whose agent has not been started yet.
    fn new(extra: &[&str]) -> Self {
        let lab = Lab::new().unwrap();
        let fabric = lab.ns("fabric").unwrap();
        let address: SocketAddr = SERVER.parse().unwrap();
        let api = ApiServer::start_with(address, move || fabric.run(|| TcpListener::bind(address))).unwrap();
        api.apply(node(&lab, &[]));
        let options = AgentOptions::kubeconfig(&api.kubeconfig())
            .args(extra)
            .shunt(env!("CARGO_BIN_EXE_shunt"));
        let agent = lab.agent(NODE, &options).unwrap();
        Self { agent, api, lab }
    }

    fn start(extra: &[&str]) -> Self {
        let mut world = Self::new(extra);
        world.agent.spawn().unwrap();
        world.agent.wait_ready().unwrap();
        world
    }

    /// Status, headers in lower case and body, asked by a process on the node. `None` when nobody answers.
    fn get(&self, ip: impl Into<IpAddr>, port: u16, path: &str) -> Option<(u16, String, String)> {
        let to = SocketAddr::new(ip.into(), port);
        let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
        self.lab.ns(NODE).unwrap().run(move || {
            let mut stream = TcpStream::connect(to).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            stream.write_all(request.as_bytes()).ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            let (head, body) = text.split_once("\r\n\r\n")?;
            let status = head.split(' ').nth(1)?.parse().ok()?;
            Some((status, head.to_lowercase(), body.to_owned()))
        })
    }

    fn status(&self, path: &str) -> Option<u16> {
        Some(self.get(Ipv4Addr::LOCALHOST, HEALTHZ, path)?.0)
    }

    fn wait_for_status(&self, path: &str, status: Option<u16>) {
        let began = Instant::now();
        while self.status(path) != status {
            assert!(
                began.elapsed() < PATIENCE,
                "{path} is {:?}, not {status:?}: {}",
                self.status(path),
                self.agent.output()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn node(lab: &Lab, taints: &[&str]) -> Value {
    let addresses = lab.node_ips(NODE).unwrap();
    let addresses = addresses.map(|address| json!({ "type": "InternalIP", "address": address }));
    let taints: Vec<Value> = taints
        .iter()
        .map(|key| json!({ "key": key, "effect": "NoSchedule" }))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": NODE },
        "spec": { "taints": taints }, "status": { "addresses": addresses },
    })
}

/// A2: load balancers are told when the Node is being taken away, by each of its three signs, and when it is not after all;
/// the kubelet is not told anything of it.
#[test]
fn healthz_follows_the_node_and_livez_does_not() {
    let world = World::start(&[]);
    world.wait_for_status("/healthz", Some(200));
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()]
        .into_iter()
        .chain(world.lab.node_ips(NODE).unwrap())
    {
        let (status, head, body) = world.get(ip, HEALTHZ, "/healthz").unwrap();
        assert_eq!(status, 200, "{ip}");
        assert!(head.contains("\r\ncontent-type: application/json\r\n"), "{head}");
        assert!(head.contains("\r\nx-content-type-options: nosniff\r\n"), "{head}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["nodeEligible"], true);
        assert_eq!(body["lastUpdated"], body["currentTime"]);
    }
    let leaves = |why: &str| {
        world.wait_for_status("/healthz", Some(503));
        assert_eq!(world.status("/livez"), Some(200), "{why}");
        assert_eq!(world.status("/readyz"), Some(200), "{why}");
    };

    world.api.apply(node(&world.lab, &["ToBeDeletedByClusterAutoscaler"]));
    leaves("tainted");
    let (.., body) = world.get(Ipv4Addr::LOCALHOST, HEALTHZ, "/healthz").unwrap();
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["nodeEligible"], false);
    world.api.apply(node(&world.lab, &["node.kubernetes.io/unschedulable"]));
    world.wait_for_status("/healthz", Some(200));

    let mut going = node(&world.lab, &[]);
    going["metadata"]["deletionTimestamp"] = json!("2026-11-21T00:00:00Z");
    world.api.apply(going);
    leaves("with a deletionTimestamp");
    world.api.delete(Kind::Nodes, "", NODE);
    leaves("gone");
    world.api.apply(node(&world.lab, &[]));
    world.wait_for_status("/healthz", Some(200));
}

/// A2: an agent that waits for its API server is alive and not ready; load balancers are sent elsewhere on a new node, and
/// not where an earlier agent's datapath goes on.
#[test]
fn a_start_that_waits_is_alive_but_not_ready() {
    let mut world = World::new(&[]);
    world.api.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "default" },
        "spec": { "ports": [{ "port": 80 }] },
    }));
    world.api.close().unwrap();
    world.agent.spawn().unwrap();
    world.wait_for_status("/livez", Some(200));
    assert_eq!(world.status("/readyz"), Some(503));
    assert_eq!(world.status("/healthz"), Some(503));
    world.api.open().unwrap();
    world.agent.wait_ready().unwrap();
    world.wait_for_status("/readyz", Some(200));
    assert_eq!(world.status("/healthz"), Some(200));

    world.agent.stop().unwrap();
    assert_eq!(world.status("/livez"), None);
    world.api.close().unwrap();
    world.agent.spawn().unwrap();
    world.wait_for_status("/readyz", Some(503));
    assert_eq!(world.status("/healthz"), Some(200));
}

/// A2: a port in use costs one line and no traffic; the agent listens as soon as it is free.
#[test]
fn a_port_in_use_is_said_once_and_tried_again() {
    let mut world = World::new(&[]);
    let taken = world
        .lab
        .ns(NODE)
        .unwrap()
        .run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, HEALTHZ)))
        .unwrap();
    world.agent.spawn().unwrap();
    world.agent.wait_ready().unwrap();
    let said = "--healthz-bind-address: cannot listen on 0.0.0.0:10256: Address already in use";
    world.agent.wait_for(said, PATIENCE).unwrap();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(world.agent.output().matches("cannot listen").count(), 1);
    drop(taken);
    world.wait_for_status("/healthz", Some(200));
    world
        .agent
        .wait_for("--healthz-bind-address: listening on 0.0.0.0:10256 now", PATIENCE)
        .unwrap();
}
