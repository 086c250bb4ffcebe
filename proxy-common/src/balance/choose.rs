//! Which frontend a packet or a socket dials, whether it may, and the backend that is chosen for
//! it.

use super::{Maps, Scratch, Subprogram, Subprograms};
use crate::{
    address::{self, Unmatched},
    affinity,
    event::Event,
    family::Family,
    filter, hash,
    layout::*,
    packet::Tuple,
    verdict::{Arrival, Origin, Step, Verdict, step_of_number},
};

/// Whether a frontend may have the packet's destination.
#[inline(always)]
pub(crate) fn may_be_frontend<F: Family>(maps: &impl Maps<F>, tuple: &Tuple<F::Words>) -> bool {
    maps.filter(filter::node_port(tuple.dst_port))
        || maps.filter(filter::frontend::<F>(
            tuple.dst,
            tuple.dst_port,
            tuple.proto,
        ))
}

/// Whether a packet may be of a socket that the hook connected to a backend that does not serve any
/// more (`stale`). The node's own are the agent's to close.
#[inline(always)]
pub(super) fn may_be_stale<F: Family>(maps: &impl Maps<F>, arrival: &Arrival<F::Words>) -> bool {
    let tuple = &arrival.tuple;
    arrival.origin == Origin::Pod
        && maps.filter(filter::stale::<F>(tuple.dst, tuple.dst_port, tuple.proto))
}

/// Finds the frontend for a socket's destination, and whether to look at it at all. `node_itself`:
/// the destination is an address that means this node (one of `node_addrs`, or loopback in the
/// node's own namespace).
#[inline(always)]
pub fn socket_frontend<F: Family, M: Maps<F>>(
    maps: &M,
    dst: F::Words,
    port: u16,
    proto: u8,
    node_itself: impl FnOnce() -> bool,
) -> Option<Frontend> {
    let key = FrontendKey {
        addr: dst,
        port,
        proto,
        scope: SCOPE_INTERNAL,
        reserved: 0,
    };
    let frontend = if maps.filter(filter::frontend::<F>(dst, port, proto)) {
        maps.frontend(&key)
    } else {
        None
    };
    let frontend = match frontend {
        Some(frontend) => frontend,
        None if maps.filter(filter::node_port(port)) && node_itself() => {
            maps.frontend(&FrontendKey {
                addr: F::UNSPECIFIED,
                ..key
            })?
        }
        None => return None,
    };
    Some(frontend)
}

/// Finds the frontend that a packet is for, and whether its source may dial it; left in `scratch`.
#[inline(always)]
pub(crate) fn look_up<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Step {
    step_of_number(maps.call(Subprogram::LookUp, scratch))
}

