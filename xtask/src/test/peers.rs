//! Other people's programs that tests run shunt beside: found, installed or built once, and kept in
//! `target/peers`.
//!
//! A test that needs one has `#[ignore = "cargo xtask test --peers"]`, stands in a module `peers`,
//! and asks [`shunt_lab::peer`] for the program's path. One that cannot be had makes its tests
//! skipped, with the reason.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    setup,
    shell::{say, target, which},
};

/// One program.
struct Peer {
    /// Its name, as tests ask for it.
    name: &'static str,
    /// Finds it, or makes it in the folder given.
    find: fn(&Path) -> Result<PathBuf>,
}

/// All of them. One that must be built leaves its program in its folder, and is found there the
/// next time.
const PEERS: [Peer; 3] = [
    Peer {
        name: "kubectl",
        find: |_| installed("kubectl", "kubernetes-client"),
    },
    Peer {
        name: "promtool",
        find: |_| installed("promtool", "prometheus"),
    },
    Peer {
        name: "nginx",
        find: |_| installed("nginx", "nginx-light"),
    },
];

/// Makes them all ready; the variables that tell tests where each is, or why not.
pub(super) fn prepare() -> Vec<(String, String)> {
    PEERS
        .iter()
        .map(|peer| {
            let folder = target().join("peers").join(peer.name);
            let found = fs::create_dir_all(&folder)
                .with_context(|| format!("{}", folder.display()))
                .and_then(|()| (peer.find)(&folder));
            match found {
                Ok(path) => (
                    shunt_lab::peer_variable(peer.name),
                    path.display().to_string(),
                ),
                Err(error) => {
                    say("peers", format_args!("{}: {error:#}", peer.name));
                    (
                        shunt_lab::peer_variable(peer.name),
                        format!("!{error:#}").replace('\n', " "),
                    )
                }
            }
        })
        .collect()
}

/// A program of a Debian package.
fn installed(program: &str, package: &'static str) -> Result<PathBuf> {
    if let Some(path) = which(program) {
        return Ok(path);
    }
    setup::package(program, package)?;
    which(program).with_context(|| format!("{package} has no {program}"))
}
