//! What verbs have in common.

use std::{
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::{config::DEFAULT_BPF_ROOT, datapath::maps::Maps};

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
    pub(crate) fn is_table(self) -> bool {
        matches!(self, Self::Table | Self::Wide)
    }

    /// The value for programs; `None`: people want to read it.
    pub(crate) fn structured(self, value: &impl Serialize) -> anyhow::Result<Option<String>> {
        Ok(match self {
            Self::Table | Self::Wide => None,
            Self::Json => Some(serde_json::to_string_pretty(value)?),
            Self::Yaml => Some(serde_saphyr::to_string(value)?.trim_end().to_owned()),
        })
    }
}

/// Waits in this thread for what a verb does asynchronously.
pub(crate) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a thread")?
        .block_on(work)
}

/// Prints a line or several to stdout.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()?;
    Ok(())
}

pub(crate) fn open(bpf_root: &Path) -> anyhow::Result<Maps> {
    Ok(Maps::open(bpf_root)?)
}

/// An address, with or without a port: what filters on the command line name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub(super) address: IpAddr,
    pub(super) port: Option<u16>,
}

impl Peer {
    /// Whether an address and port are meant.
    pub(crate) fn matches(&self, address: IpAddr, port: u16) -> bool {
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
