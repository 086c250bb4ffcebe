//! `spec.healthCheckNodePort`: tells a load balancer whether this node has ready endpoints of a
//! Service with `externalTrafficPolicy: Local`, in kube-proxy's words (`service_health.go` in its
//! `healthcheck` package).
//!
//! Each Service has a listener per family of its own, on the wildcard address, and answers on the
//! addresses that node ports are restricted to, if they are. Where a port is in use, one warning
//! names the Service, and the port is tried again until it is free or no longer asked for.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use hyper::{Response, StatusCode};
use serde::Serialize;
use tokio::task::JoinHandle;

use crate::{
    connections::Connections,
    datapath::netns::NodePortAddresses,
    health::Health,
    http::{self, Listening},
    object::{ObjectName, Problem, Service},
    plan,
    report::Reports,
};

/// kube-proxy's name for the number of ready local endpoints, which load balancers may weigh nodes
/// by.
const WEIGHT: &str = "x-load-balancing-endpoint-weight";
/// What is asked for one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Ready endpoints on this node by family (IPv4, IPv6); `None`: the Service is not of it.
    pub local: [Option<usize>; 2],
}

/// What to answer for a Service, of which so many endpoints of this node can serve; `None` when
/// nobody is to be answered.
pub fn check(service: &Service, ready_local: impl FnOnce() -> [usize; 2]) -> Option<Check> {
    let port = service.health_check_node_port?;
    let ready = ready_local();
    let local =
        [false, true].map(|v6| plan::has_family(service, v6).then_some(ready[usize::from(v6)]));
    Some(Check { port, local })
}

/// Which of the node's addresses are answered on.
type Admitted = Arc<RwLock<NodePortAddresses>>;

/// The listeners of all Services. To be used within a tokio runtime; they end when this is dropped.
#[derive(Debug)]
pub struct HealthChecks {
    connections: Connections,
    health: Health,
    reports: Reports,
    admitted: Admitted,
    /// By Service and family.
    listeners: HashMap<(ObjectName, bool), Listener>,
}

/// One listener, or the attempt at it.
#[derive(Debug)]
struct Listener {
    port: u16,
    local: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What one listener answers from.
#[derive(Debug)]
struct State {
    service: ObjectName,
    local: Arc<AtomicUsize>,
    health: Health,
    reports: Reports,
    admitted: Admitted,
}

impl State {
    fn is_admitted(&self, address: IpAddr) -> bool {
        let admitted = self.admitted.read().unwrap_or_else(PoisonError::into_inner);
        admitted.answers(address)
    }
}

impl HealthChecks {
    /// Nothing to answer yet.
    pub fn new(connections: Connections, health: Health, reports: Reports) -> Self {
        Self {
            connections,
            health,
            reports,
            admitted: Admitted::default(),
            listeners: HashMap::new(),
        }
    }

    /// Answers on these addresses only from now on.
    pub fn admit(&self, addresses: NodePortAddresses) {
        *self
            .admitted
            .write()
            .unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    /// Brings a Service's listeners to what is asked now; `None` closes them.
    pub fn set(&mut self, service: &ObjectName, check: Option<&Check>) {
        for v6 in [false, true] {
            let key = (service.clone(), v6);
            let wanted = check.and_then(|check| Some((check.port, check.local[usize::from(v6)]?)));
            let Some((port, count)) = wanted else {
                self.listeners.remove(&key);
                continue;
            };
            if self
                .listeners
                .get(&key)
                .is_none_or(|listener| listener.port != port)
            {
                let local = Arc::new(AtomicUsize::new(count));
                let state = State {
                    service: service.clone(),
                    local: local.clone(),
                    health: self.health.clone(),
                    reports: self.reports.clone(),
                    admitted: self.admitted.clone(),
                };
                let task = tokio::spawn(serve(state, self.connections.clone(), port, v6));
                self.listeners.insert(key, Listener { port, local, task });
            } else if let Some(listener) = self.listeners.get(&key) {
                listener.local.store(count, Ordering::Relaxed);
            }
        }
    }
}

/// Listens as soon as it can, and answers.
async fn serve(state: State, connections: Connections, port: u16, v6: bool) {
    let unspecified: IpAddr = match v6 {
        false => Ipv4Addr::UNSPECIFIED.into(),
        true => Ipv6Addr::UNSPECIFIED.into(),
    };
    let listening = Listening {
        subject: format!("Service {}: spec.healthCheckNodePort", state.service),
        address: SocketAddr::new(unspecified, port),
        both_families: false,
        hard_fail: false,
        consequence: "load balancers cannot see this node's endpoints",
        trouble: Box::new({
            let (service, reports) = (state.service.clone(), state.reports.clone());
            move |message| {
                reports.report_here(Problem::new(
                    "Service",
                    &service,
                    "spec.healthCheckNodePort",
                    message,
                ))
            }
        }),
    };
    let state = Arc::new(state);
    let admitted = state.clone();
    let answer = move |_| {
        let response = answer(&state);
        async move { response }
    };
    // Does not fail: the port is tried again.
    let _ = http::serve(
        listening,
        connections,
        move |address| admitted.is_admitted(address),
        answer,
    )
    .await;
}

#[derive(Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

/// The body, with kube-proxy's fields in their order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: Name<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

/// The answer to whatever was asked.
fn answer(state: &State) -> Response<String> {
    let local = state.local.load(Ordering::Relaxed);
    let healthy = state.health.is_healthy();
    let body = Body {
        service: Name {
            namespace: &state.service.namespace,
            name: &state.service.name,
        },
        local_endpoints: local,
        service_proxy_healthy: healthy,
    };
    let mut text = Vec::new();
    let tabs = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    // Neither maps with odd keys nor a writer that fails.
    let written = body.serialize(&mut serde_json::Serializer::with_formatter(&mut text, tabs));
    debug_assert!(written.is_ok());
    let status = match local > 0 && healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let mut response = http::response(
        status,
        "application/json",
        String::from_utf8_lossy(&text).into_owned(),
    );
    response.headers_mut().insert(WEIGHT, local.into());
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        object::{Endpoint, EndpointPort, EndpointSlice, NodeFacts, Protocol, ServicePort},
        plan::Excluded,
    };

