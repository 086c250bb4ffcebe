//! ns that the socket hooks add to a call, beside floor programs at the same hook.
//!
//! `connect` of a UDP socket sends nothing, and neither does `sendto` with `MSG_CONFIRM |
//! MSG_PROBE` and no data: what is left of the calls is the way to the hook, and a look at the
//! routing tables.

use std::{
    fs,
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
    path::PathBuf,
    process,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use shunt::datapath::bpf::link::{self, Hook};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    replay::Replay,
    report::{Comparison, Line, Target, middle, quick, spread},
    world::{self, BACKEND_PORT, CLUSTER_IP, World},
};

/// Bound on what the hook adds, beside its floor.
const ADDED: f64 = 1.5;
/// Calls in one round.
const CALLS: u32 = 20_000;
/// `MSG_PROBE` of linux/socket.h: do everything but send.
const MSG_PROBE: i32 = 0x10;

/// A cgroup of this process's own, which it leaves when this is dropped.
struct Cgroup {
    path: PathBuf,
    before: PathBuf,
}

impl Cgroup {
    fn enter() -> Result<Self> {
        let mount = shunt_lab::cgroup_mount_point()?;
        let text = fs::read_to_string("/proc/self/cgroup")?;
        let before = text
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap_or_default();
        let path = mount.join(format!("shunt-bench-{}", process::id()));
        fs::create_dir(&path).with_context(|| format!("{}", path.display()))?;
        let cgroup = Self {
            before: mount.join(before),
            path,
        };
        fs::write(cgroup.path.join("cgroup.procs"), process::id().to_string())
            .context("cannot enter a cgroup")?;
        Ok(cgroup)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Neither can be helped here.
        let _left = fs::write(self.before.join("cgroup.procs"), process::id().to_string());
        let _gone = fs::remove_dir(&self.path);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Connect,
    Sendmsg,
}

/// A call, and the programs that are in its way.
struct Figure {
    name: String,
    call: Call,
    hook: Hook,
    program: String,
    floor: String,
    cluster_ip: SocketAddr,
    backend: SocketAddr,
}

impl Figure {
    /// The program of a world's build.
    fn program<'w>(&self, world: &'w World) -> Result<BorrowedFd<'w>> {
        let program = world.datapath.program(&self.program);
        program.context("the program is not loaded")
    }

    /// ns of the call to the ClusterIP with `program` attached to the cgroup `target`.
    fn hooked(&self, program: BorrowedFd<'_>, target: u32) -> Result<f64> {
        // Dropping the link takes the program away.
        let _link = link::create(program, target, self.hook, 0).context("cannot attach")?;
        Ok(calls(self.call, self.cluster_ip)?)
    }
}

/// All whose names contain `only`.
fn figures(only: &str) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for v6 in [false, true] {
        let family = if v6 { "6" } else { "4" };
        let i = usize::from(v6);
        for (call, what, hooks) in [
            (Call::Connect, "connect", [Hook::Connect4, Hook::Connect6]),
            (Call::Sendmsg, "sendmsg", [Hook::Sendmsg4, Hook::Sendmsg6]),
        ] {
            let cluster_ip: IpAddr = CLUSTER_IP[i].parse()?;
            figures.push(Figure {
                name: format!("socket IPv{family}, {what} to a ClusterIP, added"),
                call,
                hook: hooks[i],
                program: format!("sock_{what}{family}"),
                floor: format!("floor_{what}{family}"),
                cluster_ip: SocketAddr::new(cluster_ip, 80),
                backend: SocketAddr::new(world::backend(v6, false, 0), BACKEND_PORT),
            });
        }
    }
    figures.retain(|figure| figure.name.contains(only));
    Ok(figures)
}

/// ns per call with each of the programs in every round, the first of them in turn; and without.
fn beside<const N: usize>(
    figure: &Figure,
    programs: [BorrowedFd<'_>; N],
    rounds: usize,
    target: u32,
) -> Result<([Vec<f64>; N], Vec<f64>)> {
    let mut hooked = [const { Vec::new() }; N];
    let mut bare = Vec::new();
    for round in 0..=rounds {
        let without = calls(figure.call, figure.backend)?;
        // The first round warms up.
        if round > 0 {
            bare.push(without);
        }
        for turn in 0..N {
            let which = (round + turn) % N;
            let ns = figure.hooked(programs[which], target)?;
            if round > 0 {
                hooked[which].push(ns);
            }
        }
    }
    Ok((hooked, bare))
}

/// Measures the hooks, and prints a line for each.
pub(crate) fn measure(world: &World, replay: &Replay, rounds: usize, only: &str) -> Result<()> {
    let cgroup = Cgroup::enter()?;
    let folder = fs::File::open(&cgroup.path)?;
    for figure in figures(only)? {
        let own = figure.program(world)?;
        let floor = replay.program(&figure.floor)?;
        let (hooked, bare) = beside(&figure, [own, floor], rounds, folder.as_raw_fd() as u32)?;
        let [added, least] = hooked.map(|hooked| {
            let pairs = hooked.iter().zip(&bare);
            pairs
                .map(|(hooked, bare)| hooked - bare)
                .collect::<Vec<_>>()
        });
        let ratios: Vec<f64> = added
            .iter()
            .zip(&least)
            .map(|(own, floor)| own / floor)
            .collect();
        Line {
            name: figure.name,
            value: middle(&added),
            unit: "ns",
            against: Some("floor"),
            baseline: Some(middle(&least)),
            spread: spread(&ratios),
            target: Some(Target::AtMost(ADDED)),
        }
        .print()?;
    }
    io::stdout().flush()?;
    Ok(())
}

/// Measures the hooks of two builds, each loaded twice, and prints a line for each.
pub(crate) fn compare(worlds: &[&World], rounds: usize, only: &str) -> Result<()> {
    let &[old, new, old_again, new_again] = worlds else {
        bail!("{} worlds are not two builds loaded twice", worlds.len());
    };
    let cgroup = Cgroup::enter()?;
    let folder = fs::File::open(&cgroup.path)?;
    for figure in figures(only)? {
        let programs = [
            figure.program(old)?,
            figure.program(new)?,
            figure.program(old_again)?,
            figure.program(new_again)?,
        ];
        let (hooked, bare) = beside(&figure, programs, rounds, folder.as_raw_fd() as u32)?;
        Comparison::of(figure.name, &hooked, quick(&bare)).print()?;
    }
    Ok(())
}

/// ns per call.
fn calls(call: Call, to: SocketAddr) -> io::Result<f64> {
    let address = SockAddr::from(to);
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    let began = Instant::now();
    for _ in 0..CALLS {
        match call {
            Call::Connect => socket.connect(&address)?,
            Call::Sendmsg => socket
                .send_to_with_flags(&[], &address, libc::MSG_CONFIRM | MSG_PROBE)
                .map(|_| ())?,
        }
    }
    Ok(began.elapsed().as_nanos() as f64 / f64::from(CALLS))
}
