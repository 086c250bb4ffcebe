//! The graph of Services and their endpoints; says which Services an event touched.
//!
//! [`Model::apply`] takes one event and returns the Services whose plan may have changed;
//! [`Model::plan`] says what the maps must hold for one of them. Both cost what that Service costs,
//! however large the cluster: only a change of the own Node touches everything, and only a mistake
//! (an endpoint that is a cluster IP) makes a search necessary.
//!
//! **Claims.** A cluster IP, a node port, and a port of any other address belong to one Service.
//! Where two ask for the same, the one that has it keeps it, so that nothing that worked stops
//! working; among those that came before the first complete list the older object has it (then the
//! smaller name), so that all nodes and every restart decide alike. A cluster IP always goes before
//! other uses of its address, since users can write any external IP. The loser is told once, and
//! takes over when the owner leaves.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use crate::{
    healthcheck::{self, Check},
    object::{
        EndpointSlice, Event, NodeFacts, ObjectName, Problem, Protocol, Service, TrafficPolicy,
    },
    plan::{self, Excluded, FrontendAddress, FrontendKind, ServicePlan, addresses, has_family},
};

/// What only one Service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Claim {
    /// A whole address: one Service has it as cluster IP, or any number share it by port.
    Address(IpAddr),
    /// A port of the node, or of an address that is no cluster IP.
    Frontend(FrontendAddress, u16, Protocol),
}

impl Claim {
    /// Node ports are claimed once per family: one message will do for both.
    fn reported_as(self) -> Self {
        match self {
            Self::Frontend(FrontendAddress::NodePortV6, port, protocol) => {
                Self::Frontend(FrontendAddress::NodePortV4, port, protocol)
            }
            claim => claim,
        }
    }

    /// Who has it, of those who ask.
    fn owner(self, claimants: &[Claimant]) -> Option<&Claimant> {
        let first = claimants.first()?;
        match self {
            Self::Address(_) if !first.as_cluster_ip => None,
            _ => Some(first),
        }
    }
}

/// A Service that asks for something.
#[derive(Clone, Debug)]
struct Claimant {
    service: ObjectName,
    /// Asks for it as its cluster IP.
    as_cluster_ip: bool,
    /// Seconds since 1970, far in the future when unknown.
    created: i64,
    /// When it began to ask, counted from the first complete list; 0 before.
    since: u64,
    /// The field that asks.
    field: String,
}

impl Claimant {
    /// The smallest holds.
    fn rank(&self) -> (bool, u64, i64, &ObjectName) {
        (!self.as_cluster_ip, self.since, self.created, &self.service)
    }
}

/// The Services, slices and node facts as of the last event.
#[derive(Debug)]
pub struct Model {
    /// What the agent was told at its start; counts as long as no Node says more.
    configured: NodeFacts,
    node: NodeFacts,
    services: BTreeMap<ObjectName, Service>,
    slices: HashMap<ObjectName, EndpointSlice>,
    slices_of: HashMap<ObjectName, BTreeSet<ObjectName>>,
    /// Who asks for what, sorted by rank.
    claims: HashMap<Claim, Vec<Claimant>>,
    /// How often an address is in a slice: finds endpoints that a new cluster IP forbids.
    endpoint_addresses: HashMap<IpAddr, u32>,
    /// Forbidden endpoints that were reported.
    reported_endpoints: HashSet<(ObjectName, IpAddr)>,
    /// Lost claims that were reported, by loser; forgotten when the claim is won or given up.
    reported_claims: HashSet<(Claim, ObjectName)>,
    /// Claims that changed since they were last judged.
    contested: BTreeSet<Claim>,
    complete: bool,
    /// Number of the next Service that begins to ask.
    next_claim: u64,
    problems: Vec<Problem>,
}

