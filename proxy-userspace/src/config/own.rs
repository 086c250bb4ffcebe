//! `ShuntConfiguration`: the settings that kube-proxy does not have. What is left out says nothing.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    DatapathLog, HEALTHZ_PORT, METRICS_PORT, Settings,
    dns::DnsConfiguration,
    values::{
        Address, Listen, Network, PortRange, Text, from_one_on, or_empty, or_null, set, set_list,
        up_to_a_minute,
    },
};
use crate::datapath::{Capacities as Entries, load::SocketLb, xdp::XdpMode};

pub(super) const API_VERSION: &str = "shunt.dev/v1alpha1";
pub(super) const KIND: &str = "ShuntConfiguration";

/// All fields.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ShuntConfiguration {
    api_version: String,
    kind: String,
    answer_ping: Option<bool>,
    #[serde(with = "or_empty")]
    bpf_root: Option<String>,
    #[serde(deserialize_with = "or_null")]
    capacities: Capacities,
    #[serde(with = "or_empty")]
    cgroup_root: Option<String>,
    count_traffic: Option<bool>,
    datapath_log: Option<DatapathLog>,
    #[serde(deserialize_with = "or_null")]
    devices: Vec<String>,
    #[serde(deserialize_with = "or_null")]
    dns: DnsConfiguration,
    #[serde(rename = "externalIPs")]
    external_ips: Option<bool>,
    fast_path: Option<bool>,
    /// Over the other document's; empty: no such server, which cannot be said there.
    #[serde(skip_serializing_if = "Option::is_none")]
    healthz_bind_address: Option<Text<Listen<HEALTHZ_PORT>>>,
    #[serde(rename = "loadBalancerCIDRs", deserialize_with = "or_null")]
    load_balancer_cidrs: Vec<Text<Network>>,
    #[serde(deserialize_with = "or_null")]
    manifests: Vec<String>,
    /// As `healthz_bind_address`.
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics_bind_address: Option<Text<Listen<METRICS_PORT>>>,
    metrics_services: Option<u32>,
    /// Whether `conntrack` of the other document is applied to netfilter's table.
    netfilter_conntrack: Option<bool>,
    #[serde(rename = "nodeIPs", deserialize_with = "or_null")]
    node_ips: Vec<Text<Address>>,
    #[serde(deserialize_with = "or_null")]
    pod_devices: Vec<String>,
    #[serde(deserialize_with = "up_to_a_minute")]
    retry_silence_seconds: Option<u32>,
    #[serde(rename = "serviceCIDRs", deserialize_with = "or_null")]
    service_cidrs: Vec<Text<Network>>,
    #[serde(with = "or_empty")]
    service_node_port_range: Option<PortRange>,
    #[serde(with = "or_empty")]
    service_proxy_name: Option<String>,
    #[serde(with = "or_empty")]
    snat_ports: Option<PortRange>,
    #[serde(rename = "socketLB")]
    socket_lb: Option<SocketLb>,
    #[serde(rename = "socketLBLabels")]
    socket_lb_labels: Option<bool>,
    xdp: Option<XdpMode>,
}

/// Entries of maps.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct Capacities {
    #[serde(deserialize_with = "from_one_on")]
    affinity: Option<u32>,
    #[serde(deserialize_with = "from_one_on")]
    backends: Option<u32>,
    #[serde(deserialize_with = "from_one_on")]
    flows: Option<u32>,
    #[serde(deserialize_with = "from_one_on")]
    frontends: Option<u32>,
    #[serde(deserialize_with = "from_one_on")]
    new_flows: Option<u32>,
    #[serde(deserialize_with = "from_one_on")]
    slots: Option<u32>,
    #[serde(deserialize_with = "from_one_on")]
    snat: Option<u32>,
    #[serde(deserialize_with = "from_one_on")]
    sockets: Option<u32>,
}

