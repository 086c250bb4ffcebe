//! From Kubernetes objects to the slim types of [`crate::object`], with everything checked.
//!
//! A manifest has no API server in front of it, and an API server may be older or newer than this code, so nothing is
//! taken on trust. What cannot be served becomes a [`Problem`]; the rest of the object goes on.
//!
//! Rules: <https://kubernetes.io/docs/reference/kubernetes-api/service-resources/>.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::SystemTime,
};

use ipnet::IpNet;
use k8s_openapi::{
    api::{
        core::v1::{Endpoints, Node, Pod, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::Timestamp,
};

use crate::object::{self, NodeFacts, ObjectName, Problem, Protocol, Retry, ServicePort, TrafficPolicy};

/// Label of Services and slices that another proxy serves.
pub const LABEL_SERVICE_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Label of headless Services and their slices.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Label of a slice that names its Service.
pub const LABEL_SERVICE: &str = "kubernetes.io/service-name";
/// Label of a Node that names its zone.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Annotation of a slice: RFC 3339 time of what changed it.
pub const ANNOTATION_TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Taint of a Node that the cluster autoscaler is about to delete (KEP 3836).
pub const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Annotation of a Service: `false`, and no connection tries another backend; `true`, and those of pods' sockets do too
/// ([`Retry`]).
pub const ANNOTATION_RETRY: &str = "shunt.dev/retry";

/// Seconds that `sessionAffinity: ClientIP` lasts unless said otherwise (API reference, `ClientIPConfig`).
pub const DEFAULT_AFFINITY_SECS: u32 = 10_800;
/// Most seconds that the API admits in `timeoutSeconds`: a day.
const MAX_AFFINITY_SECS: u32 = 86_400;

/// `namespace/name` of an object; `default` where it names no namespace. `None` and a problem without a name.
pub fn name(kind: &str, meta: &ObjectMeta, problems: &mut Vec<Problem>) -> Option<ObjectName> {
    let namespace = match meta.namespace.as_deref() {
        None | Some("") => "default",
        Some(namespace) => namespace,
    };
    let name = ObjectName::new(namespace, meta.name.as_deref().unwrap_or_default());
    for (field, value) in [("metadata.namespace", &name.namespace), ("metadata.name", &name.name)] {
        let message = match &**value {
            "" => "is missing; every object needs one".to_owned(),
            value if !is_dns_name(value) => {
                format!("{value:?} is no name; use at most 253 of a-z, 0-9, - and .")
            }
            _ => continue,
        };
        let known = (!name.name.is_empty()).then(|| name.clone());
        problems.push(Problem {
            name: known,
            ..Problem::new(kind, &name, field, message)
        });
        return None;
    }
    Some(name)
}

/// Whether a name is a DNS subdomain as RFC 1123 has it: what the API demands of names.
fn is_dns_name(name: &str) -> bool {
    let ends = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    name.len() <= 253
        && ends(name.bytes().next())
        && ends(name.bytes().last())
        && name
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
}

/// Whether the object's labels say that it is not for this proxy (SPEC F7).
fn left_alone(meta: &ObjectMeta) -> bool {
    meta.labels
        .as_ref()
        .is_some_and(|labels| labels.contains_key(LABEL_SERVICE_PROXY) || labels.contains_key(LABEL_HEADLESS))
}

/// When the change of a pod or Service happened that an EndpointSlice tells of, as the endpoint slice controller notes it.
pub fn triggered(meta: &ObjectMeta) -> Option<SystemTime> {
    let text = meta.annotations.as_ref()?.get(ANNOTATION_TRIGGER_TIME)?;
    Some(text.parse::<Timestamp>().ok()?.into())
}

/// Turns the label [`LABEL_SERVICE_PROXY`] into what [`service`] and [`slice`] look at, when this proxy has a name itself: its
/// own objects lose the label, and all others are left alone.
pub fn claim(meta: &mut ObjectMeta, proxy_name: &str) {
    let labels = meta.labels.get_or_insert_default();
    if labels.get(LABEL_SERVICE_PROXY).is_some_and(|name| name == proxy_name) {
        labels.remove(LABEL_SERVICE_PROXY);
    } else {
        labels.insert(LABEL_SERVICE_PROXY.to_owned(), String::new());
    }
}

/// Collects the problems of one object.
struct Report<'a> {
    kind: &'static str,
    name: &'a ObjectName,
    problems: &'a mut Vec<Problem>,
}

impl Report<'_> {
    fn push(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem::new(self.kind, self.name, field, message));
    }

    fn port(&mut self, field: impl FnOnce() -> String, port: i32) -> Option<u16> {
        match u16::try_from(port) {
            Ok(port) if port != 0 => Some(port),
            _ => {
                self.push(field(), format!("{port} is no port; use 1 to 65535"));
                None
            }
        }
    }

    fn protocol(&mut self, field: impl FnOnce() -> String, protocol: Option<&str>) -> Option<Protocol> {
        match protocol {
            None | Some("" | "TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(other) => {
                self.push(field(), format!("{other:?} is no protocol; use TCP, UDP or SCTP"));
                None
            }
        }
    }

    fn policy(&mut self, field: &str, policy: Option<&str>) -> TrafficPolicy {
        match policy {
            None | Some("" | "Cluster") => TrafficPolicy::Cluster,
            Some("Local") => TrafficPolicy::Local,
            Some(other) => {
                self.push(
                    field,
                    format!("{other:?} is no traffic policy; use Cluster or Local (Cluster is served)"),
                );
                TrafficPolicy::Cluster
            }
        }
    }

    fn retry(&mut self, annotations: Option<&BTreeMap<String, String>>) -> Retry {
        match annotations
            .and_then(|all| all.get(ANNOTATION_RETRY))
            .map(|value| value.trim())
        {
            None => Retry::Packets,
            Some("true") => Retry::Sockets,
            Some("false") => Retry::Off,
            Some(other) => {
                self.push(
                    format!("metadata.annotations[{ANNOTATION_RETRY}]"),
                    format!("{other:?} is neither \"true\" nor \"false\" (served as if it were not there)"),
                );
                Retry::Packets
            }
        }
    }

    /// Names of zones or nodes; one that is empty is nobody's.
    fn hints<'t>(
        &mut self,
        field: impl Fn(usize) -> String,
        names: impl Iterator<Item = &'t str>,
    ) -> BTreeSet<Arc<str>> {
        let mut hints = BTreeSet::new();
        for (j, name) in names.enumerate() {
            match name {
                "" => self.push(
                    field(j),
                    "is empty; name a zone or node, or leave the hint out (it is not followed)",
                ),
                name => drop(hints.insert(name.into())),
            }
        }
        hints
    }

    fn ip(&mut self, field: impl FnOnce() -> String, text: &str) -> Option<IpAddr> {
        match text.trim().parse::<IpAddr>() {
            Ok(ip) => Some(ip.to_canonical()),
            Err(_) => {
                self.push(field(), format!("{text:?} is no IP address"));
                None
            }
        }
    }

    /// An address that clients may dial.
    fn frontend_ip(&mut self, field: impl Fn() -> String, text: &str) -> Option<IpAddr> {
        let ip = self.ip(&field, text)?;
        match forbidden(ip) {
            None => Some(ip),
            Some(what) => {
                self.push(field(), format!("{ip} is {what}; no Service can be reached there"));
                None
            }
        }
    }

    /// An address that may stand behind a Service (SPEC B6).
    fn backend_ip(&mut self, field: impl Fn() -> String, text: &str) -> Option<IpAddr> {
        let ip = self.ip(&field, text)?;
        match forbidden(ip) {
            None => Some(ip),
            Some(what) => {
                self.push(
                    field(),
                    format!("{ip} is {what}, which the API forbids for endpoints; it is skipped"),
                );
                None
            }
        }
    }
}

