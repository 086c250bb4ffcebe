//! Session affinity (`sessionAffinity: ClientIP`): one client's new flows go where its last one went.
//!
//! A client is a source address where packets are seen, and a network namespace where sockets are (its address is chosen
//! after `connect`). What is kept for it is a backend id, per Service port and set of backends. The id is good as long as
//! it is a member of the very slots that the frontend names (`members`): the switch to another backend set decides that
//! too, so nobody is sent to a backend that its frontend no longer has. As with kube-proxy, each new flow counts as a
//! use, and a client that opens none for the Service's time-out is forgotten.

use crate::{
    balance::{Entry, Maps},
    family::Family,
    hash,
    layout::*,
};

/// The slot for a client's new flow: its backend's, if it has one and the frontend does; else the choice's, which is kept
/// for it. `frontend` must have slots.
#[inline(always)]
pub fn slot_index<F: Family, M: Maps<F>>(
    maps: &M,
    key: &AffinityKey<F::Words>,
    frontend: &Frontend,
    choice: u32,
) -> u32 {
    let chosen = frontend.slot_base.wrapping_add(hash::pick(choice, frontend.slot_count));
    let now = maps.affinity_now();
    if let Some(entry) = maps.affinity(key) {
        let kept = entry.read();
        if let Some(index) = kept_index(maps, &kept, frontend, now) {
            entry.touch(now);
            return index;
        }
        let Some(slot) = maps.slot(chosen) else { return chosen };
        let new = Affinity {
            last_used: now,
            backend: slot.backend,
        };
        // Another CPU may do the same for another flow of this client: the first one decides.
        if maps.replace_affinity(entry, &kept, &new) {
            return chosen;
        }
        return kept_index(maps, &entry.read(), frontend, now).unwrap_or(chosen);
    }
    let Some(slot) = maps.slot(chosen) else { return chosen };
    let new = Affinity {
        last_used: now,
        backend: slot.backend,
    };
    if !maps.add_affinity(key, &new)
        && let Some(entry) = maps.affinity(key)
        && let Some(index) = kept_index(maps, &entry.read(), frontend, now)
    {
        return index;
    }
    chosen
}

/// Keeps another backend for a client from now on.
#[inline(always)]
pub fn replace<F: Family, M: Maps<F>>(maps: &M, key: &AffinityKey<F::Words>, backend: u32) {
    let new = Affinity {
        last_used: maps.affinity_now(),
        backend,
    };
    match maps.affinity(key) {
        // Another CPU that was first has done the same.
        Some(entry) => drop(maps.replace_affinity(entry, &entry.read(), &new)),
        None => drop(maps.add_affinity(key, &new)),
    }
}

/// Where the kept backend stands among the frontend's slots; `None` when it is not there, or kept no longer.
#[inline(always)]
fn kept_index<F: Family, M: Maps<F>>(maps: &M, kept: &Affinity, frontend: &Frontend, now: u32) -> Option<u32> {
    const NS_PER_SEC: u64 = 1_000_000_000;
    let mut idle = now.wrapping_sub(kept.last_used);
    // Another CPU has written a later time than the one read here.
    if idle > u32::MAX / 2 {
        idle = 0;
    }
    if u64::from(idle) * AFFINITY_TICK_NS >= u64::from(frontend.affinity_secs) * NS_PER_SEC {
        return None;
    }
    maps.member(&MemberKey {
        slot_base: frontend.slot_base,
        backend: kept.backend,
    })
}

impl Entry<'_, Affinity> {
    /// Notes a use, when the time has changed.
    #[inline(always)]
    fn touch(self, now: u32) {
        let last_used = self.as_ptr().cast::<u32>();
        // SAFETY: the first field of a live entry, aligned.
        unsafe {
            if *last_used != now {
                *last_used = now;
            }
        }
    }
}
