//! What becomes of flows when the source ports towards a backend are used up. Needs root.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use crate::web::{self, APP, NODE_PORT};
use shunt_lab::{Agent, AgentOptions, Client, Conn, Dial, DialError, Lab, PodSpec, Port, Proto};
use tempfile::TempDir;

/// Source ports per backend.
const PORTS: usize = 16;
/// Of their flows, those that end.
const ENDED: usize = 4;

/// A node port of `node-a` whose only backend is on `node-b`.
fn start(xdp: &str) -> (Lab, Agent, TempDir) {
    let lab = Lab::new().unwrap();
    lab.add_pod(&PodSpec::new(
        "web",
        "node-b",
        &[Port::tcp(APP), Port::udp(APP)],
    ))
    .unwrap();
    let manifests = TempDir::new().unwrap();
    let endpoints = web::slices(&lab, &[("web", "node-b", "")]);
    web::write(
        manifests.path(),
        "web.yaml",
        &[web::service(), endpoints].join("---\n"),
    );
    let options = AgentOptions::manifests(manifests.path())
        .xdp(xdp)
        .args(&["--snat-ports", &format!("20000-{}", 20_000 + PORTS - 1)])
        .args(&[
            "--conntrack-udp-timeout=5s",
            "--conntrack-udp-timeout-stream=5s",
        ])
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps();
    let agent = lab.start_agent("node-a", &options).unwrap();
    (lab, agent, manifests)
}

fn exhausted(agent: &Agent) -> u64 {
    agent.json(&["status"]).unwrap()["events"]["snat_exhausted"]
        .as_u64()
        .unwrap()
}

/// A flow that was answered and confirmed.
fn open(client: &Client, proto: Proto, to: SocketAddr) -> Result<Conn, DialError> {
    // Linux does not hear a refusal that comes while it sends: its retransmission's it does.
    let dial = Dial {
        timeout: Duration::from_millis(2500),
        ..Dial::default()
    };
    let conn = client.open(proto, to, &dial)?;
    conn.ask_within("first", dial.timeout)?;
    conn.ask_within("second", dial.timeout)?;
    Ok(conn)
}