/// [`look_up`] itself.
#[inline(always)]
pub(super) fn look_up_here<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Step {
    let Some(config) = maps.config() else {
        return Step::Break(Verdict::Pass);
    };
    let Scratch {
        arrival,
        frontend_key,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    let scope = match arrival.origin {
        Origin::Pod | Origin::Process => SCOPE_INTERNAL,
        Origin::Network => scope_of::<F>(config, tuple.src),
    };
    *frontend_key = FrontendKey {
        addr: tuple.dst,
        port: tuple.dst_port,
        proto: tuple.proto,
        scope,
        reserved: 0,
    };
    let mut frontend = None;
    if maps.filter(filter::frontend::<F>(
        tuple.dst,
        tuple.dst_port,
        tuple.proto,
    )) {
        frontend = maps.frontend(frontend_key);
    }
    if frontend.is_none() && means_this_node(maps, config, arrival) {
        frontend_key.addr = F::UNSPECIFIED;
        // A pod that dials another node's port comes from outside there; only addresses that are no node's are the whole
        // cluster's (SPEC P2).
        if arrival.origin == Origin::Network {
            frontend_key.scope = SCOPE_EXTERNAL;
        }
        frontend = maps.frontend(frontend_key);
    }
    let Some(frontend) = frontend else {
        return Step::Break(match address::unknown_port(maps, tuple.dst) {
            Unmatched::Pass => Verdict::Pass,
            Unmatched::Refuse => Verdict::Refuse,
            Unmatched::Drop => Verdict::Drop,
        });
    };

    scratch.frontend = frontend;
    // The node itself is let through whatever the ranges (SPEC P5).
    if frontend.flags & FRONTEND_SOURCE_RANGES != 0
        && arrival.origin != Origin::Process
        && !is_allowed(maps, tuple, &frontend)
    {
        maps.count(Event::SourceDenied);
        return Step::Break(Verdict::Drop);
    }
    Step::Continue(())
}

/// Whether the packet's destination is an address that node ports answer on.
#[inline(always)]
fn means_this_node<F: Family, M: Maps<F>>(
    maps: &M,
    config: &Config,
    arrival: &Arrival<F::Words>,
) -> bool {
    // Anybody else's loopback is his own.
    if arrival.origin == Origin::Process && F::is_loopback(arrival.tuple.dst) {
        return config.flags & F::NODEPORT_LOOPBACK != 0;
    }
    maps.is_node_addr(&arrival.tuple.dst)
}

/// Whether the packet's source may dial a frontend with `loadBalancerSourceRanges`.
#[inline(never)]
fn is_allowed<F: Family, M: Maps<F>>(
    maps: &M,
    tuple: &Tuple<F::Words>,
    frontend: &Frontend,
) -> bool {
    maps.in_source_ranges(&SourceRangeKey {
        prefix_len: 32 + 8 * size_of::<F::Words>() as u32,
        service: frontend.service,
        addr: tuple.src,
    })
}

/// Whether a client that comes in from the network belongs to the cluster.
#[inline(always)]
fn scope_of<F: Family>(config: &Config, client: F::Words) -> u8 {
    let config = F::config(config);
    let mut scope = SCOPE_EXTERNAL;
    for (i, cidr) in config.cluster_cidrs.iter().enumerate() {
        if (i as u32) < config.cluster_cidr_count
            && F::mask(client, F::words(cidr.mask)) == F::words(cidr.addr)
        {
            scope = SCOPE_INTERNAL;
        }
    }
    scope
}

/// The first packet of a flow, or of one that was forgotten: chooses a backend.
#[inline(never)]
pub(super) fn choose<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    let (tuple, frontend) = (&scratch.arrival.tuple, &scratch.frontend);
    let slot = if frontend.slot_count == 0 {
        None
    } else if frontend.flags & FRONTEND_AFFINITY != 0 {
        maps.slot(kept_slot(maps, tuple, frontend, scratch.frontend_key.scope))
    } else {
        let choice = hash::flow::<F>(
            tuple.src,
            tuple.src_port,
            tuple.dst,
            tuple.dst_port,
            tuple.proto,
        );
        maps.slot(
            frontend
                .slot_base
                .wrapping_add(hash::pick(choice, frontend.slot_count)),
        )
    };
    let Some(slot) = slot else {
        if frontend.flags & FRONTEND_DROP != 0 {
            maps.count(Event::PolicyDrop);
            return Step::Break(Verdict::Drop);
        }
        maps.count(Event::NoBackend);
        return Step::Break(Verdict::Refuse);
    };
    scratch.chosen = slot;
    Step::Continue(())
}

/// Who a packet's sender is to [`affinity`].
#[inline(always)]
pub(crate) fn affinity_key<F: Family>(
    tuple: &Tuple<F::Words>,
    frontend: &Frontend,
) -> AffinityKey<F::Words> {
    AffinityKey {
        client: tuple.src,
        service: frontend.service,
        set: frontend.set,
        netns: [0; 2],
    }
}

/// [`affinity::slot_index`] for a packet.
#[inline(never)]
fn kept_slot<F: Family, M: Maps<F>>(
    maps: &M,
    tuple: &Tuple<F::Words>,
    frontend: &Frontend,
    scope: u8,
) -> u32 {
    let key = affinity_key::<F>(tuple, frontend);
    // A client from outside may come in through several nodes, which choose alike if they look at
    // what its flows have in common. Only one node chooses for a client inside, and it may choose
    // anew when the time-out is over.
    let choice = if scope == SCOPE_EXTERNAL {
        hash::flow::<F>(tuple.src, 0, F::UNSPECIFIED, tuple.dst_port, tuple.proto)
    } else {
        hash::flow::<F>(
            tuple.src,
            tuple.src_port,
            tuple.dst,
            tuple.dst_port,
            tuple.proto,
        )
    };
    affinity::slot_index(maps, &key, frontend, choice, false)
}

/// The packet in `scratch.arrival` has confirmed the flow in `scratch.flow`: its client keeps the
/// backend, if the frontend has affinity.
#[inline(never)]
pub(super) fn refresh_affinity<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) {
    if look_up(maps, scratch).is_break() || scratch.frontend.flags & FRONTEND_AFFINITY == 0 {
        return;
    }
    let key = affinity_key::<F>(&scratch.arrival.tuple, &scratch.frontend);
    affinity::confirm(maps, &key, scratch.flow.backend_id);
}
