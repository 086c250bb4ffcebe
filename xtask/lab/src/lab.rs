//! The topology: fabric, nodes, pods and outside hosts, and who runs where.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    agent::{Agent, AgentOptions},
    cgroup,
    client::{self, Client},
    netns::NetNs,
    protocol::Proto,
    registry::{self, LabId},
};

/// The nodes' LAN; the fabric has `.1`, nodes have `.11` and up.
pub const NODE_LAN_V4: &str = "192.168.50.0/24";
/// The nodes' LAN; the fabric has `::1`, nodes have `::11` and up.
pub const NODE_LAN_V6: &str = "fd50::/64";
/// The cluster's pods; each node has a part ([`pod_cidrs`]).
pub(crate) const POD_CIDRS: [&str; 2] = ["10.44.0.0/16", "fd44::/48"];
/// ClusterIPs.
pub(crate) const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/12", "fd96::/108"];
/// Load balancer and external IPs.
const EXTERNAL_CIDRS: [&str; 2] = ["198.51.100.0/24", "2001:db8:198::/64"];
/// The fabric on the outside network.
const WAN_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const WAN_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 1);
/// Every pod's gateway with [`Cni::Routed`], as Calico has it: no device has it, the node answers ARP by proxy.
const POD_GATEWAY_V4: &str = "169.254.1.1";
const POD_GATEWAY_V6: &str = "fe80::ee:ee";
/// The longest device name: `IFNAMSIZ` less its end.
const MAX_DEVICE_NAME: usize = 15;
/// Last byte of the first pod address that the lab gives itself.
const FIRST_FREE_HOST: u16 = 100;
/// Last byte of the node's own address with [`Cni::Bridge`].
const BRIDGE_HOST: u16 = 254;

/// How pods are joined to their node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cni {
    /// A route per pod to its veth, gateway by proxy ARP (Calico, Cilium).
    #[default]
    Routed,
    /// A bridge `cni0` per node that switches between its pods at layer 2 (flannel, kubenet), without br_netfilter.
    Bridge,
}

/// Whether a process's sockets are seen by its node's socket hooks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sockets {
    /// In the node's cgroup: `connect` and `sendmsg` are rewritten.
    #[default]
    Hooked,
    /// Outside of it, as VMs, sandboxed and outside clients: packets are translated.
    Unhooked,
}

/// A port that a pod's server listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port {
    /// Its protocol.
    pub proto: Proto,
    /// Its number.
    pub number: u16,
}

impl Port {
    /// A TCP port.
    #[must_use]
    pub fn tcp(number: u16) -> Self {
        Self {
            proto: Proto::Tcp,
            number,
        }
    }

    /// A UDP port.
    #[must_use]
    pub fn udp(number: u16) -> Self {
        Self {
            proto: Proto::Udp,
            number,
        }
    }
}

/// A pod to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSpec {
    /// Its name, which its server answers with; unique within the lab.
    pub name: String,
    /// The node it runs on.
    pub node: String,
    /// Its addresses; empty: one per family, chosen from the node's pod CIDRs.
    pub ips: Vec<IpAddr>,
    /// What its server listens on.
    pub ports: Vec<Port>,
    /// Of its server; clients in the pod choose for themselves.
    pub sockets: Sockets,
}

impl PodSpec {
    /// A pod with addresses of both families that the lab chooses.
    #[must_use]
    pub fn new(name: &str, node: &str, ports: &[Port]) -> Self {
        Self {
            name: name.to_owned(),
            node: node.to_owned(),
            ips: Vec::new(),
            ports: ports.to_vec(),
            sockets: Sockets::Hooked,
        }
    }
}

/// Settings of a lab.
#[derive(Clone, Debug)]
pub struct LabBuilder {
    nodes: Vec<String>,
    entry: Option<String>,
    cni: Cni,
    strict_rp_filter: bool,
    checksum_offload: bool,
}

impl LabBuilder {
    /// The nodes' names; at most 16. By default `node-a` and `node-b`.
    #[must_use]
    pub fn nodes(mut self, names: &[&str]) -> Self {
        self.nodes = names.iter().map(|&name| name.to_owned()).collect();
        self
    }

    /// The node that the fabric routes service addresses to; the first by default.
    #[must_use]
    pub fn entry(mut self, node: &str) -> Self {
        self.entry = Some(node.to_owned());
        self
    }

