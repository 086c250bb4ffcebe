//! Kubernetes objects, as far as they are read.
//!
//! An API server stores what was valid when it was written and serves it for ever, so a field that
//! is not used here must not make an object unreadable (SPEC S3): such fields are skipped without
//! being looked at, which is also what makes long `managedFields` cheap. Fields that are used are
//! checked by [`convert`](super::convert); here they only have the type that the API gives them,
//! and `null` is an absent field, as in Go.
//!
//! Fields are named and explained as in <https://kubernetes.io/docs/reference/kubernetes-api/>.

use std::{collections::BTreeMap, fmt};

use k8s_openapi::jiff::Timestamp;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor},
};

/// A kind of objects that is followed.
pub trait Kind: DeserializeOwned {
    /// The path of its list over all namespaces.
    const PATH: &'static str;

    /// `metadata`.
    fn meta(&self) -> &Meta;

    /// `metadata`.
    fn meta_mut(&mut self) -> &mut Meta;
}

macro_rules! kind {
    ($kind:ty, $path:literal) => {
        impl Kind for $kind {
            const PATH: &'static str = $path;

            fn meta(&self) -> &Meta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut Meta {
                &mut self.metadata
            }
        }
    };
}

kind!(Service, "/api/v1/services");
kind!(EndpointSlice, "/apis/discovery.k8s.io/v1/endpointslices");
kind!(Node, "/api/v1/nodes");
kind!(Pod, "/api/v1/pods");
kind!(Namespace, "/api/v1/namespaces");

/// Declares objects and their parts: every field may be absent or `null`, and every other field is
/// skipped.
macro_rules! parts {
    ($($(#[$attribute:meta])* $name:ident { $($(#[$of_field:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$attribute])*
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        #[expect(missing_docs, reason = "the API reference explains them")]
        pub struct $name {
            $(#[serde(deserialize_with = "or_default")] $(#[$of_field])* pub $field: $type,)*
        }
    )*};
}

parts! {
    /// `metadata` of every object.
    Meta {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        labels: Strings,
        annotations: Annotations,
        creation_timestamp: Time,
        // Whether it is there is all that matters.
        deletion_timestamp: Option<IgnoredAny>,
    }
    /// The annotations that mean something here; others may be as long as they like.
    Annotations {
        #[serde(rename = "shunt.dev/retry")] retry: Option<String>,
        #[serde(rename = "kubernetes.io/config.mirror")] config_mirror: Option<String>,
        #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time")] trigger_time: Option<String>,
    }

    /// `v1 Service`.
    Service {
        metadata: Meta,
        spec: Option<ServiceSpec>,
        status: ServiceStatus,
    }
    /// Of a Service.
    ServiceSpec {
        #[serde(rename = "type")] type_: Option<String>,
        #[serde(rename = "clusterIP")] cluster_ip: Option<String>,
        #[serde(rename = "clusterIPs")] cluster_ips: Vec<String>,
        #[serde(rename = "externalIPs")] external_ips: Vec<String>,
        external_name: Option<String>,
        #[serde(rename = "loadBalancerIP")] load_balancer_ip: Option<String>,
        load_balancer_class: Option<String>,
        load_balancer_source_ranges: Vec<String>,
        allocate_load_balancer_node_ports: Option<bool>,
        ports: Vec<ServicePort>,
        selector: Strings,
        session_affinity: Option<String>,
        session_affinity_config: SessionAffinityConfig,
        external_traffic_policy: Option<String>,
        internal_traffic_policy: Option<String>,
        traffic_distribution: Option<String>,
        health_check_node_port: Option<i32>,
        publish_not_ready_addresses: Option<bool>,
        ip_families: Vec<String>,
        ip_family_policy: Option<String>,
    }
    /// Of a Service.
    ServicePort {
        name: Option<String>,
        protocol: Option<String>,
        port: i32,
        target_port: Option<IntOrString>,
        node_port: Option<i32>,
    }
    /// Of a Service.
    SessionAffinityConfig {
        #[serde(rename = "clientIP")] client_ip: ClientIpConfig,
    }
    /// Of a Service.
    ClientIpConfig {
        timeout_seconds: Option<i32>,
    }
    /// Of a Service.
    ServiceStatus {
        load_balancer: LoadBalancerStatus,
    }
    /// Of a Service.
    LoadBalancerStatus {
        ingress: Vec<LoadBalancerIngress>,
    }
    /// Of a Service.
    LoadBalancerIngress {
        ip: Option<String>,
        ip_mode: Option<String>,
    }

    /// `discovery.k8s.io/v1 EndpointSlice`.
    EndpointSlice {
        metadata: Meta,
        address_type: String,
        ports: Vec<EndpointPort>,
        endpoints: Vec<Endpoint>,
    }
    /// Of a slice; a port of `Endpoints` is like it.
    EndpointPort {
        name: Option<String>,
        protocol: Option<String>,
        port: Option<i32>,
    }
    /// Of a slice.
    Endpoint {
        addresses: Vec<String>,
        conditions: EndpointConditions,
        hostname: Option<String>,
        node_name: Option<String>,
        hints: EndpointHints,
    }
    /// Of a slice.
    EndpointConditions {
        ready: Option<bool>,
        serving: Option<bool>,
        terminating: Option<bool>,
    }
    /// Of a slice.
    EndpointHints {
        for_zones: Vec<Named>,
        for_nodes: Vec<Named>,
    }
    /// A zone, a node, or a variable.
    Named {
        name: String,
    }

    /// `v1 Endpoints`.
    Endpoints {
        metadata: Meta,
        subsets: Vec<EndpointSubset>,
    }
    /// Of `Endpoints`.
    EndpointSubset {
        addresses: Vec<EndpointAddress>,
        not_ready_addresses: Vec<EndpointAddress>,
        ports: Vec<EndpointPort>,
    }
    /// Of `Endpoints`.
    EndpointAddress {
        ip: String,
        hostname: Option<String>,
        node_name: Option<String>,
    }

    /// `v1 Pod`.
    Pod {
        metadata: Meta,
        spec: PodSpec,
        status: Option<PodStatus>,
    }
    /// Of a Pod.
    PodSpec {
        node_name: Option<String>,
        hostname: Option<String>,
        subdomain: Option<String>,
        enable_service_links: Option<bool>,
        containers: Vec<Container>,
        init_containers: Vec<Container>,
    }
    /// Of a Pod.
    Container {
        name: String,
        env: Vec<Named>,
        ports: Vec<ContainerPort>,
        restart_policy: Option<String>,
    }
    /// Of a Pod.
    ContainerPort {
        name: Option<String>,
        protocol: Option<String>,
        container_port: i32,
    }
    /// Of a Pod.
    PodStatus {
        phase: Option<String>,
        #[serde(rename = "podIP")] pod_ip: Option<String>,
        #[serde(rename = "podIPs")] pod_ips: Vec<PodIp>,
        conditions: Vec<PodCondition>,
    }
    /// Of a Pod.
    PodIp {
        ip: String,
    }
    /// Of a Pod.
    PodCondition {
        #[serde(rename = "type")] type_: String,
        status: String,
    }

    /// `v1 Namespace`.
    Namespace {
        metadata: Meta,
    }

    /// `v1 Node`.
    Node {
        metadata: Meta,
        spec: NodeSpec,
        status: NodeStatus,
    }
    /// Of a Node.
    NodeSpec {
        taints: Vec<Taint>,
    }
    /// Of a Node.
    Taint {
        key: String,
    }
    /// Of a Node.
    NodeStatus {
        addresses: Vec<NodeAddress>,
    }
    /// Of a Node.
    NodeAddress {
        address: String,
    }
}

/// A map of strings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings(pub BTreeMap<String, String>);

impl Strings {
    /// What stands by a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A value that is `null` is an empty string to Go.
        let map = BTreeMap::<String, Option<String>>::deserialize(deserializer)?;
        Ok(Self(
            map.into_iter()
                .map(|(key, value)| (key, value.unwrap_or_default()))
                .collect(),
        ))
    }
}

/// A field that may be `null`.
fn or_default<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: Deserializer<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A time that only orders objects: what is no time counts as none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time(pub Option<Timestamp>);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TimeVisitor)
    }
}

