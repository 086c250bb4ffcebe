//! Lists one kind of objects and watches it, for as long as the agent runs
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes>).
//!
//! Like client-go's reflector: the initial list is streamed where the server does that, read in
//! pages elsewhere; a watch goes on from the last version that was seen (bookmarks count); when
//! that version is gone the list is read again. Where it is stricter: versions never go back. A
//! server that tells old changes again (a lagging member of a cluster, a cache behind a proxy) is
//! not believed, and asked for a consistent list. Every object becomes what the agent keeps of it
//! as soon as it is read; a list is never whole in memory.

use std::{
    borrow::Cow,
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use kube::{
    api::{ListParams, WatchParams},
    client::Body,
    core::Request,
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use super::{
    super::kinds::Kind,
    connection::{Connection, root_cause},
    failure::{Failure, Status},
};

/// Objects in a page, as client-go has it.
const PAGE: u32 = 500;
/// A watch ends after 5 to 10 minutes (client-go); by chance, so that nodes do not come all at
/// once.
const WATCH_SECS: std::ops::Range<u64> = 300..600;
/// Servers send bookmarks every minute. When nothing comes for longer than that, the connection is
/// taken for dead.
const SILENCE: Duration = Duration::from_secs(100);
/// A watch whose version is gone is told so first thing.
const VERDICT: Duration = Duration::from_secs(1);
/// Within a list there should be no pauses; a server that does not know streaming sends its objects
/// and then nothing.
const LIST_SILENCE: Duration = Duration::from_secs(10);
/// A watch that lasted so long, or told something, is no reason to be patient with the next.
const STEADY: Duration = Duration::from_secs(2);
/// Between attempts: from one to the other, doubled each time; half of it by chance (client-go: 0.8
/// s to 30 s).
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A server that repeats itself is asked for a new list at most this often.
const DOUBT: Duration = Duration::from_secs(60);

/// What one kind's list and watch tell.
#[derive(Debug)]
pub(super) enum WatchEvent<T> {
    /// A complete list begins.
    Begin,
    /// One object of it.
    Listed(T),
    /// That was all: what was not listed does not exist.
    Complete,
    /// A watch goes on; nothing was missed.
    Watching,
    /// An object appeared or changed.
    Changed(T),
    /// An object is gone.
    Deleted(T),
    /// An object that this version cannot read: `namespace/name` and why.
    Unreadable(String, String),
    /// An attempt failed; there will be others.
    Failed(Failure),
}

/// Who is told; gone when that is `Err`.
#[derive(Debug)]
struct ReceiverGone;

enum Stop {
    Failed(Failure),
    Receiver,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<ReceiverGone> for Stop {
    fn from(_: ReceiverGone) -> Self {
        Self::Receiver
    }
}

/// Which objects.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    pub(super) labels: Option<String>,
    pub(super) fields: Option<String>,
}

/// A line of a watch.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type", borrow)]
    verb: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// A page of a list.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(default)]
    metadata: Meta,
    // null for an empty list.
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

/// What any object has.
#[derive(Default, Deserialize)]
struct Any {
    #[serde(default)]
    metadata: Meta,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Meta {
    namespace: String,
    name: String,
    resource_version: String,
    #[serde(rename = "continue")]
    next: String,
    annotations: Option<Annotations>,
}

/// Of all annotations, which may be long, the one that matters.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Annotations {
    /// On the bookmark that ends a streamed list (KEP 3157).
    #[serde(rename = "k8s.io/initial-events-end")]
    list_end: Option<IgnoredAny>,
}

/// A `resourceVersion`. Those of one kind can be compared as numbers (KEP 5504), which etcd's have
/// always been.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    text: String,
    number: Option<u64>,
}

impl Version {
    fn new(text: String) -> Self {
        Self {
            number: text.parse().ok(),
            text,
        }
    }
}

/// Lists and watches the objects of one kind.
pub(super) struct Follower<K, T, F, S> {
    connection: Arc<Connection>,
    request: Request,
    selection: Selection,
    /// What the agent keeps of an object.
    slim: F,
    /// Passes on what is told.
    events: S,
    /// Where the next watch goes on; `None`: a list is needed.
    version: Option<Version>,
    /// Whether the server streams lists, as far as is known.
    streams: bool,
    listed: Instant,
    /// Whether this attempt told something.
    progress: bool,
    /// Since when its watch goes on.
    began: Option<Instant>,
    kind: std::marker::PhantomData<fn(K) -> T>,
}

impl<K, T, C, F> Follower<K, T, F, mpsc::Sender<C>>
where
    K: Kind,
    C: From<WatchEvent<T>>,
    F: Fn(K) -> T,
{
    pub(super) fn new(
        connection: Arc<Connection>,
        selection: Selection,
        slim: F,
        events: mpsc::Sender<C>,
    ) -> Self {
        Self {
            connection,
            request: Request::new(K::PATH),
            selection,
            slim,
            events,
            version: None,
            streams: true,
            listed: Instant::now(),
            progress: false,
            began: None,
            kind: std::marker::PhantomData,
        }
    }

    /// Goes on until nobody listens.
    pub(super) async fn run(mut self) {
        let mut backoff = BACKOFF.0;
        loop {
            self.progress = false;
            self.began = None;
            let result = self.attempt().await;
            let was_steady = self.began.is_some_and(|began| began.elapsed() >= STEADY);
            if self.progress || was_steady {
                backoff = BACKOFF.0;
            }
            let mut pause = jitter(backoff);
            let mut was_unreachable = false;
            match result {
                Ok(()) if was_steady => pause = Duration::ZERO,
                Ok(()) => {}
                Err(Stop::Receiver) => return,
                Err(Stop::Failed(failure)) => {
                    if failure.is_gone() {
                        self.version = None;
                    }
                    was_unreachable = matches!(failure, Failure::Unreachable { .. });
                    if failure.may_need_credentials() {
                        self.connection.renew().await;
                    }
                    if let Some(asked) = failure.retry_after() {
                        pause = asked + jitter(BACKOFF.0);
                    }
                    if self.notify(WatchEvent::Failed(failure)).await.is_err() {
                        return;
                    }
                }
            }
            backoff = (backoff * 2).min(BACKOFF.1);
            self.connection.pause(pause, was_unreachable).await;
        }
    }

    async fn notify(&mut self, event: WatchEvent<T>) -> Result<(), ReceiverGone> {
        self.events
            .send(event.into())
            .await
            .map_err(|_| ReceiverGone)
    }

    /// One list where it is needed, and one watch.
    async fn attempt(&mut self) -> Result<(), Stop> {
        if self.version.is_none() && self.streams {
            match self.stream_list().await {
                Err(Stop::Failed(failure)) if failure.is_unsupported() => {
                    tracing::debug!(
                        "{}: initial lists are not streamed: {failure:?}",
                        self.request.url_path
                    );
                    self.streams = false;
                }
                result => return result,
            }
        }
        if self.version.is_none() {
            self.page_list().await?;
        }
        self.watch().await
    }

    async fn page_list(&mut self) -> Result<(), Stop> {
        self.notify(WatchEvent::Begin).await?;
        let mut params = ListParams {
            label_selector: self.selection.labels.clone(),
            field_selector: self.selection.fields.clone(),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        loop {
            let request = self.request.list(&params).map_err(unsendable)?;
            let body = self.connection.send(request).await?;
            let text = whole(body).await?;
            let page: Page<'_> = serde_json::from_slice(&text)
                .map_err(|error| Failure::Unreadable(error.to_string()))?;
            for item in page.items.into_iter().flatten() {
                match serde_json::from_str(item.get()) {
                    Ok(object) => self.notify(WatchEvent::Listed((self.slim)(object))).await?,
                    Err(error) => self.unreadable(item, &error).await?,
                }
            }
            if page.metadata.next.is_empty() {
                if page.metadata.resource_version.is_empty() {
                    return Err(
                        Failure::Unreadable("a list without resourceVersion".to_owned()).into(),
                    );
                }
                return self.listed(page.metadata.resource_version).await;
            }
            params.continue_token = Some(page.metadata.next);
        }
    }

    async fn listed(&mut self, version: String) -> Result<(), Stop> {
        self.version = Some(Version::new(version));
        self.listed = Instant::now();
        self.began = Some(self.listed);
        self.progress = true;
        Ok(self.notify(WatchEvent::Complete).await?)
    }

    /// A watch that begins with everything there is; on the same connection it goes on.
    async fn stream_list(&mut self) -> Result<(), Stop> {
        let mut params = self.watch_params();
        params.send_initial_events = true;
        // No version: the server makes sure that it is not behind (a "consistent read").
        let request = self.request.watch(&params, "").map_err(unsendable)?;
        let mut lines = Lines::new(self.connection.send(request).await?);
        self.notify(WatchEvent::Begin).await?;
        loop {
            let text = match lines.next(LIST_SILENCE).await {
                Ok(Some(text)) => text,
                Ok(None) => return Err(Failure::Cut("in the middle of a list".to_owned()).into()),
                Err(Failure::Silent(_)) => {
                    // The parameter was ignored: all objects are here, and nothing says so.
                    return Err(Failure::Status {
                        status: Status {
                            code: 400,
                            message: "the list does not end".to_owned(),
                        },
                        retry_after: None,
                    }
                    .into());
                }
                Err(failure) => return Err(failure.into()),
            };
            let line = parse(&text)?;
            match &*line.verb {
                "ADDED" | "MODIFIED" => match serde_json::from_str(line.object.get()) {
                    Ok(object) => self.notify(WatchEvent::Listed((self.slim)(object))).await?,
                    Err(error) => self.unreadable(line.object, &error).await?,
                },
                "BOOKMARK" => {
                    let meta = meta(line.object)?;
                    if meta.annotations.is_some_and(|all| all.list_end.is_some()) {
                        self.listed(meta.resource_version).await?;
                        return self.read(lines).await;
                    }
                }
                "ERROR" => return Err(error(line.object).into()),
                _ => {}
            }
        }
    }

    fn watch_params(&self) -> WatchParams {
        let secs = WATCH_SECS.start + chance() % (WATCH_SECS.end - WATCH_SECS.start);
        WatchParams {
            label_selector: self.selection.labels.clone(),
            field_selector: self.selection.fields.clone(),
            timeout: u32::try_from(secs).ok(),
            bookmarks: true,
            send_initial_events: false,
        }
    }

    async fn watch(&mut self) -> Result<(), Stop> {
        let from = self
            .version
            .as_ref()
            .map_or("", |version| version.text.as_str());
        let request = self
            .request
            .watch(&self.watch_params(), from)
            .map_err(unsendable)?;
        let lines = Lines::new(self.connection.send(request).await?);
        self.began = Some(Instant::now());
        self.read(lines).await
    }

    /// Reads a watch from [`Self::version`] until it ends.
    async fn read(&mut self, mut lines: Lines) -> Result<(), Stop> {
        let mut works = false;
        loop {
            let text = match lines.next(if works { SILENCE } else { VERDICT }).await {
                Err(Failure::Silent(_)) if !works => {
                    works = true;
                    self.notify(WatchEvent::Watching).await?;
                    continue;
                }
                text => text?,
            };
            let Some(text) = text else { return Ok(()) };
            let line = parse(&text)?;
            if line.verb == "ERROR" {
                return Err(error(line.object).into());
            }
            if !works {
                works = true;
                self.notify(WatchEvent::Watching).await?;
            }
            let version = Version::new(meta(line.object)?.resource_version);
            if self.is_old(&version) {
                if self.listed.elapsed() >= DOUBT {
                    self.version = None;
                    return Err(Failure::Cut(format!(
                        "it tells of version {} again",
                        version.text
                    ))
                    .into());
                }
                continue;
            }
            match &*line.verb {
                verb @ ("ADDED" | "MODIFIED" | "DELETED") => {
                    match serde_json::from_str(line.object.get()) {
                        Ok(object) => {
                            let object = (self.slim)(object);
                            self.notify(match verb {
                                "DELETED" => WatchEvent::Deleted(object),
                                _ => WatchEvent::Changed(object),
                            })
                            .await?;
                        }
                        Err(error) => self.unreadable(line.object, &error).await?,
                    }
                }
                "BOOKMARK" => {}
                // Of a later version of the protocol.
                _ => continue,
            }
            self.progress = true;
            if !version.text.is_empty() {
                self.version = Some(version);
            }
        }
    }

    /// Whether a watch tells of what was before the version that is known. Bookmarks may repeat
    /// that one.
    fn is_old(&self, version: &Version) -> bool {
        let known = self.version.as_ref().and_then(|known| known.number);
        known
            .zip(version.number)
            .is_some_and(|(known, version)| version < known)
    }

    async fn unreadable(
        &mut self,
        object: &RawValue,
        error: &serde_json::Error,
    ) -> Result<(), Stop> {
        let meta = meta(object)?;
        let name = format!("{}/{}", meta.namespace, meta.name);
        Ok(self
            .notify(WatchEvent::Unreadable(name, error.to_string()))
            .await?)
    }
}

fn parse(text: &[u8]) -> Result<Line<'_>, Failure> {
    serde_json::from_slice(text).map_err(|error| Failure::Unreadable(error.to_string()))
}

fn meta(object: &RawValue) -> Result<Meta, Failure> {
    let any: Any = serde_json::from_str(object.get())
        .map_err(|error| Failure::Unreadable(error.to_string()))?;
    Ok(any.metadata)
}

/// An ERROR event.
fn error(object: &RawValue) -> Failure {
    match serde_json::from_str(object.get()) {
        Ok(status) => Failure::Status {
            status,
            retry_after: None,
        },
        Err(error) => Failure::Unreadable(error.to_string()),
    }
}

fn unsendable(error: kube::core::request::Error) -> Failure {
    Failure::Unreadable(error.to_string())
}

/// A body to its end.
pub(super) async fn whole(body: Body) -> Result<bytes::Bytes, Failure> {
    match timeout(SILENCE, body.collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) => Err(Failure::Cut(root_cause(&error))),
        Err(_) => Err(Failure::Silent(SILENCE)),
    }
}

