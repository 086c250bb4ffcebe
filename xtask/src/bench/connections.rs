//! Connections, requests and bytes per second in a cluster of namespaces.

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
