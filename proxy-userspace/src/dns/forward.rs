//! Names of others: asked of the node's own servers, kept for as long as they hold.
//!
//! A server is asked over UDP from a socket of its own each time, so that neither port nor number
//! can be guessed, and over TCP when the answer was cut. One that does not answer is asked last for
//! a while. The same question is asked once, however many want to know: that also ends a loop after
//! one round.
//!
//! **Loops.** A server that passes its questions on to us would be asked by us for ever. Each is
//! now and then asked for a name that nobody knows; one whose question comes back here is told of
//! and not asked until it does not.

use std::{
    cell::RefCell,
    collections::HashMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant, SystemTime},
};

use hickory_proto::{
    op::{Message, MessageType, Metadata, OpCode, ResponseCode},
    rr::{Name, RecordType},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::watch,
    time::timeout,
};
use tracing::{info, warn};

use super::{
    cache::{Cache, Key},
    metrics::Metrics,
    wire::{ClientEdns, MAX_UDP, PORT, Question},
};

/// A server has so long for an answer: two of them within the 5 s that a client's resolver waits.
const PATIENCE: Duration = Duration::from_secs(2);
/// A question is given up after so long.
const MOST: Duration = Duration::from_millis(4500);
/// Questions that are being asked at once: more are refused.
const MAX_FLIGHTS: usize = 1024;
/// One that did not answer is asked last for so long.
const AVOIDED: Duration = Duration::from_secs(10);
/// From one look for loops to the next.
const PROBES: Duration = Duration::from_secs(30);
/// A question that comes back does so within.
const PROBE_RETURNS: Duration = Duration::from_secs(2);
/// Names below this one are asked for to find loops: nobody has it, and who knows nothing of `arpa`
/// asks its servers.
const PROBE_DOMAIN: &str = "shunt-loop-check.arpa.";
/// From one look at `resolv.conf` to the next.
const LOOKS: Duration = Duration::from_secs(1);
/// Servers that are taken of `resolv.conf`
/// ([resolv.conf(5)](https://man7.org/linux/man-pages/man5/resolv.conf.5.html): three).
const MAX_SERVERS: usize = 3;

/// Where servers are named.
#[derive(Clone, Debug)]
pub enum Source {
    /// `--dns-upstream`.
    Given(Vec<SocketAddr>),
    /// A file as `/etc/resolv.conf`.
    File(PathBuf),
}

/// Asks others.
#[derive(Debug)]
pub struct Forwarder {
    source: Source,
    /// Where this server listens.
    own: Vec<SocketAddr>,
    servers: RefCell<Servers>,
    cache: RefCell<Cache>,
    flights: RefCell<HashMap<Key, watch::Receiver<Option<Outcome>>>>,
    metrics: Metrics,
}

/// What came of a question; `None`: nobody answered in a usable way.
type Outcome = Option<Rc<Message>>;

#[derive(Debug, Default)]
struct Servers {
    all: Vec<SocketAddr>,
    /// Asked last until then.
    avoided: HashMap<SocketAddr, Instant>,
    /// First label of the name that each was asked for, and whether it came back.
    probes: Vec<(String, SocketAddr, bool)>,
    looping: Vec<SocketAddr>,
}

impl Forwarder {
    /// One that knows its servers. `own`: where this server listens.
    pub fn new(source: Source, own: Vec<SocketAddr>, metrics: Metrics) -> Self {
        let forwarder = Self {
            source,
            own,
            servers: RefCell::default(),
            cache: RefCell::default(),
            flights: RefCell::default(),
            metrics,
        };
        forwarder.read_servers();
        forwarder
    }

    /// Whether there is anybody to ask.
    pub fn has_servers(&self) -> bool {
        !self.servers.borrow().all.is_empty()
    }

    /// Follows the servers' names and looks for loops, for ever.
    pub async fn watch(self: Rc<Self>) {
        let mut seen = self.signature();
        loop {
            self.probe().await;
            let next = tokio::time::Instant::now() + PROBES;
            while tokio::time::Instant::now() < next {
                tokio::time::sleep(LOOKS).await;
                let now = self.signature();
                if now != seen {
                    seen = now;
                    self.read_servers();
                    break;
                }
            }
        }
    }

    /// Whether a question is one of our own that has come back.
    pub fn is_own(&self, name: &Name) -> bool {
        let mut servers = self.servers.borrow_mut();
        if servers.probes.is_empty() || name.num_labels() != 3 {
            return false;
        }
        let text = name.to_ascii().to_lowercase();
        let Some(label) = text
            .strip_suffix(PROBE_DOMAIN)
            .and_then(|text| text.strip_suffix('.'))
        else {
            return false;
        };
        match servers.probes.iter_mut().find(|(probe, ..)| probe == label) {
            Some(probe) => {
                probe.2 = true;
                true
            }
            None => false,
        }
    }

