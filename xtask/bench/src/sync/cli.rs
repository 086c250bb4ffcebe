//! The command line beside that many Services: what a person waits for.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use rustix::param::clock_ticks_per_second;
use shunt::datapath::{bpf::MappedArray, maps::maps_dir};
use shunt_common::layout::{BACKEND_SERVING, BackendState, names};
use shunt_lab::Agent;

use super::{
    figures::{ENDPOINTS, EXPLAIN_MS, LIST_MS, TOP_PERCENT, line},
    objects,
};
use crate::report::Line;

/// Runs of each verb.
const RUNS: usize = 5;
/// Services that get connections while `shunt top` is watched, unless all do.
const ACTIVE: u32 = 100;
/// Pause between counts, and how many are counted then: 10⁵/s.
const LOAD_PAUSE: Duration = Duration::from_millis(10);
const PER_PAUSE: usize = 1000;
/// For how long `shunt top` is watched.
const WATCHED: Duration = Duration::from_secs(10);

/// How long verbs take from their start to their end, and how much of a CPU `top` takes.
pub(super) fn measure(agent: &Agent, services: u32) -> Result<Vec<Line>> {
    let client = "203.0.113.10";
    let frontend = format!("{}:80", objects::cluster_ip(services / 2));
    let verbs: [(&str, Vec<&str>, f64); 4] = [
        ("services", vec!["services"], LIST_MS),
        ("backends", vec!["backends"], LIST_MS),
        ("backends -o json", vec!["backends", "-o", "json"], LIST_MS),
        (
            "explain",
            vec!["explain", "tcp", client, &frontend, "--from", "outside"],
            EXPLAIN_MS,
        ),
    ];
    let mut lines = Vec::new();
    for (name, verb, bound) in verbs {
        let mut times = Vec::new();
        for _ in 0..RUNS {
            let began = Instant::now();
            let output = agent.cli(&verb)?;
            times.push(began.elapsed().as_secs_f64() * 1e3);
            ensure!(output.status.success(), "{name}: {output:?}");
        }
        let name = format!("{services} Services, command line: {name}");
        lines.push(line(name, &times, "ms").bound(services, bound));
    }
    for (active, what) in [
        (ACTIVE.min(services), format!("{ACTIVE} Services")),
        (services, "all of them".to_owned()),
    ] {
        let load = Load::start(agent, active * ENDPOINTS)?;
        let percent = top(agent)?;
        drop(load);
        let name = format!(
            "{services} Services, command line: top, 100,000 new connections/s to {what}, of a CPU"
        );
        lines.push(line(name, &[percent], "%").bound(services, TOP_PERCENT));
    }
    Ok(lines)
}

/// New connections as `top` sees them: counts in the map, written by a thread.
struct Load {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Spreads them over so many backends.
    fn start(agent: &Agent, backends: u32) -> Result<Self> {
        let pin = maps_dir(agent.bpf_root()).join(names::BACKENDS);
        let map = MapData::from_pin(pin)?;
        let ids = map.info()?.max_entries();
        let states = MappedArray::<BackendState>::new(map.fd().as_fd(), ids)?;
        let ids: Vec<u32> = (0..ids)
            .filter(|&id| states.get(id).flags & BACKEND_SERVING != 0)
            .take(backends as usize)
            .collect();
        ensure!(ids.len() == backends as usize, "{} backends", ids.len());
        let ends = Arc::new(AtomicBool::new(false));
        let told = ends.clone();
        let thread = thread::spawn(move || {
            let mut ids = ids.iter().copied().cycle();
            while !told.load(Ordering::Relaxed) {
                for id in ids.by_ref().take(PER_PAUSE) {
                    let mut state = states.get(id);
                    state.tc_flows += 1;
                    states.set(id, state);
                }
                thread::sleep(LOAD_PAUSE);
            }
        });
        Ok(Self {
            ends,
            thread: Some(thread),
        })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

/// How much of a CPU `top` takes on a terminal of 80 columns, in percent.
fn top(agent: &Agent) -> Result<f64> {
    let (shown, terminal) = terminal()?;
    let mut top = agent
        .verb(&["top"])?
        .env("TERM", "xterm")
        .stdin(terminal.try_clone()?)
        .stdout(terminal)
        .spawn()?;
    // Whatever it draws must be taken from it.
    let drained = thread::spawn(move || io::copy(&mut File::from(shown), &mut io::sink()));
    // Its start reads all that there is.
    thread::sleep(Duration::from_secs(2));
    let cpu = || cpu_s(top.id());
    let (began, before) = (Instant::now(), cpu()?);
    thread::sleep(WATCHED);
    let percent = 100.0 * (cpu()? - before) / began.elapsed().as_secs_f64();
    ensure!(top.try_wait()?.is_none(), "`shunt top` has ended");
    top.kill()?;
    top.wait()?;
    // The last that had the terminal open: reading it fails.
    let _read = drained.join();
    Ok(percent)
}

/// Both sides of a pseudo terminal.
fn terminal() -> Result<(OwnedFd, OwnedFd)> {
    let size = libc::winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let (mut near, mut far) = (-1, -1);
    // SAFETY: the call writes two descriptors and reads the size.
    let made =
        unsafe { libc::openpty(&mut near, &mut far, ptr::null_mut(), ptr::null_mut(), &size) };
    ensure!(made == 0, "openpty: {}", io::Error::last_os_error());
    // SAFETY: the descriptors are new, and nobody else's.
    Ok(unsafe { (OwnedFd::from_raw_fd(near), OwnedFd::from_raw_fd(far)) })
}

/// CPU time of a process, seconds.
fn cpu_s(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("no name in stat")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // utime and stime, 14 and 15 in the manual, of which two are cut off.
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(ticks as f64 / clock_ticks_per_second() as f64)
}