    /// How pods are joined to nodes.
    #[must_use]
    pub fn cni(mut self, cni: Cni) -> Self {
        self.cni = cni;
        self
    }

    /// Nodes check packets' sources by reverse path (RFC 3704 strict mode).
    #[must_use]
    pub fn strict_rp_filter(mut self) -> Self {
        self.strict_rp_filter = true;
        self
    }

    /// Leaves transmit checksums to devices, so that packets between veths carry `CHECKSUM_PARTIAL` and large segments.
    /// For tc and sockets: XDP on a veth would see checksums that no wire has.
    #[must_use]
    pub fn checksum_offload(mut self) -> Self {
        self.checksum_offload = true;
        self
    }

    /// Makes the fabric, the nodes and an outside host `client`.
    ///
    /// # Errors
    ///
    /// When a namespace, device, route or cgroup cannot be made; what was made is removed again.
    pub fn build(self) -> Result<Lab> {
        Lab::build(self)
    }
}

#[derive(Debug)]
struct Node {
    index: usize,
    ns: NetNs,
    addresses: [IpAddr; 2],
}

/// A namespace that processes can be started in.
#[derive(Debug)]
struct Place {
    ns: NetNs,
    /// The node whose socket hooks can see it.
    node: Option<String>,
    ips: Vec<IpAddr>,
    /// The device on the other side of its `eth0`.
    device: Option<String>,
    /// The pod's server.
    server: Option<Client>,
}

#[derive(Debug, Default)]
struct State {
    nodes: BTreeMap<String, Node>,
    places: BTreeMap<String, Place>,
}

/// A cluster; everything it made goes when it is dropped.
#[derive(Debug)]
pub struct Lab {
    state: Mutex<State>,
    fabric: NetNs,
    settings: LabBuilder,
    cgroup: PathBuf,
    // Last: dropping it ends processes and removes namespaces, pins and cgroups that are left.
    id: LabId,
}

/// The pod CIDRs of the node with this index: `10.44.0.0/24`, `fd44:0:0:a::/64` for the first.
#[must_use]
pub fn pod_cidrs(node: usize) -> [String; 2] {
    [format!("10.44.{node}.0/24"), format!("fd44:0:0:{:x}::/64", 0xa + node)]
}

fn pod_address_v4(node: usize, host: u16) -> IpAddr {
    // Node indices are checked to be below 16, hosts come from below 256.
    Ipv4Addr::new(10, 44, node as u8, host as u8).into()
}

fn pod_address_v6(node: usize, host: u16) -> IpAddr {
    Ipv6Addr::new(0xfd44, 0, 0, 0xa + node as u16, 0, 0, 0, host).into()
}

fn host_route(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })
}

impl Lab {
    /// Two nodes `node-a` and `node-b` with routed pods, and an outside host `client`.
    ///
    /// # Errors
    ///
    /// As [`LabBuilder::build`].
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// Settings for another one.
    #[must_use]
    pub fn builder() -> LabBuilder {
        LabBuilder {
            nodes: vec!["node-a".to_owned(), "node-b".to_owned()],
            entry: None,
            cni: Cni::default(),
            strict_rp_filter: false,
            checksum_offload: false,
        }
    }

    /// Removes what labs of killed processes left; labs of living ones stay. Returns how many there were.
    ///
    /// # Errors
    ///
    /// When the registry of labs cannot be read.
    pub fn sweep_stale() -> Result<usize> {
        registry::sweep_stale()
    }

    fn build(settings: LabBuilder) -> Result<Self> {
        ensure!(
            (1..=16).contains(&settings.nodes.len()),
            "a lab has 1 to 16 nodes, not {}",
            settings.nodes.len()
        );
        let root = cgroup::mount_point()?;
        let id = LabId::take()?;
        let cgroup = root.join(id.prefix());
        let fabric = NetNs::create(&format!("{}-fabric", id.prefix()))?;
        let lab = Self {
            state: Mutex::default(),
            fabric,
            settings,
            cgroup,
            id,
        };
        lab.make_fabric()?;
        for (index, name) in lab.settings.nodes.clone().iter().enumerate() {
            lab.make_node(index, name)?;
        }
        lab.route_nodes()?;
        let entry = lab
            .settings
            .entry
            .clone()
            .unwrap_or_else(|| lab.settings.nodes[0].clone());
        for cidr in SERVICE_CIDRS.into_iter().chain(EXTERNAL_CIDRS) {
            lab.route(cidr, &entry)?;
        }
        let client = [
            Ipv4Addr::new(203, 0, 113, 10).into(),
            Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10).into(),
        ];
        lab.add_outside("client", &client, &[])?;
        Ok(lab)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a namespace in which addresses are usable at once and packets are forwarded if it is a router.
    fn make_ns(&self, name: &str, router: bool) -> Result<NetNs> {
        let ns = NetNs::create(&format!("{}-{name}", self.id.prefix()))?;
        configure(&ns, router, self.settings.strict_rp_filter && name != "fabric")?;
        Ok(ns)
    }

