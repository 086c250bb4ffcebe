//! Packets of flows that exist, on their way to the backend.

use super::{
    Entry, Maps, Scratch, Subprogram, Subprograms,
    bypass::bypassing,
    choose::{may_be_frontend, may_be_stale},
    flow::{client_key, shared_key, shared_port_bit, snat_slot},
    reply::snat_reply_arriving,
};
use crate::{
    address, failover,
    family::Family,
    filter,
    layout::*,
    packet::{ACK, FIN, RST, SYN, Tuple},
    snat,
    timeouts::{FINISHED, is_closed},
    verdict::{Arrival, Counted, Lookup, Origin, Translation},
};

/// Epochs ([`Flow::epoch`]) without an answer after which a backend that is no endpoint any more
/// counts as gone for good.
const UNANSWERED_EPOCHS: u16 = 2;

/// The first half of [`arriving`](super::arriving): all there is to do for packets of open flows,
/// and those of no Service.
#[inline(always)]
pub fn established<F: Family, M: Maps<F>>(
    maps: &M,
    arrival: &Arrival<F::Words>,
) -> Lookup<F::Words> {
    // A reply to a translated source comes before any frontend: a SNAT port could be a frontend's
    // too.
    let Some(config) = maps.config() else {
        return Lookup::Unmatched;
    };
    match answered(maps, config, arrival) {
        Lookup::Unmatched => {}
        lookup => return lookup,
    }
    let tuple = &arrival.tuple;
    let lookup = if maps.filter(filter::service::<F>(tuple.dst))
        || maps.filter(filter::node_port(tuple.dst_port))
    {
        dialled(maps, config, arrival)
    } else if address::may_be_service::<F>(config, tuple.dst) {
        // The next step judges unknown ports and addresses.
        Lookup::Undecided
    } else {
        Lookup::Unmatched
    };
    match lookup {
        Lookup::Unmatched if arrival.origin == Origin::Pod => bypassing(maps, arrival),
        lookup => lookup,
    }
}

/// [`established`] of a packet that a process of this node sends by a device that leads out. Node
/// ports of its own are not reached that way.
#[inline(always)]
pub fn sent<F: Family, M: Maps<F>>(maps: &M, arrival: &Arrival<F::Words>) -> Lookup<F::Words> {
    let Some(config) = maps.config() else {
        return Lookup::Unmatched;
    };
    if maps.filter(filter::service::<F>(arrival.tuple.dst)) {
        return dialled(maps, config, arrival);
    }
    if address::may_be_service::<F>(config, arrival.tuple.dst) {
        Lookup::Undecided
    } else {
        Lookup::Unmatched
    }
}

/// [`established`] of a packet that a process of this node sends to another, or to a node port, by
/// the loopback device.
#[inline(always)]
pub fn looped<F: Family, M: Maps<F>>(maps: &M, arrival: &Arrival<F::Words>) -> Lookup<F::Words> {
    let Some(config) = maps.config() else {
        return Lookup::Unmatched;
    };
    match answered(maps, config, arrival) {
        Lookup::Unmatched => {}
        lookup => return lookup,
    }
    if maps.filter(filter::node_port(arrival.tuple.dst_port))
        || maps.filter(filter::service::<F>(arrival.tuple.dst))
    {
        return dialled(maps, config, arrival);
    }
    Lookup::Unmatched
}

/// A reply to a translated source.
#[inline(always)]
fn answered<F: Family, M: Maps<F>>(
    maps: &M,
    config: &Config,
    arrival: &Arrival<F::Words>,
) -> Lookup<F::Words> {
    let tuple = &arrival.tuple;
    if maps.filter(filter::backend_port(tuple.src_port)) && snat::may_be(maps, tuple.dst) {
        snat_reply_arriving(maps, config, arrival)
    } else {
        Lookup::Unmatched
    }
}

