//! Services.

use std::{net::IpAddr, sync::Arc};

use super::{is_dns_name, left_alone, name, report::Report};
use crate::{
    object::{self, Exposure, ObjectName, Problem, Retry, ServicePort, TrafficPolicy},
    source::kinds::{Service, ServiceSpec},
};
use ipnet::IpNet;

/// Seconds that `sessionAffinity: ClientIP` lasts unless said otherwise (API reference,
/// `ClientIPConfig`).
pub const DEFAULT_AFFINITY_SECS: u32 = 10_800;
/// Most seconds that the API admits in `timeoutSeconds`: a day.
const MAX_AFFINITY_SECS: u32 = 86_400;

/// A Service; `None` when it is broken. What is wrong with another proxy's is not told.
pub fn service(service: &Service, problems: &mut Vec<Problem>) -> Option<object::Service> {
    let is_others = left_alone(&service.metadata);
    let mut untold = Vec::new();
    let problems = if is_others { &mut untold } else { problems };
    let name = name("Service", &service.metadata, problems)?;
    let mut report = Report {
        kind: "Service",
        name: &name,
        problems,
    };
    // Namespaces are DNS labels and so are Services' names: the map of names has room for no more.
    for (field, part) in [
        ("metadata.namespace", &name.namespace),
        ("metadata.name", &name.name),
    ] {
        if part.len() >= shunt_common::layout::NAME_LEN {
            report.push(
                field,
                "is longer than the 63 characters of a DNS label; shorten it",
            );
            return None;
        }
    }
    let Some(spec) = &service.spec else {
        report.push("spec", "is missing; a Service needs at least ports");
        return None;
    };
    let service_type = spec.type_.as_deref().unwrap_or_default();
    if service_type == "ExternalName" {
        let external_name = external_name(spec, &mut report)?;
        return Some(addressless(
            name,
            service,
            Exposure::ExternalName(external_name),
            Vec::new(),
        ));
    }
    if is_headless(service) {
        let ports = ports(spec, false, &mut report);
        return Some(addressless(name, service, Exposure::Headless, ports));
    }
    if !matches!(service_type, "" | "ClusterIP" | "NodePort" | "LoadBalancer") {
        report.push(
            "spec.type",
            format!("{service_type:?} is no type; use ClusterIP, NodePort, LoadBalancer or ExternalName (ClusterIP is served)"),
        );
    }
    let has_node_ports = matches!(service_type, "NodePort" | "LoadBalancer");

    let cluster_ips = distinct(cluster_ips_of(service), true, &mut report);
    let external_ips = spec.external_ips.iter().enumerate();
    let external_ips =
        external_ips.map(|(i, text)| (format!("spec.externalIPs[{i}]"), text.as_str()));
    let external_ips = distinct(external_ips, false, &mut report);
    let load_balancer_ips = distinct(
        load_balancer_ips_of(service, &mut report),
        true,
        &mut report,
    );
    let ports = ports(spec, has_node_ports, &mut report);
    if spec.ports.is_empty() {
        report.push("spec.ports", "is empty; nothing can be served");
    }
    let affinity_secs = affinity_secs(spec, &mut report);
    let external_policy = report.policy(
        "spec.externalTrafficPolicy",
        spec.external_traffic_policy.as_deref(),
    );
    let internal_policy = report.policy(
        "spec.internalTrafficPolicy",
        spec.internal_traffic_policy.as_deref(),
    );
    // Only there does the API give it a meaning.
    let health_checked = service_type == "LoadBalancer" && external_policy == TrafficPolicy::Local;
    let health_check_node_port = match spec.health_check_node_port {
        Some(port) if port != 0 && health_checked => {
            report.port(|| "spec.healthCheckNodePort".to_owned(), port)
        }
        _ => None,
    };

    let is_balanced = service_type == "LoadBalancer" || !load_balancer_ips.is_empty();
    let (source_ranges, limits_sources) =
        source_ranges(spec, &cluster_ips, is_balanced, &mut report);

    let retry = report.retry(service.metadata.annotations.retry.as_deref());

    Some(object::Service {
        exposure: match is_others {
            true => Exposure::OtherProxy,
            false => Exposure::Frontends,
        },
        created: created(service),
        cluster_ips,
        external_ips,
        load_balancer_ips,
        ports,
        affinity_secs,
        external_policy,
        internal_policy,
        health_check_node_port,
        source_ranges,
        limits_sources,
        masquerade: false,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        retry,
        name,
    })
}

fn created(service: &Service) -> Option<i64> {
    service
        .metadata
        .creation_timestamp
        .0
        .map(|time| time.as_second())
}

