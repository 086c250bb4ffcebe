//! Every frontend from everywhere, on every network that a cluster has: `shunt_lab::NETWORKS`.
//! Needs root.
//!
//! One cell is a frontend, a client's place, a protocol, a family and the backend's place: 64 KiB
//! both ways, a second connection, and the source that the backend saw. A run goes through all
//! cells of its network, and says which failed.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use shunt_lab::{
    Agent, AgentOptions, Answer, Client, Dial, Lab, Network, Overlay, PodLink, PodSpec, Port,
    Proto, Sockets,
};
use tempfile::TempDir;

const APP: u16 = 8080;
/// What a connection carries each way.
const STREAM: usize = 64 << 10;
/// What a datagram carries each way; in fragments once per network.
const DATAGRAM: usize = 1000;
const FRAGMENTED: usize = 4000;
/// The first port that datagrams are sent from, beyond those that the kernel gives out. Each exchange
/// has its own: by the same one, a client's datagrams to two Services with one backend can not be told
/// apart where only one of them is translated (SPEC N5, not done).
const PORTS: u16 = 61_000;
/// Longest wait for an answer in a cell: the lab answers within milliseconds.
const WAIT: Duration = Duration::from_millis(1500);
/// Once so many cells have failed, the others say nothing new.
const ENOUGH: usize = 24;

/// Where a client stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A pod on node-a whose sockets are hooked.
    Pod,
    /// A pod on node-a whose packets are translated.
    Packets,
    /// A pod on node-b whose packets are translated.
    OtherPod,
    /// A process on node-a.
    Node,
    /// A process on node-a whose packets are translated: it is outside of the hooks' cgroup.
    Process,
    /// A process on node-b.
    OtherNode,
    /// A host outside of the cluster.
    Outside,
    /// A host behind a VPN of node-a.
    Vpn,
}

/// What it dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frontend {
    ClusterIp,
    LoadBalancer,
    /// The node port on node-a.
    NodePort,
    /// The node port on node-a's loopback address.
    Loopback,
    /// The node port on node-b.
    OtherNodePort,
    /// The node port on the address of node-a's second NIC.
    SecondNic,
}

struct Service {
    name: &'static str,
    cluster: [&'static str; 2],
    load_balancer: [&'static str; 2],
    node_port: u16,
    node: &'static str,
}

/// A Service with a backend on node-a alone, and one with a backend on node-b alone.
const SERVICES: [Service; 2] = [
    Service {
        name: "near",
        cluster: ["10.96.0.1", "fd96::1"],
        load_balancer: ["198.51.100.1", "2001:db8:198::1"],
        node_port: 30081,
        node: "node-a",
    },
    Service {
        name: "far",
        cluster: ["10.96.0.2", "fd96::2"],
        load_balancer: ["198.51.100.2", "2001:db8:198::2"],
        node_port: 30082,
        node: "node-b",
    },
];

struct Cluster {
    // Dropped in this order.
    agents: Vec<Agent>,
    lab: Lab,
    network: Network,
    /// The next port that datagrams are sent from.
    ports: AtomicU16,
    _manifests: TempDir,
}

fn manifest(lab: &Lab, service: &Service) -> String {
    let ips = lab.ips(service.name).unwrap();
    let ports = |proto: &str| {
        format!(
            "{{ name: {}, protocol: {proto}, port: 80, targetPort: {APP}, nodePort: {} }}",
            proto.to_lowercase(),
            service.node_port
        )
    };
    let [c4, c6] = service.cluster;
    let [l4, l6] = service.load_balancer;
    let name = service.name;
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec:\n  type: LoadBalancer\n  \
         selector: {{ app: {name} }}\n  clusterIP: {c4}\n  clusterIPs: [{c4}, '{c6}']\n  \
         ipFamilyPolicy: RequireDualStack\n  ipFamilies: [IPv4, IPv6]\n  ports: [{}, {}]\n\
         status: {{ loadBalancer: {{ ingress: [{{ ip: {l4} }}, {{ ip: '{l6}' }}] }} }}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, labels: {{ app: {name} }} }}\n\
         spec: {{ nodeName: {}, containers: [{{ name: app }}] }}\n\
         status: {{ podIP: '{}', podIPs: [{{ ip: '{}' }}, {{ ip: '{}' }}], \
         conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
        ports("TCP"),
        ports("UDP"),
        service.node,
        ips[0],
        ips[0],
        ips[1],
    )
}

impl Cluster {
    fn start(network: Network, xdp: &str) -> Self {
        // In XDP tests senders fill in their checksums, as a wire would have it; otherwise packets
        // look as veths have them.
        let builder = Lab::builder().network(network);
        let builder = if xdp == "off" {
            builder.checksum_offload()
        } else {
            builder
        };
        let lab = builder.build().unwrap();
        let manifests = TempDir::new().unwrap();
        for service in &SERVICES {
            lab.add_pod(&PodSpec::new(
                service.name,
                service.node,
                &[Port::tcp(APP), Port::udp(APP)],
            ))
            .unwrap();
            let path = manifests.path().join(format!("{}.yaml", service.name));
            fs::write(path, manifest(&lab, service)).unwrap();
        }
        for (pod, node) in [
            ("hooked", "node-a"),
            ("packets", "node-a"),
            ("other", "node-b"),
        ] {
            lab.add_pod(&PodSpec::new(pod, node, &[])).unwrap();
        }
        let options = AgentOptions::manifests(manifests.path())
            .xdp(xdp)
            .finds_devices()
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        let agents = ["node-a", "node-b"].map(|node| lab.start_agent(node, &options).unwrap());
        Self {
            agents: agents.into(),
            lab,
            network,
            ports: AtomicU16::new(PORTS),
            _manifests: manifests,
        }
    }

