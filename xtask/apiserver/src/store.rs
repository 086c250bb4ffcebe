//! Objects, their versions and what happened to them: what etcd is to an API server.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::selector::Selector;

/// Changes that are remembered; older ones are answered with 410 Gone.
const HISTORY: usize = 1 << 20;

/// A kind of objects, by the last part of its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `/api/v1/services`
    Services,
    /// `/apis/discovery.k8s.io/v1/endpointslices`
    EndpointSlices,
    /// `/api/v1/nodes`
    Nodes,
    /// `/api/v1/pods`
    Pods,
    /// `/api/v1/namespaces`
    Namespaces,
    /// `/api/v1/events` and `/apis/events.k8s.io/v1/events`
    Events,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::Services,
        Self::EndpointSlices,
        Self::Nodes,
        Self::Pods,
        Self::Namespaces,
        Self::Events,
    ];

    /// `services`, as in a path.
    #[must_use]
    pub fn plural(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
            Self::Pods => "pods",
            Self::Namespaces => "namespaces",
            Self::Events => "events",
        }
    }

    /// `Service`, as in an object.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Services => "Service",
            Self::EndpointSlices => "EndpointSlice",
            Self::Nodes => "Node",
            Self::Pods => "Pod",
            Self::Namespaces => "Namespace",
            Self::Events => "Event",
        }
    }

    /// `discovery.k8s.io/v1`, as in an object.
    #[must_use]
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Services | Self::Nodes | Self::Pods | Self::Namespaces | Self::Events => "v1",
            Self::EndpointSlices => "discovery.k8s.io/v1",
        }
    }

    /// Whether its objects are in namespaces.
    pub(crate) fn is_namespaced(self) -> bool {
        !matches!(self, Self::Nodes | Self::Namespaces)
    }

    /// The kind of an object.
    #[must_use]
    pub fn of(object: &Value) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| object["kind"] == kind.kind())
    }
}

/// Namespace (empty for Nodes and Namespaces) and name.
pub(crate) type Key = (String, String);

/// One version of an object.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) key: Key,
    /// With `metadata.resourceVersion`.
    pub(crate) json: Bytes,
    labels: BTreeMap<String, String>,
    /// `spec.nodeName` of a Pod.
    node_name: String,
}

/// What a request wants to see.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) namespace: Option<String>,
    pub(crate) labels: Selector,
    pub(crate) fields: Selector,
}

impl Wanted {
    pub(crate) fn matches(&self, object: &Object) -> bool {
        let (namespace, name) = &object.key;
        let fields = BTreeMap::from([
            ("metadata.namespace".to_owned(), namespace.clone()),
            ("metadata.name".to_owned(), name.clone()),
            ("spec.nodeName".to_owned(), object.node_name.clone()),
        ]);
        self.namespace
            .as_ref()
            .is_none_or(|wanted| wanted == namespace)
            && self.labels.matches(&object.labels)
            && self.fields.matches(&fields)
    }
}

/// Something that happened.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) version: u64,
    pub(crate) kind: Kind,
    /// As it was before, for those that select it no longer.
    before: Option<Arc<Object>>,
    /// As it is now; with the version of the change also when it was deleted.
    after: Arc<Object>,
    deleted: bool,
}

impl Change {
    /// The watch event for one who wants to see certain objects only: leaving the selection is a
    /// deletion.
    pub(crate) fn event(&self, wanted: &Wanted) -> Option<(&'static str, &Arc<Object>)> {
        let before = self
            .before
            .as_ref()
            .is_some_and(|object| wanted.matches(object));
        let after = !self.deleted && wanted.matches(&self.after);
        match (before, after) {
            (false, false) => None,
            (false, true) => Some(("ADDED", &self.after)),
            (true, true) => Some(("MODIFIED", &self.after)),
            (true, false) => Some(("DELETED", &self.after)),
        }
    }
}

/// All objects.
#[derive(Debug, Default)]
pub(crate) struct Store {
    pub(crate) version: u64,
    objects: BTreeMap<Kind, BTreeMap<Key, Arc<Object>>>,
    history: VecDeque<Change>,
    /// Versions below are answered with 410 Gone.
    pub(crate) oldest: u64,
    /// Number of the next cluster IP and uid.
    next: u16,
}

impl Store {
    /// Nothing, at a version.
    pub(crate) fn new(version: u64) -> Self {
        Self {
            version,
            ..Self::default()
        }
    }

    pub(crate) fn objects(&self, kind: Kind) -> impl Iterator<Item = &Arc<Object>> {
        self.objects
            .get(&kind)
            .into_iter()
            .flat_map(BTreeMap::values)
    }

