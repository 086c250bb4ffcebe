//! Plays a packet through a program many times, by `BPF_PROG_TEST_RUN`.
//!
//! The replay program puts the packet back and calls the program under test by a tail call; the
//! same with an empty program is the cost of the frame, which is taken off.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use aya::{Ebpf, EbpfLoader, programs::Program};
use shunt::datapath::{bpf::map, load::Datapath};
use shunt_common::layout::names;

pub(crate) static FLOORS: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shunt-floors"));

/// In the script's `vary`: a random order.
const RANDOM: u32 = 1 << 8;
/// Bytes of the packet that the replay program puts back.
const RESTORED: usize = 80;

/// Which hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    Xdp,
    Tc,
}

/// The field that differs from packet to packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vary {
    /// Last 32 bits of the source address.
    Source,
    /// Last 32 bits of the destination address.
    Destination,
    /// Destination port and last byte of the source address, from a table.
    Port,
}

/// A packet to play.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) packet: Vec<u8>,
    pub(crate) vary: Vary,
    /// Number of different packets less one; ones from the lowest bit on.
    pub(crate) mask: u32,
    /// The last 32 bits that the packet's number is added to.
    pub(crate) base: u32,
    /// The packets come in a random order, each once; else by their numbers.
    pub(crate) random: bool,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Value {
    packet: [u64; RESTORED / 8],
    vary: u32,
    mask: u32,
    next: u32,
    base: u32,
}

// SAFETY: `repr(C)`, `Copy`, no padding, every bit pattern is a value.
unsafe impl aya::Pod for Value {}

/// The loaded floor programs.
pub(crate) struct Replay {
    ebpf: Ebpf,
    device: u32,
    /// Number of the next packet of a kind, where each must be new.
    pub(crate) next: u32,
}

/// `union bpf_attr` of `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    rest: [u64; 2],
}

/// `struct xdp_md`.
#[repr(C)]
#[derive(Default)]
struct XdpMd {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// The first words of `struct __sk_buff`.
#[repr(C)]
#[derive(Default)]
struct SkBuff {
    before: [u32; 9],
    /// Not 0: that is a packet of a process of this node.
    ingress_ifindex: u32,
    ifindex: u32,
}

impl Replay {
    /// Loads the floors onto the maps of `datapath`. `device`: index of the device that packets come
    /// in and leave through.
    pub(crate) fn load(datapath: &Datapath, device: u32) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        let capacities = datapath.capacities();
        for name in [names::FRONTENDS, names::SLOTS, names::FLOWS, names::SNAT]
            .into_iter()
            .flatten()
        {
            if let Some((_, entries)) = capacities.of_map(name) {
                loader.map_max_entries(name, entries);
            }
            loader.map_pin_path(name, datapath.paths().map(name));
        }
        let mut ebpf = loader.load(FLOORS).context("floor programs")?;
        for (name, program) in ebpf.programs_mut() {
            match program {
                Program::Xdp(p) => p.load(),
                Program::SchedClassifier(p) => p.load(),
                Program::CgroupSockAddr(p) => p.load(),
                other => bail!("{name} is a {:?}", other.prog_type()),
            }
            .with_context(|| format!("floor program {name}"))?;
        }
        Ok(Self {
            ebpf,
            device,
            next: 1,
        })
    }

