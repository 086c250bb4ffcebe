//! Kubernetes manifests as a source: files and folders of YAML, watched.
//!
//! Every read computes the complete set of objects and yields the difference to what was yielded before. Beside the
//! objects an API server would have, manifests may hold `Pod` and `Endpoints`: what the endpoint controllers of a cluster
//! do with them is done here, and what an API server would allocate is allocated ([`Config`]).
//!
//! A mistake costs only the object that has it. Where an earlier reading of that object was good, it goes on serving:
//! as with `kubectl apply`, a change that cannot be accepted changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    net::IpAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use ipnet::IpNet;
use k8s_openapi::{api::core::v1::Service as KubernetesService, apimachinery::pkg::util::intstr::IntOrString};
use tokio::sync::mpsc;

use super::{
    allocate::{Pool, Range, to_ip, to_number},
    convert::{self, PodFacts},
    files::{self, Files},
    queue::Queue,
    yaml::{self, Object},
};
use crate::object::{
    Endpoint, EndpointPort, EndpointSlice, Event, NodeFacts, ObjectName, Problem, Protocol, Service, ServicePort,
    TrafficPolicy,
};

/// A change is read when nothing has changed for so long: editors and `git` write several files one after the other.
const QUIET: Duration = Duration::from_millis(50);
/// A change is read after so long even when others follow.
const MOST_QUIET: Duration = Duration::from_secs(1);
/// A file of no bytes is most often one that is being written: it is looked at once more after so long.
const EMPTY_FILE: Duration = Duration::from_millis(200);
/// Where manifests are and what missing numbers are allocated from.
#[derive(Clone, Debug)]
pub struct Config {
    /// Files and folders; of folders all `*.yaml`, `*.yml` and `*.json` below, hidden ones left out. Where an object stands
    /// twice the first in this order counts.
    pub paths: Vec<PathBuf>,
    /// Where missing cluster IPs come from; the first decides the default family.
    pub service_cidrs: Vec<IpNet>,
    /// Where missing node ports come from.
    pub node_ports: RangeInclusive<u16>,
    /// Where missing load balancer IPs come from; without one of its family a Service stays `<pending>`.
    pub load_balancer_cidrs: Vec<IpNet>,
    /// The own Node: a manifest of kind `Node` with this name tells its zone and addresses; others tell their Pods' zones.
    pub node_name: String,
}

/// The manifests source.
#[derive(Debug)]
pub struct Manifests {
    config: Config,
}

impl Manifests {
    /// A source that has not read anything yet.
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    /// Reads, sends everything and [`Event::Complete`], then differences, until the receiver is gone.
    ///
    /// # Errors
    /// A path that does not exist or cannot be read at the start. Later on that is a warning.
    pub async fn run(self, tx: impl Into<Queue>) -> anyhow::Result<()> {
        let tx: Queue = tx.into();
        for path in &self.config.paths {
            std::fs::metadata(path)
                .with_context(|| format!("--manifests {}: give a file or folder that can be read", path.display()))?;
        }
        let mut state = State::new(self.config.clone());
        let (wake, mut woken) = mpsc::channel(1);
        let mut watcher = files::watch(&self.config.paths, &wake);
        let mut seen = files::signature(&self.config.paths);
        loop {
            let mut files = files::read(&self.config.paths).await;
            if state.has_emptied(&files) {
                tokio::time::sleep(EMPTY_FILE).await;
                files = files::read(&self.config.paths).await;
            }
            let (events, problems) = state.update(files);
            for problem in problems {
                tx.reports().report(problem);
            }
            if !events.is_empty() && !tx.send(events).await {
                return Ok(());
            }
            loop {
                let poll = if watcher.is_some() {
                    files::POLL
                } else {
                    files::POLL_ALONE
                };
                let told = tokio::select! {
                    told = woken.recv() => told.is_some(),
                    () = tokio::time::sleep(poll) => false,
                    () = tx.closed() => return Ok(()),
                };
                if told {
                    let end = tokio::time::Instant::now() + MOST_QUIET;
                    while tokio::time::Instant::now() < end && tokio::time::timeout(QUIET, woken.recv()).await.is_ok() {
                    }
                }
                let now = files::signature(&self.config.paths);
                let changed = now != seen;
                seen = now;
                if changed && !told {
                    // Something changed that the watcher did not tell: a path was replaced, or links lead elsewhere.
                    watcher = files::watch(&self.config.paths, &wake);
                }
                if told || changed {
                    break;
                }
            }
        }
    }
}

