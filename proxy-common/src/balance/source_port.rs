//! The search for a source port under which the backend sees a translated flow.
//!
//! Nobody counts who holds how many: what a search looks at tells. It ends with the first free port
//! while there are many. When there are none among those looked at, whose they are is a fair sample:
//!
//! - A port whose flow is closed, was never confirmed, or was one datagram and its answer, is given up
//!   after [`HURRY_TICKS`]; at once to a Service that has few, if another has it. Never that of an open
//!   flow.
//! - Ports that are [kept back](snat::is_reserved) are for clients whose network has few of the
//!   Service's ports in that sample, and there nobody takes more than is left: so there is always
//!   something left for the next.

use super::{
    Maps, Scratch, Search, Subprogram, Subprograms, bypass, client_key, owner::direct_key,
};
use crate::{
    event::Event,
    family::Family,
    filter, hash,
    layout::*,
    packet::{SYN, Tuple},
    snat,
    timeouts::may_be_given_up,
};

/// Ticks ([`TICK_NS`]) after which a source port may serve another connection, when its own
/// [may be given up](may_be_given_up) and no other port is left; else the node's [`Timeouts`] say
/// when.
const HURRY_TICKS: u32 = 2;

/// Longest step of the search for a source port.
const MAX_STEP: u32 = 1023;
/// Ports looked at in one step.
const BATCH: u32 = 16;
/// Most ports that are looked at one by one; of more, some are.
const MAX_WHOLE: u32 = 96;
/// A network of clients with more than one in so many of the ports looked at gets none that is kept
/// back.
const SMALL_SHARE: u32 = 8;
/// Of what is kept back, a network of clients may have one in so many of what is free.
const NETWORKS: u32 = 4;
/// Of what is kept back, a Service leaves one in so many and one to others.
const OTHERS: u32 = 8;
/// No port.
const NONE: u32 = 0;

/// Ports that a part of the search looks at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pool {
    /// Those that the kernel gives to no socket of the node by itself.
    Outside,
    /// Those that it does: what a socket that is given one later sends to the same backend has to get
    /// another ([`bypass::port_collides`]).
    Local,
    /// Those kept back, of both.
    Reserve,
}

/// The parts of the search: which ports, and how many steps.
const PHASES: [(Pool, u32); 5] = [
    (Pool::Outside, 7),
    (Pool::Local, 9),
    // From a place that depends on the time: a client's retransmission looks at others.
    (Pool::Outside, 7),
    (Pool::Local, 7),
    (Pool::Reserve, 9),
];
/// Index of the first part that begins anywhere.
const SCATTERED: u32 = 2;
/// Index of the part for those who have few.
const RESERVE: u32 = 4;
/// All steps but the last part's.
const STEPS: u32 = 7 + 9 + 7 + 7;

/// What a flow may take.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
enum Take {
    /// What it left behind.
    Own,
    /// What is free.
    Free,
    /// What was given up some time ago.
    GivenUp,
    /// What may be given up.
    Fresh,
}

/// Finds a source port towards the flow's backend: the client's own if it is in the range and free,
/// else one from a place that depends on the flow alone, so that a flow whose entry was evicted
/// finds its port again. `false` is counted.
#[inline(always)]
pub(super) fn translate_source<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    first_port(maps, scratch);
    if take_port(maps, scratch) {
        return true;
    }
    for _ in 0..STEPS {
        if look_at_ports(maps, scratch) && take_port(maps, scratch) {
            return true;
        }
    }
    for _ in 0..2 {
        if give_up(scratch) && take_port(maps, scratch) {
            return true;
        }
    }
    if enter_reserve(maps, scratch) {
        for _ in 0..PHASES[RESERVE as usize].1 {
            look_at_ports(maps, scratch);
        }
        if leave_reserve(scratch) {
            return take_port(maps, scratch) || count(maps, Event::SnatExhausted);
        }
    }
    let has_enough = is_greedy(maps, scratch);
    count(
        maps,
        if has_enough {
            Event::SnatLimited
        } else {
            Event::SnatExhausted
        },
    )
}

#[inline(always)]
fn count<F: Family, M: Maps<F>>(maps: &M, event: Event) -> bool {
    maps.count(event);
    false
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
    // A connection whose entry was evicted has its port already, if nobody took it.
    let opens = tuple.proto != TCP || scratch.arrival.tcp_flags & SYN != 0;
    search
        .take
        .set(if opens { Take::Free } else { Take::Own } as u32);
    forget(search);
    begin(config, search, 0, 0);
    let client = tuple.src_port;
    let own = snat::in_range(config, client)
        && client.wrapping_sub(config.local_first) >= config.local_ports
        && !snat::is_reserved(config, client)
        && !maps.filter(filter::node_port(client));
    search.port.set(if own { client.into() } else { NONE });
}