    fn places(&self) -> Vec<(Place, Client)> {
        let client = |name, sockets| self.lab.client(name, sockets).unwrap();
        let mut places = vec![
            (Place::Pod, client("hooked", Sockets::Hooked)),
            (Place::Packets, client("packets", Sockets::Unhooked)),
            (Place::OtherPod, client("other", Sockets::Unhooked)),
            (Place::Node, client("node-a", Sockets::Hooked)),
            (Place::Process, client("node-a", Sockets::Unhooked)),
            (Place::OtherNode, client("node-b", Sockets::Hooked)),
            (Place::Outside, client("client", Sockets::Unhooked)),
        ];
        if self.network.vpn_client {
            places.push((Place::Vpn, client("vpn", Sockets::Unhooked)));
        }
        places
    }

    fn address(&self, service: &Service, frontend: Frontend, v6: bool) -> SocketAddr {
        let family = usize::from(v6);
        match frontend {
            Frontend::ClusterIp => SocketAddr::new(service.cluster[family].parse().unwrap(), 80),
            Frontend::LoadBalancer => {
                SocketAddr::new(service.load_balancer[family].parse().unwrap(), 80)
            }
            Frontend::NodePort => SocketAddr::new(
                self.lab.node_ips("node-a").unwrap()[family],
                service.node_port,
            ),
            Frontend::Loopback => SocketAddr::new(
                match v6 {
                    true => Ipv6Addr::LOCALHOST.into(),
                    false => Ipv4Addr::LOCALHOST.into(),
                },
                service.node_port,
            ),
            Frontend::OtherNodePort => SocketAddr::new(
                self.lab.node_ips("node-b").unwrap()[family],
                service.node_port,
            ),
            Frontend::SecondNic => SocketAddr::new(
                self.lab.second_node_ips("node-a").unwrap()[family],
                service.node_port,
            ),
        }
    }

    /// Whether the network lets such packets pass at all, whoever translates them.
    fn is_possible(&self, place: Place, frontend: Frontend) -> bool {
        let outside = matches!(place, Place::Outside | Place::Vpn);
        match frontend {
            // The fabric drops answers that bear a Service's address.
            Frontend::ClusterIp | Frontend::LoadBalancer => {
                !(self.network.guarded && place == Place::Outside)
            }
            Frontend::NodePort => true,
            Frontend::Loopback => matches!(place, Place::Node | Place::Process),
            // What comes to node-b from a VPN of node-a has no way back there.
            Frontend::OtherNodePort => place != Place::Vpn,
            Frontend::SecondNic => self.network.second_nic && outside,
        }
    }

