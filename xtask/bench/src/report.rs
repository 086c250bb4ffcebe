//! The lines of JSON that a measurement prints, which `cargo xtask bench` makes rows of.

use serde::Serialize;

/// What a figure should be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// Its ratio at most.
    AtMost(f64),
    /// The figure itself at most.
    ValueAtMost(f64),
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Line {
    /// What was measured.
    pub(crate) name: String,
    /// The middle of its rounds.
    pub(crate) value: f64,
    /// What it is counted in.
    pub(crate) unit: &'static str,
    /// What it stands beside, in words.
    pub(crate) against: Option<&'static str>,
    /// The same as a figure.
    pub(crate) baseline: Option<f64>,
    /// Half the distance between the quartiles of the ratios (or, without a baseline, figures), as
    /// a part of the middle.
    pub(crate) spread: f64,
    /// What should be reached.
    pub(crate) target: Option<Target>,
}

impl Line {
    /// Prints it.
    pub(crate) fn print(&self) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
}

/// One figure of two builds, ns, each loaded twice: two loads of one build differ by where their
/// maps and code lie in memory.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Comparison {
    /// What was measured.
    pub(crate) name: String,
    /// The older one.
    pub(crate) old: f64,
    /// The newer one.
    pub(crate) new: f64,
    /// By how much the two loads of a build differ, of the build where they differ more.
    pub(crate) noise: f64,
}

impl Comparison {
    /// What the rounds of old, new, old again and new again come to; `empty` is to be taken off.
    pub(crate) fn of(name: String, rounds: &[Vec<f64>; 4], empty: f64) -> Self {
        let [old, new, old_again, new_again] = rounds.each_ref().map(|rounds| quick(rounds));
        Self {
            name,
            old: (old + old_again) / 2.0 - empty,
            new: (new + new_again) / 2.0 - empty,
            noise: (old - old_again).abs().max((new - new_again).abs()),
        }
    }

    /// Prints it.
    pub(crate) fn print(&self) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
}

/// The mean of the second eighth: what else the machine does makes rounds slower, never quicker.
pub(crate) fn quick(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let eighth = sorted.len() / 8;
    let part = &sorted[eighth..(2 * eighth).max(eighth + 1)];
    part.iter().sum::<f64>() / part.len() as f64
}

/// The mean of the middle half: as steady as the median, and finer than whole nanoseconds.
pub(crate) fn middle(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let quarter = sorted.len() / 4;
    let half = &sorted[quarter..sorted.len() - quarter];
    half.iter().sum::<f64>() / half.len() as f64
}

/// Half the distance between the quartiles, as a part of the middle.
pub(crate) fn spread(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let quarter = sorted.len() / 4;
    (sorted[sorted.len() - 1 - quarter] - sorted[quarter]) / 2.0 / middle(figures)
}