impl Model {
    /// An empty model of a node; `node` is what is known of it without a Node object.
    pub fn new(node: NodeFacts) -> Self {
        Self {
            configured: node.clone(),
            node,
            services: BTreeMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            claims: HashMap::new(),
            endpoint_addresses: HashMap::new(),
            reported_endpoints: HashSet::new(),
            reported_claims: HashSet::new(),
            contested: BTreeSet::new(),
            complete: false,
            next_claim: 1,
            problems: Vec::new(),
        }
    }

    /// Takes an event in and returns the Services that [`plan`](Self::plan) must be asked about
    /// again.
    pub fn apply(&mut self, event: Event) -> BTreeSet<ObjectName> {
        let mut touched = BTreeSet::new();
        match event {
            Event::Service(service) => self.set_service(service, &mut touched),
            Event::ServiceGone(name) => {
                if let Some(old) = self.services.remove(&name) {
                    touched.insert(name);
                    self.change_claims(Some(&old), None, &mut touched);
                }
            }
            Event::Slice(slice) => self.set_slice(slice, &mut touched),
            Event::SliceGone(name) => {
                if let Some(old) = self.remove_slice(&name) {
                    self.touch(old.service, &mut touched);
                }
            }
            Event::Node(facts) => self.set_node(facts, &mut touched),
            Event::NodeGone => self.node.leaves = true,
            Event::Triggered(_) | Event::LeftOut(_) => {}
            Event::Complete => {
                self.complete = true;
                self.report_lost_claims();
            }
        }
        touched
    }

    /// What the maps must hold for a Service; no frontends when it is gone.
    pub fn plan(&self, name: &ObjectName) -> ServicePlan {
        let Some(service) = self
            .services
            .get(name)
            .filter(|service| service.has_frontends())
        else {
            return ServicePlan::empty(name.clone());
        };
        let slices: Vec<&EndpointSlice> = self.backend_slices(name).collect();
        plan::plan(
            service,
            slices.iter().copied(),
            &self.node,
            &self.excluded(service, &slices),
        )
    }

    /// What to answer on a Service's `healthCheckNodePort`; `None` when it has none or is gone.
    pub fn health_check(&self, name: &ObjectName) -> Option<Check> {
        let service = self
            .services
            .get(name)
            .filter(|service| service.has_frontends())?;
        healthcheck::check(service, || {
            let slices: Vec<&EndpointSlice> = self.backend_slices(name).collect();
            let excluded = self.excluded(service, &slices);
            plan::ready_local(service, slices, &self.node, &excluded)
        })
    }

    /// Whether endpoints of a Service are all on other nodes although `internalTrafficPolicy` or
    /// `externalTrafficPolicy` wants those of this one.
    pub fn lacks_local_endpoints(&self, name: &ObjectName) -> [bool; 2] {
        let Some(service) = self
            .services
            .get(name)
            .filter(|service| service.has_frontends())
        else {
            return [false; 2];
        };
        let is_external = !service.external_ips.is_empty()
            || !service.load_balancer_ips.is_empty()
            || service.ports.iter().any(|port| port.node_port.is_some());
        let wants = [
            service.internal_policy == TrafficPolicy::Local,
            service.external_policy == TrafficPolicy::Local && is_external,
        ];
        if wants == [false; 2] {
            return wants;
        }
        let slices: Vec<&EndpointSlice> = self.backend_slices(name).collect();
        let excluded = self.excluded(service, &slices);
        let elsewhere = plan::is_elsewhere(service, slices, &self.node, &excluded);
        wants.map(|wants| wants && elsewhere)
    }

    /// Whether the source has told everything there is, once.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// This node, as the Node object or the configuration has it.
    pub fn node(&self) -> &NodeFacts {
        &self.node
    }

