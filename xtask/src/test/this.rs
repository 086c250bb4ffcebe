//! This program, for parts of a run that are processes of it: a copy, because the build of the
//! tests writes the program anew.

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Context, Result};

use crate::shell::target;

/// The copy that [`keep`] makes.
static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Makes the copy, before anything is built.
pub(super) fn keep() -> Result<()> {
    let this = env::current_exe().context("this program's path")?;
    let copy = target().join("tools/xtask-test");
    // A running program cannot be written to, but another can have its name.
    let _ = fs::remove_file(&copy);
    fs::copy(&this, &copy).with_context(|| format!("{}", copy.display()))?;
    let _ = PROGRAM.set(copy);
    Ok(())
}

/// The program to start.
pub(super) fn program() -> Result<&'static Path> {
    PROGRAM
        .get()
        .map(PathBuf::as_path)
        .context("the run has not begun")
}
