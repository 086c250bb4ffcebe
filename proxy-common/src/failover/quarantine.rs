//! Backends that have failed, and get no first SYNs for a while.

use crate::{
    balance::{Entry, Maps},
    family::Family,
    hash,
    layout::*,
    packet::{ACK, RST, SYN},
};

/// Slots that are looked at for another backend: the first anywhere among the frontend's, so that
/// the share of a backend in quarantine falls to all others; then side by side, so that few
/// backends are all looked at.
pub(super) const LOOKED_AT: u32 = 8;
/// How many of them are anywhere.
pub(super) const ANYWHERE: u32 = 3;
/// Most doublings of a quarantine.
const MAX_FAILURES: u16 = 16;

impl Entry<'_, BackendState> {
    #[inline(always)]
    pub(super) fn set_quarantine(self, failures: u16, until: u32) {
        // SAFETY: aligned fields of an entry that is valid by `new`'s contract.
        unsafe {
            (&raw mut (*self.as_ptr()).failures).write(failures);
            (&raw mut (*self.as_ptr()).quarantined_until).write(until);
        }
    }
}

/// Whether a flow's first answer is still due, and its SYN may go elsewhere.
#[inline(always)]
pub(crate) fn is_open(state: u32) -> bool {
    state & (FLOW_RETRY | FLOW_SEEN_REPLY) == FLOW_RETRY
}

/// Whether a packet opens a flow that this module is for.
#[inline(always)]
pub(crate) fn is_for(proto: u8, tcp_flags: u8, frontend_flags: u16) -> bool {
    proto == TCP && tcp_flags & (SYN | ACK | RST) == SYN && frontend_flags & FRONTEND_NO_RETRY == 0
}

/// A backend has answered a SYN.
#[inline(always)]
pub(crate) fn answered<F: Family, M: Maps<F>>(maps: &M, backend: u32) {
    if let Some(entry) = maps.backend(backend)
        && entry.read().failures != 0
    {
        entry.set_quarantine(0, 0);
    }
}

/// Whether a backend gets no first SYNs now.
#[inline(always)]
pub(super) fn is_quarantined(state: &BackendState, now: u32) -> bool {
    (state.failures != 0) & ((state.quarantined_until.wrapping_sub(now) as i32) > 0)
}

/// How long a backend is in quarantine after so many failures.
#[inline(always)]
pub(super) fn quarantine_length(config: &Config, failures: u16) -> u32 {
    let doubled = u64::from(config.quarantine) << (u32::from(failures).wrapping_sub(1) & 15);
    doubled.min(config.quarantine_max.into()) as u32
}

/// Records that the backend of the flow has failed. A flow that was on its way when the quarantine
/// began says nothing new; a probe does.
#[inline(never)]
pub(super) fn fail<F: Family, M: Maps<F>>(maps: &M, flow: &Flow<F::Words>, grows: bool) {
    let Some(config) = maps.config() else { return };
    let Some(entry) = maps.backend(flow.backend_id) else {
        return;
    };
    let (state, now) = (entry.read(), maps.affinity_now());
    if config.quarantine == 0 || (is_quarantined(&state, now) && flow.state & FLOW_PROBE == 0) {
        return;
    }
    let failures = if grows || state.failures == 0 {
        state.failures.saturating_add(1).min(MAX_FAILURES)
    } else {
        state.failures
    };
    entry.set_quarantine(
        failures,
        now.wrapping_add(quarantine_length(config, failures)),
    );
}

/// A backend's bit in [`Flow::tried`].
#[inline(always)]
pub(super) fn bit(backend: u32) -> u32 {
    1 << (backend % 31)
}

/// For a connection of a socket, which nobody could move later: the slot at `index`, or another one
/// while its backend is in quarantine and that one's is not. A quarantine ends without a probe
/// here: no answer would be seen.
#[inline(never)]
pub fn socket_slot<F: Family, M: Maps<F>>(
    maps: &M,
    frontend: &Frontend,
    index: u32,
    choice: u32,
) -> u32 {
    let now = maps.affinity_now();
    if !slot_is_quarantined(maps, index, now) {
        return index;
    }
    // What the first choice was made of says nothing about this one.
    let seed = hash::mix(u64::from(choice)) as u32;
    let mut offset = 0;
    for i in 0..LOOKED_AT {
        offset = if i < ANYWHERE {
            hash::pick(seed.rotate_left(9 * i), frontend.slot_count)
        } else if offset + 1 >= frontend.slot_count {
            0
        } else {
            offset + 1
        };
        let other = frontend.slot_base.wrapping_add(offset);
        if !slot_is_quarantined(maps, other, now) {
            return other;
        }
    }
    index
}

#[inline(always)]
fn slot_is_quarantined<F: Family, M: Maps<F>>(maps: &M, index: u32, now: u32) -> bool {
    match maps.slot(index).and_then(|slot| maps.backend(slot.backend)) {
        Some(backend) => is_quarantined(&backend.read(), now),
        None => false,
    }
}
