//! EndpointSlices, and Endpoints in their form.

use std::{collections::BTreeSet, time::SystemTime};

use k8s_openapi::jiff::Timestamp;

use super::{left_alone, name, report::Report};
use crate::{
    object::{self, ObjectName, Problem},
    source::kinds::{EndpointSlice, Endpoints, Meta},
};

/// Label of a slice that names its Service.
pub const LABEL_SERVICE: &str = "kubernetes.io/service-name";

/// An EndpointSlice; `None` when it names no Service, or holds domain names. What is wrong with
/// another proxy's is not told.
pub fn slice(slice: &EndpointSlice, problems: &mut Vec<Problem>) -> Option<object::EndpointSlice> {
    let names_only = left_alone(&slice.metadata);
    let mut untold = Vec::new();
    let problems = if names_only { &mut untold } else { problems };
    let name = name("EndpointSlice", &slice.metadata, problems)?;
    let mut report = Report {
        kind: "EndpointSlice",
        name: &name,
        problems,
    };
    let owner = slice.metadata.labels.get(LABEL_SERVICE);
    let Some(owner) = owner.filter(|owner| !owner.is_empty()) else {
        report.push(
            "metadata.labels",
            format!("names no Service; add the label {LABEL_SERVICE}"),
        );
        return None;
    };
    let service = ObjectName {
        namespace: name.namespace.clone(),
        name: owner.into(),
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
            report.push(
                "addressType",
                format!("{other:?} is no address type; use IPv4 or IPv6"),
            );
            return None;
        }
    };

    let mut ports = Vec::new();
    for (i, port) in slice.ports.iter().enumerate() {
        let Some(number) = port.port else {
            report.push(
                format!("ports[{i}].port"),
                "is missing; a Service needs a number here",
            );
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
        let (conditions, hints) = (&endpoint.conditions, &endpoint.hints);
        endpoints.push(object::Endpoint {
            address,
            hostname: endpoint
                .hostname
                .as_deref()
                .filter(|hostname| !hostname.is_empty())
                .map(Into::into),
            node: endpoint.node_name.as_deref().map(Into::into),
            ready: conditions.ready.unwrap_or(true),
            serving: conditions.serving.unwrap_or(true),
            terminating: conditions.terminating.unwrap_or(false),
            zones: report.hints(
                |j| format!("endpoints[{i}].hints.forZones[{j}].name"),
                hints.for_zones.iter().map(|zone| zone.name.as_str()),
            ),
            nodes: report.hints(
                |j| format!("endpoints[{i}].hints.forNodes[{j}].name"),
                hints.for_nodes.iter().map(|node| node.name.as_str()),
            ),
        });
    }
    Some(object::EndpointSlice {
        name,
        service,
        names_only,
        ports,
        endpoints,
    })
}

/// An `Endpoints` object as slices: one per subset and family.
///
/// Their names hold blanks and parentheses, so that none is ever a real slice's.
pub fn endpoints(endpoints: &Endpoints, problems: &mut Vec<Problem>) -> Vec<object::EndpointSlice> {
    let names_only = left_alone(&endpoints.metadata);
    let mut untold = Vec::new();
    let problems = if names_only { &mut untold } else { problems };
    let Some(name) = name("Endpoints", &endpoints.metadata, problems) else {
        return Vec::new();
    };
    let mut report = Report {
        kind: "Endpoints",
        name: &name,
        problems,
    };
    let mut slices = Vec::new();
    for (s, subset) in endpoints.subsets.iter().enumerate() {
        let mut ports = Vec::new();
        for (i, port) in subset.ports.iter().enumerate() {
            let number = report.port(
                || format!("subsets[{s}].ports[{i}].port"),
                port.port.unwrap_or_default(),
            );
            let protocol = report.protocol(
                || format!("subsets[{s}].ports[{i}].protocol"),
                port.protocol.as_deref(),
            );
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
            for (i, address) in addresses.iter().enumerate() {
                if let Some(ip) =
                    report.backend_ip(|| format!("subsets[{s}].{list}[{i}].ip"), &address.ip)
                {
                    families[usize::from(ip.is_ipv6())].push(object::Endpoint {
                        address: ip,
                        hostname: address
                            .hostname
                            .as_deref()
                            .filter(|hostname| !hostname.is_empty())
                            .map(Into::into),
                        node: address.node_name.as_deref().map(Into::into),
                        ready,
                        // Not said: the controller that makes slices of such objects leaves the
                        // condition out.
                        serving: true,
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
                    names_only,
                    ports: ports.clone(),
                    endpoints,
                });
            }
        }
    }
    slices
}

/// When the change of a pod or Service happened that an EndpointSlice tells of, as the endpoint
/// slice controller notes it.
pub fn triggered(meta: &Meta) -> Option<SystemTime> {
    let text = meta.annotations.trigger_time.as_ref()?;
    Some(text.parse::<Timestamp>().ok()?.into())
}
