//! What the maps must hold for one Service on this node: a pure function of the Service, its endpoints and the node.

use std::{net::IpAddr, sync::Arc};

use crate::object::{ObjectName, Protocol};

/// Where a frontend listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendAddress {
    /// A ClusterIP, external IP or load balancer IP.
    Ip(IpAddr),
    /// A node port, on every admitted IPv4 address of the node.
    NodePortV4,
    /// A node port, on every admitted IPv6 address of the node.
    NodePortV6,
}

/// What kind of frontend it is; for tables and rules that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `spec.ports[].nodePort`.
    NodePort,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer,
    /// `spec.externalIPs`.
    ExternalIp,
}

/// Who dials: two map entries per frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Scope {
    /// Pods and processes on nodes of the cluster.
    Internal = shunt_common::layout::SCOPE_INTERNAL,
    /// Everybody else.
    External = shunt_common::layout::SCOPE_EXTERNAL,
}

/// A frontend's key in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendId {
    /// Where it listens.
    pub address: FrontendAddress,
    /// The port it listens on.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// For whom.
    pub scope: Scope,
}

/// A backend of one Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    /// Its address, of the frontend's family.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Whether it runs on this node.
    pub local: bool,
}

/// The backends that one or several frontends of a Service choose from, sorted and without duplicates.
pub type BackendSet = Arc<[Backend]>;

/// How a frontend's slots are filled from its backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// One slot per backend: the least memory; a change moves most new flows' choice.
    Direct,
    /// A Maglev table: all nodes choose alike, and a change moves few flows.
    Maglev,
}

/// One frontend entry that should be in the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Its key.
    pub id: FrontendId,
    /// What it is to the user.
    pub kind: FrontendKind,
    /// Name of the Service port, for tables; may be empty.
    pub port_name: Arc<str>,
    /// Index into the Service's ports: frontends with one number share backend ids and counters.
    pub port_index: usize,
    /// Eligible backends; empty: refuse (or drop, see `flags`).
    pub backends: BackendSet,
    /// Direct or Maglev.
    pub table: Table,
    /// `shunt_common::layout::FRONTEND_*` bits.
    pub flags: u16,
    /// Seconds of client affinity, 0 without.
    pub affinity_secs: u32,
}

/// Everything that should be in the maps for one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// The Service.
    pub service: ObjectName,
    /// Its frontends, sorted by id.
    pub frontends: Vec<Frontend>,
}
