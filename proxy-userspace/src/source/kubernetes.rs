//! A Kubernetes API server as source: Services, EndpointSlices and the own Node, listed and
//! watched.
//!
//! What the server excludes by label never comes over the wire, and of what comes only the slim
//! objects' hashes and names are kept, to tell a difference from a repetition. A list that is read
//! again after a gap yields differences only, deletions last: nothing is taken away before a
//! complete list says that it is gone. Lists of several kinds that are read again at the same time,
//! as after an absence of the server, are yielded together.

use std::{
    collections::{HashMap, HashSet, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use k8s_openapi::api::core::v1 as api;
use kube::{Api, Client, api::ListParams};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};

mod connection;
mod events;
mod failure;
mod follow;
mod snapshot;

pub use snapshot::snapshot;

use connection::Connection;
use failure::Failure;
use follow::{Follower, Selection, WatchEvent};

use super::{
    convert,
    kinds::{EndpointSlice, Kind, Meta, Namespace, Node, Pod, Service},
    left_out::{self, LeftOut, PodLabel},
    queue::Queue,
};
use crate::object::{self, Event, NodeFacts, ObjectName, Problem};

/// Events that are sent at once when they are there.
const BATCH: usize = 1024;
/// Lists that are read again wait for each other so long at most.
const TOGETHER: Duration = Duration::from_secs(10);
/// Names of Nodes that a message lists.
const LISTED_NODES: u32 = 10;
/// Everyday failures in a row that are worth a warning.
const LASTING: u32 = 3;

/// Which API server, and as whom.
#[derive(Clone, Debug)]
pub struct Config {
    /// A kubeconfig file; `None`: the service account of the pod this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The own Node's `metadata.name`.
    pub node_name: String,
    /// Only objects whose label `service.kubernetes.io/service-proxy-name` has this value; `None`:
    /// those without the label.
    pub proxy_name: Option<String>,
    /// Whether names of Services are asked for: then those that others serve, and those without
    /// addresses, are followed too.
    pub names: bool,
    /// Whether Pods of this node and labelled Namespaces are followed, for what the socket hook leaves
    /// out.
    pub socket_lb_labels: bool,
}

/// The Kubernetes source.
#[derive(Debug)]
pub struct Kubernetes {
    config: Config,
}

impl Kubernetes {
    /// A source that has not connected yet.
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    /// Lists, sends everything and [`Event::Complete`], then what changes, until the receiver is
    /// gone. A server that is away is waited for.
    ///
    /// # Errors
    /// A configuration that cannot be used: no such kubeconfig, not in a cluster, no node name.
    pub async fn run(self, tx: impl Into<Queue>) -> anyhow::Result<()> {
        let tx: Queue = tx.into();
        let Config {
            kubeconfig,
            node_name,
            proxy_name,
            names,
            socket_lb_labels,
        } = self.config;
        anyhow::ensure!(
            !node_name.is_empty(),
            "the own Node has no name: give --node-name (in a pod: from spec.nodeName)"
        );
        let connection =
            Arc::new(Connection::new(kubeconfig.as_deref(), tx.reports().metrics().clone()).await?);
        let ours = match &proxy_name {
            None => format!(
                "!{},!{}",
                convert::LABEL_HEADLESS,
                convert::LABEL_SERVICE_PROXY
            ),
            Some(name) => format!(
                "!{},{}={name}",
                convert::LABEL_HEADLESS,
                convert::LABEL_SERVICE_PROXY
            ),
        };
        let by_label = Selection {
            labels: (!names).then_some(ours),
            fields: None,
        };
        let by_name = Selection {
            labels: None,
            fields: Some(format!("metadata.name={node_name}")),
        };

        let (sender, mut changes) = mpsc::channel::<Change>(BATCH);
        // Ends with this value.
        let mut followers = JoinSet::new();
        let claim = proxy_name.clone();
        let service = move |raw: Service| slim(raw, claim.as_deref(), convert::service);
        let slice = move |raw: EndpointSlice| slim(raw, proxy_name.as_deref(), convert::slice);
        let node = |raw: Node| slim(raw, None, |raw, _| Some(convert::node(raw)));
        followers.spawn(
            Follower::new(
                connection.clone(),
                by_label.clone(),
                service,
                sender.clone(),
            )
            .run(),
        );
        followers.spawn(Follower::new(connection.clone(), by_label, slice, sender.clone()).run());
        followers.spawn(Follower::new(connection.clone(), by_name, node, sender.clone()).run());
        if socket_lb_labels {
            let pod = |raw: Pod| slim(raw, None, |raw, _| left_out::pod(raw));
            let of_node = Selection {
                labels: None,
                fields: Some(format!("spec.nodeName={node_name}")),
            };
            let namespace = |raw: Namespace| slim(raw, None, |raw, _| left_out::namespace(raw));
            let off = Selection {
                labels: Some(format!("{}={}", left_out::LABEL, left_out::OFF)),
                fields: None,
            };
            followers.spawn(Follower::new(connection.clone(), of_node, pod, sender.clone()).run());
            followers.spawn(Follower::new(connection.clone(), off, namespace, sender).run());
        }
        followers.spawn(events::publish(
            connection.clone(),
            tx.reports().clone(),
            node_name.clone(),
        ));

        let mut state = State::default();
        let mut batch = Vec::with_capacity(BATCH);
        let mut server = connection.address();
        loop {
            let wait = state.deadline();
            tokio::select! {
                count = changes.recv_many(&mut batch, BATCH) => if count == 0 {
                    anyhow::bail!("the watches of the API server ended");
                },
                () = sleep_until(wait.unwrap_or_else(Instant::now)), if wait.is_some() => {}
                () = tx.closed() => return Ok(()),
            }
            for change in batch.drain(..) {
                state.apply(change);
            }
            for problem in state.problems.drain(..) {
                tx.reports().report(problem);
            }
            if std::mem::take(&mut state.node_is_missing) {
                // Not here: the lists go on meanwhile.
                let (client, node_name) = (connection.client(), node_name.clone());
                followers.spawn(async move {
                    tracing::warn!("{}", missing_node(&client, &node_name).await)
                });
            }
            let events = state.take_events();
            if let Some(name) = server.and_then(|address| served_as(address, &events)) {
                server = None;
                tracing::warn!("{}", waits_for_itself(name));
            }
            if !events.is_empty() && !tx.send(events).await {
                return Ok(());
            }
        }
    }
}

/// The Service among these that has the API server's address as cluster IP.
fn served_as(server: IpAddr, events: &[Event]) -> Option<&ObjectName> {
    events.iter().find_map(|event| match event {
        Event::Service(service) if service.cluster_ips.contains(&server) => Some(&service.name),
        _ => None,
    })
}

/// Says that the agent depends on its own work.
fn waits_for_itself(name: &ObjectName) -> String {
    format!(
        "the API server's address is the cluster IP of Service {name}, which this agent serves itself: after a reboot of this node \
         it would wait for itself; give a real address, by clientConnection.kubeconfig or KUBERNETES_SERVICE_HOST \
         (deploy/MIGRATION.md, step 2)"
    )
}

/// Says what Nodes there are when the own one is not.
async fn missing_node(client: &Client, node_name: &str) -> String {
    let nodes = Api::<api::Node>::all(client.clone());
    let known = match nodes
        .list_metadata(&ListParams::default().limit(LISTED_NODES))
        .await
    {
        Ok(list) => {
            let names: Vec<String> = list
                .items
                .into_iter()
                .filter_map(|node| node.metadata.name)
                .collect();
            match list.metadata.continue_ {
                Some(more) if !more.is_empty() => format!("{}, …", names.join(", ")),
                _ if names.is_empty() => "none".to_owned(),
                _ => names.join(", "),
            }
        }
        Err(_) => "unknown".to_owned(),
    };
    format!(
        "Node {node_name} is not in the cluster, so no endpoint counts as local by its name: check --node-name (Nodes: {known})"
    )
}

/// Something that a follower told.
#[derive(Debug)]
enum Change {
    Service(WatchEvent<Slim<object::Service>>),
    Slice(WatchEvent<Slim<object::EndpointSlice>>),
    Node(WatchEvent<Slim<NodeFacts>>),
    Pod(WatchEvent<Slim<PodLabel>>),
    /// With the label.
    Namespace(WatchEvent<Slim<Arc<str>>>),
}

impl From<WatchEvent<Slim<PodLabel>>> for Change {
    fn from(event: WatchEvent<Slim<PodLabel>>) -> Self {
        Self::Pod(event)
    }
}

impl From<WatchEvent<Slim<Arc<str>>>> for Change {
    fn from(event: WatchEvent<Slim<Arc<str>>>) -> Self {
        Self::Namespace(event)
    }
}

impl From<WatchEvent<Slim<object::Service>>> for Change {
    fn from(event: WatchEvent<Slim<object::Service>>) -> Self {
        Self::Service(event)
    }
}

impl From<WatchEvent<Slim<object::EndpointSlice>>> for Change {
    fn from(event: WatchEvent<Slim<object::EndpointSlice>>) -> Self {
        Self::Slice(event)
    }
}

impl From<WatchEvent<Slim<NodeFacts>>> for Change {
    fn from(event: WatchEvent<Slim<NodeFacts>>) -> Self {
        Self::Node(event)
    }
}

/// What was yielded, as far as differences need it.
#[derive(Debug)]
struct State {
    services: Known,
    slices: Known,
    nodes: Known,
    pods: Known,
    namespaces: Known,
    left_out: LeftOut,
    complete: bool,
    problems: Vec<Problem>,
    /// Set when a complete list has no such Node.
    node_is_missing: bool,
    events: Vec<Event>,
    /// Since when events wait for lists that are read again.
    held: Option<Instant>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            services: Known::new("Service", "services"),
            slices: Known::new("EndpointSlice", "endpointslices"),
            nodes: Known::new("Node", "nodes"),
            pods: Known::new("Pod", "pods"),
            namespaces: Known::new("Namespace", "namespaces"),
            left_out: LeftOut::default(),
            complete: false,
            problems: Vec::new(),
            node_is_missing: false,
            events: Vec::new(),
            held: None,
        }
    }
}