    /// A floor program.
    pub(crate) fn program(&self, name: &str) -> Result<BorrowedFd<'_>> {
        let program = self
            .ebpf
            .program(name)
            .with_context(|| format!("no floor program {name}"))?;
        Ok(program.fd()?.as_fd())
    }

    /// Sets the table of [`Vary::Port`]: destination port, and last byte of the source address.
    pub(crate) fn set_ports(&self, ports: &[(u16, u8)]) -> Result<()> {
        let map = self.map("ports")?;
        let keys: Vec<u32> = (0..ports.len() as u32).collect();
        let values: Vec<u32> = ports
            .iter()
            .map(|&(port, last)| u32::from(port) | u32::from(last) << 16)
            .collect();
        map::update_batch(map, &keys, &values)
            .map_err(|(error, done)| anyhow::anyhow!("ports, entry {done}: {error}"))
    }

    fn map(&self, name: &str) -> Result<BorrowedFd<'_>> {
        use aya::maps::Map;
        let map = self
            .ebpf
            .map(name)
            .with_context(|| format!("no map {name}"))?;
        Ok(match map {
            Map::Array(data) | Map::ProgramArray(data) => data.fd().as_fd(),
            _ => bail!("map {name} is of another kind"),
        })
    }

    /// Plays the script through `program`. Returns ns per packet, the last verdict and the last
    /// packet.
    pub(crate) fn play(
        &self,
        hook: Hook,
        program: BorrowedFd<'_>,
        script: &Script,
        repeat: u32,
    ) -> Result<(f64, u32, Vec<u8>)> {
        let v6 = u32::from(script.packet[12..14] == [0x86, 0xdd]);
        let mut packet = script.packet.clone();
        packet.resize(packet.len().max(RESTORED), 0);
        let mut words = [0; RESTORED / 8];
        for (word, bytes) in words.iter_mut().zip(packet.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into()?);
        }
        let vary = match script.vary {
            Vary::Source => 1,
            Vary::Destination => 3,
            Vary::Port => 5,
        } + v6
            + if script.random { RANDOM } else { 0 };
        let value = Value {
            packet: words,
            vary,
            mask: script.mask,
            next: self.next,
            base: script.base,
        };
        map::update(self.map("script")?, &0u32, &value, 0).context("script")?;
        let (target, wrapper) = match hook {
            Hook::Xdp => ("xdp_target", "replay_xdp"),
            Hook::Tc => ("tc_target", "replay_tc"),
        };
        map::update(self.map(target)?, &0u32, &(program.as_raw_fd() as u32), 0).context(target)?;
        self.run(hook, self.program(wrapper)?, &packet, repeat)
            .context("BPF_PROG_TEST_RUN")
    }

    fn run(
        &self,
        hook: Hook,
        program: BorrowedFd<'_>,
        packet: &[u8],
        repeat: u32,
    ) -> io::Result<(f64, u32, Vec<u8>)> {
        const BPF_PROG_TEST_RUN: libc::c_int = 10;
        let mut out = vec![0; 4096];
        let md = XdpMd {
            data_end: packet.len() as u32,
            ingress_ifindex: self.device,
            ..XdpMd::default()
        };
        let mut attr = TestRun {
            prog_fd: program.as_raw_fd() as u32,
            data_size_in: packet.len() as u32,
            data_size_out: out.len() as u32,
            data_in: packet.as_ptr() as u64,
            data_out: out.as_mut_ptr() as u64,
            repeat,
            ..TestRun::default()
        };
        let skb = SkBuff {
            ingress_ifindex: self.device,
            ifindex: self.device,
            ..SkBuff::default()
        };
        (attr.ctx_in, attr.ctx_size_in) = match hook {
            Hook::Xdp => ((&raw const md) as u64, size_of::<XdpMd>() as u32),
            Hook::Tc => ((&raw const skb) as u64, size_of::<SkBuff>() as u32),
        };
        let began = Instant::now();
        // SAFETY: the attribute names buffers that live until the call returns, with their sizes.
        let done = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_TEST_RUN,
                &raw mut attr,
                size_of::<TestRun>(),
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        let elapsed = began.elapsed().as_nanos() as f64 / f64::from(repeat);
        out.truncate(attr.data_size_out as usize);
        // The kernel leaves out what else ran meanwhile, and cuts to whole nanoseconds; the
        // fraction is told by the clock.
        let whole = f64::from(attr.duration);
        Ok((elapsed.clamp(whole, whole + 1.0), attr.retval, out))
    }
}