/// A body line by line.
struct Lines {
    body: Body,
    buffer: BytesMut,
    /// So much of `buffer` has no line's end.
    scanned: usize,
}

impl Lines {
    fn new(body: Body) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            scanned: 0,
        }
    }

    /// The next line; `None` at an orderly end.
    async fn next(&mut self, silence: Duration) -> Result<Option<BytesMut>, Failure> {
        loop {
            if let Some(end) = self.buffer[self.scanned..]
                .iter()
                .position(|&byte| byte == b'\n')
            {
                let line = self.buffer.split_to(self.scanned + end);
                self.buffer.advance(1);
                self.scanned = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Some(line));
            }
            self.scanned = self.buffer.len();
            match timeout(silence, self.body.frame()).await {
                Err(_) => return Err(Failure::Silent(silence)),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Ok(Some(Err(error))) => return Err(Failure::Cut(root_cause(&error))),
                Ok(None) if self.buffer.is_empty() => return Ok(None),
                Ok(None) => return Err(Failure::Cut("in the middle of an object".to_owned())),
            }
        }
    }
}

/// A number by chance; std's hash keys are as good a source as any for spreading load.
fn chance() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// From half of a time to all of it.
pub(super) fn jitter(time: Duration) -> Duration {
    let half = time / 2;
    let nanos = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX).max(1);
    half + Duration::from_nanos(chance() % nanos)
}
