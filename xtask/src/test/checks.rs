//! What is checked besides tests: format, lints, documentation and its examples.

use std::{
    env, fs,
    path::Path,
    process::{Command, Output, Stdio},
    time::Instant,
};

use anyhow::{Context, Result};

use super::report::Report;
use crate::shell::{cargo, root, target, which};

/// `cargo fmt`.
pub(super) fn format(report: &Report) {
    command(
        report,
        "check",
        "format",
        cargo().args(["fmt", "--all", "--check"]),
    );
}

/// All that needs a build of its own, one after the other, at the lowest priority.
pub(super) fn beside_tests(report: &Report) {
    let began = Instant::now();
    let deny = ["--", "-D", "warnings"];
    command(
        report,
        "check",
        "lints",
        last(&cargo())
            .args(["clippy", "--all-targets", "--quiet"])
            .args(deny),
    );
    let mut doc = last(&cargo());
    doc.args(["doc", "--no-deps", "--quiet"])
        .env("RUSTDOCFLAGS", "-D warnings");
    command(report, "check", "documentation", &mut doc);
    match bpf_clippy() {
        Ok(Some(clippy)) => command(
            report,
            "check",
            "lints of the BPF programs",
            &mut last(&clippy),
        ),
        Ok(None) => report.skipped(
            "check",
            "lints of the BPF programs",
            began.elapsed(),
            "the toolchain that builds them comes without clippy, and rustup could not add it",
        ),
        Err(error) => report.failed(
            "check",
            "lints of the BPF programs",
            began.elapsed(),
            &format!("{error:#}"),
        ),
    }
    examples(report);
    report.section("lints and documentation, beside the tests", began.elapsed());
}

/// The same command, when nothing else wants the CPU.
fn last(command: &Command) -> Command {
    if which("nice").is_none() {
        return again(command, Command::new(command.get_program()));
    }
    let mut nice = Command::new("nice");
    nice.args(["-n", "19"]).arg(command.get_program());
    again(command, nice)
}

fn again(command: &Command, mut other: Command) -> Command {
    other.args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        other.current_dir(folder);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => other.env(name, value),
            None => other.env_remove(name),
        };
    }
    other
}

/// Runs a command as one check.
pub(super) fn command(report: &Report, what: &str, name: &str, command: &mut Command) {
    let began = Instant::now();
    match output(command) {
        Ok((output, _)) if output.status.success() => report.passed(what, name, began.elapsed()),
        Ok((_, text)) => report.failed(what, name, began.elapsed(), &text),
        Err(error) => report.failed(what, name, began.elapsed(), &format!("{error:#}")),
    }
}

/// Runs it; what it printed, errors last.
fn output(command: &mut Command) -> Result<(Output, String)> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", crate::shell::show(command)))?;
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok((output, text))
}

/// The examples in the documentation, each a test.
fn examples(report: &Report) {
    let began = Instant::now();
    let mut doc = last(&cargo());
    doc.args(["test", "--doc", "--no-fail-fast"]);
    let (output, text) = match output(&mut doc) {
        Ok(result) => result,
        Err(error) => {
            return report.failed("check", "examples", began.elapsed(), &format!("{error:#}"));
        }
    };
    let mut failed = 0;
    for (name, result) in text.lines().filter_map(example) {
        match result {
            "ok" => report.passed("example", name, std::time::Duration::ZERO),
            "ignored" => report.skipped(
                "example",
                name,
                std::time::Duration::ZERO,
                "marked `ignore`",
            ),
            _ => {
                failed += 1;
                report.failed("example", name, std::time::Duration::ZERO, &text);
            }
        }
    }
    match (output.status.success(), failed) {
        (true, _) => report.passed("check", "examples in the documentation", began.elapsed()),
        (false, 0) => report.failed(
            "check",
            "examples in the documentation",
            began.elapsed(),
            &text,
        ),
        (false, _) => {}
    }
}

/// `test src/lib.rs - name (line 3) ... ok`
fn example(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("test ")?.rsplit_once(" ... ")
}

/// clippy of the toolchain that builds the BPF programs, if that has one.
fn bpf_clippy() -> Result<Option<Command>> {
    let file = target().join("tools/env");
    let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    let tool = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        lines
            .find(|(key, _)| *key == name)
            .map(|(_, value)| Path::new(value))
    };
    let Some(bin) = tool("CARGO")
        .and_then(Path::parent)
        .filter(|bin| bin.join("cargo-clippy").is_file())
    else {
        return Ok(None);
    };
    let path = env::join_paths(
        [bin.to_path_buf()]
            .into_iter()
            .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())),
    )?;
    let mut command = Command::new(bin.join("cargo-clippy"));
    command
        .current_dir(root())
        .env("PATH", path)
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTC");
    command.args(["clippy", "--quiet", "--package=shunt-ebpf", "--release"]);
    command.args([
        "--target=bpfel-unknown-none",
        "-Zbuild-std=core",
        "--target-dir",
    ]);
    command
        .arg(target().join("bpf"))
        .args(["--", "-D", "warnings"]);
    Ok(Some(command))
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn results_of_examples_are_found() {
        let line = "test proxy-common/src/lib.rs - name (line 3) ... ok";
        assert_eq!(
            example(line),
            Some(("proxy-common/src/lib.rs - name (line 3)", "ok"))
        );
        assert_eq!(example("test result: ok. 1 passed"), None);
    }
}
