//! How an agent starts ([`start`]), and from objects to maps: time, CPU and memory by number of
//! Services, through the agent's own code in this process ([`inside`]), and through an agent that
//! lists and watches an API server ([`agent`]).
//!
//! Every Service has one cluster IP, one port, and one slice with [`ENDPOINTS`] endpoints.

mod agent;
mod inside;
mod objects;
mod server;
mod start;

use anyhow::Result;
use shunt::datapath::Capacities;
use shunt_lab::Lab;

use crate::report::{Line, Target, middle, spread};

/// Endpoints of every Service.
const ENDPOINTS: u32 = 10;
/// Where targets are: 10,000 Services with 100,000 endpoints.
const TARGETED: u32 = 10_000;
/// Bound on one endpoint's change from object to map, microseconds.
const CHANGE_US: f64 = 1_000.0;
/// Bound on the same from the watch event's arrival, seen from outside, microseconds.
const ARRIVAL_US: f64 = 5_000.0;
/// Bound on the first sync's CPU time, seconds.
const FIRST_SYNC_S: f64 = 2.0;
/// Bound on the agent's memory, MiB.
const MEMORY_MIB: f64 = 150.0;

/// Measures everything. Needs root.
pub(crate) fn measure(quick: bool, only: &str) -> Result<()> {
    Lab::sweep_stale()?;
    let counts: &[u32] = if quick {
        &[1_000, 10_000]
    } else {
        &[1_000, 10_000, 100_000]
    };
    let changes = if quick { 100 } else { 500 };
    for figure in start::measure(quick)? {
        if figure.name.contains(only) {
            figure.print()?;
        }
    }
    for &services in counts {
        for figure in inside::measure(services, changes)?
            .into_iter()
            .chain(agent::measure(services, changes)?)
        {
            if figure.name.contains(only) {
                figure.print()?;
            }
        }
    }
    Ok(())
}

/// Room for so many Services, with slots and ids that rest while others are in use.
fn capacities(services: u32) -> Capacities {
    let defaults = Capacities::default();
    Capacities {
        frontends: defaults.frontends.max(services * 3),
        slots: defaults.slots.max(services * (ENDPOINTS + 2)),
        backends: defaults.backends.max(services * (ENDPOINTS + 2)),
        ..defaults
    }
}

/// A figure of one measurement, or the middle of several.
fn line(name: String, figures: &[f64], unit: &'static str) -> Line {
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
    fn bound(mut self, services: u32, most: f64) -> Self {
        if services == TARGETED {
            self.target = Some(Target::ValueAtMost(most));
        }
        self
    }

    /// Beside somebody else's figure.
    fn beside(mut self, against: &'static str, baseline: f64) -> Self {
        self.against = Some(against);
        self.baseline = Some(baseline);
        self
    }
}
