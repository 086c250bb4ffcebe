//! F10: SCTP with real sockets in a cluster of namespaces. The sockets are a kernel module that
//! small machines lack: there the test says so and checks nothing, and `cargo xtask vm` runs it in
//! a kernel that has them. Needs root.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use shunt_lab::{
    Agent, AgentOptions, Answer, Client, Dial, Lab, PodSpec, Port, Proto, Sockets, has_sctp,
};
use tempfile::TempDir;

const APP: u16 = 9999;
const NODE_PORT: u16 = 30999;
/// Set where a kernel must have SCTP sockets: what cannot run there has failed.
const EXPECTED: &str = "SHUNT_EXPECT_SCTP";

/// Two nodes with an agent each, and a Service with a pod on either.
struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    manifests: TempDir,
}

impl Cluster {
    fn start(lab: Lab, xdp: &str) -> Self {
        let port = Port {
            proto: Proto::Sctp,
            number: APP,
        };
        for (pod, node) in [("near", "node-a"), ("far", "node-b")] {
            lab.add_pod(&PodSpec::new(pod, node, &[port])).unwrap();
        }
        for pod in ["hooked", "packets"] {
            lab.add_pod(&PodSpec::new(pod, "node-a", &[])).unwrap();
        }
        let mut cluster = Self {
            agents: Vec::new(),
            lab,
            manifests: TempDir::new().unwrap(),
        };
        cluster.serve(&["near", "far"]);
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

    /// `assoc` with these pods, and `empty` with none.
    fn serve(&self, pods: &[&str]) {
        let mut documents = vec![
            service("assoc", 1, NODE_PORT),
            service("empty", 2, NODE_PORT + 1),
        ];
        for (family, v6) in [("IPv4", false), ("IPv6", true)] {
            let endpoints: Vec<String> = pods
                .iter()
                .map(|pod| {
                    let node = if *pod == "near" { "node-a" } else { "node-b" };
                    format!(
                        "{{ addresses: ['{}'], nodeName: {node} }}",
                        self.ip(pod, v6)
                    )
                })
                .collect();
            documents.push(format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n\
                 metadata: {{ name: assoc-{}, labels: {{ kubernetes.io/service-name: assoc }} }}\n\
                 endpoints: [{}]\nports: [{{ name: s, protocol: SCTP, port: {APP} }}]\n",
                family.to_lowercase(),
                endpoints.join(", "),
            ));
        }
        let path = self.manifests.path().join("assoc.yaml");
        let hidden = path.with_extension("new");
        fs::write(&hidden, documents.join("---\n")).unwrap();
        fs::rename(hidden, path).unwrap();
    }

    fn client(&self, name: &str) -> Client {
        let sockets = if name == "hooked" {
            Sockets::Hooked
        } else {
            Sockets::Unhooked
        };
        self.lab.client(name, sockets).unwrap()
    }

    fn ip(&self, name: &str, v6: bool) -> IpAddr {
        let ips = self.lab.ips(name).unwrap();
        ips.into_iter().find(|ip| ip.is_ipv6() == v6).unwrap()
    }

    fn node_ip(&self, node: &str, v6: bool) -> IpAddr {
        self.lab.node_ips(node).unwrap()[usize::from(v6)]
    }

