//! Whether this agent does its work: asked by everything that answers a health check.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

/// A change that is not in the maps after so long makes the agent unhealthy: twice kube-proxy's
/// `syncPeriod` of 30 s.
pub const LATE: Duration = Duration::from_secs(60);

/// A handle on the agent's state; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Whether programs of an earlier agent, which left Services in the maps, go on meanwhile.
    taken_over: bool,
    live: bool,
    node_leaves: bool,
    /// When each batch was queued that is not in the maps yet, oldest first.
    queued: VecDeque<Instant>,
    last_queued: Option<SystemTime>,
    last_programmed: Option<SystemTime>,
}

impl Health {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch of changes waits to be brought into the maps.
    pub fn queued(&self) {
        let mut state = self.lock();
        state.queued.push_back(Instant::now());
        state.last_queued = Some(SystemTime::now());
    }

    /// The oldest of the batches that wait is in the maps, as far as it fits. Says since when it
    /// has waited.
    pub fn programmed(&self) -> Option<Instant> {
        let mut state = self.lock();
        state.last_programmed = Some(SystemTime::now());
        state.queued.pop_front()
    }

    /// What an earlier agent left goes on until this one is live.
    pub fn takes_over(&self) {
        self.lock().taken_over = true;
    }

    /// The maps hold all there is, and the programs are attached.
    pub fn goes_live(&self) {
        self.lock().live = true;
    }

    /// Notes whether the own Node is being taken out of the cluster.
    pub fn set_node_leaves(&self, leaves: bool) {
        self.lock().node_leaves = leaves;
    }

    /// Whether the own Node is to stay in the cluster.
    pub fn node_stays(&self) -> bool {
        !self.lock().node_leaves
    }

    /// Whether this agent's datapath is live.
    pub fn is_live(&self) -> bool {
        self.lock().live
    }

    /// Whether a datapath is there, this agent's or the one that it takes over.
    pub fn serves(&self) -> bool {
        let state = self.lock();
        state.live || state.taken_over
    }

    /// Whether every change has come into the maps in time. So it is while the source has not told
    /// anything.
    pub fn keeps_up(&self) -> bool {
        self.keeps_up_at(Instant::now())
    }

    fn keeps_up_at(&self, now: Instant) -> bool {
        let state = self.lock();
        state
            .queued
            .front()
            .is_none_or(|&queued| now.saturating_duration_since(queued) < LATE)
    }

    /// Whether the datapath is live and follows its source, whatever becomes of the Node.
    pub fn is_healthy(&self) -> bool {
        self.is_live() && self.keeps_up()
    }

    /// When the last batch was queued.
    pub fn last_queued(&self) -> Option<SystemTime> {
        self.lock().last_queued
    }

    /// When a batch was last brought into the maps.
    pub fn last_programmed(&self) -> Option<SystemTime> {
        self.lock().last_programmed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A2: what counts is the oldest change that is not in the maps, not the newest, and not how
    /// long nothing has changed.
    #[test]
    fn a_change_that_waits_too_long_is_late() {
        let health = Health::default();
        health.goes_live();
        let after = |secs| health.keeps_up_at(Instant::now() + Duration::from_secs(secs));
        assert!(after(3600), "nothing waits");
        health.queued();
        health.queued();
        assert!(after(58));
        assert!(!after(61));
        health.programmed();
        assert!(!after(61), "the second one waits still");
        health.programmed();
        assert!(after(3600));
    }
}
