//! Against a server that speaks the protocol over TLS, and misbehaves.

use std::collections::BTreeSet;

use k8s_openapi::api::rbac::v1::ClusterRole;
use serde_json::{Value, json};
use shunt_apiserver::{ApiServer, Gone, Kind, Refusal, Relay, Streaming};

use super::*;
use crate::{health::Health, metrics::Metrics, model::Model, report::Reports};

/// A change that the server tells at once is here at once; this is for those that take attempts.
const LONG: Duration = Duration::from_secs(30);

fn service(name: &str, ip: &str) -> Value {
    json!({
        "kind": "Service", "metadata": { "name": name },
        "spec": { "clusterIP": ip, "clusterIPs": [ip], "ports": [{ "port": 80, "protocol": "TCP" }] },
    })
}

fn slice(name: &str, service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|a| json!({ "addresses": [a] }))
        .collect();
    json!({
        "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "name": name, "labels": { "kubernetes.io/service-name": service } },
        "ports": [{ "name": "", "port": 8080, "protocol": "TCP" }],
        "endpoints": endpoints,
    })
}

fn node(name: &str) -> Value {
    json!({
        "kind": "Node",
        "metadata": { "name": name, "labels": { "topology.kubernetes.io/zone": "zone-a" } },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }, { "type": "Hostname", "address": name }] },
    })
}

/// Services `a` with one endpoint and `b` with none, and two Nodes.
fn server() -> ApiServer {
    let server = ApiServer::start().unwrap();
    server.apply_all([
        service("a", "10.96.0.1"),
        service("b", "10.96.0.2"),
        slice("a-1", "a", &["10.0.0.1"]),
        node("node-a"),
        node("node-z"),
    ]);
    server
}

/// A source and the model that it fills.
struct Agent {
    events: mpsc::Receiver<Vec<Event>>,
    model: Model,
}

impl Agent {
    fn start(server: &ApiServer) -> Self {
        Self::start_named(server, None)
    }

    fn start_named(server: &ApiServer, proxy_name: Option<&str>) -> Self {
        Self::start_at(server.kubeconfig(), proxy_name)
    }

    fn start_at(kubeconfig: PathBuf, proxy_name: Option<&str>) -> Self {
        Self::start_reporting(kubeconfig, proxy_name, Reports::default())
    }

    fn start_reporting(kubeconfig: PathBuf, proxy_name: Option<&str>, reports: Reports) -> Self {
        let config = Config {
            proxy_name: proxy_name.map(str::to_owned),
            ..config(kubeconfig)
        };
        Self::start_with(config, reports)
    }

    fn start_with(config: Config, reports: Reports) -> Self {
        let source = Kubernetes::new(config);
        let (tx, events) = mpsc::channel(16);
        let queue = Queue::new(tx, Health::default(), reports);
        tokio::spawn(async move { source.run(queue).await.unwrap() });
        Self {
            events,
            model: Model::new(NodeFacts::default()),
        }
    }

    /// Takes events in until a condition holds; returns them.
    async fn until(&mut self, what: &str, holds: impl Fn(&Model) -> bool) -> Vec<Event> {
        let mut all = Vec::new();
        let deadline = Instant::now() + LONG;
        while !holds(&self.model) {
            let batch = tokio::time::timeout_at(deadline, self.events.recv()).await;
            for event in batch
                .unwrap_or_else(|_| panic!("in vain: {what}"))
                .expect("the source runs")
            {
                all.push(event.clone());
                self.model.apply(event);
            }
        }
        all
    }

    /// Nothing comes any more.
    async fn silence(&mut self) {
        let batch = tokio::time::timeout(Duration::from_millis(300), self.events.recv()).await;
        assert!(batch.is_err(), "nothing changed, but there came {batch:?}");
    }

    /// Waits until the server has so many of this agent's watches, and nothing was yielded
    /// meanwhile.
    async fn silence_until_watches(&mut self, server: &ApiServer, count: usize) {
        let began = Instant::now();
        while server.watches() != count {
            assert!(began.elapsed() < LONG, "{} watches", server.watches());
            let batch = tokio::time::timeout(Duration::from_millis(20), self.events.recv()).await;
            assert!(batch.is_err(), "nothing changed, but there came {batch:?}");
        }
        self.silence().await;
    }
}

