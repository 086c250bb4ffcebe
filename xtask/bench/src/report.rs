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

/// One figure of two builds, ns.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Comparison {
    /// What was measured.
    pub(crate) name: String,
    /// The middle of the old one's rounds.
    pub(crate) old: f64,
    /// The same, further by the middle of the rounds' differences.
    pub(crate) new: f64,
}

impl Comparison {
    /// What the rounds of the old and the new one come to.
    pub(crate) fn of(name: String, [old, new]: [Vec<f64>; 2]) -> Self {
        let differences: Vec<f64> = new.iter().zip(&old).map(|(new, old)| new - old).collect();
        let old = middle(&old);
        Self {
            name,
            old,
            new: old + middle(&differences),
        }
    }

    /// Prints it.
    pub(crate) fn print(&self) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
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
