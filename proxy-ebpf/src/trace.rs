//! Records for tracers (`shunt trace`), of what is counted on the paths of few packets.
//!
//! Packets of open flows do not come here. On the others' paths an event costs one look at
//! [`TRACERS`] while nobody traces; a lease that is over is ended by the first record after it.

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_RB_NO_WAKEUP},
    btf_maps::{Array, ArrayOfMaps, RingBuf},
    helpers::bpf_ktime_get_coarse_ns,
    macros::btf_map,
};
use shunt_common::{
    family::{Family, V6, Words6},
    layout::{MAX_TRACERS, TRACE_RING_BYTES, TracePlace, TraceRecord, Tracers},
};

/// What a tracer is told.
pub(crate) type Record = TraceRecord<Words6>;

#[btf_map(name = "tracers")]
static TRACERS: Array<Tracers<Words6>, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map(name = "trace_rings")]
static RINGS: ArrayOfMaps<RingBuf<Record, TRACE_RING_BYTES>, MAX_TRACERS> = ArrayOfMaps::new();

/// Whether somebody traces, or did.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    let Some(tracers) = TRACERS.get_ptr(0) else {
        return false;
    };
    let mut until = 0;
    for i in 0..MAX_TRACERS {
        // SAFETY: an aligned word of a live map value.
        until |= unsafe { (&raw const (*tracers).places[i].until).read_volatile() };
    }
    until != 0
}

/// Sends a record to every tracer that wants it.
#[inline(always)]
pub(crate) fn send(record: &mut Record) {
    for place in 0..MAX_TRACERS as u32 {
        send_to(record, place);
    }
}

/// Sends a record to the tracer at a place, if there is one and it wants it.
#[inline(always)]
pub(crate) fn send_to(record: &mut Record, place: u32) {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    record.time = now;
    let Some(tracers) = TRACERS.get_ptr_mut(0) else {
        return;
    };
    if place as usize >= MAX_TRACERS {
        return;
    }
    // SAFETY: within a live map value.
    let tracer = unsafe {
        (&raw mut (*tracers).places)
            .cast::<TracePlace<Words6>>()
            .add(place as usize)
    };
    // SAFETY: an aligned word of it.
    let until = unsafe { (&raw const (*tracer).until).read_volatile() };
    if until == 0 {
        return;
    }
    if until <= now {
        // SAFETY: the same word, which its tracer may have changed meanwhile: then it stays.
        unsafe {
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                &raw mut (*tracer).until,
                until,
                0,
            )
        };
        return;
    }
    // SAFETY: set before the tracer was turned on.
    if !record.fits(unsafe { &(*tracer).filter }, V6::UNSPECIFIED) {
        return;
    }
    // The tracer looks by itself, so no event waits for it to wake.
    if let Some(ring) = RINGS.get(place)
        && ring.output(*record, BPF_RB_NO_WAKEUP.into()).is_err()
    {
        // SAFETY: an aligned word of a live map value.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*tracer).lost, 1) };
    }
}
