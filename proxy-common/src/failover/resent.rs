//! SYNs that were sent before.

use super::{
    pick::{pick_other_backend, take},
    quarantine::{bit, fail, is_for, is_open},
};
use crate::{
    balance::{
        Entry, Maps, Scratch, Subprograms, client_key, explains, shared_key, shared_port_bit,
        snat_slot, unconfirmed,
    },
    event::Event,
    family::Family,
    layout::*,
    packet::Tuple,
    timeouts::is_closed,
    verdict::Arrival,
};

/// Most backends that one connection tries: clients give up after seven SYNs or so.
pub(super) const MAX_BACKENDS: u32 = 8;
/// Two SYNs within this time ([`AFFINITY_TICK_NS`]; 200 ms) are one: XDP has left it to tc, or the
/// network has doubled it. Clients send again after a second.
const SAME_SYN: u16 = 12;
/// Ticks ([`TICK_NS`]) without a SYN after which the next is a connection of its own.
const ABANDONED_TICKS: u32 = 20;

/// What a SYN is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Syn {
    /// The first of its connection, or not a SYN at all.
    First,
    /// One that was sent before, and goes where it went: [`Scratch::translation`].
    Same,
    /// One that was sent before, and shall go to another backend: [`move_on`].
    MoveOn,
}

/// Whether the packet is a SYN that was sent before and not answered.
#[inline(always)]
pub(crate) fn classify_syn<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Syn {
    let Arrival {
        tuple, tcp_flags, ..
    } = &scratch.arrival;
    if !is_for(tuple.proto, *tcp_flags, 0) || !pending(maps, scratch) {
        return Syn::First;
    }
    match evaluate_failures(maps, scratch) {
        Syn::Same if !stay(maps, scratch) => Syn::First,
        Syn::MoveOn => {
            give_up(maps, scratch);
            Syn::MoveOn
        }
        syn => syn,
    }
}

/// The entry of the flow that `scratch.key` and the SYN in `scratch.arrival` name.
#[inline(always)]
pub(super) fn entry_of<'m, F: Family, M: Maps<F>>(
    maps: &'m M,
    scratch: &Scratch<F::Words>,
) -> Option<Entry<'m, Flow<F::Words>>> {
    let tuple = &scratch.arrival.tuple;
    if let Some(entry) = maps.unconfirmed_flow(&scratch.key)
        && is_pending(&entry.read(), tuple)
    {
        return Some(entry);
    }
    maps.flow(&scratch.key)
        .filter(|entry| is_pending(&entry.read(), tuple))
}

#[inline(always)]
fn is_pending<A: Copy + Eq>(flow: &Flow<A>, tuple: &Tuple<A>) -> bool {
    (flow.frontend == tuple.dst)
        & (flow.frontend_port == tuple.dst_port)
        & is_open(flow.state)
        & !is_closed(flow.state)
}

/// Looks for the flow of the SYN in `scratch.arrival`: leaves its key and a copy in `scratch`.
#[inline(never)]
pub(super) fn pending<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    scratch.key = client_key::<F>(&scratch.arrival.tuple);
    if let Some(entry) = entry_of(maps, scratch) {
        entry.copy_to(&mut scratch.flow);
        return true;
    }
    if maps.port_is_shared(shared_port_bit::<F>(&scratch.arrival.tuple)) {
        scratch.key = shared_key::<F>(&scratch.arrival.tuple);
        if let Some(entry) = entry_of(maps, scratch) {
            entry.copy_to(&mut scratch.flow);
            return true;
        }
    }
    false
}

/// What the flow in `scratch.flow` says to one more SYN.
#[inline(never)]
fn evaluate_failures<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Syn {
    let Some(config) = maps.config() else {
        return Syn::First;
    };
    let flow = &scratch.flow;
    // The client has given up, and dials anew from that port.
    if maps.now().saturating_sub(flow.last_seen) > ABANDONED_TICKS {
        return Syn::First;
    }
    if flow.state & FLOW_SNAT != 0 {
        match snat_slot(
            maps,
            config,
            flow.snat_port,
            flow.backend,
            flow.backend_port,
            TCP,
        ) {
            // Replies to a translated source are seen in its slot only.
            Some((_, slot)) if is_open(slot.state) => {}
            _ => return Syn::First,
        }
    }
    if flow.state & FLOW_REFUSED != 0 {
        return Syn::MoveOn;
    }
    let now = maps.affinity_now() as u16;
    if now.wrapping_sub(flow.unanswered_since) < SAME_SYN {
        return Syn::Same;
    }
    let twice = flow.state & FLOW_RETRANSMITTED != 0;
    if let Some(entry) = entry_of(maps, scratch) {
        entry.ask(now);
        entry.set(FLOW_RETRANSMITTED);
    }
    if twice { Syn::MoveOn } else { Syn::Same }
}

/// Leaves the SYN with the backend it has.
#[inline(never)]
fn stay<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let tuple = &scratch.arrival.tuple;
    if let Some(entry) = maps.unconfirmed_flow(&scratch.key)
        && is_pending(&entry.read(), tuple)
    {
        return unconfirmed(maps, scratch);
    }
    match maps.flow(&scratch.key) {
        Some(entry) if is_pending(&entry.read(), tuple) => explains(maps, scratch),
        _ => false,
    }
}

/// Records that the flow's backend has failed it. A refusal was recorded when it came.
#[inline(always)]
fn give_up<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    if scratch.flow.state & FLOW_REFUSED == 0 {
        fail(maps, scratch, true);
    }
    let tried = scratch.flow.tried & !TRIED_KEEP | bit(scratch.flow.backend_id);
    scratch.failover.tried.set(tried);
}

/// What became of a SYN that shall go to another backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// The other one stands in [`Scratch::chosen`].
    Yes,
    /// There is no other: [`Scratch::translation`].
    Stays,
    /// There is none, and the first gets no connections any more: choose anew.
    No,
}

/// Finds another backend for a flow that was given up, and gives back what it held. The frontend
/// was looked up.
#[inline(always)]
pub(crate) fn move_on<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Moved {
    let may = scratch.frontend.flags & FRONTEND_NO_RETRY == 0
        && scratch.failover.tried().count_ones() < MAX_BACKENDS;
    if may && pick_other_backend(maps, scratch, true) {
        release(maps, scratch);
        take(maps, scratch);
        maps.count(Event::Retry);
        return Moved::Yes;
    }
    if stay(maps, scratch) {
        Moved::Stays
    } else {
        Moved::No
    }
}

/// Gives a translated source port back. What the old backend still says to it is nobody's: the
/// kernel resets it.
#[inline(never)]
fn release<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let (flow, tuple) = (&scratch.flow, &scratch.arrival.tuple);
    if flow.state & FLOW_SNAT != 0
        && let Some((entry, slot)) = snat_slot(
            maps,
            config,
            flow.snat_port,
            flow.backend,
            flow.backend_port,
            TCP,
        )
        && slot.client == tuple.src
        && slot.client_port == tuple.src_port
        && slot.frontend == tuple.dst
        && slot.frontend_port == tuple.dst_port
    {
        // SAFETY: an aligned field of a live entry, which is this flow's own.
        unsafe { entry.last_seen().write_volatile(0) };
    }
}
