//! What the maps must hold for one Service on this node: a pure function of the Service, its
//! endpoints and the node.
//!
//! Which backends a frontend has depends on the endpoints' conditions, the Service's traffic
//! policies and the topology hints, by kube-proxy's rules (`CategorizeEndpoints` in its
//! `topology.go`), save for what SPEC says otherwise.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use shunt_common::layout::{
    FRONTEND_AFFINITY, FRONTEND_DROP, FRONTEND_KEEP_SOURCE, FRONTEND_MASQUERADE, FRONTEND_NO_RETRY,
    FRONTEND_PACKETS_ONLY, FRONTEND_SOURCE_RANGES,
};

use crate::object::{
    Endpoint, EndpointSlice, NodeFacts, ObjectName, Protocol, Retry, Service, ServicePort,
    TrafficPolicy,
};

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

/// The backends that one or several frontends of a Service choose from, sorted and without
/// duplicates.
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
    /// Number of the backend set within the Service: frontends with one number have the same
    /// backends, whatever these are at the moment, and share their clients' affinity.
    pub set: u32,
}

/// Everything that should be in the maps for one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// The Service.
    pub service: ObjectName,
    /// Its frontends, sorted by id.
    pub frontends: Vec<Frontend>,
    /// Sources that frontends with `FRONTEND_SOURCE_RANGES` let in, sorted.
    pub source_ranges: BTreeSet<IpNet>,
    /// Every endpoint by port index, address and port, and whether it serves (SPEC B7): open flows
    /// may stay with one that gets no new ones.
    pub endpoints: BTreeMap<(usize, IpAddr, u16), bool>,
}

/// What other Services' claims take from a Service; empty unless users made a mistake. See
/// [`crate::model`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excluded {
    /// Frontends that another Service holds.
    pub frontends: HashSet<(FrontendAddress, u16, Protocol)>,
    /// Addresses that are another Service's cluster IP.
    pub addresses: HashSet<IpAddr>,
    /// Endpoint addresses that are cluster IPs (SPEC B6).
    pub endpoints: HashSet<IpAddr>,
}

/// The plan of one Service.
///
/// `slices` are all of its slices in any order; what does not belong to it is not noticed here.
pub fn plan<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node: &NodeFacts,
    excluded: &Excluded,
) -> ServicePlan {
    let candidates = Candidates::collect(service, slices, node, excluded);
    let mut frontends: BTreeMap<FrontendId, Frontend> = BTreeMap::new();
    for (port_index, port) in service.ports.iter().enumerate() {
        // One choice per family, made when the first frontend needs it and shared by all of them.
        let mut choices: [Option<Choices>; 2] = [None, None];
        for (kind, address, number) in addresses(service, port, excluded) {
            if excluded
                .frontends
                .contains(&(address, number, port.protocol))
            {
                continue;
            }
            let is_v6 = address.is_ipv6();
            let choices = choices[usize::from(is_v6)]
                .get_or_insert_with(|| candidates.choose(port_index, is_v6));
            for scope in [Scope::Internal, Scope::External] {
                let id = FrontendId {
                    address,
                    port: number,
                    protocol: port.protocol,
                    scope,
                };
                let (role, flags) = role(service, &id, kind, choices);
                // An address that stands under two headings of one Service is what it was first.
                frontends.entry(id).or_insert_with(|| Frontend {
                    id,
                    kind,
                    port_name: port.name.clone(),
                    port_index,
                    backends: choices.of(role).clone(),
                    table: match kind {
                        // No other node chooses for the same client: agreement would buy nothing
                        // for its memory.
                        FrontendKind::ClusterIp => Table::Direct,
                        _ => Table::Maglev,
                    },
                    flags,
                    affinity_secs: service.affinity_secs.unwrap_or(0),
                    set: port_index as u32 * ROLES + role as u32,
                });
            }
        }
    }
    ServicePlan {
        service: service.name.clone(),
        frontends: frontends.into_values().collect(),
        source_ranges: service.source_ranges.iter().copied().collect(),
        endpoints: candidates.states(),
    }
}

