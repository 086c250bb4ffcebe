//! `cargo xtask bench`: what shunt costs, beside what a user would otherwise run, in one run on one
//! machine.
//!
//! Every group is a module with one function that measures and adds [`Row`]s. What counts is the
//! ratio of two medians of one run, whose rounds were interleaved (A B C A B C), so that a machine
//! that is slower for a while is so for all.

mod chart;
mod compare;
mod connections;
mod context;
mod datapath;
mod lines;
mod page;
mod report;
mod stats;
mod sync;

use std::{env, os::unix::process::CommandExt, time::Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    build, setup,
    shell::{as_root, cargo, is_root, run, say, show, target},
};

pub(crate) use chart::Chart;
pub(crate) use connections::peer;
pub(crate) use context::{Bench, Group};
pub(crate) use report::{Row, Target};

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// What to measure; everything if nothing is named.
    groups: Vec<Group>,
    /// Fewer rounds and smaller sizes: everything within a minute. The results page is left as it
    /// is.
    #[arg(long)]
    quick: bool,
    /// How results are printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Everything is built already: set when this starts itself again as root.
    #[arg(long, hide = true)]
    built: bool,
}

/// Other than measuring this tree.
#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// The programs of two commits in one run on one CPU, round by round: what changed by more than
    /// 3 % or 2 ns, whichever is larger.
    Compare(compare::Args),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// Builds, becomes root if it is not, measures and reports.
///
/// # Errors
///
/// When the build or a group fails; the other groups are measured and reported all the same.
pub(crate) fn bench(args: &Args) -> Result<()> {
    if let Some(Verb::Compare(args)) = &args.verb {
        setup::setup()?;
        anyhow::ensure!(is_root(), "bench compare loads programs: run it as root");
        return compare::compare(args);
    }
    if !args.built {
        build::build()?;
        // Clients and servers are this program, which itself is not optimized.
        run(cargo().args(["build", "--quiet", "--release", "--package", "xtask"]))?;
    }
    if !is_root() {
        let this = env::current_exe().context("this program's path")?;
        let mut command = as_root(&this.to_string_lossy())?;
        command
            .args(["bench", "--built"])
            .args(args.quick.then_some("--quick"));
        command.args((args.output == Output::Json).then_some("--output=json"));
        command.args(args.groups.iter().map(|group| group.name()));
        // Only returns when it cannot be started.
        let error = command.exec();
        return Err(error).with_context(|| format!("cannot run {}", show(&command)));
    }
    let groups = match &args.groups[..] {
        [] => Group::value_variants(),
        groups => groups,
    };
    let began = Instant::now();
    let mut bench = Bench {
        quick: args.quick,
        shunt: target().join("release/shunt"),
        group: groups[0],
        progress: ProgressBar::new(0),
        rows: Vec::new(),
    };
    bench.progress.set_style(
        ProgressStyle::with_template("{prefix:>11} [{bar:30}] {pos}/{len} {msg}")
            .context("progress")?
            .progress_chars("=> "),
    );
    let mut failed = Vec::new();
    for &group in groups {
        bench.group = group;
        bench.progress.set_prefix(group.name());
        let result = match group {
            Group::Datapath => datapath::measure(&mut bench),
            Group::Connections => connections::measure(&mut bench),
            Group::Sync => sync::measure(&mut bench),
        };
        if let Err(error) = result {
            bench
                .progress
                .suspend(|| eprintln!("error: {}: {error:#}", group.name()));
            failed.push(group.name());
        }
    }
    bench.progress.finish_and_clear();
    match args.output {
        Output::Table => println!("{}", report::table(&bench.rows)),
        Output::Json => println!("{}", report::json(&bench.rows)?),
    }
    for group in groups {
        let rows = bench.rows.iter().filter(|row| row.group == group.name());
        if let Some(chart) = Chart::of_ratios(group.name(), rows) {
            let path = target().join("bench").join(format!("{}.svg", group.name()));
            chart
                .draw(&path)
                .with_context(|| format!("{}", path.display()))?;
        }
    }
    if !args.quick {
        page::rewrite(&bench.rows)?;
    }
    say("took", format!("{:.0} s", began.elapsed().as_secs_f64()));
    if !failed.is_empty() {
        bail!("not measured: {}", failed.join(", "));
    }
    Ok(())
}
