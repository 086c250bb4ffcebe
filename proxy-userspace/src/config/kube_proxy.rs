//! `KubeProxyConfiguration`, as clusters have it in the ConfigMap `kube-proxy`
//! (<https://kubernetes.io/docs/reference/config-api/kube-proxy-config.v1alpha1/>). What is empty
//! says nothing.

use std::{collections::BTreeMap, fmt, net::Ipv6Addr, path::PathBuf, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    HEALTHZ_PORT, Logging as LoggingSettings, METRICS_PORT, Settings, conntrack,
    values::{
        Address, JoinedNodePortAddresses, Listen, Networks, Text, Timeout, duration, or_empty,
        or_null, or_zero, set, set_list, set_option,
    },
};

use crate::datapath::netfilter::Netfilter;

pub(super) const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
pub(super) const KIND: &str = "KubeProxyConfiguration";

/// The fields that mean something here.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct KubeProxyConfiguration {
    api_version: String,
    kind: String,
    #[serde(with = "or_empty")]
    bind_address: Option<Address>,
    bind_address_hard_fail: Option<bool>,
    #[serde(deserialize_with = "or_null")]
    client_connection: ClientConnection,
    #[serde(rename = "clusterCIDR", with = "or_empty")]
    cluster_cidr: Option<Networks>,
    #[serde(deserialize_with = "or_null")]
    conntrack: Conntrack,
    #[serde(deserialize_with = "or_null")]
    detect_local: DetectLocal,
    #[serde(with = "or_empty")]
    detect_local_mode: Option<DetectLocalMode>,
    #[serde(deserialize_with = "or_null")]
    feature_gates: BTreeMap<String, bool>,
    #[serde(with = "or_empty")]
    healthz_bind_address: Option<Listen<HEALTHZ_PORT>>,
    #[serde(with = "or_empty")]
    hostname_override: Option<String>,
    #[serde(deserialize_with = "or_null")]
    iptables: Iptables,
    #[serde(deserialize_with = "or_null")]
    logging: Logging,
    #[serde(with = "or_empty")]
    metrics_bind_address: Option<Listen<METRICS_PORT>>,
    #[serde(with = "or_empty", skip_serializing)]
    mode: Option<String>,
    #[serde(deserialize_with = "or_null", skip_serializing)]
    nftables: Nftables,
    #[serde(deserialize_with = "or_null")]
    node_port_addresses: Vec<Text<JoinedNodePortAddresses>>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct ClientConnection {
    #[serde(with = "or_empty")]
    kubeconfig: Option<String>,
}

/// Zero leaves a time-out alone.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct Conntrack {
    #[serde(deserialize_with = "or_zero")]
    max_per_core: Option<u32>,
    #[serde(deserialize_with = "or_zero")]
    min: Option<u32>,
    tcp_be_liberal: Option<bool>,
    #[serde(with = "or_empty")]
    tcp_close_wait_timeout: Option<Timeout>,
    #[serde(with = "or_empty")]
    tcp_established_timeout: Option<Timeout>,
    #[serde(with = "or_empty")]
    udp_stream_timeout: Option<Timeout>,
    #[serde(with = "or_empty")]
    udp_timeout: Option<Timeout>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct DetectLocal {
    #[serde(with = "or_empty")]
    bridge_interface: Option<String>,
    #[serde(with = "or_empty")]
    interface_name_prefix: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct Iptables {
    localhost_node_ports: Option<bool>,
    masquerade_all: Option<bool>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct Nftables {
    masquerade_all: Option<bool>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct Logging {
    #[serde(with = "or_empty")]
    format: Option<String>,
    verbosity: Option<u32>,
}

/// kube-proxy's gate for `spec.externalIPs`, which is open unless said otherwise.
pub(super) const EXTERNAL_IPS_GATE: &str = "AllowServiceExternalIPs";
/// The mode in which kube-proxy opens node ports on primary addresses alone unless told otherwise.
pub(super) const NFTABLES: &str = "nftables";

/// How kube-proxy tells that a packet comes from a pod of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DetectLocalMode {
    ClusterCIDR,
    NodeCIDR,
    BridgeInterface,
    InterfaceNamePrefix,
}

impl FromStr for DetectLocalMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "ClusterCIDR" => Ok(Self::ClusterCIDR),
            "NodeCIDR" => Ok(Self::NodeCIDR),
            "BridgeInterface" => Ok(Self::BridgeInterface),
            "InterfaceNamePrefix" => Ok(Self::InterfaceNamePrefix),
            _ => Err("give ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix"),
        }
    }
}

