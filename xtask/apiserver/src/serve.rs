//! HTTP: lists, watches and writes
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/>).

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER},
};
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::{
    faults::{Gone, Streaming},
    selector::Selector,
    state::Shared,
    store::{Key, Kind, Object, Wanted},
};

type Body = Either<Full<Bytes>, Lines>;

/// What a watch sends, as it comes; an error tears the connection down.
pub(crate) struct Lines(mpsc::Receiver<io::Result<Bytes>>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let polled = self.0.poll_recv(context);
        polled.map(|line| line.map(|line| line.map(Frame::data)))
    }
}

type Answer = Response<Body>;

/// A request's path, understood.
struct Target {
    kind: Kind,
    namespace: Option<String>,
    name: Option<String>,
    subresource: Option<String>,
}

impl Target {
    fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let rest = match parts.as_slice() {
            ["api", "v1", rest @ ..]
            | [
                "apis",
                "discovery.k8s.io" | "events.k8s.io",
                "v1",
                rest @ ..,
            ] => rest,
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] => (Some((*namespace).to_owned()), rest),
            rest => (None, rest),
        };
        let (plural, rest) = rest.split_first()?;
        Some(Self {
            kind: Kind::ALL
                .into_iter()
                .find(|kind| kind.plural() == *plural)?,
            namespace,
            name: rest.first().map(|name| (*name).to_owned()),
            subresource: rest.get(1).map(|name| (*name).to_owned()),
        })
    }

    fn key(&self) -> Key {
        let namespace = self.namespace.clone().unwrap_or_default();
        (namespace, self.name.clone().unwrap_or_default())
    }
}

/// What a request line asks for, in the words of a ClusterRole: `group/resource verb`.
pub(crate) fn permission(line: &str) -> Option<String> {
    let (method, rest) = line.split_once(' ')?;
    let uri = rest.split(' ').next()?;
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let target = Target::parse(path)?;
    let group = match path.strip_prefix("/apis/") {
        Some(rest) => rest.split('/').next()?,
        None => "",
    };
    let watches = query
        .split('&')
        .any(|pair| pair == "watch=true" || pair == "watch=1");
    let verb = match method {
        "GET" if target.name.is_some() => "get",
        "GET" if watches => "watch",
        "GET" => "list",
        "POST" => "create",
        "PUT" => "update",
        "PATCH" => "patch",
        _ => "delete",
    };
    Some(format!("{group}/{} {verb}", target.kind.plural()))
}