    fn make_fabric(&self) -> Result<()> {
        configure(&self.fabric, true, false)?;
        self.fabric.ip(&[
            "link add lan0 type bridge mcast_snooping 0".to_owned(),
            "link set lan0 up".to_owned(),
            "address add 192.168.50.1/24 dev lan0".to_owned(),
            "address add fd50::1/64 dev lan0 nodad".to_owned(),
            "link add wan0 type bridge mcast_snooping 0".to_owned(),
            "link set wan0 up".to_owned(),
            format!("address add {WAN_GATEWAY_V4}/24 dev wan0"),
            format!("address add {WAN_GATEWAY_V6}/64 dev wan0 nodad"),
        ])
    }

    fn make_node(&self, index: usize, name: &str) -> Result<()> {
        let ns = self.make_ns(name, true)?;
        let host = 11 + index;
        // The same digits in both families; IPv6 reads them as hexadecimal.
        let addresses = [format!("192.168.50.{host}").parse()?, format!("fd50::{host}").parse()?];
        ensure!(
            name.len() <= MAX_DEVICE_NAME,
            "node {name}: the name has more than {MAX_DEVICE_NAME} bytes"
        );
        self.fabric.ip(&[
            format!("link add name {name} type veth peer name eth0 netns {}", ns.name()),
            format!("link set {name} master lan0 up"),
        ])?;
        let mut lines = vec![
            "link set eth0 up".to_owned(),
            format!("address add {}/24 dev eth0", addresses[0]),
            format!("address add {}/64 dev eth0 nodad", addresses[1]),
            "route add default via 192.168.50.1".to_owned(),
            "route add default via fd50::1".to_owned(),
        ];
        if self.settings.cni == Cni::Bridge {
            lines.extend([
                "link add cni0 type bridge mcast_snooping 0".to_owned(),
                "link set cni0 up".to_owned(),
                format!("address add {}/24 dev cni0", pod_address_v4(index, BRIDGE_HOST)),
                format!("address add {}/64 dev cni0 nodad", pod_address_v6(index, BRIDGE_HOST)),
            ]);
        }
        ns.ip(&lines)?;
        // XDP on the node's eth0 sends back through this peer, which takes frames from XDP only with NAPI, so GRO, on.
        self.offloads(&self.fabric, &[name], true)?;
        self.offloads(&ns, &["eth0"], false)?;
        cgroup::create(&self.node_cgroup(name).join("pods"))?;
        cgroup::create(&self.node_cgroup(name).join("host"))?;
        cgroup::create(&self.cgroup.join("unhooked"))?;
        let mut state = self.state();
        let place = Place {
            ns: ns.clone(),
            node: Some(name.to_owned()),
            ips: addresses.to_vec(),
            device: None,
            server: None,
        };
        ensure!(
            state.places.insert(name.to_owned(), place).is_none(),
            "two nodes have the name {name}"
        );
        state.nodes.insert(name.to_owned(), Node { index, ns, addresses });
        Ok(())
    }

    /// Routes to the nodes' pod CIDRs on the other nodes and in the fabric, as host-gw and BGP set them.
    fn route_nodes(&self) -> Result<()> {
        let state = self.state();
        let to = |node: &Node| {
            pod_cidrs(node.index)
                .into_iter()
                .zip(node.addresses)
                .map(|(cidr, gateway)| format!("route add {cidr} via {gateway}"))
                .collect::<Vec<_>>()
        };
        for node in state.nodes.values() {
            let others = state.nodes.values().filter(|other| other.index != node.index);
            let lines: Vec<_> = others.flat_map(to).collect();
            if !lines.is_empty() {
                node.ns.ip(&lines)?;
            }
        }
        self.fabric.ip(&state.nodes.values().flat_map(to).collect::<Vec<_>>())
    }