fn config(kubeconfig: PathBuf) -> Config {
    Config {
        kubeconfig: Some(kubeconfig),
        node_name: "node-a".to_owned(),
        proxy_name: None,
        names: false,
        socket_lb_labels: false,
    }
}

fn name(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

fn backends(model: &Model, service: &str) -> Option<usize> {
    model
        .plan(&name(service))
        .frontends
        .first()
        .map(|frontend| frontend.backends.len())
}

#[tokio::test]
async fn lists_watches_and_lists_again_with_differences_only() {
    for (streaming, gone) in [
        (Streaming::On, Gone::Event),
        (Streaming::Refused, Gone::Status),
        (Streaming::On, Gone::Status),
    ] {
        differences_only(streaming, gone).await;
    }
}

async fn differences_only(streaming: Streaming, gone: Gone) {
    let server = server();
    server.faults(|faults| {
        faults.streaming = streaming;
        faults.gone = gone;
        faults.page = 1;
    });
    let mut agent = Agent::start(&server);
    let first = agent.until("complete", Model::is_complete).await;
    assert_eq!(
        first
            .iter()
            .filter(|event| **event == Event::Complete)
            .count(),
        1
    );
    assert_eq!(first.last(), Some(&Event::Complete), "all lists before");
    assert_eq!(
        (backends(&agent.model, "a"), backends(&agent.model, "b")),
        (Some(1), Some(0))
    );
    assert_eq!(agent.model.node().zone.as_deref(), Some("zone-a"));
    assert!(
        agent
            .model
            .node()
            .addresses
            .contains(&"192.0.2.1".parse().unwrap())
    );
    // One page for each Service and slice, and one for the Node.
    let paged = server.requests("limit=500");
    assert_eq!(
        paged,
        if streaming == Streaming::Refused {
            4
        } else {
            0
        }
    );

    // A watch tells of changes; of those that change nothing here, nothing is yielded.
    server.apply(slice("a-1", "a", &["10.0.0.1", "10.0.0.2"]));
    agent
        .until("a change", |model| backends(model, "a") == Some(2))
        .await;
    let mut annotated = service("a", "10.96.0.1");
    annotated["metadata"]["annotations"] = json!({ "a": "b" });
    server.apply(annotated);
    agent.silence().await;
    server.delete(Kind::Services, "default", "b");
    agent
        .until("a deletion", |model| backends(model, "b").is_none())
        .await;
    server.apply(service("d", "10.96.0.4"));
    agent
        .until("d", |model| backends(model, "d").is_some())
        .await;

    // A gap: one Service is gone, one is new, one stays; then the list is read again.
    server.close().unwrap();
    server.apply(service("c", "10.96.0.3"));
    server.delete(Kind::Services, "default", "d");
    server.expire();
    agent.silence().await;
    server.open().unwrap();
    let again = agent
        .until("the list again", |model| {
            backends(model, "c").is_some() && backends(model, "d").is_none()
        })
        .await;
    assert_eq!(again.len(), 2, "only c is new: {again:?}");
    assert!(
        matches!(&again[0], Event::Service(service) if service.name == name("c")),
        "{again:?}"
    );
    assert_eq!(again[1], Event::ServiceGone(name("d")), "deletions last");
    agent.silence().await;
}

/// SPEC F7: what others serve never comes over the wire.
#[tokio::test]
async fn the_server_leaves_out_what_is_not_ours() {
    let server = server();
    let labelled = |mut object: Value, label: &str| {
        object["metadata"]["labels"][label] = "".into();
        object
    };
    server.apply(labelled(
        service("headless", "None"),
        "service.kubernetes.io/headless",
    ));
    server.apply(labelled(
        service("foreign", "10.96.0.9"),
        "service.kubernetes.io/service-proxy-name",
    ));
    let mut agent = Agent::start(&server);
    let first = agent.until("complete", Model::is_complete).await;
    assert_eq!(
        first.len(),
        5,
        "two Services, a slice, the Node, Complete: {first:?}"
    );
    for plural in ["/services?", "/endpointslices?"] {
        let request = server.request(plural).unwrap();
        let selector = "labelSelector=%21service.kubernetes.io%2Fheadless%2C%21service.kubernetes.io%2Fservice-proxy-name";
        assert!(request.contains(selector), "{request}");
    }
    let request = server.request("/nodes?").unwrap();
    assert!(
        request.contains("fieldSelector=metadata.name%3Dnode-a"),
        "only the own Node: {request}"
    );
    // A label that is added takes a Service away, and one that is removed brings it.
    server.apply(labelled(
        service("a", "10.96.0.1"),
        "service.kubernetes.io/service-proxy-name",
    ));
    agent
        .until("a is another's", |model| backends(model, "a").is_none())
        .await;
    server.apply(service("a", "10.96.0.1"));
    agent
        .until("a is ours", |model| backends(model, "a") == Some(1))
        .await;
}

/// SPEC L5: watches that end, in order or in the middle of an object, go on where they were.
#[tokio::test]
async fn broken_watches_go_on_where_they_were() {
    let server = server();
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    server.forget_requests();
    for (number, break_off) in [
        ApiServer::drop_watches,
        ApiServer::cut_watches,
        (|server| server.disconnect().unwrap()) as fn(&ApiServer),
    ]
    .into_iter()
    .enumerate()
    {
        break_off(&server);
        // Missed by the watch that has ended; the next one tells it.
        let addresses: Vec<String> = (0..number + 2).map(|i| format!("10.0.1.{i}")).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        server.apply(slice("a-1", "a", &addresses));
        let events = agent
            .until("what was missed", |model| {
                backends(model, "a") == Some(addresses.len())
            })
            .await;
        assert_eq!(events.len(), 1, "{events:?}");
        agent.silence_until_watches(&server, 3).await;
    }
    let lists = server.requests("sendInitialEvents") + server.requests("limit=");
    assert_eq!(lists, 0, "nothing was listed again");
}

/// A version that is gone costs a list, and no more time than that.
#[tokio::test]
async fn a_gone_version_is_a_new_list_at_once() {
    for gone in [Gone::Event, Gone::Status] {
        let server = server();
        server.faults(|faults| faults.gone = gone);
        let mut agent = Agent::start(&server);
        agent.until("complete", Model::is_complete).await;
        agent.silence_until_watches(&server, 3).await;
        server.forget_requests();
        server.expire();
        server.drop_watches();
        agent.silence().await;
        server.apply(slice("a-1", "a", &[]));
        let began = Instant::now();
        agent
            .until("a change", |model| backends(model, "a") == Some(0))
            .await;
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{:?}",
            began.elapsed()
        );
        assert_eq!(
            server.requests("sendInitialEvents"),
            3,
            "one list of each kind"
        );
    }
}