/// Kind and name: what an object is known by.
type Key = (&'static str, ObjectName);

/// An object of a manifest, checked.
#[derive(Clone, Debug)]
struct Known {
    key: Key,
    line: Option<u64>,
    content: Content,
    /// Whether nothing was wrong with it.
    clean: bool,
}

#[derive(Clone, Debug)]
enum Content {
    Service(Arc<ServiceManifest>),
    Slice(Arc<EndpointSlice>),
    Endpoints(Arc<Vec<EndpointSlice>>),
    Pod(Arc<PodFacts>),
    Node(NodeFacts),
}

/// A Service and what an API server or a controller would have made of it.
#[derive(Debug)]
struct ServiceManifest {
    service: Service,
    selector: BTreeMap<String, String>,
    /// Per port of `service`.
    targets: Vec<Target>,
    /// Families of cluster IPs to have, true: IPv6; `None`: the first Service CIDR's.
    families: Option<Vec<bool>>,
    dual_stack: DualStack,
    wants_node_ports: bool,
    wants_health_check_node_port: bool,
    wants_load_balancer_ip: bool,
    /// `spec.loadBalancerIP`.
    load_balancer_ip: Option<IpAddr>,
    distribution: Option<Distribution>,
}

/// `spec.trafficDistribution`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Distribution {
    /// `PreferSameZone`, or its old name `PreferClose`.
    SameZone,
    /// `PreferSameNode`.
    SameNode,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Number(u16),
    Name(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DualStack {
    No,
    Preferred,
    Required,
}

/// A file as it was last read.
#[derive(Debug, Default)]
struct KnownFile {
    text_hash: Option<u64>,
    was_empty: bool,
    objects: Vec<Known>,
    problems: Vec<Problem>,
}

/// What was read and yielded: differences are made against it.
#[derive(Debug)]
struct State {
    config: Config,
    files: HashMap<PathBuf, KnownFile>,
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
    node: Option<NodeFacts>,
    complete: bool,
    problems: HashSet<Problem>,
    cluster_ips: [Pool<ObjectName>; 2],
    load_balancer_ips: [Pool<ObjectName>; 2],
    node_ports: Pool<(ObjectName, u16)>,
}

/// The pool's port number of a Service's health check node port: no Service port has it.
const HEALTH_CHECK: u16 = 0;

impl State {
    fn new(config: Config) -> Self {
        Self {
            config,
            files: HashMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            node: None,
            complete: false,
            problems: HashSet::new(),
            cluster_ips: Default::default(),
            load_balancer_ips: Default::default(),
            node_ports: Pool::default(),
        }
    }

    /// Whether a file that held objects has no bytes now.
    fn has_emptied(&self, read: &Files) -> bool {
        let emptied = |path: &PathBuf| self.files.get(path).is_some_and(|known| !known.was_empty);
        read.files
            .iter()
            .any(|(path, text)| matches!(text, Ok(text) if text.is_empty()) && emptied(path))
    }

    /// Takes in what was read; returns what changed, and the problems that are new.
    fn update(&mut self, read: Files) -> (Vec<Event>, Vec<Problem>) {
        let mut problems = Vec::new();
        let mut order = Vec::new();
        let mut files = HashMap::new();
        for (path, text) in read.files {
            let known = self.files.remove(&path).unwrap_or_default();
            let file = match text {
                Ok(text) => read_file(&path, &text, known),
                Err(error) => KnownFile {
                    text_hash: None,
                    problems: vec![Problem::in_file(
                        &path,
                        None,
                        format!("cannot be read, its last content goes on serving: {error}"),
                    )],
                    ..known
                },
            };
            problems.extend(file.problems.iter().cloned());
            order.push(path.clone());
            files.insert(path, file);
        }
        for (folder, error) in read.unreadable {
            problems.push(Problem::in_file(
                &folder,
                None,
                format!("cannot be read, its last content goes on serving: {error}"),
            ));
            let mut below: Vec<PathBuf> = self
                .files
                .keys()
                .filter(|file| file.starts_with(&folder))
                .cloned()
                .collect();
            below.sort();
            for path in below {
                files.extend(self.files.remove_entry(&path));
                order.push(path);
            }
        }
        self.files = files;

        let (services, slices, node) = self.compose(&order, &mut problems);
        let mut events = Vec::new();
        let (gone, changed) = difference(&self.services, &services);
        events.extend(gone.into_iter().map(Event::ServiceGone));
        // Endpoints first: a Service that appears finds them.
        let (gone_slices, changed_slices) = difference(&self.slices, &slices);
        events.extend(gone_slices.into_iter().map(Event::SliceGone));
        events.extend(changed_slices.into_iter().map(Event::Slice));
        events.extend(changed.into_iter().map(Event::Service));
        if self.node != node {
            let nothing = || NodeFacts {
                name: self.config.node_name.as_str().into(),
                ..NodeFacts::default()
            };
            events.push(Event::Node(node.clone().unwrap_or_else(nothing)));
        }
        if !self.complete {
            events.push(Event::Complete);
        }
        self.complete = true;
        (self.services, self.slices, self.node) = (services, slices, node);

        problems.sort();
        problems.dedup();
        let new: Vec<Problem> = problems
            .iter()
            .filter(|problem| !self.problems.contains(problem))
            .cloned()
            .collect();
        self.problems = problems.into_iter().collect();
        (events, new)
    }

    /// From all files in order to what an API server and its controllers would show.
    fn compose(
        &mut self,
        order: &[PathBuf],
        problems: &mut Vec<Problem>,
    ) -> (
        BTreeMap<ObjectName, Service>,
        BTreeMap<ObjectName, EndpointSlice>,
        Option<NodeFacts>,
    ) {
        let mut first: HashMap<&Key, (&Path, Option<u64>)> = HashMap::new();
        let mut manifests: BTreeMap<ObjectName, Arc<ServiceManifest>> = BTreeMap::new();
        let mut slices: BTreeMap<ObjectName, EndpointSlice> = BTreeMap::new();
        let mut endpoints: Vec<(ObjectName, Arc<Vec<EndpointSlice>>)> = Vec::new();
        let mut pods: BTreeMap<Arc<str>, Vec<Arc<PodFacts>>> = BTreeMap::new();
        let mut node = None;
        let mut zones: HashMap<Arc<str>, Arc<str>> = HashMap::new();
        for path in order {
            for known in &self.files[path].objects {
                if let Some((other, line)) = first.get(&known.key) {
                    let line = line.map(|line| format!(":{line}")).unwrap_or_default();
                    problems.push(Problem {
                        file: Some(path.clone()),
                        line: known.line,
                        ..Problem::new(
                            known.key.0,
                            &known.key.1,
                            "",
                            format!(
                                "stands in {}{line} as well, which counts; remove one of them",
                                other.display()
                            ),
                        )
                    });
                    continue;
                }
                first.insert(&known.key, (path, known.line));
                let name = &known.key.1;
                if let Content::Node(NodeFacts {
                    name, zone: Some(zone), ..
                }) = &known.content
                {
                    zones.insert(name.clone(), zone.clone());
                }
                match &known.content {
                    Content::Service(manifest) => drop(manifests.insert(name.clone(), manifest.clone())),
                    Content::Slice(slice) => drop(slices.insert(name.clone(), EndpointSlice::clone(slice))),
                    Content::Endpoints(of) => endpoints.push((name.clone(), of.clone())),
                    Content::Pod(pod) => pods.entry(name.namespace.clone()).or_default().push(pod.clone()),
                    Content::Node(facts) if *facts.name == *self.config.node_name => node = Some(facts.clone()),
                    Content::Node(_) => {}
                }
            }
        }
        // A dump of a cluster holds both, and the Endpoints are the coarser ones.
        let sliced: HashSet<ObjectName> = slices.values().map(|slice| slice.service.clone()).collect();
        for (_, of) in endpoints.iter().filter(|(name, _)| !sliced.contains(name)) {
            slices.extend(of.iter().map(|slice| (slice.name.clone(), slice.clone())));
        }
        for (name, manifest) in manifests.iter().filter(|(_, manifest)| !manifest.selector.is_empty()) {
            let pods = pods.get(&name.namespace).map(Vec::as_slice).unwrap_or_default();
            slices.extend(
                select(manifest, pods, &zones)
                    .into_iter()
                    .map(|slice| (slice.name.clone(), slice)),
            );
        }
        let services = self.allocate(manifests, problems);
        (services, slices, node)
    }

    /// Gives Services what they do not name.
    fn allocate(
        &mut self,
        manifests: BTreeMap<ObjectName, Arc<ServiceManifest>>,
        problems: &mut Vec<Problem>,
    ) -> BTreeMap<ObjectName, Service> {
        let config = &self.config;
        let default_is_v6 = config.service_cidrs.first().is_some_and(|net| net.addr().is_ipv6());
        let of_family = |nets: &[IpNet], is_v6: bool| -> Vec<Range> {
            let nets = nets.iter().filter(|net| net.addr().is_ipv6() == is_v6);
            nets.map(Range::of_net).collect()
        };
        let service_ranges = [false, true].map(|is_v6| of_family(&config.service_cidrs, is_v6));
        let load_balancer_ranges = [false, true].map(|is_v6| of_family(&config.load_balancer_cidrs, is_v6));

        let mut taken_ips: [HashSet<u128>; 2] = Default::default();
        let mut taken_ports: HashSet<u128> = HashSet::new();
        let mut ip_owners: [BTreeMap<ObjectName, String>; 2] = Default::default();
        let mut load_balancer_owners: [BTreeMap<ObjectName, String>; 2] = Default::default();
        let mut port_owners: BTreeMap<(ObjectName, u16), String> = BTreeMap::new();
        let mut families_of: BTreeMap<&ObjectName, Vec<bool>> = BTreeMap::new();
        for (name, manifest) in &manifests {
            let service = &manifest.service;
            let explicit = [&service.cluster_ips, &service.external_ips, &service.load_balancer_ips];
            for ip in explicit.into_iter().flatten().chain(&manifest.load_balancer_ip) {
                taken_ips[usize::from(ip.is_ipv6())].insert(to_number(*ip));
            }
            let ports = service.ports.iter().filter_map(|port| port.node_port);
            taken_ports.extend(ports.chain(service.health_check_node_port).map(u128::from));

            let mut families: Vec<bool> = service.cluster_ips.iter().map(IpAddr::is_ipv6).collect();
            for is_v6 in manifest
                .families
                .iter()
                .flatten()
                .copied()
                .chain((families.is_empty() && manifest.families.is_none()).then_some(default_is_v6))
            {
                if !families.contains(&is_v6) {
                    families.push(is_v6);
                }
            }
            let other = !families[0];
            let other_possible = !service_ranges[usize::from(other)].is_empty();
            if manifest.dual_stack == DualStack::Required
                || manifest.dual_stack == DualStack::Preferred && other_possible
            {
                families.extend((!families.contains(&other)).then_some(other));
            }
            for is_v6 in families.iter().copied() {
                if !service.cluster_ips.iter().any(|ip| ip.is_ipv6() == is_v6) {
                    ip_owners[usize::from(is_v6)].insert(name.clone(), name.to_string());
                }
                let pending = manifest.wants_load_balancer_ip && manifest.load_balancer_ip.is_none();
                if pending && !load_balancer_ranges[usize::from(is_v6)].is_empty() {
                    load_balancer_owners[usize::from(is_v6)].insert(name.clone(), name.to_string());
                }
            }
            families_of.insert(name, families);
            if manifest.wants_node_ports {
                for port in service.ports.iter().filter(|port| port.node_port.is_none()) {
                    // One number for TCP and UDP on one port, as the API server gives it.
                    port_owners.insert((name.clone(), port.port), format!("{name}:{}", port.port));
                }
            }
            if manifest.wants_health_check_node_port {
                port_owners.insert((name.clone(), HEALTH_CHECK), format!("{name} health check"));
            }
        }

        let give_ips = |pools: &mut [Pool<ObjectName>; 2],
                        owners: &[BTreeMap<ObjectName, String>; 2],
                        ranges: &[Vec<Range>; 2],
                        taken: &[HashSet<u128>; 2]| {
            [0, 1].map(|family| pools[family].give(&owners[family], &ranges[family], &taken[family]))
        };
        let cluster_ips = give_ips(&mut self.cluster_ips, &ip_owners, &service_ranges, &taken_ips);
        // The two ranges may overlap.
        for family in [0, 1] {
            taken_ips[family].extend(cluster_ips[family].values());
        }
        let load_balancer_ips = give_ips(
            &mut self.load_balancer_ips,
            &load_balancer_owners,
            &load_balancer_ranges,
            &taken_ips,
        );
        let node_ports = self
            .node_ports
            .give(&port_owners, &[Range::of_ports(&config.node_ports)], &taken_ports);

        let mut services = BTreeMap::new();
        for (name, manifest) in &manifests {
            let mut service = manifest.service.clone();
            let mut problem =
                |field: &str, message: String| problems.push(Problem::new("Service", name, field, message));
            for is_v6 in families_of[name].iter().copied() {
                let family = usize::from(is_v6);
                let family_name = ["IPv4", "IPv6"][family];
                if ip_owners[family].contains_key(name) {
                    match cluster_ips[family].get(name) {
                        Some(number) => service.cluster_ips.push(to_ip(*number, is_v6)),
                        None if service_ranges[family].is_empty() => problem(
                            "spec.clusterIP",
                            format!(
                                "is missing and there is no {family_name} range to take it from; write it down or give --service-cidr"
                            ),
                        ),
                        None => problem(
                            "spec.clusterIP",
                            format!("is missing and the {family_name} range is full; give a larger --service-cidr"),
                        ),
                    }
                }
                if load_balancer_owners[family].contains_key(name) {
                    match load_balancer_ips[family].get(name) {
                        Some(number) => service.load_balancer_ips.push(to_ip(*number, is_v6)),
                        None => problem(
                            "status.loadBalancer",
                            format!("is missing and the {family_name} range is full; give a larger one"),
                        ),
                    }
                }
            }
            if manifest.wants_load_balancer_ip
                && let Some(ip) = manifest.load_balancer_ip
            {
                match config.load_balancer_cidrs.iter().any(|net| net.contains(&ip)) {
                    true => service.load_balancer_ips.push(ip),
                    false => problem(
                        "spec.loadBalancerIP",
                        format!("{ip} is in none of the load balancer ranges; the Service stays pending"),
                    ),
                }
            }
            if manifest.wants_node_ports {
                for (i, port) in service
                    .ports
                    .iter_mut()
                    .enumerate()
                    .filter(|(_, port)| port.node_port.is_none())
                {
                    port.node_port = node_ports.get(&(name.clone(), port.port)).map(|number| *number as u16);
                    if port.node_port.is_none() {
                        problem(
                            &format!("spec.ports[{i}].nodePort"),
                            format!(
                                "is missing and all of {}-{} are taken; give a larger range",
                                config.node_ports.start(),
                                config.node_ports.end()
                            ),
                        );
                    }
                }
            }
            if manifest.wants_health_check_node_port {
                service.health_check_node_port = node_ports
                    .get(&(name.clone(), HEALTH_CHECK))
                    .map(|number| *number as u16);
            }
            services.insert(name.clone(), service);
        }
        services
    }
}

/// Names that are gone, and values that are new or different.
fn difference<V: Clone + PartialEq>(
    old: &BTreeMap<ObjectName, V>,
    new: &BTreeMap<ObjectName, V>,
) -> (Vec<ObjectName>, Vec<V>) {
    let gone = old.keys().filter(|name| !new.contains_key(name)).cloned().collect();
    let changed = new
        .iter()
        .filter(|(name, value)| old.get(name) != Some(value))
        .map(|(_, value)| value.clone())
        .collect();
    (gone, changed)
}

/// Reads a file; what is wrong in it keeps its last good content.
fn read_file(path: &Path, text: &str, before: KnownFile) -> KnownFile {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let text_hash = hasher.finish();
    if before.text_hash == Some(text_hash) {
        return before;
    }
    let mut objects: Vec<Known> = Vec::new();
    let mut problems = Vec::new();
    // Objects of before that a broken one of now may be.
    let mut keep: BTreeSet<Key> = BTreeSet::new();
    for parsed in yaml::parse(text) {
        match &parsed.object {
            Err(mistake) => {
                let name = parsed
                    .name
                    .as_ref()
                    .map(|(namespace, name)| ObjectName::new(namespace, name));
                let is_it = |known: &&Known| {
                    name.as_ref()
                        .is_none_or(|name| known.key == (known.key.0, name.clone()) && known.key.0 == parsed.kind)
                };
                let kept: Vec<Key> = before
                    .objects
                    .iter()
                    .filter(is_it)
                    .map(|known| known.key.clone())
                    .collect();
                let then = match kept.is_empty() {
                    true => "",
                    false => "; what was read before goes on serving",
                };
                keep.extend(kept);
                problems.push(Problem {
                    file: Some(path.to_owned()),
                    line: mistake.line,
                    kind: parsed.kind.as_str().into(),
                    name,
                    field: mistake.field.clone(),
                    message: format!("{}{then}", mistake.message),
                });
            }
            Ok(object) => {
                let mut found = Vec::new();
                let content = check(object, &mut found);
                let clean = found.is_empty();
                let good_before = |key: &Key| before.objects.iter().any(|known| known.key == *key && known.clean);
                let rejected = matches!(object, Object::Service(_)) && !clean;
                let key = content.as_ref().map(|(key, _)| key.clone());
                for mut problem in found {
                    problem.file = Some(path.to_owned());
                    problem.line = parsed.line_of(&problem.field);
                    let key = key.clone().or_else(|| Some(("Service", problem.name.clone()?)));
                    if rejected && key.as_ref().is_some_and(good_before) {
                        problem.message += "; the Service as it was before goes on serving";
                        keep.extend(key);
                    }
                    problems.push(problem);
                }
                if let Some((key, content)) = content
                    && !(rejected && good_before(&key))
                {
                    objects.push(Known {
                        line: parsed.line,
                        key,
                        content,
                        clean,
                    });
                }
            }
        }
    }
    let now: HashSet<Key> = objects.iter().map(|known| known.key.clone()).collect();
    let kept = before
        .objects
        .into_iter()
        .filter(|known| keep.contains(&known.key) && !now.contains(&known.key));
    objects.extend(kept);
    KnownFile {
        text_hash: Some(text_hash),
        was_empty: text.is_empty(),
        objects,
        problems,
    }
}

/// Checks an object and keeps what matters of it.
fn check(object: &Object, problems: &mut Vec<Problem>) -> Option<(Key, Content)> {
    match object {
        Object::Service(raw) => {
            let service = convert::service(raw, problems)?;
            let key = ("Service", service.name.clone());
            Some((
                key,
                Content::Service(Arc::new(service_manifest(raw, service, problems))),
            ))
        }
        Object::EndpointSlice(raw) => {
            let slice = convert::slice(raw, problems)?;
            Some((("EndpointSlice", slice.name.clone()), Content::Slice(Arc::new(slice))))
        }
        Object::Endpoints(raw) => {
            let slices = convert::endpoints(raw, problems);
            let name = slices.first()?.service.clone();
            Some((("Endpoints", name), Content::Endpoints(Arc::new(slices))))
        }
        Object::Pod(raw) => {
            let pod = convert::pod(raw, problems)?;
            Some((("Pod", pod.name.clone()), Content::Pod(Arc::new(pod))))
        }
        Object::Node(raw) => {
            let facts = convert::node(raw);
            Some((("Node", ObjectName::new("", &facts.name)), Content::Node(facts)))
        }
        Object::Other => None,
    }
}

fn service_manifest(raw: &KubernetesService, service: Service, problems: &mut Vec<Problem>) -> ServiceManifest {
    let spec = raw.spec.clone().unwrap_or_default();
    let mut problem =
        |field: String, message: String| problems.push(Problem::new("Service", &service.name, field, message));
    let mut targets = Vec::new();
    for port in &service.ports {
        let raw_port = spec.ports.iter().flatten().enumerate().find(|(_, raw)| {
            raw.name.as_deref().unwrap_or_default() == &*port.name && raw.port == i32::from(port.port)
        });
        targets.push(match raw_port.and_then(|(i, raw)| Some((i, raw.target_port.as_ref()?))) {
            None | Some((_, IntOrString::Int(0))) => Target::Number(port.port),
            Some((i, IntOrString::Int(number))) => match u16::try_from(*number) {
                Ok(number) => Target::Number(number),
                Err(_) => {
                    problem(
                        format!("spec.ports[{i}].targetPort"),
                        format!("{number} is no port; use 1 to 65535, or a container port's name ({} is served)", port.port),
                    );
                    Target::Number(port.port)
                }
            },
            Some((_, IntOrString::String(name))) if name.is_empty() => Target::Number(port.port),
            Some((i, IntOrString::String(name))) => {
                if let Ok(number) = name.parse::<u16>() {
                    problem(
                        format!("spec.ports[{i}].targetPort"),
                        format!("\"{number}\" would be a container port's name; write the number without quotes (it is served as a number)"),
                    );
                    Target::Number(number)
                } else {
                    Target::Name(name.clone())
                }
            }
        });
    }
    let mut families = Vec::new();
    for (i, family) in spec.ip_families.iter().flatten().enumerate() {
        match family.as_str() {
            "IPv4" => families.push(false),
            "IPv6" => families.push(true),
            other => problem(
                format!("spec.ipFamilies[{i}]"),
                format!("{other:?} is no family; use IPv4 or IPv6"),
            ),
        }
    }
    let dual_stack = match spec.ip_family_policy.as_deref() {
        None | Some("" | "SingleStack") => DualStack::No,
        Some("PreferDualStack") => DualStack::Preferred,
        Some("RequireDualStack") => DualStack::Required,
        Some(other) => {
            problem(
                "spec.ipFamilyPolicy".to_owned(),
                format!(
                    "{other:?} is no policy; use SingleStack, PreferDualStack or RequireDualStack (SingleStack is served)"
                ),
            );
            DualStack::No
        }
    };
    let distribution = match spec.traffic_distribution.as_deref() {
        None | Some("") => None,
        Some("PreferClose" | "PreferSameZone") => Some(Distribution::SameZone),
        Some("PreferSameNode") => Some(Distribution::SameNode),
        Some(other) => {
            problem(
                "spec.trafficDistribution".to_owned(),
                format!(
                    "{other:?} is no distribution; use PreferSameZone, PreferClose or PreferSameNode (all endpoints are served)"
                ),
            );
            None
        }
    };
    let is_load_balancer = spec.type_.as_deref() == Some("LoadBalancer");
    let has_ingress = raw
        .status
        .iter()
        .filter_map(|status| status.load_balancer.as_ref()?.ingress.as_ref())
        .any(|ingress| !ingress.is_empty());
    let load_balancer_ip = spec
        .load_balancer_ip
        .as_deref()
        .filter(|ip| !ip.is_empty())
        .and_then(|ip| {
            let parsed = ip.parse::<IpAddr>().ok();
            if parsed.is_none() {
                problem("spec.loadBalancerIP".to_owned(), format!("{ip:?} is no IP address"));
            }
            parsed
        });
    // A class names a controller of its own.
    let ours = spec.load_balancer_class.as_deref().unwrap_or_default().is_empty();
    ServiceManifest {
        selector: spec.selector.clone().unwrap_or_default(),
        targets,
        families: (!families.is_empty()).then_some(families),
        dual_stack,
        wants_node_ports: spec.type_.as_deref() == Some("NodePort")
            || is_load_balancer && spec.allocate_load_balancer_node_ports != Some(false),
        wants_health_check_node_port: is_load_balancer
            && service.external_policy == TrafficPolicy::Local
            && service.health_check_node_port.is_none(),
        wants_load_balancer_ip: is_load_balancer && !has_ingress && ours,
        load_balancer_ip,
        distribution,
        service,
    }
}

/// The slices that the EndpointSlice controller would make of a Service and the Pods of its namespace: Pods whose
/// ports have the same numbers share one. `zones`: by node; they become hints where `trafficDistribution` asks for some.
fn select(
    manifest: &ServiceManifest,
    pods: &[Arc<PodFacts>],
    zones: &HashMap<Arc<str>, Arc<str>>,
) -> Vec<EndpointSlice> {
    let service = &manifest.service;
    let mut groups: BTreeMap<(bool, Vec<EndpointPort>), Vec<Endpoint>> = BTreeMap::new();
    for pod in pods {
        if !manifest
            .selector
            .iter()
            .all(|(key, value)| pod.labels.get(key) == Some(value))
        {
            continue;
        }
        let resolve = |(port, target): (&ServicePort, &Target)| {
            let number = match target {
                Target::Number(number) => *number,
                // A pod without that name does not serve that port.
                Target::Name(name) => {
                    let is_it =
                        |(other, protocol, _): &&(String, Protocol, u16)| other == name && *protocol == port.protocol;
                    pod.ports.iter().find(is_it)?.2
                }
            };
            Some(EndpointPort {
                name: port.name.clone(),
                protocol: port.protocol,
                port: number,
            })
        };
        let ports: Vec<EndpointPort> = service
            .ports
            .iter()
            .zip(&manifest.targets)
            .filter_map(resolve)
            .collect();
        let node = pod
            .node
            .as_ref()
            .filter(|_| manifest.distribution == Some(Distribution::SameNode));
        let zone = pod
            .node
            .as_ref()
            .and_then(|node| zones.get(node))
            .filter(|_| manifest.distribution.is_some());
        for address in &pod.addresses {
            groups
                .entry((address.is_ipv6(), ports.clone()))
                .or_default()
                .push(Endpoint {
                    address: *address,
                    node: pod.node.clone(),
                    ready: service.publish_not_ready || pod.ready && !pod.terminating,
                    serving: pod.ready,
                    terminating: pod.terminating,
                    zones: zone.into_iter().cloned().collect(),
                    nodes: node.into_iter().cloned().collect(),
                });
        }
    }
    let slice = |((is_v6, ports), endpoints): ((bool, Vec<EndpointPort>), Vec<Endpoint>)| {
        let family = if is_v6 { "IPv6" } else { "IPv4" };
        let numbers: Vec<String> = ports
            .iter()
            .map(|port| format!("{}:{}/{}", port.name, port.port, port.protocol))
            .collect();
        EndpointSlice {
            // No real slice has blanks in its name.
            name: ObjectName::new(
                &service.name.namespace,
                &format!("{} (Pods, {family}, {})", service.name.name, numbers.join(" ")),
            ),
            service: service.name.clone(),
            ports,
            endpoints,
        }
    };
    groups.into_iter().map(slice).collect()
}

#[cfg(test)]
pub(crate) mod tests;