/// How many endpoints of this node are ready, stay so and can serve some port of the Service, by
/// family (IPv4, IPv6): each address once, as kube-proxy counts them (`LocalReadyEndpoints`).
pub fn ready_local<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node: &NodeFacts,
    excluded: &Excluded,
) -> [usize; 2] {
    let candidates = Candidates::collect(service, slices, node, excluded);
    let ready: BTreeSet<IpAddr> = candidates
        .0
        .values()
        .flatten()
        .filter(|(_, candidate)| candidate.stays_ready && candidate.local)
        .map(|((address, _), _)| *address)
        .collect();
    [false, true].map(|v6| ready.iter().filter(|ip| ip.is_ipv6() == v6).count())
}

/// Whether endpoints that can serve are all on other nodes.
pub fn is_elsewhere<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node: &NodeFacts,
    excluded: &Excluded,
) -> bool {
    let candidates = Candidates::collect(service, slices, node, excluded);
    let mut usable = candidates
        .0
        .values()
        .flat_map(BTreeMap::values)
        .filter(|candidate| candidate.ready || candidate.serving_terminating)
        .peekable();
    usable.peek().is_some() && !usable.any(|candidate| candidate.local)
}

impl ServicePlan {
    /// The plan of a Service that is gone.
    pub fn empty(service: ObjectName) -> Self {
        Self {
            service,
            frontends: Vec::new(),
            source_ranges: BTreeSet::new(),
            endpoints: BTreeMap::new(),
        }
    }
}

impl FrontendAddress {
    /// The node port frontend of a family.
    pub fn node_port(is_v6: bool) -> Self {
        match is_v6 {
            false => Self::NodePortV4,
            true => Self::NodePortV6,
        }
    }

    /// Whether it is of IPv6.
    pub fn is_ipv6(&self) -> bool {
        match self {
            Self::Ip(ip) => ip.is_ipv6(),
            Self::NodePortV4 => false,
            Self::NodePortV6 => true,
        }
    }
}

/// Everything that a port of a Service listens on, with the port number there.
pub(crate) fn addresses(
    service: &Service,
    port: &ServicePort,
    excluded: &Excluded,
) -> Vec<(FrontendKind, FrontendAddress, u16)> {
    let listed =
        |kind: FrontendKind, ips: &[IpAddr]| -> Vec<(FrontendKind, FrontendAddress, u16)> {
            ips.iter()
                .filter(|ip| has_family(service, ip.is_ipv6()) && !excluded.addresses.contains(ip))
                .map(|ip| (kind, FrontendAddress::Ip(*ip), port.port))
                .collect()
        };
    let node_ports = [false, true]
        .into_iter()
        .filter(|is_v6| has_family(service, *is_v6))
        .filter_map(|is_v6| {
            Some((
                FrontendKind::NodePort,
                FrontendAddress::node_port(is_v6),
                port.node_port?,
            ))
        });
    let mut all = listed(FrontendKind::ClusterIp, &service.cluster_ips);
    all.extend(node_ports);
    all.extend(listed(
        FrontendKind::LoadBalancer,
        &service.load_balancer_ips,
    ));
    all.extend(listed(FrontendKind::ExternalIp, &service.external_ips));
    all
}

/// Whether a Service is of a family: that of its cluster IPs, both where it has none. Addresses of
/// another, which a load balancer may well have, are left to their owner.
pub(crate) fn has_family(service: &Service, is_v6: bool) -> bool {
    service.cluster_ips.is_empty() || service.cluster_ips.iter().any(|ip| ip.is_ipv6() == is_v6)
}

/// One endpoint of one port.
///
/// One address may be in several slices while an endpoint moves from one to the other, or because a
/// pod that hangs in termination and its successor share it. Each is judged by itself and the
/// greatest counts (SPEC B8): the one that serves best, with the node and the hints of just that
/// one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    stays_ready: bool,
    ready: bool,
    serving: bool,
    serving_terminating: bool,
    // What follows only makes the choice between equals the same in every run.
    local: bool,
    has_node_hint: bool,
    for_this_node: bool,
    has_zone_hint: bool,
    for_this_zone: bool,
}

