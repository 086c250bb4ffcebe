//! Other people's programs that tests run shunt beside: found, installed or built once, and kept in
//! `target/peers`.
//!
//! A test that needs one has `#[ignore = "cargo xtask test --peers"]`, stands in a module `peers`,
//! and asks [`shunt_lab::peer`] for the program's path. One that cannot be had makes its tests
//! skipped, with the reason.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    setup,
    shell::{root, run, say, target, which},
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
const PEERS: [Peer; 4] = [
    Peer {
        name: "coredns",
        find: |folder| built_with_go("coredns", folder),
    },
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

/// A program of a Go module of its own in `xtask/peers`, whose `go.sum` says what it is built of.
fn built_with_go(name: &str, folder: &Path) -> Result<PathBuf> {
    let module = root().join("xtask/peers").join(name);
    let (program, stamp) = (folder.join(name), folder.join("go.sum"));
    let sums = fs::read(module.join("go.sum")).with_context(|| format!("{}", module.display()))?;
    if program.is_file() && fs::read(&stamp).is_ok_and(|built| built == sums) {
        return Ok(program);
    }
    which("go").context("no Go on this machine: install it from https://go.dev/dl/")?;
    say("peers", format_args!("building {name} (minutes, once)"));
    let mut go = Command::new("go");
    go.current_dir(&module).args(["build", "-trimpath", "-o"]);
    run(go.arg(&program).arg("."))?;
    fs::write(&stamp, sums)?;
    Ok(program)
}
