//! What a Service's manifest says to an API server and to controllers.

use std::{collections::BTreeMap, net::IpAddr};

use crate::{
    object::{Problem, Service, TrafficPolicy},
    source::{
        convert::decimal,
        kinds::{self, IntOrString},
    },
};

/// A Service and what an API server or a controller would have made of it.
#[derive(Debug)]
pub(super) struct ServiceManifest {
    pub(super) service: Service,
    pub(super) selector: BTreeMap<String, String>,
    /// Per port of `service`.
    pub(super) targets: Vec<Target>,
    /// Families of cluster IPs to have, true: IPv6; `None`: the first Service CIDR's.
    pub(super) families: Option<Vec<bool>>,
    pub(super) dual_stack: DualStack,
    pub(super) wants_node_ports: bool,
    pub(super) wants_health_check_node_port: bool,
    pub(super) wants_load_balancer_ip: bool,
    /// `spec.loadBalancerIP`.
    pub(super) load_balancer_ip: Option<IpAddr>,
    pub(super) distribution: Option<Distribution>,
}

/// `spec.trafficDistribution`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Distribution {
    /// `PreferSameZone`, or its old name `PreferClose`.
    SameZone,
    /// `PreferSameNode`.
    SameNode,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Number(u16),
    Name(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DualStack {
    No,
    Preferred,
    Required,
}

/// What a checked Service asks for beside what it is.
pub(super) fn service_manifest(
    raw: &kinds::Service,
    service: Service,
    problems: &mut Vec<Problem>,
) -> ServiceManifest {
    let spec = raw.spec.clone().unwrap_or_default();
    let mut problem = |field: String, message: String| {
        problems.push(Problem::new("Service", &service.name, field, message))
    };
    let mut targets = Vec::new();
    for port in &service.ports {
        let raw_port = spec.ports.iter().enumerate().find(|(_, raw)| {
            raw.name.as_deref().unwrap_or_default() == &*port.name
                && raw.port == i32::from(port.port)
        });
        targets.push(match raw_port.and_then(|(i, raw)| Some((i, raw.target_port.as_ref()?))) {
            None | Some((_, IntOrString::Int(0))) => Target::Number(port.port),
            Some((i, IntOrString::Int(number))) => match u16::try_from(*number) {
                Ok(number) => Target::Number(number),
                Err(_) => {
                    problem(
                        format!("spec.ports[{i}].targetPort"),
                        format!("{number} is no port; use 1 to 65535, or a container port's name ({} is served)", port.port),
                    );
                    Target::Number(port.port)
                }
            },
            Some((_, IntOrString::String(name))) if name.is_empty() => Target::Number(port.port),
            Some((i, IntOrString::String(name))) => {
                if let Ok(number) = name.parse::<u16>() {
                    problem(
                        format!("spec.ports[{i}].targetPort"),
                        format!("\"{number}\" would be a container port's name; write the number without quotes (it is served as a number)"),
                    );
                    Target::Number(number)
                } else {
                    Target::Name(name.clone())
                }
            }
        });
    }
    let mut families = Vec::new();
    for (i, family) in spec.ip_families.iter().enumerate() {
        match family.as_str() {
            "IPv4" => families.push(false),
            "IPv6" => families.push(true),
            other => problem(
                format!("spec.ipFamilies[{i}]"),
                format!("{other:?} is no family; use IPv4 or IPv6"),
            ),
        }
    }
    let dual_stack = match spec.ip_family_policy.as_deref() {
        None | Some("" | "SingleStack") => DualStack::No,
        Some("PreferDualStack") => DualStack::Preferred,
        Some("RequireDualStack") => DualStack::Required,
        Some(other) => {
            problem(
                "spec.ipFamilyPolicy".to_owned(),
                format!(
                    "{other:?} is no policy; use SingleStack, PreferDualStack or RequireDualStack (SingleStack is served)"
                ),
            );
            DualStack::No
        }
    };
    let distribution = match spec.traffic_distribution.as_deref() {
        None | Some("") => None,
        Some("PreferClose" | "PreferSameZone") => Some(Distribution::SameZone),
        Some("PreferSameNode") => Some(Distribution::SameNode),
        Some(other) => {
            problem(
                "spec.trafficDistribution".to_owned(),
                format!(
                    "{other:?} is no distribution; use PreferSameZone, PreferClose or PreferSameNode (all endpoints are served)"
                ),
            );
            None
        }
    };
    let is_load_balancer = spec.type_.as_deref() == Some("LoadBalancer");
    let has_ingress = !raw.status.load_balancer.ingress.is_empty();
    let load_balancer_ip = spec
        .load_balancer_ip
        .as_deref()
        .filter(|ip| !ip.is_empty())
        .and_then(|ip| {
            let parsed = decimal::ip(ip).map(|(ip, _)| ip);
            if parsed.is_none() {
                problem(
                    "spec.loadBalancerIP".to_owned(),
                    format!("{ip:?} is no IP address"),
                );
            }
            parsed
        });
    // A class names a controller of its own.
    let ours = spec
        .load_balancer_class
        .as_deref()
        .unwrap_or_default()
        .is_empty();
    ServiceManifest {
        selector: spec.selector.0.clone(),
        targets,
        families: (!families.is_empty()).then_some(families),
        dual_stack,
        wants_node_ports: spec.type_.as_deref() == Some("NodePort")
            || is_load_balancer && spec.allocate_load_balancer_node_ports != Some(false),
        wants_health_check_node_port: is_load_balancer
            && service.external_policy == TrafficPolicy::Local
            && service.health_check_node_port.is_none(),
        wants_load_balancer_ip: is_load_balancer && !has_ingress && ours,
        load_balancer_ip,
        distribution,
        service,
    }
}
