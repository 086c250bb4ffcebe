//! The rows that a measurement gives.

use anyhow::Result;
use serde::Serialize;

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// What is measured together.
    pub(crate) group: String,
    /// The figure.
    pub(crate) name: String,
    /// Its median.
    pub(crate) value: f64,
    /// What it is counted in.
    pub(crate) unit: &'static str,
    /// What it stands beside, in the same unit.
    pub(crate) baseline: Option<f64>,
    /// Value by baseline.
    pub(crate) ratio: Option<f64>,
    /// The bound that the ratio (or the value, without a baseline) should keep: `<= 1.25`.
    pub(crate) target: Option<String>,
    /// Whether it does.
    pub(crate) holds: Option<bool>,
}

impl Row {
    /// A figure beside a baseline; `at_most`: the bound on their ratio.
    pub(crate) fn beside(
        group: &str,
        name: &str,
        value: f64,
        baseline: f64,
        unit: &'static str,
        at_most: Option<f64>,
    ) -> Self {
        let ratio = value / baseline;
        Self {
            group: group.to_owned(),
            name: name.to_owned(),
            value,
            unit,
            baseline: Some(baseline),
            ratio: Some(ratio),
            target: at_most.map(|bound| format!("<= {bound}")),
            holds: at_most.map(|bound| ratio <= bound),
        }
    }

    /// A figure on its own; `at_most`: the bound on it.
    pub(crate) fn alone(group: &str, name: &str, value: f64, unit: &'static str, at_most: Option<f64>) -> Self {
        Self {
            group: group.to_owned(),
            name: name.to_owned(),
            value,
            unit,
            baseline: None,
            ratio: None,
            target: at_most.map(|bound| format!("<= {bound} {unit}")),
            holds: at_most.map(|bound| value <= bound),
        }
    }
}

/// Prints rows as the JSON that `cargo xtask bench` reads.
pub(crate) fn print(rows: &[Row]) -> Result<()> {
    println!("{}", serde_json::json!({ "rows": rows }));
    Ok(())
}

/// The mean of the middle half: as steady as the median, and finer than whole nanoseconds.
pub(crate) fn middle(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    let quarter = figures.len() / 4;
    let half = &figures[quarter..figures.len() - quarter];
    half.iter().sum::<f64>() / half.len() as f64
}
