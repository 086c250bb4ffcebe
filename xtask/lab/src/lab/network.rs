//! Networks that clusters have, as data: how nodes and pods are joined, and what the network lets
//! pass.

/// The cluster's pods; each node has a part (`pod_cidrs`).
pub(crate) const POD_CIDRS: [&str; 2] = ["10.44.0.0/16", "fd44::/48"];
/// ClusterIPs.
pub(crate) const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/12", "fd96::/108"];
/// How packets get from a pod to another node's pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// Plain routes to the other node's address (host-gw, BGP).
    None,
    /// A VXLAN device on each node with an address of its own, and routes over it (flannel).
    Vxlan,
    /// A tunnel of devices without link-layer header between two nodes; stands for WireGuard.
    Tun,
}

/// How a pod's device looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodLink {
    /// An Ethernet pair.
    Veth,
    /// A device without link-layer header on either side (a microVM's or unikernel's).
    Tun,
}

/// A network that clusters have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its name on command lines and in failures.
    pub name: &'static str,
    /// How packets get to other nodes' pods.
    pub overlay: Overlay,
    /// How pods are joined to their node.
    pub pods: PodLink,
    /// The nodes' LAN drops what does not bear the address of the node that sends it.
    pub guarded: bool,
    /// A second NIC per node, whose own answers (and its pods') leave by it: rules and a table of
    /// their own.
    pub second_nic: bool,
    /// The CNI masquerades what pods send out of the cluster (nftables).
    pub masquerade: bool,
    /// Nodes check packets' sources by reverse path (RFC 3704 strict mode).
    pub strict_rp_filter: bool,
    /// The outside client comes through a tunnel without link-layer header to the first node (a
    /// VPN).
    pub vpn_client: bool,
}

/// Pods routed over one Ethernet device.
pub const PLAIN: Network = Network {
    name: "plain",
    overlay: Overlay::None,
    pods: PodLink::Veth,
    guarded: false,
    second_nic: false,
    masquerade: false,
    strict_rp_filter: false,
    vpn_client: false,
};

/// All networks that this machine can have.
pub const NETWORKS: [Network; 8] = [
    PLAIN,
    Network {
        name: "vxlan",
        overlay: Overlay::Vxlan,
        ..PLAIN
    },
    Network {
        name: "spoof-guarded",
        overlay: Overlay::Vxlan,
        guarded: true,
        masquerade: true,
        ..PLAIN
    },
    Network {
        name: "two-nics",
        second_nic: true,
        ..PLAIN
    },
    Network {
        name: "tun",
        overlay: Overlay::Tun,
        vpn_client: true,
        ..PLAIN
    },
    Network {
        name: "l3-pods",
        pods: PodLink::Tun,
        ..PLAIN
    },
    Network {
        name: "masquerading",
        masquerade: true,
        ..PLAIN
    },
    Network {
        name: "rp-filter-strict",
        overlay: Overlay::Vxlan,
        // Without it a pod's packets to a node would come in by another device than its answers
        // leave by, which the filter drops.
        masquerade: true,
        strict_rp_filter: true,
        ..PLAIN
    },
];

impl Network {
    /// The network of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        NETWORKS.into_iter().find(|network| network.name == name)
    }
}