    /// What the cache has.
    pub fn cached(&self, question: &Question, name: &Name) -> Option<Message> {
        let mut cache = self.cache.borrow_mut();
        if cache.is_empty() {
            return None;
        }
        let message = cache.get(&key(question, name), Instant::now());
        if message.is_some() {
            self.metrics.cache_hits.inc();
        }
        message
    }

    /// Asks for a name; `None`: nobody has answered in a usable way.
    pub async fn ask(self: &Rc<Self>, question: &Question, name: &Name) -> Option<Rc<Message>> {
        let key = key(question, name);
        let flight = self.flights.borrow().get(&key).cloned();
        let mut flight = match flight {
            Some(flight) => flight,
            None => self.take_off(key, question, name)?,
        };
        let outcome = flight.wait_for(Option::is_some).await.ok()?;
        outcome.clone().flatten()
    }

    fn take_off(
        self: &Rc<Self>,
        key: Key,
        question: &Question,
        name: &Name,
    ) -> Option<watch::Receiver<Option<Outcome>>> {
        if self.flights.borrow().len() >= MAX_FLIGHTS {
            self.metrics.overload.inc();
            return None;
        }
        self.metrics.cache_misses.inc();
        let (landed, flight) = watch::channel(None);
        self.flights
            .borrow_mut()
            .insert(key.clone(), flight.clone());
        let question = Question {
            name: name.clone(),
            ..question.clone()
        };
        let this = self.clone();
        tokio::task::spawn_local(async move {
            let outcome = timeout(MOST, this.fetch(&question)).await.ok().flatten();
            if let Some(message) = &outcome {
                let mut cache = this.cache.borrow_mut();
                cache.insert(key.clone(), message, Instant::now());
                let entries = i64::try_from(cache.len()).unwrap_or(i64::MAX);
                this.metrics.cache_entries.set(entries);
            }
            this.flights.borrow_mut().remove(&key);
            let _ = landed.send(Some(outcome.map(Rc::new)));
        });
        Some(flight)
    }

    /// Asks one server after the other, twice over.
    async fn fetch(&self, question: &Question) -> Option<Message> {
        let mut refusal = None;
        for round in 0..2 {
            for server in self.order() {
                let began = Instant::now();
                let answer = timeout(PATIENCE, exchange(server, question)).await;
                match answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(message) if is_final(&message) => {
                        self.metrics.upstream_answered(server, began.elapsed());
                        self.servers.borrow_mut().avoided.remove(&server);
                        return Some(message);
                    }
                    // It is there, and does not know: another may.
                    Ok(message) => {
                        self.metrics.upstream_failed(server);
                        refusal = Some(message);
                    }
                    Err(_) => {
                        self.metrics.upstream_failed(server);
                        let mut servers = self.servers.borrow_mut();
                        servers.avoided.insert(server, Instant::now() + AVOIDED);
                    }
                }
            }
            // What was refused once is refused again.
            if refusal.is_some() {
                break;
            }
            if round == 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        refusal
    }

    /// Those that do not loop; those that did not answer lately last.
    fn order(&self) -> Vec<SocketAddr> {
        let servers = self.servers.borrow();
        let now = Instant::now();
        let usable = servers
            .all
            .iter()
            .filter(|server| !servers.looping.contains(server));
        let is_avoided = |server: &&SocketAddr| {
            servers
                .avoided
                .get(*server)
                .is_some_and(|until| *until > now)
        };
        let (last, first): (Vec<_>, Vec<_>) = usable.partition(is_avoided);
        first.into_iter().chain(last).copied().collect()
    }

    async fn probe(&self) {
        let probes: Vec<(String, SocketAddr, bool)> = {
            let servers = self.servers.borrow();
            servers
                .all
                .iter()
                .map(|server| (nonce(), *server, false))
                .collect()
        };
        self.servers.borrow_mut().probes = probes.clone();
        let ask = |(label, server, _): &(String, SocketAddr, bool)| {
            let (name, server) = (format!("{label}.{PROBE_DOMAIN}"), *server);
            async move {
                let Ok(name) = Name::from_ascii(name) else {
                    return;
                };
                let question = Question {
                    metadata: Metadata::new(0, MessageType::Query, OpCode::Query),
                    name,
                    kind: RecordType::TXT,
                    edns: None,
                };
                let _ = timeout(PROBE_RETURNS, exchange(server, &question)).await;
            }
        };
        futures::future::join_all(probes.iter().map(ask)).await;
        let mut servers = self.servers.borrow_mut();
        let returned = servers.probes.iter().filter(|(_, _, returned)| *returned);
        let looping: Vec<SocketAddr> = returned.map(|(_, server, _)| *server).collect();
        for server in looping
            .iter()
            .filter(|server| !servers.looping.contains(server))
        {
            warn!(
                "--dns: the server {server} passes queries back to this one, in a circle; it is not asked while it does: name \
                 another with --dns-upstream"
            );
        }
        for server in servers
            .looping
            .iter()
            .filter(|server| !looping.contains(server))
        {
            info!("--dns: the server {server} does not pass queries back any more");
        }
        self.metrics
            .loops
            .set(i64::try_from(looping.len()).unwrap_or(i64::MAX));
        servers.looping = looping;
    }