    fn name() -> ObjectName {
        ObjectName::new("shop", "web")
    }

    fn service(cluster_ips: &[&str]) -> Service {
        Service {
            name: name(),
            exposure: Default::default(),
            created: None,
            cluster_ips: cluster_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ports: vec![ServicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: None,
            }],
            affinity_secs: None,
            external_policy: Default::default(),
            internal_policy: Default::default(),
            health_check_node_port: Some(32_000),
            source_ranges: Vec::new(),
            limits_sources: [false; 2],
            masquerade: false,
            publish_not_ready: false,
            retry: Default::default(),
        }
    }

    fn slice(endpoints: &[(&str, &str, [bool; 3])]) -> EndpointSlice {
        let endpoint =
            |&(address, node, [ready, serving, terminating]): &(&str, &str, [bool; 3])| Endpoint {
                address: address.parse().unwrap(),
                hostname: None,
                node: Some(node.into()),
                ready,
                serving,
                terminating,
                zones: BTreeSet::new(),
                nodes: BTreeSet::new(),
            };
        EndpointSlice {
            name: name(),
            service: name(),
            names_only: false,
            ports: vec![EndpointPort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: 8080,
            }],
            endpoints: endpoints.iter().map(endpoint).collect(),
        }
    }

    /// P4, cilium#11043: exactly the ready local ones, each address once, none that terminates.
    #[test]
    fn ready_local_endpoints_are_counted_once() {
        let slices = [
            slice(&[
                ("10.0.0.1", "node-a", [true, true, false]),
                ("10.0.0.2", "node-a", [false, true, true]),
                ("10.0.0.3", "node-a", [false, false, false]),
                ("10.0.0.4", "node-b", [true, true, false]),
            ]),
            slice(&[
                ("10.0.0.1", "node-a", [true, true, false]),
                ("fd00::1", "node-a", [true, true, false]),
                ("fd00::2", "node-a", [true, true, false]),
                // publishNotReadyAddresses makes them ready; they go nevertheless.
                ("fd00::3", "node-a", [true, true, true]),
            ]),
        ];
        let node = NodeFacts {
            name: "node-a".into(),
            ..Default::default()
        };
        let ask = |service: &Service| {
            check(service, || {
                plan::ready_local(service, &slices, &node, &Excluded::default())
            })
        };
        let of = |ips: &[&str]| ask(&service(ips)).unwrap().local;
        assert_eq!(of(&["10.96.0.1", "fd96::1"]), [Some(1), Some(2)]);
        assert_eq!(of(&["10.96.0.1"]), [Some(1), None]);
        let without = Service {
            health_check_node_port: None,
            ..service(&["10.96.0.1"])
        };
        assert_eq!(ask(&without), None);
    }

    /// P4: kube-proxy's body, byte for byte, and its headers.
    #[test]
    fn the_answer_is_kube_proxys() {
        let health = Health::default();
        let state = State {
            service: name(),
            local: Arc::new(AtomicUsize::new(2)),
            health: health.clone(),
            reports: Reports::default(),
            admitted: Admitted::default(),
        };
        assert_eq!(answer(&state).status(), 503, "the agent is not healthy yet");
        health.goes_live();
        let response = answer(&state);
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/json");
        assert_eq!(response.headers()["x-content-type-options"], "nosniff");
        assert_eq!(response.headers()["x-load-balancing-endpoint-weight"], "2");
        assert_eq!(
            response.body(),
            "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\
             \"serviceProxyHealthy\": true\n}"
        );
        state.local.store(0, Ordering::Relaxed);
        assert_eq!(answer(&state).status(), 503);
        assert_eq!(
            answer(&state).headers()["x-load-balancing-endpoint-weight"],
            "0"
        );
    }
}