/// The objects of one kind that were yielded.
#[derive(Debug)]
struct Known {
    kind: &'static str,
    /// `kind` in the plural, for messages.
    plural: &'static str,
    objects: HashMap<ObjectName, Entry>,
    /// While a list is being read: names in it so far.
    listed: Option<HashSet<ObjectName>>,
    complete: bool,
    /// Whether everything up to now has been told: a list is complete, or a watch goes on.
    current: bool,
    /// Failures since it was.
    failures: u32,
    /// The last error, until the watch works again.
    failing: Option<String>,
    /// Objects that could not be read, and were reported.
    unreadable: HashMap<String, String>,
}

/// Of one object.
#[derive(Debug)]
struct Entry {
    /// Of the slim object.
    hash: u64,
    /// Reported ones; most objects have none.
    problems: Box<[Problem]>,
}

/// What an object is to the model.
#[derive(Debug)]
struct Slim<T> {
    name: ObjectName,
    /// `None`: nothing to yield of it, as if it were not there.
    value: Option<T>,
    problems: Vec<Problem>,
    /// When what happened that the object tells of, if it says so.
    triggered: Option<SystemTime>,
}

fn slim<K, T>(
    mut raw: K,
    proxy_name: Option<&str>,
    convert: impl FnOnce(&K, &mut Vec<Problem>) -> Option<T>,
) -> Slim<T>
where
    K: Kind,
{
    if let Some(name) = proxy_name {
        convert::claim(raw.meta_mut(), name);
    }
    let mut problems = Vec::new();
    let value = convert(&raw, &mut problems);
    let meta: &Meta = raw.meta();
    Slim {
        name: ObjectName::new(
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
        ),
        value,
        problems,
        triggered: convert::triggered(meta),
    }
}

