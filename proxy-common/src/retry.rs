//! A connection whose backend does not answer, or refuses, finds another one while the client still sends its SYN.
//!
//! The client's own retransmissions are the clock. When a backend has answered neither a SYN nor its first retransmission,
//! the next SYN goes to another backend, and the silent one gets no first SYNs for a while ([`Config::silence`]), which
//! doubles each time that it fails again. When the while is over one SYN tries it; its first answer ends the matter. When all
//! backends are silent, the choice is as ever.
//!
//! A refusal (RST, ICMP unreachable) is held back while another backend is left that has not refused or fallen silent of
//! late: the client sends its SYN again, as if the first had been lost, and that goes to the other one. When none is left the
//! client hears it at once. A backend that refuses is passed over for one plain [`Config::silence`]: refusing costs the client one
//! retransmission at most, and whoever refuses may listen again at any moment.
//!
//! A flow that was answered never moves, and with no silent backend the choice is what it is without this module.

use crate::{
    affinity,
    balance::{
        Arrival, Entry, From, Maps, Opaque, Outcome, Scratch, Subprogram, Subprograms, affinity_key, client_key,
        collided_bit, explains, look_up, shared_key, snat_slot, unconfirmed,
    },
    event::Event,
    family::Family,
    filter, hash,
    layout::*,
    packet::{ACK, RST, SYN, Tuple},
    snat,
    timeouts::is_closed,
};

/// Most backends that one connection tries: clients give up after seven SYNs or so.
const MAX_BACKENDS: u32 = 8;
/// Slots that are looked at for another backend: the first anywhere among the frontend's, so that a silent backend's share falls
/// to all others; then side by side, so that few backends are all looked at.
const PROBES: u32 = 8;
/// How many of them are anywhere.
const ANYWHERE: u32 = 3;
/// Two SYNs within this time ([`AFFINITY_TICK_NS`]; 200 ms) are one: XDP has left it to tc, or the network has doubled it. Clients
/// send again after a second.
const SAME_SYN: u16 = 12;
/// Ticks ([`TICK_NS`]) without a SYN after which the next is a connection of its own.
const ABANDONED_TICKS: u32 = 20;
/// Most doublings of a silence.
const MAX_FAILURES: u16 = 16;

/// What is known of a SYN that was sent before; part of [`Scratch`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// [`Flow::tried`].
    tried: Opaque,
    /// Offset among the frontend's slots that is looked at.
    offset: Opaque,
    /// Offset of a backend that may answer.
    found: Opaque,
    /// Offset of one that was not tried.
    second: Opaque,
    /// Where the search begins, and how many slots were looked at.
    seed: Opaque,
    probes: Opaque,
    /// `FLOW_*` bits of a flow to a backend that was silent.
    trial: Opaque,
    flag: Opaque,
    /// Whether a backend that is silent will do.
    any: Opaque,
    /// Whether the refusal at hand is on its way out.
    leaving: Opaque,
}

impl Progress {
    /// Nothing was tried yet.
    #[inline(always)]
    pub(crate) fn begin(&mut self) {
        self.tried.set(0);
        self.trial.set(0);
    }

    /// [`Flow::tried`].
    #[inline(always)]
    pub(crate) fn tried(&self) -> u32 {
        self.tried.get()
    }

    /// `FLOW_*` bits of the flow that is opened, beside [`FLOW_RETRY`].
    #[inline(always)]
    pub(crate) fn trial_bits(&self) -> u16 {
        self.trial.get() as u16
    }
}

impl Entry<'_, BackendState> {
    #[inline(always)]
    fn set_silence(self, failures: u16, until: u32) {
        // SAFETY: aligned fields of an entry that is valid by `new`'s contract.
        unsafe {
            (&raw mut (*self.as_ptr()).failures).write(failures);
            (&raw mut (*self.as_ptr()).silent_until).write(until);
        }
    }
}

/// Whether a flow's first answer is still due, and its SYN may go elsewhere.
#[inline(always)]
pub(crate) fn is_open(state: u16) -> bool {
    state & (FLOW_RETRY | FLOW_ANSWERED) == FLOW_RETRY
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
        entry.set_silence(0, 0);
    }
}

#[inline(always)]
fn is_silent(state: &BackendState, now: u32) -> bool {
    (state.failures != 0) & ((state.silent_until.wrapping_sub(now) as i32) > 0)
}