/// A Service without addresses of its own.
fn addressless(
    name: ObjectName,
    service: &Service,
    exposure: Exposure,
    ports: Vec<ServicePort>,
) -> object::Service {
    let spec = service.spec.as_ref();
    object::Service {
        name,
        exposure,
        created: created(service),
        cluster_ips: Vec::new(),
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        ports,
        affinity_secs: None,
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        health_check_node_port: None,
        source_ranges: Vec::new(),
        limits_sources: [false; 2],
        masquerade: false,
        publish_not_ready: spec
            .and_then(|spec| spec.publish_not_ready_addresses)
            .unwrap_or(false),
        retry: Retry::default(),
    }
}

/// `spec.externalName` as a DNS name: in lower case, without a trailing dot.
fn external_name(spec: &ServiceSpec, report: &mut Report<'_>) -> Option<Arc<str>> {
    let given = spec.external_name.as_deref().unwrap_or_default();
    let name = given.strip_suffix('.').unwrap_or(given).to_lowercase();
    let wrong = if name.is_empty() {
        "is missing; give the DNS name that the Service stands for".to_owned()
    } else if name.parse::<IpAddr>().is_ok() {
        format!(
            "{given:?} is an address, which no name can stand for; use a Service without selector and an EndpointSlice"
        )
    } else if !is_dns_name(&name)
        || name
            .split('.')
            .any(|label| label.is_empty() || label.len() > 63)
    {
        format!("{given:?} is no DNS name; use at most 253 of a-z, 0-9, - and .")
    } else {
        return Some(name.into());
    };
    report.push("spec.externalName", wrong);
    None
}

/// Addresses that clients may dial, each once.
fn distinct<'t>(
    fields: impl IntoIterator<Item = (String, &'t str)>,
    may_be_link_local: bool,
    report: &mut Report<'_>,
) -> Vec<IpAddr> {
    let mut ips = Vec::new();
    for (field, text) in fields {
        if let Some(ip) = report.frontend_ip(|| field.clone(), text, may_be_link_local)
            && !ips.contains(&ip)
        {
            ips.push(ip);
        }
    }
    ips
}

/// Ports with names, numbers and node ports of their own.
fn ports(spec: &ServiceSpec, has_node_ports: bool, report: &mut Report<'_>) -> Vec<ServicePort> {
    let mut ports: Vec<ServicePort> = Vec::new();
    for (i, port) in spec.ports.iter().enumerate() {
        let number = report.port(|| format!("spec.ports[{i}].port"), port.port);
        let protocol = report.protocol(
            || format!("spec.ports[{i}].protocol"),
            port.protocol.as_deref(),
        );
        let node_port = match port.node_port {
            None | Some(0) => None,
            Some(number) if has_node_ports => {
                report.port(|| format!("spec.ports[{i}].nodePort"), number)
            }
            Some(number) => {
                report.push(
                    format!("spec.ports[{i}].nodePort"),
                    format!("{number} is not served; set spec.type to NodePort or LoadBalancer"),
                );
                None
            }
        };
        let (Some(number), Some(protocol)) = (number, protocol) else {
            continue;
        };
        let port_name: Arc<str> = port.name.as_deref().unwrap_or_default().into();
        if let Some(other) = ports.iter().position(|other| other.name == port_name) {
            report.push(
                format!("spec.ports[{i}].name"),
                match &*port_name {
                    "" => format!("is missing; give every port a name when there are several (spec.ports[{other}] has none either)"),
                    name => format!("{name:?} is already the name of spec.ports[{other}]"),
                },
            );
            continue;
        }
        if ports
            .iter()
            .any(|other| (other.port, other.protocol) == (number, protocol))
        {
            report.push(
                format!("spec.ports[{i}].port"),
                format!("{number}/{protocol} stands there twice; the first is served"),
            );
            continue;
        }
        let twice = |other: &ServicePort| {
            node_port.is_some() && (other.node_port, other.protocol) == (node_port, protocol)
        };
        let node_port = match ports.iter().any(twice) {
            false => node_port,
            true => {
                report.push(
                    format!("spec.ports[{i}].nodePort"),
                    format!(
                        "{} stands there twice; the first is served",
                        node_port.unwrap_or_default()
                    ),
                );
                None
            }
        };
        ports.push(ServicePort {
            name: port_name,
            protocol,
            port: number,
            node_port,
        });
    }
    ports
}

