//! Tells users about objects that cannot be served, with Events of `events.k8s.io/v1`.
//!
//! Every node finds the same mistake in an object, so the Event's name is made from the object and
//! the message: the first node's counts, and the API server refuses the others' as already there.
//! What only this node cannot do has a name of its own. Rules:
//! <https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/>.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use http::{Method, Request};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    connection::Connection,
    failure::Failure,
    follow::{jitter, whole},
};
use crate::report::{Report, Reports};

/// Name of the one who tells.
const CONTROLLER: &str = "shunt.dev/agent";
/// Most nodes find a mistake at the same moment; they do not all tell it at once.
const SPREAD: Duration = Duration::from_secs(3);
/// From one Event to the next.
const PACE: Duration = Duration::from_millis(100);
/// Between attempts at one Event: from one to the other, doubled each time.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// The same is not told twice within this time, for which API servers keep Events by default.
const KEPT: Duration = Duration::from_secs(60 * 60);
/// Longest `note` that the API accepts, bytes.
const MAX_NOTE: usize = 1024;
/// Leaves room for a dot and a hash within a name's 253 characters.
const MAX_NAME: usize = 236;

/// Posts what is reported, one after the other, for as long as the source runs.
pub(super) async fn publish(connection: Arc<Connection>, reports: Reports, node_name: String) {
    let mut published: HashMap<Report, Instant> = HashMap::new();
    let mut forbidden = false;
    loop {
        let report = reports.next().await;
        published.retain(|_, at| at.elapsed() < KEPT);
        if published.insert(report.clone(), Instant::now()).is_some() {
            continue;
        }
        sleep(jitter(SPREAD)).await;
        let mut backoff = BACKOFF.0;
        while let Err(failure) = post(&connection, &report, &node_name).await {
            if failure.is_final() {
                let (cause, _) = failure.explain("events");
                if failure.is_forbidden() && !std::mem::replace(&mut forbidden, true) {
                    tracing::warn!(
                        "Events cannot be written: {cause}; allow create on events of events.k8s.io (ClusterRole); \
                         what cannot be served is in this log only"
                    );
                }
                tracing::debug!("Event about {}: {cause}", report.problem);
                break;
            }
            sleep(failure.retry_after().unwrap_or_default() + jitter(backoff)).await;
            backoff = (backoff * 2).min(BACKOFF.1);
        }
        sleep(PACE).await;
    }
}

/// The resource of an object that Events are written about.
fn resource(kind: &str) -> Option<(&'static str, &'static str)> {
    match kind {
        "Node" => Some(("v1", "nodes")),
        "Service" => Some(("v1", "services")),
        "EndpointSlice" => Some(("discovery.k8s.io/v1", "endpointslices")),
        _ => None,
    }
}

