//! Formatting, lints and tests, in sections, with a summary at the end.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    setup,
    shell::{cargo, is_root, root, run, target, which},
};

/// Arguments of `test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run the long tests alone: two minutes of clients, churn, killed agents and a SYN flood at once (SHUNT_LONG_SECONDS and
    /// SHUNT_LONG_SEED set its length and repeat its course), and an API server that is away for a minute.
    #[arg(long)]
    long: bool,
    /// Passed on to the tests: names of those to run, `--nocapture`, … Only tests are run then.
    #[arg(last = true)]
    filter: Vec<String>,
}

/// What became of a section.
enum Outcome {
    Passed,
    /// Tests that passed, failed and were ignored.
    Tests(Counts),
    Skipped(String),
    Failed(String),
}

#[derive(Default)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// Runs the sections one after the other, also after one that failed.
///
/// # Errors
///
/// When the set-up fails, or any section did.
pub(crate) fn test(args: &Args) -> Result<()> {
    setup::setup()?;
    let began = Instant::now();
    let all = args.filter.is_empty();
    let mut sections = Sections::default();
    if args.long {
        sections.run("long test", || {
            let mut filter = vec!["--ignored".to_owned(), "--nocapture".to_owned()];
            filter.extend_from_slice(&args.filter);
            tests(&mut userspace(&["cluster".to_owned()]), &filter).map(Outcome::Tests)
        });
        return sections.summary(began.elapsed());
    }
    if all {
        sections.run("format", || plain(cargo().args(["fmt", "--all", "--check"])));
        sections.run("lints", || {
            plain(cargo().args(["clippy", "--all-targets", "--quiet", "--", "-D", "warnings"]))
        });
        sections.run("lints of the BPF programs", bpf_lints);
    }
    let (kernel, cluster, other) = integration_tests()?;
    sections.run("host tests", || {
        let mut packages = vec!["--package=shunt-common", "--package=shunt-apiserver", "--package=xtask"];
        packages.extend(["--lib", "--bins", "--tests"]);
        tests(cargo().arg("test").args(packages), &args.filter)
            .and_then(|counts| Ok(counts + tests(userspace(&other).args(["--lib", "--bins"]), &args.filter)?))
            .map(Outcome::Tests)
    });
    sections.run("kernel tests", || tests_of(&kernel, &args.filter));
    sections.run("lab tests", || {
        tests(cargo().args(["test", "--package=shunt-lab"]), &args.filter).map(Outcome::Tests)
    });
    sections.run("cluster tests", || tests_of(&cluster, &args.filter));
    if all {
        let this = env::current_exe().context("this program's path")?;
        sections.run("demo, one round", || {
            plain(Command::new(&this).args(["run", "--once"]).current_dir(root()))
        });
        // A static release build, and containers on a node of the lab.
        sections.run("image, tried out", || {
            plain(Command::new(&this).args(["image", "--try"]).current_dir(root()))
        });
    }
    sections.summary(began.elapsed())
}

#[derive(Default)]
struct Sections {
    done: Vec<(&'static str, Outcome, Duration)>,
}

impl Sections {
    fn run(&mut self, name: &'static str, section: impl FnOnce() -> Result<Outcome>) {
        eprintln!("\n== {name}");
        let began = Instant::now();
        let outcome = section().unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            Outcome::Failed(format!("{error:#}"))
        });
        self.done.push((name, outcome, began.elapsed()));
    }

    fn summary(&self, took: Duration) -> Result<()> {
        eprintln!("\n== summary");
        let mut failed = Vec::new();
        for (name, outcome, took) in &self.done {
            let text = match outcome {
                Outcome::Passed => "passed".to_owned(),
                Outcome::Tests(counts) => {
                    if counts.failed > 0 {
                        failed.push(*name);
                    }
                    format!(
                        "{} passed, {} failed, {} ignored",
                        counts.passed, counts.failed, counts.ignored
                    )
                }
                Outcome::Skipped(why) => format!("skipped: {why}"),
                Outcome::Failed(why) => {
                    failed.push(*name);
                    format!("FAILED: {why}")
                }
            };
            eprintln!("{name:<26} {:>7.1} s  {text}", took.as_secs_f64());
        }
        eprintln!("{:<26} {:>7.1} s", "in all", took.as_secs_f64());
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        Ok(())
    }
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            ignored: self.ignored + other.ignored,
        }
    }
}