/// Answers one request.
pub(crate) async fn answer(
    request: Request<Incoming>,
    shared: Arc<Shared>,
) -> Result<Answer, Infallible> {
    let path = request.uri().path().to_owned();
    let query = parse_query(request.uri().query().unwrap_or_default());
    let target = Target::parse(&path);
    let faults = {
        let mut state = shared.lock();
        // Over HTTP/2 a URI has scheme and host too.
        let uri = request
            .uri()
            .path_and_query()
            .map_or("", |uri| uri.as_str());
        state.requests.push(format!(
            "{} {uri} {:?}",
            request.method(),
            request.version()
        ));
        state.faults.clone()
    };
    if faults.frozen {
        shared.until_changed(|state| !state.faults.frozen).await;
    }
    let bearer = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    if bearer != Some(shared.lock().token.as_str()) {
        return Ok(failure(401, "Unauthorized", "Unauthorized"));
    }
    if let Some(refuse) = &faults.refuse
        && refuse
            .kind
            .is_none_or(|kind| target.as_ref().is_some_and(|target| target.kind == kind))
    {
        let reason = match refuse.status {
            403 => "Forbidden",
            410 => "Expired",
            429 => "TooManyRequests",
            _ => "InternalError",
        };
        let message = match (&target, refuse.status) {
            (Some(target), 403) => format!(
                "{} is forbidden: User \"system:serviceaccount:kube-system:shunt\" cannot list resource \"{0}\"",
                target.kind.plural()
            ),
            _ => format!("this server answers {} for now", refuse.status),
        };
        let mut answer = failure(refuse.status, reason, &message);
        if let Some(seconds) = refuse.retry_after {
            answer.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        return Ok(answer);
    }
    let Some(target) = target else {
        return Ok(match path.as_str() {
            "/version" => ok(
                200,
                &json!({ "major": "1", "minor": "34", "gitVersion": "v1.34.0" }),
            ),
            "/healthz" | "/livez" | "/readyz" => ok(200, &json!("ok")),
            _ => failure(
                404,
                "NotFound",
                "the server could not find the requested resource",
            ),
        });
    };
    let method = request.method().clone();
    Ok(match method {
        Method::GET if target.name.is_some() => get(&target, &shared),
        Method::GET => {
            let wanted = match wanted(&target, &query) {
                Ok(wanted) => wanted,
                Err(message) => return Ok(failure(400, "BadRequest", &message)),
            };
            if query
                .get("watch")
                .is_some_and(|value| value == "true" || value == "1")
            {
                watch(target.kind, wanted, &query, shared)
            } else {
                let metadata_only = request.headers().get(ACCEPT).is_some_and(|accept| {
                    accept
                        .to_str()
                        .is_ok_and(|accept| accept.contains("as=PartialObjectMetadataList"))
                });
                list(target.kind, &wanted, &query, metadata_only, &shared)
            }
        }
        method => match request.into_body().collect().await {
            Ok(body) => write(&method, &target, &body.to_bytes(), &shared),
            Err(_) => failure(400, "BadRequest", "the request's body was cut off"),
        },
    })
}

/// Key and value, with percent signs decoded.
fn parse_query(query: &str) -> BTreeMap<String, String> {
    let decode = |text: &str| {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            bytes.push(match byte {
                b'+' => b' ',
                b'%' => {
                    let digits: Vec<u8> = rest.by_ref().take(2).collect();
                    let digits = std::str::from_utf8(&digits).unwrap_or_default();
                    u8::from_str_radix(digits, 16).unwrap_or(b'%')
                }
                byte => byte,
            });
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

fn wanted(target: &Target, query: &BTreeMap<String, String>) -> Result<Wanted, String> {
    let selector = |name: &str| Selector::parse(query.get(name).map_or("", String::as_str));
    Ok(Wanted {
        namespace: target.namespace.clone(),
        labels: selector("labelSelector")?,
        fields: selector("fieldSelector")?,
    })
}

fn ok(status: u16, value: &Value) -> Answer {
    json_answer(status, value.to_string())
}

fn json_answer(status: u16, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Either::Left(Full::new(text.into())));
    *answer.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    answer.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/json"),
    );
    answer
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code, "reason": reason, "message": message,
    })
}

fn failure(code: u16, reason: &str, message: &str) -> Answer {
    ok(code, &status(code, reason, message))
}

fn expired() -> Value {
    status(
        410,
        "Expired",
        "The resourceVersion for the provided watch is too old.",
    )
}

fn get(target: &Target, shared: &Shared) -> Answer {
    match shared.lock().store.get(target.kind, &target.key()) {
        Some(object) => json_answer(200, object.json.clone()),
        None => not_found(target),
    }
}

fn not_found(target: &Target) -> Answer {
    let name = target.name.as_deref().unwrap_or_default();
    failure(
        404,
        "NotFound",
        &format!("{} \"{name}\" not found", target.kind.plural()),
    )
}

/// A page: objects in the order of their names, and `continue` with the list's version and the last
/// name.
fn list(
    kind: Kind,
    wanted: &Wanted,
    query: &BTreeMap<String, String>,
    metadata_only: bool,
    shared: &Shared,
) -> Answer {
    let state = shared.lock();
    let limit = query
        .get("limit")
        .and_then(|limit| limit.parse().ok())
        .filter(|&limit| limit > 0);
    let limit: usize = limit.unwrap_or(usize::MAX).min(state.faults.page);
    let token = query.get("continue").filter(|token| !token.is_empty());
    let from = match token.map(|token| parse_continue(token)) {
        None => None,
        Some(Some((version, _))) if version < state.store.oldest => {
            return failure(
                410,
                "Expired",
                "The provided continue parameter is too old to display a consistent list result.",
            );
        }
        Some(Some(from)) => Some(from),
        Some(None) => return failure(400, "BadRequest", "continue key is not valid"),
    };
    let version = from
        .as_ref()
        .map_or(state.store.version, |(version, _)| *version);
    let mut objects = state
        .store
        .objects_after(kind, from.as_ref().map(|(_, key)| key))
        .filter(|object| wanted.matches(object))
        .peekable();
    let mut items: Vec<&Arc<Object>> = Vec::new();
    while items.len() < limit
        && let Some(object) = objects.next()
    {
        items.push(object);
    }
    let next = match (objects.peek(), items.last()) {
        (Some(_), Some(last)) => format!("{version} {} {}", last.key.0, last.key.1),
        _ => String::new(),
    };
    let metadata = json!({ "resourceVersion": version.to_string(), "continue": next });
    let (list, api_version) = if metadata_only {
        ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1")
    } else {
        (format!("{}List", kind.kind()), kind.api_version())
    };
    let mut text = format!(
        r#"{{"kind":"{list}","apiVersion":"{api_version}","metadata":{metadata},"items":["#
    )
    .into_bytes();
    for (i, object) in items.into_iter().enumerate() {
        if i > 0 {
            text.push(b',');
        }
        if metadata_only {
            let value: Value = serde_json::from_slice(&object.json).unwrap_or_default();
            text.extend(json!({ "metadata": value["metadata"] }).to_string().bytes());
        } else {
            // A list's items lack what the list says of all.
            text.extend_from_slice(&object.json);
        }
    }
    text.extend_from_slice(b"]}");
    json_answer(200, text)
}

