//! What every group of measurements is given.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;
use indicatif::ProgressBar;

use super::{chart::Chart, report::Row};
use crate::shell::{say, target};

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// Nanoseconds per packet and per call of the loaded programs, beside floor programs that do
    /// only the unavoidable.
    Datapath,
    /// Connections, requests and bytes per second in a cluster of namespaces, beside direct routing
    /// and kube-proxy's rules.
    Connections,
    /// Time, CPU and memory from objects to maps.
    Sync,
}

impl Group {
    /// Its name, as on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Datapath => "datapath",
            Self::Connections => "connections",
            Self::Sync => "sync",
        }
    }
}

/// One run, as a group's function sees it.
pub(crate) struct Bench {
    /// Keep the group within 15 s: `--quick`.
    pub(crate) quick: bool,
    /// The release binary of the agent.
    pub(crate) shunt: PathBuf,
    /// The group that runs.
    pub(super) group: Group,
    pub(super) progress: ProgressBar,
    pub(super) rows: Vec<Row>,
}

impl Bench {
    /// Adds a result of the group that runs.
    pub(crate) fn row(&mut self, mut row: Row) {
        row.group = self.group.name();
        self.rows.push(row);
    }

    /// Draws a chart into `target/bench/<group>-<file>.svg`.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub(crate) fn chart(&self, file: &str, chart: &Chart) -> Result<()> {
        let path = target()
            .join("bench")
            .join(format!("{}-{file}.svg", self.group.name()));
        chart
            .draw(&path)
            .with_context(|| format!("{}", path.display()))
    }

    /// Says how many steps are to come; what was done of others is forgotten.
    pub(crate) fn steps(&self, steps: usize) {
        self.progress.reset();
        self.progress.set_length(steps as u64);
    }

    /// Says what is done now, and counts it as a step.
    pub(crate) fn step(&self, what: impl Into<String>) {
        let what = what.into();
        self.progress.inc(1);
        if self.progress.is_hidden() {
            say("bench", format!("{}: {what}", self.group.name()));
        } else {
            self.progress.set_message(what);
        }
    }
}
