//! Replies: packets of backends, on their way to the client.

use super::{
    Entry, Maps, Scratch, Tracked,
    flow::{client_key, returns_here, slot_of, snat_slot},
    owner::is_noteworthy,
};
use crate::{
    failover,
    family::Family,
    filter,
    layout::*,
    packet::{FIN, RST, SYN, Tuple},
    snat,
    timeouts::is_closed,
    verdict::{Arrival, Counted, InScratch, Lookup, Origin, Step, Translation, Verdict},
};

/// The first half of [`leaving`](super::leaving): all there is to do but for refusals of SYNs.
#[inline(always)]
pub fn answering<F: Family, M: Maps<F>>(
    maps: &M,
    tuple: &Tuple<F::Words>,
    tcp_flags: u8,
) -> Lookup<F::Words> {
    let Some(config) = maps.config() else {
        return Lookup::Unmatched;
    };
    if maps.filter(filter::backend_port(tuple.src_port))
        && maps.client(filter::client::<F>(tuple.dst))
    {
        let state = reply_state(tuple.proto, tcp_flags);
        if snat::may_be(maps, tuple.dst)
            && let Some((entry, slot)) = snat_slot(
                maps,
                config,
                tuple.dst_port,
                tuple.src,
                tuple.src_port,
                tuple.proto,
            )
            && slot.client == tuple.dst
        {
            if tcp_flags & (SYN | RST) != 0 && failover::is_open(slot.state) {
                if tcp_flags & RST != 0 {
                    return Lookup::Undecided;
                }
                failover::answered(maps, slot.backend_id);
            }
            entry.record(maps, state);
            goes_on(entry, slot.state, tcp_flags);
            let tuple = Tuple {
                src: slot.frontend,
                src_port: slot.frontend_port,
                dst_port: slot.client_port,
                ..*tuple
            };
            return translate(tuple, Counted::reply(slot.backend_id));
        }
        let key = FlowKey {
            client: tuple.dst,
            client_port: tuple.dst_port,
            ..client_key::<F>(tuple)
        };
        match reply(maps, maps.flow(&key), tuple, state, tcp_flags) {
            Lookup::Unmatched => {}
            lookup => return lookup,
        }
        match reply(maps, maps.unconfirmed_flow(&key), tuple, state, tcp_flags) {
            Lookup::Unmatched => {}
            lookup => return lookup,
        }
    }
    if maps.filter(filter::backend_port(tuple.dst_port))
        && snat::may_be(maps, tuple.src)
        && let Some((_, slot)) = slot_of(maps, config, tuple)
        && slot.client == tuple.src
        && slot.snat != tuple.src
        // A process's gets both halves at once.
        && slot.state & FLOW_PROCESS == 0
    {
        let tuple = Tuple {
            src: slot.snat,
            ..*tuple
        };
        return translate(tuple, Counted::ELSEWHERE);
    }
    Lookup::Unmatched
}

/// [`answering`], of what leaves the node. What is no Service's, and is to be noted as such, is
/// undecided as well.
#[inline(always)]
pub fn departing<F: Family, M: Maps<F>>(
    maps: &M,
    tuple: &Tuple<F::Words>,
    tcp_flags: u8,
) -> Lookup<F::Words> {
    match answering(maps, tuple, tcp_flags) {
        Lookup::Unmatched if is_noteworthy(maps, tuple, tcp_flags) => Lookup::Undecided,
        lookup => lookup,
    }
}

/// [`answering`] of the packet in `scratch.arrival`, with the translation left in `scratch`; it
/// goes on where that is undecided.
// It has returned when a refusal is judged, which asks it again: Linux 6.1 has no stack for two of
// it.
#[inline(never)]
pub(crate) fn answering_slowly<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Step {
    match answering::<F, M>(maps, &scratch.arrival.tuple, scratch.arrival.tcp_flags) {
        Lookup::Unmatched => Step::Break(Verdict::Pass),
        Lookup::Translate(translation) => {
            scratch.translation = translation;
            Step::Break(Verdict::Translate(InScratch))
        }
        Lookup::Undecided => Step::Continue(()),
    }
}

