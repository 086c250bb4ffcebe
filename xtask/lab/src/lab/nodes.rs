//! The fabric and the nodes.

use anyhow::{Context, Result, ensure};

use super::{
    BRIDGE_HOST, Cni, Lab, MAX_DEVICE_NAME, Node, Place, WAN_GATEWAY_V4, WAN_GATEWAY_V6, pod_address_v4,
    pod_address_v6, pod_cidrs,
};
use crate::{cgroup, netns::NetNs};

impl Lab {
    /// Makes a namespace in which addresses are usable at once and packets are forwarded if it is a router.
    pub(super) fn make_ns(&self, name: &str, router: bool) -> Result<NetNs> {
        let ns = NetNs::create(&format!("{}-{name}", self.id.prefix()))?;
        configure(&ns, router, self.settings.strict_rp_filter && name != "fabric")?;
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
    pub(super) fn route_nodes(&self) -> Result<()> {
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