/// Bookmarks move the version that a watch goes on from, so that a quiet kind needs no new list.
#[tokio::test]
async fn bookmarks_save_lists() {
    let server = server();
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    agent.silence_until_watches(&server, 3).await;
    server.bookmark();
    agent.silence().await;
    // Everything before the bookmark is forgotten but for the bookmark's own version.
    server.close().unwrap();
    server.forget_requests();
    server.open().unwrap();
    agent.silence_until_watches(&server, 3).await;
    let version = server.request("/services?").unwrap();
    assert!(
        version.contains("resourceVersion=1006 "),
        "the bookmark's, not that of the last Service: {version}"
    );
    assert_eq!(
        server.requests("sendInitialEvents") + server.requests("limit="),
        0
    );
}

/// SPEC L5: an error takes nothing away, and what happened meanwhile comes when it is over.
#[tokio::test]
async fn http_2_is_spoken_where_the_server_offers_it() {
    for (http1_only, spoken) in [(false, "HTTP/2.0"), (true, "HTTP/1.1")] {
        let server = server();
        server.faults(|faults| faults.http1_only = http1_only);
        let mut agent = Agent::start(&server);
        agent.until("the lists", Model::is_complete).await;
        server.wait_for_watches(3, LONG);
        assert!(server.requests("") >= 3);
        assert_eq!(server.requests(spoken), server.requests(""), "{spoken}");
    }
}

/// Over HTTP/2: nothing comes any more, no word of an end either.
#[tokio::test]
async fn a_connection_that_has_died_in_silence_is_noticed() {
    let server = server();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = Relay::start(&server.kubeconfig(), listener).unwrap();
    let mut agent = Agent::start_at(relay.kubeconfig(), None);
    agent.until("the lists", Model::is_complete).await;
    server.wait_for_watches(3, LONG);
    relay.mute();
    server.apply(service("c", "10.96.0.3"));
    let began = Instant::now();
    agent
        .until("the new Service", |model| {
            model.service(&name("c")).is_some()
        })
        .await;
    assert!(
        began.elapsed() > Duration::from_secs(1),
        "the old connection was still of use"
    );
}