/// How long a client keeps its backend; `None`: it does not.
fn affinity_secs(spec: &ServiceSpec, report: &mut Report<'_>) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => None,
        Some("ClientIP") => {
            let asked = spec.session_affinity_config.client_ip.timeout_seconds;
            match asked.map(u32::try_from) {
                None => Some(DEFAULT_AFFINITY_SECS),
                Some(Ok(secs)) if (1..=MAX_AFFINITY_SECS).contains(&secs) => Some(secs),
                Some(_) => {
                    report.push(
                        "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                        format!(
                            "{} is out of bounds; use 1 to {MAX_AFFINITY_SECS} ({DEFAULT_AFFINITY_SECS} is served)",
                            asked.unwrap_or_default()
                        ),
                    );
                    Some(DEFAULT_AFFINITY_SECS)
                }
            }
        }
        Some(other) => {
            report.push(
                "spec.sessionAffinity",
                format!("{other:?} is no affinity; use None or ClientIP (None is served)"),
            );
            None
        }
    }
}

/// The ranges, and whether they limit clients of IPv4 and IPv6. Ranges limit their own family. What
/// cannot be read may have been of either, so a family of which nothing can be read is limited to
/// nobody then: everybody is the opposite of what was asked for.
fn source_ranges(
    spec: &ServiceSpec,
    cluster_ips: &[IpAddr],
    is_balanced: bool,
    report: &mut Report<'_>,
) -> (Vec<IpNet>, [bool; 2]) {
    const FIELD: &str = "spec.loadBalancerSourceRanges";
    let mut ranges: Vec<IpNet> = Vec::new();
    for (i, text) in spec.load_balancer_source_ranges.iter().enumerate() {
        ranges.extend(
            report
                .net(|| format!("{FIELD}[{i}]"), text)
                .map(|range| range.trunc()),
        );
    }
    let some_unreadable = ranges.len() < spec.load_balancer_source_ranges.len();
    let of_family = |v6: bool| {
        ranges
            .iter()
            .filter(move |range| range.addr().is_ipv6() == v6)
    };
    // Everybody writes 0.0.0.0/0 to mean everybody.
    let lets_all_in = |v6: bool| of_family(v6).any(|range| range.prefix_len() == 0);
    let limits = [false, true].map(|v6| match of_family(v6).next() {
        Some(_) => !lets_all_in(v6),
        None => some_unreadable,
    });
    for (v6, family) in [(false, "IPv4"), (true, "IPv6")] {
        // A manifest may leave its cluster IPs to be allocated.
        let is_mine = match cluster_ips {
            [] => spec.ip_families.iter().any(|asked| asked == family),
            ips => ips.iter().any(|ip| ip.is_ipv6() == v6),
        };
        if !is_balanced || !is_mine || of_family(v6).next().is_some() {
            continue;
        }
        if some_unreadable {
            report.push(
                FIELD,
                format!("has no valid {family} range; no {family} client is let in until it has"),
            );
        } else if limits[usize::from(!v6)] {
            report.warn(
                FIELD,
                format!(
                    "has no {family} range, so it limits no {family} client; add one (::/0 or 0.0.0.0/0 for everybody)"
                ),
            );
        }
    }
    (ranges, limits)
}

/// Whether a Service is headless: `clusterIP: None`.
fn is_headless(service: &Service) -> bool {
    cluster_ips_of(service).iter().any(|(_, ip)| *ip == "None")
}

/// `spec.clusterIPs`, or `spec.clusterIP` alone as older objects have it, each with its field.
fn cluster_ips_of(service: &Service) -> Vec<(String, &str)> {
    let Some(spec) = &service.spec else {
        return Vec::new();
    };
    let mut all: Vec<(String, &str)> = spec
        .cluster_ips
        .iter()
        .enumerate()
        .map(|(i, ip)| (format!("spec.clusterIPs[{i}]"), &**ip))
        .collect();
    if let Some(ip) = spec.cluster_ip.as_deref()
        && !all.iter().any(|(_, other)| *other == ip)
    {
        all.insert(0, ("spec.clusterIP".to_owned(), ip));
    }
    all.retain(|(_, ip)| !ip.is_empty());
    all
}

/// `status.loadBalancer.ingress[].ip`, each with its field.
fn load_balancer_ips_of<'s>(
    service: &'s Service,
    report: &mut Report<'_>,
) -> Vec<(String, &'s str)> {
    let mut all = Vec::new();
    for (i, ingress) in service.status.load_balancer.ingress.iter().enumerate() {
        let Some(text) = ingress.ip.as_deref().filter(|text| !text.is_empty()) else {
            continue;
        };
        match ingress.ip_mode.as_deref() {
            None | Some("" | "VIP") => all.push((format!("status.loadBalancer.ingress[{i}].ip"), text)),
            // The load balancer terminates or rewrites, packets never carry its address to a node
            // (SPEC F3).
            Some("Proxy") => {}
            Some(other) => report.push(
                format!("status.loadBalancer.ingress[{i}].ipMode"),
                format!("{other:?} is no mode that is known here (VIP, Proxy); {text} is left to the load balancer"),
            ),
        }
    }
    all
}