    /// Addresses that the backend may see a client by.
    fn sources(&self, service: &Service, place: Place, frontend: Frontend) -> Vec<IpAddr> {
        let (client, client_node) = match place {
            Place::Pod => ("hooked", Some("node-a")),
            Place::Packets => ("packets", Some("node-a")),
            Place::OtherPod => ("other", Some("node-b")),
            Place::Node | Place::Process => ("node-a", Some("node-a")),
            Place::OtherNode => ("node-b", Some("node-b")),
            Place::Outside => ("client", None),
            Place::Vpn => ("vpn", None),
        };
        let translates = match frontend {
            Frontend::NodePort | Frontend::SecondNic | Frontend::Loopback => "node-a",
            Frontend::OtherNodePort => "node-b",
            Frontend::ClusterIp | Frontend::LoadBalancer => client_node.unwrap_or("node-a"),
        };
        // P7: kept whenever the client or the backend is on the node that translates.
        if client_node != Some(translates) && service.node != translates {
            return self.way_out(translates, service.node);
        }
        // P10: what is translated on its way gets the address of that way.
        if place == Place::Process && service.node != translates && client_node == Some(translates)
        {
            return self.way_out(translates, service.node);
        }
        let is_node = matches!(place, Place::Node | Place::OtherNode | Place::Process);
        match client_node {
            // A process on a node has no address until it has dialled; and what a pod sends to a
            // node, its CNI masquerades.
            Some(node) if is_node || self.network.masquerade && node != translates => {
                self.all_addresses(node)
            }
            _ => self.lab.ips(client).unwrap(),
        }
    }

    /// P10: the address of the device by which a node reaches another's pods.
    fn way_out(&self, node: &str, to: &str) -> Vec<IpAddr> {
        if node != to && self.network.overlay != Overlay::None {
            let index = self
                .lab
                .nodes()
                .iter()
                .position(|name| name == node)
                .unwrap();
            let [v4, v6] = shunt_lab::pod_cidrs(index);
            return [v4, v6]
                .map(|cidr| cidr.split('/').next().unwrap().parse().unwrap())
                .into();
        }
        self.lab.node_ips(node).unwrap().into()
    }