    /// Makes the fabric route a CIDR to a node, instead of to another if it did.
    ///
    /// # Errors
    ///
    /// When the lab has no such node, or the CIDR is none.
    pub fn route(&self, cidr: &str, node: &str) -> Result<()> {
        let state = self.state();
        let node = state
            .nodes
            .get(node)
            .with_context(|| format!("the lab has no node {node}"))?;
        let gateway = node.addresses[usize::from(cidr.contains(':'))];
        self.fabric.ip(&[format!("route replace {cidr} via {gateway}")])
    }

    /// Turns transmit checksums off, so that packets look as on a wire, and GRO on if asked to.
    fn offloads(&self, ns: &NetNs, devices: &[&str], gro: bool) -> Result<()> {
        let mut settings = String::new();
        if !self.settings.checksum_offload {
            settings.push_str(" tx off");
        }
        if gro {
            settings.push_str(" gro on");
        }
        if settings.is_empty() {
            return Ok(());
        }
        let script: Vec<_> = devices
            .iter()
            .map(|device| format!("ethtool -K {device}{settings}"))
            .collect();
        ns.output("sh", &["-c", &script.join(" && ")]).map(drop)
    }

    /// Makes a pod and starts its server; it answers when this returns.
    ///
    /// # Errors
    ///
    /// When the name is taken, the lab has no such node, or a namespace, device, route or socket cannot be made.
    pub fn add_pod(&self, pod: &PodSpec) -> Result<()> {
        self.add_pod_inner(pod).with_context(|| format!("pod {}", pod.name))
    }

    fn add_pod_inner(&self, pod: &PodSpec) -> Result<()> {
        let mut state = self.state();
        ensure!(!state.places.contains_key(&pod.name), "the name is taken");
        let State { nodes, places } = &mut *state;
        let node = nodes
            .get(&pod.node)
            .with_context(|| format!("the lab has no node {}", pod.node))?;
        let ips = if pod.ips.is_empty() {
            free_addresses(node.index, places)?
        } else {
            pod.ips.clone()
        };
        if let Some((name, _)) = places
            .iter()
            .find(|(_, place)| place.ips.iter().any(|ip| ips.contains(ip)))
        {
            bail!("{name} has the same address");
        }
        let device = device_name(&pod.name, &pod.node, places);
        let ns = self.make_ns(&pod.name, false)?;
        let mut on_node = vec![format!(
            "link add name {device} type veth peer name eth0 netns {}",
            ns.name()
        )];
        let mut in_pod = vec!["link set eth0 up".to_owned()];
        match self.settings.cni {
            Cni::Routed => {
                on_node.push(format!("link set {device} up"));
                on_node.push(format!("address add {POD_GATEWAY_V6}/64 dev {device} nodad"));
                on_node.extend(
                    ips.iter()
                        .map(|&ip| format!("route add {} dev {device}", host_route(ip))),
                );
                in_pod.extend(ips.iter().map(|&ip| add_address(ip, &host_route(ip))));
                if ips.iter().any(IpAddr::is_ipv4) {
                    in_pod.push(format!("route add {POD_GATEWAY_V4} dev eth0 scope link"));
                    in_pod.push(format!("route add default via {POD_GATEWAY_V4} dev eth0"));
                }
                if ips.iter().any(IpAddr::is_ipv6) {
                    in_pod.push(format!("route add default via {POD_GATEWAY_V6} dev eth0"));
                }
            }
            Cni::Bridge => {
                on_node.push(format!("link set {device} master cni0 up"));
                for &ip in &ips {
                    let (length, gateway) = if ip.is_ipv4() {
                        (24, pod_address_v4(node.index, BRIDGE_HOST))
                    } else {
                        (64, pod_address_v6(node.index, BRIDGE_HOST))
                    };
                    in_pod.push(add_address(ip, &format!("{ip}/{length}")));
                    in_pod.push(format!("route replace default via {gateway}"));
                }
            }
        }
        node.ns.ip(&on_node)?;
        if self.settings.cni == Cni::Routed {
            let proxy_arp = format!("ipv4.conf.{device}.proxy_arp");
            // The kernel would wait up to 0.8 s before it answers for another.
            let proxy_delay = format!("ipv4.neigh.{device}.proxy_delay");
            node.ns.sysctl(&[(&proxy_arp, "1"), (&proxy_delay, "0")])?;
        }
        ns.ip(&in_pod)?;
        self.offloads(&node.ns, &[&device], false)?;
        self.offloads(&ns, &["eth0"], false)?;
        let cgroup = match pod.sockets {
            Sockets::Hooked => self.node_cgroup(&pod.node).join("pods"),
            Sockets::Unhooked => self.cgroup.join("unhooked"),
        };
        let server = start_server(&pod.name, &ns, &cgroup, &ips, &pod.ports)?;
        let place = Place {
            ns,
            node: Some(pod.node.clone()),
            ips,
            device: Some(device),
            server,
        };
        places.insert(pod.name.clone(), place);
        Ok(())
    }

