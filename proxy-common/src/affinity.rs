//! Session affinity (`sessionAffinity: ClientIP`): one client's new flows go where its last one
//! went.
//!
//! A client is a source address where packets are seen, and a network namespace where sockets are
//! (its address is chosen after `connect`). What is kept for it is a backend id, per Service port
//! and set of backends. The id is good as long as it is a member of the very slots that the
//! frontend names (`members`): the switch to another backend set decides that too, so nobody is
//! sent to a backend that its frontend no longer has. As with kube-proxy, each new flow counts as a
//! use, and a client that opens none for the Service's time-out is forgotten.
//!
//! First packets may come from made-up sources, so many that an LRU map forgets everybody else. So
//! what a client gets that was not heard of before stands in `new_affinity`, and moves to
//! `affinity` when one of its flows is confirmed: when the client has spoken after an answer. No
//! first packet adds to `affinity`, though it may change what stands there.

use crate::{
    balance::{Entry, Maps},
    family::Family,
    hash,
    layout::*,
};

/// The slot for a client's new flow: its backend's, if it has one and the frontend does; else the
/// choice's, which is kept for it. `is_confirmed`: the client is there for sure. `frontend` must
/// have slots.
#[inline(always)]
pub fn slot_index<F: Family, M: Maps<F>>(
    maps: &M,
    key: &AffinityKey<F::Words>,
    frontend: &Frontend,
    choice: u32,
    is_confirmed: bool,
) -> u32 {
    let chosen = frontend
        .slot_base
        .wrapping_add(hash::pick(choice, frontend.slot_count));
    let now = maps.affinity_now();
    if let Some(entry) = entry_of(maps, key, is_confirmed) {
        let kept = entry.read();
        if let Some(index) = kept_index(maps, &kept, frontend, now) {
            entry.touch(now);
            return index;
        }
        let Some(slot) = maps.slot(chosen) else {
            return chosen;
        };
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
    let Some(slot) = maps.slot(chosen) else {
        return chosen;
    };
    let new = Affinity {
        last_used: now,
        backend: slot.backend,
    };
    let added = if is_confirmed {
        maps.add_affinity(key, &new)
    } else {
        maps.add_new_affinity(key, &new)
    };
    if !added
        && let Some(entry) = entry_of(maps, key, is_confirmed)
        && let Some(index) = kept_index(maps, &entry.read(), frontend, now)
    {
        return index;
    }
    chosen
}

/// What is known of a client.
#[inline(always)]
fn entry_of<'m, F: Family, M: Maps<F>>(
    maps: &'m M,
    key: &AffinityKey<F::Words>,
    is_confirmed: bool,
) -> Option<Entry<'m, Affinity>> {
    match maps.affinity(key) {
        None if !is_confirmed => maps.new_affinity(key),
        entry => entry,
    }
}

/// A flow to this backend is confirmed: its client is there, and keeps it, unless another flow has
/// told before.
#[inline(always)]
pub(crate) fn confirm<F: Family, M: Maps<F>>(maps: &M, key: &AffinityKey<F::Words>, backend: u32) {
    // Looked at first: an LRU map makes room before it finds that there is an entry.
    if maps.affinity(key).is_some() {
        return;
    }
    let new = Affinity {
        last_used: maps.affinity_now(),
        backend,
    };
    if maps.add_affinity(key, &new) {
        maps.remove_new_affinity(key);
    }
}

/// Keeps another backend for a client from now on.
#[inline(always)]
pub fn replace<F: Family, M: Maps<F>>(maps: &M, key: &AffinityKey<F::Words>, backend: u32) {
    let new = Affinity {
        last_used: maps.affinity_now(),
        backend,
    };
    match entry_of(maps, key, false) {
        // Another CPU that was first has done the same.
        Some(entry) => drop(maps.replace_affinity(entry, &entry.read(), &new)),
        None => drop(maps.add_new_affinity(key, &new)),
    }
}

/// Where the kept backend stands among the frontend's slots; `None` when it is not there, or kept
/// no longer.
#[inline(always)]
fn kept_index<F: Family, M: Maps<F>>(
    maps: &M,
    kept: &Affinity,
    frontend: &Frontend,
    now: u32,
) -> Option<u32> {
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
