//! The fabric and the nodes.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};

use super::{
    BRIDGE_HOST, Cni, Lab, MAX_DEVICE_NAME, NODE_LAN_V4, NODE_LAN_V6, Node, Overlay, POD_CIDRS,
    Place, WAN_GATEWAY_V4, WAN_GATEWAY_V6, pod_address_v4, pod_address_v6, pod_cidrs,
};
use crate::{cgroup, netns::NetNs, tunnel::Tunnel};

/// Number of the routing table, and of the rules, of a second NIC.
const SECOND_TABLE: u32 = 60;
/// Identifier and UDP port of the overlay, flannel's.
const VXLAN: &str = "id 1 dstport 8472";

impl Lab {
    /// The addresses of a node's second NIC ([`super::Network::second_nic`]).
    ///
    /// # Errors
    ///
    /// When the lab has no such node.
    pub fn second_node_ips(&self, node: &str) -> Result<[IpAddr; 2]> {
        let index = self.state().nodes.get(node).map(|node| node.index);
        second_addresses(index.with_context(|| format!("the lab has no node {node}"))?)
    }

    /// Makes a namespace in which addresses are usable at once and packets are forwarded if it is a
    /// router.
    pub(super) fn make_ns(&self, name: &str, router: bool) -> Result<NetNs> {
        let ns = NetNs::create(&format!("{}-{name}", self.id.prefix()))?;
        configure(
            &ns,
            router,
            self.settings.network.strict_rp_filter && name != "fabric",
        )?;
        Ok(ns)
    }