    fn read_servers(&self) {
        let given = match &self.source {
            Source::Given(given) => given.clone(),
            Source::File(path) => match fs::read_to_string(path) {
                Ok(text) => servers_in(&text),
                Err(error) => {
                    warn!(
                        "--dns: {}: {error}; names outside of the cluster are not resolved",
                        path.display()
                    );
                    Vec::new()
                }
            },
        };
        let (own, all): (Vec<_>, Vec<_>) = given
            .into_iter()
            .partition(|server| self.own.contains(server));
        for server in own {
            warn!(
                "--dns: {server} is this server itself, and is not asked; name another with --dns-upstream"
            );
        }
        let shown: Vec<String> = all.iter().map(ToString::to_string).collect();
        match shown.is_empty() {
            true => warn!(
                "--dns: no server for names outside of the cluster; name one with --dns-upstream"
            ),
            false => info!("--dns: other names are asked of {}", shown.join(", ")),
        }
        let mut servers = self.servers.borrow_mut();
        servers.looping.retain(|server| all.contains(server));
        servers.avoided.clear();
        servers.all = all;
    }

    fn signature(&self) -> Option<(SystemTime, u64)> {
        let Source::File(path) = &self.source else {
            return None;
        };
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    }
}

fn key(question: &Question, name: &Name) -> Key {
    Key {
        name: name.to_lowercase(),
        kind: question.kind,
        dnssec_ok: question.edns.is_some_and(|edns: ClientEdns| edns.dnssec_ok),
        checking_disabled: question.metadata.checking_disabled,
    }
}

/// Whether an answer is the last word, and not that this server cannot or will not say.
fn is_final(message: &Message) -> bool {
    matches!(
        message.metadata.response_code,
        ResponseCode::NoError | ResponseCode::NXDomain
    )
}

/// A label that nobody guesses.
fn nonce() -> String {
    let number = || Message::query().metadata.id;
    format!(
        "{:04x}{:04x}{:04x}{:04x}",
        number(),
        number(),
        number(),
        number()
    )
}

/// One question and its answer, over TCP when it is cut.
async fn exchange(server: SocketAddr, question: &Question) -> io::Result<Message> {
    let id = Message::query().metadata.id;
    let query = question.query(id);
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    // From then on the kernel takes datagrams of that server only, and tells when it refuses.
    socket.connect(server).await?;
    socket.send(&query).await?;
    let mut buffer = vec![0; usize::from(MAX_UDP)];
    let message = loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(message) = answer_to(&buffer[..length], id, question) {
            break message;
        }
    };
    if !message.metadata.truncation {
        return Ok(message);
    }
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes(), &*query].concat())
        .await?;
    let length = stream.read_u16().await?;
    let mut buffer = vec![0; usize::from(length)];
    stream.read_exact(&mut buffer).await?;
    answer_to(&buffer, id, question).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A message, if it answers this question.
fn answer_to(bytes: &[u8], id: u16, question: &Question) -> Option<Message> {
    let message = Message::from_vec(bytes).ok()?;
    let is_answer =
        message.metadata.message_type == MessageType::Response && message.metadata.id == id;
    let about = message.queries.first();
    // Some leave the question out when they refuse.
    let is_about = about
        .is_none_or(|query| query.query_type() == question.kind && *query.name() == question.name);
    let needs_question = is_final(&message);
    (is_answer && is_about && (about.is_some() || !needs_question)).then_some(message)
}

/// Servers that a `resolv.conf` names.
pub(super) fn servers_in(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let rest = line.trim_start().strip_prefix("nameserver")?;
        let word = rest
            .starts_with([' ', '\t'])
            .then(|| rest.split_whitespace().next())??;
        parse_server(word)
    };
    text.lines().filter_map(server).take(MAX_SERVERS).collect()
}

/// An address, with the device of a link-local one behind a `%`.
fn parse_server(word: &str) -> Option<SocketAddr> {
    if let Ok(ip) = word.parse::<IpAddr>() {
        return Some(SocketAddr::new(ip, PORT));
    }
    let (ip, device) = word.split_once('%')?;
    let ip: Ipv6Addr = ip.parse().ok()?;
    let scope = device.parse().ok().or_else(|| {
        let index = fs::read_to_string(format!("/sys/class/net/{device}/ifindex")).ok()?;
        index.trim().parse().ok()
    })?;
    Some(std::net::SocketAddrV6::new(ip, PORT, 0, scope).into())
}
