//! Connections that are no Service's, though they come from a node port's number: of the node's own
//! processes, of pods that are masqueraded, and those that were open before. Needs root.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    ops::Range,
    thread,
    time::Duration,
};

use crate::web;
use shunt_lab::{AgentOptions, Client, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

/// Node ports of the Service, of TCP and UDP both.
const NODE_PORTS: Range<u16> = 30_080..30_100;
/// What the host outside listens on.
const OUTSIDE: u16 = 9000;

/// The Service `web` with many node ports, whose pod is on the other node.
fn start(xdp: &str, node_ports: Range<u16>) -> (Lab, AgentOptions, TempDir) {
    let lab = Lab::new().unwrap();
    let ports = [Port::tcp(web::APP), Port::udp(web::APP)];
    lab.add_pod(&PodSpec::new("web", "node-b", &ports)).unwrap();
    lab.add_pod(&PodSpec::new("pod", "node-a", &[])).unwrap();
    let [v4, v6] = web::CLUSTER_IPS;
    let ports: Vec<String> = node_ports
        .flat_map(|port| ["TCP", "UDP"].map(|proto| (port, proto)))
        .map(|(port, proto)| {
            format!(
                "{{ name: p{port}{}, protocol: {proto}, port: {port}, targetPort: {}, nodePort: {port} }}",
                proto.to_lowercase(),
                web::APP
            )
        })
        .collect();
    let pod = lab.ips("web").unwrap();
    let manifest = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: web }}\nspec:\n  type: NodePort\n  selector: {{ app: web }}\n  \
         clusterIP: {v4}\n  clusterIPs: [{v4}, '{v6}']\n  ipFamilyPolicy: RequireDualStack\n  \
         ipFamilies: [IPv4, IPv6]\n  ports: [{}]\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{ name: web, labels: {{ app: web }} }}\n\
         spec: {{ nodeName: node-b, containers: [{{ name: app }}] }}\n\
         status: {{ podIP: '{}', podIPs: [{{ ip: '{}' }}, {{ ip: '{}' }}], \
         conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
        ports.join(", "),
        pod[0],
        pod[0],
        pod[1],
    );
    let manifests = TempDir::new().unwrap();
    web::write(manifests.path(), "web.yaml", &manifest);
    let options = AgentOptions::manifests(manifests.path())
        .xdp(xdp)
        .shunt(env!("CARGO_BIN_EXE_shunt"));
    (lab, options, manifests)
}

/// Gives what the pod on node-a sends the node's address, and a source port of these, or any.
fn masquerade(lab: &Lab, ports: Option<Range<u16>>) {
    let range = ports.map(|ports| format!("to :{}-{}", ports.start, ports.end - 1));
    for ip in lab.ips("pod").unwrap() {
        let family = if ip.is_ipv6() { "ip6" } else { "ip" };
        let rules = format!(
            "table {family} nat {{ chain post {{ type nat hook postrouting priority 100; \
             {family} saddr {ip} meta l4proto {{ tcp, udp }} masquerade {} fully-random; }}\n}}",
            range.as_deref().unwrap_or_default(),
        );
        let ns = lab.ns("node-a").unwrap();
        ns.output("nft", &[&rules]).unwrap();
    }
}

/// The host outside, as a server of both protocols.
fn serve_outside(lab: &Lab) -> Client {
    let outside = lab.client("client", Sockets::Unhooked).unwrap();
    let addresses = lab.ips("client").unwrap();
    let listen: Vec<_> = addresses
        .iter()
        .flat_map(|&ip| [Proto::Tcp, Proto::Udp].map(|proto| (proto, SocketAddr::new(ip, OUTSIDE))))
        .collect();
    outside.serve("outside", &listen).unwrap();
    outside
}

fn asks(client: &Client, proto: Proto, to: SocketAddr, dial: &Dial, case: &str) -> SocketAddr {
    let answer = client
        .once(proto, to, dial)
        .unwrap_or_else(|error| panic!("{case}, {proto} to {to}: {error}"));
    assert_eq!(
        (answer.server.as_str(), answer.peer),
        ("outside", to),
        "{case}"
    );
    answer.seen_peer
}