#[tokio::test]
async fn errors_take_nothing_away() {
    for status in [401, 403, 429, 500, 503] {
        let server = server();
        let mut agent = Agent::start(&server);
        agent.until("complete", Model::is_complete).await;
        agent.silence_until_watches(&server, 3).await;
        server.faults(|faults| faults.refuse = Some(Refusal::status(status)));
        server.drop_watches();
        server.delete(Kind::EndpointSlices, "default", "a-1");
        agent.silence().await;
        assert_eq!(backends(&agent.model, "a"), Some(1));
        server.faults(|faults| faults.refuse = None);
        agent
            .until("the server is back", |model| {
                backends(model, "a") == Some(0)
            })
            .await;
    }
}

/// RFC 6585 and 9110: a server that is overloaded says when to come again.
#[tokio::test]
async fn retry_after_is_kept_to() {
    let server = server();
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    agent.silence_until_watches(&server, 3).await;
    server.faults(|faults| faults.refuse = Some(Refusal::status(429).retry_after(2)));
    server.forget_requests();
    server.drop_watches();
    tokio::time::sleep(Duration::from_millis(1900)).await;
    assert_eq!(server.requests(""), 3, "each watch has asked once");
    server.faults(|faults| faults.refuse = None);
    agent.silence_until_watches(&server, 3).await;
}

/// A server whose watches end as soon as they begin is not asked without a pause.
#[tokio::test]
async fn short_watches_are_begun_ever_more_seldom() {
    let server = server();
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    server.forget_requests();
    server.faults(|faults| faults.short_watches = true);
    server.drop_watches();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let count = server.requests("watch=true");
    assert!(
        (6..=24).contains(&count),
        "3 kinds, about 0.4, 0.8, 1.5, 3 s: {count}"
    );
    server.faults(|faults| faults.short_watches = false);
    agent.silence_until_watches(&server, 3).await;
}

/// A server that does not know `sendInitialEvents` sends what there is and no end of it.
#[tokio::test]
async fn a_list_without_an_end_is_read_in_pages() {
    let server = server();
    server.faults(|faults| faults.streaming = Streaming::Ignored);
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    assert_eq!(backends(&agent.model, "a"), Some(1));
    assert!(server.requests("limit=500") >= 3);
}

/// A replayed past is not believed: the endpoint that is gone does not come back for a moment.
#[tokio::test]
async fn old_versions_are_not_believed() {
    let server = server();
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    server.apply(slice("a-1", "a", &["10.0.0.1", "10.0.0.2"]));
    server.apply(slice("a-1", "a", &["10.0.0.3"]));
    server.delete(Kind::Services, "default", "b");
    let last = |model: &Model| {
        let a = name("a");
        let address = model
            .slices(&a)
            .next()
            .map(|slice| slice.endpoints[0].address);
        backends(model, "b").is_none() && address == Some("10.0.0.3".parse().unwrap())
    };
    agent.until("the last of them", last).await;
    agent.silence_until_watches(&server, 3).await;
    server.faults(|faults| faults.replay = 10);
    for _ in 0..2 {
        server.drop_watches();
        server.wait_for_watches(0, LONG);
        agent.silence_until_watches(&server, 3).await;
    }
    // And the watch goes on.
    server.apply(slice("a-1", "a", &[]));
    let events = agent
        .until("a change", |model| backends(model, "a") == Some(0))
        .await;
    assert_eq!(events.len(), 1, "{events:?}");
}

/// A kubelet writes a new token before the old one expires; one that the server refuses is read
/// again at once, though the client would keep it for a minute.
#[tokio::test]
async fn a_rotated_token_is_read_again() {
    let server = server();
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    server.set_token("second-token");
    server.drop_watches();
    server.delete(Kind::EndpointSlices, "default", "a-1");
    agent.silence().await;
    server.write_token("second-token").unwrap();
    let began = Instant::now();
    agent
        .until("let in again", |model| backends(model, "a") == Some(0))
        .await;
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
}