impl Candidate {
    fn new(endpoint: &Endpoint, service: &Service, node: &NodeFacts) -> Self {
        let ready = endpoint.ready || service.publish_not_ready;
        Self {
            stays_ready: ready && !endpoint.terminating,
            ready,
            serving: endpoint.serving,
            serving_terminating: endpoint.serving && endpoint.terminating,
            local: node.is_local(endpoint),
            has_node_hint: !endpoint.nodes.is_empty(),
            for_this_node: endpoint.nodes.contains(&node.name),
            has_zone_hint: !endpoint.zones.is_empty(),
            for_this_zone: node
                .zone
                .as_ref()
                .is_some_and(|zone| endpoint.zones.contains(zone)),
        }
    }
}

/// The endpoints of every port: by port index and family, then by address and port.
struct Candidates(BTreeMap<(usize, bool), BTreeMap<(IpAddr, u16), Candidate>>);

/// The backends of one Service port in one family, by who asks.
struct Choices {
    /// Ready ones, kept to the node or zone when the hints allow it; else those that still serve
    /// while they terminate.
    cluster: BackendSet,
    /// Those of this node, by the same preference.
    local: BackendSet,
}

/// A field of [`Choices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Cluster,
    Local,
}

/// Number of [`Role`]s.
const ROLES: u32 = 2;

impl Choices {
    fn of(&self, role: Role) -> &BackendSet {
        match role {
            Role::Cluster => &self.cluster,
            Role::Local => &self.local,
        }
    }
}

impl Candidates {
    fn collect<'a>(
        service: &Service,
        slices: impl IntoIterator<Item = &'a EndpointSlice>,
        node: &NodeFacts,
        excluded: &Excluded,
    ) -> Self {
        let mut all: BTreeMap<(usize, bool), BTreeMap<(IpAddr, u16), Candidate>> = BTreeMap::new();
        for slice in slices {
            for slice_port in &slice.ports {
                let joined = |port: &ServicePort| {
                    port.name == slice_port.name && port.protocol == slice_port.protocol
                };
                let Some(port_index) = service.ports.iter().position(joined) else {
                    continue;
                };
                for endpoint in &slice.endpoints {
                    if excluded.endpoints.contains(&endpoint.address) {
                        continue;
                    }
                    let candidate = all
                        .entry((port_index, endpoint.address.is_ipv6()))
                        .or_default()
                        .entry((endpoint.address, slice_port.port))
                        .or_default();
                    *candidate = Candidate::new(endpoint, service, node).max(*candidate);
                }
            }
        }
        Self(all)
    }

    /// All endpoints, and whether they serve.
    fn states(&self) -> BTreeMap<(usize, IpAddr, u16), bool> {
        let mut states = BTreeMap::new();
        for (&(port_index, _), endpoints) in &self.0 {
            for (&(address, port), candidate) in endpoints {
                states.insert(
                    (port_index, address, port),
                    candidate.ready || candidate.serving,
                );
            }
        }
        states
    }

    fn choose(&self, port_index: usize, is_v6: bool) -> Choices {
        let empty = BTreeMap::new();
        let candidates = self.0.get(&(port_index, is_v6)).unwrap_or(&empty);
        let pick = |wanted: &dyn Fn(&Candidate) -> bool| -> BackendSet {
            candidates
                .iter()
                .filter(|(_, candidate)| wanted(candidate))
                .map(|((address, port), candidate)| Backend {
                    address: *address,
                    port: *port,
                    local: candidate.local,
                })
                .collect()
        };
        // Ready ones; else those that serve while they terminate (SPEC B3).
        let best = |wanted: &dyn Fn(&Candidate) -> bool| -> BackendSet {
            let ready = pick(&|candidate| candidate.ready && wanted(candidate));
            match ready.is_empty() {
                false => ready,
                true => pick(&|candidate| candidate.serving_terminating && wanted(candidate)),
            }
        };
        let ready = || candidates.values().filter(|candidate| candidate.ready);
        // Hints count only when every ready endpoint has them and some are meant for us: a
        // half-written set, or one that knows nothing of this node, must not send all traffic to
        // few endpoints.
        let cluster = if ready().all(|candidate| candidate.has_node_hint)
            && ready().any(|candidate| candidate.for_this_node)
        {
            pick(&|candidate| candidate.ready && candidate.for_this_node)
        } else if ready().all(|candidate| candidate.has_zone_hint)
            && ready().any(|candidate| candidate.for_this_zone)
        {
            pick(&|candidate| candidate.ready && candidate.for_this_zone)
        } else {
            best(&|_| true)
        };
        Choices {
            local: best(&|candidate| candidate.local),
            cluster,
        }
    }
}

