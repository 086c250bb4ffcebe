//! A flow is opened: to the chosen backend, under a key that no live flow has.

use super::{
    Maps, Scratch, bypass,
    flow::{client_key, is_over, remove_over, shared_key, shared_port_bit, snat_slot},
    forward::towards_backend,
};
use crate::{
    event::Event,
    failover,
    family::Family,
    filter,
    layout::*,
    packet::Tuple,
    snat,
    verdict::{Origin, PortUse},
};

/// Makes the flow to the chosen backend.
#[inline(never)]
pub(super) fn open<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let in_use = scratch.arrival.origin == Origin::Pod && bypass::is_in_use(maps, scratch);
    let Scratch {
        arrival,
        key,
        frontend,
        chosen: slot,
        flow,
        failover: progress,
        port_use,
        over,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    let now = maps.now();
    *flow = Flow {
        frontend: tuple.dst,
        backend: slot.addr,
        snat: tuple.src,
        frontend_port: tuple.dst_port,
        backend_port: slot.port,
        snat_port: tuple.src_port,
        state: 0,
        backend_id: slot.backend,
        last_seen: now,
        epoch: maps.epoch(),
        unanswered_since: 0,
        reserved: 0,
        tried: 0,
        reserved2: 0,
    };
    if failover::is_for(tuple.proto, arrival.tcp_flags, frontend.flags) {
        flow.state = FLOW_RETRY | progress.probe_bits();
        flow.unanswered_since = maps.affinity_now() as u16;
        flow.tried = progress.tried();
    }
    if frontend.flags & FRONTEND_AFFINITY != 0 {
        flow.tried |= TRIED_KEEP;
    }
    let local = slot.flags & BACKEND_LOCAL != 0;
    if local {
        flow.state |= FLOW_LOCAL_BACKEND;
    }
    match arrival.origin {
        Origin::Pod => flow.state |= FLOW_LOCAL_CLIENT,
        Origin::Process => flow.state |= FLOW_PROCESS,
        Origin::Network => {}
    }
    // A pod that is its own backend would take its own address as a source for a forgery.
    let hairpin = slot.addr == tuple.src;
    let elsewhere =
        arrival.origin == Origin::Network && !local && frontend.flags & FRONTEND_KEEP_SOURCE == 0;
    let process = arrival.origin == Origin::Process;
    if hairpin || elsewhere || process || frontend.flags & FRONTEND_MASQUERADE != 0 {
        flow.snat = F::words(F::config(config).node);
        flow.state |= FLOW_SNAT;
    }

    *key = client_key::<F>(tuple);
    let mut owner = match port_use.get() {
        PortUse::Free => EntryOwner::Nobody,
        PortUse::Over => EntryOwner::Over,
        PortUse::Unclear => entry_owner(maps, &config.timeouts, key, tuple, slot, now),
    };
    if (in_use && flow.state & FLOW_SNAT == 0) || port_is_translated(maps, config, tuple, slot) {
        if let EntryOwner::Over = owner {
            remove_over(maps, key);
        }
        owner = EntryOwner::Other;
    }
    if let EntryOwner::Other = owner {
        *key = shared_key::<F>(tuple);
        flow.state |= FLOW_SNAT;
        maps.set_port_shared(shared_port_bit::<F>(tuple));
        maps.count(Event::PortCollision);
    }
    // A flow under the longer key is over as well if there is one, or its packet would not have
    // come here.
    over.set(!matches!(owner, EntryOwner::Nobody));
}

/// Whose the entry of a client's side is.
enum EntryOwner {
    Nobody,
    /// A flow that is over, of this frontend or another: the entry can be written over.
    Over,
    /// A live flow to another frontend.
    Other,
}

#[inline(always)]
fn entry_owner<F: Family, M: Maps<F>>(
    maps: &M,
    timeouts: &Timeouts,
    key: &FlowKey<F::Words>,
    tuple: &Tuple<F::Words>,
    backend: &Slot<F::Words>,
    now: u32,
) -> EntryOwner {
    let entry = match maps.flow(key) {
        Some(entry) => Some(entry),
        None => maps.unconfirmed_flow(key),
    };
    let Some(entry) = entry else {
        return EntryOwner::Nobody;
    };
    let flow = entry.read();
    let same = flow.frontend == tuple.dst && flow.frontend_port == tuple.dst_port;
    // The same frontend: only a connection that is opened anew comes here, and the client knows
    // what it does. Another: the backend must not take its first packet for one of the connection
    // that was.
    let remembered = flow.backend == backend.addr && flow.backend_port == backend.port;
    let closed_ticks = if remembered { timeouts.time_wait } else { 0 };
    if same
        || is_over(
            timeouts,
            flow.state,
            tuple.proto,
            flow.last_seen,
            now,
            closed_ticks,
        )
    {
        EntryOwner::Over
    } else {
        EntryOwner::Other
    }
}

/// Whether the backend already sees this client's address and port, as the source of another flow of the
/// client that [`translate_source`](super::source_port::translate_source) has translated.
#[inline(always)]
fn port_is_translated<F: Family, M: Maps<F>>(
    maps: &M,
    config: &Config,
    tuple: &Tuple<F::Words>,
    backend: &Slot<F::Words>,
) -> bool {
    snat::may_be(maps, tuple.src)
        && match snat_slot(
            maps,
            config,
            tuple.src_port,
            backend.addr,
            backend.port,
            tuple.proto,
        ) {
            Some((_, slot)) => {
                slot.snat == tuple.src
                    && (slot.client_port != tuple.src_port
                        || slot.frontend != tuple.dst
                        || slot.frontend_port != tuple.dst_port)
            }
            None => false,
        }
}

/// Stores the chosen flow, and says where its packet goes.
#[inline(never)]
pub(super) fn insert<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Scratch {
        arrival,
        key,
        flow,
        translation,
        over,
        ..
    } = scratch;
    *translation = towards_backend(flow, arrival);
    maps.count_flow(flow.backend_id);
    let client = filter::client::<F>(arrival.tuple.src);
    if !maps.client(client) {
        maps.set_client(client);
    }
    // Replies to a translated source are not seen where open flows are, and only the way there from
    // `unconfirmed` says that a flow is confirmed.
    let may_be_open = flow.state & FLOW_SNAT == 0 && flow.tried & TRIED_KEEP == 0;
    if over.get() {
        if let Some(entry) = maps.flow(key) {
            let half_open = entry.read().state & FLOW_HALF_OPEN;
            if may_be_open {
                flow.state |= half_open;
                entry.write(flow);
                return;
            }
            maps.remove_flow(key);
            if half_open != 0 {
                maps.add_half_open(-1);
            }
        } else if let Some(entry) = maps.unconfirmed_flow(key) {
            entry.write(flow);
            return;
        }
    }
    // Into `flows` at once, which spares the common flow one insertion and one deletion; but only
    // so many that a flood of first packets cannot push open flows out.
    if may_be_open && maps.may_wait() {
        flow.state |= FLOW_HALF_OPEN;
        if maps.add_flow(key, flow) {
            maps.add_half_open(1);
            return;
        }
        flow.state &= !FLOW_HALF_OPEN;
    }
    let unconfirmed = filter::unconfirmed::<F>(arrival.tuple.src);
    if !maps.client(unconfirmed) {
        maps.set_client(unconfirmed);
    }
    if !maps.add_unconfirmed(key, flow) {
        // Never drop for lack of an entry: the hash finds the same backend again.
        maps.count(Event::ConntrackFull);
    }
}