    /// Makes a host outside of the cluster; its server, if it has ports, answers when this returns. The fabric routes
    /// addresses of any range to it.
    ///
    /// # Errors
    ///
    /// When the name or an address is taken, or a namespace, device, route or socket cannot be made.
    pub fn add_outside(&self, name: &str, ips: &[IpAddr], ports: &[Port]) -> Result<()> {
        self.add_outside_inner(name, ips, ports)
            .with_context(|| format!("outside host {name}"))
    }

    fn add_outside_inner(&self, name: &str, ips: &[IpAddr], ports: &[Port]) -> Result<()> {
        let mut state = self.state();
        ensure!(!state.places.contains_key(name), "the name is taken");
        let device = device_name(name, "", &state.places);
        let ns = self.make_ns(name, false)?;
        let mut in_fabric = vec![
            format!("link add name {device} type veth peer name eth0 netns {}", ns.name()),
            format!("link set {device} master wan0 up"),
        ];
        let mut inside = vec!["link set eth0 up".to_owned()];
        for &ip in ips {
            let (on_link, length, gateway): (bool, u8, IpAddr) = match ip {
                IpAddr::V4(ip) => (
                    ip.octets()[..3] == WAN_GATEWAY_V4.octets()[..3],
                    24,
                    WAN_GATEWAY_V4.into(),
                ),
                IpAddr::V6(ip) => (
                    ip.segments()[..4] == WAN_GATEWAY_V6.segments()[..4],
                    64,
                    WAN_GATEWAY_V6.into(),
                ),
            };
            if on_link {
                inside.push(add_address(ip, &format!("{ip}/{length}")));
            } else {
                inside.push(add_address(ip, &host_route(ip)));
                in_fabric.push(format!("route add {} dev wan0", host_route(ip)));
            }
            inside.push(format!("route replace default via {gateway} dev eth0 onlink"));
        }
        self.fabric.ip(&in_fabric)?;
        ns.ip(&inside)?;
        self.offloads(&self.fabric, &[&device], false)?;
        self.offloads(&ns, &["eth0"], false)?;
        let unhooked = self.cgroup.join("unhooked");
        let server = if ports.is_empty() {
            None
        } else {
            start_server(name, &ns, &unhooked, ips, ports)?
        };
        let place = Place {
            ns,
            node: None,
            ips: ips.to_vec(),
            device: Some(device),
            server,
        };
        state.places.insert(name.to_owned(), place);
        Ok(())
    }

    /// Removes a pod or an outside host with its devices and routes; clients in it lose their network.
    ///
    /// # Errors
    ///
    /// When the lab has none of that name.
    pub fn remove(&self, name: &str) -> Result<()> {
        let mut state = self.state();
        ensure!(!state.nodes.contains_key(name), "{name} is a node: nodes stay");
        let place = state
            .places
            .remove(name)
            .with_context(|| format!("the lab has no pod {name}"))?;
        drop(place.server);
        let device = place.device.with_context(|| format!("{name} has no device"))?;
        let other = place
            .node
            .and_then(|node| state.nodes.get(&node))
            .map_or(&self.fabric, |node| &node.ns);
        // The namespace may outlive its name (a client in it), so the device does not go with it at once.
        other.ip(&[format!("link delete {device}")])
    }

    /// Ends a pod's server, or starts it again: the pod stays, its ports are closed meanwhile.
    ///
    /// # Errors
    ///
    /// When the lab has no such pod, or a port cannot be listened on.
    pub fn set_serving(&self, name: &str, ports: &[Port]) -> Result<()> {
        let mut state = self.state();
        let place = state
            .places
            .get_mut(name)
            .with_context(|| format!("the lab has no pod {name}"))?;
        place.server = None;
        let cgroup = match &place.node {
            Some(node) => self.node_cgroup(node).join("pods"),
            None => self.cgroup.join("unhooked"),
        };
        if !ports.is_empty() {
            place.server = start_server(name, &place.ns, &cgroup, &place.ips, ports)?;
        }
        Ok(())
    }