    fn all_addresses(&self, node: &str) -> Vec<IpAddr> {
        let mut all: Vec<_> = self.lab.node_ips(node).unwrap().into();
        for other in ["node-a", "node-b"] {
            if self.network.overlay != Overlay::None {
                all.extend(self.way_out(node, other));
            }
        }
        if self.network.second_nic {
            all.extend(self.lab.second_node_ips(node).unwrap());
        }
        all
    }
}

/// One cell; what is wrong.
fn cell(
    cluster: &Cluster,
    client: &Client,
    service: &Service,
    proto: Proto,
    cell: Cell,
) -> Result<(), String> {
    let to = cluster.address(service, cell.frontend, cell.v6);
    let padding = if proto == Proto::Tcp {
        STREAM
    } else {
        DATAGRAM
    };
    let sources = cluster.sources(service, cell.place, cell.frontend);
    for which in ["first", "second"] {
        let bind = (proto == Proto::Udp).then(|| {
            let any: IpAddr = match cell.v6 {
                true => Ipv6Addr::UNSPECIFIED.into(),
                false => Ipv4Addr::UNSPECIFIED.into(),
            };
            SocketAddr::new(any, cluster.ports.fetch_add(1, Ordering::Relaxed))
        });
        let dial = Dial {
            padding,
            bind,
            ..Dial::within(WAIT)
        };
        let answer: Answer = client
            .once(proto, to, &dial)
            .map_err(|error| format!("{which} connection: {error}"))?;
        if answer.server != service.name {
            return Err(format!("{} answered", answer.server));
        }
        if answer.echo.len() < padding {
            return Err(format!(
                "{which}: {} of {padding} bytes came back",
                answer.echo.len()
            ));
        }
        if answer.peer.ip() != to.ip() {
            return Err(format!("{which}: the answer bears {}", answer.peer));
        }
        let seen = answer.seen_peer.ip();
        if !sources.contains(&seen) {
            return Err(format!(
                "{which}: the backend saw {seen}, not one of {sources:?}"
            ));
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Cell {
    place: Place,
    frontend: Frontend,
    v6: bool,
}

fn run(name: &str, xdp: &str) {
    let network = Network::named(name).unwrap();
    let cluster = Cluster::start(network, xdp);
    let places = cluster.places();
    let mut failures = Vec::new();
    let mut cells = 0;
    for frontend in [
        Frontend::NodePort,
        Frontend::ClusterIp,
        Frontend::LoadBalancer,
        Frontend::Loopback,
        Frontend::OtherNodePort,
        Frontend::SecondNic,
    ] {
        for (place, client) in &places {
            for service in &SERVICES {
                for (proto, v6) in [
                    (Proto::Tcp, false),
                    (Proto::Udp, false),
                    (Proto::Tcp, true),
                    (Proto::Udp, true),
                ] {
                    if !cluster.is_possible(*place, frontend) || failures.len() >= ENOUGH {
                        continue;
                    }
                    cells += 1;
                    let at = Cell {
                        place: *place,
                        frontend,
                        v6,
                    };
                    if let Err(error) = cell(&cluster, client, service, proto, at) {
                        let family = if v6 { "IPv6" } else { "IPv4" };
                        failures.push(format!(
                            "{name}, XDP {xdp}: {place:?} → {frontend:?} → {} backend, {proto} over {family}: {error}",
                            service.name
                        ));
                    }
                }
            }
        }
    }
    // L7, once per network and family.
    let outside = &places
        .iter()
        .find(|(place, _)| *place == Place::Outside)
        .unwrap()
        .1;
    for v6 in [false, true] {
        let to = cluster.address(&SERVICES[1], Frontend::NodePort, v6);
        let dial = Dial {
            padding: FRAGMENTED,
            ..Dial::within(WAIT)
        };
        // Where the path's MTU is less than the client's own, the first datagrams tell it so.
        let mut answer = outside.once(Proto::Udp, to, &dial);
        for _ in 0..3 {
            if answer.is_err() {
                answer = outside.once(Proto::Udp, to, &dial);
            }
        }
        if let Err(error) = answer {
            failures.push(format!("{name}, XDP {xdp}: fragments to {to}: {error}"));
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {cells} cells failed:\n{}\n{}",
        failures.len(),
        failures.join("\n"),
        cluster.agents[0].output()
    );
    assert!(
        cells
            >= if network.pods == PodLink::Tun {
                150
            } else {
                100
            },
        "only {cells} cells"
    );
}

macro_rules! networks {
    ($($test:ident: $name:literal, $xdp:literal $(, $slow:meta)?;)+) => { $(
        #[test]
        $(#[$slow])?
        fn $test() {
            run($name, $xdp);
        }
    )+ };
}

networks! {
    plain: "plain", "off", ignore = "long: the other cluster tests have this network";
    plain_xdp: "plain", "native", ignore = "long: the other cluster tests have this network";
    vxlan: "vxlan", "off", ignore = "long";
    vxlan_xdp: "vxlan", "native";
    spoof_guarded: "spoof-guarded", "off";
    spoof_guarded_xdp: "spoof-guarded", "native", ignore = "long";
    two_nics: "two-nics", "off";
    two_nics_xdp: "two-nics", "native", ignore = "long";
    tun: "tun", "off";
    tun_xdp: "tun", "native", ignore = "long";
    l3_pods: "l3-pods", "off", ignore = "long";
    l3_pods_xdp: "l3-pods", "native";
    masquerading: "masquerading", "off", ignore = "long";
    masquerading_xdp: "masquerading", "native";
    rp_filter_strict: "rp-filter-strict", "off";
    rp_filter_strict_xdp: "rp-filter-strict", "native", ignore = "long";
}
