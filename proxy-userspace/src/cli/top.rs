//! `shunt top`: what Services get now, which are in trouble, and why packets are dropped.

mod sample;
mod view;

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Args;
use ratatui::{
    DefaultTerminal,
    crossterm::{
        event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
        terminal,
    },
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval},
};

use self::{
    sample::{Report, Sampler, Wanted, rate},
    view::View,
};
use super::{Common, Output, block_on, open, print, table};

/// How often keys and the tracer's ring buffer are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// `shunt top`.
#[derive(Clone, Debug, Args)]
pub struct TopArgs {
    /// Print what came within one interval, and end.
    #[arg(long)]
    once: bool,
    /// Seconds from one look to the next.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    interval: Duration,
    /// With --once: Services too that got nothing.
    #[arg(long, requires = "once")]
    all: bool,
    /// Without colours, as with NO_COLOR in the environment.
    #[arg(long)]
    no_color: bool,
    #[command(flatten)]
    common: Common,
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=60.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("a number from 0.1 to 60".to_owned()),
    }
}

/// The report of `--once` for people.
fn text(report: &Report) -> String {
    let optional = |count: Option<u64>| count.map_or(String::new(), |n| rate(n, report.seconds));
    let services = report.services.iter().map(|service| {
        [
            service.name.namespace.clone(),
            service.name.service.clone(),
            rate(service.connections, report.seconds),
            optional(service.retries),
            optional(service.refusals),
            optional(service.packets),
            optional(service.bytes),
        ]
    });
    let titles = [
        "NAMESPACE",
        "SERVICE",
        "NEW/S",
        "RETRY/S",
        "REFUSED/S",
        "PACKETS/S",
        "BYTES/S",
    ];
    let events = report
        .events
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(name, count)| [(*name).to_owned(), rate(*count, report.seconds)]);
    let mut text = table(titles, services) + "\n\n" + &table(["EVENT", "PER SECOND"], events);
    if let Some(note) = report.note() {
        text += &format!("\n\n{note}");
    }
    text
}

/// One report, printed.
fn print_report(output: Output, report: &Report, lines: bool) -> anyhow::Result<()> {
    let text = match output {
        Output::Table | Output::Wide => text(report),
        Output::Json if lines => serde_json::to_string(report)?,
        Output::Yaml if lines => format!("---\n{}", serde_saphyr::to_string(report)?.trim_end()),
        _ => output.structured(report)?.unwrap_or_default(),
    };
    print(&text)
}

/// A terminal that is given back however this ends.
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> anyhow::Result<Self> {
        ensure!(
            io::stdout().is_terminal() && io::stdin().is_terminal(),
            "this is no terminal: `shunt top --once` prints what came within a second, with -o json for scripts"
        );
        let (columns, rows) =
            terminal::size().context("the terminal does not say how large it is")?;
        if columns == 0 || rows == 0 {
            bail!(
                "the terminal says that it has no size: tell it one (`stty cols 80 rows 24`), or use --once"
            );
        }
        Ok(Self(
            ratatui::try_init().context("the terminal cannot be used")?,
        ))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Whether a key ends it.
fn key(view: &mut View, report: &Report, code: KeyCode, modifiers: KeyModifiers) -> bool {
    match code {
        KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => return true,
        KeyCode::Char('q') => return true,
        KeyCode::Esc | KeyCode::Backspace | KeyCode::Left => view.close(),
        KeyCode::Enter | KeyCode::Right => view.open(report),
        KeyCode::Up | KeyCode::Char('k') => view.select(report, -1),
        KeyCode::Down | KeyCode::Char('j') => view.select(report, 1),
        KeyCode::PageUp => view.select(report, -10),
        KeyCode::PageDown => view.select(report, 10),
        KeyCode::Char('s') => view.sort = view.sort.next(report.counts_traffic),
        _ => {}
    }
    false
}

/// Looks at keys that wait. Says whether there were any, and whether one of them ends it.
fn keys(view: &mut View, report: &Report) -> anyhow::Result<(bool, bool)> {
    let (mut any, mut ends) = (false, false);
    while event::poll(Duration::ZERO)? {
        any = true;
        if let Event::Key(pressed) = event::read()?
            && pressed.kind == KeyEventKind::Press
        {
            ends |= key(view, report, pressed.code, pressed.modifiers);
        }
    }
    Ok((any, ends))
}

async fn follow(args: &TopArgs) -> anyhow::Result<()> {
    let maps = open(&args.common.bpf_root)?;
    let for_people = args.common.output.is_table() && !args.once;
    let mut screen = match for_people {
        true => Some(Screen::open()?),
        false => None,
    };
    let mut sampler = Sampler::new(&maps)?;
    let no_color = args.no_color || std::env::var_os("NO_COLOR").is_some_and(|it| !it.is_empty());
    let mut view = View::new(no_color);
    let mut report = Report::default();
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut look = interval(LOOK.min(args.interval));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut sampled, mut is_new) = (Instant::now(), true);
    loop {
        tokio::select! {
            _ = look.tick() => {}
            _ = interrupted.recv() => return Ok(()),
            _ = terminated.recv() => return Ok(()),
        }
        sampler.listen();
        if sampled.elapsed() >= args.interval {
            report = sampler.sample(match for_people {
                true => Wanted::Opened(view.opened()),
                false if args.all => Wanted::All,
                false => Wanted::Active,
            })?;
            (sampled, is_new) = (Instant::now(), true);
            if args.once {
                return print_report(args.common.output, &report, false);
            }
            if !for_people {
                print_report(args.common.output, &report, true)?;
            }
        }
        if let Some(Screen(terminal)) = &mut screen {
            let before = view.opened();
            let (any, ends) = keys(&mut view, &report)?;
            if ends {
                return Ok(());
            }
            if let Some(number) = view.opened().filter(|_| view.opened() != before) {
                sampler.open(&mut report, number);
            }
            if any || is_new {
                view.arrange(&mut report);
                terminal.draw(|frame| view.draw(frame, &report))?;
                is_new = false;
            }
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// No maps, no terminal, or the kernel's.
pub fn run(args: &TopArgs) -> anyhow::Result<()> {
    block_on(follow(args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_short() {
        let rates = [0, 1, 25, 999, 1_200, 999_400, 1_500_000, 2_000_000_000];
        let texts = rates.map(|count| rate(count, 1.0));
        let wanted = ["0", "1.0", "25", "999", "1.2k", "999.4k", "1.5M", "2.0G"];
        assert_eq!(texts, wanted);
        assert_eq!(rate(1, 4.0), "0.2");
    }

    #[test]
    fn an_interval_is_a_time() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "61", "x", "NaN"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
