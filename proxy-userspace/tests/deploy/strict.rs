//! Objects against the types of the Kubernetes API: a field that the API does not have is a
//! mistake, as `kubectl --validate=strict` sees it, not something to be dropped in silence.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Endpoints, Namespace, Node, Pod, Service, ServiceAccount},
        discovery::v1::EndpointSlice,
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Everything that is wrong with an object: no such kind, no such field, a field of another type.
pub(crate) fn mistakes(object: &Value) -> Vec<String> {
    let text = |field: &str| object[field].as_str().unwrap_or_default();
    let check = match (text("apiVersion"), text("kind")) {
        ("v1", "ConfigMap") => of::<ConfigMap>,
        ("v1", "Endpoints") => of::<Endpoints>,
        ("v1", "Namespace") => of::<Namespace>,
        ("v1", "Node") => of::<Node>,
        ("v1", "Pod") => of::<Pod>,
        ("v1", "Service") => of::<Service>,
        ("v1", "ServiceAccount") => of::<ServiceAccount>,
        ("apps/v1", "DaemonSet") => of::<DaemonSet>,
        ("discovery.k8s.io/v1", "EndpointSlice") => of::<EndpointSlice>,
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => of::<ClusterRole>,
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => of::<ClusterRoleBinding>,
        ("monitoring.coreos.com/v1", "PodMonitor") => of::<PodMonitor>,
        ("monitoring.coreos.com/v1", "PrometheusRule") => of::<PrometheusRule>,
        (version, kind) => return vec![format!("no type is known for {version} {kind}")],
    };
    check(object)
}

/// As much of the Prometheus operator's type as is used here
/// (<https://prometheus-operator.dev/docs/api-reference/api/#monitoring.coreos.com/v1.PodMonitor>).
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodMonitor {
    api_version: String,
    kind: String,
    pub(crate) metadata: ObjectMeta,
    pub(crate) spec: PodMonitorSpec,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodMonitorSpec {
    pub(crate) selector: LabelSelector,
    pub(crate) pod_metrics_endpoints: Vec<PodMetricsEndpoint>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct PodMetricsEndpoint {
    /// The name of a container port.
    pub(crate) port: String,
    pub(crate) path: String,
    interval: String,
    pub(crate) relabelings: Vec<Relabeling>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Relabeling {
    action: String,
    source_labels: Vec<String>,
    pub(crate) target_label: String,
}

/// The same for alerts
/// (<https://prometheus-operator.dev/docs/api-reference/api/#monitoring.coreos.com/v1.PrometheusRule>).
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PrometheusRule {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    pub(crate) spec: PrometheusRuleSpec,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct PrometheusRuleSpec {
    pub(crate) groups: Vec<RuleGroup>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct RuleGroup {
    name: String,
    pub(crate) rules: Vec<Rule>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Rule {
    pub(crate) alert: String,
    expr: String,
    #[serde(default, rename = "for", skip_serializing_if = "Option::is_none")]
    pause: Option<String>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
}

/// Reads an object as its type and writes it again: what is lost on the way the type does not have.
pub(crate) fn of<T: DeserializeOwned + Serialize>(object: &Value) -> Vec<String> {
    let typed: T = match serde_json::from_value(object.clone()) {
        Ok(typed) => typed,
        Err(error) => return vec![error.to_string()],
    };
    let mut found = Vec::new();
    compare(
        object,
        &serde_json::to_value(typed).unwrap(),
        "",
        &mut found,
    );
    found
}

fn compare(given: &Value, kept: &Value, path: &str, found: &mut Vec<String>) {
    match (given, kept) {
        (Value::Object(given), Value::Object(kept)) => {
            for (field, value) in given {
                let path = format!("{path}.{field}");
                match kept.get(field) {
                    Some(other) => compare(value, other, &path, found),
                    None => found.push(format!("{path}: no such field")),
                }
            }
        }
        (Value::Array(given), Value::Array(kept)) if given.len() == kept.len() => {
            for (index, (value, other)) in given.iter().zip(kept).enumerate() {
                compare(value, other, &format!("{path}[{index}]"), found);
            }
        }
        (given, kept) if given == kept => {}
        _ => found.push(format!("{path}: {given} is read as {kept}")),
    }
}
