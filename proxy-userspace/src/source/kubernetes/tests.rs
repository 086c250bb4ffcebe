//! Against a server on the loopback device that speaks the list and watch protocol.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::broadcast,
};

use super::*;
use crate::{model::Model, object::NodeFacts};

/// As much of an API server as a reflector sees: lists in pages, watches, bookmarks, 410 Gone, errors, dropped connections.
struct ApiServer {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    /// By the last word of the path, then by name.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    version: u64,
    /// Every request's path and query.
    requests: Vec<String>,
    /// Answer everything with this status.
    refuse: Option<u16>,
    /// Watches that start below this version get 410 Gone.
    forgotten: u64,
    /// As the answer's status, not as a watch event.
    gone_as_status: bool,
    /// What watches were told.
    history: Vec<(u64, Told)>,
    watches: Option<broadcast::Sender<Told>>,
}

#[derive(Clone)]
enum Told {
    Event(String, Value),
    HangUp,
}

impl ApiServer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            shared: Arc::default(),
        };
        {
            let mut shared = server.shared.lock().unwrap();
            shared.version = 100;
            shared.watches = Some(broadcast::channel(64).0);
        }
        let shared = server.shared.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = shared.clone();
                tokio::spawn(async move {
                    // A client that goes away is its own business.
                    let _ = serve(stream, shared).await;
                });
            }
        });
        server
    }

    fn client(&self) -> Client {
        Client::try_from(kube::Config::new(format!("http://{}", self.address).parse().unwrap())).unwrap()
    }

    /// Changes an object; watches are told unless `silently`.
    fn change(&self, plural: &str, mut object: Value, silently: bool) {
        let mut shared = self.shared.lock().unwrap();
        shared.version += 1;
        object["metadata"]["resourceVersion"] = json!(shared.version.to_string());
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let known = shared
            .objects
            .entry(plural.to_owned())
            .or_default()
            .insert(name, object.clone());
        let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
        if !silently {
            shared.tell(Told::Event(
                plural.to_owned(),
                json!({ "type": kind, "object": object }),
            ));
        }
    }

    fn delete(&self, plural: &str, name: &str, silently: bool) {
        let mut shared = self.shared.lock().unwrap();
        shared.version += 1;
        let mut object = shared.objects.get_mut(plural).unwrap().remove(name).unwrap();
        object["metadata"]["resourceVersion"] = json!(shared.version.to_string());
        if !silently {
            shared.tell(Told::Event(
                plural.to_owned(),
                json!({ "type": "DELETED", "object": object }),
            ));
        }
    }

    /// Ends all watches; the versions of before are forgotten.
    fn forget(&self) {
        let mut shared = self.shared.lock().unwrap();
        shared.version += 1;
        shared.forgotten = shared.version;
        shared.tell(Told::HangUp);
    }

    fn refuse(&self, status: Option<u16>) {
        let mut shared = self.shared.lock().unwrap();
        shared.refuse = status;
        shared.tell(Told::HangUp);
    }

    fn requests(&self, containing: &str) -> usize {
        let shared = self.shared.lock().unwrap();
        shared
            .requests
            .iter()
            .filter(|request| request.contains(containing))
            .count()
    }
}

impl Shared {
    fn tell(&mut self, told: Told) {
        self.history.push((self.version, told.clone()));
        // Nobody watches: nobody is told.
        let _ = self.watches.as_ref().unwrap().send(told);
    }
}

async fn serve(stream: TcpStream, shared: Arc<Mutex<Shared>>) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while stream.read_line(&mut head).await? > 2 {}
        let Some(target) = head.split(' ').nth(1).map(str::to_owned) else {
            return Ok(());
        };
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let plural = path.rsplit('/').next().unwrap().to_owned();
        let query: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        let mut watches = None;
        let mut missed = Vec::new();
        let (status, body) = {
            let mut shared = shared.lock().unwrap();
            shared.requests.push(target.clone());
            let failure = |code: u16, reason: &str| json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason });
            if let Some(code) = shared.refuse {
                (code, failure(code, "Forbidden"))
            } else if query.get("watch") == Some(&"true") {
                let from: u64 = query["resourceVersion"].parse().unwrap();
                let gone = failure(GONE, "Expired");
                if from < shared.forgotten && shared.gone_as_status {
                    (GONE, gone)
                } else {
                    watches = Some(shared.watches.as_ref().unwrap().subscribe());
                    if from < shared.forgotten {
                        missed.push(Told::Event(plural.clone(), json!({ "type": "ERROR", "object": gone })));
                    } else {
                        missed.extend(
                            shared
                                .history
                                .iter()
                                .filter(|(at, _)| *at > from)
                                .map(|(_, told)| told.clone()),
                        );
                    }
                    (200, Value::Null)
                }
            } else {
                let wanted = |object: &&Value| match query.get("fieldSelector") {
                    Some(selector) => selector.ends_with(object["metadata"]["name"].as_str().unwrap()),
                    None => true,
                };
                let all: Vec<Value> = shared
                    .objects
                    .entry(plural.clone())
                    .or_default()
                    .values()
                    .filter(wanted)
                    .cloned()
                    .collect();
                // Pages of one object: `continue` is the number of those that were sent.
                let from: usize = query.get("continue").map_or(0, |from| from.parse().unwrap());
                let page: Vec<&Value> = all.iter().skip(from).take(1).collect();
                let next = if from + 1 < all.len() {
                    (from + 1).to_string()
                } else {
                    String::new()
                };
                (
                    200,
                    json!({ "metadata": { "resourceVersion": shared.version.to_string(), "continue": next }, "items": page }),
                )
            }
        };
        let Some(mut watches) = watches else {
            let body = body.to_string();
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            stream.write_all(answer.as_bytes()).await?;
            continue;
        };
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
            .await?;
        let mut missed = missed.into_iter();
        loop {
            let told = match missed.next() {
                Some(Told::HangUp) => continue,
                Some(told) => told,
                None => match watches.recv().await {
                    Ok(told) => told,
                    Err(_) => break,
                },
            };
            match told {
                Told::HangUp => break,
                Told::Event(of, event) if of == plural => {
                    let line = format!("{event}\n");
                    stream
                        .write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes())
                        .await?;
                }
                Told::Event(..) => {}
            }
        }
        // Without the last chunk: a connection that breaks.
        return Ok(());
    }
}

