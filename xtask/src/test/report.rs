//! What became of every test and check.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Tests shorter than this are counted, and named only when they do not pass.
const WORTH_A_LINE: Duration = Duration::from_millis(500);
/// How many of the slowest are shown.
const SLOWEST: usize = 10;

#[derive(Debug)]
enum Outcome {
    Passed,
    Failed,
    Skipped(String),
}

/// How long something took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took {
    /// From its beginning to its end.
    pub(crate) time: Duration,
    /// CPU time, where that is known: a test that has little of it waits.
    pub(crate) cpu: Option<Duration>,
}

impl From<Duration> for Took {
    fn from(time: Duration) -> Self {
        Self { time, cpu: None }
    }
}

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>6.1} s", self.time.as_secs_f64())?;
        match self.cpu {
            Some(cpu) => write!(f, " ({:>5.1} s CPU)", cpu.as_secs_f64()),
            None => write!(f, "{:14}", ""),
        }
    }
}

#[derive(Debug)]
struct Entry {
    name: String,
    took: Took,
    outcome: Outcome,
}

#[derive(Debug, Default)]
struct Inner {
    entries: Vec<Entry>,
    sections: Vec<(&'static str, Duration)>,
    notes: Vec<String>,
}

/// Collects results from several threads.
#[derive(Debug, Default)]
pub(crate) struct Report(Mutex<Inner>);

impl Report {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something passed.
    pub(crate) fn passed(&self, program: &str, name: &str, took: impl Into<Took>) {
        let took = took.into();
        if took.time >= WORTH_A_LINE {
            println!("ok      {took}  {program} {name}");
        }
        self.add(program, name, took, Outcome::Passed);
    }

    /// Something failed, with what it printed.
    pub(crate) fn failed(&self, program: &str, name: &str, took: impl Into<Took>, output: &str) {
        let took = took.into();
        let mut text = format!("FAILED  {took}  {program} {name}\n");
        for line in output.trim_end().lines() {
            text.push_str(&format!("    {line}\n"));
        }
        print!("{text}");
        self.add(program, name, took, Outcome::Failed);
    }

    /// Something could not do its work here.
    pub(crate) fn skipped(&self, program: &str, name: &str, took: impl Into<Took>, reason: &str) {
        let took = took.into();
        println!("skipped {took}  {program} {name}: {reason}");
        self.add(program, name, took, Outcome::Skipped(reason.to_owned()));
    }

    fn add(&self, program: &str, name: &str, took: Took, outcome: Outcome) {
        let name = format!("{program} {name}");
        self.inner().entries.push(Entry {
            name,
            took,
            outcome,
        });
    }

    /// How long a part of the run took, apart from its tests.
    pub(crate) fn section(&self, name: &'static str, took: Duration) {
        let mut inner = self.inner();
        match inner.sections.iter_mut().find(|(known, _)| *known == name) {
            Some((_, time)) => *time += took,
            None => inner.sections.push((name, took)),
        }
    }

    /// Runs a part of the run, and notes how long it took.
    pub(crate) fn timed<T>(&self, name: &'static str, part: impl FnOnce() -> T) -> T {
        println!("\n== {name}");
        let began = Instant::now();
        let result = part();
        self.section(name, began.elapsed());
        result
    }

    /// Something to be said at the end.
    pub(crate) fn note(&self, text: String) {
        self.inner().notes.push(text);
    }

    /// Prints it all; the last line is the sum.
    ///
    /// # Errors
    ///
    /// When something failed.
    pub(crate) fn summary(&self, took: Duration) -> Result<()> {
        let mut inner = self.inner();
        let mut text = String::from("\n== summary\n");
        for (name, took) in &inner.sections {
            text.push_str(&format!("{:>7.1} s  {name}\n", took.as_secs_f64()));
        }
        text.push_str(&format!("{:>7.1} s  in all\n", took.as_secs_f64()));
        inner
            .entries
            .sort_by_key(|entry| std::cmp::Reverse(entry.took.time));
        let cpu: Duration = inner
            .entries
            .iter()
            .filter_map(|entry| entry.took.cpu)
            .sum();
        text.push_str(&format!(
            "{:>7.1} s  CPU time of the tests\n",
            cpu.as_secs_f64()
        ));
        text.push_str("\nslowest:\n");
        for entry in inner.entries.iter().take(SLOWEST) {
            text.push_str(&format!(" {}  {}\n", entry.took, entry.name));
        }
        let (mut passed, mut skipped, mut failed) = (0, Vec::new(), Vec::new());
        for entry in &inner.entries {
            match &entry.outcome {
                Outcome::Passed => passed += 1,
                Outcome::Skipped(reason) => skipped.push(format!("{}: {reason}", entry.name)),
                Outcome::Failed => failed.push(entry.name.clone()),
            }
        }
        for (what, list) in [("skipped", &mut skipped), ("failed", &mut failed)] {
            list.sort();
            if !list.is_empty() {
                text.push_str(&format!("\n{what}:\n  {}\n", list.join("\n  ")));
            }
        }
        for note in &inner.notes {
            text.push_str(&format!("\n{note}\n"));
        }
        println!("{text}");
        println!("{}", counts(passed, failed.len(), skipped.len()));
        if passed + skipped.len() == 0 && failed.is_empty() {
            bail!("no test has such a name");
        }
        if !failed.is_empty() {
            bail!("{} failed", failed.len());
        }
        Ok(())
    }
}

fn counts(passed: usize, failed: usize, skipped: usize) -> String {
    format!("{passed} passed, {failed} failed, {skipped} skipped")
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_skipped_test_is_neither_passed_nor_failed() {
        let report = Report::default();
        report.passed("a", "one", Duration::ZERO);
        report.skipped("a", "two", Duration::ZERO, "no SCTP");
        report.summary(Duration::ZERO).unwrap();
        report.failed("a", "three", Duration::ZERO, "why");
        assert_eq!(
            report.summary(Duration::ZERO).unwrap_err().to_string(),
            "1 failed"
        );
        assert_eq!(counts(1, 1, 1), "1 passed, 1 failed, 1 skipped");
    }
}
