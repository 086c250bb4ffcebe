//! Nanoseconds per packet and per call of the loaded programs, beside floor programs.

use anyhow::Result;

use super::{Bench, lines};

/// About how many lines there will be.
const LINES: usize = 162;

/// Measures.
///
/// # Errors
///
/// When the programs cannot be built, loaded or run.
pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    lines::measure(bench, "datapath", LINES)
}
