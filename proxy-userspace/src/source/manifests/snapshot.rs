//! Services and Pods as manifests have them, read once: for verbs that look at objects as an API
//! server would show them.

use std::collections::BTreeMap;

use super::{
    super::{
        kinds::{Meta, Pod, Service},
        yaml::{self, Object},
    },
    Config, State, check_paths, files,
};
use crate::object::{ObjectName, Problem};

/// What manifests say.
#[derive(Debug)]
pub struct Snapshot {
    /// All Services, `spec.clusterIP` filled in where an agent gives one.
    pub services: BTreeMap<ObjectName, Service>,
    /// Services whose cluster IP is not written down, but given.
    pub given: Vec<ObjectName>,
    /// All Pods.
    pub pods: BTreeMap<ObjectName, Pod>,
    /// What is wrong in them.
    pub problems: Vec<Problem>,
}

/// Reads the manifests once. Cluster IPs are those that an agent gives which starts with the same
/// configuration now.
///
/// # Errors
/// A path that does not exist or cannot be read.
pub async fn snapshot(config: Config) -> anyhow::Result<Snapshot> {
    check_paths(&config.paths)?;
    let read = files::read(&config.paths).await;
    let mut snapshot = Snapshot {
        services: BTreeMap::new(),
        given: Vec::new(),
        pods: BTreeMap::new(),
        problems: Vec::new(),
    };
    for text in read.files.iter().filter_map(|(_, text)| text.as_ref().ok()) {
        for parsed in yaml::parse(text) {
            // Where an object stands twice, the first counts.
            match parsed.object {
                Ok(Object::Service(service)) => {
                    snapshot
                        .services
                        .entry(name(&service.metadata))
                        .or_insert(*service);
                }
                Ok(Object::Pod(pod)) => {
                    snapshot.pods.entry(name(&pod.metadata)).or_insert(*pod);
                }
                _ => {}
            }
        }
    }
    let mut state = State::new(config);
    (_, snapshot.problems) = state.update(read);
    for (name, service) in &mut snapshot.services {
        let served = state
            .services
            .get(name)
            .and_then(|served| served.cluster_ips.first());
        let (Some(first), Some(spec)) = (served, service.spec.as_mut()) else {
            continue;
        };
        // As it is written, where it is: an IPv6 address has more than one form.
        let written = spec.cluster_ip.iter().chain(&spec.cluster_ips);
        match written.clone().find(|text| text.parse() == Ok(*first)) {
            Some(text) => spec.cluster_ip = Some(text.clone()),
            None => {
                spec.cluster_ip = Some(first.to_string());
                snapshot.given.push(name.clone());
            }
        }
    }
    Ok(snapshot)
}

fn name(meta: &Meta) -> ObjectName {
    let namespace = meta
        .namespace
        .as_deref()
        .filter(|namespace| !namespace.is_empty());
    ObjectName::new(
        namespace.unwrap_or("default"),
        meta.name.as_deref().unwrap_or_default(),
    )
}