async fn post(connection: &Connection, report: &Report, node_name: &str) -> Result<(), Failure> {
    let problem = &report.problem;
    let (Some((version, plural)), Some(name)) = (resource(&problem.kind), &problem.name) else {
        return Ok(());
    };
    let root = if version == "v1" { "api" } else { "apis" };
    // A Node has no namespace; Events about it stand in `default`, as a kubelet's do.
    let (path, namespace) = match &*name.namespace {
        "" => (
            format!("/{root}/{version}/{plural}/{}", name.name),
            "default",
        ),
        namespace => (
            format!(
                "/{root}/{version}/namespaces/{namespace}/{plural}/{}",
                name.name
            ),
            namespace,
        ),
    };
    // `kubectl describe` asks for Events by the object's UID. Its metadata is enough where the
    // server can send that alone.
    let request = Request::builder()
        .method(Method::GET)
        .uri(path)
        .header(
            http::header::ACCEPT,
            "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json",
        )
        .body(Vec::new())
        .map_err(|error| Failure::Unreadable(error.to_string()))?;
    let object = whole(connection.send(request).await?).await?;
    let object: Value =
        serde_json::from_slice(&object).map_err(|error| Failure::Unreadable(error.to_string()))?;
    let event = event(report, version, &object["metadata"], node_name);
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!(
            "/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        ))
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(event.to_string().into_bytes())
        .map_err(|error| Failure::Unreadable(error.to_string()))?;
    whole(connection.send(request).await?).await?;
    Ok(())
}

fn event(report: &Report, version: &str, metadata: &Value, node_name: &str) -> Value {
    let problem = &report.problem;
    let name = metadata["name"].as_str().unwrap_or_default();
    let namespace = metadata["namespace"].as_str().unwrap_or("default");
    let mut note = match &*problem.field {
        "" => problem.message.clone(),
        field => format!("{field}: {}", problem.message),
    };
    if report.here {
        note = format!("on node {node_name}: {note}");
    }
    let mut hasher = DefaultHasher::new();
    (&*problem.kind, metadata["uid"].as_str(), &note).hash(&mut hasher);
    let stem = &name[..name.floor_char_boundary(MAX_NAME)];
    let stem = stem.trim_end_matches(|end: char| !end.is_ascii_alphanumeric());
    note.truncate(note.floor_char_boundary(MAX_NOTE));
    json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event",
        "metadata": { "name": format!("{stem}.{:016x}", hasher.finish()), "namespace": namespace },
        // Microseconds are what the API's MicroTime has.
        "eventTime": format!("{:.6}", Timestamp::now()),
        "type": "Warning", "reason": "CannotServe", "action": "Programming",
        "note": note,
        "regarding": {
            "apiVersion": version, "kind": &*problem.kind, "namespace": metadata["namespace"], "name": name,
            "uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"],
        },
        "reportingController": CONTROLLER,
        "reportingInstance": &node_name[..node_name.floor_char_boundary(128)],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{ObjectName, Problem};

    fn report(message: &str, here: bool) -> Report {
        let name = ObjectName::new("shop", "web");
        Report {
            problem: Problem::new("Service", &name, "spec.ports[0].port", message),
            here,
        }
    }

    /// S1: what the API server would refuse an Event for.
    #[test]
    fn events_are_what_the_api_accepts() {
        let long = "ä".repeat(2000);
        let longest = format!("{}-{}", "a".repeat(235), "b".repeat(17));
        let metadata =
            json!({ "name": longest, "namespace": "shop", "uid": "1-2", "resourceVersion": "7" });
        let value = event(&report(&long, false), "v1", &metadata, &"n".repeat(253));
        let typed: k8s_openapi::api::events::v1::Event =
            serde_json::from_value(value.clone()).unwrap();
        assert_eq!(
            typed
                .event_time
                .map(|time| time.0.as_second() > 1_700_000_000),
            Some(true)
        );
        assert!(
            typed
                .note
                .as_ref()
                .is_some_and(|note| note.len() <= 1024 && note.len() > 1000)
        );
        let name = typed.metadata.name.unwrap();
        assert!(name.len() <= 253, "{name}");
        assert!(!name.contains("-."), "{name}");
        assert!(value["reportingInstance"].as_str().unwrap().len() <= 128);
        assert_eq!(typed.regarding.unwrap().uid.as_deref(), Some("1-2"));
    }

    /// S1: a mistake that all nodes find is one Event; what each node has trouble with is its own.
    #[test]
    fn nodes_agree_on_the_name() {
        let metadata = json!({ "name": "web", "namespace": "shop", "uid": "1-2" });
        let name = |report: &Report, node| {
            event(report, "v1", &metadata, node)["metadata"]["name"].clone()
        };
        let everywhere = report("0 is no port", false);
        assert_eq!(name(&everywhere, "node-a"), name(&everywhere, "node-b"));
        assert_ne!(
            name(&everywhere, "node-a"),
            name(&report("1 is no port", false), "node-a")
        );
        let here = report("0 is no port", true);
        assert_ne!(name(&here, "node-a"), name(&here, "node-b"));
        let again = json!({ "name": "web", "namespace": "shop", "uid": "3-4" });
        let of_new_object = event(&everywhere, "v1", &again, "node-a")["metadata"]["name"].clone();
        assert_ne!(name(&everywhere, "node-a"), of_new_object);
    }
}