/// A reply, if the entry is the flow that it answers.
#[inline(always)]
fn reply<F: Family, M: Maps<F>>(
    maps: &M,
    entry: Option<Entry<'_, Flow<F::Words>>>,
    tuple: &Tuple<F::Words>,
    state: u32,
    tcp_flags: u8,
) -> Lookup<F::Words> {
    let Some(entry) = entry else {
        return Lookup::Unmatched;
    };
    let flow = entry.read();
    if flow.backend != tuple.src
        || flow.backend_port != tuple.src_port
        || flow.state & (FLOW_SNAT | FLOW_SUPERSEDED) != 0
    {
        return Lookup::Unmatched;
    }
    if tcp_flags & SYN != 0 && is_closed(flow.state) {
        // The client took its port anew, to dial the backend itself.
        entry.record(maps, FLOW_SUPERSEDED);
        return Lookup::Unmatched;
    }
    if tcp_flags & (SYN | RST) != 0 && failover::is_open(flow.state) {
        if tcp_flags & RST != 0 {
            return Lookup::Undecided;
        }
        failover::answered(maps, flow.backend_id);
    }
    entry.record(maps, state);
    goes_on(entry, flow.state, tcp_flags);
    let tuple = Tuple {
        src: flow.frontend,
        src_port: flow.frontend_port,
        ..*tuple
    };
    translate(tuple, Counted::reply(flow.backend_id))
}

/// A reply that comes back to the address that this node put in place of the client's.
#[inline(always)]
pub(crate) fn snat_reply_arriving<F: Family, M: Maps<F>>(
    maps: &M,
    config: &Config,
    arrival: &Arrival<F::Words>,
) -> Lookup<F::Words> {
    let tuple = &arrival.tuple;
    let Some((entry, slot)) = snat_slot(
        maps,
        config,
        tuple.dst_port,
        tuple.src,
        tuple.src_port,
        tuple.proto,
    ) else {
        return Lookup::Unmatched;
    };
    if !returns_here(&slot, tuple.dst) {
        return Lookup::Unmatched;
    }
    let process = slot.state & FLOW_PROCESS != 0;
    if arrival.tcp_flags & (SYN | RST) != 0 && failover::is_open(slot.state) {
        if arrival.tcp_flags & RST != 0 {
            return Lookup::Undecided;
        }
        failover::answered(maps, slot.backend_id);
    }
    if process && arrival.sends_on && arrival.origin == Origin::Network {
        // tc has the means to hand it to the process.
        return translate(*tuple, Counted::ELSEWHERE);
    }
    entry.record(maps, reply_state(tuple.proto, arrival.tcp_flags));
    goes_on(entry, slot.state, arrival.tcp_flags);
    let local = slot.state & (FLOW_LOCAL_CLIENT | FLOW_PROCESS) != 0;
    let mut tuple = Tuple {
        dst: slot.client,
        ..*tuple
    };
    let mut counted = Counted::ELSEWHERE;
    if process || arrival.sends_on && !local {
        tuple.src = slot.frontend;
        tuple.src_port = slot.frontend_port;
        tuple.dst_port = slot.client_port;
        counted = Counted::reply(slot.backend_id);
    }
    Lookup::Translate(Translation {
        tuple,
        local,
        process,
        counted,
    })
}

/// Takes back what was noted of a backend that sends after all: that it is asked whether it is
/// there, or has reset the connection.
#[inline(always)]
fn goes_on<T: Tracked>(entry: Entry<'_, T>, state: u32, tcp_flags: u8) {
    if state & (FLOW_UNANSWERED | FLOW_BACKEND_RESET) != 0 {
        entry.clear(if tcp_flags & RST == 0 {
            FLOW_UNANSWERED | FLOW_BACKEND_RESET
        } else {
            FLOW_UNANSWERED
        });
    }
}

#[inline(always)]
fn reply_state(proto: u8, tcp_flags: u8) -> u32 {
    let mut state = FLOW_SEEN_REPLY;
    if proto != UDP {
        if tcp_flags & FIN != 0 {
            state |= FLOW_BACKEND_FIN;
        }
        if tcp_flags & RST != 0 {
            state |= FLOW_BACKEND_RESET;
        }
    }
    state
}

#[inline(always)]
fn translate<A: Copy>(tuple: Tuple<A>, counted: Counted) -> Lookup<A> {
    Lookup::Translate(Translation {
        tuple,
        local: true,
        process: false,
        counted,
    })
}