    pub(super) fn make_fabric(&self) -> Result<()> {
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

    pub(super) fn make_node(&self, index: usize, name: &str) -> Result<()> {
        let ns = self.make_ns(name, true)?;
        let host = 11 + index;
        // The same digits in both families; IPv6 reads them as hexadecimal.
        let addresses = [
            format!("192.168.50.{host}").parse()?,
            format!("fd50::{host}").parse()?,
        ];
        ensure!(
            name.len() <= MAX_DEVICE_NAME,
            "node {name}: the name has more than {MAX_DEVICE_NAME} bytes"
        );
        self.fabric.ip(&[
            format!(
                "link add name {name} type veth peer name eth0 netns {}",
                ns.name()
            ),
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
                format!(
                    "address add {}/24 dev cni0",
                    pod_address_v4(index, BRIDGE_HOST)
                ),
                format!(
                    "address add {}/64 dev cni0 nodad",
                    pod_address_v6(index, BRIDGE_HOST)
                ),
            ]);
        }
        ns.ip(&lines)?;
        // XDP on the node's eth0 sends back through this peer, which takes frames from XDP only
        // with NAPI, so GRO, on.
        self.offloads(&self.fabric, &[name], true)?;
        self.offloads(&ns, &["eth0"], false)?;
        let network = self.settings.network;
        if network.second_nic {
            self.add_second_nic(index, name, &ns)?;
        }
        if network.guarded {
            self.guard(name, addresses)?;
        }
        if network.masquerade {
            masquerade(&ns)?;
        }
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
            tunnel: None,
        };
        ensure!(
            state.places.insert(name.to_owned(), place).is_none(),
            "two nodes have the name {name}"
        );
        state.nodes.insert(
            name.to_owned(),
            Node {
                index,
                ns,
                addresses,
            },
        );
        Ok(())
    }

    /// A second NIC on a LAN of its own; what the node and its pods answer from there leaves by it.
    fn add_second_nic(&self, index: usize, name: &str, ns: &NetNs) -> Result<()> {
        let [v4, v6] = second_addresses(index)?;
        let port = format!("{name}.1");
        if index == 0 {
            self.fabric.ip(&[
                "link add lan1 type bridge mcast_snooping 0".to_owned(),
                "link set lan1 up".to_owned(),
                "address add 192.168.60.1/24 dev lan1".to_owned(),
                "address add fd60::1/64 dev lan1 nodad".to_owned(),
            ])?;
        }
        self.fabric.ip(&[
            format!(
                "link add name {port} type veth peer name eth1 netns {}",
                ns.name()
            ),
            format!("link set {port} master lan1 up"),
        ])?;
        let [pods4, pods6] = pod_cidrs(index);
        ns.ip(&[
            "link set eth1 up".to_owned(),
            format!("address add {v4}/24 dev eth1"),
            format!("address add {v6}/64 dev eth1 nodad"),
            format!("route add default via 192.168.60.1 dev eth1 table {SECOND_TABLE}"),
            format!("route add ::/0 via fd60::1 dev eth1 table {SECOND_TABLE}"),
        ])?;
        let rules =
            |family: &str, own: IpAddr, pods: &str, cluster: &str, lan: &str| -> Result<()> {
                for rule in [
                    format!("from {own} table {SECOND_TABLE} priority 100"),
                    // Within the cluster the main table goes first; the rest of what pods send
                    // leaves by the second NIC.
                    format!("from {pods} to {cluster} table main priority 99"),
                    format!("from {pods} to {lan} table main priority 99"),
                    format!("from {pods} table {SECOND_TABLE} priority 101"),
                ] {
                    let args: Vec<_> = [family, "rule", "add"]
                        .into_iter()
                        .chain(rule.split(' '))
                        .collect();
                    ns.output("ip", &args)?;
                }
                Ok(())
            };
        rules("-4", v4, &pods4, POD_CIDRS[0], NODE_LAN_V4)?;
        rules("-6", v6, &pods6, POD_CIDRS[1], NODE_LAN_V6)?;
        self.offloads(&self.fabric, &[&port], true)?;
        self.offloads(ns, &["eth1"], false)
    }

    /// Lets the fabric drop what a node sends in another's name.
    fn guard(&self, port: &str, [v4, v6]: [IpAddr; 2]) -> Result<()> {
        // nftables takes no hyphens in names.
        let chain = port.replace('-', "_");
        let rules = format!(
            "table netdev guard {{\nchain {chain} {{\ntype filter hook ingress device \"{port}\" priority 0;\n\
             ip saddr != {v4} drop\nip6 saddr != {{ {v6}, fe80::/10 }} drop\n}}\n}}\n"
        );
        self.fabric.output("nft", &[&rules]).map(drop)
    }

    /// Joins the nodes as the network says.
    pub(super) fn join_nodes(&self) -> Result<()> {
        match self.settings.network.overlay {
            Overlay::None => self.route_nodes(),
            Overlay::Vxlan => self.overlay_vxlan(),
            Overlay::Tun => self.overlay_tun(),
        }
    }

    /// A `vxlan` device on each node with an address of its own, and routes over it, as flannel
    /// sets them.
    fn overlay_vxlan(&self) -> Result<()> {
        let state = self.state();
        for node in state.nodes.values() {
            let [own4, own6] = overlay_addresses(node.index);
            let mut lines = vec![
                format!(
                    "link add flannel.1 address {} mtu 1430 type vxlan {VXLAN} local {} dev eth0 nolearning",
                    overlay_mac(node.index),
                    node.addresses[0]
                ),
                "link set flannel.1 up".to_owned(),
                format!("address add {own4}/32 dev flannel.1"),
                format!("address add {own6}/128 dev flannel.1 nodad"),
            ];
            for other in state
                .nodes
                .values()
                .filter(|other| other.index != node.index)
            {
                let mac = overlay_mac(other.index);
                let gateways = overlay_addresses(other.index);
                for (cidr, gateway) in pod_cidrs(other.index).iter().zip(gateways) {
                    lines.push(format!(
                        "neigh replace {gateway} lladdr {mac} dev flannel.1 nud permanent"
                    ));
                    lines.push(format!(
                        "route add {cidr} via {gateway} dev flannel.1 onlink"
                    ));
                }
            }
            node.ns.ip(&lines)?;
            for other in state
                .nodes
                .values()
                .filter(|other| other.index != node.index)
            {
                let (mac, to) = (overlay_mac(other.index), other.addresses[0].to_string());
                let entry = ["fdb", "append", &mac, "dev", "flannel.1", "dst", &to];
                node.ns.output("bridge", &entry)?;
            }
        }
        Ok(())
    }

    /// A tunnel without link-layer header between the first two nodes, and routes over it.
    fn overlay_tun(&self) -> Result<()> {
        let mut state = self.state();
        let nodes: Vec<_> = state.nodes.values().collect();
        let [one, other] = nodes[..] else {
            anyhow::bail!("a tunnel joins two nodes, not {}", nodes.len());
        };
        let tunnel = Tunnel::new([(&one.ns, "wg0"), (&other.ns, "wg0")])?;
        for (node, other) in [(one, other), (other, one)] {
            let [own4, own6] = overlay_addresses(node.index);
            let mut lines = vec![
                "link set wg0 mtu 1420".to_owned(),
                format!("address add {own4}/32 dev wg0"),
                format!("address add {own6}/128 dev wg0 nodad"),
            ];
            let hosts = overlay_addresses(other.index).map(|ip| ip.to_string());
            let to = pod_cidrs(other.index).into_iter().chain(hosts);
            lines.extend(to.map(|to| format!("route add {to} dev wg0")));
            node.ns.ip(&lines)?;
        }
        state.tunnels.push(tunnel);
        Ok(())
    }

    /// Routes to the nodes' pod CIDRs on the other nodes and in the fabric, as host-gw and BGP set
    /// them.
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
            let others = state
                .nodes
                .values()
                .filter(|other| other.index != node.index);
            let lines: Vec<_> = others.flat_map(to).collect();
            if !lines.is_empty() {
                node.ns.ip(&lines)?;
            }
        }
        self.fabric
            .ip(&state.nodes.values().flat_map(to).collect::<Vec<_>>())
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
        self.fabric
            .ip(&[format!("route replace {cidr} via {gateway}")])
    }

    /// Turns transmit checksums off, so that packets look as on a wire, and GRO on if asked to.
    pub(super) fn offloads(&self, ns: &NetNs, devices: &[&str], gro: bool) -> Result<()> {
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
}

/// The addresses of a node's second NIC.
fn second_addresses(index: usize) -> Result<[IpAddr; 2]> {
    let host = 11 + index;
    Ok([
        format!("192.168.60.{host}").parse()?,
        format!("fd60::{host}").parse()?,
    ])
}

/// The addresses of a node's device of the overlay: the first of its pod CIDRs.
fn overlay_addresses(index: usize) -> [IpAddr; 2] {
    [pod_address_v4(index, 0), pod_address_v6(index, 0)]
}

fn overlay_mac(index: usize) -> String {
    format!("02:00:00:00:01:{index:02x}")
}

/// A CNI's rules: what pods send out of the cluster bears the node's address.
fn masquerade(ns: &NetNs) -> Result<()> {
    let [v4, v6] = POD_CIDRS;
    let rules = format!(
        "table inet cni {{\nchain post {{\ntype nat hook postrouting priority 100;\n\
         ip saddr {v4} ip daddr != {v4} masquerade\nip6 saddr {v6} ip6 daddr != {v6} masquerade\n}}\n}}\n"
    );
    ns.output("nft", &[&rules]).map(drop)
}

/// Addresses usable at once (no duplicate address detection), no router advertisements and
/// redirects.
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