fn own_connections_are_left_alone(xdp: &str) {
    let (lab, options, _manifests) = start(xdp, NODE_PORTS);
    let _outside = serve_outside(&lab);
    let outsiders = lab.ips("client").unwrap();
    let dials = lab.client("client", Sockets::Unhooked).unwrap();
    let agent = lab.start_agent("node-a", &options).unwrap();
    let [node, pod] = ["node-a", "pod"].map(|name| lab.client(name, Sockets::Unhooked).unwrap());
    let ips = lab.node_ips("node-a").unwrap();
    let outsider = |v6: bool| *outsiders.iter().find(|ip| ip.is_ipv6() == v6).unwrap();

    // A process of the node that listens on a node port's number does not take it away.
    let local = lab.client("node-a", Sockets::Unhooked).unwrap();
    let port = NODE_PORTS.start;
    local
        .serve(
            "node",
            &ips.map(|ip| (Proto::Udp, SocketAddr::new(ip, port))),
        )
        .unwrap();
    for ip in ips {
        let to = SocketAddr::new(outsider(ip.is_ipv6()), OUTSIDE);
        let node_port = |port| SocketAddr::new(ip, port);
        assert_eq!(dials.udp(node_port(port)).unwrap().server, "web");
        // A process of the node that sends from there.
        for (i, (proto, connected)) in [(Proto::Tcp, true), (Proto::Udp, true), (Proto::Udp, false)]
            .into_iter()
            .enumerate()
        {
            let bind = node_port(NODE_PORTS.start + 1 + i as u16);
            let dial = Dial {
                connected,
                ..Dial::from(bind)
            };
            let seen = asks(
                &node,
                proto,
                to,
                &dial,
                &format!("XDP {xdp}, connected {connected}"),
            );
            assert_eq!(seen, bind);
            assert_eq!(
                dials.once(proto, bind, &Dial::default()).unwrap().server,
                "web"
            );
        }
    }

    // Pods behind the node's address.
    masquerade(&lab, Some(NODE_PORTS));
    for ip in ips {
        let to = SocketAddr::new(outsider(ip.is_ipv6()), OUTSIDE);
        for proto in [Proto::Tcp, Proto::Udp] {
            for _ in 0..8 {
                let case = format!("XDP {xdp}, masqueraded");
                let seen = asks(&pod, proto, to, &Dial::default(), &case);
                assert!(
                    seen.ip() == ip && NODE_PORTS.contains(&seen.port()),
                    "{seen}"
                );
                let node_port = SocketAddr::new(ip, seen.port());
                assert_eq!(
                    dials
                        .once(proto, node_port, &Dial::default())
                        .unwrap()
                        .server,
                    "web"
                );
            }
        }
    }
    drop(agent);
}

#[test]
fn own_connections_are_left_alone_with_xdp() {
    own_connections_are_left_alone("native");
}

#[test]
fn own_connections_are_left_alone_without_xdp() {
    own_connections_are_left_alone("off");
}

/// Masqueraded connections that were open before there was a node port, whose other side speaks
/// first when there is.
#[test]
fn connections_that_are_older_than_a_node_port_go_on() {
    let (lab, options, _manifests) = start("off", NODE_PORTS);
    masquerade(&lab, Some(NODE_PORTS));
    let mut ends = Vec::new();
    for ip in lab.ips("client").unwrap() {
        let address = SocketAddr::new(ip, OUTSIDE);
        let listener = lab
            .ns("client")
            .unwrap()
            .run(|| TcpListener::bind(address).unwrap());
        let pod = lab.ns("pod").unwrap();
        let client = pod.run(|| std::net::TcpStream::connect(address).unwrap());
        let (server, peer) = listener.accept().unwrap();
        assert!(NODE_PORTS.contains(&peer.port()), "{peer}");
        ends.push((client, server));
    }
    let _agent = lab.start_agent("node-a", &options).unwrap();
    // Let nothing under way make a note.
    thread::sleep(Duration::from_millis(200));
    for (client, server) in &mut ends {
        client
            .set_read_timeout(Some(Duration::from_secs(3)))
            .unwrap();
        server.write_all(b"hello").unwrap();
        let mut read = [0; 5];
        client
            .read_exact(&mut read)
            .expect("the server speaks first");
        assert_eq!(&read, b"hello");
    }
}

/// A CNI's masquerading beside a thousand node ports: of ten thousand connections none is lost,
/// though one in sixty comes from a node port's number.
#[test]
#[ignore = "long"]
fn none_of_ten_thousand_masqueraded_connections_is_lost() {
    let node_ports = 30_080..31_080;
    for xdp in ["native", "off"] {
        let (lab, options, _manifests) = start(xdp, node_ports.clone());
        let _outside = serve_outside(&lab);
        masquerade(&lab, None);
        let _agent = lab.start_agent("node-a", &options).unwrap();
        let pod = lab.client("pod", Sockets::Unhooked).unwrap();
        for ip in lab.ips("client").unwrap() {
            for proto in [Proto::Tcp, Proto::Udp] {
                let to = SocketAddr::new(ip, OUTSIDE);
                let many = pod.many(proto, to, 2500, &Dial::default()).unwrap();
                println!(
                    "XDP {xdp}, {proto} to {to}: {} lost of 2500",
                    many.errors.len()
                );
                assert_eq!(many.errors, Default::default());
            }
        }
    }
}