    /// All Services by name, those without frontends too.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Service> {
        self.services.values()
    }

    /// One Service.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// The slices of a Service, by name.
    pub fn slices(&self, service: &ObjectName) -> impl Iterator<Item = &EndpointSlice> {
        self.slices_of
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|name| self.slices.get(name))
    }

    /// Those slices of a Service whose endpoints may be backends here.
    fn backend_slices(&self, service: &ObjectName) -> impl Iterator<Item = &EndpointSlice> {
        self.slices(service).filter(|slice| !slice.names_only)
    }

    /// What was found since the last call that cannot be served, each thing once: lost claims and
    /// forbidden endpoints. Claims are judged here: of events that belong together, one may take
    /// what the next gives up.
    pub fn take_problems(&mut self) -> Vec<Problem> {
        for claim in std::mem::take(&mut self.contested) {
            self.report_claim(claim);
        }
        std::mem::take(&mut self.problems)
    }

    /// A slice may come before its Service: then there is nothing to plan.
    fn touch(&self, service: ObjectName, touched: &mut BTreeSet<ObjectName>) {
        if self.services.contains_key(&service) {
            touched.insert(service);
        }
    }

    fn set_service(&mut self, service: Service, touched: &mut BTreeSet<ObjectName>) {
        let old = self.services.get(&service.name);
        if old == Some(&service) {
            return;
        }
        touched.insert(service.name.clone());
        let old = self.services.insert(service.name.clone(), service.clone());
        self.change_claims(old.as_ref(), Some(&service), touched);
    }

    fn set_slice(&mut self, slice: EndpointSlice, touched: &mut BTreeSet<ObjectName>) {
        if self.slices.get(&slice.name) == Some(&slice) {
            return;
        }
        let old = self.remove_slice_keeping_reports(&slice.name);
        if let Some(old) = old {
            let still = |address: &IpAddr| {
                slice
                    .endpoints
                    .iter()
                    .any(|endpoint| endpoint.address == *address)
            };
            self.reported_endpoints
                .retain(|(name, address)| *name != slice.name || still(address));
            self.touch(old.service, touched);
        }
        for endpoint in &slice.endpoints {
            *self.endpoint_addresses.entry(endpoint.address).or_default() += 1;
        }
        self.touch(slice.service.clone(), touched);
        self.slices_of
            .entry(slice.service.clone())
            .or_default()
            .insert(slice.name.clone());
        let addresses: Vec<IpAddr> = slice
            .endpoints
            .iter()
            .map(|endpoint| endpoint.address)
            .collect();
        let name = slice.name.clone();
        self.slices.insert(name.clone(), slice);
        if self.slices[&name].names_only {
            return;
        }
        for address in addresses {
            self.report_endpoint(&name, address);
        }
    }

    fn remove_slice(&mut self, name: &ObjectName) -> Option<EndpointSlice> {
        let old = self.remove_slice_keeping_reports(name)?;
        self.reported_endpoints.retain(|(slice, _)| slice != name);
        Some(old)
    }

    fn remove_slice_keeping_reports(&mut self, name: &ObjectName) -> Option<EndpointSlice> {
        let old = self.slices.remove(name)?;
        if let Some(names) = self.slices_of.get_mut(&old.service) {
            names.remove(name);
            if names.is_empty() {
                self.slices_of.remove(&old.service);
            }
        }
        for endpoint in &old.endpoints {
            if let Some(count) = self.endpoint_addresses.get_mut(&endpoint.address) {
                *count -= 1;
                if *count == 0 {
                    self.endpoint_addresses.remove(&endpoint.address);
                }
            }
        }
        Some(old)
    }

    fn set_node(&mut self, facts: NodeFacts, touched: &mut BTreeSet<ObjectName>) {
        let mut addresses = self.configured.addresses.clone();
        addresses.extend(facts.addresses);
        let node = NodeFacts {
            name: self.configured.name.clone(),
            zone: facts.zone.or_else(|| self.configured.zone.clone()),
            addresses,
            leaves: self.node.leaves,
        };
        let plans_change = node != self.node;
        self.node = NodeFacts {
            leaves: facts.leaves,
            ..node
        };
        if plans_change {
            touched.extend(self.services.keys().cloned());
        }
    }

    /// Exchanges a Service's claims; touches those that win or lose something by it.
    fn change_claims(
        &mut self,
        old: Option<&Service>,
        new: Option<&Service>,
        touched: &mut BTreeSet<ObjectName>,
    ) {
        let Some(service) = new.or(old) else { return };
        let name = &service.name;
        let before = old.map(claims_of).unwrap_or_default();
        let mut after = new.map(claims_of).unwrap_or_default();
        let mut since = 0;
        let mut changed: BTreeSet<Claim> = before.keys().chain(after.keys()).copied().collect();
        if self.complete {
            since = self.next_claim;
            self.next_claim += 1;
            // What it goes on asking for keeps its place, whatever field asks for it now.
            for (claim, (as_cluster_ip, _)) in before {
                if after.get(&claim).is_some_and(|ask| ask.0 == as_cluster_ip)
                    && let Some((_, field)) = after.remove(&claim)
                {
                    changed.remove(&claim);
                    let claimants = self.claims.get_mut(&claim).into_iter().flatten();
                    for claimant in claimants.filter(|claimant| claimant.service == *name) {
                        claimant.field.clone_from(&field);
                    }
                }
            }
        }
        for claim in changed.iter().copied() {
            let claimants = self.claims.entry(claim).or_default();
            let had = claim.owner(claimants).map(|owner| owner.service.clone());
            claimants.retain(|claimant| claimant.service != *name);
            if let Some((as_cluster_ip, field)) = after.remove(&claim) {
                claimants.push(Claimant {
                    service: name.clone(),
                    as_cluster_ip,
                    created: service.created.unwrap_or(i64::MAX),
                    since,
                    field,
                });
                claimants.sort_by(|a, b| a.rank().cmp(&b.rank()));
            }
            let has = claim.owner(claimants).map(|owner| owner.service.clone());
            self.reported_claims
                .remove(&(claim.reported_as(), name.clone()));
            if had != has {
                for claimant in claimants.iter() {
                    touched.insert(claimant.service.clone());
                    // Those that still lose are told who has it now.
                    self.reported_claims
                        .remove(&(claim.reported_as(), claimant.service.clone()));
                }
            }
            if claimants.is_empty() {
                self.claims.remove(&claim);
            }
            if let Claim::Address(ip) = claim {
                self.cluster_ip_changed(ip, touched);
            }
        }
        if self.complete {
            self.contested.extend(changed);
        }
    }

    /// Tells those that do not get what they ask for who has it.
    fn report_claim(&mut self, claim: Claim) {
        let Some(claimants) = self.claims.get(&claim) else {
            return;
        };
        let Some(owner) = claim.owner(claimants) else {
            return;
        };
        let what = match claim {
            Claim::Address(ip) => format!("{ip}"),
            // The whole address is somebody's, and the message about that says enough.
            Claim::Frontend(FrontendAddress::Ip(ip), ..) if self.is_cluster_ip(ip) => return,
            Claim::Frontend(FrontendAddress::Ip(ip), port, protocol) => {
                format!("{ip} port {port}/{protocol}")
            }
            Claim::Frontend(_, port, protocol) => format!("{port}/{protocol}"),
        };
        for loser in claimants
            .iter()
            .filter(|claimant| claimant.service != owner.service)
        {
            if self
                .reported_claims
                .insert((claim.reported_as(), loser.service.clone()))
            {
                self.problems.push(Problem::new(
                    "Service",
                    &loser.service,
                    loser.field.clone(),
                    format!(
                        "{what} already belongs to Service {} ({}) and is not served here; choose another",
                        owner.service, owner.field
                    ),
                ));
            }
        }
    }

    fn report_lost_claims(&mut self) {
        let mut contested: Vec<Claim> = self
            .claims
            .iter()
            .filter(|(_, claimants)| claimants.len() > 1)
            .map(|(claim, _)| *claim)
            .collect();
        contested.sort_unstable();
        for claim in contested {
            self.report_claim(claim);
        }
    }

    /// The Service whose cluster IP an address is.
    fn cluster_ip_holder(&self, ip: IpAddr) -> Option<&ObjectName> {
        let claim = Claim::Address(ip);
        Some(&claim.owner(self.claims.get(&claim)?)?.service)
    }

    fn is_cluster_ip(&self, ip: IpAddr) -> bool {
        self.cluster_ip_holder(ip).is_some()
    }

    /// An address became a cluster IP, or is none any more: endpoints with it change.
    fn cluster_ip_changed(&mut self, ip: IpAddr, touched: &mut BTreeSet<ObjectName>) {
        if !self.endpoint_addresses.contains_key(&ip) {
            return;
        }
        let holds = |slice: &&EndpointSlice| {
            !slice.names_only
                && slice
                    .endpoints
                    .iter()
                    .any(|endpoint| endpoint.address == ip)
        };
        let affected: Vec<(ObjectName, ObjectName)> = self
            .slices
            .values()
            .filter(holds)
            .map(|slice| (slice.name.clone(), slice.service.clone()))
            .collect();
        for (slice, service) in affected {
            self.touch(service, touched);
            match self.is_cluster_ip(ip) {
                true => self.report_endpoint(&slice, ip),
                false => drop(self.reported_endpoints.remove(&(slice, ip))),
            }
        }
    }

    fn report_endpoint(&mut self, slice: &ObjectName, address: IpAddr) {
        let Some(owner) = self.cluster_ip_holder(address).cloned() else {
            return;
        };
        if self.reported_endpoints.insert((slice.clone(), address)) {
            self.problems.push(Problem::new(
                "EndpointSlice",
                slice,
                "endpoints",
                format!(
                    "{address} is the cluster IP of Service {owner}; a Service cannot stand behind a Service, it is skipped"
                ),
            ));
        }
    }

    fn excluded(&self, service: &Service, slices: &[&EndpointSlice]) -> Excluded {
        let mut excluded = Excluded::default();
        for claim in claims_of(service).into_keys() {
            let owner = self
                .claims
                .get(&claim)
                .and_then(|claimants| claim.owner(claimants));
            if owner.is_none_or(|owner| owner.service == service.name) {
                continue;
            }
            match claim {
                Claim::Address(ip) => excluded.addresses.insert(ip),
                Claim::Frontend(address, port, protocol) => {
                    excluded.frontends.insert((address, port, protocol))
                }
            };
        }
        let addresses = slices
            .iter()
            .flat_map(|slice| &slice.endpoints)
            .map(|endpoint| endpoint.address);
        excluded
            .endpoints
            .extend(addresses.filter(|ip| self.is_cluster_ip(*ip)));
        excluded
    }
}

