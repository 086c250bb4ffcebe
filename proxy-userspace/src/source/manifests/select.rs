//! What the EndpointSlice controller does: from selectors and Pods to slices.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    super::convert::PodFacts,
    service::{Distribution, ServiceManifest, Target},
};
use crate::object::{Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, ServicePort};

/// The slices that the EndpointSlice controller would make of a Service and the Pods of its
/// namespace: Pods whose ports have the same numbers share one. `zones`: by node; they become hints
/// where `trafficDistribution` asks for some.
pub(super) fn select(
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
                    let is_it = |(other, protocol, _): &&(String, Protocol, u16)| {
                        other == name && *protocol == port.protocol
                    };
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
        // As the controller has it: a pod is called by its host name below the Service of its
        // subdomain only.
        let hostname = pod
            .hostname
            .as_ref()
            .filter(|_| pod.subdomain.as_ref() == Some(&service.name.name));
        for address in &pod.addresses {
            groups
                .entry((address.is_ipv6(), ports.clone()))
                .or_default()
                .push(Endpoint {
                    address: *address,
                    hostname: hostname.cloned(),
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
                &format!(
                    "{} (Pods, {family}, {})",
                    service.name.name,
                    numbers.join(" ")
                ),
            ),
            service: service.name.clone(),
            names_only: false,
            ports,
            endpoints,
        }
    };
    groups.into_iter().map(slice).collect()
}