    /// Those after a key, for the next page of a list.
    pub(crate) fn objects_after(
        &self,
        kind: Kind,
        key: Option<&Key>,
    ) -> impl Iterator<Item = &Arc<Object>> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = key.map_or(Unbounded, Excluded);
        let objects = self.objects.get(&kind).into_iter();
        objects.flat_map(move |objects| {
            objects
                .range::<Key, _>((from, Unbounded))
                .map(|(_, object)| object)
        })
    }

    pub(crate) fn get(&self, kind: Kind, key: &Key) -> Option<&Arc<Object>> {
        self.objects.get(&kind)?.get(key)
    }

    /// What happened to a kind after a version.
    pub(crate) fn changes(&self, kind: Kind, after: u64) -> impl Iterator<Item = &Change> {
        let first = self
            .history
            .partition_point(|change| change.version <= after);
        self.history
            .range(first..)
            .filter(move |change| change.kind == kind)
    }

    /// The last changes of a kind up to a version, oldest first.
    pub(crate) fn changes_before(&self, kind: Kind, version: u64, count: usize) -> Vec<Change> {
        let end = self
            .history
            .partition_point(|change| change.version <= version);
        let of_kind = self
            .history
            .range(..end)
            .rev()
            .filter(|change| change.kind == kind);
        let mut changes: Vec<Change> = of_kind.take(count).cloned().collect();
        changes.reverse();
        changes
    }

    /// Creates or replaces an object; returns it as it is now.
    ///
    /// What a server gives is given here: version, uid, time of creation, cluster IPs.
    ///
    /// # Errors
    /// When it lacks a kind or a name.
    pub(crate) fn set(&mut self, mut value: Value) -> Result<Arc<Object>, String> {
        let kind = Kind::of(&value).ok_or_else(|| format!("no such kind: {}", value["kind"]))?;
        let name = value["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        if name.is_empty() {
            return Err("metadata.name: Required value".to_owned());
        }
        let namespace = if kind.is_namespaced() {
            let namespace = value["metadata"]["namespace"].as_str();
            namespace.unwrap_or("default").to_owned()
        } else {
            String::new()
        };
        let key = (namespace, name);
        let before = self.get(kind, &key).cloned();
        let old: Value = before
            .as_ref()
            .and_then(|object| serde_json::from_slice(&object.json).ok())
            .unwrap_or_default();
        self.version += 1;
        self.next += u16::from(before.is_none());
        value["apiVersion"] = json!(kind.api_version());
        let metadata = &mut value["metadata"];
        metadata["resourceVersion"] = json!(self.version.to_string());
        if kind.is_namespaced() {
            metadata["namespace"] = json!(key.0);
        }
        let given = [
            (
                "uid",
                json!(format!("00000000-0000-4000-8000-{:012x}", self.version)),
            ),
            ("creationTimestamp", json!("2026-01-01T00:00:00Z")),
        ];
        for (field, new) in given {
            metadata[field] = match &old["metadata"][field] {
                Value::Null => new,
                old => old.clone(),
            };
        }
        if value.get("status").is_none() && !old["status"].is_null() {
            value["status"] = old["status"].clone();
        }
        if kind == Kind::Services
            && value["spec"]["type"] != "ExternalName"
            && value["spec"]["clusterIP"].is_null()
        {
            let spec = &mut value["spec"];
            if old["spec"]["clusterIPs"].is_array() {
                spec["clusterIPs"] = old["spec"]["clusterIPs"].clone();
            } else {
                let [high, low] = self.next.to_be_bytes();
                spec["clusterIPs"] = json!([
                    format!("10.96.{high}.{low}"),
                    format!("fd96::{:x}", self.next)
                ]);
            }
            spec["clusterIP"] = spec["clusterIPs"][0].clone();
        }
        let object = Arc::new(object(key, &value));
        self.objects
            .entry(kind)
            .or_default()
            .insert(object.key.clone(), object.clone());
        self.record(kind, before, object.clone(), false);
        Ok(object)
    }

    /// Deletes an object; whether there was one.
    pub(crate) fn delete(&mut self, kind: Kind, key: &Key) -> bool {
        let Some(before) = self.objects.entry(kind).or_default().remove(key) else {
            return false;
        };
        self.version += 1;
        let mut value: Value = serde_json::from_slice(&before.json).unwrap_or_default();
        value["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let after = Arc::new(object(key.clone(), &value));
        self.record(kind, Some(before), after, true);
        true
    }

    fn record(
        &mut self,
        kind: Kind,
        before: Option<Arc<Object>>,
        after: Arc<Object>,
        deleted: bool,
    ) {
        self.history.push_back(Change {
            version: self.version,
            kind,
            before,
            after,
            deleted,
        });
        if self.history.len() > HISTORY
            && let Some(forgotten) = self.history.pop_front()
        {
            self.oldest = self.oldest.max(forgotten.version);
        }
    }
}

fn object(key: Key, value: &Value) -> Object {
    let labels = value["metadata"]["labels"]
        .as_object()
        .into_iter()
        .flatten();
    Object {
        key,
        labels: labels
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect(),
        node_name: value["spec"]["nodeName"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        json: value.to_string().into(),
    }
}