/// What is wrong with an address as an endpoint or a frontend, if anything: the API's rule for both
/// (`ValidateEndpointIP`), and all of multicast.
pub fn forbidden(ip: IpAddr) -> Option<&'static str> {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if ip.is_unspecified() {
        Some("the unspecified address")
    } else if ip.is_loopback() {
        Some("a loopback address")
    } else if link_local {
        Some("a link-local address")
    } else if ip.is_multicast() {
        Some("a multicast address")
    } else if ip == IpAddr::V4(std::net::Ipv4Addr::BROADCAST) {
        Some("the broadcast address")
    } else {
        None
    }
}

/// A Service; `None` when it has no frontends here: headless, `ExternalName`, another proxy's (SPEC F5–F7), or broken.
pub fn service(service: &Service, problems: &mut Vec<Problem>) -> Option<object::Service> {
    if left_alone(&service.metadata) {
        return None;
    }
    let name = name("Service", &service.metadata, problems)?;
    let mut report = Report {
        kind: "Service",
        name: &name,
        problems,
    };
    // Namespaces are DNS labels and so are Services' names: the map of names has room for no more.
    for (field, part) in [("metadata.namespace", &name.namespace), ("metadata.name", &name.name)] {
        if part.len() >= shunt_common::layout::NAME_LEN {
            report.push(field, "is longer than the 63 characters of a DNS label; shorten it");
            return None;
        }
    }
    let Some(spec) = &service.spec else {
        report.push("spec", "is missing; a Service needs at least ports");
        return None;
    };
    let service_type = spec.type_.as_deref().unwrap_or_default();
    if service_type == "ExternalName" || is_headless(service) {
        return None;
    }
    if !matches!(service_type, "" | "ClusterIP" | "NodePort" | "LoadBalancer") {
        report.push(
            "spec.type",
            format!("{service_type:?} is no type; use ClusterIP, NodePort, LoadBalancer or ExternalName (ClusterIP is served)"),
        );
    }
    let has_node_ports = matches!(service_type, "NodePort" | "LoadBalancer");

    let mut cluster_ips = Vec::new();
    for (field, text) in cluster_ips_of(service) {
        if let Some(ip) = report.frontend_ip(|| field.clone(), text)
            && !cluster_ips.contains(&ip)
        {
            cluster_ips.push(ip);
        }
    }
    let mut external_ips = Vec::new();
    for (i, text) in spec.external_ips.iter().flatten().enumerate() {
        if let Some(ip) = report.frontend_ip(|| format!("spec.externalIPs[{i}]"), text)
            && !external_ips.contains(&ip)
        {
            external_ips.push(ip);
        }
    }
    let mut load_balancer_ips = Vec::new();
    let ingress = service
        .status
        .iter()
        .filter_map(|status| status.load_balancer.as_ref()?.ingress.as_ref());
    for (i, ingress) in ingress.flatten().enumerate() {
        // `Proxy`: the load balancer terminates or rewrites, packets never carry its address to a node (SPEC F3).
        let proxied = ingress.ip_mode.as_deref() == Some("Proxy");
        if let Some(text) = ingress.ip.as_deref().filter(|text| !text.is_empty() && !proxied)
            && let Some(ip) = report.frontend_ip(|| format!("status.loadBalancer.ingress[{i}].ip"), text)
            && !load_balancer_ips.contains(&ip)
        {
            load_balancer_ips.push(ip);
        }
    }

    let mut ports: Vec<ServicePort> = Vec::new();
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        let number = report.port(|| format!("spec.ports[{i}].port"), port.port);
        let protocol = report.protocol(|| format!("spec.ports[{i}].protocol"), port.protocol.as_deref());
        let node_port = match port.node_port {
            None | Some(0) => None,
            Some(number) if has_node_ports => report.port(|| format!("spec.ports[{i}].nodePort"), number),
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
        let twice =
            |other: &ServicePort| node_port.is_some() && (other.node_port, other.protocol) == (node_port, protocol);
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
    if spec.ports.iter().flatten().next().is_none() {
        report.push("spec.ports", "is empty; nothing can be served");
    }

    let affinity_secs = match spec.session_affinity.as_deref() {
        None | Some("" | "None") => None,
        Some("ClientIP") => {
            let asked = spec
                .session_affinity_config
                .as_ref()
                .and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
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
    };

    let external_policy = report.policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref());
    let internal_policy = report.policy("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref());
    // Only there does the API give it a meaning.
    let health_checked = service_type == "LoadBalancer" && external_policy == TrafficPolicy::Local;
    let health_check_node_port = match spec.health_check_node_port {
        Some(port) if port != 0 && health_checked => report.port(|| "spec.healthCheckNodePort".to_owned(), port),
        _ => None,
    };

    let mut source_ranges: Vec<IpNet> = Vec::new();
    for (i, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        match text.trim().parse::<IpNet>() {
            Ok(range) => source_ranges.push(range.trunc()),
            Err(_) => report.push(
                format!("spec.loadBalancerSourceRanges[{i}]"),
                format!("{text:?} is no CIDR such as 203.0.113.0/24; nobody is let in by it"),
            ),
        }
    }
    let asked_ranges = spec
        .load_balancer_source_ranges
        .as_ref()
        .is_some_and(|ranges| !ranges.is_empty());
    if asked_ranges && source_ranges.is_empty() && !load_balancer_ips.is_empty() {
        // An empty list would mean everybody: the opposite of what was asked for.
        report.push(
            "spec.loadBalancerSourceRanges",
            "has no valid CIDR; the load balancer addresses are not served until it has",
        );
        load_balancer_ips.clear();
    }

    let retry = report.retry(service.metadata.annotations.as_ref());

    Some(object::Service {
        created: service
            .metadata
            .creation_timestamp
            .as_ref()
            .map(|time| time.0.as_second()),
        cluster_ips,
        external_ips,
        load_balancer_ips,
        ports,
        affinity_secs,
        external_policy,
        internal_policy,
        health_check_node_port,
        source_ranges,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        retry,
        name,
    })
}

/// Whether a Service is headless: `clusterIP: None`.
pub fn is_headless(service: &Service) -> bool {
    cluster_ips_of(service).iter().any(|(_, ip)| *ip == "None")
}

/// `spec.clusterIPs`, or `spec.clusterIP` alone as older objects have it, each with its field.
pub(super) fn cluster_ips_of(service: &Service) -> Vec<(String, &str)> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let mut all: Vec<(String, &str)> = spec
        .cluster_ips
        .iter()
        .flatten()
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

/// What manifests need of a Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// `namespace/name`.
    pub name: ObjectName,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `spec.nodeName`.
    pub node: Option<Arc<str>>,
    /// `status.podIPs`, or `status.podIP`; without forbidden ones.
    pub addresses: Vec<IpAddr>,
    /// Condition `Ready` is `True`.
    pub ready: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// Named container ports.
    pub ports: Vec<(String, Protocol, u16)>,
}

/// A Pod; `None` when it cannot be an endpoint: no address yet, or ended.
pub fn pod(pod: &Pod, problems: &mut Vec<Problem>) -> Option<PodFacts> {
    let name = name("Pod", &pod.metadata, problems)?;
    let mut report = Report {
        kind: "Pod",
        name: &name,
        problems,
    };
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let mut addresses = Vec::new();
    for (i, ip) in status.pod_ips.iter().flatten().enumerate() {
        let ip = report.backend_ip(|| format!("status.podIPs[{i}].ip"), &ip.ip);
        addresses.extend(ip.filter(|ip| !addresses.contains(ip)));
    }
    if status.pod_ips.iter().flatten().next().is_none()
        && let Some(ip) = status.pod_ip.as_deref().filter(|ip| !ip.is_empty())
    {
        addresses.extend(report.backend_ip(|| "status.podIP".to_owned(), ip));
    }
    if addresses.is_empty() {
        return None;
    }
    let spec = pod.spec.as_ref();
    // A sidecar is an init container that goes on running; its ports count (KEP 753).
    let sidecars = spec
        .and_then(|spec| spec.init_containers.as_ref())
        .into_iter()
        .flatten()
        .enumerate()
        .filter(|(_, container)| container.restart_policy.as_deref() == Some("Always"))
        .map(|(i, container)| ("initContainers", i, container));
    let containers = spec
        .map(|spec| &spec.containers)
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(i, container)| ("containers", i, container));
    let mut ports = Vec::new();
    for (list, c, container) in containers.chain(sidecars) {
        for (i, port) in container.ports.iter().flatten().enumerate() {
            let field = |name: &str| format!("spec.{list}[{c}].ports[{i}].{name}");
            let number = report.port(|| field("containerPort"), port.container_port);
            let protocol = report.protocol(|| field("protocol"), port.protocol.as_deref());
            if let (Some(port_name), Some(number), Some(protocol)) = (&port.name, number, protocol) {
                ports.push((port_name.clone(), protocol, number));
            }
        }
    }
    Some(PodFacts {
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        node: spec
            .and_then(|spec| spec.node_name.as_deref())
            .filter(|node| !node.is_empty())
            .map(Into::into),
        addresses,
        ready: status
            .conditions
            .iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True"),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        ports,
        name,
    })
}

/// A Node.
pub fn node(node: &Node) -> NodeFacts {
    let labels = node.metadata.labels.as_ref();
    NodeFacts {
        name: node.metadata.name.as_deref().unwrap_or_default().into(),
        zone: labels
            .and_then(|labels| labels.get(LABEL_ZONE))
            .map(|zone| zone.as_str().into()),
        // `Hostname` and DNS entries are no addresses: what does not parse is one of them.
        addresses: node
            .status
            .iter()
            .filter_map(|status| status.addresses.as_ref())
            .flatten()
            .filter_map(|address| address.address.parse::<IpAddr>().ok())
            .map(|ip| ip.to_canonical())
            .collect(),
        leaves: node.metadata.deletion_timestamp.is_some()
            || node
                .spec
                .iter()
                .filter_map(|spec| spec.taints.as_ref())
                .flatten()
                .any(|taint| taint.key == TAINT_TO_BE_DELETED),
    }
}
