//! The topology: fabric, nodes, pods and outside hosts, and who runs where.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    agent::{Agent, AgentOptions, AgentPlace},
    cgroup,
    client::{self, Client},
    netns::NetNs,
    registry::{self, UniqueName},
    tunnel::Tunnel,
};

mod network;
mod nodes;
mod pods;
mod spec;

pub use network::{NETWORKS, Network, Overlay, PLAIN, PodLink};
pub(crate) use network::{POD_CIDRS, SERVICE_CIDRS};
pub use spec::{Cni, LabBuilder, PodSpec, Port, Sockets};

/// The nodes' LAN; the fabric has `.1`, nodes have `.11` and up.
pub const NODE_LAN_V4: &str = "192.168.50.0/24";
/// The nodes' LAN; the fabric has `::1`, nodes have `::11` and up.
pub const NODE_LAN_V6: &str = "fd50::/64";
/// Load balancer and external IPs.
const EXTERNAL_CIDRS: [&str; 2] = ["198.51.100.0/24", "2001:db8:198::/64"];
/// The fabric on the outside network.
const WAN_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const WAN_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 1);
/// Last byte of the node's own address with [`Cni::Bridge`].
const BRIDGE_HOST: u16 = 254;
/// The longest device name: `IFNAMSIZ` less its end.
const MAX_DEVICE_NAME: usize = 15;

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
    /// What joins it where that is no Ethernet pair.
    tunnel: Option<Tunnel>,
}

#[derive(Debug, Default)]
struct State {
    nodes: BTreeMap<String, Node>,
    places: BTreeMap<String, Place>,
    /// Between nodes.
    tunnels: Vec<Tunnel>,
}

/// A cluster; everything it made goes when it is dropped.
#[derive(Debug)]
pub struct Lab {
    state: Mutex<State>,
    fabric: NetNs,
    settings: LabBuilder,
    cgroup: PathBuf,
    // Last: dropping it ends processes and removes namespaces, pins and cgroups that are left.
    id: UniqueName,
}

/// The pod CIDRs of the node with this index: `10.44.0.0/24`, `fd44:0:0:a::/64` for the first.
#[must_use]
pub fn pod_cidrs(node: usize) -> [String; 2] {
    [
        format!("10.44.{node}.0/24"),
        format!("fd44:0:0:{:x}::/64", 0xa + node),
    ]
}

fn pod_address_v4(node: usize, host: u16) -> IpAddr {
    // Node indices are checked to be below 16, hosts come from below 256.
    Ipv4Addr::new(10, 44, node as u8, host as u8).into()
}

fn pod_address_v6(node: usize, host: u16) -> IpAddr {
    Ipv6Addr::new(0xfd44, 0, 0, 0xa + node as u16, 0, 0, 0, host).into()
}

impl LabBuilder {
    /// Makes the fabric, the nodes and an outside host `client`.
    ///
    /// # Errors
    ///
    /// When a namespace, device, route or cgroup cannot be made; what was made is removed again.
    pub fn build(self) -> Result<Lab> {
        Lab::build(self)
    }
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
            network: PLAIN,
            checksum_offload: false,
        }
    }

    /// Removes what labs of killed processes left; labs of living ones stay. Returns how many there
    /// were.
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
        let id = UniqueName::take()?;
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
        lab.join_nodes()?;
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
        if lab.settings.network.vpn_client {
            lab.add_vpn_client("vpn", &entry)?;
        }
        Ok(lab)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn agent_place(&self, node: &str) -> Result<AgentPlace> {
        Ok(AgentPlace {
            node: node.to_owned(),
            ns: self.ns(node)?,
            addresses: self.node_ips(node)?,
            cgroup: self.node_cgroup(node),
            bpf_root: self.bpf_root(node),
        })
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
    pub(crate) fn cgroup_of(&self, name: &str, sockets: Sockets) -> Result<PathBuf> {
        let node = self.place(name, |place| place.node.clone())?;
        match (sockets, node) {
            (Sockets::Unhooked, _) => Ok(self.cgroup.join("unhooked")),
            (Sockets::Hooked, Some(node)) if node == name => {
                Ok(self.node_cgroup(&node).join("host"))
            }
            (Sockets::Hooked, Some(node)) => Ok(self.node_cgroup(&node).join("pods")),
            (Sockets::Hooked, None) => {
                bail!("{name} is outside of the cluster: no node hooks its sockets")
            }
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

    /// A client process in a cgroup of its own below its node's, which is made if it is not there: for
    /// those who ask what a pod's cgroup is called.
    ///
    /// # Errors
    ///
    /// When the lab has none of that name, or it is on no node.
    pub fn client_in(&self, name: &str, cgroup: &str) -> Result<Client> {
        let node = self.place(name, |place| place.node.clone())?;
        let node = node.with_context(|| format!("{name} is outside of the cluster"))?;
        let cgroup = self.node_cgroup(&node).join(cgroup);
        cgroup::create(&cgroup)?;
        Client::start(name, &self.ns(name)?, &cgroup)
    }

    /// A program to be started on a node, in a pod or on an outside host.
    ///
    /// # Errors
    ///
    /// When the lab has none of that name, or an outside host's sockets are to be hooked.
    pub fn command(
        &self,
        name: &str,
        sockets: Sockets,
        program: impl AsRef<std::ffi::OsStr>,
    ) -> Result<Command> {
        let mut command = Command::new(program);
        if name == "fabric" {
            ensure!(
                sockets == Sockets::Unhooked,
                "no node hooks the fabric's sockets"
            );
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
        Agent::start(&self.agent_place(node)?, options)
    }

    /// An agent of a node that does not run yet: for those that are not to become ready.
    ///
    /// # Errors
    ///
    /// When the lab has no such node, or there is no binary.
    pub fn agent(&self, node: &str, options: &AgentOptions) -> Result<Agent> {
        Agent::new(&self.agent_place(node)?, options)
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