impl State {
    fn apply(&mut self, change: Change) {
        let (problems, events) = (&mut self.problems, &mut self.events);
        if self.complete
            && matches!(
                change,
                Change::Service(WatchEvent::Begin) | Change::Slice(WatchEvent::Begin)
            )
        {
            self.held.get_or_insert_with(Instant::now);
        }
        match change {
            Change::Service(event) => {
                let yields = |service: Result<_, _>| {
                    events.push(service.map_or_else(Event::ServiceGone, Event::Service))
                };
                self.services.apply(event, yields, problems);
            }
            Change::Slice(event) => {
                let before = events.len();
                let yields = |slice: Result<_, _>| {
                    events.push(slice.map_or_else(Event::SliceGone, Event::Slice))
                };
                // Of a list nobody knows how long its objects were there.
                let triggered = match &event {
                    WatchEvent::Changed(slice) if self.complete => slice.triggered,
                    _ => None,
                };
                self.slices.apply(event, yields, problems);
                if let (true, Some(time)) = (events.len() > before, triggered) {
                    events.push(Event::Triggered(time));
                }
            }
            Change::Node(event) => {
                let yields = |node: Result<_, ObjectName>| {
                    events.push(node.map_or(Event::NodeGone, Event::Node))
                };
                self.nodes.apply(event, yields, problems);
            }
            Change::Pod(event) => {
                let left_out = &mut self.left_out;
                self.pods
                    .apply(event, |pod| left_out.set_pod(pod), problems);
            }
            Change::Namespace(event) => {
                let left_out = &mut self.left_out;
                let yields = |name| left_out.set_namespace(name);
                self.namespaces.apply(event, yields, problems);
            }
        }
        if !self.complete && self.services.complete && self.slices.complete && self.nodes.complete {
            self.complete = true;
            self.node_is_missing = self.nodes.objects.is_empty();
            if self.node_is_missing {
                self.events.push(Event::NodeGone);
            }
            self.events.push(Event::Complete);
        }
    }

