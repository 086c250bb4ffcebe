//! Backends that have failed, and get no first SYNs for a while.

use crate::{
    balance::{Entry, Maps, Scratch},
    family::Family,
    hash,
    layout::*,
    packet::{ACK, FIN, RST, SYN},
    verdict::Origin,
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
    /// Sets the quarantine for one client.
    #[inline(always)]
    pub(super) fn set_quarantine(self, failures: u16, until: u32, source: u32) {
        // SAFETY: aligned fields of an entry that is valid by `new`'s contract; the place is one of
        // its witnesses'.
        unsafe {
            let state = self.as_ptr();
            let witness = (&raw mut (*state).witnesses)
                .cast::<Witness>()
                .add(place(source));
            (&raw mut (*witness).source).write_volatile(source);
            (&raw mut (*witness).until).write_volatile(until);
            if source & OF_A_POD != 0 {
                (&raw mut (*state).sockets_until).write(until);
            }
            (&raw mut (*state).quarantined_until).write(until);
            (&raw mut (*state).failures).write(failures);
        }
    }

    /// Ends the quarantine for all.
    #[inline(always)]
    fn end_quarantine(self) {
        // SAFETY: as above.
        unsafe {
            let state = self.as_ptr();
            (&raw mut (*state).failures).write(0);
            (&raw mut (*state).quarantined_until).write(0);
            (&raw mut (*state).sockets_until).write(0);
            for n in 0..MAX_WITNESSES {
                let witness = (&raw mut (*state).witnesses).cast::<Witness>().add(n);
                (&raw mut (*witness).source).write_volatile(0);
            }
        }
    }

    /// What is known of a client.
    #[inline(always)]
    fn witness(self, source: u32) -> Witness {
        // SAFETY: as above.
        unsafe {
            (&raw const (*self.as_ptr()).witnesses)
                .cast::<Witness>()
                .add(place(source))
                .read()
        }
    }

    /// Whether the backend has failed a client, and answered nobody since.
    #[inline(always)]
    pub(super) fn has_failed(self, source: u32) -> bool {
        self.read().failures != 0 && self.witness(source).source == source
    }

    /// Whether it gets none of the client's first SYNs now.
    #[inline(always)]
    pub(super) fn is_quarantined(self, source: u32, now: u32) -> bool {
        self.has_failed(source) & is_later(self.witness(source).until, now)
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
    proto == TCP
        && tcp_flags & (SYN | ACK | RST | FIN) == SYN
        && frontend_flags & FRONTEND_NO_RETRY == 0
}

/// A backend has answered a SYN.
#[inline(always)]
pub(crate) fn answered<F: Family, M: Maps<F>>(maps: &M, backend: u32) {
    if let Some(entry) = maps.backend(backend)
        && entry.read().failures != 0
    {
        entry.end_quarantine();
    }
}

/// A bit of a [`Witness::source`] that is a pod of this node.
const OF_A_POD: u32 = 1 << 31;

/// Who says that a backend has failed: a pod or the node itself, or a network outside, whose addresses may all be made
/// up by one. Never 0.
#[inline(always)]
pub fn source<F: Family>(client: F::Words, origin: Origin) -> u32 {
    let (who, pod) = match origin {
        Origin::Pod | Origin::Process => (F::fold(client), OF_A_POD),
        Origin::Network => (F::network(client), 0),
    };
    (hash::mix(who) as u32 | 1 << 30) & !OF_A_POD | pod
}

/// Where a client's witness stands.
#[inline(always)]
fn place(source: u32) -> usize {
    source as usize & (MAX_WITNESSES - 1)
}

#[inline(always)]
fn is_later(until: u32, now: u32) -> bool {
    (until.wrapping_sub(now) as i32) > 0
}

/// How long a backend is in quarantine after so many failures.
#[inline(always)]
pub(super) fn quarantine_length(config: &Config, failures: u16) -> u32 {
    let doubled = u64::from(config.quarantine) << (u32::from(failures).wrapping_sub(1) & 15);
    doubled.min(config.quarantine_max.into()) as u32
}

/// Records that the backend of the flow has failed its client. A flow that was on its way when the
/// quarantine began says nothing new; a probe does.
#[inline(never)]
pub(super) fn fail<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>, grows: bool) {
    let Some(config) = maps.config() else { return };
    let (flow, arrival) = (&scratch.flow, &scratch.arrival);
    let Some(entry) = maps.backend(flow.backend_id) else {
        return;
    };
    let source = source::<F>(arrival.tuple.src, arrival.origin);
    let (state, now) = (entry.read(), maps.affinity_now());
    if config.quarantine == 0 || (entry.is_quarantined(source, now) && flow.state & FLOW_PROBE == 0)
    {
        return;
    }
    let failures = if state.failures == 0 || (grows && entry.has_failed(source)) {
        state.failures.saturating_add(1).min(MAX_FAILURES)
    } else {
        state.failures
    };
    entry.set_quarantine(
        failures,
        now.wrapping_add(quarantine_length(config, failures)),
        source,
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
        // A socket's address is not known yet: what pods have seen counts for all of the node.
        Some(backend) => {
            let state = backend.read();
            (state.failures != 0) & is_later(state.sockets_until, now)
        }
        None => false,
    }
}
