//! Rows as tables, JSON or YAML, once or as they change (`--watch`).

use std::{collections::BTreeMap, mem::ManuallyDrop, thread, time::Duration};

use serde::Serialize;

use super::{Output, print, table};

/// How often `--watch` looks.
const LOOK: Duration = Duration::from_secs(1);

/// One column of a table.
pub(super) struct Column<R> {
    title: &'static str,
    only_wide: bool,
    cell: fn(&R) -> String,
}

impl<R> Column<R> {
    /// One that is always there.
    pub(super) const fn new(title: &'static str, cell: fn(&R) -> String) -> Self {
        Self {
            title,
            only_wide: false,
            cell,
        }
    }

    /// One that `-o wide` has, for others leave no room for it.
    pub(super) const fn wide(title: &'static str, cell: fn(&R) -> String) -> Self {
        Self {
            title,
            only_wide: true,
            cell,
        }
    }
}

/// The columns that an output has.
fn chosen<R>(output: Output, columns: &[Column<R>]) -> impl Iterator<Item = &Column<R>> + Clone {
    columns
        .iter()
        .filter(move |column| output == Output::Wide || !column.only_wide)
}

fn cells<'a, R>(
    row: &'a R,
    columns: impl Iterator<Item = &'a Column<R>> + 'a,
) -> impl Iterator<Item = String> + 'a {
    columns.map(|column| (column.cell)(row))
}

/// Rows as text.
pub(super) fn text<R: Serialize>(
    output: Output,
    rows: &[R],
    columns: &[Column<R>],
) -> anyhow::Result<String> {
    if let Some(text) = output.structured(&rows)? {
        return Ok(text);
    }
    let columns = chosen(output, columns);
    let titles = columns.clone().map(|column| column.title);
    Ok(table(
        titles,
        rows.iter().map(|row| cells(row, columns.clone())),
    ))
}

/// Prints rows, all of them.
pub(super) fn print_rows<R: Serialize>(
    output: Output,
    rows: Vec<R>,
    columns: &[Column<R>],
) -> anyhow::Result<()> {
    // The process ends. To give the memory of 100,000 rows back piece by piece would be a third of
    // its time.
    let rows = ManuallyDrop::new(rows);
    print(&text(output, &rows, columns)?)
}

/// A row that has come, changed or gone.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Change<'a, R> {
    #[serde(flatten)]
    row: &'a R,
    /// It is there no more.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    gone: bool,
}

/// What is said of a row by `--watch`: `key` tells rows from each other, and what is in `state`
/// makes one worth being told of again.
pub(super) trait Watched {
    /// What tells it from others.
    type Key: Ord;
    /// What changes matter of it.
    type State: PartialEq;
    /// See [`Self::Key`].
    fn key(&self) -> Self::Key;
    /// See [`Self::State`].
    fn state(&self) -> Self::State;
}

/// What is to be told between two looks: in the order of the keys, those that are gone last.
fn changes<'a, R: Watched>(before: &'a [R], now: &'a [R]) -> Vec<Change<'a, R>> {
    let index = |rows: &'a [R]| -> BTreeMap<R::Key, &'a R> {
        rows.iter().map(|row| (row.key(), row)).collect()
    };
    let (before, now) = (index(before), index(now));
    let is_news = |(key, row): &(&R::Key, &&R)| {
        before
            .get(*key)
            .is_none_or(|old| old.state() != row.state())
    };
    let new = now.iter().filter(is_news).map(|(_, row)| (*row, false));
    let gone = before
        .iter()
        .filter(|(key, _)| !now.contains_key(*key))
        .map(|(_, row)| (*row, true));
    new.chain(gone)
        .map(|(row, gone)| Change { row, gone })
        .collect()
}

/// Prints rows, and from then on each that has come, changed or gone, until it is interrupted.
pub(super) fn watch<R: Serialize + Watched>(
    output: Output,
    columns: &[Column<R>],
    read: impl Fn() -> anyhow::Result<Vec<R>>,
) -> anyhow::Result<()> {
    let mut before = read()?;
    let is_table = output.is_table();
    let first = text(output, &before, columns)?;
    // A line each, as what follows.
    match is_table {
        true => print(&first)?,
        false => {
            for row in &before {
                print(&document(output, row)?)?;
            }
        }
    }
    let mut widths: Vec<usize> = chosen(output, columns)
        .map(|column| column.title.len())
        .collect();
    let mut align = |row: &R| {
        let cells = cells(row, chosen(output, columns)).zip(&mut widths);
        let cells = cells.map(|(cell, width)| {
            *width = (*width).max(cell.chars().count());
            format!("{cell:<width$}", width = *width)
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    before.iter().for_each(|row| drop(align(row)));
    loop {
        thread::sleep(LOOK);
        let now = read()?;
        for change in changes(&before, &now) {
            let text = match is_table {
                true => {
                    let gone = if change.gone { "  gone" } else { "" };
                    align(change.row).trim_end().to_owned() + gone
                }
                false => document(output, &change)?,
            };
            print(&text)?;
        }
        before = now;
    }
}

/// One of several documents.
fn document(output: Output, value: &impl Serialize) -> anyhow::Result<String> {
    Ok(match output {
        Output::Yaml => format!("---\n{}", serde_saphyr::to_string(value)?.trim_end()),
        _ => serde_json::to_string(value)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq, Serialize)]
    struct Row {
        name: &'static str,
        backends: u32,
        flows: u64,
    }

    impl Watched for Row {
        type Key = &'static str;
        type State = u32;

        fn key(&self) -> Self::Key {
            self.name
        }

        fn state(&self) -> Self::State {
            self.backends
        }
    }

    fn row(name: &'static str, backends: u32, flows: u64) -> Row {
        Row {
            name,
            backends,
            flows,
        }
    }

    #[test]
    fn what_comes_changes_and_goes_is_told_and_counters_are_not() {
        let before = [row("a", 1, 0), row("b", 1, 0), row("c", 1, 0)];
        let now = [row("d", 0, 0), row("b", 2, 0), row("c", 1, 900)];
        let told: Vec<(&str, bool)> = changes(&before, &now)
            .iter()
            .map(|change| (change.row.name, change.gone))
            .collect();
        assert_eq!(told, [("b", false), ("d", false), ("a", true)]);
        assert_eq!(changes(&now, &now), []);
        let gone = document(Output::Json, &changes(&before, &[])[0]).unwrap();
        assert_eq!(gone, r#"{"name":"a","backends":1,"flows":0,"gone":true}"#);
    }

    #[test]
    fn wide_tables_have_more_columns() {
        let columns = [
            Column::new("NAME", |row: &Row| row.name.to_owned()),
            Column::wide("FLOWS", |row: &Row| row.flows.to_string()),
        ];
        let rows = [row("a", 1, 7)];
        let wide = text(Output::Wide, &rows, &columns).unwrap();
        assert_eq!(wide, "NAME  FLOWS\na     7");
        assert_eq!(text(Output::Table, &rows, &columns).unwrap(), "NAME\na");
    }
}
