//! What a pod asks a backend itself, past any Service: its answers must be told from a Service's.
//!
//! A backend's answers are known by their tuple alone. So a client's port must not lead to one
//! backend by two ways at once, and the later one gets a source port of its own. A flow to a Service
//! finds a note of what went to the backend itself ([`is_in_use`]); what goes to the backend itself
//! finds the flow, and becomes a flow from the backend's address to the same address
//! ([`find_bypass`]).
//!
//! A process of the node is asked for its socket instead of a note: a source port that one has is given
//! to no flow, and one that a flow has may be bound, or given to a socket, later ([`port_collides`]).

use super::{
    Entry, Maps, Scratch,
    flow::{client_key, remove_over, shared_key, shared_port_bit, slot_of},
    owner::direct_key,
};
use crate::{
    family::Family,
    filter,
    layout::*,
    packet::{ACK, RST, SYN, Tuple},
    snat,
    timeouts::is_closed,
    verdict::{Arrival, Lookup, Origin, Step, Verdict},
};

/// No backend.
const NONE: u64 = u64::MAX;
/// Of [`port_leads`]: the backend is on this node. Below are the bits of its id.
const LOCAL: u64 = 1 << 32;

/// A pod's packet that no frontend has. Almost none goes on from here.
#[inline(always)]
pub(super) fn bypassing<F: Family, M: Maps<F>>(
    maps: &M,
    arrival: &Arrival<F::Words>,
) -> Lookup<F::Words> {
    let tuple = &arrival.tuple;
    if !maps.filter(filter::backend_port(tuple.dst_port)) {
        return Lookup::Unmatched;
    }
    // One that has got another source port, perhaps.
    let translated = snat::may_be(maps, tuple.src);
    if translated && maps.port_is_shared(shared_port_bit::<F>(tuple)) {
        return Lookup::Undecided;
    }
    if !may_begin(tuple.proto, arrival.tcp_flags)
        || !maps.filter(filter::backend::<F>(tuple.dst, tuple.dst_port, tuple.proto))
        || tuple.proto == UDP && is_just_noted(maps, tuple)
    {
        return Lookup::Unmatched;
    }
    // Whoever has no flow of Services, as a pod that the socket hook serves, has none that leads
    // there.
    if !translated && !maps.client(filter::client::<F>(tuple.src)) {
        note_bypass(maps, tuple);
        return Lookup::Unmatched;
    }
    Lookup::Undecided
}

/// The key of what a packet to a backend itself begins.
#[inline(always)]
fn bypass_key<A: Copy>(tuple: &Tuple<A>) -> DirectKey<A> {
    direct_key(
        tuple.dst,
        tuple.src,
        tuple.dst_port,
        tuple.src_port,
        tuple.proto,
    )
}

/// Whether a packet that a process of this node sends past any Service has the source port of a flow
/// of ours to the same backend, or may have got another for that. Asked after `answering`: a backend
/// may be a process of this node.
#[inline(always)]
pub fn port_collides<F: Family, M: Maps<F>>(
    maps: &M,
    tuple: &Tuple<F::Words>,
    tcp_flags: u8,
) -> bool {
    maps.filter(filter::backend_port(tuple.dst_port))
        && snat::may_be(maps, tuple.src)
        && (maps.port_is_shared(shared_port_bit::<F>(tuple))
            || may_begin(tuple.proto, tcp_flags)
                && maps.filter(filter::backend::<F>(tuple.dst, tuple.dst_port, tuple.proto))
                && maps.is_senders_own(tuple)
                && colliding(maps, tuple) != NONE)
}

/// The packet in `scratch.arrival`, which no frontend has: it goes on if it is to be translated, to
/// the backend that is left in `scratch`; else it is noted if a pod asks a backend itself.
#[inline(never)]
pub(super) fn find_bypass<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Step {
    let Scratch {
        arrival,
        key,
        chosen,
        frontend,
        ..
    } = scratch;
    let (tuple, flags) = (&arrival.tuple, arrival.tcp_flags);
    if arrival.origin == Origin::Network
        || !may_begin(tuple.proto, flags)
        || !maps.filter(filter::backend::<F>(tuple.dst, tuple.dst_port, tuple.proto))
    {
        return Step::Break(Verdict::Pass);
    }
    let led = port_leads(maps, tuple);
    if led == NONE {
        if arrival.origin == Origin::Pod {
            note_bypass(maps, tuple);
        }
        if maps.port_is_shared(shared_port_bit::<F>(tuple)) {
            *key = shared_key::<F>(tuple);
            remove_over(maps, key);
        }
        return Step::Break(Verdict::Pass);
    }
    *chosen = Slot {
        addr: tuple.dst,
        port: tuple.dst_port,
        flags: if led & LOCAL != 0 { BACKEND_LOCAL } else { 0 },
        backend: led as u32,
    };
    *frontend = Frontend {
        flags: FRONTEND_NO_RETRY,
        ..Frontend::default()
    };
    Step::Continue(())
}

