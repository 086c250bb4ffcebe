//! Time, CPU and memory from objects to maps.

use anyhow::Result;

use super::{Bench, lines};

/// Lines for each number of Services.
const LINES: usize = 18;
/// Lines of an agent's start, cold and warm.
const START_LINES: usize = 16;

/// Measures.
///
/// # Errors
///
/// When the agent cannot be built or run, or does not come to the maps that it should.
pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let counts = if bench.quick { 2 } else { 3 };
    lines::measure(bench, "sync", START_LINES + LINES * counts)
}