/// Which of the [`Choices`] and which flags a frontend has.
fn role(service: &Service, id: &FrontendId, kind: FrontendKind, choices: &Choices) -> (Role, u16) {
    let mut flags = 0;
    if service.affinity_secs.is_some() {
        flags |= FRONTEND_AFFINITY;
    }
    match service.retry {
        Retry::Sockets if id.protocol == Protocol::Tcp => flags |= FRONTEND_PACKETS_ONLY,
        Retry::Off => flags |= FRONTEND_NO_RETRY,
        _ => {}
    }
    if kind == FrontendKind::LoadBalancer
        && service.limits_sources[usize::from(id.address.is_ipv6())]
    {
        flags |= FRONTEND_SOURCE_RANGES;
    }
    let role = match (kind, id.scope) {
        // The internal policy goes by what is dialled, not by who dials. None: refused (SPEC P3).
        (FrontendKind::ClusterIp, _) if service.internal_policy == TrafficPolicy::Local => {
            Role::Local
        }
        (FrontendKind::ClusterIp, _) => Role::Cluster,
        (_, Scope::External) if service.external_policy == TrafficPolicy::Local => {
            flags |= FRONTEND_KEEP_SOURCE;
            if choices.local.is_empty() && !choices.cluster.is_empty() {
                flags |= FRONTEND_DROP;
            }
            Role::Local
        }
        // Internal clients of an external address get all backends, whatever the external policy
        // (SPEC P2); and hints are for everybody (SPEC B5).
        _ => Role::Cluster,
    };
    // Whatever the hook, the node's address must be the source: what a pod's socket would dial
    // itself is left to its packets.
    if service.masquerade && flags & FRONTEND_KEEP_SOURCE == 0 {
        flags |= FRONTEND_MASQUERADE | FRONTEND_PACKETS_ONLY;
    }
    (role, flags)
}

impl fmt::Display for FrontendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            FrontendAddress::Ip(ip) => {
                write!(f, "{}/{}", SocketAddr::new(ip, self.port), self.protocol)
            }
            FrontendAddress::NodePortV4 => write!(f, "0.0.0.0:{}/{}", self.port, self.protocol),
            FrontendAddress::NodePortV6 => write!(f, "[::]:{}/{}", self.port, self.protocol),
        }
    }
}

/// One line: scope, key, kind, what is special, and backends, those of this node with an asterisk.
impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} {:?}", self.id.scope, self.id, self.kind)?;
        if self.flags & FRONTEND_AFFINITY != 0 {
            write!(f, " affinity={}s", self.affinity_secs)?;
        }
        for (flag, name) in [
            (FRONTEND_SOURCE_RANGES, " source-ranges"),
            (FRONTEND_KEEP_SOURCE, " keep-source"),
            (FRONTEND_MASQUERADE, " masquerade"),
            (FRONTEND_DROP, " drop"),
            (FRONTEND_NO_RETRY, " no-retry"),
            (FRONTEND_PACKETS_ONLY, " packets-only"),
        ] {
            if self.flags & flag != 0 {
                f.write_str(name)?;
            }
        }
        f.write_str(" ->")?;
        for backend in self.backends.iter() {
            let local = if backend.local { "*" } else { "" };
            write!(
                f,
                " {}{local}",
                SocketAddr::new(backend.address, backend.port)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
