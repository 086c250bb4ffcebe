//! The environment variables by which a container finds Services: those that a kubelet injects.
//!
//! Rules: <https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables>,
//! and where that page is silent the kubelet's own code (`pkg/kubelet/envvars` and
//! `getServiceEnvVarMap`). They look at objects as the API server has them, not at what a proxy
//! serves: a Service that another proxy serves has its variables too.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::source::kinds::{Pod, Service, ServicePort};

/// Namespace of the Services that every pod is told of.
pub const MASTER_NAMESPACE: &str = "default";
/// The one Service that every pod is told of.
pub const MASTER_SERVICE: &str = "kubernetes";

/// One variable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Variable {
    /// Its name, such as `KUBIA_SERVICE_HOST`.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A name that variables of two Services have: a kubelet takes either, and not always the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clash {
    /// The variable's name.
    pub name: String,
    /// The Service whose value is left out.
    pub loser: String,
    /// The Service whose value is taken here: the later one by name.
    pub winner: String,
}

/// Variables in the order of their Services' names, and in a Service's own order as the kubelet
/// makes them; and the names that two Services claim.
///
/// `services`: of all namespaces or only of those that matter. `enable_service_links`: the pod's
/// `spec.enableServiceLinks`; without it only the Service `kubernetes` of the namespace `default`
/// is told of.
pub fn variables<'s>(
    services: impl IntoIterator<Item = &'s Service>,
    namespace: &str,
    enable_service_links: bool,
) -> (Vec<Variable>, Vec<Clash>) {
    let mut shown: BTreeMap<&str, &Service> = BTreeMap::new();
    for service in services {
        let Some(name) = service.metadata.name.as_deref() else {
            continue;
        };
        let of = service
            .metadata
            .namespace
            .as_deref()
            .filter(|of| !of.is_empty());
        let of = of.unwrap_or(MASTER_NAMESPACE);
        if cluster_ip(service).is_none() {
            continue;
        }
        if of == namespace && enable_service_links {
            shown.insert(name, service);
        } else if (of, name) == (MASTER_NAMESPACE, MASTER_SERVICE) {
            // A Service of the pod's own namespace with this name stands before it.
            shown.entry(name).or_insert(service);
        }
    }
    let mut variables: Vec<(&str, Variable)> = Vec::new();
    let mut clashes = Vec::new();
    for (service, object) in shown {
        for variable in of_service(service, object) {
            // `foo` and `foo-service` both have a FOO_SERVICE_PORT.
            if let Some(at) = variables
                .iter()
                .position(|(_, other)| other.name == variable.name)
            {
                let (loser, _) = variables.remove(at);
                if loser != service {
                    clashes.push(Clash {
                        name: variable.name.clone(),
                        loser: loser.to_owned(),
                        winner: service.to_owned(),
                    });
                }
            }
            variables.push((service, variable));
        }
    }
    (
        variables
            .into_iter()
            .map(|(_, variable)| variable)
            .collect(),
        clashes,
    )
}

/// The Service's `spec.clusterIP` as it is written; `None` for headless ones, for external names,
/// and while it has none.
pub fn cluster_ip(service: &Service) -> Option<&str> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let written = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty());
    let first = || spec.cluster_ips.iter().map(String::as_str).next();
    written
        .or_else(first)
        .filter(|ip| !ip.is_empty() && *ip != "None")
}

/// `spec.enableServiceLinks`, which is true unless it says otherwise (API reference, `PodSpec`).
pub fn enable_service_links(pod: &Pod) -> bool {
    pod.spec.enable_service_links.unwrap_or(true)
}

/// What a kubelet makes of one Service that has a cluster IP.
fn of_service(name: &str, service: &Service) -> Vec<Variable> {
    let Some(host) = cluster_ip(service) else {
        return Vec::new();
    };
    let prefix = variable_name(name);
    let ports = || service.spec.iter().flat_map(|spec| &spec.ports);
    let mut variables = Vec::new();
    let mut add = |name: String, value: String| variables.push(Variable { name, value });
    add(format!("{prefix}_SERVICE_HOST"), host.to_owned());
    if let Some(first) = ports().next() {
        add(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
    }
    for port in ports() {
        if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            add(
                format!("{prefix}_SERVICE_PORT_{}", variable_name(name)),
                port.port.to_string(),
            );
        }
    }
    // What Docker's `--link` gave.
    if let Some(first) = ports().next() {
        add(format!("{prefix}_PORT"), url(host, first));
    }
    for port in ports() {
        let of_port = format!(
            "{prefix}_PORT_{}_{}",
            port.port,
            protocol(port).to_uppercase()
        );
        add(of_port.clone(), url(host, port));
        add(format!("{of_port}_PROTO"), protocol(port).to_lowercase());
        add(format!("{of_port}_PORT"), port.port.to_string());
        add(format!("{of_port}_ADDR"), host.to_owned());
    }
    variables
}

/// `foo-bar` as `FOO_BAR`.
fn variable_name(text: &str) -> String {
    text.replace('-', "_").to_uppercase()
}

fn protocol(port: &ServicePort) -> &str {
    match port.protocol.as_deref() {
        None | Some("") => "TCP",
        Some(protocol) => protocol,
    }
}

/// `tcp://10.96.0.1:443`; IPv6 addresses stand in brackets here, and nowhere else.
fn url(host: &str, port: &ServicePort) -> String {
    let scheme = protocol(port).to_lowercase();
    match host.contains(':') {
        true => format!("{scheme}://[{host}]:{}", port.port),
        false => format!("{scheme}://{host}:{}", port.port),
    }
}
