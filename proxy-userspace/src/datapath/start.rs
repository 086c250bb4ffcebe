//! How long the agent's last start took, part by part: kept in a small pinned map, so that `shunt
//! status` can say it.

use std::{
    io,
    os::fd::AsFd,
    time::{Duration, Instant, SystemTime},
};

use aya::Pod;
use serde::Serialize;

use super::{
    Paths,
    bpf::{
        self,
        map::{self, BPF_ANY, types::ARRAY},
    },
};

/// What a start consists of, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Settings, capabilities and the lock.
    Settings,
    /// Maps made, or found pinned.
    Maps,
    /// Programs loaded and pinned, or taken over.
    Programs,
    /// What the maps hold from before, read back.
    ReadBack,
    /// Waiting until the source has told everything.
    Source,
    /// Services brought into the maps.
    Services,
    /// Programs attached to the cgroup and all devices.
    Attach,
}

/// Number of [`Part`]s.
const PARTS: usize = Part::Attach as usize + 1;

/// Measures a start.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    began: Instant,
    last: Instant,
    parts: [Duration; PARTS],
}

impl Stopwatch {
    /// Begins now.
    pub fn start() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            last: now,
            parts: [Duration::ZERO; PARTS],
        }
    }

    /// What has passed since the last call was for this.
    pub fn lap(&mut self, part: Part) {
        let now = Instant::now();
        self.parts[part as usize] += now - self.last;
        self.last = now;
    }

    /// What has passed altogether.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}

/// A start of the agent, in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Start {
    /// When it was ready, seconds since 1970.
    pub ready_at: u64,
    /// From the process's beginning to `ready`.
    pub took: f64,
    /// Whether pinned programs of the same build were taken over; else they were loaded.
    pub taken_over: bool,
    /// [`Part::Settings`].
    pub settings: f64,
    /// [`Part::Maps`].
    pub maps: f64,
    /// [`Part::Programs`].
    pub programs: f64,
    /// [`Part::ReadBack`].
    pub read_back: f64,
    /// [`Part::Source`].
    pub source: f64,
    /// [`Part::Services`].
    pub services: f64,
    /// [`Part::Attach`].
    pub attach: f64,
}

/// The value of the map `progs/start`; times in microseconds.
#[repr(C)]
#[derive(Clone, Copy)]
struct Record {
    ready_at: u64,
    took: u64,
    taken_over: u64,
    parts: [u64; PARTS],
}

// SAFETY: `repr(C)`, `Copy`, no padding, every bit pattern is a value.
unsafe impl Pod for Record {}

/// Keeps what `watch` measured, as of now, for [`read`].
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF`, `ENOMEM`, or `EROFS` and the like of the folder of
/// pins. `status` then tells of no start; the agent goes on.
pub fn write(paths: &Paths, watch: &Stopwatch, taken_over: bool) -> io::Result<()> {
    let micros = |time: Duration| time.as_micros() as u64;
    let record = Record {
        ready_at: SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap_or_default()
            .as_secs(),
        took: micros(watch.elapsed()),
        taken_over: taken_over.into(),
        parts: watch.parts.map(micros),
    };
    // A map of its own each time: whoever reads meanwhile sees one start or the other.
    let map = map::create_named("start", ARRAY, size_of::<u32>(), size_of::<Record>(), 1, 0)?;
    map::update(map.as_fd(), &0_u32, &record, BPF_ANY)?;
    bpf::pin_over(map.as_fd(), &paths.start())
}

/// The last start that came to its end; `None` if there is none, or if it was one of another
/// version of shunt.
///
/// # Errors
/// The kernel's, except `ENOENT`: `EPERM` or `EACCES` without the rights to the pin; run it as
/// root.
pub fn read(paths: &Paths) -> io::Result<Option<Start>> {
    let map = match bpf::open(&paths.start()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        map => map?,
    };
    let info = map::map_info(map.as_fd())?;
    if (info.key_size as usize, info.value_size as usize) != (size_of::<u32>(), size_of::<Record>())
    {
        return Ok(None);
    }
    let seconds = |micros: u64| micros as f64 / 1e6;
    Ok(map::lookup::<u32, Record>(map.as_fd(), &0)?.map(|record| {
        let part = |part: Part| seconds(record.parts[part as usize]);
        Start {
            ready_at: record.ready_at,
            took: seconds(record.took),
            taken_over: record.taken_over != 0,
            settings: part(Part::Settings),
            maps: part(Part::Maps),
            programs: part(Part::Programs),
            read_back: part(Part::ReadBack),
            source: part(Part::Source),
            services: part(Part::Services),
            attach: part(Part::Attach),
        }
    }))
}
