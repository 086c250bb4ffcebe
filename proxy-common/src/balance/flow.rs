//! How a flow's entries are found: by the client's side, and by a translated source port.

use super::{Entry, Maps};
use crate::{family::Family, hash, layout::*, packet::Tuple, snat, timeouts::is_closed};

/// An entry and what it held.
type Read<'m, T> = (Entry<'m, T>, T);

/// The key that both directions of a client's flow compute.
#[inline(always)]
pub(crate) fn client_key<F: Family>(tuple: &Tuple<F::Words>) -> FlowKey<F::Words> {
    FlowKey {
        client: tuple.src,
        frontend: F::UNSPECIFIED,
        client_port: tuple.src_port,
        frontend_port: 0,
        proto: tuple.proto,
        reserved: 0,
        reserved2: 0,
    }
}

/// The key of a flow whose client port is in use to another frontend.
#[inline(always)]
pub(crate) fn shared_key<F: Family>(tuple: &Tuple<F::Words>) -> FlowKey<F::Words> {
    FlowKey {
        frontend: tuple.dst,
        frontend_port: tuple.dst_port,
        ..client_key::<F>(tuple)
    }
}

/// The bit that says that two flows of a client's port are to different frontends.
#[inline(always)]
pub(crate) fn shared_port_bit<F: Family>(tuple: &Tuple<F::Words>) -> u32 {
    hash::side::<F>(tuple.src, tuple.src_port, tuple.proto) as u32 % (SHARED_PORT_WORDS as u32 * 64)
}

/// The slot of a packet's source port towards the backend that it goes to.
#[inline(always)]
pub(super) fn slot_of<'m, F: Family, M: Maps<F>>(
    maps: &'m M,
    config: &Config,
    tuple: &Tuple<F::Words>,
) -> Option<Read<'m, SnatSlot<F::Words>>> {
    snat_slot(
        maps,
        config,
        tuple.src_port,
        tuple.dst,
        tuple.dst_port,
        tuple.proto,
    )
}

/// The slot of a translated source port towards a backend, if it is in use for that backend and
/// protocol.
#[inline(always)]
pub(crate) fn snat_slot<'m, F: Family, M: Maps<F>>(
    maps: &'m M,
    config: &Config,
    port: u16,
    backend: F::Words,
    backend_port: u16,
    proto: u8,
) -> Option<Read<'m, SnatSlot<F::Words>>> {
    let [first, second] = snat::places::<F>(config, port, backend, backend_port, proto);
    let mut entry = maps.snat(first)?;
    if !snat::is_of(&entry.read(), port, backend, backend_port, proto) {
        entry = maps.snat(second)?;
        if !snat::is_of(&entry.read(), port, backend, backend_port, proto) {
            return None;
        }
    }
    Some((entry, entry.read()))
}

/// Whether replies to the translated source `dst` come to this node itself, which translates them
/// where they arrive. A port translated under the client's own address comes back through the
/// client's device, unless the client is a process of this node.
#[inline(always)]
pub(crate) fn returns_here<A: Copy + Eq>(slot: &SnatSlot<A>, dst: A) -> bool {
    slot.snat == dst && (slot.snat != slot.client || slot.state & FLOW_PROCESS != 0)
}

/// Ticks ([`TICK_NS`]) after an RST, in which its sender may show that it was not its own.
const RESET_TICKS: u32 = 2;

/// Whether nobody would miss the flow; `closed_ticks`: how long after both sides' FIN.
#[inline(always)]
pub(super) fn is_over(
    timeouts: &Timeouts,
    state: u32,
    proto: u8,
    last_seen: u32,
    now: u32,
    closed_ticks: u32,
) -> bool {
    // Another CPU may have written a later tick than the one this decision began with.
    let idle = now.saturating_sub(last_seen);
    let limit = if state & FLOW_RESET != 0 {
        RESET_TICKS
    } else if is_closed(state) {
        closed_ticks
    } else {
        timeouts.of(proto, state)
    };
    idle > limit
}

/// Removes the entry of a flow that is over: it would explain packets of the one that is opened by
/// the same source and destination under another key, or under none.
#[inline(never)]
pub(super) fn remove_over<F: Family, M: Maps<F>>(maps: &M, key: &FlowKey<F::Words>) {
    if let Some(entry) = maps.flow(key) {
        let half_open = entry.read().state & FLOW_HALF_OPEN;
        maps.remove_flow(key);
        if half_open != 0 {
            maps.add_half_open(-1);
        }
    }
    maps.remove_unconfirmed(key);
}
