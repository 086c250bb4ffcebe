//! [`Settings`]: what an operator can set, and what holds when nobody says anything.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::ValueEnum;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::{conntrack::Conntrack, dns::Dns, values::PortRange};
use crate::{
    datapath::{Capacities, load::SocketLb, netfilter::Netfilter, xdp::XdpMode},
    sync::node::SNAT_PORTS,
};

/// Where everything is pinned unless said otherwise.
pub const DEFAULT_BPF_ROOT: &str = "/sys/fs/bpf/shunt";
/// Where missing cluster IPs come from with manifests, if nobody says otherwise: kubeadm's range,
/// and one like it.
pub const SERVICE_CIDRS: [IpNet; 2] = [
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
    /// `bindAddress`: before the node's other addresses of its family.
    pub bind_address: Option<IpAddr>,
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
    pub socket_lb: SocketLb,
    /// `--socket-lb-labels`.
    pub socket_lb_labels: bool,
    /// `--fast-path`.
    pub fast_path: bool,
    /// `--count-traffic`.
    pub count_traffic: bool,
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
    /// `--nodeport-addresses`: networks and the words `primary`, `localhost` and `all`; empty: all
    /// addresses.
    pub nodeport_addresses: Vec<String>,
    /// `iptables.localhostNodePorts`: node ports may answer on loopback addresses too, to processes
    /// of the node.
    pub localhost_node_ports: bool,
    /// `--external-ips`, and kube-proxy's feature gate `AllowServiceExternalIPs`: whether
    /// `spec.externalIPs` are served.
    pub external_ips: bool,
    /// `masqueradeAll` of kube-proxy's mode: all Service traffic bears this node's address, save
    /// where `externalTrafficPolicy: Local` keeps the client's (SPEC P7).
    pub masquerade_all: bool,
    /// `--retry-silence`.
    pub retry_silence: Duration,
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
    /// `--metrics-services`.
    pub metrics_services: u32,
    /// `--dns` and `--dns-*`.
    pub dns: Dns,
    /// `bindAddressHardFail`: an agent that cannot listen on either ends.
    pub bind_address_hard_fail: bool,
    /// `conntrack` of a KubeProxyConfiguration, for netfilter's own table; `None`: that is left
    /// alone.
    pub netfilter: Option<Netfilter>,
    /// `logging`, `--logging-format` and `-v`.
    pub logging: Logging,
    /// `--datapath-log`.
    pub datapath_log: DatapathLog,
}

/// What of the programs' messages comes into the agent's log; each level has those before it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum DatapathLog {
    /// Nothing.
    #[default]
    Off,
    /// What can only be when something is broken.
    Error,
    /// Maps without room, no source port or address, no route.
    Warn,
    /// What is refused, dropped, reset or tried again.
    Info,
    /// New flows and closes too.
    Debug,
}

/// How the agent logs; the environment's `RUST_LOG` stands over the verbosity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Logging {
    /// A line is a JSON object with the fields of Kubernetes' components.
    pub json: bool,
    /// Up to 3 what an operator wants to know, from 4 on what a developer does, from 6 on
    /// everything.
    pub verbosity: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            manifests: Vec::new(),
            service_proxy_name: None,
            node_name: None,
            node_ips: Vec::new(),
            bind_address: None,
            devices: Vec::new(),
            pod_devices: Vec::new(),
            cgroup_root: None,
            bpf_root: DEFAULT_BPF_ROOT.into(),
            xdp: XdpMode::Auto,
            socket_lb: SocketLb::On,
            socket_lb_labels: false,
            fast_path: false,
            count_traffic: false,
            service_cidrs: Vec::new(),
            answer_ping: true,
            load_balancer_cidrs: Vec::new(),
            service_node_port_range: PortRange(30_000..=32_767),
            cluster_cidrs: Vec::new(),
            nodeport_addresses: Vec::new(),
            localhost_node_ports: true,
            external_ips: true,
            masquerade_all: false,
            retry_silence: Duration::from_secs(1),
            snat_ports: PortRange(SNAT_PORTS),
            conntrack: Conntrack::default(),
            capacities: Capacities::default(),
            healthz_bind_address: Some((Ipv4Addr::UNSPECIFIED, HEALTHZ_PORT).into()),
            metrics_bind_address: Some((Ipv4Addr::LOCALHOST, METRICS_PORT).into()),
            metrics_services: 1000,
            dns: Dns::default(),
            bind_address_hard_fail: false,
            netfilter: None,
            logging: Logging::default(),
            datapath_log: DatapathLog::default(),
        }
    }
}

impl Settings {
    /// Takes manifests, if there are any, in place of a cluster.
    pub(super) fn read_manifests(&mut self, manifests: Vec<PathBuf>) {
        if !manifests.is_empty() {
            self.manifests = manifests;
            self.kubeconfig = None;
            self.service_proxy_name = None;
        }
    }

    /// Networks of cluster IPs. With manifests there are always some, since this agent gives
    /// addresses from them; a cluster's range is its own affair.
    pub fn service_cidrs(&self) -> Vec<IpNet> {
        match self.service_cidrs.is_empty() && !self.manifests.is_empty() {
            true => SERVICE_CIDRS.into(),
            false => self.service_cidrs.clone(),
        }
    }
}