impl fmt::Display for DetectLocalMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Fields that mean nothing here, with the values besides empty ones that kube-proxy has by default
/// (<https://github.com/kubernetes/kubernetes/blob/master/pkg/proxy/apis/config/v1alpha1/defaults.go>),
/// or that come to the same here.
const UNUSED: &[(&str, &[&str])] = &[
    ("clientConnection.acceptContentTypes", &[]),
    ("clientConnection.burst", &["10"]),
    (
        "clientConnection.contentType",
        &["application/vnd.kubernetes.protobuf", "application/json"],
    ),
    ("clientConnection.qps", &["5"]),
    // Nothing is ever forgotten that would have to be told again.
    ("configSyncPeriod", &["15m"]),
    ("enableProfiling", &[]),
    ("iptables.masqueradeBit", &["14"]),
    ("iptables.minSyncPeriod", &["1s"]),
    ("iptables.syncPeriod", &["30s"]),
    ("ipvs.excludeCIDRs", &[]),
    ("ipvs.minSyncPeriod", &[]),
    ("ipvs.scheduler", &[]),
    ("ipvs.strictARP", &[]),
    ("ipvs.syncPeriod", &["30s"]),
    ("ipvs.tcpFinTimeout", &[]),
    ("ipvs.tcpTimeout", &[]),
    ("ipvs.udpTimeout", &[]),
    ("logging.flushFrequency", &["5s", "5000000000"]),
    ("logging.options.json.infoBufferSize", &[]),
    ("logging.options.json.splitStream", &[]),
    ("logging.options.text.infoBufferSize", &[]),
    ("logging.options.text.splitStream", &[]),
    ("logging.vmodule", &[]),
    ("nftables.masqueradeBit", &["14"]),
    ("nftables.minSyncPeriod", &["1s"]),
    ("nftables.syncPeriod", &["30s"]),
    ("oomScoreAdj", &["-999"]),
    ("portRange", &[]),
    ("showHiddenMetricsForVersion", &[]),
    ("windowsRunAsService", &[]),
    ("winkernel.enableDSR", &[]),
    ("winkernel.forwardHealthCheckVip", &[]),
    ("winkernel.networkName", &[]),
    ("winkernel.rootHnsEndpointName", &[]),
    ("winkernel.sourceVip", &[]),
];

/// Fields that were given and change nothing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Idle {
    /// kube-proxy has them, and they are set to something.
    pub unused: Vec<String>,
    /// Nobody has them.
    pub unknown: Vec<String>,
}

impl Idle {
    /// Sorts a field in that [`KubeProxyConfiguration`] does not have.
    pub(super) fn sort(&mut self, field: &str, value: &Value) {
        if let Some((name, defaults)) = UNUSED.iter().find(|(name, _)| *name == field) {
            if !is_default(value, defaults) {
                self.unused.push((*name).to_owned());
            }
            return;
        }
        let above = |(name, _): &(&str, _)| {
            name.strip_prefix(field)
                .is_some_and(|rest| rest.starts_with('.'))
        };
        match value {
            Value::Null if UNUSED.iter().any(above) => {}
            Value::Object(fields) if UNUSED.iter().any(above) => {
                fields
                    .iter()
                    .for_each(|(name, value)| self.sort(&format!("{field}.{name}"), value));
            }
            _ => self.unknown.push(field.to_owned()),
        }
    }
}

fn is_default(value: &Value, defaults: &[&str]) -> bool {
    let text = match value {
        Value::Null => return true,
        Value::Array(items) => return items.is_empty(),
        Value::Object(fields) => return fields.is_empty(),
        Value::String(text) => text.clone(),
        scalar => scalar.to_string(),
    };
    let same = |default: &&str| {
        text == **default
            || matches!((duration(&text), duration(default)), (Some(given), Some(default)) if given == default)
    };
    ["", "0", "0s", "0.0", "false"]
        .iter()
        .chain(defaults)
        .any(same)
}

/// What a document has to say besides its settings.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// Fields that are set and have no use here.
    pub unused: Vec<String>,
    /// Fields that mean something, and what has become of that.
    pub warnings: Vec<(&'static str, String)>,
}

