//! How an agent starts ([`start`]), and from objects to maps: time, CPU and memory by number of
//! Services, through the agent's own code in this process ([`inside`]), and through an agent that
//! lists and watches an API server ([`agent`]).
//!
//! Every Service has one cluster IP, one port, and one slice with [`figures::ENDPOINTS`] endpoints.

mod agent;
mod cli;
mod figures;
mod inside;
mod objects;
mod server;
mod start;

use anyhow::Result;
use shunt_lab::Lab;

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
