//! Puts the floor of a DNAT at tc on a node's devices, for as long as standard input is open.

use std::{
    collections::BTreeSet,
    io::{self, Read},
    net::SocketAddrV4,
    os::fd::{AsFd, OwnedFd},
};

use anyhow::{Context, Result, ensure};
use aya::{EbpfLoader, maps::HashMap, programs::SchedClassifier};
use shunt::datapath::bpf::link::{self, Hook};

use crate::replay::FLOORS;

/// Arguments of `nat`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Devices of this namespace that clients are behind.
    #[arg(long, required = true)]
    device: Vec<String>,
    /// What clients dial, and where it leads: `ADDRESS:PORT=ADDRESS:PORT`.
    #[arg(long, required = true)]
    service: Vec<String>,
}

/// An address and a port as they stand in packets.
#[repr(C)]
#[derive(Clone, Copy)]
struct Side {
    addr: u32,
    port: u32,
}

// SAFETY: `repr(C)`, `Copy`, no padding, every bit pattern is a value.
unsafe impl aya::Pod for Side {}

impl Side {
    fn parse(text: &str) -> Result<Self> {
        let address: SocketAddrV4 = text
            .parse()
            .with_context(|| format!("{text} is no ADDRESS:PORT"))?;
        Ok(Self {
            addr: u32::from_ne_bytes(address.ip().octets()),
            port: address.port().to_be().into(),
        })
    }
}

/// Attaches, says `ready`, and waits until standard input ends.
///
/// # Errors
///
/// When a program cannot be loaded or attached.
pub(crate) fn run(args: &Args) -> Result<()> {
    let object = aya_obj::Object::parse(FLOORS).context("the floor programs")?;
    let mut loader = EbpfLoader::new();
    // The maps of the other floors are not used here.
    let unused: BTreeSet<&str> = object
        .maps
        .keys()
        .map(String::as_str)
        .filter(|name| !name.starts_with("nat_") && !name.starts_with('.'))
        .collect();
    for name in unused {
        loader.map_max_entries(name, 1);
    }
    let mut ebpf = loader.load(FLOORS).context("the floor programs")?;
    let map = ebpf
        .map_mut("nat_frontends")
        .context("no map nat_frontends")?;
    let mut frontends: HashMap<_, Side, Side> = HashMap::try_from(map)?;
    for service in &args.service {
        let (frontend, backend) = service
            .split_once('=')
            .with_context(|| format!("{service}: no ="))?;
        frontends.insert(Side::parse(frontend)?, Side::parse(backend)?, 0)?;
    }
    let mut links: Vec<OwnedFd> = Vec::new();
    for (name, hook) in [
        ("floor_nat_in", Hook::TcxIngress),
        ("floor_nat_out", Hook::TcxEgress),
    ] {
        let program = ebpf
            .program_mut(name)
            .with_context(|| format!("no program {name}"))?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().with_context(|| format!("program {name}"))?;
        for device in &args.device {
            let index = rustix::net::netdevice::name_to_index(
                rustix::net::socket(
                    rustix::net::AddressFamily::INET,
                    rustix::net::SocketType::DGRAM,
                    None,
                )?,
                device,
            )
            .with_context(|| format!("device {device}"))?;
            links.push(
                link::create(program.fd()?.as_fd(), index, hook, 0)
                    .with_context(|| format!("{name} on {device}"))?,
            );
        }
    }
    ensure!(!links.is_empty(), "nothing attached");
    println!("ready");
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
