//! What a lab is to be made of.

use std::net::IpAddr;

use super::network::Network;
use crate::protocol::Proto;

/// How pods are joined to their node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cni {
    /// A route per pod to its veth, gateway by proxy ARP (Calico, Cilium).
    #[default]
    Routed,
    /// A bridge `cni0` per node that switches between its pods at layer 2 (flannel, kubenet),
    /// without br_netfilter.
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
    pub(super) nodes: Vec<String>,
    pub(super) entry: Option<String>,
    pub(super) cni: Cni,
    pub(super) network: Network,
    pub(super) checksum_offload: bool,
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
        self.network.strict_rp_filter = true;
        self
    }

    /// How nodes and pods are joined.
    #[must_use]
    pub fn network(mut self, network: Network) -> Self {
        self.network = network;
        self
    }

    /// Leaves transmit checksums to devices, so that packets between veths carry `CHECKSUM_PARTIAL`
    /// and large segments. For tc and sockets: XDP on a veth would see checksums that no wire has.
    #[must_use]
    pub fn checksum_offload(mut self) -> Self {
        self.checksum_offload = true;
        self
    }
}
