//! Nanoseconds per packet and per call of the loaded programs.

use anyhow::{Result, bail};

use super::Bench;

/// Measures.
///
/// # Errors
///
/// Always: there is nothing to measure with yet.
pub(super) fn measure(_bench: &mut Bench) -> Result<()> {
    bail!("not written yet")
}
