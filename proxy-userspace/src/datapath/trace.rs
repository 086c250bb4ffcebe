//! One tracer's place among the programs: a filter, a ring buffer, and a lease on both.
//!
//! Programs send records while the lease lasts, which its owner puts off by living: one that is
//! killed leaves nothing on. What is left of it in the kernel is a ring buffer, which the agent's
//! next walk or the next tracer takes away ([`clear`]).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use aya::maps::{Map, MapData, MapError as AyaError, RingBuf};
use rustix::time::{ClockId, clock_gettime};
use shunt_common::layout::{MAX_TRACERS, TraceFilter, TracePlace, TraceRecord, Tracers, names};

use super::{
    bpf::{
        MappedArray,
        map::{self, BPF_ANY, types::RINGBUF},
    },
    maps::{MapError, open_pin},
};

/// For how long programs send records after a tracer has last said that it lives.
pub const LEASE: Duration = Duration::from_secs(3);
/// Bytes of a ring buffer: 35,000 records, which is a third of a second of 10⁵ events/s.
const RING_BYTES: u32 = 4 * 1024 * 1024;

/// Addresses as programs and tracers share them.
type Octets = [u8; 16];

/// Why a tracer cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The maps are not there, or cannot be opened.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Others trace.
    #[error("{MAX_TRACERS} others trace already, which is all that may at once: end one of them")]
    Taken,
    /// The kernel has no ring buffer for it.
    #[error(
        "the kernel refused a ring buffer of {RING_BYTES} bytes: {0}; it needs Linux 5.8 and that much memory"
    )]
    Ring(#[source] io::Error),
    /// The ring buffer is there, and cannot be used.
    #[error("the ring buffer cannot be read: {0}")]
    Read(#[source] AyaError),
}

/// A tracer at work.
pub struct Tracer {
    tracers: MappedArray<Tracers<Octets>>,
    rings: OwnedFd,
    place: usize,
    ring: RingBuf<MapData>,
}

impl Tracer {
    /// Takes a place, and has records that fit `filter` sent.
    ///
    /// # Errors
    /// [`TraceError`], each with what to do.
    pub fn start(bpf_root: &Path, filter: TraceFilter<Octets>) -> Result<Self, TraceError> {
        let (tracers, rings) = open(bpf_root)?;
        let place = (0..MAX_TRACERS)
            .find(|&place| take(&tracers, place))
            .ok_or(TraceError::Taken)?;
        // Of a tracer that was killed.
        tracers.tracing_until(place).store(0, Ordering::Release);
        let page = rustix::param::page_size() as u32;
        let ring = map::create_named("trace", RINGBUF, 0, 0, RING_BYTES.max(page), 0)
            .map_err(TraceError::Ring)?;
        map::update(
            rings.as_fd(),
            &(place as u32),
            &(ring.as_raw_fd() as u32),
            BPF_ANY,
        )
        .map_err(TraceError::Ring)?;
        let ring = MapData::from_fd(ring)
            .and_then(|data| RingBuf::try_from(Map::RingBuf(data)))
            .map_err(TraceError::Read)?;
        tracers.set_trace_filter(place, filter);
        tracers.traces_lost(place).store(0, Ordering::Release);
        let tracer = Self {
            tracers,
            rings,
            place,
            ring,
        };
        tracer.renew();
        Ok(tracer)
    }

    /// Says that the tracer lives: to be called more often than once in [`LEASE`].
    pub fn renew(&self) {
        let until = now() + LEASE.as_nanos() as u64;
        self.tracers
            .taken_until(self.place)
            .store(until, Ordering::Release);
        self.tracers
            .tracing_until(self.place)
            .store(until, Ordering::Release);
    }

    /// Records that found no room, since the start.
    pub fn lost(&self) -> u64 {
        self.tracers.traces_lost(self.place).load(Ordering::Acquire)
    }

    /// The next record, if there is one by now.
    pub fn receive(&mut self) -> Option<TraceRecord<Octets>> {
        let item = self.ring.next()?;
        let record = item.as_ptr().cast::<TraceRecord<Octets>>();
        // SAFETY: as many bytes, of which all are a record.
        (item.len() == size_of::<TraceRecord<Octets>>()).then(|| unsafe { record.read_unaligned() })
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.tracers
            .tracing_until(self.place)
            .store(0, Ordering::Release);
        // The next tracer, or the agent, tries again.
        let _gone = map::delete(self.rings.as_fd(), &(self.place as u32));
        self.tracers
            .taken_until(self.place)
            .store(0, Ordering::Release);
    }
}

/// How many trace now; none where nobody can, because an agent from before there were tracers has
/// made the maps.
///
/// # Errors
/// [`MapError`]: not allowed, or the kernel's.
pub fn active(bpf_root: &Path) -> Result<usize, MapError> {
    let (tracers, _) = match open(bpf_root) {
        Err(MapError::NoAgent { .. }) => return Ok(0),
        opened => opened?,
    };
    let now = now();
    let is_on = |&place: &usize| tracers.tracing_until(place).load(Ordering::Acquire) > now;
    Ok((0..MAX_TRACERS).filter(is_on).count())
}

/// Takes away what tracers that were killed have left in the kernel.
///
/// # Errors
/// [`MapError`]: no maps, or the kernel's.
pub fn clear(bpf_root: &Path) -> Result<(), MapError> {
    let (tracers, rings) = open(bpf_root)?;
    for place in 0..MAX_TRACERS {
        let left = tracers.taken_until(place).load(Ordering::Acquire);
        if left != 0 && take(&tracers, place) {
            tracers.tracing_until(place).store(0, Ordering::Release);
            let deleted = map::delete(rings.as_fd(), &(place as u32));
            tracers.taken_until(place).store(0, Ordering::Release);
            deleted.map_err(|source| MapError::Kernel {
                action: "delete from",
                map: names::TRACE_RINGS,
                source,
            })?;
        }
    }
    Ok(())
}

fn open(bpf_root: &Path) -> Result<(MappedArray<Tracers<Octets>>, OwnedFd), MapError> {
    let (fd, _) = open_pin(
        bpf_root,
        names::TRACERS,
        size_of::<u32>(),
        size_of::<Tracers<Octets>>(),
    )?;
    let tracers = MappedArray::new(fd.as_fd(), 1).map_err(|source| MapError::Kernel {
        action: "memory-map",
        map: names::TRACERS,
        source,
    })?;
    let (rings, _) = open_pin(
        bpf_root,
        names::TRACE_RINGS,
        size_of::<u32>(),
        size_of::<u32>(),
    )?;
    Ok((tracers, rings))
}

/// Takes a place, unless another has it.
fn take(tracers: &MappedArray<Tracers<Octets>>, place: usize) -> bool {
    let now = now();
    let taken = tracers.taken_until(place);
    let seen = taken.load(Ordering::Acquire);
    let until = now + LEASE.as_nanos() as u64;
    seen <= now
        && taken
            .compare_exchange(seen, until, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
}

/// The kernel's monotonic clock, in ns.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl MappedArray<Tracers<Octets>> {
    fn tracer(&self, place: usize) -> *mut TracePlace<Octets> {
        assert!(place < MAX_TRACERS);
        // SAFETY: within the only element.
        unsafe {
            (&raw mut (*self.at(0)).places)
                .cast::<TracePlace<Octets>>()
                .add(place)
        }
    }

    fn tracing_until(&self, place: usize) -> &AtomicU64 {
        // SAFETY: valid, aligned and alive as long as the mapping; all writers use atomics.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.tracer(place)).until) }
    }

    fn taken_until(&self, place: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.tracer(place)).taken_until) }
    }

    fn traces_lost(&self, place: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.tracer(place)).lost) }
    }

    /// Sets the filter of a place that is taken and not on, so that nobody reads it.
    fn set_trace_filter(&self, place: usize, filter: TraceFilter<Octets>) {
        // SAFETY: valid, aligned and alive as long as the mapping.
        unsafe { (&raw mut (*self.tracer(place)).filter).write_volatile(filter) };
    }
}
