//! Refusals of SYNs: held back while another backend may answer.

use super::{
    pick::pick_other_backend,
    quarantine::{bit, fail, is_open},
    resent::{MAX_BACKENDS, entry_of, pending},
};
use crate::{
    balance::{
        Maps, Scratch, Subprogram, Subprograms, client_key, look_up, returns_here, snat_slot,
    },
    event::Event,
    family::Family,
    filter,
    layout::*,
    packet::Tuple,
    snat,
    verdict::Origin,
};

/// Whether the packet in `scratch.arrival` refuses a SYN, and comes to an address that this node
/// put in place of the client's.
#[inline(never)]
pub(crate) fn refuses<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) -> bool {
    let Some(config) = maps.config() else {
        return false;
    };
    let tuple = &scratch.arrival.tuple;
    tuple.proto == TCP
        && snat::may_be(maps, tuple.dst)
        && maps.filter(filter::backend::<F>(tuple.src, tuple.src_port, tuple.proto))
        && match snat_slot(
            maps,
            config,
            tuple.dst_port,
            tuple.src,
            tuple.src_port,
            tuple.proto,
        ) {
            Some((_, slot)) => returns_here(&slot, tuple.dst) && is_open(slot.state),
            None => false,
        }
}

/// Whether the client shall not hear the refusal in `scratch.arrival`, because its next SYN finds
/// another backend. `leaving`: it is on its way out, to the client's address.
#[inline(always)]
pub(crate) fn is_held_back<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    leaving: bool,
) -> bool {
    scratch.failover.leaving.set(leaving);
    maps.call(Subprogram::HoldBack, scratch) != 0
}

/// [`is_held_back`] itself.
#[inline(always)]
pub(crate) fn hold_back_here<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    let leaving = scratch.failover.leaving.get();
    scratch.reply = scratch.arrival.tuple;
    let held = hold_back(maps, scratch, leaving);
    scratch.arrival.tuple = scratch.reply;
    held
}

#[inline(always)]
fn hold_back<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    leaving: bool,
) -> bool {
    if !find_request(maps, scratch, leaving) || !pending(maps, scratch) {
        return false;
    }
    fail(maps, scratch, false);
    let tried = scratch.flow.tried & !TRIED_KEEP | bit(scratch.flow.backend_id);
    scratch.failover.tried.set(tried);
    look_up(maps, scratch).is_continue()
        && scratch.frontend.flags & FRONTEND_NO_RETRY == 0
        && tried.count_ones() < MAX_BACKENDS
        && pick_other_backend(maps, scratch, false)
        && record_refusal(maps, scratch)
}

#[inline(never)]
fn record_refusal<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) -> bool {
    let Some(entry) = entry_of(maps, scratch) else {
        return false;
    };
    entry.set(FLOW_REFUSED);
    maps.count(Event::RefusalHeld);
    true
}

/// Turns the answer in `scratch.reply` into the SYN that it answers, in `scratch.arrival`; `false`
/// if it answers none.
#[inline(never)]
fn find_request<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    leaving: bool,
) -> bool {
    let Some(config) = maps.config() else {
        return false;
    };
    let Scratch {
        arrival,
        key,
        reply,
        ..
    } = scratch;
    if reply.proto != TCP || !maps.filter(filter::backend::<F>(reply.src, reply.src_port, TCP)) {
        return false;
    }
    let mut state = None;
    if snat::may_be(maps, reply.dst)
        && let Some((_, slot)) =
            snat_slot(maps, config, reply.dst_port, reply.src, reply.src_port, TCP)
        && (if leaving {
            slot.client == reply.dst
        } else {
            returns_here(&slot, reply.dst)
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
        if let Some(entry) = maps.unconfirmed_flow(key).or_else(|| maps.flow(key)) {
            let flow = entry.read();
            if flow.backend == reply.src
                && flow.backend_port == reply.src_port
                && flow.state & FLOW_SNAT == 0
            {
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
    arrival.origin = if state & FLOW_LOCAL_CLIENT != 0 {
        Origin::Pod
    } else if state & FLOW_PROCESS != 0 {
        Origin::Process
    } else {
        Origin::Network
    };
    is_open(state)
}

/// The refusal in `scratch.arrival` is the client's to hear: its SYN goes nowhere else from here
/// on.
#[inline(never)]
pub(crate) fn end<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let Scratch { arrival, key, .. } = scratch;
    let tuple = &arrival.tuple;
    if let Some((entry, _)) =
        snat_slot(maps, config, tuple.dst_port, tuple.src, tuple.src_port, TCP)
    {
        entry.clear(FLOW_RETRY);
    }
    *key = FlowKey {
        client: tuple.dst,
        client_port: tuple.dst_port,
        ..client_key::<F>(tuple)
    };
    if let Some(entry) = maps.unconfirmed_flow(key) {
        entry.clear(FLOW_RETRY);
    }
    if let Some(entry) = maps.flow(key) {
        entry.clear(FLOW_RETRY);
    }
}