/// How long a backend is silent after so many failures.
#[inline(always)]
fn silence(config: &Config, failures: u16) -> u32 {
    let doubled = u64::from(config.silence) << (u32::from(failures).wrapping_sub(1) & 15);
    doubled.min(config.silence_most.into()) as u32
}

#[inline(always)]
fn bit(backend: u32) -> u32 {
    1 << (backend % 31)
}

/// What a SYN gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Again {
    /// It is the first, or not a SYN at all.
    No,
    /// It goes where it went: [`Scratch::translation`].
    Same,
    /// It shall go to another backend: [`move_on`].
    Move,
}

/// Whether the packet is a SYN that was sent before and not answered.
#[inline(always)]
pub(crate) fn again<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Again {
    let Arrival { tuple, tcp_flags, .. } = &scratch.arrival;
    if !is_for(tuple.proto, *tcp_flags, 0) || !pending(maps, scratch) {
        return Again::No;
    }
    let judged = judge(maps, scratch) as u32;
    scratch.retry.flag.set(judged);
    match scratch.retry.flag.get() {
        0 => Again::No,
        1 => {
            if stay(maps, scratch) {
                Again::Same
            } else {
                Again::No
            }
        }
        _ => {
            give_up(maps, scratch);
            Again::Move
        }
    }
}

/// The entry of the flow that `scratch.key` and the SYN in `scratch.arrival` name.
#[inline(always)]
fn entry_of<'m, F: Family, M: Maps<F>>(maps: &'m M, scratch: &Scratch<F::Words>) -> Option<Entry<'m, Flow<F::Words>>> {
    let tuple = &scratch.arrival.tuple;
    if let Some(entry) = maps.new_flow(&scratch.key)
        && is_pending(&entry.read(), tuple)
    {
        return Some(entry);
    }
    maps.flow(&scratch.key).filter(|entry| is_pending(&entry.read(), tuple))
}

#[inline(always)]
fn is_pending<A: Copy + Eq>(flow: &Flow<A>, tuple: &Tuple<A>) -> bool {
    (flow.frontend == tuple.dst) & (flow.frontend_port == tuple.dst_port) & is_open(flow.state) & !is_closed(flow.state)
}

/// Looks for the flow of the SYN in `scratch.arrival`: leaves its key and a copy in `scratch`.
#[inline(never)]
fn pending<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    scratch.key = client_key::<F>(&scratch.arrival.tuple);
    if let Some(entry) = entry_of(maps, scratch) {
        entry.copy_to(&mut scratch.flow);
        return true;
    }
    if maps.collided(collided_bit::<F>(&scratch.arrival.tuple)) {
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
fn judge<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Again {
    let Some(config) = maps.config() else { return Again::No };
    let flow = &scratch.flow;
    // The client has given up, and dials anew from that port.
    if maps.now().saturating_sub(flow.last_seen) > ABANDONED_TICKS {
        return Again::No;
    }
    if flow.state & FLOW_SNAT != 0 {
        match snat_slot(maps, config, flow.snat_port, flow.backend, flow.backend_port, TCP) {
            // Replies to a translated source are seen in its slot only.
            Some((_, slot)) if is_open(slot.state) => {}
            _ => return Again::No,
        }
    }
    if flow.state & FLOW_REFUSED != 0 {
        return Again::Move;
    }
    let now = maps.affinity_now() as u16;
    if now.wrapping_sub(flow.asked) < SAME_SYN {
        return Again::Same;
    }
    let twice = flow.state & FLOW_AGAIN != 0;
    if let Some(entry) = entry_of(maps, scratch) {
        entry.ask(now);
        entry.set(FLOW_AGAIN);
    }
    if twice { Again::Move } else { Again::Same }
}

/// Leaves the SYN with the backend it has.
#[inline(never)]
fn stay<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let tuple = &scratch.arrival.tuple;
    if let Some(entry) = maps.new_flow(&scratch.key)
        && is_pending(&entry.read(), tuple)
    {
        return unconfirmed(maps, scratch);
    }
    match maps.flow(&scratch.key) {
        Some(entry) if is_pending(&entry.read(), tuple) => explains(maps, scratch),
        _ => false,
    }
}

/// Notes that the flow's backend has failed it. A refusal was noted when it came.
#[inline(always)]
fn give_up<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    if scratch.flow.state & FLOW_REFUSED == 0 {
        fail(maps, scratch, true);
    }
    let tried = scratch.flow.tried & !TRIED_KEEP | bit(scratch.flow.backend_id);
    scratch.retry.tried.set(tried);
}

