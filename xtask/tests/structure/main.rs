//! What must stay true of the tree itself, read from its sources: nothing is run.
//!
//! [`circles`]: modules of a crate depend downwards only. [`behaviour`]: every row of
//! `docs/behaviour.md` names tests that exist. [`errors`]: sections of errors say which error.

use std::path::{Path, PathBuf};

mod behaviour;
mod circles;
mod errors;

/// The workspace's folder.
fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package
        .parent()
        .expect("xtask stands in the workspace")
        .to_owned()
}