    /// When events that are held go out at the latest.
    fn deadline(&self) -> Option<Instant> {
        self.held.map(|since| since + TOGETHER)
    }

    /// What there is to be sent now. While lists are being read again that is nothing, so that
    /// Services and their slices change together; a kind that cannot be read does not hold up the
    /// others for long.
    fn take_events(&mut self) -> Vec<Event> {
        // Services do not wait for these, which the server may refuse.
        if self.pods.complete && self.namespaces.complete {
            self.events.extend(self.left_out.changed());
        }
        let all_current = [&self.services, &self.slices, &self.nodes]
            .iter()
            .all(|known| known.current);
        if self.held.is_some()
            && !all_current
            && self
                .deadline()
                .is_some_and(|deadline| Instant::now() < deadline)
        {
            return Vec::new();
        }
        self.held = None;
        std::mem::take(&mut self.events)
    }
}

impl Known {
    fn new(kind: &'static str, plural: &'static str) -> Self {
        Self {
            kind,
            plural,
            objects: HashMap::new(),
            listed: None,
            complete: false,
            current: false,
            failures: 0,
            failing: None,
            unreadable: HashMap::new(),
        }
    }

    /// Takes in what was told; `yields` gets objects that are new or different, and names of those
    /// gone.
    fn apply<T: Hash>(
        &mut self,
        event: WatchEvent<Slim<T>>,
        mut yields: impl FnMut(Result<T, ObjectName>),
        problems: &mut Vec<Problem>,
    ) {
        match event {
            WatchEvent::Begin => {
                self.current = false;
                self.listed = Some(HashSet::new());
            }
            WatchEvent::Listed(object) => {
                if let Some(listed) = &mut self.listed {
                    listed.insert(object.name.clone());
                }
                self.set(object, &mut yields, problems);
            }
            WatchEvent::Changed(object) => self.set(object, &mut yields, problems),
            WatchEvent::Deleted(object) => self.remove(&object.name, &mut yields),
            WatchEvent::Complete => {
                let listed = self.listed.take().unwrap_or_default();
                let gone: Vec<ObjectName> = self
                    .objects
                    .keys()
                    .filter(|name| !listed.contains(name))
                    .cloned()
                    .collect();
                for name in gone {
                    self.remove(&name, &mut yields);
                }
                self.complete = true;
                self.works();
            }
            WatchEvent::Watching => self.works(),
            WatchEvent::Unreadable(name, cause) => {
                // What it was before stays: the server has the object, though not in a form that is
                // understood here.
                if let Some((namespace, name)) = name.split_once('/')
                    && let Some(listed) = &mut self.listed
                {
                    listed.insert(ObjectName::new(namespace, name));
                }
                if self.unreadable.insert(name.clone(), cause.clone()).as_ref() != Some(&cause) {
                    let (namespace, name) = name.split_once('/').unwrap_or_default();
                    let message =
                        format!("cannot be read: {cause}; what was known of it goes on serving");
                    problems.push(Problem::new(
                        self.kind,
                        &ObjectName::new(namespace, name),
                        "",
                        message,
                    ));
                }
            }
            WatchEvent::Failed(failure) => self.failed(&failure),
        }
    }

