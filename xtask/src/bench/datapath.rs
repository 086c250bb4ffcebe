//! Nanoseconds per packet and per call of the loaded programs: the crate `shunt-bench` measures, and prints lines.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::{Bench, Row, Target};
use crate::shell::{cargo, run, target};

/// What `shunt-bench` says of a figure's bound.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Bound {
    AtMost(f64),
    Within(f64),
    ValueAtMost(f64),
}

/// A line of `shunt-bench`.
#[derive(Deserialize)]
struct Line {
    name: String,
    value: f64,
    unit: String,
    against: Option<String>,
    baseline: Option<f64>,
    spread: f64,
    target: Option<Bound>,
}

impl Line {
    fn into_row(self) -> Row {
        let unit = match &*self.unit {
            "ns" => "ns",
            _ => "",
        };
        let mut row = Row::value(self.name, self.value, unit).spread(self.spread);
        if let (Some(against), Some(baseline)) = (self.against, self.baseline) {
            row = row.against(&against, baseline);
        }
        match self.target {
            Some(Bound::AtMost(most)) => row.target(Target::AtMost(most)),
            Some(Bound::Within(distance)) => row.target(Target::Within(distance)),
            Some(Bound::ValueAtMost(most)) => row.target(Target::ValueAtMost(most)),
            None => row,
        }
    }
}

/// Measures.
///
/// # Errors
///
/// When the programs cannot be built, loaded or run.
pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    bench.step("building the floor programs");
    run(cargo().args(["build", "--quiet", "--release", "--package=shunt-bench"]))?;
    let mut command = Command::new(target().join("release/shunt-bench"));
    command
        .arg("datapath")
        .args(bench.quick.then_some("--quick"))
        .stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot run shunt-bench")?;
    let stdout = child.stdout.take().context("shunt-bench has no stdout")?;
    bench.steps(LINES);
    for line in BufReader::new(stdout).lines() {
        let line: Line = serde_json::from_str(&line?).context("shunt-bench")?;
        bench.step(line.name.clone());
        bench.row(line.into_row());
    }
    let status = child.wait().context("shunt-bench")?;
    if !status.success() {
        bail!("shunt-bench failed ({status})");
    }
    Ok(())
}

/// About how many lines there will be.
const LINES: usize = 162;
