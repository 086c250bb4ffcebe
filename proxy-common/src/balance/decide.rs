//! A packet towards a possible frontend that no established flow explains: it is of a flow that is
//! not confirmed yet, or shares its client's port with another, or it opens one.

use super::{
    Entry, Maps, Scratch, Subprogram, Subprograms,
    bypass::find_bypass,
    choose::{choose, look_up, refresh_affinity},
    flow::{client_key, shared_key, shared_port_bit},
    forward::{find_unconfirmed, is_unanswered},
    open::{insert, open},
    owner::find_owner,
    port_use::port_use,
    refusal::refuse_arriving,
    source_address::follow_route,
    source_port::translate_source,
    stale,
    translated::is_translated,
};
use crate::{
    event::Event,
    failover::{self, Moved, Syn},
    family::Family,
    layout::*,
    packet::{RST, Tuple},
    reset,
    verdict::{Arrival, InScratch, Origin, PortUse, Step, Verdict},
};

/// The second half of [`arriving`](super::arriving): a packet towards a possible frontend that no
/// established flow of its client's side explains.
#[inline(always)]
pub fn undecided<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    arrival: &Arrival<F::Words>,
) -> Verdict {
    scratch.counted = 0;
    scratch.arrival = *arrival;
    decide(maps, scratch)
}

/// [`undecided`], of the packet in `scratch.arrival`.
#[inline(always)]
pub(crate) fn decide<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Verdict {
    Verdict::of_number(maps.call(Subprogram::Decide, scratch))
}

/// [`decide`] itself.
// Each step is a function of its own that leaves what it found in `scratch`: so its locals share
// the stack with the other steps' locals.
#[inline(always)]
pub(super) fn decide_here<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Verdict {
    if is_orphaned(maps, scratch) {
        maps.count(Event::BackendGone);
        return Verdict::Reset;
    }
    if let Step::Break(verdict) = stale::take_over(maps, scratch) {
        return verdict;
    }
    // A pod's own packet was not seen before.
    if scratch.arrival.origin != Origin::Pod && is_translated(maps, scratch) {
        return Verdict::Pass;
    }
    let found = find_backend(maps, scratch);
    stale::restore(scratch);
    if let Step::Break(verdict) = found {
        return verdict;
    }
    open(maps, scratch);
    if scratch.flow.state & FLOW_SNAT != 0
        && (scratch.flow.snat != scratch.arrival.tuple.src
            || scratch.flow.state & FLOW_PROCESS != 0)
    {
        follow_route(maps, scratch);
        if scratch.flow.snat == F::UNSPECIFIED {
            maps.count(Event::NoSourceAddress);
            return Verdict::Refuse;
        }
    }
    if scratch.flow.state & FLOW_SNAT != 0 && !translate_source(maps, scratch) {
        maps.count_snat_refused(scratch.flow.backend_id);
        return Verdict::Refuse;
    }
    insert(maps, scratch);
    Verdict::Translate(InScratch)
}

/// Looks for the packet's flow, else for a backend, which is left in [`Scratch::chosen`]: a flow to
/// it is to be opened.
#[inline(never)]
fn find_backend<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    if scratch.arrival.tcp_flags & RST != 0 && failover::refuses(maps, scratch) {
        return Step::Break(refuse_arriving(maps, scratch));
    }
    scratch.failover.begin();
    let known = port_use(maps, scratch);
    let known = scratch.port_use.hide(known);
    if known == PortUse::Unclear {
        find_flow(maps, scratch)?;
    }
    if known != PortUse::Over && scratch.failover.tried() == 0 {
        find_owner(maps, scratch)?;
    }
    if let Step::Break(verdict) = look_up(maps, scratch) {
        return match verdict {
            Verdict::Pass => find_bypass(maps, scratch),
            verdict => Step::Break(verdict),
        };
    }
    if scratch.failover.tried() != 0 {
        match failover::move_on(maps, scratch) {
            Moved::Yes => return Step::Continue(()),
            Moved::Stays => return Step::Break(Verdict::Translate(InScratch)),
            Moved::No => scratch.failover.begin(),
        }
    }
    choose(maps, scratch)?;
    failover::avoid_quarantined(maps, scratch);
    Step::Continue(())
}

/// Looks for the packet's flow, and for the connection whose SYN is sent again.
#[inline(always)]
fn find_flow<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    match failover::classify_syn(maps, scratch) {
        Syn::First => {}
        Syn::Same => return Step::Break(Verdict::Translate(InScratch)),
        Syn::MoveOn => return Step::Continue(()),
    }
    scratch.flow.tried = 0;
    if !find_unconfirmed(maps, scratch) {
        return Step::Continue(());
    }
    if scratch.flow.tried & TRIED_KEEP != 0 && scratch.flow.state & FLOW_CONFIRMED != 0 {
        refresh_affinity(maps, scratch);
    }
    Step::Break(Verdict::Translate(InScratch))
}

/// Whether the packet is of an open connection to a backend that is no more. The connection is
/// closed then.
#[inline(never)]
fn is_orphaned<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let tuple = &scratch.arrival.tuple;
    if !reset::is_due(tuple.proto, scratch.arrival.tcp_flags) {
        return false;
    }
    let mut orphaned = false;
    scratch.key = client_key::<F>(tuple);
    if let Some(entry) = maps.flow(&scratch.key) {
        orphaned = orphan(maps, entry, tuple);
    }
    if maps.port_is_shared(shared_port_bit::<F>(tuple)) {
        scratch.key = shared_key::<F>(tuple);
        if let Some(entry) = maps.flow(&scratch.key) {
            orphaned |= orphan(maps, entry, tuple);
        }
    }
    orphaned
}

#[inline(always)]
fn orphan<F: Family, M: Maps<F>>(
    maps: &M,
    entry: Entry<'_, Flow<F::Words>>,
    tuple: &Tuple<F::Words>,
) -> bool {
    let flow = entry.read();
    let is = flow.frontend == tuple.dst
        && flow.frontend_port == tuple.dst_port
        && maps.backend_flags(flow.backend_id) & BACKEND_GONE != 0
        && is_unanswered(maps, entry, TCP);
    if is {
        // In its name: that is how the client will see it.
        entry.record(maps, FLOW_BACKEND_RESET);
    }
    is
}
