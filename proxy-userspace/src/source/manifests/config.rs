//! What the manifests source is told.

use std::{ops::RangeInclusive, path::PathBuf};

use ipnet::IpNet;

/// Where manifests are and what missing numbers are allocated from.
#[derive(Clone, Debug)]
pub struct Config {
    /// Files and folders; of folders all `*.yaml`, `*.yml` and `*.json` below, hidden ones left
    /// out. Where an object stands twice the first in this order counts.
    pub paths: Vec<PathBuf>,
    /// Where missing cluster IPs come from; the first decides the default family.
    pub service_cidrs: Vec<IpNet>,
    /// Where missing node ports come from.
    pub node_ports: RangeInclusive<u16>,
    /// Where missing load balancer IPs come from; without one of its family a Service stays
    /// `<pending>`.
    pub load_balancer_cidrs: Vec<IpNet>,
    /// The own Node: a manifest of kind `Node` with this name tells its zone and addresses; others
    /// tell their Pods' zones.
    pub node_name: String,
    /// Whether the labels of Pods and Namespaces matter that leave Pods out of the socket hook.
    pub socket_lb_labels: bool,
}