/// After an absence Services and slices change together, though their lists come one after the
/// other.
#[tokio::test]
async fn lists_after_an_absence_are_yielded_together() {
    let server = server();
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    agent.silence_until_watches(&server, 3).await;
    server.close().unwrap();
    server.apply_all([service("n", "10.96.0.7"), slice("n-1", "n", &["10.0.0.9"])]);
    server.expire();
    // Slices come later.
    server.faults(|faults| faults.refuse = Some(Refusal::status(500).of(Kind::EndpointSlices)));
    server.open().unwrap();
    let began = Instant::now();
    while server.watches() < 2 {
        assert!(began.elapsed() < LONG);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server.faults(|faults| faults.refuse = None);
    let batch = tokio::time::timeout(LONG, agent.events.recv())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(batch.len(), 2, "the Service and its slice: {batch:?}");
}

/// An object that cannot be read is named; all others are served, and so is it as it was before.
#[tokio::test]
async fn an_unreadable_object_is_named_and_the_rest_goes_on() {
    let server = server();
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    let mut broken = service("a", "10.96.0.1");
    broken["spec"]["ports"] = json!("none");
    server.apply(broken);
    server.apply(service("c", "10.96.0.3"));
    let events = agent
        .until("c", |model| backends(model, "c").is_some())
        .await;
    assert_eq!(events.len(), 1, "{events:?}");
    server.close().unwrap();
    server.expire();
    server.open().unwrap();
    agent.silence_until_watches(&server, 3).await;
    assert_eq!(backends(&agent.model, "a"), Some(1));
}

/// Node facts are live; a Node that is deleted leaves them, for the machine is still there.
#[tokio::test]
async fn node_facts_follow_the_node() {
    let server = server();
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    let mut moved = node("node-a");
    moved["metadata"]["labels"]["topology.kubernetes.io/zone"] = "zone-b".into();
    moved["status"]["addresses"][0]["address"] = "192.0.2.99".into();
    server.apply(moved);
    let new = "192.0.2.99".parse().unwrap();
    agent
        .until("other facts", |model| model.node().addresses.contains(&new))
        .await;
    assert_eq!(agent.model.node().zone.as_deref(), Some("zone-b"));
    assert_eq!(agent.model.node().addresses.len(), 1);
    server.delete(Kind::Nodes, "", "node-a");
    agent.until("the end", |model| model.node().leaves).await;
    assert!(
        agent.model.node().addresses.contains(&new),
        "the machine is still there"
    );
}

#[tokio::test]
async fn a_node_that_is_not_there_is_named_with_those_that_are() {
    let server = ApiServer::start().unwrap();
    server.apply_all((0..12).map(|number| node(&format!("node-{number:02}"))));
    let connection = Connection::new(Some(&server.kubeconfig()), Metrics::default())
        .await
        .unwrap();
    let message = missing_node(&connection.client(), "node-a").await;
    let names: Vec<String> = (0..10).map(|number| format!("node-{number:02}")).collect();
    assert_eq!(
        message,
        format!(
            "Node node-a is not in the cluster, so no endpoint counts as local by its name: check --node-name (Nodes: {}, …)",
            names.join(", ")
        )
    );
    // It does not keep the rest from being served.
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    // And it may come later.
    server.apply(node("node-a"));
    agent
        .until("the Node", |model| model.node().zone.is_some())
        .await;
}

/// Everything that needs a permission is asked for: the ClusterRole of `deploy/` has just these.
/// (`tests/deploy` has them too.)
#[tokio::test]
async fn the_role_allows_what_is_asked_for_and_nothing_else() {
    let server = server();
    // A name that no Node has is looked for among all; lists in pages need another verb than
    // streamed ones; Events are about objects that are got.
    server.delete(Kind::Nodes, "", "node-a");
    server.faults(|faults| faults.streaming = Streaming::Refused);
    let mut odd = service("a", "10.96.0.1");
    odd["spec"]["sessionAffinity"] = "Cookie".into();
    server.apply(odd);
    server.apply(slice("a-1", "a", &["127.0.0.1"]));
    let reports = Reports::default();
    let mut agent = Agent::start_reporting(server.kubeconfig(), None, reports.clone());
    agent.until("complete", Model::is_complete).await;
    // What is wrong with the configuration is told about the own Node.
    server.apply(node("node-a"));
    reports.report_here(Problem::new(
        "Node",
        &ObjectName::new("", "node-a"),
        "--config",
        "is not taken over",
    ));
    let began = Instant::now();
    while server.list(Kind::Events).len() < 3 || server.watches() < 3 {
        assert!(began.elapsed() < LONG);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let events = server.list(Kind::Events);
    let of_node = events
        .iter()
        .find(|event| event["regarding"]["kind"] == "Node")
        .unwrap();
    assert_eq!(of_node["regarding"]["name"], "node-a");
    assert_eq!(of_node["metadata"]["namespace"], "default");
    assert_eq!(
        of_node["note"],
        "on node node-a: --config: is not taken over"
    );
    let text = include_str!("../../../../deploy/base/rbac.yaml");
    let objects: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
    let role = objects
        .into_iter()
        .find(|object| object["kind"] == "ClusterRole")
        .unwrap();
    let role: ClusterRole = serde_json::from_value(role).unwrap();
    let mut allowed = BTreeSet::new();
    for rule in role.rules.unwrap() {
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                allowed.extend(
                    rule.verbs
                        .iter()
                        .map(|verb| format!("{group}/{resource} {verb}")),
                );
            }
        }
    }
    assert_eq!(server.permissions(), allowed);
}