fn service(name: &str, ip: &str) -> Value {
    json!({ "metadata": { "namespace": "default", "name": name }, "spec": { "clusterIP": ip, "clusterIPs": [ip], "ports": [{ "port": 80 }] } })
}

fn slice(name: &str, service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|address| json!({ "addresses": [address] }))
        .collect();
    json!({
        "metadata": { "namespace": "default", "name": name, "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4", "ports": [{ "name": "", "port": 8080 }], "endpoints": endpoints,
    })
}

fn node(name: &str) -> Value {
    json!({
        "metadata": { "name": name, "labels": { "topology.kubernetes.io/zone": "zone-a" } },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }] },
    })
}

/// A source and who listens to it.
struct Agent {
    events: mpsc::Receiver<Vec<Event>>,
    model: Model,
}

impl Agent {
    fn start(server: &ApiServer) -> Self {
        Self::start_named(server, None)
    }

    fn start_named(server: &ApiServer, proxy_name: Option<&str>) -> Self {
        let source = Kubernetes::new(Config {
            kubeconfig: None,
            node_name: "node-a".to_owned(),
            proxy_name: proxy_name.map(str::to_owned),
        });
        let (tx, events) = mpsc::channel(16);
        let client = server.client();
        tokio::spawn(async move { source.run_with(client, tx).await.unwrap() });
        Self {
            events,
            model: Model::new(NodeFacts::default()),
        }
    }

