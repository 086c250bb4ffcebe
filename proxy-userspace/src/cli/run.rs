//! `shunt run`: reads the settings, sets up the log, and starts the [`agent`].

use std::fs;

use anyhow::Context;
use tracing::{info, warn};

use super::{Output, cleanup, print};
use crate::{agent, config::flags::RunArgs, datapath::start::Stopwatch, logging};

/// Runs the agent until a signal ends it, or prints what the settings come to (`--dump-config`).
///
/// # Errors
/// One line with the cause: a setting that cannot be, or why the agent has ended.
pub fn run(mut args: RunArgs) -> anyhow::Result<()> {
    let watch = Stopwatch::start();
    let dump = args.dump_config;
    let write_to = args.kube_proxy.write_config_to.take();
    let (cleanup, init_only) = (args.kube_proxy.cleanup, args.kube_proxy.init_only);
    let (settings, warnings) = args.clone().settings()?;
    logging::init(settings.logging);
    for warning in warnings {
        warn!("{warning}");
    }
    if let Some(path) = write_to {
        fs::write(&path, settings.dump()?)
            .with_context(|| format!("--write-config-to {}", path.display()))?;
        info!("what the settings come to is in {}", path.display());
        return Ok(());
    }
    if dump {
        return print(&settings.dump()?);
    }
    if cleanup == Some(true) {
        return cleanup::run(&settings.bpf_root, Output::Table);
    }
    if init_only == Some(true) {
        info!("--init-only: there is nothing that has to be prepared");
        return Ok(());
    }
    agent::run(settings, args, watch)
}
