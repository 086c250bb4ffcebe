//! Another backend for a connection whose first one has failed, or is in quarantine.

use super::quarantine::{ANYWHERE, LOOKED_AT, bit, is_for, quarantine_length, source};
use crate::{
    affinity,
    balance::{Maps, Scratch, Subprogram, Subprograms, affinity_key},
    family::Family,
    hash,
    layout::*,
    verdict::Arrival,
};

/// No offset among a frontend's slots.
const NONE: u32 = u32::MAX;

/// For a first SYN: passes over a backend that is in quarantine, if there is another.
// A step of its own: its locals are not beneath those of the flow tables.
#[inline(never)]
pub(crate) fn avoid_quarantined<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) {
    let Arrival {
        tuple, tcp_flags, ..
    } = &scratch.arrival;
    if !is_for(tuple.proto, *tcp_flags, scratch.frontend.flags) {
        return;
    }
    let Some(entry) = maps.backend(scratch.chosen.backend) else {
        return;
    };
    if entry.read().failures == 0 {
        return;
    }
    let source = source::<F>(tuple.src, scratch.arrival.origin);
    if !entry.has_failed(source) {
        return;
    }
    if entry.is_quarantined(source, maps.affinity_now()) {
        let first = bit(scratch.chosen.backend);
        scratch.failover.tried.set(first);
        let found = pick_other_backend(maps, scratch, false);
        scratch.failover.tried.set(0);
        if !found {
            return;
        }
    }
    take(maps, scratch);
}

/// Looks among the frontend's slots for a backend that the connection has not tried and that is not
/// in quarantine; `any`: if there is none, for one that is.
#[inline(always)]
pub(super) fn pick_other_backend<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    any: bool,
) -> bool {
    scratch.failover.any.set(any);
    maps.call(Subprogram::PickOtherBackend, scratch) != 0
}

/// [`pick_other_backend`] itself.
#[inline(always)]
pub(crate) fn pick_other_backend_here<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    let Scratch {
        arrival: Arrival { tuple, origin, .. },
        failover,
        ..
    } = scratch;
    // What the first choice was made of, and the tries before, say nothing about this one.
    let first = hash::flow::<F>(
        tuple.src,
        tuple.src_port,
        tuple.dst,
        tuple.dst_port,
        tuple.proto,
    );
    let seed = hash::mix(u64::from(first) << 32 | u64::from(failover.tried.get())) as u32;
    failover.seed.set(seed);
    failover.source.set(source::<F>(tuple.src, *origin));
    failover.found.set(NONE);
    failover.second.set(NONE);
    failover.offset.set(0);
    failover.looked_at.set(0);
    for _ in 0..LOOKED_AT {
        if maps.call(Subprogram::LookAtSlot, scratch) == 0 {
            return false;
        }
    }
    let Scratch {
        frontend,
        chosen,
        failover,
        ..
    } = scratch;
    if failover.any.get() && failover.found.get() == NONE {
        failover.found.set(failover.second.get());
    }
    if failover.found.get() == NONE {
        return false;
    }
    let Some(slot) = maps.slot(frontend.slot_base.wrapping_add(failover.found.get())) else {
        return false;
    };
    *chosen = slot;
    true
}

/// Looks at one slot more for [`pick_other_backend`]; `false` if there is none.
#[inline(always)]
pub(crate) fn look_at_slot_here<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    let Scratch {
        frontend, failover, ..
    } = scratch;
    let source = failover.source.get();
    let (tried, count, i) = (
        failover.tried.get(),
        frontend.slot_count,
        failover.looked_at.get(),
    );
    failover.looked_at.set(i + 1);
    let next = failover.offset.get().wrapping_add(1);
    let offset = if i < ANYWHERE {
        hash::pick(failover.seed.get().rotate_left(9 * i), count)
    } else if next >= count {
        0
    } else {
        next
    };
    failover.offset.set(offset);
    let Some(slot) = maps.slot(frontend.slot_base.wrapping_add(offset)) else {
        return false;
    };
    let Some(backend) = maps.backend(slot.backend) else {
        return false;
    };
    let untried = (tried & bit(slot.backend) == 0) & (count > 1);
    let answers = untried & !backend.is_quarantined(source, maps.affinity_now());
    if answers && failover.found.get() == NONE {
        failover.found.set(offset);
    }
    if untried && failover.second.get() == NONE {
        failover.second.set(offset);
    }
    true
}

/// Takes the chosen backend: for a probe if it was in quarantine until now, and for the client's
/// later flows too if it keeps its backend.
#[inline(never)]
pub(super) fn take<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let (chosen, frontend) = (&scratch.chosen, &scratch.frontend);
    let Some(entry) = maps.backend(chosen.backend) else {
        return;
    };
    let (state, now) = (entry.read(), maps.affinity_now());
    let source = source::<F>(scratch.arrival.tuple.src, scratch.arrival.origin);
    if entry.has_failed(source) && !entry.is_quarantined(source, now) {
        // The others pass it over meanwhile.
        entry.set_quarantine(
            state.failures,
            now.wrapping_add(quarantine_length(config, state.failures)),
            source,
        );
        // It gets no second SYN.
        scratch.failover.probe.set(FLOW_PROBE | FLOW_RETRANSMITTED);
    }
    if frontend.flags & FRONTEND_AFFINITY != 0 {
        let key = affinity_key::<F>(&scratch.arrival.tuple, frontend);
        affinity::replace(maps, &key, chosen.backend);
    }
}
