//! `cargo xtask run`: the demo, or with arguments the agent on this machine.

use std::{env, os::unix::process::CommandExt};

use anyhow::{Context, Result};
use shunt_lab::{NETWORKS, Network};

use crate::{
    build, demo, setup,
    shell::{as_root, is_root, show, target},
    story,
};

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// One round of traffic and the table; fails unless every frontend was answered by every one of
    /// its backends.
    #[arg(long)]
    once: bool,
    /// The story of a Service, chapter by chapter: discovery, balancing, node ports, load balancer,
    /// ingress, readiness. Waits for Enter after each step, unless with --once.
    #[arg(long)]
    story: bool,
    /// How the demo's nodes and pods are joined.
    #[arg(long, default_value = "plain", value_parser = network)]
    network: Network,
    /// Everything is built already: set when this starts itself again as root.
    #[arg(long, hide = true)]
    built: bool,
    /// Arguments of `shunt run` (`--manifests DIR`, `--kubeconfig FILE`, …): runs the agent on this
    /// machine itself.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENTS OF shunt run"
    )]
    agent: Vec<String>,
}

fn network(name: &str) -> Result<Network, String> {
    Network::named(name).ok_or_else(|| {
        let names: Vec<_> = NETWORKS.iter().map(|network| network.name).collect();
        format!("there is no such network, but {}", names.join(", "))
    })
}

/// Builds, becomes root if it is not, and runs the demo or the agent.
///
/// # Errors
///
/// When the build, the demo or the start of the agent fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.built {
        build::build()?;
        if args.story {
            setup::story()?;
        }
    }
    let mut command = if !args.agent.is_empty() {
        let mut command = as_root(&target().join("release/shunt").to_string_lossy())?;
        // First, so that what is given stands over it.
        command
            .args(["run", "--datapath-log", "debug"])
            .args(&args.agent);
        command
    } else if is_root() {
        return match (args.story, args.once) {
            (true, once) => story::story(once),
            (false, true) => demo::one_round(args.network),
            (false, false) => demo::live(args.network),
        };
    } else {
        let this = env::current_exe().context("this program's path")?;
        let mut command = as_root(&this.to_string_lossy())?;
        command
            .args(["run", "--built", "--network", args.network.name])
            .args(args.once.then_some("--once"));
        command.args(args.story.then_some("--story"));
        command
    };
    // Only returns when it cannot be started.
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", show(&command)))
}
