//! Why a Service is not in the maps, and what to do then.

use crate::{
    datapath::maps::{MapError, settings},
    object::{ObjectName, Problem},
};

/// Why a Service is not (wholly) in the maps. What it had there before goes on serving.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.problem())]
pub struct SyncError {
    /// The Service.
    pub service: ObjectName,
    /// What happened.
    #[source]
    pub cause: Cause,
}

impl SyncError {
    /// The same, for those who keep problems by object.
    pub fn problem(&self) -> Problem {
        let message = format!(
            "{}; what it had before goes on, the rest is tried again",
            self.cause
        );
        Problem::new("Service", &self.service, "", message)
    }
}

/// What kept an entry out of the maps.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// A map is full or the kernel refused.
    #[error(transparent)]
    Map(#[from] MapError),
    /// No consecutive free slots.
    #[error(
        "map {map} has no {needed} consecutive free slots ({free} of {capacity} are free): start the agent with a larger {}",
        settings::MAX_SLOTS
    )]
    Slots {
        /// The map.
        map: &'static str,
        /// How many were asked for.
        needed: u32,
        /// How many are free or resting, in pieces.
        free: u32,
        /// All.
        capacity: u32,
    },
    /// No free backend id.
    #[error(
        "map backends is full ({capacity} entries, {used} of them in use, the rest named by open flows): start the agent \
         with a larger {}",
        settings::MAX_BACKENDS
    )]
    Backends {
        /// All.
        capacity: u32,
        /// How many live backends use.
        used: usize,
    },
}
