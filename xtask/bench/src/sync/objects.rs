//! The Services and slices, as the API server has them and as the model has them.

use std::net::{IpAddr, Ipv4Addr};

use shunt::object::{
    Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service, ServicePort,
    TrafficPolicy,
};

use super::figures::ENDPOINTS;

/// The first cluster IP is the one after this.
const CLUSTER_IPS: u32 = u32::from_be_bytes([10, 96, 0, 0]);
/// Endpoints are in 11.0.0.0/8, those that replace others in 12.0.0.0/8.
const PODS: u32 = u32::from_be_bytes([11, 0, 0, 0]);
const OTHER_PODS: u32 = u32::from_be_bytes([12, 0, 0, 0]);
/// Services of one namespace, and nodes that endpoints are spread over.
const PER_NAMESPACE: u32 = 100;
const NODES: u32 = 50;
const PORT: u16 = 8080;

/// Which endpoints a slice has: those it begins with, but for one that was replaced `generation`
/// times.
#[derive(Clone, Copy)]
pub(super) struct Generation(pub(super) u32);

pub(super) fn cluster_ip(n: u32) -> IpAddr {
    Ipv4Addr::from(CLUSTER_IPS + 1 + n).into()
}

fn endpoint_ip(n: u32, k: u32, generation: Generation) -> Ipv4Addr {
    let Generation(generation) = generation;
    if generation > 0 && generation % ENDPOINTS == k {
        return Ipv4Addr::from(OTHER_PODS + (n * 64 + generation) % (1 << 24));
    }
    Ipv4Addr::from(PODS + n * ENDPOINTS + k)
}

fn namespace(n: u32) -> String {
    format!("team-{}", n / PER_NAMESPACE)
}

/// For the model.
pub(super) fn service(n: u32) -> Service {
    Service {
        name: ObjectName::new(&namespace(n), &format!("service-{n}")),
        exposure: Default::default(),
        created: Some(1_700_000_000),
        cluster_ips: vec![cluster_ip(n)],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        affinity_secs: None,
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        health_check_node_port: None,
        source_ranges: Vec::new(),
        limits_sources: [false; 2],
        masquerade: false,
        publish_not_ready: false,
        retry: Default::default(),
    }
}

/// For the model.
pub(super) fn slice(n: u32, generation: Generation) -> EndpointSlice {
    EndpointSlice {
        name: ObjectName::new(&namespace(n), &format!("service-{n}-x7k2p")),
        service: ObjectName::new(&namespace(n), &format!("service-{n}")),
        names_only: false,
        ports: vec![EndpointPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: PORT,
        }],
        endpoints: (0..ENDPOINTS)
            .map(|k| Endpoint {
                address: endpoint_ip(n, k, generation).into(),
                hostname: None,
                node: Some(format!("node-{}", (n + k) % NODES).as_str().into()),
                ready: true,
                serving: true,
                terminating: false,
                zones: Default::default(),
                nodes: Default::default(),
            })
            .collect(),
    }
}

/// As an API server writes it.
pub(super) fn service_json(n: u32) -> String {
    let (namespace, ip) = (namespace(n), cluster_ip(n));
    format!(
        r#"{{"metadata":{{"name":"service-{n}","namespace":"{namespace}","uid":"6d1f2c1e-0000-4000-8000-{n:012}","resourceVersion":"{}","creationTimestamp":"2026-01-01T00:00:00Z","labels":{{"app.kubernetes.io/name":"service-{n}","app.kubernetes.io/part-of":"{namespace}"}},"annotations":{{"deploy.example/revision":"{n}"}}}},"spec":{{"ports":[{{"name":"http","protocol":"TCP","port":80,"targetPort":"http"}}],"selector":{{"app.kubernetes.io/name":"service-{n}"}},"clusterIP":"{ip}","clusterIPs":["{ip}"],"type":"ClusterIP","sessionAffinity":"None","ipFamilies":["IPv4"],"ipFamilyPolicy":"SingleStack","internalTrafficPolicy":"Cluster"}},"status":{{"loadBalancer":{{}}}}}}"#,
        n + 1
    )
}

/// As an API server writes it.
pub(super) fn slice_json(n: u32, generation: Generation, version: u64) -> String {
    let namespace = namespace(n);
    let endpoints: Vec<String> = (0..ENDPOINTS)
        .map(|k| {
            format!(
                r#"{{"addresses":["{}"],"conditions":{{"ready":true,"serving":true,"terminating":false}},"targetRef":{{"kind":"Pod","namespace":"{namespace}","name":"service-{n}-5d8f7c9b4-{k:05}","uid":"0b7c2a44-0000-4000-8000-{:012}"}},"nodeName":"node-{}","zone":"zone-a"}}"#,
                endpoint_ip(n, k, generation),
                n * ENDPOINTS + k,
                (n + k) % NODES
            )
        })
        .collect();
    format!(
        r#"{{"metadata":{{"name":"service-{n}-x7k2p","generateName":"service-{n}-","namespace":"{namespace}","uid":"9a1b2c3d-0000-4000-8000-{n:012}","resourceVersion":"{version}","generation":{},"creationTimestamp":"2026-01-01T00:00:00Z","labels":{{"app.kubernetes.io/name":"service-{n}","endpointslice.kubernetes.io/managed-by":"endpointslice-controller.k8s.io","kubernetes.io/service-name":"service-{n}"}},"annotations":{{"endpoints.kubernetes.io/last-change-trigger-time":"2026-01-01T00:00:00Z"}},"ownerReferences":[{{"apiVersion":"v1","kind":"Service","name":"service-{n}","uid":"6d1f2c1e-0000-4000-8000-{n:012}","controller":true,"blockOwnerDeletion":true}}]}},"addressType":"IPv4","endpoints":[{}],"ports":[{{"name":"http","protocol":"TCP","port":{PORT}}}]}}"#,
        generation.0 + 1,
        endpoints.join(",")
    )
}

/// The node that the agent runs on.
pub(super) fn node_json() -> String {
    r#"{"metadata":{"name":"node-a","uid":"11111111-0000-4000-8000-000000000000","resourceVersion":"1","creationTimestamp":"2026-01-01T00:00:00Z","labels":{"topology.kubernetes.io/zone":"zone-a"}},"spec":{},"status":{"addresses":[{"type":"InternalIP","address":"192.168.50.11"}]}}"#.to_owned()
}
