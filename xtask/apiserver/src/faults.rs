//! How the server misbehaves at the moment.

use std::time::Duration;

use crate::store::Kind;

/// Whether initial lists are streamed (`sendInitialEvents`, WatchList).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streaming {
    /// They are, with a bookmark at their end.
    #[default]
    On,
    /// Refused with 422, as by a server whose feature gate is off.
    Refused,
    /// Not known: the parameter is ignored, as by servers before 1.27. Objects come, but no
    /// bookmark ends them.
    Ignored,
}

/// How a watch from a version that is forgotten is told so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// An ERROR event on a watch that began well.
    #[default]
    Event,
    /// The answer's HTTP status.
    Status,
}

/// Answers that are errors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// `Retry-After` in seconds.
    pub retry_after: Option<u32>,
    /// For requests of this kind only.
    pub kind: Option<Kind>,
}

impl Refusal {
    /// An answer to everything.
    #[must_use]
    pub fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    /// With `Retry-After` in seconds.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// For requests of this kind only.
    #[must_use]
    pub fn of(mut self, kind: Kind) -> Self {
        self.kind = Some(kind);
        self
    }
}

/// How the server misbehaves; the default is not at all.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Requests are answered with an error.
    pub refuse: Option<Refusal>,
    /// Connections are accepted, but nothing is answered and watches are silent, as behind a broken
    /// load balancer.
    pub frozen: bool,
    /// New connections speak HTTP/1.1, as through a proxy that knows no other.
    pub http1_only: bool,
    /// Streaming of initial lists.
    pub streaming: Streaming,
    /// How 410 Gone is told.
    pub gone: Gone,
    /// Watches begin with so many changes that came before the version they want to go on from.
    pub replay: usize,
    /// How often watches that want bookmarks get one.
    pub bookmarks: Duration,
    /// Watches end at once, without an event.
    pub short_watches: bool,
    /// At most so many objects in a page, whatever the limit of the request.
    pub page: usize,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            refuse: None,
            frozen: false,
            http1_only: false,
            streaming: Streaming::default(),
            gone: Gone::default(),
            replay: 0,
            bookmarks: Duration::from_secs(60),
            short_watches: false,
            page: usize::MAX,
        }
    }
}