/// A packet to an address or a port that Services have.
#[inline(always)]
fn dialled<F: Family, M: Maps<F>>(
    maps: &M,
    config: &Config,
    arrival: &Arrival<F::Words>,
) -> Lookup<F::Words> {
    let tuple = &arrival.tuple;
    let key = client_key::<F>(tuple);
    // A port whose connection is over is reused in place: such a flow may wait for its first
    // answer here as well.
    if let Some(flow) = maps.flow(&key)
        && !(arrival.tcp_flags & SYN != 0 && failover::is_open(flow.read().state))
        && let Some(translation) = forward(maps, &key, flow, arrival)
    {
        return Lookup::Translate(translation);
    }
    if may_be_frontend::<F>(maps, tuple)
        || address::may_be_service::<F>(config, tuple.dst)
        || may_be_stale(maps, arrival)
    {
        Lookup::Undecided
    } else {
        Lookup::Unmatched
    }
}

/// [`forward`] of the flow in `flows` under the key in `scratch`, with the translation left there.
#[inline(always)]
pub(crate) fn explains<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    maps.call(Subprogram::Explains, scratch) != 0
}

/// [`explains`] itself.
#[inline(always)]
pub(super) fn explains_here<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    match maps.flow(&scratch.key) {
        Some(entry) => is_of(maps, entry, scratch),
        None => false,
    }
}

/// [`forward`] of a flow, with the translation left in `scratch`.
#[inline(always)]
fn is_of<F: Family, M: Maps<F>>(
    maps: &M,
    entry: Entry<'_, Flow<F::Words>>,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    match forward(maps, &scratch.key, entry, &scratch.arrival) {
        Some(translation) => {
            scratch.translation = translation;
            true
        }
        None => false,
    }
}

/// A packet of an established flow on its way to the backend. `None`: the entry belongs to another
/// flow, or to a connection that is over and is being opened anew.
#[inline(always)]
fn forward<F: Family, M: Maps<F>>(
    maps: &M,
    key: &FlowKey<F::Words>,
    entry: Entry<'_, Flow<F::Words>>,
    arrival: &Arrival<F::Words>,
) -> Option<Translation<F::Words>> {
    let (tuple, tcp_flags) = (&arrival.tuple, arrival.tcp_flags);
    let flow = entry.read();
    if flow.frontend != tuple.dst || flow.frontend_port != tuple.dst_port {
        return None;
    }
    // Opened anew on a port whose connection is over, or whose backend gets no new ones.
    if tcp_flags & SYN != 0
        && (maps.backend_flags(flow.backend_id) & BACKEND_SERVING == 0
            || is_closed(flow.state | snat_state(maps, entry, tuple.proto)))
    {
        return None;
    }
    let state = client_state(tcp_flags);
    let passed = entry.record(maps, state);
    if flow.state & (FLOW_HALF_OPEN | FLOW_CLIENT_RESET | FLOW_SUPERSEDED) != 0 {
        goes_on(maps, entry, tuple.proto, tcp_flags);
    }
    if tuple.proto != UDP {
        // Connections stay until their backend is gone for good; it is enough to ask for that once
        // in a while.
        if passed
            && maps.backend_flags(flow.backend_id) & BACKEND_GONE != 0
            && is_unanswered(maps, entry, tuple.proto)
        {
            return None;
        }
    } else {
        if maps.backend_flags(flow.backend_id) & BACKEND_SERVING == 0 {
            // Datagrams leave a backend that does not serve with the next one.
            return None;
        }
        if passed && !resumes(maps, key, entry) {
            return None;
        }
    }
    if (passed || state != 0) && flow.state & FLOW_SNAT != 0 {
        note_in_slot(maps, entry, tuple, state);
    }
    Some(towards_backend(&flow, arrival))
}

/// Notes a client's packet in the slot of its translated source port, if that is still its own.
// A step of its own, for its locals: see `resumes`.
#[inline(never)]
fn note_in_slot<F: Family, M: Maps<F>>(
    maps: &M,
    entry: Entry<'_, Flow<F::Words>>,
    tuple: &Tuple<F::Words>,
    state: u32,
) {
    let Some(config) = maps.config() else { return };
    let flow = entry.read();
    if let Some((entry, slot)) = snat_slot(
        maps,
        config,
        flow.snat_port,
        flow.backend,
        flow.backend_port,
        tuple.proto,
    ) && slot.client == tuple.src
        && slot.client_port == tuple.src_port
    {
        entry.record(maps, state);
    }
}

