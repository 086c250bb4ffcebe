//! Groups that the crate `shunt-bench` measures: it links the agent's library, and prints lines of
//! JSON.

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
        let unit = ["ns", "µs", "ms", "s", "MiB"]
            .into_iter()
            .find(|unit| *unit == self.unit);
        let mut row =
            Row::value(self.name, self.value, unit.unwrap_or_default()).spread(self.spread);
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

/// Builds `shunt-bench`, has it measure, and makes rows of the lines, of which there will be about
/// `steps`.
///
/// # Errors
///
/// When it cannot be built, or fails.
pub(super) fn measure(bench: &mut Bench, what: &str, steps: usize) -> Result<()> {
    bench.step("building shunt-bench");
    run(cargo().args(["build", "--quiet", "--release", "--package=shunt-bench"]))?;
    let mut command = Command::new(target().join("release/shunt-bench"));
    command
        .arg(what)
        .args(bench.quick.then_some("--quick"))
        .env("SHUNT_BIN", &bench.shunt)
        .stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot run shunt-bench")?;
    let stdout = child.stdout.take().context("shunt-bench has no stdout")?;
    bench.steps(steps);
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