/// SPEC F7 from the other side: with a name of its own, this proxy serves what carries the name and
/// nothing else.
#[tokio::test]
async fn a_proxy_with_a_name_serves_what_has_its_label() {
    const LABEL: &str = "service.kubernetes.io/service-proxy-name";
    let labelled = |mut object: Value, value: &str| {
        object["metadata"]["labels"][LABEL] = value.into();
        object
    };
    let server = ApiServer::start().unwrap();
    server.apply_all([
        labelled(service("ours", "10.96.0.1"), "shunt"),
        labelled(service("other", "10.96.0.2"), "another"),
        service("common", "10.96.0.3"),
        labelled(slice("ours-1", "ours", &["10.0.0.1"]), "shunt"),
        slice("common-1", "common", &["10.0.0.2"]),
        node("node-a"),
    ]);
    let mut agent = Agent::start_named(&server, Some("shunt"));
    let first = agent.until("complete", Model::is_complete).await;
    assert_eq!(first.len(), 4, "the others did not even come: {first:?}");
    assert_eq!(backends(&agent.model, "ours"), Some(1));

    // A Service that gives the label up is kube-proxy's from then on.
    server.apply(service("ours", "10.96.0.1"));
    agent
        .until("given up", |model| backends(model, "ours").is_none())
        .await;
    server.apply(labelled(service("common", "10.96.0.3"), "shunt"));
    agent
        .until("taken over", |model| backends(model, "common").is_some())
        .await;
}

async fn error_of(kubeconfig: Option<PathBuf>, node_name: &str) -> String {
    let source = Kubernetes::new(Config {
        kubeconfig,
        node_name: node_name.to_owned(),
        proxy_name: None,
        names: false,
        socket_lb_labels: false,
    });
    let error = source.run(mpsc::channel(1).0).await.unwrap_err();
    format!("{error:#}")
}