/// A packet of a flow that may have been silent: of datagrams, if the last was answered, they are a
/// stream. `false`: the flow's translated source port is not its own any more; after a silence
/// another flow may have it, or the agent may have given it up.
#[inline(never)]
fn resumes<F: Family, M: Maps<F>>(
    maps: &M,
    key: &FlowKey<F::Words>,
    entry: Entry<'_, Flow<F::Words>>,
) -> bool {
    let Some(config) = maps.config() else {
        return false;
    };
    let flow = entry.read();
    if key.proto == UDP && flow.state & (FLOW_SEEN_REPLY | FLOW_CONFIRMED) == FLOW_SEEN_REPLY {
        entry.set(FLOW_CONFIRMED);
    }
    if flow.state & FLOW_SNAT == 0 {
        return true;
    }
    match snat_slot(
        maps,
        config,
        flow.snat_port,
        flow.backend,
        flow.backend_port,
        key.proto,
    ) {
        Some((_, slot)) => {
            slot.client == key.client
                && slot.client_port == key.client_port
                && slot.frontend == flow.frontend
                && slot.frontend_port == flow.frontend_port
        }
        None => false,
    }
}

#[inline(always)]
fn client_state(tcp_flags: u8) -> u32 {
    let mut state = 0;
    if tcp_flags & FIN != 0 {
        state |= FLOW_CLIENT_FIN;
    }
    if tcp_flags & RST != 0 {
        state |= FLOW_CLIENT_RESET;
    }
    state
}

/// Whether a client's packet after an answer says that it is there: a SYN may come from a forged
/// address, whose owner resets what it gets.
#[inline(always)]
fn confirms(proto: u8, tcp_flags: u8) -> bool {
    proto == UDP || tcp_flags & (SYN | ACK | RST) == ACK
}

/// A client has sent something on a flow that waits for it in `flows`, or that it has reset.
#[inline(never)]
fn goes_on<F: Family, M: Maps<F>>(
    maps: &M,
    entry: Entry<'_, Flow<F::Words>>,
    proto: u8,
    tcp_flags: u8,
) {
    let flow = entry.read();
    if flow.state & (FLOW_HALF_OPEN | FLOW_SEEN_REPLY) == FLOW_HALF_OPEN | FLOW_SEEN_REPLY
        && confirms(proto, tcp_flags)
    {
        // Both sides have spoken.
        entry.clear(FLOW_HALF_OPEN);
        maps.add_half_open(-1);
    }
    // A client that dials the backend itself sends nothing to the frontend from that port: somebody
    // else has reset this connection, and sent a SYN in the backend's name.
    if flow.state & FLOW_SUPERSEDED != 0
        && flow.state & FINISHED != FINISHED
        && confirms(proto, tcp_flags)
    {
        entry.clear(FLOW_SUPERSEDED);
    }
    // Who resets a connection sends nothing more on it: somebody else did, or the backend did not
    // believe it.
    if flow.state & FLOW_CLIENT_RESET != 0 && tcp_flags & RST == 0 {
        entry.clear(FLOW_CLIENT_RESET);
        if flow.state & FLOW_SNAT != 0
            && let Some(config) = maps.config()
            && let Some((slot, _)) = snat_slot(
                maps,
                config,
                flow.snat_port,
                flow.backend,
                flow.backend_port,
                proto,
            )
        {
            slot.clear(FLOW_CLIENT_RESET);
        }
    }
}

/// What the slot of a translated source has seen of the backend's side: replies to it do not pass
/// by the flow.
#[inline(never)]
fn snat_state<F: Family, M: Maps<F>>(maps: &M, entry: Entry<'_, Flow<F::Words>>, proto: u8) -> u32 {
    let Some(config) = maps.config() else {
        return 0;
    };
    let flow = entry.read();
    if flow.state & FLOW_SNAT == 0 {
        return 0;
    }
    match snat_slot(
        maps,
        config,
        flow.snat_port,
        flow.backend,
        flow.backend_port,
        proto,
    ) {
        Some((_, slot)) => slot.state & (FLOW_BACKEND_FIN | FLOW_RESET),
        // Another flow has the port by now.
        None => FLOW_RESET,
    }
}