/// Forgets what the ports looked at have told.
#[inline(always)]
fn forget(search: &mut Search) {
    search.free_port.set(NONE);
    search.oldest.set(NONE);
    search.fresh.set(NONE);
    search.used.set(0);
    search.of_service.set(0);
    search.of_network.set(0);
    search.free.set(0);
}

/// How many ports a pool has.
#[inline(always)]
fn size(config: &Config, pool: Pool) -> u32 {
    let ports = u32::from(config.snat_ports);
    match pool {
        Pool::Outside => ports.saturating_sub(snat::local(config).1),
        Pool::Local => snat::local(config).1,
        Pool::Reserve => {
            let first = config.snat_first | (snat::RESERVED - 1);
            let before = u32::from(first.wrapping_sub(config.snat_first));
            ports.saturating_sub(before).div_ceil(snat::RESERVED.into())
        }
    }
}

/// The port at a place of a pool.
#[inline(always)]
fn port_at(config: &Config, pool: Pool, position: u32) -> u16 {
    let first = config.snat_first;
    match pool {
        Pool::Outside => {
            let (begin, count) = snat::local(config);
            let port = u32::from(first) + position;
            (if port >= begin && count != 0 {
                port + count
            } else {
                port
            }) as u16
        }
        Pool::Local => (snat::local(config).0 + position) as u16,
        Pool::Reserve => (first | (snat::RESERVED - 1))
            .wrapping_add((position as u16).wrapping_mul(snat::RESERVED)),
    }
}

/// Which ports a part looks at.
#[inline(always)]
fn pool(phase: u32) -> Pool {
    match phase {
        RESERVE.. => Pool::Reserve,
        phase if phase % 2 == 1 => Pool::Local,
        _ => Pool::Outside,
    }
}

/// Begins a part of the search.
#[inline(always)]
fn begin(config: &Config, search: &mut Search, phase: u32, now: u32) {
    let size = size(config, pool(phase));
    let steps = match phase {
        0 => PHASES[0].1,
        1 => PHASES[1].1,
        2 => PHASES[2].1,
        3 => PHASES[3].1,
        _ => PHASES[4].1,
    };
    let again = phase == SCATTERED || phase == SCATTERED + 1;
    search.phase.set(phase);
    search.left.set(if again && size <= MAX_WHOLE {
        0
    } else {
        // One look is for the way to the next part.
        size.min(steps * BATCH - 1)
    });
    let mut place = search.owner.get().rotate_left(16);
    if again {
        place = (place ^ now).wrapping_mul(0x9e37_79b1);
    }
    search.position.set(hash::pick(place, size));
}

/// What a port is to a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum State {
    /// The flow left it behind.
    Own,
    Free,
    /// It may be given up.
    Weak,
    Open,
}

/// Looks at the owner of the port in [`Search::port`] towards the flow's backend, or at who stands
/// where it would: that place is left in [`Search::place`].
// Its locals have left the stack when the port is taken.
#[inline(never)]
fn examine<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> u32 {
    const NOT_TO_BE_HAD: u32 = State::Open as u32;
    let Some(config) = maps.config() else {
        return NOT_TO_BE_HAD;
    };
    let Scratch {
        arrival,
        flow,
        search,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    let port = search.port.get() as u16;
    let (backend, backend_port, proto) = (flow.backend, flow.backend_port, tuple.proto);
    let [first, second] = snat::places::<F>(config, port, backend, backend_port, proto);
    search.place.set(first);
    let (Some(one), Some(two)) = (maps.snat(first), maps.snat(second)) else {
        return NOT_TO_BE_HAD;
    };
    let now = flow.last_seen;
    // Two values at once would be too much for the stack.
    let (in_second, second_is_free) = {
        let other = two.read();
        (
            snat::is_of(&other, port, backend, backend_port, proto),
            is_free(config, &other, now),
        )
    };
    let in_first = {
        let one = one.read();
        snat::is_of(&one, port, backend, backend_port, proto)
            // Or another CPU may be about to write this very port to it.
            || (!in_second && (!second_is_free || one.last_seen == now || is_free(config, &one, now)))
    };
    let entry = if in_first {
        one
    } else {
        search.place.set(second);
        two
    };
    let slot = entry.read();
    let state = if slot.owner == search.owner.get() && is_own(&slot, flow, tuple, port) {
        State::Own
    } else if is_free(config, &slot, now) {
        State::Free
    } else if may_be_given_up(slot.proto, slot.state) {
        State::Weak
    } else {
        State::Open
    };
    state as u32
}

/// Takes the port that the search stands at, if the flow may.
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
    if scratch.search.port.get() == NONE {
        return false;
    }
    let state = examine(maps, scratch);
    claim(maps, scratch, state)
}