/// Notes that the backend of the flow in `scratch.flow` has failed. A flow that was on its way when it fell silent says nothing
/// new; a trial does.
#[inline(never)]
fn fail<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>, grows: bool) {
    let Some(config) = maps.config() else { return };
    let Some(entry) = maps.backend(scratch.flow.backend_id) else {
        return;
    };
    let (state, now) = (entry.read(), maps.affinity_now());
    if config.silence == 0 || (is_silent(&state, now) && scratch.flow.state & FLOW_TRIAL == 0) {
        return;
    }
    let failures = if grows || state.failures == 0 {
        state.failures.saturating_add(1).min(MAX_FAILURES)
    } else {
        state.failures
    };
    entry.set_silence(failures, now.wrapping_add(silence(config, failures)));
}

/// What became of a SYN that shall go to another backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Moved {
    /// The other one stands in [`Scratch::chosen`].
    Yes,
    /// There is no other: [`Scratch::translation`].
    Stays,
    /// There is none, and the first gets no connections any more: choose anew.
    No,
}

/// Finds another backend for a flow that was given up, and gives back what it held. The frontend was looked up.
#[inline(always)]
pub(crate) fn move_on<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Moved {
    let may = scratch.frontend.flags & FRONTEND_NO_RETRY == 0 && scratch.retry.tried().count_ones() < MAX_BACKENDS;
    if may && other(maps, scratch, true) {
        release(maps, scratch);
        take(maps, scratch);
        maps.count(Event::Retry);
        return Moved::Yes;
    }
    if stay(maps, scratch) { Moved::Stays } else { Moved::No }
}

/// For a first SYN: passes over a backend that is silent now, if there is another.
#[inline(always)]
pub(crate) fn avoid_silent<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Arrival { tuple, tcp_flags, .. } = &scratch.arrival;
    if !is_for(tuple.proto, *tcp_flags, scratch.frontend.flags) {
        return;
    }
    let Some(entry) = maps.backend(scratch.chosen.backend) else {
        return;
    };
    let state = entry.read();
    if state.failures == 0 {
        return;
    }
    let silent = is_silent(&state, maps.affinity_now());
    if scratch.retry.flag.hide(silent) {
        let first = bit(scratch.chosen.backend);
        scratch.retry.tried.set(first);
        let found = other(maps, scratch, false);
        scratch.retry.tried.set(0);
        if !found {
            return;
        }
    }
    take(maps, scratch);
}

/// Looks among the frontend's slots for a backend that the connection has not tried and that is not silent; `any`: if there is
/// none, for one that is.
#[inline(always)]
fn other<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>, any: bool) -> bool {
    scratch.retry.any.set(any.into());
    maps.call(Subprogram::PickOther, scratch) != 0
}

/// [`other`] itself.
#[inline(always)]
pub(crate) fn other_here<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let Scratch {
        arrival: Arrival { tuple, .. },
        retry,
        ..
    } = scratch;
    // What the first choice was made of, and the tries before, say nothing about this one.
    let first = hash::flow::<F>(tuple.src, tuple.src_port, tuple.dst, tuple.dst_port, tuple.proto);
    let seed = hash::mix(u64::from(first) << 32 | u64::from(retry.tried.get())) as u32;
    retry.seed.set(seed);
    retry.found.set(NONE);
    retry.second.set(NONE);
    retry.offset.set(0);
    retry.probes.set(0);
    for _ in 0..PROBES {
        if maps.call(Subprogram::Probe, scratch) == 0 {
            return false;
        }
    }
    let Scratch {
        frontend,
        chosen,
        retry,
        ..
    } = scratch;
    if retry.any.get() != 0 && retry.found.get() == NONE {
        retry.found.set(retry.second.get());
    }
    if retry.found.get() == NONE {
        return false;
    }
    let Some(slot) = maps.slot(frontend.slot_base.wrapping_add(retry.found.get())) else {
        return false;
    };
    *chosen = slot;
    true
}

/// No offset among a frontend's slots.
const NONE: u32 = u32::MAX;

