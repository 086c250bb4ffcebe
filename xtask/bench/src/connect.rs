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

use anyhow::{Context, Result};
use shunt::datapath::bpf::link::{self, Hook};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    replay::Replay,
    report::{Line, Target, middle, spread},
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

/// Measures the hooks, and prints a line for each.
pub(crate) fn measure(world: &World, replay: &Replay, rounds: usize, only: &str) -> Result<()> {
    let cgroup = Cgroup::enter()?;
    let folder = fs::File::open(&cgroup.path)?;
    let target = folder.as_raw_fd() as u32;
    for v6 in [false, true] {
        let family = if v6 { "6" } else { "4" };
        for (call, what, program, hooks) in [
            (
                Call::Connect,
                "connect",
                "connect",
                [Hook::Connect4, Hook::Connect6],
            ),
            (
                Call::Sendmsg,
                "sendmsg",
                "sendmsg",
                [Hook::Sendmsg4, Hook::Sendmsg6],
            ),
        ] {
            let name = format!("socket IPv{family}, {what} to a ClusterIP, added");
            if !name.contains(only) {
                continue;
            }
            let hook = hooks[usize::from(v6)];
            let own = world
                .datapath
                .program(&format!("sock_{program}{family}"))
                .context("not loaded")?;
            let floor = replay.program(&format!("floor_{program}{family}"))?;
            let ip: IpAddr = CLUSTER_IP[usize::from(v6)].parse()?;
            let cluster_ip = SocketAddr::new(ip, 80);
            let backend = SocketAddr::new(world::backend(v6, false, 0), BACKEND_PORT);
            let (mut added, mut least) = (Vec::new(), Vec::new());
            for round in 0..=rounds {
                let bare = calls(call, backend)?;
                let hooked = |program: BorrowedFd<'_>| -> Result<f64> {
                    // Dropping the link takes the program away.
                    let _link = link::create(program, target, hook, 0).context("cannot attach")?;
                    Ok(calls(call, cluster_ip)?)
                };
                let (own, floor) = if round % 2 == 0 {
                    (hooked(own)?, hooked(floor)?)
                } else {
                    let floor = hooked(floor)?;
                    (hooked(own)?, floor)
                };
                if round > 0 {
                    added.push(own - bare);
                    least.push(floor - bare);
                }
            }
            let ratios: Vec<f64> = added
                .iter()
                .zip(&least)
                .map(|(own, floor)| own / floor)
                .collect();
            Line {
                name,
                value: middle(&added),
                unit: "ns",
                against: Some("floor"),
                baseline: Some(middle(&least)),
                spread: spread(&ratios),
                target: Some(Target::AtMost(ADDED)),
            }
            .print()?;
        }
    }
    io::stdout().flush()?;
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