    fn works(&mut self) {
        self.current = true;
        self.failures = 0;
        if let Some(reason) = self.failing.take() {
            tracing::info!("watching {} works again (was: {reason})", self.plural);
        }
    }

    fn set<T: Hash>(
        &mut self,
        object: Slim<T>,
        yields: &mut impl FnMut(Result<T, ObjectName>),
        problems: &mut Vec<Problem>,
    ) {
        let reported = self.objects.get(&object.name).map(|entry| &entry.problems);
        let is_new =
            |problem: &&Problem| !reported.is_some_and(|reported| reported.contains(problem));
        problems.extend(object.problems.iter().filter(is_new).cloned());
        let mut hasher = DefaultHasher::new();
        object.value.hash(&mut hasher);
        let entry = Entry {
            hash: hasher.finish(),
            problems: object.problems.into(),
        };
        let hash = entry.hash;
        let before = self.objects.insert(object.name.clone(), entry);
        match object.value {
            _ if before.as_ref().is_some_and(|before| before.hash == hash) => {}
            Some(value) => yields(Ok(value)),
            // It may have had frontends before.
            None if before.is_some() => yields(Err(object.name)),
            None => {}
        }
    }

    fn remove<T>(&mut self, name: &ObjectName, yields: &mut impl FnMut(Result<T, ObjectName>)) {
        if self.objects.remove(name).is_some() {
            yields(Err(name.clone()));
        }
    }

    /// Logs an error once, for as long as it stays the same.
    fn failed(&mut self, failure: &Failure) {
        self.current = false;
        self.failures += 1;
        let (reason, advice) = failure.explain(self.plural);
        if failure.is_everyday() && self.failures < LASTING {
            return tracing::debug!("{}: {reason}", self.plural);
        }
        if self.failing.as_ref() == Some(&reason) {
            return tracing::debug!("watching {} still fails: {reason}", self.plural);
        }
        tracing::warn!(
            "watching {} fails: {reason}; {advice}; what is known goes on serving, trying again",
            self.plural
        );
        self.failing = Some(reason);
    }
}

#[cfg(test)]
mod tests;