fn all_answer(conns: &[Conn], what: &str) {
    for conn in conns {
        conn.ask("still there?")
            .unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

fn source_ports_run_out(client: &Client, proto: Proto, to: SocketAddr) {
    let what = format!("{proto} {to}");
    let mut conns: Vec<Conn> = (0..PORTS)
        .map(|_| open(client, proto, to).unwrap())
        .collect();
    for _ in 0..3 {
        let error = open(client, proto, to).unwrap_err();
        assert!(error.is_refused(), "{what}: no port is left: {error}");
    }
    all_answer(&conns, &what);

    // TCP: closed. UDP: so silent that it is over, once the others have spoken for longer than the
    // time-out.
    let ended = conns.split_off(PORTS - ENDED);
    let kept = (proto == Proto::Udp).then_some(ended);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(10) {
        all_answer(&conns, &what);
        thread::sleep(Duration::from_millis(500));
    }
    for _ in 0..ENDED {
        conns.push(
            open(client, proto, to)
                .unwrap_or_else(|error| panic!("{what}: a port is free again: {error}")),
        );
    }
    let error = open(client, proto, to).unwrap_err();
    assert!(error.is_refused(), "{what}: no port is left again: {error}");
    all_answer(&conns, &what);
    drop(kept);
}

/// An open flow never loses its source port; a new one is refused and counted when there is none,
/// and gets that of a flow that is closed or idle.
fn source_ports_of_open_flows_are_safe(xdp: &str) {
    let (lab, agent, _manifests) = start(xdp);
    let before = exhausted(&agent);
    thread::scope(|scope| {
        for node in lab.node_ips("node-a").unwrap() {
            for proto in [Proto::Tcp, Proto::Udp] {
                let client = lab.client("client", shunt_lab::Sockets::Unhooked).unwrap();
                scope.spawn(move || {
                    source_ports_run_out(&client, proto, SocketAddr::new(node, NODE_PORT))
                });
            }
        }
    });
    // Four refusals by family and protocol, at least as many packets.
    let dropped = exhausted(&agent) - before;
    assert!(dropped >= 16, "{dropped} were counted");
}

#[test]
fn source_ports_of_open_flows_are_safe_with_xdp() {
    source_ports_of_open_flows_are_safe("native");
}

#[test]
fn source_ports_of_open_flows_are_safe_without_xdp() {
    source_ports_of_open_flows_are_safe("off");
}

/// Takes `node-a`'s IPv6 addresses away; its neighbours reach it by link-local ones. The cluster IPs
/// are routed to it from outside, in both families.
fn without_ipv6_addresses(lab: &Lab) {
    let lines = |lines: &[&str]| lines.iter().map(ToString::to_string).collect::<Vec<_>>();
    let [own_pods, pods] = [0, 1].map(|node| shunt_lab::pod_cidrs(node)[1].clone());
    let [node, _] = lab.node_ips("node-a").unwrap();
    lab.ns("node-b")
        .unwrap()
        .ip(&lines(&[
            "address add fe80::b/64 dev eth0 nodad",
            &format!("route replace {own_pods} via fe80::a dev eth0"),
        ]))
        .unwrap();
    lab.ns("node-a")
        .unwrap()
        .ip(&lines(&[
            "address flush dev eth0 scope global",
            &format!("address add {node}/24 dev eth0"),
            "route replace default via 192.168.50.1",
            "address add fe80::a/64 dev eth0 nodad",
            "route replace ::/0 via fe80::1 dev eth0",
            &format!("route replace {pods} via fe80::b dev eth0"),
        ]))
        .unwrap();
    let [v4, v6] = web::CLUSTER_IPS;
    lab.ns("fabric")
        .unwrap()
        .ip(&lines(&[
            "address add fe80::1/64 dev lan0 nodad",
            &format!("route replace {v4} via {node}"),
            &format!("route replace {v6} via fe80::a dev lan0"),
        ]))
        .unwrap();
}

/// What needs a source address of a family that the node has none of is refused at once, counted,
/// and warned of once; what needs none is served.
fn a_family_without_an_address_is_refused(xdp: &str) {
    let lab = Lab::new().unwrap();
    let ports = [Port::tcp(APP), Port::udp(APP)];
    for pod in [
        PodSpec::new("web", "node-b", &ports),
        PodSpec::new("shell", "node-a", &[]),
    ] {
        lab.add_pod(&pod).unwrap();
    }
    without_ipv6_addresses(&lab);
    let manifests = TempDir::new().unwrap();
    let endpoints = web::slices(&lab, &[("web", "node-b", "")]);
    let objects = [web::service(), endpoints].join("---\n");
    web::write(manifests.path(), "web.yaml", &objects);
    let mut options = AgentOptions::manifests(manifests.path())
        .xdp(xdp)
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps();
    options.finds_addresses = true;
    let agent = lab.start_agent("node-a", &options).unwrap();

    let [v4, v6] = web::CLUSTER_IPS.map(|ip| SocketAddr::new(ip.parse().unwrap(), 80));
    let outside = lab.client("client", shunt_lab::Sockets::Unhooked).unwrap();
    let inside = lab.client("shell", shunt_lab::Sockets::Unhooked).unwrap();
    for proto in [Proto::Tcp, Proto::Udp] {
        let once = |client: &Client, to| client.once(proto, to, &Dial::default());
        once(&outside, v4).unwrap_or_else(|error| panic!("{proto} {v4} from outside: {error}"));
        let error = once(&outside, v6).unwrap_err();
        assert!(error.is_refused(), "{proto} {v6} from outside: {error}");
        once(&inside, v6).unwrap_or_else(|error| panic!("{proto} {v6} from a pod: {error}"));
    }
    let status = agent.json(&["status"]).unwrap();
    assert!(status["events"]["no_source_address"].as_u64().unwrap() >= 2);
    let warnings = agent.output().matches("no IPv6 address").count();
    assert_eq!(warnings, 1, "{}", agent.output());
}

#[test]
fn a_family_without_an_address_is_refused_with_xdp() {
    a_family_without_an_address_is_refused("native");
}

#[test]
fn a_family_without_an_address_is_refused_without_xdp() {
    a_family_without_an_address_is_refused("off");
}
