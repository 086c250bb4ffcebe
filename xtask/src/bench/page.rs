//! `BENCHMARKS.md`: the tables between its marks are rewritten, everything else is written by hand
//! and stays.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::report::{HEADINGS, Row};
use crate::shell::{capture, root, say};

/// The page of a repository that has none yet.
const NEW: &str = "\
# Benchmarks

`cargo xtask bench` writes the tables of this page; the text between them is written by hand. Ratios are what counts:
both sides are measured in turn in one run, pinned to one CPU. Absolute figures are those of the machine named.

## What was not reached

One section per missed target, headed by the row's name or how the names of several begin: what was tried, what the profile
shows, what would have to change.
";

/// Rewrites the tables of the groups that `rows` has, and says which missed targets the page does
/// not explain.
///
/// # Errors
///
/// When the page cannot be read or written.
pub(super) fn rewrite(rows: &[Row]) -> Result<()> {
    let path = root().join("BENCHMARKS.md");
    let old = if path.exists() {
        fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?
    } else {
        NEW.to_owned()
    };
    let mut page = old;
    let mut groups: Vec<&str> = rows.iter().map(|row| row.group).collect();
    groups.dedup();
    for group in groups {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.group == group).collect();
        page = with_table(
            &page,
            group,
            &format!("{}\n\n{}", circumstances(), table(&rows)),
        );
    }
    fs::write(&path, &page).with_context(|| format!("{}", path.display()))?;
    say("wrote", path.display());
    for row in unexplained(&page, rows) {
        say(
            "missed",
            format!(
                "{}: {}: BENCHMARKS.md has no section `### {}`",
                row.group, row.name, row.name
            ),
        );
    }
    Ok(())
}

/// The page with what stands between a group's marks replaced; a group without marks gets a section
/// of its own, before what was not reached.
fn with_table(page: &str, group: &str, table: &str) -> String {
    let (begin, end) = (format!("<!-- {group} -->"), format!("<!-- /{group} -->"));
    let text = format!("{begin}\n{table}\n{end}");
    if let (Some(first), Some(last)) = (page.find(&begin), page.find(&end)) {
        return format!("{}{text}{}", &page[..first], &page[last + end.len()..]);
    }
    let place = page.find("## What was not reached").unwrap_or(page.len());
    format!(
        "{}## {group}\n\n{text}\n\n{}",
        &page[..place],
        &page[place..]
    )
}

fn table(rows: &[&Row]) -> String {
    let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
    let mut lines = vec![
        line(&HEADINGS.map(str::to_owned)),
        "|---|--:|---|--:|--:|--:|---|---|".to_owned(),
    ];
    lines.extend(rows.iter().map(|row| line(&row.cells())));
    lines.join("\n")
}

/// Missed targets that no heading names: a heading is a row's name or how the names of several rows
/// begin.
fn unexplained<'a>(page: &str, rows: &'a [Row]) -> Vec<&'a Row> {
    let explained = |row: &Row| {
        let mut headings = page.lines().filter_map(|line| line.strip_prefix("### "));
        headings.any(|heading| row.name.starts_with(heading.trim_end()))
    };
    rows.iter()
        .filter(|row| row.holds == Some(false) && !explained(row))
        .collect()
}

/// Date, machine, kernel and commit.
pub(super) fn circumstances() -> String {
    let said = |program: &str, args: &[&str]| {
        let mut command = std::process::Command::new(program);
        command.args(args).current_dir(root());
        capture(&mut command).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
    };
    let cpu = fs::read_to_string(Path::new("/proc/cpuinfo")).unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown CPU", |(_, model)| model);
    let cpus = std::thread::available_parallelism().map_or(1, Into::into);
    let changed = if said("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty() {
        ""
    } else {
        " and changes"
    };
    format!(
        "{}; {model}, {cpus} CPUs; Linux {} {}; commit {}{changed}.",
        said("date", &["--utc", "+%Y-%m-%d"]),
        rustix::system::uname().release().to_string_lossy(),
        rustix::system::uname().machine().to_string_lossy(),
        said("git", &["rev-parse", "--short", "HEAD"]),
    )
}

#[cfg(test)]
mod tests {
    use super::{super::report::Target, *};

    #[test]
    fn tables_are_replaced_and_the_rest_stays() {
        let page = with_table(NEW, "sync", "one");
        let page = with_table(&page, "datapath", "two");
        let page = with_table(&format!("{page}\n### by hand\n\nkept\n"), "sync", "three");
        assert!(
            page.contains("<!-- sync -->\nthree\n<!-- /sync -->"),
            "{page}"
        );
        assert!(
            page.contains("<!-- datapath -->\ntwo\n<!-- /datapath -->"),
            "{page}"
        );
        assert!(
            page.contains("### by hand\n\nkept\n") && !page.contains("one\n<!--"),
            "{page}"
        );
        assert!(
            page.find("two") < page.find("## What was not reached"),
            "{page}"
        );
    }

    #[test]
    fn a_missed_target_asks_for_a_section() {
        let missed = Row::value("slow", 2.0, "ns")
            .against("floor", 1.0)
            .target(Target::AtMost(1.0));
        let rows = [missed.clone(), Row::value("plain", 1.0, "ns")];
        assert_eq!(unexplained(NEW, &rows).len(), 1);
        assert!(unexplained("### slow / floor\n", &rows).is_empty());
        assert!(unexplained("### slow\n", &rows).is_empty());
        assert_eq!(unexplained("### fast\n", &rows).len(), 1);
    }
}
