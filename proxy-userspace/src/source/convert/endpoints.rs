//! EndpointSlices, and Endpoints in their form.

use std::{collections::BTreeSet, time::SystemTime};

use k8s_openapi::{
    api::{core::v1::Endpoints, discovery::v1::EndpointSlice},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::Timestamp,
};

use super::{left_alone, name, report::Report};
use crate::object::{self, ObjectName, Problem};

/// Label of a slice that names its Service.
pub const LABEL_SERVICE: &str = "kubernetes.io/service-name";
/// Annotation of a slice: RFC 3339 time of what changed it.
pub const ANNOTATION_TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// An EndpointSlice; `None` when it is another proxy's, names no Service, or holds domain names.
pub fn slice(slice: &EndpointSlice, problems: &mut Vec<Problem>) -> Option<object::EndpointSlice> {
    if left_alone(&slice.metadata) {
        return None;
    }
    let name = name("EndpointSlice", &slice.metadata, problems)?;
    let mut report = Report {
        kind: "EndpointSlice",
        name: &name,
        problems,
    };
    let owner = slice
        .metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get(LABEL_SERVICE));
    let Some(owner) = owner.filter(|owner| !owner.is_empty()) else {
        report.push(
            "metadata.labels",
            format!("names no Service; add the label {LABEL_SERVICE}"),
        );
        return None;
    };
    let service = ObjectName {
        namespace: name.namespace.clone(),
        name: owner.as_str().into(),
    };
    let is_v6 = match slice.address_type.as_str() {
        "IPv4" => false,
        "IPv6" => true,
        "FQDN" => {
            report.push(
                "addressType",
                "FQDN cannot be a backend of a Service; the slice is skipped",
            );
            return None;
        }
        other => {
            report.push("addressType", format!("{other:?} is no address type; use IPv4 or IPv6"));
            return None;
        }
    };

    let mut ports = Vec::new();
    for (i, port) in slice.ports.iter().flatten().enumerate() {
        let Some(number) = port.port else {
            report.push(format!("ports[{i}].port"), "is missing; a Service needs a number here");
            continue;
        };
        let number = report.port(|| format!("ports[{i}].port"), number);
        let protocol = report.protocol(|| format!("ports[{i}].protocol"), port.protocol.as_deref());
        if let (Some(port_number), Some(protocol)) = (number, protocol) {
            ports.push(object::EndpointPort {
                name: port.name.as_deref().unwrap_or_default().into(),
                protocol,
                port: port_number,
            });
        }
    }

    let mut endpoints = Vec::with_capacity(slice.endpoints.len());
    for (i, endpoint) in slice.endpoints.iter().enumerate() {
        let field = || format!("endpoints[{i}].addresses[0]");
        let Some(text) = endpoint.addresses.first() else {
            report.push(format!("endpoints[{i}].addresses"), "is empty");
            continue;
        };
        let Some(address) = report.backend_ip(field, text) else {
            continue;
        };
        if address.is_ipv6() != is_v6 {
            report.push(
                field(),
                format!("{address} is not of addressType {}", slice.address_type),
            );
            continue;
        }
        let conditions = endpoint.conditions.as_ref();
        let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
        let hints = endpoint.hints.clone().unwrap_or_default();
        let (zones, nodes) = (hints.for_zones.unwrap_or_default(), hints.for_nodes.unwrap_or_default());
        endpoints.push(object::Endpoint {
            address,
            node: endpoint.node_name.as_deref().map(Into::into),
            ready,
            serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(ready),
            terminating: conditions
                .and_then(|conditions| conditions.terminating)
                .unwrap_or(false),
            zones: report.hints(
                |j| format!("endpoints[{i}].hints.forZones[{j}].name"),
                zones.iter().map(|zone| zone.name.as_str()),
            ),
            nodes: report.hints(
                |j| format!("endpoints[{i}].hints.forNodes[{j}].name"),
                nodes.iter().map(|node| node.name.as_str()),
            ),
        });
    }
    Some(object::EndpointSlice {
        name,
        service,
        ports,
        endpoints,
    })
}

/// An `Endpoints` object as slices: one per subset and family.
///
/// Their names hold blanks and parentheses, so that none is ever a real slice's.
pub fn endpoints(endpoints: &Endpoints, problems: &mut Vec<Problem>) -> Vec<object::EndpointSlice> {
    if left_alone(&endpoints.metadata) {
        return Vec::new();
    }
    let Some(name) = name("Endpoints", &endpoints.metadata, problems) else {
        return Vec::new();
    };
    let mut report = Report {
        kind: "Endpoints",
        name: &name,
        problems,
    };
    let mut slices = Vec::new();
    for (s, subset) in endpoints.subsets.iter().flatten().enumerate() {
        let mut ports = Vec::new();
        for (i, port) in subset.ports.iter().flatten().enumerate() {
            let number = report.port(|| format!("subsets[{s}].ports[{i}].port"), port.port);
            let protocol = report.protocol(|| format!("subsets[{s}].ports[{i}].protocol"), port.protocol.as_deref());
            if let (Some(number), Some(protocol)) = (number, protocol) {
                ports.push(object::EndpointPort {
                    name: port.name.as_deref().unwrap_or_default().into(),
                    protocol,
                    port: number,
                });
            }
        }
        let mut families: [Vec<object::Endpoint>; 2] = [Vec::new(), Vec::new()];
        for (list, addresses, ready) in [
            ("addresses", &subset.addresses, true),
            ("notReadyAddresses", &subset.not_ready_addresses, false),
        ] {
            for (i, address) in addresses.iter().flatten().enumerate() {
                if let Some(ip) = report.backend_ip(|| format!("subsets[{s}].{list}[{i}].ip"), &address.ip) {
                    families[usize::from(ip.is_ipv6())].push(object::Endpoint {
                        address: ip,
                        node: address.node_name.as_deref().map(Into::into),
                        ready,
                        serving: ready,
                        terminating: false,
                        zones: BTreeSet::new(),
                        nodes: BTreeSet::new(),
                    });
                }
            }
        }
        for (family, endpoints) in ["IPv4", "IPv6"].into_iter().zip(families) {
            if !endpoints.is_empty() {
                slices.push(object::EndpointSlice {
                    name: ObjectName::new(
                        &name.namespace,
                        &format!("{} (Endpoints subset {s}, {family})", name.name),
                    ),
                    service: name.clone(),
                    ports: ports.clone(),
                    endpoints,
                });
            }
        }
    }
    slices
}

/// When the change of a pod or Service happened that an EndpointSlice tells of, as the endpoint slice controller notes it.
pub fn triggered(meta: &ObjectMeta) -> Option<SystemTime> {
    let text = meta.annotations.as_ref()?.get(ANNOTATION_TRIGGER_TIME)?;
    Some(text.parse::<Timestamp>().ok()?.into())
}
