//! From Kubernetes objects to the slim types of [`crate::object`], with everything checked.
//!
//! A manifest has no API server in front of it, and an API server may be older or newer than this
//! code, so nothing is taken on trust. What cannot be served becomes a [`Problem`]; the rest of the
//! object goes on.
//!
//! Rules: <https://kubernetes.io/docs/reference/kubernetes-api/service-resources/>.

use super::kinds::Meta;
use crate::object::{ObjectName, Problem};

pub(super) mod decimal;
mod endpoints;
mod nodes;
mod report;
mod service;

pub use self::{
    endpoints::{LABEL_SERVICE, endpoints, slice, triggered},
    nodes::{LABEL_ZONE, PodFacts, TAINT_TO_BE_DELETED, node, pod},
    report::ANNOTATION_RETRY,
    service::{DEFAULT_AFFINITY_SECS, service},
};

/// Label of Services and slices that another proxy serves.
pub const LABEL_SERVICE_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Label of headless Services and their slices.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// `namespace/name` of an object; `default` where it names no namespace. `None` and a problem
/// without a name.
pub fn name(kind: &str, meta: &Meta, problems: &mut Vec<Problem>) -> Option<ObjectName> {
    let namespace = match meta.namespace.as_deref() {
        None | Some("") => "default",
        Some(namespace) => namespace,
    };
    let name = ObjectName::new(namespace, meta.name.as_deref().unwrap_or_default());
    for (field, value) in [
        ("metadata.namespace", &name.namespace),
        ("metadata.name", &name.name),
    ] {
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
    let ends = |byte: Option<u8>| {
        byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    name.len() <= 253
        && ends(name.bytes().next())
        && ends(name.bytes().last())
        && name
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
}

/// Whether the object's labels say that it is not for this proxy (SPEC F7).
fn left_alone(meta: &Meta) -> bool {
    [LABEL_SERVICE_PROXY, LABEL_HEADLESS]
        .iter()
        .any(|label| meta.labels.get(label).is_some())
}

/// Turns the label [`LABEL_SERVICE_PROXY`] into what [`service`] and [`slice()`] look at, when this
/// proxy has a name itself: its own objects lose the label, and all others are left alone.
pub fn claim(meta: &mut Meta, proxy_name: &str) {
    let labels = &mut meta.labels.0;
    if labels
        .get(LABEL_SERVICE_PROXY)
        .is_some_and(|name| name == proxy_name)
    {
        labels.remove(LABEL_SERVICE_PROXY);
    } else {
        labels.insert(LABEL_SERVICE_PROXY.to_owned(), String::new());
    }
}
