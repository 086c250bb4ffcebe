//! `cargo xtask test`: every check there is, in one list of results with one line at its end.
//!
//! All test programs are built at once and run directly, each test as a process of its own
//! ([`runner`]): its time is known, what it prints is shown when it fails, it can be stopped when
//! it hangs, and it can say that it had nothing to work with ([`shunt_lab::skip!`]). Tests mostly
//! wait; so lints and documentation ([`checks`]) are built beside them, at the lowest priority.
//!
//! Tests with `#[ignore]` belong to `--peers` when a module of theirs is called `peers`, and to
//! `--long` otherwise.

mod checks;
mod peers;
mod programs;
mod report;
mod runner;
mod this;
pub(crate) mod traces;

use std::{
    num::NonZero,
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Result, bail};

use crate::{
    setup,
    shell::{is_root, root, say, target, which},
};
use programs::{Program, Which};
use report::Report;

/// Arguments of `test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only tests whose `PROGRAM TEST` has one of these in it, and no other checks.
    names: Vec<String>,
    /// The long tests alone: two minutes of clients, churn, killed agents and a SYN flood at once
    /// (SHUNT_LONG_SECONDS and SHUNT_LONG_SEED set its length and repeat its course), an API server
    /// that is away for a minute, the image in containerd, and packets in other kernels.
    #[arg(long)]
    long: bool,
    /// The tests with other people's programs alone; these are installed or built once, into
    /// `target/peers`.
    #[arg(long, conflicts_with = "long")]
    peers: bool,
    /// Shows what tests print, also of those that pass.
    #[arg(long)]
    nocapture: bool,
    /// Tests that run at a time [default: two for a CPU, and not many more than 16].
    #[arg(long, value_name = "N")]
    jobs: Option<NonZero<usize>>,
}

/// Runs what was asked for, also after something that failed.
///
/// # Errors
///
/// When the set-up or the build of the tests fails, or any test or check did.
pub(crate) fn test(args: &Args) -> Result<()> {
    let began = Instant::now();
    setup::setup()?;
    if !is_root() && which("sudo").is_none() {
        bail!("tests make network namespaces and load BPF programs: run this as root");
    }
    this::keep()?;
    let report = Report::default();
    report.section("set-up", began.elapsed());
    let run = format!(
        "{}-{}",
        std::process::id(),
        SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap_or_default()
            .as_nanos()
    );
    let before = traces::now(None)?;
    let result = sections(args, &run, &report);
    if let Err(error) = result {
        report.failed(
            "build",
            "of the tests",
            Duration::ZERO,
            &format!("{error:#}"),
        );
    }
    report.timed("traces", || {
        traces::judge(&report, traces::left(&run, &before));
    });
    report.summary(began.elapsed())
}

fn sections(args: &Args, run: &str, report: &Report) -> Result<()> {
    let all = args.names.is_empty() && !args.long && !args.peers;
    if all {
        report.timed("format", || checks::format(report));
    }
    let programs = report.timed("build of the tests", programs::build)?;
    let kind = match (args.long, args.peers) {
        (true, _) => Which::Long,
        (_, true) => Which::Peers,
        _ => Which::Usual,
    };
    let mut settings = runner::Settings {
        run: run.to_owned(),
        jobs: args.jobs.map_or_else(jobs, NonZero::get),
        show: args.nocapture || args.long,
        variables: Vec::new(),
    };
    if args.long {
        // Each of them wants the machine for itself.
        settings.jobs = 1;
    }
    if args.peers {
        report.timed("peers", || settings.variables = peers::prepare());
    }
    let tests = report.timed("list of the tests", || {
        programs::tests(&programs, kind, &args.names)
    })?;
    if args.long {
        report.timed("long tests", || runner::run(&tests, &settings, report));
        if args.names.is_empty() {
            others(run, report)?;
        }
        return Ok(());
    }
    thread::scope(|scope| {
        if all {
            scope.spawn(|| checks::beside_tests(report));
        }
        report.timed("tests", || runner::run(&tests, &settings, report));
        if all {
            report.timed("demo", || {
                demo(run, &programs, "one round", &["--once"], report)
            });
            report.timed("story", || match setup::story() {
                Ok(()) => demo(run, &programs, "the story", &["--story", "--once"], report),
                Err(error) => {
                    report.failed("demo", "the story", Duration::ZERO, &format!("{error:#}"))
                }
            });
        }
    });
    if all {
        let long = programs::tests(&programs, Which::Long, &[])?.len();
        let peers = programs::tests(&programs, Which::Peers, &[])?.len();
        report.note(format!(
            "left to --long: {long} tests, the image, other kernels; to --peers: {peers} tests"
        ));
    }
    Ok(())
}

/// Two for a CPU: tests wait for much of their time. Where there are many CPUs, memory
/// is what agents and their maps share.
fn jobs() -> usize {
    let cpus = thread::available_parallelism().map_or(2, NonZero::get);
    (cpus * 2).min(16.max(cpus + 1))
}

/// One round of the demo, or the story, with the agent that the tests were built with.
fn demo(run: &str, programs: &[Program], name: &str, words: &[&str], report: &Report) {
    let Ok(this) = this::program() else { return };
    let mut command = Command::new(this);
    command.args(["run", "--built"]).args(words);
    command.env(shunt_lab::RUN_VARIABLE, run);
    if let Some(folder) = programs
        .first()
        .and_then(|program| program.path.ancestors().nth(2))
    {
        command.env("SHUNT_BIN", folder.join("shunt"));
    }
    checks::command(report, "demo", name, command.current_dir(root()));
}

/// What takes long besides tests: the image, tried out, and other kernels.
fn others(run: &str, report: &Report) -> Result<()> {
    let this = this::program()?;
    let xtask = |words: &[&str]| {
        let mut command = Command::new(this);
        command
            .args(words)
            .current_dir(root())
            .env(shunt_lab::RUN_VARIABLE, run);
        command
    };
    report.timed("image, tried out", || {
        checks::command(
            report,
            "image",
            "in containerd",
            &mut xtask(&["image", "--try"]),
        );
    });
    for kernel in ["6.1", "6.12"] {
        report.timed("other kernels", || {
            checks::command(
                report,
                "vm",
                &format!("Linux {kernel}"),
                &mut xtask(&["vm", "--kernel", kernel]),
            );
        });
    }
    say(
        "test",
        format_args!("logs are in {}", target().join("test-logs").display()),
    );
    Ok(())
}