    /// Takes events in until a condition holds; returns them.
    async fn until(&mut self, what: &str, holds: impl Fn(&Model) -> bool) -> Vec<Event> {
        let mut all = Vec::new();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
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
    differences_only(false).await;
}

#[tokio::test]
async fn lists_again_when_gone_is_the_answers_status() {
    differences_only(true).await;
}

async fn differences_only(gone_as_status: bool) {
    let server = ApiServer::start().await;
    server.shared.lock().unwrap().gone_as_status = gone_as_status;
    server.change("services", service("a", "10.96.0.1"), true);
    server.change("services", service("b", "10.96.0.2"), true);
    server.change("endpointslices", slice("a-1", "a", &["10.0.0.1"]), true);
    server.change("nodes", node("node-a"), true);
    server.change("nodes", node("node-z"), true);

    let mut agent = Agent::start(&server);
    let first = agent.until("complete", Model::is_complete).await;
    assert_eq!(first.iter().filter(|event| **event == Event::Complete).count(), 1);
    assert_eq!(first.last(), Some(&Event::Complete), "all lists before");
    assert_eq!(
        (backends(&agent.model, "a"), backends(&agent.model, "b")),
        (Some(1), Some(0))
    );
    assert_eq!(agent.model.node().zone.as_deref(), Some("zone-a"));
    assert!(agent.model.node().addresses.contains(&"192.0.2.1".parse().unwrap()));
    // The server leaves out what is not ours.
    for plural in ["/services?", "/endpointslices?"] {
        let shared = server.shared.lock().unwrap();
        let request = shared.requests.iter().find(|request| request.contains(plural)).unwrap();
        assert!(
            request.contains(
                "labelSelector=%21service.kubernetes.io%2Fheadless%2C%21service.kubernetes.io%2Fservice-proxy-name"
            ),
            "{request}"
        );
    }
    assert!(
        server.requests("/nodes?&limit=500&fieldSelector=metadata.name%3Dnode-a")
            + server.requests("fieldSelector=metadata.name%3Dnode-a")
            > 0
    );

    // A watch tells of changes; of those that change nothing here, nothing is yielded.
    server.change("endpointslices", slice("a-1", "a", &["10.0.0.1", "10.0.0.2"]), false);
    agent.until("a change", |model| backends(model, "a") == Some(2)).await;
    let mut annotated = service("a", "10.96.0.1");
    annotated["metadata"]["annotations"] = json!({ "a": "b" });
    server.change("services", annotated, false);
    agent.silence().await;
    server.delete("services", "b", false);
    agent.until("a deletion", |model| backends(model, "b").is_none()).await;

    // A gap: one Service is gone, one is new, one stays; then the list is read again.
    server.change("services", service("c", "10.96.0.3"), true);
    server.change("services", service("d", "10.96.0.4"), false);
    agent.until("d", |model| backends(model, "d").is_some()).await;
    server.delete("services", "d", true);
    server.forget();
    let again = agent
        .until("the list again", |model| {
            backends(model, "c").is_some() && backends(model, "d").is_none()
        })
        .await;
    assert_eq!(
        again.iter().filter(|event| matches!(event, Event::Service(_))).count(),
        1,
        "only c is new: {again:?}"
    );
    assert_eq!(
        again.last(),
        Some(&Event::ServiceGone(name("d"))),
        "deletions last: {again:?}"
    );
    agent.silence().await;

    // A server that refuses takes nothing away, and what happened meanwhile comes when it is back.
    server.refuse(Some(403));
    server.delete("endpointslices", "a-1", true);
    agent.silence().await;
    assert_eq!(backends(&agent.model, "a"), Some(2));
    server.forget();
    server.refuse(None);
    agent
        .until("the server is back", |model| backends(model, "a") == Some(0))
        .await;
}

#[tokio::test]
async fn a_node_that_is_not_there_is_named_with_those_that_are() {
    let server = ApiServer::start().await;
    server.change("nodes", node("node-y"), true);
    server.change("nodes", node("node-z"), true);
    let message = missing_node(&server.client(), "node-a").await;
    assert_eq!(
        message,
        "Node node-a is not in the cluster, so no endpoint counts as local by its name: check --node-name (Nodes: node-y, …)"
    );
    // It does not keep the rest from being served.
    let mut agent = Agent::start(&server);
    agent.until("complete", Model::is_complete).await;
    // And it may come later.
    server.change("nodes", node("node-a"), false);
    agent.until("the Node", |model| model.node().zone.is_some()).await;
}

#[tokio::test]
async fn no_node_name_is_an_error() {
    let server = ApiServer::start().await;
    let source = Kubernetes::new(Config {
        kubeconfig: None,
        node_name: String::new(),
        proxy_name: None,
    });
    let error = source.run_with(server.client(), mpsc::channel(1).0).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the own Node has no name: give --node-name (in a pod: from spec.nodeName)"
    );
}

#[tokio::test]
async fn a_kubeconfig_that_is_not_there_is_named() {
    let source = Kubernetes::new(Config {
        kubeconfig: Some("/no/such/kubeconfig".into()),
        node_name: "node-a".to_owned(),
        proxy_name: None,
    });
    let error = source.run(mpsc::channel(1).0).await.unwrap_err();
    assert_eq!(error.to_string(), "--kubeconfig /no/such/kubeconfig: cannot be used");
}

/// SPEC F7 from the other side: with a name of its own, this proxy serves what carries the name and nothing else.
#[tokio::test]
async fn a_proxy_with_a_name_serves_what_has_its_label() {
    const LABEL: &str = "service.kubernetes.io/service-proxy-name";
    let labelled = |mut object: Value, value: &str| {
        object["metadata"]["labels"][LABEL] = value.into();
        object
    };
    let server = ApiServer::start().await;
    // This server does not look at selectors, so the agent has to.
    server.change("services", labelled(service("ours", "10.96.0.1"), "shunt"), true);
    server.change("services", labelled(service("other", "10.96.0.2"), "another"), true);
    server.change("services", service("common", "10.96.0.3"), true);
    server.change(
        "endpointslices",
        labelled(slice("ours-1", "ours", &["10.0.0.1"]), "shunt"),
        true,
    );
    server.change("endpointslices", slice("common-1", "common", &["10.0.0.2"]), true);
    server.change("nodes", node("node-a"), true);
    let mut agent = Agent::start_named(&server, Some("shunt"));
    agent.until("complete", Model::is_complete).await;
    assert_eq!(backends(&agent.model, "ours"), Some(1));
    assert_eq!(
        (backends(&agent.model, "other"), backends(&agent.model, "common")),
        (None, None)
    );
    let wanted =
        "labelSelector=%21service.kubernetes.io%2Fheadless%2Cservice.kubernetes.io%2Fservice-proxy-name%3Dshunt";
    assert_eq!(
        ["/services?", "/endpointslices?"].map(|plural| {
            let shared = server.shared.lock().unwrap();
            let of = |request: &&String| request.contains(plural) && !request.contains(wanted);
            shared.requests.iter().filter(of).count()
        }),
        [0, 0]
    );

    // A Service that gives the label up is kube-proxy's from then on.
    server.change("services", service("ours", "10.96.0.1"), false);
    agent.until("given up", |model| backends(model, "ours").is_none()).await;
    server.change("services", labelled(service("common", "10.96.0.3"), "shunt"), false);
    agent
        .until("taken over", |model| backends(model, "common").is_some())
        .await;
}
