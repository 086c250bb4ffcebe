//! The lab's end of a worker process.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    netns::NetNs,
    protocol::{Answer, Dial, DialError, Proto, Reply, Request},
    worker,
};

/// Makes `command` start in a cgroup.
pub(crate) fn join_cgroup(command: &mut Command, cgroup: &Path) -> Result<()> {
    let path = cgroup.join("cgroup.procs");
    let procs = std::fs::File::options()
        .write(true)
        .open(&path)
        .with_context(|| format!("cgroup {}: cannot open", path.display()))?;
    let join = move || {
        rustix::io::write(procs.as_fd(), b"0")
            .map(drop)
            .map_err(std::io::Error::from)
    };
    // SAFETY: between fork and exec only the write system call is made, on a descriptor opened
    // before.
    unsafe { command.pre_exec(join) };
    Ok(())
}

/// A worker process; it ends with this value.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    pipes: Option<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Worker {
    /// Starts this program again as a worker.
    pub(crate) fn start(ns: &NetNs, cgroup: &Path) -> Result<Self> {
        worker::linked();
        // In the child that is still this program's file, even if it was built anew since it
        // started.
        let mut command = Command::new("/proc/self/exe");
        command
            .env(worker::ENV, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        join_cgroup(&mut command, cgroup)?;
        ns.enter(&mut command)?;
        let mut child = command
            .spawn()
            .with_context(|| format!("namespace {}: cannot start a worker", ns.name()))?;
        let pipes = child
            .stdin
            .take()
            .zip(child.stdout.take().map(BufReader::new));
        Ok(Self { child, pipes })
    }

    pub(crate) fn request(&mut self, request: &Request) -> Result<Reply> {
        let (stdin, stdout) = self.pipes.as_mut().context("its pipes are closed")?;
        let mut text = serde_json::to_string(request)?;
        text.push('\n');
        stdin.write_all(text.as_bytes()).context("it has ended")?;
        let mut line = String::new();
        if stdout.read_line(&mut line).context("it has ended")? == 0 {
            bail!("it has ended");
        }
        match serde_json::from_str(&line).with_context(|| format!("unreadable reply {line:?}"))? {
            Reply::Failed(message) => bail!("{message}"),
            reply => Ok(reply),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.pipes = None;
        // It ends at the closed pipe, unless it is in the middle of a request.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process with sockets in one namespace; cheap to clone, ends with the last clone and the last
/// [`Conn`].
#[derive(Clone, Debug)]
pub struct Client {
    worker: Arc<Mutex<Worker>>,
    name: Arc<str>,
}

/// What became of [`Client::many`].
#[derive(Clone, Debug, Default)]
pub struct Many {
    /// Answers by server.
    pub servers: BTreeMap<String, u64>,
    /// Failures by message.
    pub errors: BTreeMap<String, u64>,
    /// Each answer's latency, sorted.
    pub latencies: Vec<Duration>,
}

impl Many {
    /// The latency that the given share of answers (0.5: the median) did not exceed; `None` without
    /// answers.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let last = self.latencies.len().checked_sub(1)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index into a vector, rounded"
        )]
        let index = (last as f64 * share.clamp(0.0, 1.0)).round() as usize;
        self.latencies.get(index).copied()
    }
}

/// Numbers sockets within their workers.
static NEXT_SOCKET: AtomicU32 = AtomicU32::new(0);

impl Client {
    pub(crate) fn start(name: &str, ns: &NetNs, cgroup: &Path) -> Result<Self> {
        Ok(Self {
            worker: Arc::new(Mutex::new(Worker::start(ns, cgroup)?)),
            name: name.into(),
        })
    }

