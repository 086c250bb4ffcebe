//! Results as rows: a value, what it is compared with, and what the ratio should be.

use anyhow::Result;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

use super::stats::Median;

/// What a ratio, or a value, should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target {
    /// The ratio at most.
    AtMost(f64),
    /// The ratio at least.
    AtLeast(f64),
    /// The ratio not further than this from 1.
    Within(f64),
    /// The value itself at most, in the row's unit.
    ValueAtMost(f64),
}

impl Target {
    fn holds(self, value: f64, ratio: Option<f64>) -> Option<bool> {
        Some(match self {
            Self::AtMost(most) => ratio? <= most,
            Self::AtLeast(least) => ratio? >= least,
            Self::Within(distance) => (ratio? - 1.0).abs() <= distance,
            Self::ValueAtMost(most) => value <= most,
        })
    }

    fn text(self, unit: &str) -> String {
        match self {
            Self::AtMost(most) => format!("<= {most:.2}"),
            Self::AtLeast(least) => format!(">= {least:.2}"),
            Self::Within(distance) => format!("{:.2} to {:.2}", 1.0 - distance, 1.0 + distance),
            Self::ValueAtMost(most) => format!("<= {most} {unit}"),
        }
    }
}

/// One result.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// Of which group; set by [`super::Bench::row`].
    pub(crate) group: &'static str,
    /// What was measured and, after a slash, what it is compared with.
    pub(crate) name: String,
    /// The median.
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// What it is compared with, in the same unit.
    pub(crate) baseline: Option<f64>,
    /// `value` by `baseline`, of medians or round by round.
    pub(crate) ratio: Option<f64>,
    /// As text with its direction.
    pub(crate) target: Option<String>,
    /// Whether the target is reached.
    pub(crate) holds: Option<bool>,
    /// Half the distance between quartiles, as a part of the median: of the value, or of the ratio
    /// if there is one.
    #[serde(skip)]
    pub(crate) spread: Option<f64>,
}

impl Row {
    /// A value by itself.
    pub(crate) fn value(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self {
            group: "",
            name: name.into(),
            value,
            unit,
            baseline: None,
            ratio: None,
            target: None,
            holds: None,
            spread: None,
        }
    }

    /// The median of rounds.
    pub(crate) fn median(name: impl Into<String>, median: Median, unit: &'static str) -> Self {
        Self::value(name, median.value, unit).spread(median.spread)
    }

    /// Compared with `baseline`, which is said as `against`: the ratio is that of the two values.
    #[must_use]
    pub(crate) fn against(mut self, against: &str, baseline: f64) -> Self {
        self.name = format!("{} / {against}", self.name);
        self.baseline = Some(baseline);
        self.ratio = (baseline != 0.0).then_some(self.value / baseline);
        self
    }

    /// With a ratio taken round by round, and its spread.
    #[must_use]
    pub(crate) fn ratio(mut self, ratio: Median) -> Self {
        self.ratio = Some(ratio.value);
        self.spread(ratio.spread)
    }

    /// With how far rounds lay apart.
    #[must_use]
    pub(crate) fn spread(mut self, spread: f64) -> Self {
        self.spread = Some(spread);
        self
    }

    /// With what should be reached; after the ratio is known.
    #[must_use]
    pub(crate) fn target(mut self, target: Target) -> Self {
        self.holds = target.holds(self.value, self.ratio);
        self.target = Some(target.text(self.unit));
        self
    }

    /// The row as texts: name, value, unit, baseline, ratio, spread, target, verdict.
    pub(super) fn cells(&self) -> [String; 8] {
        let number = |value: Option<f64>| value.map(number).unwrap_or_default();
        [
            self.name.clone(),
            number(Some(self.value)),
            self.unit.to_owned(),
            number(self.baseline),
            self.ratio
                .map(|ratio| format!("{ratio:.3}"))
                .unwrap_or_default(),
            self.spread
                .map(|part| format!("±{:.1} %", part * 100.0))
                .unwrap_or_default(),
            self.target.clone().unwrap_or_default(),
            match self.holds {
                Some(true) => "yes".to_owned(),
                Some(false) => "NO".to_owned(),
                None => String::new(),
            },
        ]
    }
}

/// Headings of [`Row::cells`].
pub(super) const HEADINGS: [&str; 8] = [
    "name", "value", "unit", "baseline", "ratio", "spread", "target", "holds",
];

/// Three significant digits below a thousand, none after the point above.
fn number(value: f64) -> String {
    match value.abs() {
        small if small < 10.0 => format!("{value:.2}"),
        small if small < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// All rows, for a terminal.
pub(super) fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(
        ["group"]
            .iter()
            .chain(&HEADINGS)
            .map(|heading| heading.to_uppercase()),
    );
    for row in rows {
        table.add_row([row.group.to_owned()].into_iter().chain(row.cells()));
    }
    for column in [2, 4, 5, 6] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// All rows, for programs: `{"rows":[…]}`.
pub(super) fn json(rows: &[Row]) -> Result<String> {
    #[derive(Serialize)]
    struct Rows<'a> {
        rows: &'a [Row],
    }
    Ok(serde_json::to_string(&Rows { rows })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_have_a_direction() {
        let row = |value: f64| Row::value("a", value, "ns").against("b", 100.0);
        assert_eq!(row(125.0).target(Target::AtMost(1.25)).holds, Some(true));
        assert_eq!(row(126.0).target(Target::AtMost(1.25)).holds, Some(false));
        assert_eq!(row(97.9).target(Target::AtLeast(0.98)).holds, Some(false));
        assert_eq!(row(97.1).target(Target::Within(0.03)).holds, Some(true));
        assert_eq!(row(103.1).target(Target::Within(0.03)).holds, Some(false));
        assert_eq!(
            row(50.0).target(Target::ValueAtMost(50.0)).holds,
            Some(true)
        );
        // A value without a baseline reaches no ratio and misses none.
        assert_eq!(
            Row::value("a", 1.0, "ns").target(Target::AtMost(1.0)).holds,
            None
        );
    }

    #[test]
    fn json_has_the_fields_that_programs_read_and_no_others() {
        let row = Row::value("a", 110.0, "ns")
            .against("b", 100.0)
            .target(Target::AtMost(1.0))
            .spread(0.01);
        let text = json(&[row]).unwrap();
        assert_eq!(
            text,
            r#"{"rows":[{"group":"","name":"a / b","value":110.0,"unit":"ns","baseline":100.0,"ratio":1.1,"target":"<= 1.00","holds":false}]}"#
        );
    }
}
