//! What a lab and its worker processes say to each other: one JSON object per line.

use std::{collections::BTreeMap, fmt, net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

/// Transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP, one-to-one sockets (RFC 6458, section 4), where the kernel has them: see
    /// [`crate::has_sctp`].
    Sctp,
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// How to dial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// Source address and port; port 0 lets the kernel choose.
    pub bind: Option<SocketAddr>,
    /// How long one step may take; TCP's own retransmission time-outs are longer than the default.
    pub timeout: Duration,
    /// UDP only: `connect` the socket, so that the kernel filters by peer and reports ICMP errors.
    pub connected: bool,
    /// Bytes that the request carries besides its own, to make it large. UDP servers send as many
    /// back.
    pub padding: usize,
}

impl Default for Dial {
    fn default() -> Self {
        Self {
            bind: None,
            timeout: Duration::from_secs(3),
            connected: false,
            padding: 0,
        }
    }
}

impl Dial {
    /// Default settings, from a fixed source.
    #[must_use]
    pub fn from(bind: SocketAddr) -> Self {
        Self {
            bind: Some(bind),
            ..Self::default()
        }
    }

    /// Default settings with another time-out.
    #[must_use]
    pub fn within(timeout: Duration) -> Self {
        Self {
            timeout,
            ..Self::default()
        }
    }
}

/// A server's answer and what the client's socket says about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Name of the pod that answered.
    pub server: String,
    /// The client's address as the server's socket sees it.
    pub seen_peer: SocketAddr,
    /// The server's address as the client's socket sees it: `getpeername`, or the source that
    /// `recvfrom` gave.
    pub peer: SocketAddr,
    /// The client's own address: `getsockname`.
    pub local: SocketAddr,
    /// From `connect` or `sendto` until the answer was read.
    pub latency: Duration,
    /// What the server sent back after its name and the peer: the request's own text.
    pub echo: String,
}

/// The step that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Making or binding the socket.
    Bind,
    /// `connect`.
    Connect,
    /// `send` or `sendto`.
    Send,
    /// `recv` or `recvfrom`.
    Receive,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum DialError {
    /// The kernel said no.
    #[error("{stage:?}: {text} after {after:?}")]
    Os {
        /// The step that failed.
        stage: Stage,
        /// `errno`.
        errno: i32,
        /// Its text.
        text: String,
        /// Since the dial began.
        after: Duration,
    },
    /// Nothing came within [`Dial::timeout`].
    #[error("{stage:?}: timed out after {after:?}")]
    TimedOut {
        /// The step that was waited for.
        stage: Stage,
        /// Since the dial began.
        after: Duration,
    },
    /// The peer closed the connection without an answer.
    #[error("closed by the peer after {after:?}")]
    Closed {
        /// Since the dial began.
        after: Duration,
    },
    /// The worker process or its pipe failed: a fault of the lab.
    #[error("lab worker: {0}")]
    Worker(String),
}

impl DialError {
    /// Whether it is `ECONNREFUSED`: TCP reset on connect, ICMP port unreachable, or the socket
    /// hook's refusal.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Os { errno, .. } if *errno == libc::ECONNREFUSED)
    }

    /// Whether an open connection was reset.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        matches!(self, Self::Os { errno, .. } if *errno == libc::ECONNRESET)
    }

    /// Whether nothing came at all.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::TimedOut { .. })
            || matches!(self, Self::Os { errno, .. } if *errno == libc::ETIMEDOUT)
    }

    /// How long the dial took to fail.
    #[must_use]
    pub fn after(&self) -> Option<Duration> {
        match self {
            Self::Os { after, .. } | Self::TimedOut { after, .. } | Self::Closed { after } => {
                Some(*after)
            }
            Self::Worker(_) => None,
        }
    }
}

/// What a worker is asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Listen on these and answer as `name`, until the process ends.
    Serve {
        name: String,
        listen: Vec<(Proto, SocketAddr)>,
    },
    /// One request on a fresh socket.
    Once {
        proto: Proto,
        to: SocketAddr,
        dial: Dial,
    },
    /// `count` requests, each on a fresh socket, one after the other.
    Many {
        proto: Proto,
        to: SocketAddr,
        dial: Dial,
        count: u32,
    },
    /// A socket that stays open.
    Open {
        id: u32,
        proto: Proto,
        to: SocketAddr,
        dial: Dial,
    },
    /// A line on an open socket, and its answer.
    Ask {
        id: u32,
        text: String,
        timeout: Duration,
    },
    /// Has an open UDP socket ask somebody else from now on.
    Turn { id: u32, to: SocketAddr },
    /// A datagram to each of these from an open UDP socket, and then the answers.
    AskAll {
        id: u32,
        to: Vec<SocketAddr>,
        timeout: Duration,
    },
    /// Ends an open socket.
    Close { id: u32 },
}

/// What a worker answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// Done, nothing to tell.
    Done,
    /// To `Once` and `Ask`.
    Answer(Result<Answer, DialError>),
    /// To `Open`.
    Opened(Result<(SocketAddr, SocketAddr), DialError>),
    /// To `Turn`: `getpeername`, if it is connected.
    Turned(Result<SocketAddr, DialError>),
    /// To `AskAll`: what came as an answer to each.
    Answers(Vec<Result<Answer, DialError>>),
    /// To `Many`.
    Many(Outcome),
    /// The request could not be carried out.
    Failed(String),
}

/// What became of many dials.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Answers by server.
    pub servers: BTreeMap<String, u64>,
    /// Failures by message without times.
    pub errors: BTreeMap<String, u64>,
    /// Each answer's latency, nanoseconds.
    pub latencies: Vec<u64>,
}