fn parse_continue(token: &str) -> Option<(u64, Key)> {
    let mut parts = token.splitn(3, ' ');
    let version = parts.next()?.parse().ok()?;
    Some((
        version,
        (parts.next()?.to_owned(), parts.next()?.to_owned()),
    ))
}

fn line(kind: &str, object: &[u8]) -> Bytes {
    let mut line = format!(r#"{{"type":"{kind}","object":"#).into_bytes();
    line.extend_from_slice(object);
    line.extend_from_slice(b"}\n");
    line.into()
}

fn bookmark(kind: Kind, version: u64, ends_list: bool) -> Bytes {
    let mut metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
    if ends_list {
        metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
    }
    let object =
        json!({ "kind": kind.kind(), "apiVersion": kind.api_version(), "metadata": metadata });
    line("BOOKMARK", object.to_string().as_bytes())
}

fn watch(
    kind: Kind,
    wanted: Wanted,
    query: &BTreeMap<String, String>,
    shared: Arc<Shared>,
) -> Answer {
    let flag = |name: &str| {
        query
            .get(name)
            .is_some_and(|value| value == "true" || value == "1")
    };
    let bookmarks = flag("allowWatchBookmarks");
    let asked = query
        .get("resourceVersion")
        .filter(|version| !version.is_empty());
    let Ok(from) = asked.map_or(Ok(0), |version| version.parse::<u64>()) else {
        return failure(400, "BadRequest", "resourceVersion is no number");
    };
    let seconds = query
        .get("timeoutSeconds")
        .and_then(|seconds| seconds.parse().ok());
    let mut first: Vec<Bytes> = Vec::new();
    let state = shared.lock();
    let store = &state.store;
    let streams = flag("sendInitialEvents") && state.faults.streaming != Streaming::Ignored;
    let mut gone = false;
    let mut position = from;
    if flag("sendInitialEvents") && state.faults.streaming == Streaming::Refused {
        return failure(
            422,
            "Invalid",
            "ListOptions.meta.k8s.io \"\" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch \
             unless the WatchList feature gate is enabled",
        );
    }
    if streams
        && (!bookmarks
            || query.get("resourceVersionMatch").map(String::as_str) != Some("NotOlderThan"))
    {
        return failure(
            422,
            "Invalid",
            "sendInitialEvents: needs allowWatchBookmarks and resourceVersionMatch NotOlderThan",
        );
    }
    if streams || from == 0 {
        position = store.version;
        let objects = store.objects(kind).filter(|object| wanted.matches(object));
        first.extend(objects.map(|object| line("ADDED", &object.json)));
        if streams {
            first.push(bookmark(kind, position, true));
        }
    } else if from < store.oldest {
        if state.faults.gone == Gone::Status {
            return ok(410, &expired());
        }
        first.push(line("ERROR", expired().to_string().as_bytes()));
        gone = true;
    } else if state.faults.replay > 0 {
        for change in store.changes_before(kind, from, state.faults.replay) {
            first.extend(
                change
                    .event(&wanted)
                    .map(|(verb, object)| line(verb, &object.json)),
            );
        }
    }
    gone |= state.faults.short_watches;
    let interval = state.faults.bookmarks;
    let watcher = Watcher {
        kind,
        wanted,
        position,
        bookmarks: bookmarks.then_some(interval),
        until: Instant::now() + Duration::from_secs(seconds.unwrap_or(1800)),
        drops: state.drops,
        cuts: state.cuts,
        marks: state.marks,
    };
    drop(state);
    let (sender, body) = mpsc::channel(16);
    shared.watches.fetch_add(1, Ordering::Relaxed);
    tokio::spawn(async move {
        watcher.run(first, gone, sender, &shared).await;
        shared.watches.fetch_sub(1, Ordering::Relaxed);
    });
    let mut answer = Response::new(Either::Right(Lines(body)));
    answer.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/json"),
    );
    answer
}

