//! A packet towards a possible frontend that no established flow explains: it is of a flow that is not confirmed yet, or
//! shares its client's port with another, or it opens one.

use super::{
    Arrival, Entry, Maps, Outcome, Scratch, Subprogram, Subprograms,
    choose::{choose, keep},
    client_key, collided_bit, explains,
    forward::{is_silent, unconfirmed},
    look_up,
    open::{open, remember},
    refusal::refuse_arriving,
    shared_key,
    source_port::translate_source,
};
use crate::{
    event::Event,
    family::Family,
    filter,
    layout::*,
    packet::{ACK, RST, SYN, Tuple},
    reset, retry,
    timeouts::is_closed,
};

/// The second half of [`arriving`](super::arriving): a packet towards a possible frontend that no established flow of its
/// client's side explains.
#[inline(always)]
pub fn undecided<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    arrival: &Arrival<F::Words>,
) -> Outcome {
    scratch.arrival = *arrival;
    decide(maps, scratch)
}

/// The steps of [`undecided`].
#[inline(always)]
pub(super) fn decide<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    maps.call(Subprogram::Decide, scratch).into()
}

/// [`decide`] itself.
// Each step is a function of its own that leaves what it found in `scratch`: so its locals share the stack with the
// other steps' locals, and the verifier walks it once, not once for every way through the step before.
#[inline(always)]
pub(super) fn decide_here<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    let orphaned = is_orphaned(maps, scratch);
    if scratch.search.flag.hide(orphaned) {
        maps.count(Event::BackendGone);
        return Outcome::Reset;
    }
    let step = find(maps, scratch) as u32;
    scratch.search.flag.set(step);
    match scratch.search.flag.get() {
        0 => return Outcome::Pass,
        1 => return Outcome::Translate,
        2 => return Outcome::Refuse,
        3 => return Outcome::Drop,
        _ => {}
    }
    open(maps, scratch);
    if scratch.flow.state & FLOW_SNAT != 0 && !translate_source(maps, scratch) {
        maps.count(Event::SnatExhausted);
        return Outcome::Drop;
    }
    remember(maps, scratch);
    Outcome::Translate
}

/// What [`find`] found: an [`Outcome`], or a backend.
#[repr(u32)]
pub(super) enum Step {
    Pass = Outcome::Pass as u32,
    Translate = Outcome::Translate as u32,
    Refuse = Outcome::Refuse as u32,
    Drop = Outcome::Drop as u32,
    /// A flow to [`Scratch::chosen`] is to be opened.
    Open,
}

/// Looks for the packet's flow, else for a backend.
#[inline(never)]
fn find<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    if scratch.arrival.tcp_flags & RST != 0 {
        let refused = retry::refuses(maps, scratch);
        if scratch.search.flag.hide(refused) {
            let outcome = refuse_arriving(maps, scratch) as u32;
            scratch.search.flag.set(outcome);
            return match scratch.search.flag.get() {
                1 => Step::Translate,
                3 => Step::Drop,
                _ => Step::Pass,
            };
        }
    }
    scratch.retry.begin();
    let held = held(maps, scratch) as u32;
    scratch.held.set(held);
    if scratch.held.get() == Held::Perhaps as u32 {
        let again = retry::again(maps, scratch) as u32;
        scratch.search.flag.set(again);
        match scratch.search.flag.get() {
            0 => {
                scratch.flow.tried = 0;
                let recalled = recall(maps, scratch);
                if scratch.search.flag.hide(recalled) {
                    if scratch.flow.tried & TRIED_KEEP != 0 && scratch.flow.state & FLOW_CONFIRMED != 0 {
                        keep(maps, scratch);
                    }
                    return Step::Translate;
                }
            }
            1 => return Step::Translate,
            _ => {}
        }
    }
    match look_up(maps, scratch) {
        Outcome::Pass => return Step::Pass,
        Outcome::Translate => {}
        Outcome::Refuse => return Step::Refuse,
        Outcome::Drop | Outcome::Reset => return Step::Drop,
    }
    if scratch.retry.tried() != 0 {
        let moved = retry::move_on(maps, scratch) as u32;
        scratch.search.flag.set(moved);
        match scratch.search.flag.get() {
            0 => return Step::Open,
            1 => return Step::Translate,
            _ => scratch.retry.begin(),
        }
    }
    let outcome = choose(maps, scratch) as u32;
    scratch.search.flag.set(outcome);
    match scratch.search.flag.get() {
        1 => {}
        2 => return Step::Refuse,
        _ => return Step::Drop,
    }
    retry::avoid_silent(maps, scratch);
    Step::Open
}

/// What two look-ups say of a client's port. Almost all connections need no more of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Held {
    /// No flow has it.
    No,
    /// A connection to the same frontend has it that is over, and is opened anew.
    Over,
    /// A closer look is due.
    Perhaps,
}

/// Whether a flow has the port that the packet in `scratch.arrival` comes from.
#[inline(never)]
fn held<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Held {
    let tuple = &scratch.arrival.tuple;
    if maps.client(filter::unconfirmed::<F>(tuple.src)) || maps.collided(collided_bit::<F>(tuple)) {
        return Held::Perhaps;
    }
    let Some(entry) = maps.flow(&client_key::<F>(tuple)) else {
        return Held::No;
    };
    let flow = entry.read();
    let same = (flow.frontend == tuple.dst) & (flow.frontend_port == tuple.dst_port);
    let anew = scratch.arrival.tcp_flags & (SYN | ACK | RST) == SYN;
    if same & anew & (flow.state & FLOW_SNAT == 0) & is_closed(flow.state) {
        Held::Over
    } else {
        Held::Perhaps
    }
}

/// Whether the packet is of an open connection to a backend that is no more. The connection is closed then.
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
    if maps.collided(collided_bit::<F>(tuple)) {
        scratch.key = shared_key::<F>(tuple);
        if let Some(entry) = maps.flow(&scratch.key) {
            orphaned |= orphan(maps, entry, tuple);
        }
    }
    orphaned
}

#[inline(always)]
fn orphan<F: Family, M: Maps<F>>(maps: &M, entry: Entry<'_, Flow<F::Words>>, tuple: &Tuple<F::Words>) -> bool {
    let flow = entry.read();
    let is = flow.frontend == tuple.dst
        && flow.frontend_port == tuple.dst_port
        && maps.backend_flags(flow.backend_id) & BACKEND_GONE != 0
        && is_silent(maps, entry, TCP);
    if is {
        // In its name: that is how the client will see it.
        entry.note(maps, FLOW_BACKEND_RESET);
    }
    is
}

/// Looks for the flow among those not yet confirmed, and those whose client's port is shared.
#[inline(never)]
fn recall<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    scratch.key = client_key::<F>(&scratch.arrival.tuple);
    if unconfirmed(maps, scratch) {
        return true;
    }
    // Another CPU may have moved the flow to `flows` since that was looked at. Chosen anew, a connection would be cut in two.
    if scratch.arrival.tuple.proto != UDP && scratch.arrival.tcp_flags & SYN == 0 && explains(maps, scratch) {
        return true;
    }
    if maps.collided(collided_bit::<F>(&scratch.arrival.tuple)) {
        scratch.key = shared_key::<F>(&scratch.arrival.tuple);
        return explains(maps, scratch) || unconfirmed(maps, scratch);
    }
    false
}
