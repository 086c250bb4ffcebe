//! Which test programs there are, and which tests in them.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail};

use crate::shell::{as_root, capture, cargo};

/// A test program that cargo has built.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// Its target's name: `cluster`, `shunt-common`, ….
    pub(crate) name: String,
    /// Where it is.
    pub(crate) path: PathBuf,
    /// The folder of its package, which tests run in.
    pub(crate) folder: PathBuf,
}

/// One test.
#[derive(Clone, Debug)]
pub(crate) struct Test {
    /// The program it is in.
    pub(crate) program: Program,
    /// Its path there: `services::flows::a_name`.
    pub(crate) name: String,
    /// Whether it is run only when asked for.
    pub(crate) ignored: bool,
}

/// Which tests are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those without `#[ignore]`.
    Usual,
    /// Those with it.
    Long,
    /// Those with it, in a module `peers`.
    Peers,
}

impl Which {
    fn admits(self, name: &str, ignored: bool) -> bool {
        let peer = name.split("::").any(|part| part == "peers");
        match self {
            Self::Usual => !ignored,
            Self::Long => ignored && !peer,
            Self::Peers => ignored && peer,
        }
    }
}

/// Builds all test programs of the workspace, and the agent.
///
/// # Errors
///
/// When the build fails.
pub(super) fn build() -> Result<Vec<Program>> {
    let output = cargo()
        .args([
            "test",
            "--no-run",
            "--quiet",
            "--message-format=json-render-diagnostics",
        ])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo test --no-run")?;
    if !output.status.success() {
        bail!("the tests do not build");
    }
    let messages = output.stdout.split(|byte| *byte == b'\n');
    let mut programs: Vec<Program> = messages
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| {
            Some(Program {
                name: message["target"]["name"].as_str()?.to_owned(),
                path: message["executable"].as_str()?.into(),
                folder: Path::new(message["manifest_path"].as_str()?)
                    .parent()?
                    .to_path_buf(),
            })
        })
        .collect();
    // Those that wait most, first.
    programs.sort_by_key(|program| {
        let first = ["cluster", "agent", "packet", "lab"];
        (
            first
                .iter()
                .position(|name| *name == program.name)
                .unwrap_or(first.len()),
            program.name.clone(),
        )
    });
    Ok(programs)
}

/// The tests whose `PROGRAM TEST` contains one of `names`, if there are any names.
///
/// # Errors
///
/// When a program cannot list its tests.
pub(super) fn tests(programs: &[Program], which: Which, names: &[String]) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    for program in programs {
        let ignored = list(program, &["--ignored"])?;
        let listed = if which == Which::Usual {
            list(program, &[])?
        } else {
            ignored.clone()
        };
        for name in listed {
            let whole = format!("{} {name}", program.name);
            let ignored = ignored.contains(&name);
            if which.admits(&name, ignored)
                && (names.is_empty() || names.iter().any(|part| whole.contains(part)))
            {
                let program = program.clone();
                tests.push(Test {
                    program,
                    name,
                    ignored,
                });
            }
        }
    }
    Ok(tests)
}

fn list(program: &Program, words: &[&str]) -> Result<Vec<String>> {
    let mut command = as_root(&program.path.to_string_lossy())?;
    command
        .args(["--list", "--format", "terse"])
        .args(words)
        .current_dir(&program.folder);
    let text = capture(&mut command)?;
    Ok(text
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn ignored_tests_are_long_or_peers() {
        let of = |name, ignored| {
            [Which::Usual, Which::Long, Which::Peers].map(|which| which.admits(name, ignored))
        };
        assert_eq!(of("services::flows::one", false), [true, false, false]);
        assert_eq!(of("long::one", true), [false, true, false]);
        assert_eq!(of("dns::peers::one", true), [false, false, true]);
        assert_eq!(of("peers_of_a_kind", true), [false, true, false]);
    }
}