/// What a Service asks for: whether as cluster IP, and in which field.
fn claims_of(service: &Service) -> BTreeMap<Claim, (bool, String)> {
    let mut claims = BTreeMap::new();
    if !service.has_frontends() {
        return claims;
    }
    for (i, ip) in service.cluster_ips.iter().enumerate() {
        claims.insert(Claim::Address(*ip), (true, format!("spec.clusterIPs[{i}]")));
    }
    for (field, ips) in [
        ("status.loadBalancer.ingress", &service.load_balancer_ips),
        ("spec.externalIPs", &service.external_ips),
    ] {
        let of_family = |(_, ip): &(usize, &IpAddr)| has_family(service, ip.is_ipv6());
        for (i, ip) in ips.iter().enumerate().filter(of_family) {
            claims
                .entry(Claim::Address(*ip))
                .or_insert_with(|| (false, format!("{field}[{i}]")));
        }
    }
    for (i, port) in service.ports.iter().enumerate() {
        for (kind, address, number) in addresses(service, port, &Excluded::default()) {
            let field = match kind {
                // The address says it all.
                FrontendKind::ClusterIp => continue,
                FrontendKind::NodePort => format!("spec.ports[{i}].nodePort"),
                FrontendKind::LoadBalancer => "status.loadBalancer.ingress".to_owned(),
                FrontendKind::ExternalIp => "spec.externalIPs".to_owned(),
            };
            claims
                .entry(Claim::Frontend(address, number, port.protocol))
                .or_insert((false, field));
        }
    }
    claims
}

#[cfg(test)]
mod tests;
