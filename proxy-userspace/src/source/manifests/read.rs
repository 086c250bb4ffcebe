//! Files as they were read: their objects, checked, and what is wrong in them.

use std::{
    collections::{BTreeSet, HashSet, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    path::Path,
    sync::Arc,
};

use super::{
    super::{
        convert::{self, PodFacts},
        left_out::{self, PodLabel},
        yaml::{self, Object},
    },
    service::{ServiceManifest, service_manifest},
};
use crate::object::{EndpointSlice, NodeFacts, ObjectName, Problem};

/// Kind and name: what an object is known by.
pub(super) type Key = (&'static str, ObjectName);

/// An object of a manifest, checked.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) key: Key,
    pub(super) line: Option<u64>,
    pub(super) content: Content,
    /// Whether nothing was wrong with it.
    pub(super) clean: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Content {
    Service(Arc<ServiceManifest>),
    Slice(Arc<EndpointSlice>),
    Endpoints(Arc<Vec<EndpointSlice>>),
    Pod {
        facts: Arc<PodFacts>,
        label: Option<PodLabel>,
    },
    /// A Namespace whose Pods are left out of the socket hook.
    NamespaceOff,
    Node(NodeFacts),
}

/// A file as it was last read.
#[derive(Debug, Default)]
pub(super) struct KnownFile {
    pub(super) text_hash: Option<u64>,
    pub(super) was_empty: bool,
    pub(super) objects: Vec<Known>,
    pub(super) problems: Vec<Problem>,
}

/// Reads a file; what is wrong in it keeps its last good content.
pub(super) fn read_file(path: &Path, text: &str, before: KnownFile) -> KnownFile {
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
                    name.as_ref().is_none_or(|name| {
                        known.key == (known.key.0, name.clone()) && known.key.0 == parsed.kind
                    })
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
                    is_served: false,
                });
            }
            Ok(object) => {
                let mut found = Vec::new();
                let content = check(object, &mut found);
                let clean = found.iter().all(|problem| problem.is_served);
                let good_before = |key: &Key| {
                    before
                        .objects
                        .iter()
                        .any(|known| known.key == *key && known.clean)
                };
                let rejected = matches!(object, Object::Service(_)) && !clean;
                let key = content.as_ref().map(|(key, _)| key.clone());
                for mut problem in found {
                    problem.file = Some(path.to_owned());
                    problem.line = parsed.line_of(&problem.field);
                    let key = key
                        .clone()
                        .or_else(|| Some(("Service", problem.name.clone()?)));
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
            Some((
                ("EndpointSlice", slice.name.clone()),
                Content::Slice(Arc::new(slice)),
            ))
        }
        Object::Endpoints(raw) => {
            let slices = convert::endpoints(raw, problems);
            let name = slices.first()?.service.clone();
            Some((("Endpoints", name), Content::Endpoints(Arc::new(slices))))
        }
        Object::Pod(raw) => {
            let facts = Arc::new(convert::pod(raw, problems)?);
            let label = left_out::pod(raw);
            Some((("Pod", facts.name.clone()), Content::Pod { facts, label }))
        }
        Object::Namespace(raw) => {
            let name = left_out::namespace(raw)?;
            Some((
                ("Namespace", ObjectName::new("", &name)),
                Content::NamespaceOff,
            ))
        }
        Object::Node(raw) => {
            let facts = convert::node(raw);
            Some((
                ("Node", ObjectName::new("", &facts.name)),
                Content::Node(facts),
            ))
        }
        Object::Other => None,
    }
}