/// One watch that goes on.
struct Watcher {
    kind: Kind,
    wanted: Wanted,
    /// The version that its client knows.
    position: u64,
    bookmarks: Option<Duration>,
    until: Instant,
    drops: u64,
    cuts: u64,
    marks: u64,
}

impl Watcher {
    async fn run(
        mut self,
        first: Vec<Bytes>,
        ends: bool,
        sender: mpsc::Sender<io::Result<Bytes>>,
        shared: &Shared,
    ) {
        for line in first {
            if sender.send(Ok(line)).await.is_err() {
                return;
            }
        }
        if ends {
            return;
        }
        let mut generation = shared.generation.subscribe();
        let mut next_bookmark = Instant::now() + self.bookmarks.unwrap_or_default();
        loop {
            generation.mark_unchanged();
            let mut lines = Vec::new();
            let cut = {
                let state = shared.lock();
                if state.drops != self.drops {
                    return;
                }
                let cut = state.cuts != self.cuts;
                if !state.faults.frozen {
                    for change in state.store.changes(self.kind, self.position) {
                        let event = change.event(&self.wanted);
                        lines.extend(event.map(|(verb, object)| line(verb, &object.json)));
                    }
                    self.position = state.store.version;
                    let due = Instant::now() >= next_bookmark || state.marks != self.marks;
                    self.marks = state.marks;
                    if let Some(interval) = self.bookmarks
                        && due
                    {
                        next_bookmark = Instant::now() + interval;
                        lines.push(bookmark(self.kind, self.position, false));
                    }
                }
                cut.then(|| {
                    let object = state.store.objects(self.kind).next();
                    let whole = object.map_or_else(
                        || bookmark(self.kind, 1, false),
                        |object| line("MODIFIED", &object.json),
                    );
                    whole.slice(..whole.len() / 2)
                })
            };
            for line in lines {
                if sender.send(Ok(line)).await.is_err() {
                    return;
                }
            }
            if let Some(half) = cut {
                if sender.send(Ok(half)).await.is_ok() {
                    // What was sent must be on its way before the connection is torn down.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    let _ = sender.send(Err(io::Error::other("cut"))).await;
                }
                return;
            }
            tokio::select! {
                changed = generation.changed() => if changed.is_err() { return },
                () = sleep_until(next_bookmark), if self.bookmarks.is_some() => {}
                () = sleep_until(self.until) => return,
                // Its client has gone, or its connection was closed.
                () = sender.closed() => return,
            }
        }
    }
}

fn write(method: &Method, target: &Target, body: &[u8], shared: &Shared) -> Answer {
    let mut state = shared.lock();
    let answer = match *method {
        Method::DELETE => match state.store.delete(target.kind, &target.key()) {
            true => ok(
                200,
                &json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" }),
            ),
            false => not_found(target),
        },
        Method::POST | Method::PUT | Method::PATCH => {
            let Ok(mut value) = serde_json::from_slice::<Value>(body) else {
                return failure(400, "BadRequest", "the body is no JSON");
            };
            if value["kind"].is_null() {
                value["kind"] = json!(target.kind.kind());
            }
            if let Some(namespace) = &target.namespace {
                value["metadata"]["namespace"] = json!(namespace);
            }
            if let Some(name) = &target.name {
                value["metadata"]["name"] = json!(name);
            } else if value["metadata"]["name"].is_null()
                && let Some(prefix) = value["metadata"]["generateName"].as_str()
            {
                value["metadata"]["name"] = json!(format!("{prefix}{}", state.store.version));
            }
            let key = (
                target.namespace.clone().unwrap_or_default(),
                value["metadata"]["name"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
            );
            let old = state.store.get(target.kind, &key).cloned();
            if *method == Method::POST && old.is_some() {
                return failure(
                    409,
                    "AlreadyExists",
                    &format!("{} \"{}\" already exists", target.kind.plural(), key.1),
                );
            }
            if let Some(old) = old
                && let Ok(mut merged) = serde_json::from_slice::<Value>(&old.json)
                && target.subresource.as_deref() == Some("status")
            {
                // Of a status request only the status counts.
                merged["status"] = value["status"].take();
                value = merged;
            }
            match state.store.set(value) {
                Ok(object) => json_answer(
                    if *method == Method::POST { 201 } else { 200 },
                    object.json.clone(),
                ),
                Err(message) => failure(422, "Invalid", &message),
            }
        }
        _ => failure(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        ),
    };
    drop(state);
    shared.notify();
    answer
}
