//! Whether this agent does its work: asked by everything that answers a health check.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// A handle on the agent's state; clones share it. Not healthy at first.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<AtomicBool>);

impl Health {
    /// Whether the datapath is live and follows its source.
    pub fn is_healthy(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Notes that it is, or is not.
    pub fn set(&self, healthy: bool) {
        self.0.store(healthy, Ordering::Relaxed);
    }
}
