//! Bar charts as SVG.

use std::{fs, path::Path};

use anyhow::{Result, anyhow};
use plotters::{
    backend::SVGBackend,
    drawing::IntoDrawingArea,
    element::{PathElement, Rectangle, Text},
    style::{
        Color, IntoFont, RGBColor, TextStyle, WHITE,
        text_anchor::{HPos, Pos, VPos},
    },
};

use super::Row;

/// Height of a bar and of the space around it, in pixels.
const BAR: i32 = 14;
const STEP: i32 = 20;
/// Width of the labels, of the bars and of the values behind them.
const LABELS: i32 = 460;
const BARS: i32 = 420;
const VALUES: i32 = 90;
/// Height of the title.
const TITLE: i32 = 44;

const INK: RGBColor = RGBColor(38, 43, 51);
const FAINT: RGBColor = RGBColor(150, 156, 166);
const GOOD: RGBColor = RGBColor(64, 133, 96);
const MISSED: RGBColor = RGBColor(196, 78, 62);
const PLAIN: RGBColor = RGBColor(84, 116, 168);

/// Horizontal bars in their order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chart {
    /// Above the bars.
    pub(crate) title: String,
    /// Label, value, and whether it is as it should be.
    pub(crate) bars: Vec<(String, f64, Option<bool>)>,
    /// A line across all bars.
    pub(crate) line: Option<f64>,
}

impl Chart {
    /// The ratios of a group; `None` if it has none.
    pub(super) fn of_ratios<'a>(group: &str, rows: impl Iterator<Item = &'a Row>) -> Option<Self> {
        let bars: Vec<_> = rows
            .filter_map(|row| Some((row.name.clone(), row.ratio?, row.holds)))
            .collect();
        let title = format!("{group}: ratios; green and red: the target is reached or missed");
        (!bars.is_empty()).then_some(Self {
            title,
            bars,
            line: Some(1.0),
        })
    }

    /// Writes the chart.
    ///
    /// # Errors
    ///
    /// When the file or its folder cannot be written.
    pub(crate) fn draw(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut svg = String::new();
        self.render(&mut svg)
            .map_err(|error| anyhow!("cannot draw: {error}"))?;
        fs::write(path, svg)?;
        Ok(())
    }

    fn render(&self, svg: &mut String) -> Result<(), String> {
        let height = TITLE + STEP * self.bars.len() as i32 + STEP;
        let area = SVGBackend::with_string(svg, ((LABELS + BARS + VALUES) as u32, height as u32))
            .into_drawing_area();
        let longest = self
            .bars
            .iter()
            .map(|bar| bar.1)
            .chain(self.line)
            .fold(f64::MIN_POSITIVE, f64::max);
        let x = |value: f64| LABELS + (value.max(0.0) / longest * f64::from(BARS)) as i32;
        let text = |size: i32, color: &'static RGBColor, side: HPos| {
            TextStyle::from(("sans-serif", size).into_font())
                .color(color)
                .pos(Pos::new(side, VPos::Center))
        };
        let draw = || {
            area.fill(&WHITE)?;
            area.draw(&Text::new(
                self.title.clone(),
                (16, TITLE / 2),
                text(16, &INK, HPos::Left),
            ))?;
            for (place, (label, value, holds)) in self.bars.iter().enumerate() {
                let top = TITLE + STEP * place as i32;
                let middle = top + BAR / 2;
                let color = match holds {
                    Some(true) => GOOD,
                    Some(false) => MISSED,
                    None => PLAIN,
                };
                area.draw(&Rectangle::new(
                    [(LABELS, top), (x(*value), top + BAR)],
                    color.filled(),
                ))?;
                area.draw(&Text::new(
                    label.clone(),
                    (LABELS - 8, middle),
                    text(12, &INK, HPos::Right),
                ))?;
                let figure = if longest < 100.0 {
                    format!("{value:.2}")
                } else {
                    format!("{value:.0}")
                };
                area.draw(&Text::new(
                    figure,
                    (x(*value) + 6, middle),
                    text(12, &INK, HPos::Left),
                ))?;
            }
            if let Some(line) = self.line {
                area.draw(&PathElement::new(
                    [(x(line), TITLE - 6), (x(line), height - STEP + 2)],
                    FAINT,
                ))?;
            }
            area.present()
        };
        draw().map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_in_the_picture() {
        let chart = Chart {
            title: "a < b".to_owned(),
            bars: vec![
                ("direct".to_owned(), 1.0, None),
                ("socket".to_owned(), 0.5, Some(false)),
            ],
            line: Some(1.0),
        };
        let mut svg = String::new();
        chart.render(&mut svg).unwrap();
        assert!(
            svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"),
            "{svg}"
        );
        for text in ["a &lt; b", "direct", "socket", "1.00", "0.50", "#C44E3E"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
    }
}
