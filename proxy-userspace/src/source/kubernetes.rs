//! A Kubernetes API server as source: Services, EndpointSlices and the own Node, listed and watched.
//!
//! What the server excludes by label never comes over the wire, and of what comes only the slim objects' hashes and
//! names are kept, to tell a difference from a repetition. A list that is read again after a gap yields differences
//! only, deletions last: nothing is taken away before a complete list says that it is gone.

use std::{
    collections::{HashMap, HashSet, hash_map::DefaultHasher},
    fmt::{Debug, Display},
    hash::{Hash, Hasher},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context;
use futures::{Stream, StreamExt};
use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{WatchStreamExt, watcher},
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::convert;
use crate::object::{Event, NodeFacts, ObjectName, Problem};

/// Events that are sent at once when they are there.
const BATCH: usize = 1024;
/// HTTP status 410: the server has forgotten the version that a watch wants to go on from.
const GONE: u16 = 410;
/// Between such an answer and the next list.
const RESTART: Duration = Duration::from_secs(1);
/// Names of Nodes that a message lists.
const LISTED_NODES: u32 = 10;

/// Which API server, and as whom.
#[derive(Clone, Debug)]
pub struct Config {
    /// A kubeconfig file; `None`: the service account of the pod this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The own Node's `metadata.name`.
    pub node_name: String,
    /// Only objects whose label `service.kubernetes.io/service-proxy-name` has this value; `None`: those without the label.
    pub proxy_name: Option<String>,
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

    /// Lists, sends everything and [`Event::Complete`], then what changes, until the receiver is gone. A server that is
    /// away is waited for.
    ///
    /// # Errors
    /// A configuration that cannot be used: no such kubeconfig, not in a cluster, no node name.
    pub async fn run(self, tx: mpsc::Sender<Vec<Event>>) -> anyhow::Result<()> {
        let config = match &self.config.kubeconfig {
            Some(path) => {
                let kubeconfig = Kubeconfig::read_from(path)
                    .with_context(|| format!("--kubeconfig {}: cannot be used", path.display()))?;
                kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                    .await
                    .with_context(|| format!("--kubeconfig {}: its current context cannot be used", path.display()))?
            }
            None => kube::Config::incluster()
                .context("no service account to reach the API server with: give --kubeconfig FILE outside a cluster")?,
        };
        let client = Client::try_from(config).context("cannot make a client from the Kubernetes configuration")?;
        self.run_with(client, tx).await
    }

    async fn run_with(self, client: Client, tx: mpsc::Sender<Vec<Event>>) -> anyhow::Result<()> {
        let node_name = self.config.node_name;
        anyhow::ensure!(
            !node_name.is_empty(),
            "the own Node has no name: give --node-name (in a pod: from spec.nodeName)"
        );
        let proxy_name = self.config.proxy_name;
        let ours = match &proxy_name {
            None => format!("!{},!{}", convert::LABEL_HEADLESS, convert::LABEL_SERVICE_PROXY),
            Some(name) => format!("!{},{}={name}", convert::LABEL_HEADLESS, convert::LABEL_SERVICE_PROXY),
        };
        let by_label = watcher::Config::default().labels(&ours);
        let by_name = watcher::Config::default().fields(&format!("metadata.name={node_name}"));

        let services = watched::<Service>(&client, by_label.clone()).map(Change::Service);
        let slices = watched::<EndpointSlice>(&client, by_label).map(Change::Slice);
        let nodes = watched::<Node>(&client, by_name).map(Change::Node);
        let changes = futures::stream::select(futures::stream::select(services, slices), nodes);
        let mut changes = std::pin::pin!(changes.ready_chunks(BATCH));

        let mut state = State::new(&node_name, proxy_name);
        loop {
            let batch = tokio::select! {
                batch = changes.next() => batch,
                () = tx.closed() => return Ok(()),
            };
            let Some(batch) = batch else {
                anyhow::bail!("the watches of the API server ended");
            };
            let mut events = Vec::new();
            for change in batch {
                state.apply(change, &mut events);
            }
            for problem in state.problems.drain(..) {
                tracing::warn!("{problem}");
            }
            if std::mem::take(&mut state.node_is_missing) {
                tracing::warn!("{}", missing_node(&client, &node_name).await);
            }
            if !events.is_empty() && tx.send(events).await.is_err() {
                return Ok(());
            }
        }
    }
}

fn watched<K>(client: &Client, config: watcher::Config) -> impl Stream<Item = Told<K>> + use<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let api = Api::<K>::all(client.clone());
    let start = move || Box::pin(watcher(api.clone(), config.clone()).default_backoff());
    futures::stream::unfold((start(), start), async |(mut stream, start)| {
        let item = stream.next().await?;
        // kube reads the list again when 410 Gone comes as a watch event, but asks for the same version for ever when
        // it is the answer's status.
        if let Err(watcher::Error::WatchStartFailed(kube::Error::Api(status))) = &item
            && status.code == GONE
        {
            tokio::time::sleep(RESTART).await;
            stream = start();
        }
        Some((Box::new(item), (stream, start)))
    })
}