    /// Makes the pods of a manifest list, and leaves out those that exist.
    ///
    /// # Errors
    ///
    /// As [`Self::add_pod`].
    pub fn add_pods(&self, pods: &[PodSpec]) -> Result<()> {
        for pod in pods {
            if !self.has(&pod.name) {
                self.add_pod(pod)?;
            }
        }
        Ok(())
    }

    /// Whether there is a node, pod or outside host of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.state().places.contains_key(name)
    }

    /// Names of the nodes, in the order of their pod CIDRs.
    #[must_use]
    pub fn nodes(&self) -> &[String] {
        &self.settings.nodes
    }

    /// The IPv4 and IPv6 address of a node's `eth0`.
    ///
    /// # Errors
    ///
    /// When the lab has no such node.
    pub fn node_ips(&self, node: &str) -> Result<[IpAddr; 2]> {
        let state = self.state();
        Ok(state
            .nodes
            .get(node)
            .with_context(|| format!("the lab has no node {node}"))?
            .addresses)
    }

    /// The addresses of a node, pod or outside host.
    ///
    /// # Errors
    ///
    /// When the lab has none of that name.
    pub fn ips(&self, name: &str) -> Result<Vec<IpAddr>> {
        self.place(name, |place| place.ips.clone())
    }

    /// Which node, pod or outside host has an address.
    #[must_use]
    pub fn name_of(&self, ip: IpAddr) -> Option<String> {
        self.state()
            .places
            .iter()
            .find(|(_, place)| place.ips.contains(&ip))
            .map(|(name, _)| name.clone())
    }

    /// Name of the device on the node (or in the fabric) that leads to a pod (or outside host).
    ///
    /// # Errors
    ///
    /// When the lab has none of that name.
    pub fn device(&self, name: &str) -> Result<String> {
        self.place(name, |place| place.device.clone())?
            .with_context(|| format!("{name} is a node"))
    }

    /// The namespace of a node, pod or outside host, or of `fabric`.
    ///
    /// # Errors
    ///
    /// When the lab has none of that name.
    pub fn ns(&self, name: &str) -> Result<NetNs> {
        if name == "fabric" {
            return Ok(self.fabric.clone());
        }
        self.place(name, |place| place.ns.clone())
    }

    fn place<T>(&self, name: &str, f: impl FnOnce(&Place) -> T) -> Result<T> {
        let state = self.state();
        Ok(f(state.places.get(name).with_context(|| {
            format!("the lab has no node, pod or outside host {name}")
        })?))
    }

    /// The cgroup that a node's socket hooks are attached to.
    #[must_use]
    pub fn node_cgroup(&self, node: &str) -> PathBuf {
        self.cgroup.join(node)
    }

    /// Where an agent of this node pins its objects.
    #[must_use]
    pub fn bpf_root(&self, node: &str) -> PathBuf {
        Path::new(registry::BPFFS).join(format!("{}-{node}", self.id.prefix()))
    }

    /// The cgroup for a process somewhere in the lab.
    fn cgroup_of(&self, name: &str, sockets: Sockets) -> Result<PathBuf> {
        let node = self.place(name, |place| place.node.clone())?;
        match (sockets, node) {
            (Sockets::Unhooked, _) => Ok(self.cgroup.join("unhooked")),
            (Sockets::Hooked, Some(node)) if node == name => Ok(self.node_cgroup(&node).join("host")),
            (Sockets::Hooked, Some(node)) => Ok(self.node_cgroup(&node).join("pods")),
            (Sockets::Hooked, None) => bail!("{name} is outside of the cluster: no node hooks its sockets"),
        }
    }

    /// A client process on a node, in a pod or on an outside host.
    ///
    /// # Errors
    ///
    /// When the lab has none of that name, or an outside host's sockets are to be hooked.
    pub fn client(&self, name: &str, sockets: Sockets) -> Result<Client> {
        Client::start(name, &self.ns(name)?, &self.cgroup_of(name, sockets)?)
    }

    /// A program to be started on a node, in a pod or on an outside host.
    ///
    /// # Errors
    ///
    /// When the lab has none of that name, or an outside host's sockets are to be hooked.
    pub fn command(&self, name: &str, sockets: Sockets, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        if name == "fabric" {
            ensure!(sockets == Sockets::Unhooked, "no node hooks the fabric's sockets");
            client::join_cgroup(&mut command, &self.cgroup.join("unhooked"))?;
        } else {
            client::join_cgroup(&mut command, &self.cgroup_of(name, sockets)?)?;
        }
        self.ns(name)?.enter(&mut command)?;
        Ok(command)
    }

    /// Starts the agent of a node and waits until its datapath is live.
    ///
    /// # Errors
    ///
    /// With what the agent printed, when it ends or is not ready in time.
    pub fn start_agent(&self, node: &str, options: &AgentOptions) -> Result<Agent> {
        Agent::start(self, node, options)
    }

    /// An agent of a node that does not run yet: for those that are not to become ready.
    ///
    /// # Errors
    ///
    /// When the lab has no such node, or there is no binary.
    pub fn agent(&self, node: &str, options: &AgentOptions) -> Result<Agent> {
        Agent::new(self, node, options)
    }

    /// The PIDs of every process in the lab's cgroups: pods, clients and agents.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        cgroup::processes(&self.cgroup)
    }

    /// The prefix of the machine-wide names of everything in this lab: namespaces, cgroup, pins.
    #[must_use]
    pub fn prefix(&self) -> String {
        self.id.prefix()
    }
}