struct TimeVisitor;

impl<'de> Visitor<'de> for TimeVisitor {
    type Value = Time;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a time")
    }

    fn visit_str<E>(self, text: &str) -> Result<Time, E> {
        Ok(Time(text.parse().ok()))
    }
    fn visit_unit<E>(self) -> Result<Time, E> {
        Ok(Time(None))
    }
    fn visit_none<E>(self) -> Result<Time, E> {
        Ok(Time(None))
    }
    fn visit_bool<E>(self, _: bool) -> Result<Time, E> {
        Ok(Time(None))
    }
    fn visit_i64<E>(self, _: i64) -> Result<Time, E> {
        Ok(Time(None))
    }
    fn visit_u64<E>(self, _: u64) -> Result<Time, E> {
        Ok(Time(None))
    }
    fn visit_f64<E>(self, _: f64) -> Result<Time, E> {
        Ok(Time(None))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Time, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Time(None))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Time, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Time(None))
    }
}

/// `targetPort`: a number, or the name of a container's port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IntOrString {
    /// A number.
    Int(i32),
    /// A name.
    String(String),
}

impl<'de> Deserialize<'de> for IntOrString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(IntOrStringVisitor)
    }
}

struct IntOrStringVisitor;

impl Visitor<'_> for IntOrStringVisitor {
    type Value = IntOrString;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number or the name of a port")
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<IntOrString, E> {
        let int = i32::try_from(number)
            .map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))?;
        Ok(IntOrString::Int(int))
    }
    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<IntOrString, E> {
        let int = i32::try_from(number)
            .map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &self))?;
        Ok(IntOrString::Int(int))
    }
    fn visit_str<E>(self, name: &str) -> Result<IntOrString, E> {
        Ok(IntOrString::String(name.to_owned()))
    }
}

#[cfg(test)]
mod tests;
