//! What goes wrong between this agent and its API server, in one line and with what to do about it.

use std::time::Duration;

use serde::Deserialize;

/// HTTP status 410: the server has forgotten the version that a watch or a list wants to go on
/// from.
const GONE: u16 = 410;

/// `metav1.Status`, as far as it is told on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Status {
    #[serde(default)]
    pub(super) code: u16,
    #[serde(default)]
    pub(super) message: String,
}

/// Why a list or a watch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The server's answer, or an ERROR event.
    Status {
        status: Status,
        /// `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// No connection, or none that can be trusted.
    Unreachable {
        server: String,
        cause: String,
        /// What to do about it, which depends on where the address comes from.
        advice: &'static str,
    },
    /// A connection that worked has broken off.
    Cut(String),
    /// A connection on which nothing comes any more.
    Silent(Duration),
    /// An answer that is none.
    Unreadable(String),
}

impl Failure {
    /// Whether only a new list can go on.
    pub(super) fn is_gone(&self) -> bool {
        self.code() == GONE
    }

    /// Whether credentials and addresses should be read again before the next attempt.
    pub(super) fn may_need_credentials(&self) -> bool {
        matches!(self, Self::Unreachable { .. }) || self.code() == 401
    }

    /// Whether it happens every day (restarts, time-outs of load balancers) and matters only if it
    /// lasts.
    pub(super) fn is_everyday(&self) -> bool {
        self.is_gone() || matches!(self, Self::Cut(_) | Self::Silent(_))
    }

    /// Whether the server does not stream initial lists: it forbids the parameter (its feature gate
    /// is off), or knows none of that name.
    pub(super) fn is_unsupported(&self) -> bool {
        matches!(self.code(), 400 | 422)
    }

    /// Whether the server would say the same again: what was to be written is there already, or
    /// cannot be, or may not.
    pub(super) fn is_final(&self) -> bool {
        matches!(self.code(), 400 | 403..=405 | 409 | 413 | 422)
    }

    /// Whether a permission is missing.
    pub(super) fn is_forbidden(&self) -> bool {
        self.code() == 403
    }

    /// How long the server wants to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    fn code(&self) -> u16 {
        match self {
            Self::Status { status, .. } => status.code,
            _ => 0,
        }
    }

    /// The cause, and what to do about it; `plural` is what was to be read.
    pub(super) fn explain(&self, plural: &str) -> (String, String) {
        let (what, advice) = match self {
            Self::Status { status, .. } => (
                format!("{} ({})", status.message, status.code),
                match status.code {
                    401 => "give a kubeconfig or service account whose token or certificate is still valid".to_owned(),
                    403 => format!("allow list and watch on {plural} (ClusterRole)"),
                    404 => "check that this is the address of a Kubernetes API server".to_owned(),
                    429 => "the API server is overloaded, see its priority and fairness settings".to_owned(),
                    _ => "see the API server's log".to_owned(),
                },
            ),
            Self::Unreachable { server, cause, advice } => {
                (format!("{server} cannot be reached: {cause}"), (*advice).to_owned())
            }
            Self::Cut(cause) => (
                format!("the connection broke off: {cause}"),
                "check what lies between here and the API server".to_owned(),
            ),
            Self::Silent(time) => (
                format!("nothing came for {time:?}"),
                "check what lies between here and the API server".to_owned(),
            ),
            Self::Unreadable(cause) => (
                format!("the answer is not that of a Kubernetes API server: {cause}"),
                "check the address in the kubeconfig".to_owned(),
            ),
        };
        (
            what.split_whitespace().collect::<Vec<_>>().join(" "),
            advice,
        )
    }
}
