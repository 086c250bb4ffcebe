//! The command line: one file per verb.
//!
//! `run` is the agent. All other verbs look at what is pinned under `--bpf-root`, whether an agent
//! runs or not, and print a table or, with `-o json` or `-o yaml`, an array or object that scripts can rely on.

use std::{
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::{
    config::{DEFAULT_BPF_ROOT, flags::RunArgs, kube_proxy_flags},
    datapath::{
        cgroup,
        maps::{Maps, service_name, service_names},
    },
};

pub mod backends;
pub mod check;
pub mod cleanup;
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
pub mod top;
pub mod trace;

/// Waits in this thread for what a verb does asynchronously.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a thread")?
        .block_on(work)
}

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

/// What all verbs but `run` take.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// The folder in a bpf file system where the agent pins everything.
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_BPF_ROOT)]
    pub bpf_root: PathBuf,
    /// How to print.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// `-o`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// With more columns, where there are more.
    Wide,
    /// For programs.
    Json,
    /// The same as YAML.
    Yaml,
}

impl Output {
    /// Whether people read it.
    fn is_table(self) -> bool {
        matches!(self, Self::Table | Self::Wide)
    }

    /// The value for programs; `None`: people want to read it.
    fn structured(self, value: &impl Serialize) -> anyhow::Result<Option<String>> {
        Ok(match self {
            Self::Table | Self::Wide => None,
            Self::Json => Some(serde_json::to_string_pretty(value)?),
            Self::Yaml => Some(serde_saphyr::to_string(value)?.trim_end().to_owned()),
        })
    }
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

/// Prints a line or several to stdout.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()?;
    Ok(())
}

/// Columns without lines, as `kubectl` prints them: of a hundred thousand rows too, for which a
/// library of tables takes seconds.
fn table<'a, R: IntoIterator<Item = String>>(
    titles: impl IntoIterator<Item = &'a str>,
    rows: impl Iterator<Item = R>,
) -> String {
    let mut cells = Cells::default();
    titles.into_iter().for_each(|title| cells.push(title));
    let columns = cells.widths.len();
    for row in rows {
        row.into_iter()
            .take(columns)
            .for_each(|cell| cells.push(&cell));
    }
    cells.aligned(columns)
}

/// Cells one behind the other, of which none has memory of its own.
#[derive(Default)]
struct Cells {
    text: String,
    /// Bytes and characters of each.
    widths: Vec<(u32, u32)>,
}

impl Cells {
    fn push(&mut self, cell: &str) {
        self.text.push_str(cell);
        let characters = match cell.is_ascii() {
            true => cell.len(),
            false => cell.chars().count(),
        };
        self.widths.push((cell.len() as u32, characters as u32));
    }

    /// So many a line, each column as wide as its widest cell.
    fn aligned(&self, columns: usize) -> String {
        let mut most = vec![0; columns];
        for row in self.widths.chunks(columns) {
            for (most, &(_, width)) in most.iter_mut().zip(row) {
                *most = width.max(*most);
            }
        }
        let mut text = String::with_capacity(self.text.len() * 2);
        let mut rest = self.text.as_str();
        for row in self.widths.chunks(columns) {
            for (most, &(bytes, width)) in most.iter().zip(row) {
                let (cell, after) = rest.split_at(bytes as usize);
                rest = after;
                text.push_str(cell);
                let padding = (most - width + 2) as usize;
                text.extend(std::iter::repeat_n(' ', padding));
            }
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        }
        text.truncate(text.trim_end().len());
        text
    }
}

fn open(bpf_root: &Path) -> anyhow::Result<Maps> {
    Ok(Maps::open(bpf_root)?)
}

/// An address, with or without a port: what filters on the command line name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    address: IpAddr,
    port: Option<u16>,
}

impl Peer {
    /// Whether an address and port are meant.
    fn matches(&self, address: IpAddr, port: u16) -> bool {
        self.address == address && self.port.is_none_or(|wanted| wanted == port)
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(socket) = text.parse::<SocketAddr>() {
            return Ok(Self {
                address: socket.ip(),
                port: Some(socket.port()),
            });
        }
        match text.parse() {
            Ok(address) => Ok(Self {
                address,
                port: None,
            }),
            Err(_) => Err("neither an address nor ADDRESS:PORT ([ADDRESS]:PORT for IPv6)".into()),
        }
    }
}

#[cfg(test)]
mod tests;