/// Looks at one slot more; `false` if there is none.
#[inline(always)]
pub(crate) fn probe_here<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let Scratch { frontend, retry, .. } = scratch;
    let (tried, count, i) = (retry.tried.get(), frontend.slot_count, retry.probes.get());
    retry.probes.set(i + 1);
    let next = retry.offset.get().wrapping_add(1);
    let offset = if i < ANYWHERE {
        hash::pick(retry.seed.get().rotate_left(9 * i), count)
    } else if next >= count {
        0
    } else {
        next
    };
    retry.offset.set(offset);
    let Some(slot) = maps.slot(frontend.slot_base.wrapping_add(offset)) else {
        return false;
    };
    let Some(backend) = maps.backend(slot.backend) else {
        return false;
    };
    let untried = (tried & bit(slot.backend) == 0) & (count > 1);
    let answers = untried & !is_silent(&backend.read(), maps.affinity_now());
    if answers && retry.found.get() == NONE {
        retry.found.set(offset);
    }
    if untried && retry.second.get() == NONE {
        retry.second.set(offset);
    }
    true
}

/// For a connection of a socket, which nobody could move later: the slot at `index`, or another one while its backend is silent and
/// that one's is not. A silence ends without a trial here: no answer would be seen.
#[inline(never)]
pub fn socket_slot<F: Family, M: Maps<F>>(maps: &M, frontend: &Frontend, index: u32, choice: u32) -> u32 {
    let now = maps.affinity_now();
    if !is_silent_at(maps, index, now) {
        return index;
    }
    // What the first choice was made of says nothing about this one.
    let seed = hash::mix(u64::from(choice)) as u32;
    let mut offset = 0;
    for i in 0..PROBES {
        offset = if i < ANYWHERE {
            hash::pick(seed.rotate_left(9 * i), frontend.slot_count)
        } else if offset + 1 >= frontend.slot_count {
            0
        } else {
            offset + 1
        };
        let other = frontend.slot_base.wrapping_add(offset);
        if !is_silent_at(maps, other, now) {
            return other;
        }
    }
    index
}

#[inline(always)]
fn is_silent_at<F: Family, M: Maps<F>>(maps: &M, index: u32, now: u32) -> bool {
    match maps.slot(index).and_then(|slot| maps.backend(slot.backend)) {
        Some(backend) => is_silent(&backend.read(), now),
        None => false,
    }
}

/// Takes the chosen backend: for a trial if it was silent until now, and for the client's later flows too if it keeps its backend.
#[inline(never)]
fn take<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let (chosen, frontend) = (&scratch.chosen, &scratch.frontend);
    let Some(entry) = maps.backend(chosen.backend) else {
        return;
    };
    let (state, now) = (entry.read(), maps.affinity_now());
    if state.failures != 0 && !is_silent(&state, now) {
        // The others pass it over meanwhile.
        entry.set_silence(state.failures, now.wrapping_add(silence(config, state.failures)));
        // It gets no second SYN.
        scratch.retry.trial.set((FLOW_TRIAL | FLOW_AGAIN).into());
    }
    if frontend.flags & FRONTEND_AFFINITY != 0 {
        let key = affinity_key::<F>(&scratch.arrival.tuple, frontend);
        affinity::replace(maps, &key, chosen.backend);
    }
}

/// Gives a translated source port back. What the old backend still says to it is nobody's: the kernel resets it.
#[inline(never)]
fn release<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let (flow, tuple) = (&scratch.flow, &scratch.arrival.tuple);
    if flow.state & FLOW_SNAT != 0
        && let Some((entry, slot)) = snat_slot(maps, config, flow.snat_port, flow.backend, flow.backend_port, TCP)
        && slot.client == tuple.src
        && slot.client_port == tuple.src_port
        && slot.frontend == tuple.dst
        && slot.frontend_port == tuple.dst_port
    {
        // SAFETY: an aligned field of a live entry, which is this flow's own.
        unsafe { entry.last_seen().write_volatile(0) };
    }
}

/// Whether the packet in `scratch.arrival` refuses a SYN, and comes to an address that this node put in place of the client's.
#[inline(never)]
pub(crate) fn refuses<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) -> bool {
    let Some(config) = maps.config() else { return false };
    let tuple = &scratch.arrival.tuple;
    tuple.proto == TCP
        && snat::in_range(config, tuple.dst_port)
        && maps.filter(filter::backend::<F>(tuple.src, tuple.src_port, tuple.proto))
        && match snat_slot(maps, config, tuple.dst_port, tuple.src, tuple.src_port, tuple.proto) {
            Some((_, slot)) => slot.snat == tuple.dst && slot.snat != slot.client && is_open(slot.state),
            None => false,
        }
}

