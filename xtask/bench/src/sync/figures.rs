//! Sizes and bounds that the measurements share, and how their figures are told.

use anyhow::{Context, Result};
use shunt::datapath::Capacities;

use crate::report::{Line, Target, middle, spread};

/// Endpoints of every Service.
pub(super) const ENDPOINTS: u32 = 10;
/// Where targets are: 10,000 Services with 100,000 endpoints.
pub(super) const TARGETED: u32 = 10_000;
/// Bound on one endpoint's change from object to map, microseconds.
pub(super) const CHANGE_US: f64 = 1_000.0;
/// Bound on the same from the watch event's arrival, seen from outside, microseconds.
pub(super) const ARRIVAL_US: f64 = 5_000.0;
/// Bound on the first sync's CPU time, seconds.
pub(super) const FIRST_SYNC_S: f64 = 2.0;
/// Bound on the agent's memory, MiB.
pub(super) const MEMORY_MIB: f64 = 150.0;

/// Bound on `shunt services` and `shunt backends`, milliseconds.
pub(super) const LIST_MS: f64 = 300.0;
/// Bound on `shunt explain`, milliseconds.
pub(super) const EXPLAIN_MS: f64 = 50.0;
/// Bound on `shunt top`, percent of a CPU.
pub(super) const TOP_PERCENT: f64 = 2.0;

/// Room for so many Services, with slots and ids that rest while others are in use.
pub(super) fn capacities(services: u32) -> Capacities {
    let defaults = Capacities::default();
    Capacities {
        frontends: defaults.frontends.max(services * 3),
        slots: defaults.slots.max(services * (ENDPOINTS + 2)),
        backends: defaults.backends.max(services * (ENDPOINTS + 2)),
        ..defaults
    }
}

/// A figure of one measurement, or the middle of several.
pub(super) fn line(name: String, figures: &[f64], unit: &'static str) -> Line {
    Line {
        name,
        value: middle(figures),
        unit,
        against: None,
        baseline: None,
        spread: spread(figures),
        target: None,
    }
}

impl Line {
    /// With a bound on the value where targets are.
    pub(super) fn bound(mut self, services: u32, most: f64) -> Self {
        if services == TARGETED {
            self.target = Some(Target::ValueAtMost(most));
        }
        self
    }

    /// Beside somebody else's figure.
    pub(super) fn beside(mut self, against: &'static str, baseline: f64) -> Self {
        self.against = Some(against);
        self.baseline = Some(baseline);
        self
    }
}

/// A Service for each change, far from the one before.
pub(super) fn nth(change: u32, services: u32) -> u32 {
    (u64::from(change) * 7919 % u64::from(services)) as u32
}

/// The number behind a key of a file like `/proc/<pid>/status` or `cpu.stat`.
pub(super) fn field(text: &str, key: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let value = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
    value
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("no {key}"))
}
