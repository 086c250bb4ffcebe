//! What the agent is told to do: [`Settings`], resolved once at the start.
//!
//! Flags ([`flags`]) stand over what a file says, and that over the defaults. Every layer writes what it names into the
//! settings of the layer below, and nothing else.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use self::conntrack::Conntrack;
use crate::{
    datapath::{Capacities, attach::XdpMode},
    sync::node::SNAT_PORTS,
};

pub mod conntrack;
pub mod flags;

/// Where everything is pinned unless said otherwise.
pub const DEFAULT_BPF_ROOT: &str = "/sys/fs/bpf/shunt";
/// Where missing cluster IPs come from with manifests, if nobody says otherwise: kubeadm's range, and one like it.
const SERVICE_CIDRS: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 12)),
    IpNet::V6(Ipv6Net::new_assert(
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0),
        112,
    )),
];
/// `ProxyHealthzPort` of kube-proxy
/// (<https://github.com/kubernetes/kubernetes/blob/master/pkg/cluster/ports/ports.go>).
pub const HEALTHZ_PORT: u16 = 10256;
/// `ProxyStatusPort` of kube-proxy.
pub const METRICS_PORT: u16 = 10249;

/// Everything that an operator can set. [`Default`] is what holds when nobody says anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `--kubeconfig`; `None`: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// `--manifests`; empty: a cluster.
    pub manifests: Vec<PathBuf>,
    /// `--service-proxy-name`; `None`: what is without the label.
    pub service_proxy_name: Option<String>,
    /// `--node-name`; `None`: the host name.
    pub node_name: Option<String>,
    /// `--node-ip`; empty: found out.
    pub node_ips: Vec<IpAddr>,
    /// `--devices`; empty: found out.
    pub devices: Vec<String>,
    /// `--pod-devices`; empty: found out.
    pub pod_devices: Vec<String>,
    /// `--cgroup-root`; `None`: where the system has it mounted.
    pub cgroup_root: Option<PathBuf>,
    /// `--bpf-root`.
    pub bpf_root: PathBuf,
    /// `--xdp`.
    pub xdp: XdpMode,
    /// `--socket-lb`.
    pub socket_lb: bool,
    /// `--fast-path`.
    pub fast_path: bool,
    /// `--service-cidr` as given; see [`Settings::service_cidrs`].
    pub service_cidrs: Vec<IpNet>,
    /// `--answer-ping`.
    pub answer_ping: bool,
    /// `--load-balancer-cidr`.
    pub load_balancer_cidrs: Vec<IpNet>,
    /// `--service-node-port-range`.
    pub service_node_port_range: PortRange,
    /// `--cluster-cidr`.
    pub cluster_cidrs: Vec<IpNet>,
    /// `--nodeport-addresses`: networks, or `primary` alone; empty: all addresses.
    pub nodeport_addresses: Vec<String>,
    /// `--snat-ports`.
    pub snat_ports: PortRange,
    /// `--conntrack-*`.
    pub conntrack: Conntrack,
    /// `--max-*`.
    pub capacities: Capacities,
    /// `--healthz-bind-address`; `None`: no such server.
    pub healthz_bind_address: Option<SocketAddr>,
    /// `--metrics-bind-address`; `None`: no such server.
    pub metrics_bind_address: Option<SocketAddr>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            manifests: Vec::new(),
            service_proxy_name: None,
            node_name: None,
            node_ips: Vec::new(),
            devices: Vec::new(),
            pod_devices: Vec::new(),
            cgroup_root: None,
            bpf_root: DEFAULT_BPF_ROOT.into(),
            xdp: XdpMode::Auto,
            socket_lb: true,
            fast_path: false,
            service_cidrs: Vec::new(),
            answer_ping: true,
            load_balancer_cidrs: Vec::new(),
            service_node_port_range: PortRange(30_000..=32_767),
            cluster_cidrs: Vec::new(),
            nodeport_addresses: Vec::new(),
            snat_ports: PortRange(SNAT_PORTS),
            conntrack: Conntrack::default(),
            capacities: Capacities::default(),
            healthz_bind_address: Some((Ipv4Addr::UNSPECIFIED, HEALTHZ_PORT).into()),
            metrics_bind_address: Some((Ipv4Addr::LOCALHOST, METRICS_PORT).into()),
        }
    }
}

impl Settings {
    /// Networks of cluster IPs. With manifests there are always some, since this agent gives addresses from them; a cluster's
    /// range is its own affair.
    pub fn service_cidrs(&self) -> Vec<IpNet> {
        match self.service_cidrs.is_empty() && !self.manifests.is_empty() {
            true => SERVICE_CIDRS.into(),
            false => self.service_cidrs.clone(),
        }
    }
}

/// `FIRST-LAST`, not empty and without port 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |(first, last): (&str, &str)| Some((first.parse().ok()?, last.parse().ok()?));
        match text.split_once('-').and_then(parse) {
            Some((first, last)) if 0 < first && first <= last => Ok(Self(first..=last)),
            _ => Err("give FIRST-LAST, both from 1 to 65535, FIRST not above LAST".into()),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}

/// Where a server listens. As with kube-proxy, the port may be left out, and nothing at all means no server.
///
/// # Errors
/// Says what is wanted.
fn bind_address(text: &str, default_port: u16) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let address = bracketed
        .unwrap_or(text)
        .parse()
        .map(|ip: IpAddr| (ip, default_port).into());
    match text.parse().or(address) {
        Ok(address) => Ok(Some(address)),
        Err(_) => Err("give IP:PORT ([IP]:PORT for IPv6) or an IP".into()),
    }
}

#[cfg(test)]
mod tests;
