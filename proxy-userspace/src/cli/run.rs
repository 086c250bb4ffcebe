//! `shunt run`: reads the settings, sets up the log, and starts the [`agent`].

use std::io::{self, IsTerminal};

use tracing::warn;
use tracing_subscriber::EnvFilter;

use super::print;
use crate::{agent, config::flags::RunArgs, datapath::start::Stopwatch};

/// Runs the agent until a signal ends it, or prints what the settings come to (`--dump-config`).
///
/// # Errors
/// One line with the cause: a setting that cannot be, or why the agent has ended.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    let watch = Stopwatch::start();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    let dump = args.dump_config;
    let (settings, warnings) = args.settings()?;
    for warning in warnings {
        warn!("{warning}");
    }
    if dump {
        return print(&settings.dump()?);
    }
    agent::run(settings, watch)
}