/// Whether the client shall not hear the refusal in `scratch.arrival`, because its next SYN finds another backend. `leaving`:
/// it is on its way out, to the client's address.
#[inline(always)]
pub(crate) fn is_held_back<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    leaving: bool,
) -> bool {
    scratch.retry.leaving.set(leaving.into());
    maps.call(Subprogram::HoldBack, scratch) != 0
}

/// [`is_held_back`] itself.
#[inline(always)]
pub(crate) fn hold_back_here<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let leaving = scratch.retry.leaving.get() != 0;
    scratch.reply = scratch.arrival.tuple;
    let held = hold_back(maps, scratch, leaving);
    scratch.arrival.tuple = scratch.reply;
    held
}

#[inline(always)]
fn hold_back<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>, leaving: bool) -> bool {
    let found = find_request(maps, scratch, leaving) && pending(maps, scratch);
    if !scratch.retry.flag.hide(found) {
        return false;
    }
    fail(maps, scratch, false);
    let tried = scratch.flow.tried & !TRIED_KEEP | bit(scratch.flow.backend_id);
    scratch.retry.tried.set(tried);
    let looked_up = look_up(maps, scratch) == Outcome::Translate;
    let may = looked_up & (scratch.frontend.flags & FRONTEND_NO_RETRY == 0) & (tried.count_ones() < MAX_BACKENDS);
    if !scratch.retry.flag.hide(may) {
        return false;
    }
    if !other(maps, scratch, false) {
        return false;
    }
    note_refusal(maps, scratch)
}

#[inline(never)]
fn note_refusal<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) -> bool {
    let Some(entry) = entry_of(maps, scratch) else {
        return false;
    };
    entry.set(FLOW_REFUSED);
    maps.count(Event::RefusalHeld);
    true
}

/// Turns the answer in `scratch.reply` into the SYN that it answers, in `scratch.arrival`; `false` if it answers none.
#[inline(never)]
fn find_request<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>, leaving: bool) -> bool {
    let Some(config) = maps.config() else { return false };
    let Scratch {
        arrival, key, reply, ..
    } = scratch;
    if reply.proto != TCP || !maps.filter(filter::backend::<F>(reply.src, reply.src_port, TCP)) {
        return false;
    }
    let mut state = None;
    if snat::in_range(config, reply.dst_port)
        && let Some((_, slot)) = snat_slot(maps, config, reply.dst_port, reply.src, reply.src_port, TCP)
        && (if leaving {
            slot.client == reply.dst
        } else {
            slot.snat == reply.dst && slot.snat != slot.client
        })
    {
        arrival.tuple = Tuple {
            src: slot.client,
            dst: slot.frontend,
            src_port: slot.client_port,
            dst_port: slot.frontend_port,
            proto: TCP,
        };
        state = Some(slot.state);
    } else if leaving {
        *key = FlowKey {
            client: reply.dst,
            client_port: reply.dst_port,
            ..client_key::<F>(reply)
        };
        if let Some(entry) = maps.new_flow(key).or_else(|| maps.flow(key)) {
            let flow = entry.read();
            if flow.backend == reply.src && flow.backend_port == reply.src_port && flow.state & FLOW_SNAT == 0 {
                arrival.tuple = Tuple {
                    src: reply.dst,
                    dst: flow.frontend,
                    src_port: reply.dst_port,
                    dst_port: flow.frontend_port,
                    proto: TCP,
                };
                state = Some(flow.state);
            }
        }
    }
    let Some(state) = state else { return false };
    arrival.from = if state & FLOW_LOCAL_CLIENT != 0 {
        From::Pod
    } else {
        From::Network
    };
    is_open(state)
}

/// The refusal in `scratch.arrival` is the client's to hear: its SYN goes nowhere else from here on.
#[inline(never)]
pub(crate) fn end<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let Scratch { arrival, key, .. } = scratch;
    let tuple = &arrival.tuple;
    if let Some((entry, _)) = snat_slot(maps, config, tuple.dst_port, tuple.src, tuple.src_port, TCP) {
        entry.clear(FLOW_RETRY);
    }
    *key = FlowKey {
        client: tuple.dst,
        client_port: tuple.dst_port,
        ..client_key::<F>(tuple)
    };
    if let Some(entry) = maps.new_flow(key) {
        entry.clear(FLOW_RETRY);
    }
    if let Some(entry) = maps.flow(key) {
        entry.clear(FLOW_RETRY);
    }
}
