//! Pods that the socket hook leaves to packets: by the label [`LABEL`], theirs or their namespace's.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use super::kinds::{Namespace, Pod};
use crate::object::{Event, ObjectName};

/// Label of Pods and Namespaces; a Pod's own stands over its Namespace's.
pub(super) const LABEL: &str = "shunt.dev/socket-lb";
/// The value that leaves out.
pub(super) const OFF: &str = "off";

/// What is kept of a Pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct PodLabel {
    name: ObjectName,
    /// `spec.nodeName`.
    node: Option<Arc<str>>,
    /// What its cgroup is named by.
    uid: Arc<str>,
    /// Its own label; `None`: its Namespace's counts.
    is_off: Option<bool>,
}

impl PodLabel {
    /// Whether it runs on this Node.
    pub(super) fn is_on(&self, node: &str) -> bool {
        self.node.as_deref() == Some(node)
    }
}

/// A Pod; `None` when it has ended, or nothing could be its cgroup.
pub(super) fn pod(pod: &Pod) -> Option<PodLabel> {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    if matches!(phase, Some("Succeeded" | "Failed")) {
        return None;
    }
    let meta = &pod.metadata;
    // The kubelet knows a static Pod by another UID than the server has it under.
    let uid = meta.annotations.config_mirror.as_deref();
    let uid = uid.or(meta.uid.as_deref()).filter(|uid| !uid.is_empty())?;
    Some(PodLabel {
        name: ObjectName::new(
            meta.namespace.as_deref().unwrap_or("default"),
            meta.name.as_deref().unwrap_or_default(),
        ),
        node: pod.spec.node_name.as_deref().map(Into::into),
        uid: uid.into(),
        is_off: meta.labels.get(LABEL).map(|value| value == OFF),
    })
}

/// The name of a Namespace whose Pods are left out.
pub(super) fn namespace(namespace: &Namespace) -> Option<Arc<str>> {
    let meta = &namespace.metadata;
    let is_off = meta.labels.get(LABEL).is_some_and(|value| value == OFF);
    is_off.then(|| meta.name.as_deref().unwrap_or_default().into())
}

/// What was told, and what came of it last.
#[derive(Debug, Default)]
pub(super) struct LeftOut {
    pods: BTreeMap<ObjectName, PodLabel>,
    namespaces: HashSet<Arc<str>>,
    told: Option<BTreeSet<Arc<str>>>,
}

impl LeftOut {
    /// A Pod appeared or changed, or is none any more.
    pub(super) fn set_pod(&mut self, pod: Result<PodLabel, ObjectName>) {
        match pod {
            Ok(pod) => drop(self.pods.insert(pod.name.clone(), pod)),
            Err(name) => drop(self.pods.remove(&name)),
        }
    }

    /// A Namespace got the label, or has it no more.
    pub(super) fn set_namespace(&mut self, namespace: Result<Arc<str>, ObjectName>) {
        match namespace {
            Ok(name) => drop(self.namespaces.insert(name)),
            Err(name) => drop(self.namespaces.remove(&name.name)),
        }
    }

    /// Forgets all that [`Self::changed`] has not told.
    pub(super) fn clear(&mut self) {
        self.pods.clear();
        self.namespaces.clear();
    }

    /// What there is to be told now.
    pub(super) fn changed(&mut self) -> Option<Event> {
        let is_off = |(name, pod): &(&ObjectName, &PodLabel)| {
            pod.is_off
                .unwrap_or_else(|| self.namespaces.contains(&name.namespace))
        };
        let pods = self.pods.iter().filter(is_off);
        let uids: BTreeSet<Arc<str>> = pods.map(|(_, pod)| pod.uid.clone()).collect();
        if self.told.as_ref() == Some(&uids) {
            return None;
        }
        self.told = Some(uids.clone());
        Some(Event::LeftOut(uids))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(object: Value) -> Option<PodLabel> {
        pod(&serde_json::from_value(object).unwrap())
    }

    fn meta(name: &str, label: Option<&str>) -> Value {
        let labels: serde_json::Map<_, _> = label
            .map(|label| (LABEL.to_owned(), label.into()))
            .into_iter()
            .collect();
        json!({ "name": name, "namespace": "mesh", "uid": format!("uid-{name}"), "labels": labels })
    }

    #[test]
    fn a_pods_own_label_stands_over_its_namespaces() {
        let mut all = LeftOut::default();
        for (name, label) in [("off", Some("off")), ("on", Some("on")), ("none", None)] {
            let pod = read(json!({ "metadata": meta(name, label) }));
            all.set_pod(Ok(pod.unwrap()));
        }
        let told = |names: &[&str]| {
            let uids = names.iter().map(|name| format!("uid-{name}").into());
            Some(Event::LeftOut(uids.collect()))
        };
        assert_eq!(all.changed(), told(&["off"]));
        assert_eq!(all.changed(), None);
        all.set_namespace(Ok("mesh".into()));
        assert_eq!(all.changed(), told(&["none", "off"]));
        all.set_pod(Err(ObjectName::new("mesh", "off")));
        assert_eq!(all.changed(), told(&["none"]));
        all.set_namespace(Err(ObjectName::new("", "mesh")));
        assert_eq!(all.changed(), told(&[]));
    }

    #[test]
    fn namespaces_are_left_out_by_their_label() {
        for (label, name) in [(None, None), (Some("on"), None), (Some("off"), Some("n"))] {
            let object = json!({ "metadata": meta("n", label) });
            let read = namespace(&serde_json::from_value(object).unwrap());
            assert_eq!(read.as_deref(), name, "{label:?}");
        }
    }

    #[test]
    fn what_has_ended_or_has_no_uid_has_no_cgroup() {
        let phase = |phase: &str| {
            let meta = meta("p", Some("off"));
            read(json!({ "metadata": meta, "status": { "phase": phase } }))
        };
        assert_eq!(phase("Succeeded"), None);
        assert_eq!(phase("Failed"), None);
        assert!(phase("Pending").is_some());
        assert_eq!(read(json!({ "metadata": { "name": "p" } })), None);
        let annotations = json!({ "kubernetes.io/config.mirror": "file" });
        let mirror = json!({ "name": "p", "uid": "u", "annotations": annotations });
        assert_eq!(&*read(json!({ "metadata": mirror })).unwrap().uid, "file");
    }
}
