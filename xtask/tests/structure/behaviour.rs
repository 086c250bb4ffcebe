//! `docs/behaviour.md`: rows that the code cites, and tests that hold them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use super::root;

/// What a row without a test begins with, before the reason.
const NONE: &str = "none: ";

/// A row's id and its last column.
fn rows() -> BTreeMap<String, String> {
    let text = fs::read_to_string(root().join("docs/behaviour.md")).expect("docs/behaviour.md");
    let row = |line: &str| {
        let cells: Vec<&str> = line
            .strip_prefix("| ")?
            .strip_suffix(" |")?
            .split(" | ")
            .collect();
        let id = *cells.first().filter(|id| is_id(id))?;
        assert!(cells.len() >= 4, "row {id} has no column of tests");
        Some((id.to_owned(), cells.last()?.trim().to_owned()))
    };
    text.lines().filter_map(row).collect()
}

fn is_id(word: &str) -> bool {
    let mut letters = word.chars();
    letters
        .next()
        .is_some_and(|first| first.is_ascii_uppercase())
        && (2..=3).contains(&word.len())
        && letters.all(|letter| letter.is_ascii_digit())
}

/// Calls `see` with every Rust source of the workspace.
fn sources(folder: &Path, see: &mut impl FnMut(&Path, &str)) {
    for entry in fs::read_dir(folder)
        .expect("a folder of the workspace")
        .flatten()
    {
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() {
            if !name.to_string_lossy().starts_with('.') && name != "target" {
                sources(&path, see);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            see(&path, &fs::read_to_string(&path).expect("a source"));
        }
    }
}

/// The functions that are tests: `#[test]`, or one that proptest makes of a function.
fn tests() -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    sources(&root(), &mut |_, text| {
        let (mut is_test, mut in_macro) = (false, false);
        for line in text.lines().map(str::trim) {
            // Tests that a macro makes of a table: `name: …` in `networks! { … }`.
            in_macro = line == "networks! {" || in_macro && line != "}";
            if in_macro && let Some((name, _)) = line.split_once(": ") {
                tests.insert(name.to_owned());
            }
            is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            let Some(rest) = line.split_once("fn ").map(|(_, rest)| rest) else {
                continue;
            };
            if is_test && let Some((name, _)) = rest.split_once('(') {
                tests.insert(name.to_owned());
            }
            is_test = false;
        }
    });
    tests
}

#[test]
fn every_row_names_tests_that_exist_or_says_why_not() {
    let tests = tests();
    let mut wrong = Vec::new();
    let rows = rows();
    assert!(rows.len() > 60, "docs/behaviour.md has {} rows", rows.len());
    for (id, cell) in rows {
        if cell
            .strip_prefix(NONE)
            .is_some_and(|reason| !reason.is_empty())
        {
            continue;
        }
        let named: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
        if named.is_empty() {
            wrong.push(format!(
                "{id}: names no test and does not say why (`{NONE}…`)"
            ));
        }
        let missing = named.iter().filter(|name| !tests.contains(**name));
        wrong.extend(missing.map(|name| format!("{id}: there is no test {name}")));
    }
    assert!(wrong.is_empty(), "docs/behaviour.md:\n{}", wrong.join("\n"));
}

#[test]
fn comments_cite_rows_that_exist() {
    let rows = rows();
    let mut wrong = Vec::new();
    sources(&root(), &mut |path, text| {
        for (number, line) in text.lines().enumerate() {
            let Some((_, comment)) = line.split_once("//") else {
                continue;
            };
            // A citation stands in brackets, alone or with others: (L4), (B3, B7).
            for bracket in comment
                .split('(')
                .skip(1)
                .filter_map(|rest| rest.split_once(')'))
            {
                let words: Vec<&str> = bracket.0.split(", ").collect();
                if words.iter().all(|word| is_id(word)) {
                    let unknown = words.iter().filter(|word| !rows.contains_key(**word));
                    let place = format!("{}:{}", path.display(), number + 1);
                    wrong.extend(unknown.map(|word| format!("{place}: no row {word}")));
                }
            }
        }
    });
    assert!(
        wrong.is_empty(),
        "rows that docs/behaviour.md does not have:\n{}",
        wrong.join("\n")
    );
}