/// Takes the port that was [examined](examine), if the flow may.
// A step of its own, whose locals share the stack with that one's.
#[inline(never)]
fn claim<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>, state: u32) -> bool {
    let Scratch {
        arrival,
        own_port,
        flow,
        reply,
        slot: mine,
        search,
        direct,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    let now = flow.last_seen;
    let port = search.port.get() as u16;
    let owner = search.owner.get();
    let Some(entry) = maps.snat(search.place.get()) else {
        return false;
    };
    let slot = entry.read();
    // What its answers have said before its entry was evicted.
    let mut known = 0;
    if state == State::Own as u32 {
        if arrival.tcp_flags & SYN == 0 {
            known = slot.state & (FLOW_SEEN_REPLY | FLOW_CONFIRMED);
        }
    } else {
        let least = if state == State::Free as u32 {
            Take::Free
        } else if state != State::Weak as u32 {
            return false;
        } else if now.saturating_sub(slot.last_seen) > HURRY_TICKS {
            Take::GivenUp
        } else {
            Take::Fresh
        };
        if search.take.get() < least as u32 {
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
            *direct = direct_key(reply.src, tuple.src, reply.src_port, port, tuple.proto);
            if bypass::is_noted(maps, direct) {
                return false;
            }
        }
    }
    flow.snat_port = port;
    // First, or their answers would not be looked for here.
    look_for_answers::<F, M>(maps, tuple.src);
    look_for_answers::<F, M>(maps, flow.snat);
    if !maps.claim(entry, (slot.last_seen, slot.owner), (now, owner)) {
        // The same packet, sent twice, on another CPU: the port is the flow's, and written there.
        let slot = entry.read();
        return slot.owner == owner && slot.last_seen != 0;
    }
    *mine = SnatSlot {
        client: tuple.src,
        frontend: flow.frontend,
        backend: flow.backend,
        snat: flow.snat,
        client_port: tuple.src_port,
        frontend_port: flow.frontend_port,
        backend_port: flow.backend_port,
        snat_port: port,
        last_seen: now,
        owner,
        state: flow.state | known,
        backend_id: flow.backend_id,
        epoch: flow.epoch,
        proto: tuple.proto,
        reserved: 0,
        reserved2: 0,
    };
    entry.write(mine);
    true
}

/// Looks at the next ports, up to one that is the flow's, or free; whether there is one.
#[inline(always)]
fn look_at_ports<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    maps.call(Subprogram::LookAtPorts, scratch) != 0
}

/// [`look_at_ports`] itself.
#[inline(always)]
pub(super) fn look_at_ports_here<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    for _ in 0..BATCH {
        if maps.call(Subprogram::LookAtPort, scratch) != 0 {
            return true;
        }
    }
    false
}

/// One step of the search; whether the port there is the flow's, or free.
#[inline(always)]
pub(super) fn look_at_port_here<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    match next(maps, scratch) {
        Next::Look => {}
        Next::Skip => return false,
        Next::Found => return true,
    }
    let state = examine(maps, scratch);
    judge(maps, scratch, state)
}

/// What is next in the search.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// A port in [`Search::port`].
    Look,
    /// None.
    Skip,
    /// One that was found before.
    Found,
}

/// Every flow takes steps of its own length: neighbours in turn would all search the runs of taken
/// ports that arise long before a large range is full.
#[inline(always)]
fn next<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Next {
    let Some(config) = maps.config() else {
        return Next::Skip;
    };
    let Scratch { flow, search, .. } = scratch;
    if search.left.get() == 0 {
        return if next_phase(config, search, flow.last_seen) {
            Next::Found
        } else {
            Next::Skip
        };
    }
    let pool = pool(search.phase.get());
    let size = size(config, pool);
    // Short ones: a long one could come back to where it began after a few.
    let step = if size > MAX_WHOLE {
        1 + hash::pick(search.owner.get(), (size - 1).min(MAX_STEP))
    } else {
        1
    };
    let position = search.position.get();
    let next = position.wrapping_add(step);
    search.left.set(search.left.get().wrapping_sub(1));
    search.position.set(if next >= size {
        next.wrapping_sub(size)
    } else {
        next
    });
    let port = port_at(config, pool, position);
    // The agent may have written another range since the search began.
    if !snat::in_range(config, port)
        || snat::is_reserved(config, port) != (pool == Pool::Reserve)
        || maps.filter(filter::node_port(port))
    {
        return Next::Skip;
    }
    search.port.set(port.into());
    Next::Look
}

