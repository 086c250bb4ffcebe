//! The table of the demo, and a terminal that it is redrawn on.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::{IsTerminal, Write, stdout},
    time::{Duration, Instant},
};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use super::view::{Frontend, Hooks};

/// Latencies that a row keeps per client kind: the last ones, for a median that follows what
/// happens.
const KEPT_LATENCIES: usize = 256;
/// Without a terminal the table is printed anew after so long.
const PRINT_EVERY: Duration = Duration::from_secs(5);

/// Who dials, for the latency columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Vantage {
    /// A pod whose sockets are hooked.
    Pod,
    /// A pod whose packets are translated.
    Packets,
    /// A process on a node.
    Node,
    /// A host outside of the cluster.
    Outside,
}

/// What is known of one frontend.
#[derive(Default)]
pub(super) struct Row {
    /// Names of the servers behind its backends.
    pub(super) backends: BTreeSet<String>,
    /// Answers by server.
    pub(super) servers: BTreeMap<String, u64>,
    /// Failed dials by message.
    pub(super) errors: BTreeMap<String, u64>,
    /// The last latencies by client.
    pub(super) latencies: BTreeMap<Vantage, Latencies>,
    /// New flows by the hook that translated them.
    pub(super) hooks: Hooks,
}

/// The last latencies.
#[derive(Default)]
pub(super) struct Latencies(VecDeque<Duration>);

impl Extend<Duration> for Latencies {
    fn extend<T: IntoIterator<Item = Duration>>(&mut self, latencies: T) {
        self.0.extend(latencies);
        self.0.drain(..self.0.len().saturating_sub(KEPT_LATENCIES));
    }
}

impl Latencies {
    fn median(&self) -> Option<Duration> {
        let mut sorted: Vec<_> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }
}

/// The rows as a table of text without escape codes.
pub(super) fn render(rows: &BTreeMap<Frontend, Row>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header([
        "SERVICE", "KIND", "FRONTEND", "BACKENDS", "CONNS", "FAILED", "P50 POD", "PACKETS", "NODE",
        "OUTSIDE", "SOCKET", "TC", "XDP",
    ]);
    for (frontend, row) in rows {
        let answered: u64 = row.servers.values().sum();
        let failed: u64 = row.errors.values().sum();
        let names: BTreeSet<&String> = row.backends.iter().chain(row.servers.keys()).collect();
        let shares: Vec<String> = names
            .into_iter()
            .map(|name| {
                let count = row.servers.get(name).copied().unwrap_or(0);
                // One that is no backend any more, or was none.
                let gone = if row.backends.contains(name) {
                    ""
                } else {
                    "†"
                };
                format!(
                    "{name}{gone} {}%",
                    (count * 100 + answered / 2)
                        .checked_div(answered)
                        .unwrap_or(0)
                )
            })
            .collect();
        let latency = |vantage| match row.latencies.get(&vantage).and_then(Latencies::median) {
            Some(median) => format!("{} µs", median.as_micros()),
            None => "-".to_owned(),
        };
        table.add_row([
            frontend.service.clone(),
            frontend.kind.clone(),
            frontend.dialled(),
            shares.join("  "),
            answered.to_string(),
            failed.to_string(),
            latency(Vantage::Pod),
            latency(Vantage::Packets),
            latency(Vantage::Node),
            latency(Vantage::Outside),
            row.hooks.socket.to_string(),
            row.hooks.tc.to_string(),
            row.hooks.xdp.to_string(),
        ]);
    }
    for column in table.column_iter_mut().skip(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}

/// A terminal is redrawn in place; a file or a pipe gets the table now and then.
pub(super) struct Screen {
    terminal: bool,
    last: Option<Instant>,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            terminal: stdout().is_terminal(),
            last: None,
        }
    }

    pub(super) fn show(&mut self, text: &str) {
        let mut out = stdout().lock();
        // A terminal that is gone ends the demo by SIGHUP.
        let _ = if self.terminal {
            // Home, each line cleared to its end, and the rest of the screen: it does not flicker.
            let first = if self.last.is_none() { "\x1b[2J" } else { "" };
            writeln!(
                out,
                "{first}\x1b[H{}\x1b[K\x1b[J",
                text.replace('\n', "\x1b[K\n")
            )
        } else if self.last.is_none_or(|last| last.elapsed() >= PRINT_EVERY) {
            writeln!(out, "{text}")
        } else {
            return;
        };
        let _ = out.flush();
        self.last = Some(Instant::now());
    }
}
