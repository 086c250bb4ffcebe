//! Pods and Nodes.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{decimal, name, report::Report};
use crate::{
    object::{NodeFacts, ObjectName, Problem, Protocol},
    source::kinds::{Node, Pod},
};

/// Label of a Node that names its zone.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Taint of a Node that the cluster autoscaler is about to delete (KEP 3836).
pub const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// What manifests need of a Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// `namespace/name`.
    pub name: ObjectName,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `spec.nodeName`.
    pub node: Option<Arc<str>>,
    /// `status.podIPs`, or `status.podIP`; without forbidden ones.
    pub addresses: Vec<IpAddr>,
    /// Condition `Ready` is `True`.
    pub ready: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// `spec.hostname`, its label in DNS below the Service that `subdomain` names.
    pub hostname: Option<Arc<str>>,
    /// `spec.subdomain`.
    pub subdomain: Option<Arc<str>>,
    /// Named container ports.
    pub ports: Vec<(String, Protocol, u16)>,
}

/// A Pod; `None` when it cannot be an endpoint: no address yet, or ended.
pub fn pod(pod: &Pod, problems: &mut Vec<Problem>) -> Option<PodFacts> {
    let name = name("Pod", &pod.metadata, problems)?;
    let mut report = Report {
        kind: "Pod",
        name: &name,
        problems,
    };
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let mut addresses = Vec::new();
    for (i, ip) in status.pod_ips.iter().enumerate() {
        let ip = report.backend_ip(|| format!("status.podIPs[{i}].ip"), &ip.ip);
        addresses.extend(ip.filter(|ip| !addresses.contains(ip)));
    }
    if status.pod_ips.is_empty()
        && let Some(ip) = status.pod_ip.as_deref().filter(|ip| !ip.is_empty())
    {
        addresses.extend(report.backend_ip(|| "status.podIP".to_owned(), ip));
    }
    if addresses.is_empty() {
        return None;
    }
    let spec = &pod.spec;
    // A sidecar is an init container that goes on running; its ports count (KEP 753).
    let sidecars = spec
        .init_containers
        .iter()
        .enumerate()
        .filter(|(_, container)| container.restart_policy.as_deref() == Some("Always"))
        .map(|(i, container)| ("initContainers", i, container));
    let containers = spec
        .containers
        .iter()
        .enumerate()
        .map(|(i, container)| ("containers", i, container));
    let mut ports = Vec::new();
    for (list, c, container) in containers.chain(sidecars) {
        for (i, port) in container.ports.iter().enumerate() {
            let field = |name: &str| format!("spec.{list}[{c}].ports[{i}].{name}");
            let number = report.port(|| field("containerPort"), port.container_port);
            let protocol = report.protocol(|| field("protocol"), port.protocol.as_deref());
            if let (Some(port_name), Some(number), Some(protocol)) = (&port.name, number, protocol)
            {
                ports.push((port_name.clone(), protocol, number));
            }
        }
    }
    let text = |field: &Option<String>| {
        field
            .as_deref()
            .filter(|text| !text.is_empty())
            .map(Into::into)
    };
    Some(PodFacts {
        hostname: text(&pod.spec.hostname),
        subdomain: text(&pod.spec.subdomain),
        labels: pod.metadata.labels.0.clone(),
        node: spec
            .node_name
            .as_deref()
            .filter(|node| !node.is_empty())
            .map(Into::into),
        addresses,
        ready: status
            .conditions
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True"),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        ports,
        name,
    })
}

/// A Node.
pub fn node(node: &Node) -> NodeFacts {
    NodeFacts {
        name: node.metadata.name.as_deref().unwrap_or_default().into(),
        zone: node.metadata.labels.get(LABEL_ZONE).map(Into::into),
        // `Hostname` and DNS entries are no addresses: what does not parse is one of them.
        addresses: node
            .status
            .addresses
            .iter()
            .filter_map(|address| Some(decimal::ip(&address.address)?.0))
            .collect(),
        leaves: node.metadata.deletion_timestamp.is_some()
            || node
                .spec
                .taints
                .iter()
                .any(|taint| taint.key == TAINT_TO_BE_DELETED),
    }
}
