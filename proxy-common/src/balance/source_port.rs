//! The search for a source port under which the backend sees a translated flow.

use super::{Maps, Scratch, Search, Subprogram, Subprograms, client_key, opaque::Opaque};
use crate::{
    family::Family,
    hash,
    layout::*,
    packet::Tuple,
    snat,
    timeouts::{is_closed, is_unconfirmed},
};

/// Ticks ([`TICK_NS`]) after which a source port may serve another connection, when its own is
/// closed or was never confirmed and no other port is left; else the node's [`Timeouts`] say when.
const HURRY_TICKS: u32 = 2;

/// Longest step of the search for a source port.
const MAX_STEP: u32 = 1023;

/// Rounds of the search for a source port: a closer look at one, then a quick look at
/// [`snat::MAX_TRIES`] more.
const ROUNDS: u32 = 4;
/// Most ports of a range that is searched wholly, by all rounds but the last.
const MAX_WHOLE: u32 = (ROUNDS - 1) * snat::MAX_TRIES;
/// No offset into the SNAT range.
const NO_OFFSET: u32 = u32::MAX;

/// Finds a source port towards the flow's backend: the client's own if it is in the range and free,
/// else one from a place that depends on the flow alone, so that a flow whose entry was evicted
/// finds its port again.
///
/// Among the ports looked at (all of a range of up to [`MAX_WHOLE`], else as many, and some more
/// that depend on the time, so that a client's retransmission looks at others), the first is taken
/// that is free: never used, or whose flow is over by the node's [`Timeouts`]. When there is none,
/// that which has been closed, or was not confirmed, for the longest time, of [`HURRY_TICKS`] at
/// least. Never the port of an open flow.
#[inline(always)]
pub(super) fn translate_source<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    first_port(maps, scratch);
    for round in 1..=ROUNDS {
        if take_port(maps, scratch) {
            return true;
        }
        if round == ROUNDS {
            scatter(maps, scratch);
        }
        next_port(maps, scratch);
    }
    if take_port(maps, scratch) {
        return true;
    }
    let Search {
        offset,
        oldest,
        hurry,
        ..
    } = &mut scratch.search;
    if oldest.get() == NO_OFFSET {
        return false;
    }
    hurry.set(true);
    offset.set(oldest.get());
    take_port(maps, scratch)
}

/// Sets where the search for a source port begins.
#[inline(never)]
fn first_port<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let tuple = &scratch.arrival.tuple;
    let owner = hash::flow::<F>(
        tuple.src,
        tuple.src_port,
        tuple.dst,
        tuple.dst_port,
        tuple.proto,
    );
    let search = &mut scratch.search;
    search.owner.set(owner);
    search.hurry.set(false);
    search.oldest.set(NO_OFFSET);
    search
        .offset
        .set(if snat::in_range(config, tuple.src_port) {
            u32::from(tuple.src_port.wrapping_sub(config.snat_first))
        } else {
            hash::pick(owner.rotate_left(16), u32::from(config.snat_ports))
        });
}

/// Moves the search to a place that changes with every tick, in a range that it cannot look at
/// wholly.
#[inline(never)]
fn scatter<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let ports = u32::from(config.snat_ports);
    if ports > MAX_WHOLE {
        let place = (scratch.search.owner.get() ^ scratch.flow.last_seen).wrapping_mul(0x9e37_79b1);
        scratch.search.offset.set(hash::pick(place, ports));
    }
}

/// Takes the port that the search stands at, if it is the flow's own or free.
#[inline(always)]
fn take_port<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    maps.call(Subprogram::TakePort, scratch) != 0
}

