//! Kubernetes manifests as a source: files and folders of YAML, watched.
//!
//! Every read computes the complete set of objects and yields the difference to what was yielded
//! before. Beside the objects an API server would have, manifests may hold `Pod` and `Endpoints`:
//! what the endpoint controllers of a cluster do with them is done here, and what an API server
//! would allocate is allocated ([`Config`]).
//!
//! A mistake costs only the object that has it. Where an earlier reading of that object was good,
//! it goes on serving: as with `kubectl apply`, a change that cannot be accepted changes nothing.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use tokio::sync::mpsc;

pub use self::{
    config::Config,
    snapshot::{Snapshot, snapshot},
};
use self::{
    numbers::Numbers,
    read::{Content, Key, KnownFile, read_file},
    select::select,
    service::ServiceManifest,
};
use super::{
    convert::PodFacts,
    files::{self, Files},
    left_out::LeftOut,
    queue::Queue,
};
use crate::object::{EndpointSlice, Event, NodeFacts, ObjectName, Problem, Service};

mod config;
mod numbers;
mod read;
mod select;
mod service;
mod snapshot;
#[cfg(test)]
pub(crate) mod tests;

/// A change is read when nothing has changed for so long: editors and `git` write several files one
/// after the other.
const QUIET: Duration = Duration::from_millis(50);
/// A change is read after so long even when others follow.
const MOST_QUIET: Duration = Duration::from_secs(1);
/// A file of no bytes is most often one that is being written: it is looked at once more after so
/// long.
const EMPTY_FILE: Duration = Duration::from_millis(200);

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

    /// Reads, sends everything and [`Event::Complete`], then differences, until the receiver is
    /// gone.
    ///
    /// # Errors
    /// A path that does not exist or cannot be read at the start. Later on that is a warning.
    pub async fn run(self, tx: impl Into<Queue>) -> anyhow::Result<()> {
        let tx: Queue = tx.into();
        check_paths(&self.config.paths)?;
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
                let signalled = tokio::select! {
                    signalled = woken.recv() => signalled.is_some(),
                    () = tokio::time::sleep(poll) => false,
                    () = tx.closed() => return Ok(()),
                };
                if signalled {
                    let end = tokio::time::Instant::now() + MOST_QUIET;
                    while tokio::time::Instant::now() < end
                        && tokio::time::timeout(QUIET, woken.recv()).await.is_ok()
                    {
                    }
                }
                let now = files::signature(&self.config.paths);
                let changed = now != seen;
                seen = now;
                if changed && !signalled {
                    // Something changed that the watcher did not tell: a path was replaced, or
                    // links lead elsewhere.
                    watcher = files::watch(&self.config.paths, &wake);
                }
                if signalled || changed {
                    break;
                }
            }
        }
    }
}

/// Whether what was given is there.
fn check_paths(paths: &[PathBuf]) -> anyhow::Result<()> {
    for path in paths {
        std::fs::metadata(path).with_context(|| {
            format!(
                "--manifests {}: give a file or folder that can be read",
                path.display()
            )
        })?;
    }
    Ok(())
}

/// What was read and yielded: differences are made against it.
#[derive(Debug)]
struct State {
    config: Config,
    files: HashMap<PathBuf, KnownFile>,
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
    node: Option<NodeFacts>,
    left_out: LeftOut,
    complete: bool,
    problems: HashSet<Problem>,
    numbers: Numbers,
}

impl State {
    fn new(config: Config) -> Self {
        Self {
            config,
            files: HashMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            node: None,
            left_out: LeftOut::default(),
            complete: false,
            problems: HashSet::new(),
            numbers: Numbers::default(),
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
        if self.config.socket_lb_labels {
            events.extend(self.left_out.changed());
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
        self.left_out.clear();
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
                    name,
                    zone: Some(zone),
                    ..
                }) = &known.content
                {
                    zones.insert(name.clone(), zone.clone());
                }
                match &known.content {
                    Content::Service(manifest) => {
                        drop(manifests.insert(name.clone(), manifest.clone()))
                    }
                    Content::Slice(slice) => {
                        drop(slices.insert(name.clone(), EndpointSlice::clone(slice)))
                    }
                    Content::Endpoints(of) => endpoints.push((name.clone(), of.clone())),
                    Content::Pod { facts, label } => {
                        if let Some(label) = label
                            && label.is_on(&self.config.node_name)
                        {
                            self.left_out.set_pod(Ok(label.clone()));
                        }
                        pods.entry(name.namespace.clone())
                            .or_default()
                            .push(facts.clone());
                    }
                    Content::NamespaceOff => {
                        self.left_out.set_namespace(Ok(name.name.clone()));
                    }
                    Content::Node(facts) if *facts.name == *self.config.node_name => {
                        node = Some(facts.clone())
                    }
                    Content::Node(_) => {}
                }
            }
        }
        // A dump of a cluster holds both, and the Endpoints are the coarser ones.
        let sliced: HashSet<ObjectName> =
            slices.values().map(|slice| slice.service.clone()).collect();
        for (_, of) in endpoints.iter().filter(|(name, _)| !sliced.contains(name)) {
            slices.extend(of.iter().map(|slice| (slice.name.clone(), slice.clone())));
        }
        for (name, manifest) in manifests
            .iter()
            .filter(|(_, manifest)| !manifest.selector.is_empty())
        {
            let pods = pods
                .get(&name.namespace)
                .map(Vec::as_slice)
                .unwrap_or_default();
            slices.extend(
                select(manifest, pods, &zones)
                    .into_iter()
                    .map(|slice| (slice.name.clone(), slice)),
            );
        }
        let services = self.numbers.give(&self.config, &manifests, problems);
        (services, slices, node)
    }
}

/// Names that are gone, and values that are new or different.
fn difference<V: Clone + PartialEq>(
    old: &BTreeMap<ObjectName, V>,
    new: &BTreeMap<ObjectName, V>,
) -> (Vec<ObjectName>, Vec<V>) {
    let gone = old
        .keys()
        .filter(|name| !new.contains_key(name))
        .cloned()
        .collect();
    let changed = new
        .iter()
        .filter(|(name, value)| old.get(name) != Some(value))
        .map(|(_, value)| value.clone())
        .collect();
    (gone, changed)
}