    /// Where it runs.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.worker
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pid()
    }

    /// Connects, sends one request, reads the answer until the server closes.
    ///
    /// # Errors
    ///
    /// What the socket says, by step.
    pub fn tcp(&self, to: SocketAddr) -> Result<Answer, DialError> {
        self.once(Proto::Tcp, to, &Dial::default())
    }

    /// One datagram from an unconnected socket, and its answer.
    ///
    /// # Errors
    ///
    /// What the socket says, by step.
    pub fn udp(&self, to: SocketAddr) -> Result<Answer, DialError> {
        self.once(Proto::Udp, to, &Dial::default())
    }

    /// One datagram from a connected socket, and its answer.
    ///
    /// # Errors
    ///
    /// What the socket says, by step.
    pub fn udp_connected(&self, to: SocketAddr) -> Result<Answer, DialError> {
        self.once(
            Proto::Udp,
            to,
            &Dial {
                connected: true,
                ..Dial::default()
            },
        )
    }

    /// One request on a fresh socket.
    ///
    /// # Errors
    ///
    /// What the socket says, by step.
    pub fn once(&self, proto: Proto, to: SocketAddr, dial: &Dial) -> Result<Answer, DialError> {
        match self.request(&Request::Once {
            proto,
            to,
            dial: dial.clone(),
        })? {
            Reply::Answer(answer) => answer,
            other => Err(DialError::Worker(format!("unexpected reply {other:?}"))),
        }
    }

    /// `count` TCP requests, each on a fresh connection; how many each server answered.
    ///
    /// # Errors
    ///
    /// When any of them failed: the failures with their counts.
    pub fn tcp_many(&self, to: SocketAddr, count: u32) -> Result<BTreeMap<String, u64>, DialError> {
        self.all(Proto::Tcp, to, count)
    }

    /// `count` datagrams, each from a fresh socket; how many each server answered.
    ///
    /// # Errors
    ///
    /// When any of them failed: the failures with their counts.
    pub fn udp_many(&self, to: SocketAddr, count: u32) -> Result<BTreeMap<String, u64>, DialError> {
        self.all(Proto::Udp, to, count)
    }

    fn all(
        &self,
        proto: Proto,
        to: SocketAddr,
        count: u32,
    ) -> Result<BTreeMap<String, u64>, DialError> {
        let many = self.many(proto, to, count, &Dial::default())?;
        if many.errors.is_empty() {
            Ok(many.servers)
        } else {
            Err(DialError::Worker(format!(
                "{proto} {to} from {}: {:?}, answered by {:?}",
                self.name, many.errors, many.servers
            )))
        }
    }

    /// `count` requests, each on a fresh socket, one after the other.
    ///
    /// # Errors
    ///
    /// Only when the worker fails; refused and unanswered requests are counted.
    pub fn many(
        &self,
        proto: Proto,
        to: SocketAddr,
        count: u32,
        dial: &Dial,
    ) -> Result<Many, DialError> {
        match self.request(&Request::Many {
            proto,
            to,
            dial: dial.clone(),
            count,
        })? {
            Reply::Many(outcome) => {
                let mut latencies: Vec<Duration> = outcome
                    .latencies
                    .into_iter()
                    .map(Duration::from_nanos)
                    .collect();
                latencies.sort_unstable();
                Ok(Many {
                    servers: outcome.servers,
                    errors: outcome.errors,
                    latencies,
                })
            }
            other => Err(DialError::Worker(format!("unexpected reply {other:?}"))),
        }
    }

    /// A TCP connection that stays open.
    ///
    /// # Errors
    ///
    /// What the socket says, by step.
    pub fn open_tcp(&self, to: SocketAddr) -> Result<Conn, DialError> {
        self.open(Proto::Tcp, to, &Dial::default())
    }

    /// A UDP socket that stays open and asks `to`, connected or not as `dial` says.
    ///
    /// # Errors
    ///
    /// What the socket says, by step.
    pub fn open_udp(&self, to: SocketAddr, dial: &Dial) -> Result<Conn, DialError> {
        self.open(Proto::Udp, to, dial)
    }

    /// A socket that stays open.
    ///
    /// # Errors
    ///
    /// What the socket says, by step.
    pub fn open(&self, proto: Proto, to: SocketAddr, dial: &Dial) -> Result<Conn, DialError> {
        let id = NEXT_SOCKET.fetch_add(1, Ordering::Relaxed);
        match self.request(&Request::Open {
            id,
            proto,
            to,
            dial: dial.clone(),
        })? {
            Reply::Opened(Ok((local, peer))) => Ok(Conn {
                client: self.clone(),
                id,
                local,
                peer,
            }),
            Reply::Opened(Err(error)) => Err(error),
            other => Err(DialError::Worker(format!("unexpected reply {other:?}"))),
        }
    }

    /// Listens here under a name, until the client goes: a server that is no pod, on a node or
    /// outside.
    ///
    /// # Errors
    ///
    /// When an address cannot be listened on.
    pub fn serve(&self, name: &str, listen: &[(Proto, SocketAddr)]) -> Result<(), DialError> {
        self.request(&Request::Serve {
            name: name.to_owned(),
            listen: listen.to_vec(),
        })
        .map(drop)
    }

    fn request(&self, request: &Request) -> Result<Reply, DialError> {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        worker
            .request(request)
            .map_err(|error| DialError::Worker(format!("{}: {error:#}", self.name)))
    }
}

/// A socket that stays open in its client's process; closed when dropped.
#[derive(Debug)]
pub struct Conn {
    client: Client,
    id: u32,
    /// `getsockname` when it was opened.
    pub local: SocketAddr,
    /// `getpeername` when it was opened; where it sends to if it is not connected.
    pub peer: SocketAddr,
}

impl Conn {
    /// Sends a line (UDP: a datagram) and reads the answer to it.
    ///
    /// # Errors
    ///
    /// What the socket says, by step; nothing within 3 s is a time-out.
    pub fn ask(&self, text: &str) -> Result<Answer, DialError> {
        self.ask_within(text, Dial::default().timeout)
    }

    /// As [`Self::ask`], with its own time-out.
    ///
    /// # Errors
    ///
    /// What the socket says, by step.
    pub fn ask_within(&self, text: &str, timeout: Duration) -> Result<Answer, DialError> {
        match self.client.request(&Request::Ask {
            id: self.id,
            text: text.to_owned(),
            timeout,
        })? {
            Reply::Answer(answer) => answer,
            other => Err(DialError::Worker(format!("unexpected reply {other:?}"))),
        }
    }
}

impl Conn {
    /// Asks another address from now on, by the same UDP socket; one that is connected is connected
    /// anew. Returns what `getpeername` says then, or where it sends to.
    ///
    /// # Errors
    ///
    /// What the socket says, by step.
    pub fn turn(&self, to: SocketAddr) -> Result<SocketAddr, DialError> {
        match self.client.request(&Request::Turn { id: self.id, to })? {
            Reply::Turned(peer) => peer,
            other => Err(DialError::Worker(format!("unexpected reply {other:?}"))),
        }
    }

    /// Sends a datagram to each of these addresses by an unconnected UDP socket, and then reads the
    /// answers, whatever their order.
    ///
    /// # Errors
    ///
    /// When the worker is gone; what is wrong with a datagram is in its answer's place.
    pub fn ask_all(
        &self,
        to: &[SocketAddr],
        timeout: Duration,
    ) -> Result<Vec<Result<Answer, DialError>>, DialError> {
        match self.client.request(&Request::AskAll {
            id: self.id,
            to: to.to_vec(),
            timeout,
        })? {
            Reply::Answers(answers) => Ok(answers),
            other => Err(DialError::Worker(format!("unexpected reply {other:?}"))),
        }
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        // A worker that is gone has closed it already.
        let _ = self.client.request(&Request::Close { id: self.id });
    }
}
