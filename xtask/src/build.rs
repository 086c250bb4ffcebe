//! Builds the release binary.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    setup,
    shell::{cargo, run, say, target},
};

/// Sets up, builds, and returns the path of the binary.
///
/// # Errors
///
/// When the set-up or the build fails.
pub(crate) fn build() -> Result<PathBuf> {
    setup::setup()?;
    let binary = target().join("release/shunt");
    run(cargo().args(["build", "--release", "--package", "shunt"]))?;
    say("built", binary.display());
    Ok(binary)
}
