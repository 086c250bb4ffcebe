//! As much of an API server as an agent needs that lists and watches: lists in pages or as a
//! stream, and watches. Objects are written when they are asked for, so that a million endpoints
//! take no memory here.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context, Result};

use super::objects::{self, Generation};

/// The version of everything that was there at the start; changes count on from it.
const VERSION: u64 = 1_000_000;

/// A running server; its threads end with the process.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    services: u32,
    /// Watches of slices.
    watches: Mutex<Vec<TcpStream>>,
    /// When the last list ended, and what `at_end` said then.
    ended: Mutex<Option<(Instant, f64)>>,
    at_end: Box<dyn Fn() -> f64 + Send + Sync>,
}

/// What is listed.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Services,
    Slices,
    Nodes,
}

impl Kind {
    fn of(path: &str) -> Option<Self> {
        match path {
            "/api/v1/services" => Some(Self::Services),
            "/apis/discovery.k8s.io/v1/endpointslices" => Some(Self::Slices),
            "/api/v1/nodes" => Some(Self::Nodes),
            _ => None,
        }
    }

    /// `kind` and `apiVersion` of one object.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Services => ("Service", "v1"),
            Self::Slices => ("EndpointSlice", "discovery.k8s.io/v1"),
            Self::Nodes => ("Node", "v1"),
        }
    }

    fn count(self, services: u32) -> u32 {
        if self == Self::Nodes { 1 } else { services }
    }

    fn object(self, n: u32) -> String {
        match self {
            Self::Services => objects::service_json(n),
            Self::Slices => objects::slice_json(n, Generation(0), VERSION),
            Self::Nodes => objects::node_json(),
        }
    }
}

/// An event as watches tell it; the object names its kind, as lists' items do not.
fn event(kind: Kind, what: &str, object: &str) -> String {
    let (name, version) = kind.names();
    let rest = object.strip_prefix('{').unwrap_or(object);
    format!(
        "{{\"type\":\"{what}\",\"object\":{{\"kind\":\"{name}\",\"apiVersion\":\"{version}\",{rest}}}\n"
    )
}

impl Server {
    /// Serves in the network namespace of this thread; `at_end` is asked when a list of Services or
    /// slices ends.
    pub(super) fn start(
        services: u32,
        at_end: impl Fn() -> f64 + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("API server")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            services,
            watches: Mutex::default(),
            ended: Mutex::default(),
            at_end: Box::new(at_end),
        });
        let of_thread = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&of_thread);
                // A client that hangs up is its own business.
                thread::spawn(move || serve(stream, &shared));
            }
        });
        Ok(Self { address, shared })
    }

    /// When the last list was written, and what was noted then.
    pub(super) fn lists_ended(&self) -> Option<(Instant, f64)> {
        *self
            .shared
            .ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the watches of slices that one has changed; returns the time just before.
    pub(super) fn change(&self, n: u32, generation: u32) -> Result<Instant> {
        let object =
            objects::slice_json(n, Generation(generation), VERSION + u64::from(generation));
        let chunk = chunk(&event(Kind::Slices, "MODIFIED", &object));
        let mut watches = self
            .shared
            .watches
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        anyhow::ensure!(!watches.is_empty(), "nobody watches slices");
        let now = Instant::now();
        watches.retain_mut(|watch| watch.write_all(chunk.as_bytes()).is_ok());
        Ok(now)
    }
}

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

fn serve(stream: TcpStream, shared: &Shared) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut out = stream.try_clone().ok()?;
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    loop {
        // "GET /path?query HTTP/1.1", then headers, which change nothing here, then an empty line.
        let request = lines.next()?;
        while !lines.next()?.is_empty() {}
        let target = request.split(' ').nth(1)?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let parameter = |name: &str| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        };
        let Some(kind) = Kind::of(path) else {
            let body = r#"{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}"#;
            let head =
                "HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length:";
            write!(out, "{head} {}\r\n\r\n{body}", body.len()).ok()?;
            continue;
        };
        if parameter("watch").is_some_and(|value| value != "false" && value != "0") {
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
            out.write_all(head.as_bytes()).ok()?;
            if parameter("sendInitialEvents") == Some("true") {
                stream_list(&mut out, kind, shared)?;
            }
            if kind == Kind::Slices {
                shared
                    .watches
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(out);
            }
            // Open until the client hangs up; it sends nothing more.
            return lines.next().map(drop);
        }
        page(
            &mut out,
            kind,
            shared,
            parameter("limit"),
            parameter("continue"),
        )?;
    }
}

/// A page of a list.
fn page(
    out: &mut TcpStream,
    kind: Kind,
    shared: &Shared,
    limit: Option<&str>,
    from: Option<&str>,
) -> Option<()> {
    let count = kind.count(shared.services);
    let from: u32 = from.map_or(Some(0), |text| text.parse().ok())?;
    let limit = limit
        .and_then(|text| text.parse().ok())
        .filter(|&limit| limit > 0)
        .unwrap_or(count);
    let to = count.min(from.saturating_add(limit));
    let items: Vec<String> = (from..to).map(|n| kind.object(n)).collect();
    let next = if to < count {
        format!(
            ",\"continue\":\"{to}\",\"remainingItemCount\":{}",
            count - to
        )
    } else {
        String::new()
    };
    let (name, version) = kind.names();
    let body = format!(
        "{{\"kind\":\"{name}List\",\"apiVersion\":\"{version}\",\"metadata\":{{\"resourceVersion\":\"{VERSION}\"{next}}},\"items\":[{}]}}",
        items.join(",")
    );
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length:";
    write!(out, "{head} {}\r\n\r\n{body}", body.len()).ok()?;
    if to == count {
        note_end(kind, shared);
    }
    Some(())
}

/// A list as events, ended by the bookmark that says so (KEP-3157).
fn stream_list(out: &mut TcpStream, kind: Kind, shared: &Shared) -> Option<()> {
    for n in 0..kind.count(shared.services) {
        out.write_all(chunk(&event(kind, "ADDED", &kind.object(n))).as_bytes())
            .ok()?;
    }
    let end = format!(
        "{{\"metadata\":{{\"resourceVersion\":\"{VERSION}\",\"annotations\":{{\"k8s.io/initial-events-end\":\"true\"}}}}}}"
    );
    out.write_all(chunk(&event(kind, "BOOKMARK", &end)).as_bytes())
        .ok()?;
    note_end(kind, shared);
    Some(())
}

fn note_end(kind: Kind, shared: &Shared) {
    if kind != Kind::Nodes {
        let noted = (Instant::now(), (shared.at_end)());
        *shared.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(noted);
    }
}