/// Addresses usable at once (no duplicate address detection), no router advertisements and redirects.
fn configure(ns: &NetNs, router: bool, strict_rp_filter: bool) -> Result<()> {
    let forward = if router { "1" } else { "0" };
    let rp_filter = if strict_rp_filter { "1" } else { "0" };
    ns.sysctl(&[
        ("ipv4.conf.all.rp_filter", rp_filter),
        ("ipv4.conf.default.rp_filter", rp_filter),
        ("ipv4.conf.all.send_redirects", "0"),
        ("ipv4.conf.default.send_redirects", "0"),
        ("ipv4.ip_forward", forward),
        ("ipv6.conf.all.forwarding", forward),
        ("ipv6.conf.all.accept_dad", "0"),
        ("ipv6.conf.default.accept_dad", "0"),
        ("ipv6.conf.default.dad_transmits", "0"),
        ("ipv6.conf.default.accept_ra", "0"),
    ])
}

fn add_address(ip: IpAddr, with_length: &str) -> String {
    format!(
        "address add {with_length} dev eth0{}",
        if ip.is_ipv6() { " nodad" } else { "" }
    )
}

/// A server on every address and port, without loopback: UDP answers then come from the address that was asked.
fn start_server(name: &str, ns: &NetNs, cgroup: &Path, ips: &[IpAddr], ports: &[Port]) -> Result<Option<Client>> {
    let server = Client::start(name, ns, cgroup)?;
    let listen: Vec<(Proto, SocketAddr)> = ips
        .iter()
        .flat_map(|&ip| {
            ports
                .iter()
                .map(move |port| (port.proto, SocketAddr::new(ip, port.number)))
        })
        .collect();
    server.serve(name, &listen)?;
    Ok(Some(server))
}

/// `veth-<pod>`, with the pod's end only where the whole is too long, and a number where that is taken.
fn device_name(pod: &str, node: &str, places: &BTreeMap<String, Place>) -> String {
    let taken = |name: &str| {
        places
            .values()
            .any(|place| place.node.as_deref().unwrap_or_default() == node && place.device.as_deref() == Some(name))
    };
    let mut tail: String = pod
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    tail = tail.split_off(tail.len().saturating_sub(MAX_DEVICE_NAME - "veth-".len()));
    let mut name = format!("veth-{tail}");
    let mut number = 0_usize;
    while taken(&name) {
        name = format!("veth-{number}");
        number += 1;
    }
    name
}

/// The first pair of addresses in the node's pod CIDRs that nothing has.
fn free_addresses(node: usize, places: &BTreeMap<String, Place>) -> Result<Vec<IpAddr>> {
    (FIRST_FREE_HOST..BRIDGE_HOST)
        .map(|host| vec![pod_address_v4(node, host), pod_address_v6(node, host)])
        .find(|pair| {
            !places
                .values()
                .any(|place| place.ips.iter().any(|ip| pair.contains(ip)))
        })
        .context("the node's pod CIDR is used up")
}
