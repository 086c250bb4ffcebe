//! What the socket hook remembers ends with the socket, and is never another backend's. Needs root.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::web::{self, APP};
use shunt_lab::{Agent, AgentOptions, Conn, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

/// Two looks of the agent, and a little.
const LOOKED: Duration = Duration::from_secs(90);

/// The pods `near` and `far`, and the Service `web` of one of them.
fn start(args: &[&str]) -> (Lab, Agent, TempDir) {
    let lab = Lab::new().unwrap();
    let ports = [Port::tcp(APP), Port::udp(APP)];
    for (pod, node) in [("near", "node-a"), ("far", "node-b")] {
        lab.add_pod(&PodSpec::new(pod, node, &ports)).unwrap();
    }
    lab.add_pod(&PodSpec::new("pod", "node-a", &[])).unwrap();
    let manifests = TempDir::new().unwrap();
    web::write(manifests.path(), "web.yaml", &web::service());
    let near = web::slices(&lab, &[("near", "node-a", "")]);
    web::write(manifests.path(), "slices.yaml", &near);
    let options = AgentOptions::manifests(manifests.path())
        .args(args)
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps();
    let agent = lab.start_agent("node-a", &options).unwrap();
    (lab, agent, manifests)
}

fn frontends() -> [SocketAddr; 2] {
    web::CLUSTER_IPS.map(|ip| SocketAddr::new(ip.parse().unwrap(), 80))
}

/// How many connected sockets the hook has entries of.
fn entries(agent: &Agent) -> u64 {
    let status = agent.json(&["status"]).unwrap();
    let maps = status["maps"].as_array().unwrap();
    let sockets = maps.iter().find(|map| map["map"] == "sockets").unwrap();
    sockets["entries"].as_u64().unwrap()
}

fn all_are_named(conns: &[Conn]) {
    for conn in conns {
        let answer = conn.ask("who").unwrap();
        assert!(frontends().contains(&answer.peer), "{}", answer.peer);
    }
}

/// Sockets of the node that close without the hook, as those that the kernel itself has: their entries
/// go, and those of open ones stay.
#[test]
fn sockets_that_close_without_a_word_leave_nothing() {
    let (lab, agent, _manifests) = start(&[]);
    let open = |name| {
        let client = lab.client(name, Sockets::Hooked).unwrap();
        let all = (0..4).flat_map(|_| frontends());
        all.map(|to| client.open_tcp(to).unwrap())
            .collect::<Vec<_>>()
    };
    let of_pod = open("pod");
    let mut of_node = open("node-a");
    all_are_named(&of_pod);
    all_are_named(&of_node);
    assert_eq!(entries(&agent), 16);
    let layout = agent.json(&["status"]).unwrap()["layout"].as_u64().unwrap();
    let link = format!("v{layout}/links/cgroup-sock_release");
    fs::remove_file(agent.bpf_root().join(link)).unwrap();
    of_node.truncate(3);
    assert_eq!(entries(&agent), 16, "the hook is not there");
    let begun = Instant::now();
    while entries(&agent) != 11 {
        assert!(begun.elapsed() < LOOKED, "{} entries", entries(&agent));
        std::thread::sleep(Duration::from_millis(500));
    }
    // They are looked at once more.
    std::thread::sleep(Duration::from_secs(35));
    assert_eq!(entries(&agent), 11);
    all_are_named(&of_pod);
    all_are_named(&of_node);
}

/// An unconnected UDP socket that has been silent while its backend went, and the id of that was given
/// to another Service's.
#[test]
fn an_id_that_is_used_again_is_not_the_backend_that_had_it() {
    let (lab, agent, manifests) = start(&["--max-backends", "16"]);
    let [to, _] = frontends();
    let client = lab.client("pod", Sockets::Hooked).unwrap();
    let socket = client.open_udp(to, &Dial::default()).unwrap();
    assert_eq!(socket.ask("who").unwrap().server, "near");
    let far = web::slices(&lab, &[("far", "node-b", "")]);
    web::write(manifests.path(), "slices.yaml", &far);
    let moved = || {
        client
            .once(Proto::Tcp, to, &Dial::default())
            .unwrap()
            .server
            == "far"
    };
    let begun = Instant::now();
    while !moved() {
        assert!(begun.elapsed() < LOOKED);
        std::thread::sleep(Duration::from_millis(100));
    }
    // Eleven more than the four of `web`: all ids there are.
    let ip = lab.ips("far").unwrap()[0];
    let port = |n| format!("{{ name: p{n}, protocol: UDP, port: {} }}", 9000 + n);
    let ports = (0..11).map(port).collect::<Vec<_>>().join(", ");
    let other = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: other }}\nspec:\n  clusterIP: 10.96.0.9\n  \
         ports: [{ports}]\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{ name: other, \
         labels: {{ kubernetes.io/service-name: other }} }}\naddressType: IPv4\nports: [{ports}]\n\
         endpoints: [{{ addresses: ['{ip}'], nodeName: node-b, conditions: {{ ready: true }} }}]\n"
    );
    web::write(manifests.path(), "other.yaml", &other);
    let whole = "default/other: wholly in the maps now";
    agent.wait_for(whole, LOOKED).unwrap();
    assert_eq!(socket.ask("who").unwrap().server, "far");
}
