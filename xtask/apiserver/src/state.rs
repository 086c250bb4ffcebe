//! What the server holds, and who is told when it changes.

use std::sync::{Mutex, MutexGuard, PoisonError, atomic::AtomicUsize};

use tokio::sync::watch;

use crate::{faults::Faults, store::Store};

/// State that requests, watches and the test see.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) store: Store,
    pub(crate) faults: Faults,
    pub(crate) token: String,
    /// `METHOD /path?query VERSION` of every request.
    pub(crate) requests: Vec<String>,
    /// Watches that began with a smaller number end.
    pub(crate) drops: u64,
    /// As `drops`, in mid-object.
    pub(crate) cuts: u64,
    /// Watches that began with a smaller number send a bookmark.
    pub(crate) marks: u64,
}

/// [`State`] and its bell.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) generation: watch::Sender<u64>,
    pub(crate) watches: AtomicUsize,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn notify(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }

    pub(crate) async fn until_changed(&self, holds: impl Fn(&State) -> bool) {
        let mut generation = self.generation.subscribe();
        while !holds(&self.lock()) {
            if generation.changed().await.is_err() {
                return;
            }
        }
    }
}