/// [`take_port`] itself.
#[inline(always)]
pub(super) fn take_port_here<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    let Some(config) = maps.config() else {
        return false;
    };
    let Scratch {
        arrival,
        own_port,
        flow,
        reply,
        slot: mine,
        search,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    let now = flow.last_seen;
    let port = config.snat_first.wrapping_add(search.offset.get() as u16);
    let index = snat::index::<F>(config, port, flow.backend, flow.backend_port, tuple.proto);
    let Some(entry) = maps.snat(index) else {
        return false;
    };
    let slot = entry.read();
    if slot.owner != search.owner.get() || !is_own(&slot, flow, tuple.src, tuple.src_port) {
        let hurry = search.hurry.get();
        if !is_free(config, &slot, now, hurry, &mut search.limit) {
            return false;
        }
        *reply = Tuple {
            src: flow.backend,
            dst: flow.snat,
            src_port: flow.backend_port,
            dst_port: port,
            proto: tuple.proto,
        };
        if maps.socket_takes(reply) {
            return false;
        }
        // A client that keeps its address must not be given a port that it uses itself.
        if flow.snat == tuple.src {
            *own_port = FlowKey {
                client_port: port,
                ..client_key::<F>(tuple)
            };
            if maps.flow(own_port).is_some() || maps.unconfirmed_flow(own_port).is_some() {
                return false;
            }
        }
    }
    if !maps.claim(entry, slot.last_seen, now) {
        return false;
    }
    flow.snat_port = port;
    *mine = SnatSlot {
        client: tuple.src,
        frontend: flow.frontend,
        backend: flow.backend,
        snat: flow.snat,
        client_port: tuple.src_port,
        frontend_port: flow.frontend_port,
        backend_port: flow.backend_port,
        state: flow.state,
        last_seen: now,
        backend_id: flow.backend_id,
        proto: tuple.proto,
        reserved: 0,
        reserved2: 0,
        epoch: flow.epoch,
        owner: search.owner.get(),
        reserved3: 0,
    };
    entry.write(mine);
    true
}

/// Moves the search to the next port whose slot is the flow's own or free, among
/// [`snat::MAX_TRIES`], or to the last of them.
#[inline(never)]
fn next_port<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    scratch.search.found.set(NO_OFFSET);
    for _ in 0..snat::MAX_TRIES {
        maps.call(Subprogram::LookAtPort, scratch);
    }
    let search = &mut scratch.search;
    let found = search.found.get();
    if found != NO_OFFSET {
        search.offset.set(found);
    }
}

/// One step of the search, and a look at the slot there. Every flow takes steps of its own length:
/// neighbours in turn would all search the runs of taken ports that arise long before a large range
/// is full.
#[inline(always)]
pub(super) fn look_at_port_here<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let Scratch {
        arrival,
        flow,
        search,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    let ports = u32::from(config.snat_ports);
    // Short ones: a long one could come back to where it began after a few.
    let mut step = 1;
    if ports > MAX_WHOLE {
        step += hash::pick(search.owner.get(), (ports - 1).min(MAX_STEP));
    }
    let next = search.offset.get().wrapping_add(step);
    search.offset.set(if next >= ports {
        next.wrapping_sub(ports)
    } else {
        next
    });
    let port = config.snat_first.wrapping_add(search.offset.get() as u16);
    let index = snat::index::<F>(config, port, flow.backend, flow.backend_port, tuple.proto);
    let Some(entry) = maps.snat(index) else {
        return;
    };
    let slot = entry.read();
    let own = slot.owner == search.owner.get() && is_own(&slot, flow, tuple.src, tuple.src_port);
    if own || is_free(config, &slot, flow.last_seen, false, &mut search.limit) {
        if search.found.get() == NO_OFFSET {
            search.found.set(search.offset.get());
        }
    } else if is_free(config, &slot, flow.last_seen, true, &mut search.limit)
        && (search.oldest.get() == NO_OFFSET || slot.last_seen < search.oldest_seen.get())
    {
        search.oldest.set(search.offset.get());
        search.oldest_seen.set(slot.last_seen);
    }
}

/// Whether nobody would miss what a slot holds; in a hurry, nobody but a client that has not
/// completed its handshake, or a backend that has the port in TIME_WAIT, or an RST that is not
/// taken back. `limit` is lent.
#[inline(always)]
fn is_free<A: Copy>(
    config: &Config,
    slot: &SnatSlot<A>,
    now: u32,
    hurry: bool,
    limit: &mut Opaque,
) -> bool {
    let timeouts = &config.timeouts;
    limit.set(if slot.last_seen == 0 {
        return true;
    } else if hurry && (is_closed(slot.state) || is_unconfirmed(slot.proto, slot.state)) {
        // A SYN flood must not use the range up.
        HURRY_TICKS
    } else {
        timeouts.of_port(slot.proto, slot.state)
    });
    now.saturating_sub(slot.last_seen) > limit.get()
}

/// Whether a slot with the flow's [`SnatSlot::owner`] is what an evicted entry of this very flow
/// left behind.
#[inline(always)]
fn is_own<A: Copy + Eq>(slot: &SnatSlot<A>, flow: &Flow<A>, client: A, client_port: u16) -> bool {
    slot.client == client
        && slot.client_port == client_port
        && slot.backend == flow.backend
        && slot.backend_port == flow.backend_port
        && slot.last_seen != 0
}