/// Notes whose the port is that was [examined](examine); whether the flow may have it.
#[inline(always)]
fn judge<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>, state: u32) -> bool {
    let Scratch {
        arrival,
        flow,
        search,
        ..
    } = scratch;
    let port = search.port.get();
    if state == State::Own as u32 {
        return true;
    }
    if state == State::Free as u32 {
        if search.phase.get() == RESERVE {
            search.free.set(search.free.get() + 1);
        } else if search.take.get() != Take::Own as u32 {
            return true;
        }
        if search.free_port.get() == NONE {
            search.free_port.set(port);
        }
        return false;
    }
    let Some(entry) = maps.snat(search.place.get()) else {
        return false;
    };
    let slot = entry.read();
    search.used.set(search.used.get() + 1);
    let of_service = slot.backend_id == flow.backend_id;
    if of_service {
        search.of_service.set(search.of_service.get() + 1);
        if F::network(slot.client) == F::network(arrival.tuple.src) {
            search.of_network.set(search.of_network.get() + 1);
        }
    }
    if state == State::Weak as u32 {
        if flow.last_seen.saturating_sub(slot.last_seen) > HURRY_TICKS {
            if search.oldest.get() == NONE || slot.last_seen < search.oldest_seen.get() {
                search.oldest.set(port);
                search.oldest_seen.set(slot.last_seen);
            }
        } else if !of_service {
            search.fresh.set(port);
        }
    }
    false
}

/// Turns to the next part of the search; whether that is a port already.
#[inline(always)]
fn next_phase(config: &Config, search: &mut Search, now: u32) -> bool {
    let next = search.phase.get() + 1;
    if next >= RESERVE {
        return false;
    }
    // All that its own port may be was looked at.
    if search.take.get() == Take::Own as u32 && next == SCATTERED {
        search.take.set(Take::Free as u32);
        let free = search.free_port.get();
        if free != NONE {
            search.port.set(free);
            return true;
        }
    }
    begin(config, search, next, now);
    false
}

/// Turns to the port that can be given up best, of those not yet tried; `false` if there is none.
#[inline(never)]
fn give_up<A>(scratch: &mut Scratch<A>) -> bool {
    let search = &mut scratch.search;
    let (oldest, fresh) = (search.oldest.get(), search.fresh.get());
    if oldest != NONE {
        search.take.set(Take::GivenUp as u32);
        search.port.set(oldest);
        search.oldest.set(NONE);
        return true;
    }
    // What others have just taken goes to a Service only that has less than they.
    if fresh != NONE && search.of_service.get() * 2 <= search.used.get() {
        search.take.set(Take::Fresh as u32);
        search.port.set(fresh);
        search.fresh.set(NONE);
        return true;
    }
    false
}

/// Whether a flow was refused because others of its network, or its Service, have so many ports.
#[inline(never)]
fn is_greedy<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) -> bool {
    let search = &scratch.search;
    maps.config()
        .is_some_and(|config| config.snat_ports >= 4 * snat::RESERVED)
        && (search.phase.get() != RESERVE || search.free.get() != 0)
}

/// Begins to look at what is kept back, if the flow may have some of it.
#[inline(never)]
fn enter_reserve<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let Some(config) = maps.config() else {
        return false;
    };
    let search = &mut scratch.search;
    if config.snat_ports < 4 * snat::RESERVED
        || search.of_network.get() * SMALL_SHARE > search.used.get()
    {
        return false;
    }
    search.take.set(Take::Free as u32);
    forget(search);
    begin(config, search, RESERVE, 0);
    true
}

/// Turns to what was found there, if neither the client's network nor the Service has so much of it
/// that the next would find nothing.
#[inline(never)]
fn leave_reserve<A>(scratch: &mut Scratch<A>) -> bool {
    let search = &mut scratch.search;
    let free = search.free.get();
    if free != 0
        && search.of_network.get() * NETWORKS <= free
        && search.of_service.get() <= OTHERS * free
    {
        search.port.set(search.free_port.get());
        return true;
    }
    give_up(scratch)
}

/// Whether nobody would miss what a slot holds.
#[inline(always)]
fn is_free<A: Copy>(config: &Config, slot: &SnatSlot<A>, now: u32) -> bool {
    slot.last_seen == 0
        || now.saturating_sub(slot.last_seen) > config.timeouts.of_port(slot.proto, slot.state)
}

/// Has answers to a translated source looked for.
#[inline(never)]
fn look_for_answers<F: Family, M: Maps<F>>(maps: &M, source: F::Words) {
    let bit = filter::translated::<F>(source);
    if !maps.client(bit) {
        maps.set_client(bit);
    }
}

/// Whether a slot with the flow's [`SnatSlot::owner`] is what an evicted entry of this very flow
/// left behind.
#[inline(always)]
fn is_own<A: Copy + Eq>(slot: &SnatSlot<A>, flow: &Flow<A>, tuple: &Tuple<A>, port: u16) -> bool {
    slot.client == tuple.src
        && slot.client_port == tuple.src_port
        && slot.snat_port == port
        && slot.backend == flow.backend
        && slot.backend_port == flow.backend_port
        && slot.last_seen != 0
}