impl KubeProxyConfiguration {
    /// Writes what is given, and notes what is not taken.
    pub(super) fn write(self, to: &mut Settings, notes: &mut Notes) {
        // An unspecified one only names kube-proxy's preferred family.
        let bind = self.bind_address.map(|Address(address)| address);
        set_option(
            &mut to.bind_address,
            bind.filter(|address| !address.is_unspecified()),
        );
        if bind.is_some_and(|address| address.is_ipv6()) {
            to.healthz_bind_address = Some((Ipv6Addr::UNSPECIFIED, HEALTHZ_PORT).into());
            to.metrics_bind_address = Some((Ipv6Addr::LOCALHOST, METRICS_PORT).into());
        }
        set(
            &mut to.healthz_bind_address,
            self.healthz_bind_address.map(|listen| listen.0),
        );
        set(
            &mut to.metrics_bind_address,
            self.metrics_bind_address.map(|listen| listen.0),
        );
        set(&mut to.bind_address_hard_fail, self.bind_address_hard_fail);
        set_option(
            &mut to.kubeconfig,
            self.client_connection.kubeconfig.map(PathBuf::from),
        );
        set_option(&mut to.node_name, self.hostname_override);
        to.netfilter = Some(self.conntrack.for_netfilter());
        self.conntrack.write(&mut to.conntrack);
        set(
            &mut to.localhost_node_ports,
            self.iptables.localhost_node_ports,
        );
        set_list(
            &mut to.nodeport_addresses,
            self.node_port_addresses
                .into_iter()
                .flat_map(|text| text.0.0)
                .collect(),
        );
        let mode = self.mode.unwrap_or_default();
        open_node_ports_as(&mode, to);
        let masquerade_all = match mode.as_str() {
            NFTABLES => self.nftables.masquerade_all,
            _ => self.iptables.masquerade_all,
        };
        set(&mut to.masquerade_all, masquerade_all);
        write_gates(&self.feature_gates, to, &mut notes.unused);
        self.logging.write(&mut to.logging);
        let unused = &mut notes.unused;

        let mode = self
            .detect_local_mode
            .unwrap_or(DetectLocalMode::ClusterCIDR);
        // Pods of this node are told by their devices: of a bridge and of the node's own range
        // nothing need be known.
        let prefix = self.detect_local.interface_name_prefix;
        match (mode, self.cluster_cidr) {
            (DetectLocalMode::ClusterCIDR, Some(networks)) => to.cluster_cidrs = networks.0,
            (_, networks) => name(unused, "clusterCIDR", networks.is_some()),
        }
        match (mode, prefix) {
            (DetectLocalMode::InterfaceNamePrefix, Some(prefix)) => {
                to.pod_devices = vec![format!("{prefix}*")]
            }
            (_, prefix) => name(unused, "detectLocal.interfaceNamePrefix", prefix.is_some()),
        }
    }
}

/// `mode`: where node ports answer if nothing is said about it.
pub(super) fn open_node_ports_as(mode: &str, to: &mut Settings) {
    if mode == NFTABLES && to.nodeport_addresses.is_empty() {
        to.nodeport_addresses.push("primary".to_owned());
    }
}

/// `featureGates`: there is one that has a meaning here.
pub(super) fn write_gates(
    gates: &BTreeMap<String, bool>,
    to: &mut Settings,
    unused: &mut Vec<String>,
) {
    for (gate, is_open) in gates {
        match gate.as_str() {
            EXTERNAL_IPS_GATE => to.external_ips = *is_open,
            _ => unused.push(format!("featureGates.{gate}")),
        }
    }
}

impl Logging {
    fn write(self, to: &mut LoggingSettings) {
        set(&mut to.json, self.format.map(|format| format == "json"));
        set(&mut to.verbosity, self.verbosity);
    }
}

impl Conntrack {
    /// The same for netfilter's table, with kube-proxy's defaults for what is left out; zero leaves
    /// a value alone.
    fn for_netfilter(&self) -> Netfilter {
        let defaults = Netfilter::default();
        let given =
            |timeout: Option<Timeout>, default| timeout.map_or(default, |timeout| timeout.0);
        Netfilter {
            tcp_established: given(self.tcp_established_timeout, defaults.tcp_established),
            tcp_close_wait: given(self.tcp_close_wait_timeout, defaults.tcp_close_wait),
            udp: given(self.udp_timeout, defaults.udp),
            udp_stream: given(self.udp_stream_timeout, defaults.udp_stream),
            max_per_core: self.max_per_core.unwrap_or(defaults.max_per_core),
            min: self.min.unwrap_or(defaults.min),
            be_liberal: self.tcp_be_liberal.unwrap_or(defaults.be_liberal),
        }
    }

