//! A step of the story: said, done, and shown.

use std::{
    io::stdin,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Result;
use comfy_table::{Table, presets};

use super::cast::{Cast, Flows};

/// What a step has shown.
struct Shown {
    chapter: &'static str,
    what: String,
    /// What came of it, or why it did not come out.
    outcome: Result<String, String>,
    took: Duration,
}

/// What is told, and to whom.
pub(super) struct Story {
    cast: Cast,
    /// Whether a person reads along and says when to go on.
    waits: bool,
    chapter: &'static str,
    shown: Vec<Shown>,
}

impl Story {
    /// `waits`: a person reads along and says when to go on.
    pub(super) fn new(cast: Cast, waits: bool) -> Self {
        Self {
            cast,
            waits,
            chapter: "",
            shown: Vec::new(),
        }
    }

    /// Steps that did not come out as told, and all.
    pub(super) fn failed(&self) -> (usize, usize) {
        let failed = self.shown.iter().filter(|shown| shown.outcome.is_err());
        (failed.count(), self.shown.len())
    }

    pub(super) fn chapter(&mut self, title: &'static str, text: &str) {
        self.chapter = title;
        println!("\n== {title}");
        for line in text.lines() {
            println!("   {}", line.trim());
        }
    }

    /// Says what is done, does it, and shows what came of it and which way new flows went.
    pub(super) fn step(&mut self, what: &str, act: impl FnOnce(&mut Cast) -> Result<String>) {
        println!("\n  ▸ {what}");
        let before = self.cast.flows();
        let began = Instant::now();
        let outcome = act(&mut self.cast).map_err(|error| format!("{error:#}"));
        let took = began.elapsed();
        if let (Ok(before), Ok(after)) = (before, self.cast.flows()) {
            self.show_way(&before, &after);
        }
        match &outcome {
            Ok(text) => println!("    ✓ {text}"),
            Err(error) => println!("    ✗ {error}"),
        }
        self.shown.push(Shown {
            chapter: self.chapter,
            what: what.to_owned(),
            outcome,
            took,
        });
        if self.waits {
            println!("    (Enter goes on)");
            let mut line = String::new();
            // At the end of stdin nobody waits any more.
            self.waits = stdin().read_line(&mut line).is_ok_and(|bytes| bytes > 0);
        }
    }

    /// The packets' way: where new flows were translated, and to whom.
    fn show_way(&self, before: &Flows, after: &Flows) {
        for ((node, hook, backend), count) in after {
            let key = (node.clone(), *hook, *backend);
            // A backend that is new, or back again, counts from zero.
            let new = count.saturating_sub(before.get(&key).copied().unwrap_or(0));
            if new > 0 {
                let hook = match *hook {
                    "socket" => "connect() rewritten",
                    hook => hook,
                };
                let name = self.cast.name_of(SocketAddr::ip(backend));
                println!("      way: {node}, {hook} → {name} {backend} ({new} new)");
            }
        }
    }

    /// All steps, and what came of them.
    pub(super) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header([
            "CHAPTER",
            "STEP",
            "",
            "WHAT CAME OF IT",
            "TOOK",
        ]);
        let mut last = "";
        for shown in &self.shown {
            let chapter = if shown.chapter == last {
                ""
            } else {
                shown.chapter
            };
            last = shown.chapter;
            let (mark, text) = match &shown.outcome {
                Ok(text) => ("✓", text),
                Err(error) => ("✗", error),
            };
            let text = text.lines().next().unwrap_or_default().to_owned();
            let took = format!("{} ms", shown.took.as_millis());
            table.add_row([
                chapter.to_owned(),
                shown.what.clone(),
                mark.to_owned(),
                text,
                took,
            ]);
        }
        table.trim_fmt()
    }
}