/// Says what Nodes there are when the own one is not.
async fn missing_node(client: &Client, node_name: &str) -> String {
    let nodes = Api::<Node>::all(client.clone());
    let known = match nodes.list_metadata(&ListParams::default().limit(LISTED_NODES)).await {
        Ok(list) => {
            let names: Vec<String> = list.items.into_iter().filter_map(|node| node.metadata.name).collect();
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

/// What one watch tells; boxed, since whole objects of different sizes travel side by side.
type Told<K> = Box<watcher::Result<watcher::Event<K>>>;

/// Something that a watch told.
#[derive(Debug)]
enum Change {
    Service(Told<Service>),
    Slice(Told<EndpointSlice>),
    Node(Told<Node>),
}

/// What was yielded, as far as differences need it.
#[derive(Debug)]
struct State {
    node_name: String,
    /// As in [`Config`].
    proxy_name: Option<String>,
    services: Known,
    slices: Known,
    nodes: Known,
    complete: bool,
    problems: Vec<Problem>,
    /// Set when a complete list has no such Node.
    node_is_missing: bool,
}

/// The objects of one kind that were yielded.
#[derive(Debug)]
struct Known {
    /// `kind` in the plural, for messages.
    plural: &'static str,
    /// Hash of the slim object, and its problems that were reported.
    objects: HashMap<ObjectName, (u64, Vec<Problem>)>,
    /// While a list is being read: names in it so far.
    listed: Option<HashSet<ObjectName>>,
    complete: bool,
    /// The last error, until the watch works again.
    failing: Option<String>,
}

/// What an object is to the model.
struct Slim<T> {
    name: ObjectName,
    /// `None`: nothing to yield of it, as if it were not there.
    value: Option<T>,
    problems: Vec<Problem>,
}

impl State {
    fn new(node_name: &str, proxy_name: Option<String>) -> Self {
        Self {
            node_name: node_name.to_owned(),
            proxy_name,
            services: Known::new("services"),
            slices: Known::new("endpointslices"),
            nodes: Known::new("nodes"),
            complete: false,
            problems: Vec::new(),
            node_is_missing: false,
        }
    }

    fn apply(&mut self, change: Change, events: &mut Vec<Event>) {
        let problems = &mut self.problems;
        let claim = |meta: &mut ObjectMeta| {
            if let Some(name) = &self.proxy_name {
                convert::claim(meta, name);
            }
        };
        match change {
            Change::Service(event) => self.services.apply(
                *event,
                |mut raw| {
                    claim(&mut raw.metadata);
                    slim(&raw.metadata, |problems| convert::service(&raw, problems))
                },
                |service| events.push(service.map_or_else(Event::ServiceGone, Event::Service)),
                problems,
            ),
            Change::Slice(event) => self.slices.apply(
                *event,
                |mut raw| {
                    claim(&mut raw.metadata);
                    slim(&raw.metadata, |problems| convert::slice(&raw, problems))
                },
                |slice| events.push(slice.map_or_else(Event::SliceGone, Event::Slice)),
                problems,
            ),
            Change::Node(event) => {
                let name: std::sync::Arc<str> = self.node_name.as_str().into();
                self.nodes.apply(
                    *event,
                    |raw| slim(&raw.metadata, |_| Some(convert::node(&raw))),
                    |node| {
                        events.push(Event::Node(node.unwrap_or_else(|_| NodeFacts {
                            name: name.clone(),
                            ..NodeFacts::default()
                        })));
                    },
                    problems,
                );
            }
        }
        if !self.complete && self.services.complete && self.slices.complete && self.nodes.complete {
            self.complete = true;
            self.node_is_missing = self.nodes.objects.is_empty();
            events.push(Event::Complete);
        }
    }
}

fn slim<T>(meta: &ObjectMeta, convert: impl FnOnce(&mut Vec<Problem>) -> Option<T>) -> Slim<T> {
    let mut problems = Vec::new();
    Slim {
        value: convert(&mut problems),
        name: ObjectName::new(
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
        ),
        problems,
    }
}

impl Known {
    fn new(plural: &'static str) -> Self {
        Self {
            plural,
            objects: HashMap::new(),
            listed: None,
            complete: false,
            failing: None,
        }
    }

    /// Takes in what the watch told; `yields` gets objects that are new or different, and names of those gone.
    fn apply<K, T: Hash>(
        &mut self,
        event: watcher::Result<watcher::Event<K>>,
        slim: impl FnOnce(K) -> Slim<T>,
        mut yields: impl FnMut(Result<T, ObjectName>),
        problems: &mut Vec<Problem>,
    ) {
        let event = match event {
            Ok(event) => event,
            Err(error) => return self.failed(&error),
        };
        if !matches!(event, watcher::Event::Init)
            && let Some(reason) = self.failing.take()
        {
            tracing::info!("watching {} works again (was: {reason})", self.plural);
        }
        match event {
            watcher::Event::Init => self.listed = Some(HashSet::new()),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                let object = slim(object);
                if let Some(listed) = &mut self.listed {
                    listed.insert(object.name.clone());
                }
                self.set(object, &mut yields, problems);
            }
            watcher::Event::Delete(object) => self.remove(&slim(object).name, &mut yields),
            watcher::Event::InitDone => {
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
            }
        }
    }

    fn set<T: Hash>(
        &mut self,
        object: Slim<T>,
        yields: &mut impl FnMut(Result<T, ObjectName>),
        problems: &mut Vec<Problem>,
    ) {
        let reported = self.objects.get(&object.name).map(|(_, reported)| reported.as_slice());
        let is_new = |problem: &&Problem| !reported.is_some_and(|reported| reported.contains(problem));
        problems.extend(object.problems.iter().filter(is_new).cloned());
        let mut hasher = DefaultHasher::new();
        object.value.hash(&mut hasher);
        let hash = hasher.finish();
        let before = self.objects.insert(object.name.clone(), (hash, object.problems));
        match object.value {
            _ if before.as_ref().is_some_and(|(before, _)| *before == hash) => {}
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
    fn failed(&mut self, error: &watcher::Error) {
        // The server has forgotten the version we know: an everyday thing, and the list is read again at once.
        let status = match error {
            watcher::Error::WatchError(status) => Some(status),
            watcher::Error::WatchStartFailed(kube::Error::Api(status)) => Some(status),
            _ => None,
        };
        if status.is_some_and(|status| status.code == GONE) {
            return tracing::debug!("{}: {error}", self.plural);
        }
        let (what, advice) = explain(error, self.plural);
        let reason = one_line(&what);
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

/// An error's cause, and what to do about it.
fn explain(error: &watcher::Error, plural: &str) -> (String, String) {
    let status = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status,
        error => {
            let chain: Vec<String> = anyhow::Chain::new(error).map(ToString::to_string).collect();
            return (chain.join(": "), "check that the API server can be reached".to_owned());
        }
    };
    let advice = match status.code {
        401 => "give a kubeconfig or service account that is still valid".to_owned(),
        403 => format!("allow get, list and watch on {plural} (ClusterRole)"),
        _ => "see the API server's log".to_owned(),
    };
    (format!("{} ({})", status.message, status.code), advice)
}

fn one_line(text: &impl Display) -> String {
    text.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