/// Whether a packet may be the first of something.
#[inline(always)]
fn may_begin(proto: u8, flags: u8) -> bool {
    proto == UDP || flags & (SYN | ACK | RST) == SYN
}

/// Whether a note is of this very tick: what it is of needs no other source port.
#[inline(never)]
fn is_just_noted<F: Family, M: Maps<F>>(maps: &M, tuple: &Tuple<F::Words>) -> bool {
    let noted = maps.bypass(&bypass_key(tuple));
    noted.is_some_and(|entry| entry.read() == maps.now())
}

/// Notes what the packet begins.
// Functions of their own for their keys, which have the stack one after the other.
#[inline(never)]
fn note_bypass<F: Family, M: Maps<F>>(maps: &M, tuple: &Tuple<F::Words>) {
    maps.add_bypass(&bypass_key(tuple), maps.now());
}

/// The backend of the flow by which answers from the packet's destination to its source would be
/// taken for a Service's, with [`LOCAL`], or [`NONE`].
#[inline(never)]
fn port_leads<F: Family, M: Maps<F>>(maps: &M, tuple: &Tuple<F::Words>) -> u64 {
    if maps.client(filter::client::<F>(tuple.src)) {
        let key = client_key::<F>(tuple);
        let entry = match maps.flow(&key) {
            Some(entry) => Some(entry),
            None => maps.unconfirmed_flow(&key),
        };
        if let Some(entry) = entry
            && leads(entry, tuple)
        {
            return named(entry.read().backend_id, entry.read().state);
        }
    }
    if snat::may_be(maps, tuple.src) {
        colliding(maps, tuple)
    } else {
        NONE
    }
}

/// The backend, as in [`port_leads`], of the flow whose translated source the packet bears.
#[inline(always)]
fn colliding<F: Family, M: Maps<F>>(maps: &M, tuple: &Tuple<F::Words>) -> u64 {
    let Some(config) = maps.config() else {
        return NONE;
    };
    match slot_of(maps, config, tuple) {
        Some((_, slot)) if slot.snat == tuple.src => named(slot.backend_id, slot.state),
        _ => NONE,
    }
}

#[inline(always)]
fn named(backend: u32, state: u32) -> u64 {
    let local = if state & FLOW_LOCAL_BACKEND != 0 {
        LOCAL
    } else {
        0
    };
    u64::from(backend) | local
}

/// Whether a flow of the packet's source leads to its destination by the source port that it has.
#[inline(always)]
fn leads<A: Copy + Eq>(entry: Entry<'_, Flow<A>>, tuple: &Tuple<A>) -> bool {
    let flow = entry.read();
    flow.backend == tuple.dst
        && flow.backend_port == tuple.dst_port
        && flow.state & (FLOW_SNAT | FLOW_SUPERSEDED) == 0
        && !(flow.frontend == tuple.dst && flow.frontend_port == tuple.dst_port)
        && (tuple.proto == UDP || !is_closed(flow.state))
}

/// Whether answers to the flow in `scratch`, from the chosen backend to the client's own port, could
/// be taken for something else: what the client has sent to the backend itself, or what the backend
/// sends as a client of its own.
#[inline(never)]
pub(super) fn is_in_use<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let Scratch {
        arrival,
        own_port: key,
        direct,
        chosen: slot,
        reply: back,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    if slot.addr == tuple.dst && slot.port == tuple.dst_port {
        return false;
    }
    *direct = direct_key(slot.addr, tuple.src, slot.port, tuple.src_port, tuple.proto);
    if is_noted(maps, direct) {
        return true;
    }
    // Two backends that dial each other by Services, each from the port that it listens on.
    if !maps.filter(filter::backend::<F>(tuple.src, tuple.src_port, tuple.proto))
        || !maps.client(filter::client::<F>(slot.addr))
    {
        return false;
    }
    *back = Tuple {
        src: slot.addr,
        dst: tuple.src,
        src_port: slot.port,
        dst_port: tuple.src_port,
        proto: tuple.proto,
    };
    *key = client_key::<F>(back);
    match maps.flow(key).or_else(|| maps.unconfirmed_flow(key)) {
        Some(entry) => leads(entry, back),
        None => false,
    }
}

/// Whether something was sent to the backend itself, and may still be answered.
#[inline(always)]
pub(super) fn is_noted<F: Family, M: Maps<F>>(maps: &M, key: &DirectKey<F::Words>) -> bool {
    let (Some(entry), Some(config)) = (maps.bypass(key), maps.config()) else {
        return false;
    };
    let timeouts = &config.timeouts;
    let limit = if key.proto == u32::from(UDP) {
        timeouts.udp_stream
    } else {
        timeouts.tcp_established
    };
    maps.now().saturating_sub(entry.read()) <= limit
}