/// Whether a backend that is no endpoint any more leaves the client without an answer. One that was
/// only taken from behind its Service still answers, and its connections go on.
#[inline(never)]
pub(super) fn is_unanswered<F: Family, M: Maps<F>>(
    maps: &M,
    entry: Entry<'_, Flow<F::Words>>,
    proto: u8,
) -> bool {
    let flow = entry.read();
    // Replies to a translated source are seen in its slot only.
    let slot = match maps.config() {
        Some(config) if flow.state & FLOW_SNAT != 0 => snat_slot(
            maps,
            config,
            flow.snat_port,
            flow.backend,
            flow.backend_port,
            proto,
        ),
        _ => None,
    };
    let state = match &slot {
        Some((_, slot)) => slot.state,
        None => flow.state,
    };
    if state & FLOW_UNANSWERED != 0 {
        return maps.epoch().wrapping_sub(flow.unanswered_since) >= UNANSWERED_EPOCHS;
    }
    entry.ask(maps.epoch());
    entry.record(maps, FLOW_UNANSWERED);
    if let Some((slot, _)) = slot {
        slot.record(maps, FLOW_UNANSWERED);
    }
    false
}

/// A packet of the flow in `unconfirmed` under the key in `scratch`, on its way to the backend: the
/// flow is moved to `flows` once both sides have spoken.
#[inline(always)]
pub(crate) fn unconfirmed<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    maps.call(Subprogram::Unconfirmed, scratch) != 0
}

/// [`unconfirmed`] itself.
#[inline(always)]
pub(super) fn unconfirmed_here<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    let Some(entry) = maps.unconfirmed_flow(&scratch.key) else {
        return false;
    };
    // A port that is not confirmed is given to another flow when ports are short.
    if !resumes(maps, &scratch.key, entry) {
        return false;
    }
    if !is_of(maps, entry, scratch) {
        return false;
    }
    let Arrival {
        tuple: Tuple { proto, .. },
        tcp_flags,
        ..
    } = scratch.arrival;
    let confirms = confirms(proto, tcp_flags);
    let flow = &mut scratch.flow;
    entry.copy_to(flow);
    if flow.state & FLOW_SNAT != 0
        && let Some(config) = maps.config()
        && let Some((entry, slot)) = snat_slot(
            maps,
            config,
            flow.snat_port,
            flow.backend,
            flow.backend_port,
            proto,
        )
    {
        // Replies of a translated source are seen in its slot only.
        flow.state |= slot.state & FLOW_SEEN_REPLY;
        if flow.state & FLOW_SEEN_REPLY != 0 && confirms {
            entry.record(maps, FLOW_CONFIRMED);
        }
    }
    if flow.state & FLOW_SEEN_REPLY != 0 && confirms {
        flow.state |= FLOW_CONFIRMED;
        if maps.add_flow(&scratch.key, flow) {
            maps.remove_unconfirmed(&scratch.key);
        }
    }
    true
}

/// Looks for the flow among those not yet confirmed, and those whose client's port is shared.
#[inline(never)]
pub(super) fn find_unconfirmed<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    scratch.key = client_key::<F>(&scratch.arrival.tuple);
    if unconfirmed(maps, scratch) {
        return true;
    }
    // Another CPU may have moved the flow to `flows` since that was looked at. Chosen anew, a
    // connection would be cut in two.
    if scratch.arrival.tuple.proto != UDP
        && scratch.arrival.tcp_flags & SYN == 0
        && explains(maps, scratch)
    {
        return true;
    }
    if maps.port_is_shared(shared_port_bit::<F>(&scratch.arrival.tuple)) {
        scratch.key = shared_key::<F>(&scratch.arrival.tuple);
        return explains(maps, scratch) || unconfirmed(maps, scratch);
    }
    false
}

#[inline(always)]
pub(super) fn towards_backend<A: Copy>(flow: &Flow<A>, arrival: &Arrival<A>) -> Translation<A> {
    let mut tuple = Tuple {
        dst: flow.backend,
        dst_port: flow.backend_port,
        ..arrival.tuple
    };
    let local = flow.state & FLOW_LOCAL_BACKEND != 0;
    if flow.state & FLOW_SNAT != 0 {
        tuple.src_port = flow.snat_port;
        if flow.state & FLOW_PROCESS != 0 || arrival.sends_on && !local {
            tuple.src = flow.snat;
        }
    }
    let counted = Counted {
        backend: flow.backend_id,
        reply: false,
    };
    Translation {
        tuple,
        local,
        process: false,
        counted,
    }
}