/// What cannot heal ends the source, with one line.
#[tokio::test]
async fn a_configuration_that_cannot_be_used_is_named() {
    let server = ApiServer::start().unwrap();
    assert_eq!(
        error_of(Some(server.kubeconfig()), "").await,
        "the own Node has no name: give --node-name (in a pod: from spec.nodeName)"
    );
    let error = error_of(Some("/no/such/kubeconfig".into()), "node-a").await;
    assert!(
        error.starts_with("--kubeconfig /no/such/kubeconfig: cannot be used"),
        "{error}"
    );
    let folder = tempfile::tempdir().unwrap();
    for (text, said) in [
        ("{ a: [", "cannot be used"),
        (
            "apiVersion: v1\nkind: Config\n",
            "its current context cannot be used",
        ),
        (
            "current-context: x\ncontexts: [{ name: x, context: { cluster: nowhere } }]\n",
            "its current context cannot be used",
        ),
        (
            "current-context: x\ncontexts: [{ name: x, context: { cluster: c, user: u } }]\n\
             clusters: [{ name: c, cluster: { server: 'https://192.0.2.1' } }]\nusers: [{ name: u, user: { tokenFile: /no/token } }]\n",
            "the credentials for https://192.0.2.1 cannot be used",
        ),
    ] {
        let path = folder.path().join("kubeconfig");
        std::fs::write(&path, text).unwrap();
        let error = error_of(Some(path), "node-a").await;
        assert!(error.contains(said), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

/// What can heal is one line that names the server, and what to do.
#[tokio::test]
async fn failures_say_what_to_do() {
    let server = server();
    let connection = Connection::new(Some(&server.kubeconfig()), Metrics::default())
        .await
        .unwrap();
    let ask = async || {
        let request = kube::core::Request::new("/api/v1/services");
        let answer = connection
            .send(request.list(&ListParams::default()).unwrap())
            .await;
        let (what, advice) = answer.unwrap_err().explain("services");
        format!("{what}; {advice}")
    };
    server.faults(|faults| faults.refuse = Some(Refusal::status(403)));
    let said = ask().await;
    assert!(
        said.ends_with("(403); allow list and watch on services (ClusterRole)"),
        "{said}"
    );
    server.faults(|faults| faults.refuse = None);
    server.set_token("another");
    let said = ask().await;
    assert!(
        said.starts_with("Unauthorized (401); give a kubeconfig or service account"),
        "{said}"
    );
    server.close().unwrap();
    let said = ask().await;
    let start = format!("https://{} cannot be reached: ", server.address());
    assert!(said.starts_with(&start), "{said}");
    assert!(said.contains("refused"), "{said}");
}

#[tokio::test]
async fn a_foreign_certificate_is_named() {
    let (server, other) = (server(), server());
    // The other's authority.
    std::fs::copy(other.certificate(), server.certificate()).unwrap();
    let connection = Connection::new(Some(&server.kubeconfig()), Metrics::default())
        .await
        .unwrap();
    let request = kube::core::Request::new("/api/v1/services");
    let answer = connection
        .send(request.list(&ListParams::default()).unwrap())
        .await;
    let (what, advice) = answer.unwrap_err().explain("services");
    assert!(what.contains("certificate"), "{what}");
    assert_eq!(advice, "check the certificate authority in the kubeconfig");
}

fn labelled(kind: &str, name: &str, node: &str, label: Option<&str>) -> Value {
    let labels: serde_json::Map<String, Value> = label
        .map(|label| (left_out::LABEL.to_owned(), label.into()))
        .into_iter()
        .collect();
    json!({
        "kind": kind,
        "metadata": { "name": name, "labels": labels },
        "spec": { "nodeName": node },
    })
}

/// Pods of this node only, by their own label or their Namespace's, as it comes and goes.
#[tokio::test]
async fn pods_that_are_left_out_of_the_socket_hook_follow_their_labels() {
    let server = server();
    server.apply_all([
        labelled("Pod", "p", "node-a", Some("off")),
        labelled("Pod", "q", "node-a", None),
        labelled("Pod", "r", "node-a", Some("on")),
        labelled("Pod", "elsewhere", "node-z", Some("off")),
    ]);
    let config = Config {
        socket_lb_labels: true,
        ..config(server.kubeconfig())
    };
    let mut agent = Agent::start_with(config, Reports::default());
    expect(&server, &mut agent, &["p"]).await;
    server.apply(labelled("Namespace", "default", "", Some("off")));
    expect(&server, &mut agent, &["p", "q"]).await;
    server.apply(labelled("Pod", "p", "node-a", Some("on")));
    expect(&server, &mut agent, &["q"]).await;
    server.apply(labelled("Pod", "r", "node-a", None));
    expect(&server, &mut agent, &["q", "r"]).await;
    server.delete(Kind::Pods, "default", "r");
    expect(&server, &mut agent, &["q"]).await;
    server.apply(labelled("Namespace", "default", "", None));
    expect(&server, &mut agent, &[]).await;
    server.apply(labelled("Pod", "q", "node-a", None));
    agent.silence().await;
}

/// Waits until the source says that these Pods are left out, and says nothing else of it before.
async fn expect(server: &ApiServer, agent: &mut Agent, pods: &[&str]) {
    let uid = |pod: &&str| {
        let pod = server.get(Kind::Pods, "default", pod).unwrap();
        pod["metadata"]["uid"].as_str().unwrap().into()
    };
    let pods: BTreeSet<Arc<str>> = pods.iter().map(uid).collect();
    loop {
        let batch = tokio::time::timeout(LONG, agent.events.recv()).await;
        for event in batch.unwrap().unwrap() {
            if let Event::LeftOut(uids) = event {
                assert_eq!(uids, pods);
                return;
            }
        }
    }
}