fn plain(command: &mut Command) -> Result<Outcome> {
    run(command).map(|()| Outcome::Passed)
}

/// clippy with the toolchain that builds the BPF programs, if that has clippy.
fn bpf_lints() -> Result<Outcome> {
    let file = target().join("tools/env");
    let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    let tools: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let tool = |name: &str| {
        tools
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| Path::new(*value))
    };
    let Some(bin) = tool("CARGO")
        .and_then(Path::parent)
        .filter(|bin| bin.join("cargo-clippy").is_file())
    else {
        let rustc = tool("RUSTC").map(|path| path.display().to_string()).unwrap_or_default();
        return Ok(Outcome::Skipped(format!("{rustc} comes without clippy")));
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
    command.args([
        "clippy",
        "--package=proxy-ebpf",
        "--release",
        "--target=bpfel-unknown-none",
        "-Zbuild-std=core",
    ]);
    command
        .arg("--target-dir")
        .arg(target().join("bpf"))
        .args(["--", "-D", "warnings"]);
    plain(&mut command)
}

/// The test programs of `proxy-userspace/tests` by level: `packet`, `cluster`, and the others.
fn integration_tests() -> Result<(Vec<String>, Vec<String>, Vec<String>)> {
    let (mut kernel, mut cluster, mut other) = (Vec::new(), Vec::new(), Vec::new());
    let folder = root().join("proxy-userspace/tests");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file())
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    for name in names {
        let level = match &*name {
            "packet" => &mut kernel,
            "cluster" => &mut cluster,
            _ => &mut other,
        };
        level.push(name);
    }
    Ok((kernel, cluster, other))
}

fn userspace(tests: &[String]) -> Command {
    let mut command = cargo();
    command.args(["test", "--package=proxy-userspace"]);
    for name in tests {
        command.args(["--test", name]);
    }
    command
}

fn tests_of(names: &[String], filter: &[String]) -> Result<Outcome> {
    if names.is_empty() {
        return Ok(Outcome::Skipped("there are none".to_owned()));
    }
    tests(&mut userspace(names), filter).map(Outcome::Tests)
}

/// Runs `cargo test`, shows what it prints, and counts. The test programs run as root.
fn tests(command: &mut Command, filter: &[String]) -> Result<Counts> {
    if !is_root() {
        if which("sudo").is_none() {
            bail!("tests make network namespaces and load BPF programs: run this as root");
        }
        command.env(
            format!("CARGO_TARGET_{}_RUNNER", host().to_uppercase().replace('-', "_")),
            "sudo -E",
        );
    }
    command.args(["--no-fail-fast", "--"]).args(filter);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no stdout")?;
    let mut counts = Counts::default();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cargo test")?;
        if let Some(result) = line.strip_prefix("test result: ") {
            counts = counts + parse_result(result);
        }
        println!("{line}");
    }
    let status = child.wait().context("cargo test")?;
    // Without a failed test it is the build, or a test program that was killed.
    if !status.success() && counts.failed == 0 {
        bail!("cargo test failed ({status})");
    }
    Ok(counts)
}

/// `ok. 11 passed; 0 failed; 2 ignored; …`
fn parse_result(text: &str) -> Counts {
    let number = |what: &str| {
        let words: Vec<&str> = text.split([' ', ';', '.']).filter(|word| !word.is_empty()).collect();
        let found = words.windows(2).find(|pair| pair[1] == what);
        found.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
    };
    Counts {
        passed: number("passed"),
        failed: number("failed"),
        ignored: number("ignored"),
    }
}

/// The triple that cargo builds tests for.
fn host() -> String {
    format!(
        "{}-unknown-linux-{}",
        env::consts::ARCH,
        if cfg!(target_env = "musl") { "musl" } else { "gnu" }
    )
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn results_of_test_programs_are_counted() {
        let counts =
            parse_result("FAILED. 10 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 2.06s");
        assert_eq!((counts.passed, counts.failed, counts.ignored), (10, 1, 2));
    }
}