    /// Waits until both agents lead to so many backends.
    fn wait_for_backends(&self, count: usize) {
        let began = Instant::now();
        let there = |agent: &Agent| {
            let rows = agent.json(&["services"]).unwrap();
            let row = rows
                .as_array()
                .unwrap()
                .iter()
                .find(|row| row["address"] == "fd96::1")
                .cloned();
            row.is_some_and(|row| row["internal"]["backends"] == count)
        };
        while !self.agents.iter().all(there) {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "no agent came to {count} backends"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn service(name: &str, number: u8, node_port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec:\n  type: LoadBalancer\n  \
         externalIPs: [198.51.100.{number}, '2001:db8:198::{number}']\n  clusterIP: 10.96.0.{number}\n  \
         clusterIPs: [10.96.0.{number}, 'fd96::{number}']\n  ipFamilies: [IPv4, IPv6]\n  ports:\n  \
         - {{ name: s, protocol: SCTP, port: 80, targetPort: {APP}, nodePort: {node_port} }}\n"
    )
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// Longer than an INIT's first retransmission: emulated kernels are slow.
fn patient() -> Dial {
    Dial::within(Duration::from_secs(10))
}

/// Associates until both pods have answered.
fn both(client: &Client, to: SocketAddr, check: impl Fn(&Answer)) {
    let mut seen = BTreeSet::new();
    for _ in 0..64 {
        let answer = client
            .once(Proto::Sctp, to, &patient())
            .unwrap_or_else(|error| panic!("{to} from {}: {error}", client.name()));
        assert_eq!(
            answer.peer,
            to,
            "from {}: the peer is not what was dialled",
            client.name()
        );
        check(&answer);
        seen.insert(answer.server);
        if seen.len() == 2 {
            return;
        }
    }
    panic!("{to} from {}: only {seen:?} answered", client.name());
}

/// Skips a test where the kernel has no SCTP sockets.
macro_rules! need_sctp {
    () => {
        if !has_sctp() {
            assert!(
                std::env::var_os(EXPECTED).is_none(),
                "this kernel should have SCTP sockets: modprobe sctp"
            );
            shunt_lab::skip!(
                "this kernel has no SCTP sockets; `cargo xtask vm` boots one that does"
            );
        }
    };
}

/// F1–F4 with SCTP, for pods and clients outside, both families; P6; L1 and L4.
fn associations(lab: Lab, xdp: &str) {
    let mut cluster = Cluster::start(lab, xdp);
    let mut open = Vec::new();
    for v6 in [false, true] {
        let addresses = if v6 {
            ["fd96::1", "2001:db8:198::1"]
        } else {
            ["10.96.0.1", "198.51.100.1"]
        };
        let [node_a, node_b] = ["node-a", "node-b"].map(|node| cluster.node_ip(node, v6));
        for name in ["hooked", "packets", "client"] {
            let client = cluster.client(name);
            let own = cluster.ip(name, v6);
            for address in addresses {
                both(&client, at(address, 80), |answer| {
                    // P7: an outside client comes in at node-a, and is translated towards node-b
                    // only.
                    let expected = if name == "client" && answer.server == "far" {
                        node_a
                    } else {
                        own
                    };
                    assert_eq!(
                        answer.seen_peer.ip(),
                        expected,
                        "{address} from {name} by {}",
                        answer.server
                    );
                });
            }
            both(&client, SocketAddr::new(node_a, NODE_PORT), |_| ());
            both(&client, SocketAddr::new(node_b, NODE_PORT), |answer| {
                let expected = if answer.server == "near" { node_b } else { own };
                assert_eq!(
                    answer.seen_peer.ip(),
                    expected,
                    "node-b's port from {name} by {}",
                    answer.server
                );
            });
            // P6: an ICMP error, no time-out.
            for to in [
                at(if v6 { "fd96::2" } else { "10.96.0.2" }, 80),
                SocketAddr::new(node_a, NODE_PORT + 1),
            ] {
                let error = client.once(Proto::Sctp, to, &patient()).unwrap_err();
                assert!(error.is_refused(), "{to} from {name}: {error}");
            }
            for to in [at(addresses[0], 80), SocketAddr::new(node_b, NODE_PORT)] {
                let association = client.open(Proto::Sctp, to, &patient()).unwrap();
                let server = association.ask("hello").unwrap().server;
                open.push((association, server));
            }
        }
    }
    let flows = cluster.agents[0]
        .json(&["conntrack", "list", "--protocol", "sctp"])
        .unwrap();
    let established = flows
        .as_array()
        .unwrap()
        .iter()
        .filter(|flow| flow["state"] == "established");
    assert!(established.count() >= open.len() / 2, "{flows}");
    // L1 and L4: they outlive their backend's place behind the Service, and the agent.
    cluster.serve(&["near"]);
    cluster.wait_for_backends(1);
    for agent in &mut cluster.agents {
        agent.kill().unwrap();
    }
    for (association, server) in &open {
        assert_eq!(&association.ask("no agent").unwrap().server, server);
    }
    for agent in &mut cluster.agents {
        agent.restart().unwrap();
    }
    for (association, server) in &open {
        assert_eq!(&association.ask("another agent").unwrap().server, server);
    }
    for to in [at("10.96.0.1", 80), at("fd96::1", 80)] {
        for _ in 0..8 {
            let answer = cluster
                .client("packets")
                .once(Proto::Sctp, to, &patient())
                .unwrap();
            assert_eq!(answer.server, "near");
        }
    }
}

#[test]
fn associations_reach_backends_with_xdp() {
    need_sctp!();
    associations(Lab::new().unwrap(), "native");
}

/// Pods leave checksums to their devices (`CHECKSUM_PARTIAL`), nodes compute them on the way out,
/// and the other node checks them.
#[test]
fn checksums_left_to_devices_are_right_on_the_wire() {
    need_sctp!();
    let lab = Lab::builder().checksum_offload().build().unwrap();
    for node in ["node-a", "node-b"] {
        lab.ns(node)
            .unwrap()
            .output("ethtool", &["-K", "eth0", "tx", "off"])
            .unwrap();
    }
    associations(lab, "off");
}
