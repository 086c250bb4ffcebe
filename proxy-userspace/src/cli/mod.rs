//! The command line: one file per verb.
//!
//! `run` is the agent. All other verbs look at what is pinned under `--bpf-root`, whether an agent
//! runs or not, and print a table or, with `-o json` or `-o yaml`, an array or object that scripts can rely on.

use std::{io, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

pub use self::common::{Common, Output, Peer};
pub(crate) use self::{
    common::{block_on, open, print},
    table::table,
};
pub(crate) use crate::datapath::maps::{service_name, service_names};
use crate::{
    config::{flags::RunArgs, kube_proxy_flags},
    datapath::cgroup,
};

pub mod backends;
pub mod check;
pub mod cleanup;
mod common;
pub mod conntrack;
pub mod env;
pub mod explain;
mod listening;
mod pods;
mod rows;
pub mod run;
pub mod services;
pub mod status;
pub mod sysdump;
mod table;
pub mod top;
pub mod trace;

/// An eBPF and XDP load balancer for Kubernetes Services: replaces kube-proxy on a node.
#[derive(Debug, Parser)]
#[command(
    name = "shunt",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the agent.
    Run(Box<RunArgs>),
    /// Try out what this kernel has; exit 1 when something required is missing.
    Check {
        #[command(flatten)]
        common: Common,
        /// The cgroup2 directory for socket programs [default: where the system has it mounted].
        #[arg(long, value_name = "DIR")]
        cgroup_root: Option<PathBuf>,
    },
    /// Whether an agent runs, how full the maps are, what is attached, what was counted.
    Status(status::StatusArgs),
    /// What clients can dial.
    Services(services::ServicesArgs),
    /// What they reach.
    Backends(backends::BackendsArgs),
    /// The flows that are being translated.
    Conntrack(conntrack::ConntrackArgs),
    /// What this node does with a packet, hook by hook, and why.
    Explain(explain::ExplainArgs),
    /// What the programs decide, as they decide it: new flows, refusals, drops with their reasons.
    Trace(trace::TraceArgs),
    /// What Services get now: new connections, retries, refusals, and why packets are dropped.
    Top(top::TopArgs),
    /// The environment variables of Services that a kubelet gives to a pod's containers.
    Env(env::EnvArgs),
    /// One archive with what a maintainer asks for, secrets left out.
    Sysdump(sysdump::SysdumpArgs),
    /// Remove every program, map, pin and qdisc that shunt made, and nothing else.
    Cleanup(Common),
}

/// Parses the command line and runs its verb; an error is one line on stderr.
pub fn main() -> ExitCode {
    let line = kube_proxy_flags::translate(std::env::args_os());
    let verb = Cli::parse_from(line.args).verb;
    let result = match verb {
        Verb::Run(mut args) => {
            args.kube_proxy.unused = line.unused;
            args.kube_proxy.is_its_line = line.is_kube_proxys;
            run::run(*args).map(|()| true)
        }
        Verb::Check {
            common,
            cgroup_root,
        } => {
            let cgroup_root = cgroup_root.unwrap_or_else(cgroup::default_root);
            check::run(&common.bpf_root, &cgroup_root, common.output)
        }
        Verb::Status(args) => status::run(&args).map(|()| true),
        Verb::Services(args) => services::run(&args).map(|()| true),
        Verb::Backends(args) => backends::run(&args).map(|()| true),
        Verb::Conntrack(args) => conntrack::run(&args).map(|()| true),
        Verb::Explain(args) => explain::run(&args).map(|()| true),
        Verb::Trace(args) => trace::run(&args).map(|()| true),
        Verb::Top(args) => top::run(&args).map(|()| true),
        Verb::Env(args) => env::run(&args).map(|()| true),
        Verb::Sysdump(args) => sysdump::run(&args).map(|()| true),
        Verb::Cleanup(common) => cleanup::run(&common.bpf_root, common.output).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // `shunt services | head` closes our stdout: nothing to complain about.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shunt: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests;