    fn write(self, to: &mut conntrack::Conntrack) {
        let given = |timeout: Option<Timeout>| timeout.and_then(|timeout| timeout.0);
        set(&mut to.tcp_close_wait, given(self.tcp_close_wait_timeout));
        set(&mut to.tcp_established, given(self.tcp_established_timeout));
        set(&mut to.udp, given(self.udp_timeout));
        // Who raises one alone means no less for the other.
        to.udp_stream = given(self.udp_stream_timeout).unwrap_or(to.udp_stream.max(to.udp));
    }
}

impl From<&Settings> for Conntrack {
    fn from(settings: &Settings) -> Self {
        let (ours, defaults) = (&settings.conntrack, conntrack::Conntrack::default());
        // One field says both: netfilter's value where there is one, zero where there is none and
        // ours is the default.
        let timeout =
            |netfilter: fn(&Netfilter) -> Option<Duration>, ours: Duration, default: Duration| {
                Some(Timeout(match settings.netfilter.as_ref().map(netfilter) {
                    Some(Some(timeout)) => Some(timeout),
                    Some(None) if ours == default => None,
                    _ => Some(ours),
                }))
            };
        let netfilter = settings.netfilter.unwrap_or_default();
        Self {
            max_per_core: Some(netfilter.max_per_core),
            min: Some(netfilter.min),
            tcp_be_liberal: Some(netfilter.be_liberal),
            tcp_close_wait_timeout: timeout(
                |n| n.tcp_close_wait,
                ours.tcp_close_wait,
                defaults.tcp_close_wait,
            ),
            tcp_established_timeout: timeout(
                |n| n.tcp_established,
                ours.tcp_established,
                defaults.tcp_established,
            ),
            udp_stream_timeout: timeout(|n| n.udp_stream, ours.udp_stream, defaults.udp_stream),
            udp_timeout: timeout(|n| n.udp, ours.udp, defaults.udp),
        }
    }
}

/// Names a field that is set.
fn name(fields: &mut Vec<String>, field: &str, is_set: bool) {
    if is_set {
        fields.push(field.to_owned());
    }
}

impl From<&Settings> for KubeProxyConfiguration {
    fn from(settings: &Settings) -> Self {
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let networks =
            |networks: &Vec<_>| (!networks.is_empty()).then(|| Networks(networks.clone()));
        let listen = |address: Option<_>| address.map(Some);
        Self {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            bind_address: settings.bind_address.map(Address),
            bind_address_hard_fail: Some(settings.bind_address_hard_fail),
            client_connection: ClientConnection {
                kubeconfig: settings.kubeconfig.as_ref().map(text),
            },
            cluster_cidr: networks(&settings.cluster_cidrs),
            conntrack: Conntrack::from(settings),
            // Its outcome is `podDevices` of the other document.
            detect_local: DetectLocal::default(),
            detect_local_mode: Some(DetectLocalMode::ClusterCIDR),
            // Its outcome is `externalIPs` of the other document.
            feature_gates: BTreeMap::new(),
            healthz_bind_address: listen(settings.healthz_bind_address).map(Listen),
            hostname_override: settings.node_name.clone(),
            iptables: Iptables {
                localhost_node_ports: Some(settings.localhost_node_ports),
                masquerade_all: Some(settings.masquerade_all),
            },
            logging: Logging {
                format: Some(
                    if settings.logging.json {
                        "json"
                    } else {
                        "text"
                    }
                    .to_owned(),
                ),
                verbosity: Some(settings.logging.verbosity),
            },
            // Its outcome is in `nodePortAddresses`.
            mode: None,
            nftables: Nftables::default(),
            metrics_bind_address: listen(settings.metrics_bind_address).map(Listen),
            node_port_addresses: settings
                .nodeport_addresses
                .iter()
                .cloned()
                .map(|text| Text(JoinedNodePortAddresses(vec![text])))
                .collect(),
        }
    }
}