impl ShuntConfiguration {
    /// Writes what is given.
    pub(super) fn write(self, to: &mut Settings) {
        set(&mut to.answer_ping, self.answer_ping);
        set(&mut to.bpf_root, self.bpf_root.map(PathBuf::from));
        self.capacities.write(&mut to.capacities);
        set(
            &mut to.cgroup_root,
            self.cgroup_root.map(|path| Some(path.into())),
        );
        set_list(&mut to.devices, self.devices);
        self.dns.write(&mut to.dns);
        set(&mut to.external_ips, self.external_ips);
        set(&mut to.fast_path, self.fast_path);
        set(&mut to.count_traffic, self.count_traffic);
        set(&mut to.datapath_log, self.datapath_log);
        set(
            &mut to.healthz_bind_address,
            self.healthz_bind_address.map(|text| text.0.0),
        );
        set_list(
            &mut to.load_balancer_cidrs,
            self.load_balancer_cidrs
                .into_iter()
                .map(|text| text.0.0)
                .collect(),
        );
        to.read_manifests(self.manifests.into_iter().map(PathBuf::from).collect());
        set(
            &mut to.metrics_bind_address,
            self.metrics_bind_address.map(|text| text.0.0),
        );
        set(&mut to.metrics_services, self.metrics_services);
        if self.netfilter_conntrack == Some(false) {
            to.netfilter = None;
        }
        set_list(
            &mut to.node_ips,
            self.node_ips.into_iter().map(|text| text.0.0).collect(),
        );
        set_list(&mut to.pod_devices, self.pod_devices);
        set(
            &mut to.retry_silence,
            self.retry_silence_seconds
                .map(|seconds| Duration::from_secs(seconds.into())),
        );
        set_list(
            &mut to.service_cidrs,
            self.service_cidrs
                .into_iter()
                .map(|text| text.0.0)
                .collect(),
        );
        set(
            &mut to.service_node_port_range,
            self.service_node_port_range,
        );
        set(
            &mut to.service_proxy_name,
            self.service_proxy_name.map(Some),
        );
        set(&mut to.snat_ports, self.snat_ports);
        set(&mut to.socket_lb, self.socket_lb);
        set(&mut to.socket_lb_labels, self.socket_lb_labels);
        set(&mut to.xdp, self.xdp);
    }
}

impl Capacities {
    fn write(self, to: &mut Entries) {
        for (to, given) in [
            (&mut to.affinity, self.affinity),
            (&mut to.backends, self.backends),
            (&mut to.flows, self.flows),
            (&mut to.frontends, self.frontends),
            (&mut to.new_flows, self.new_flows),
            (&mut to.slots, self.slots),
            (&mut to.snat, self.snat),
            (&mut to.sockets, self.sockets),
        ] {
            set(to, given);
        }
    }
}

impl From<&Settings> for ShuntConfiguration {
    fn from(settings: &Settings) -> Self {
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let networks = |networks: &[_]| {
            networks
                .iter()
                .copied()
                .map(|network| Text(Network(network)))
                .collect()
        };
        Self {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            answer_ping: Some(settings.answer_ping),
            bpf_root: Some(text(&settings.bpf_root)),
            capacities: Capacities::from(&settings.capacities),
            cgroup_root: settings.cgroup_root.as_ref().map(text),
            devices: settings.devices.clone(),
            dns: DnsConfiguration::from(&settings.dns),
            external_ips: Some(settings.external_ips),
            fast_path: Some(settings.fast_path),
            count_traffic: Some(settings.count_traffic),
            datapath_log: Some(settings.datapath_log),
            healthz_bind_address: settings
                .healthz_bind_address
                .is_none()
                .then_some(Text(Listen(None))),
            load_balancer_cidrs: networks(&settings.load_balancer_cidrs),
            manifests: settings.manifests.iter().map(text).collect(),
            metrics_bind_address: settings
                .metrics_bind_address
                .is_none()
                .then_some(Text(Listen(None))),
            metrics_services: Some(settings.metrics_services),
            netfilter_conntrack: Some(settings.netfilter.is_some()),
            node_ips: settings
                .node_ips
                .iter()
                .copied()
                .map(|address| Text(Address(address)))
                .collect(),
            pod_devices: settings.pod_devices.clone(),
            retry_silence_seconds: Some(settings.retry_silence.as_secs() as u32),
            service_cidrs: networks(&settings.service_cidrs),
            service_node_port_range: Some(settings.service_node_port_range.clone()),
            service_proxy_name: settings.service_proxy_name.clone(),
            snat_ports: Some(settings.snat_ports.clone()),
            socket_lb: Some(settings.socket_lb),
            socket_lb_labels: Some(settings.socket_lb_labels),
            xdp: Some(settings.xdp),
        }
    }
}

impl From<&Entries> for Capacities {
    fn from(entries: &Entries) -> Self {
        Self {
            affinity: Some(entries.affinity),
            backends: Some(entries.backends),
            flows: Some(entries.flows),
            frontends: Some(entries.frontends),
            new_flows: Some(entries.new_flows),
            slots: Some(entries.slots),
            snat: Some(entries.snat),
            sockets: Some(entries.sockets),
        }
    }
}
