//! Flows: how an open one is found, and the least that it takes to open one.

use shunt_common::{
    hash,
    layout::{Flow, FlowKey, FrontendKey, Slot, TCP},
};

use crate::wire::{Seen, Wire, bytes, value};

/// The entry of a flow: one look-up.
#[inline(always)]
pub(crate) fn flow<F: Wire>(key: &FlowKey<F::Words>) -> Option<&'static Flow<F::Words>> {
    value::<_, Flow<F::Words>>(F::FLOWS.get_ptr_mut(bytes::<_, FlowKey<F::Addr>>(key)))
}

/// A new flow as it is usually done: frontend, miss, slot, and an entry for each direction. `addr`
/// and `scope`: what the frontend is found by. Returns the packet as the backend gets it, but for
/// the source, which becomes `snat`.
#[inline(always)]
pub(crate) fn open<F: Wire>(
    old: &Seen<F::Words>,
    addr: F::Words,
    scope: u8,
    snat: F::Words,
) -> Option<Seen<F::Words>> {
    let (src_port, dst_port) = (u16::from_be(old.src_port), u16::from_be(old.dst_port));
    let frontend_key = FrontendKey {
        addr,
        port: dst_port,
        proto: TCP,
        scope,
        reserved: 0,
    };
    // SAFETY: read at once; the entry is freed after this run only.
    let frontend = unsafe { F::FRONTENDS.get(bytes::<_, FrontendKey<F::Addr>>(&frontend_key)) }?;
    let mut key = FlowKey {
        frontend: old.dst,
        frontend_port: dst_port,
        ..old.key::<F>()
    };
    if F::FLOOR_FLOWS
        .get_ptr(bytes::<_, FlowKey<F::Addr>>(&key))
        .is_some()
    {
        return None;
    }
    let choice = hash::flow::<F>(old.src, src_port, old.dst, dst_port, TCP);
    let index = frontend.slot_base + hash::pick(choice, frontend.slot_count);
    let slot = value::<_, Slot<F::Words>>(F::SLOTS.get_ptr_mut(index))?;
    let flow = Flow {
        frontend: old.dst,
        backend: slot.addr,
        snat,
        frontend_port: dst_port,
        backend_port: slot.port,
        snat_port: src_port,
        state: 0,
        backend_id: slot.backend,
        last_seen: 1,
        epoch: 0,
        unanswered_since: 0,
        reserved: 0,
        tried: 0,
        reserved2: 0,
    };
    let new = Seen {
        dst: slot.addr,
        dst_port: slot.port.to_be(),
        ..*old
    };
    F::FLOOR_FLOWS
        .insert(
            bytes::<_, FlowKey<F::Addr>>(&key),
            bytes::<_, Flow<F::Addr>>(&flow),
            0,
        )
        .ok()?;
    key.client = slot.addr;
    key.frontend = old.src;
    key.client_port = slot.port;
    key.frontend_port = src_port;
    F::FLOOR_FLOWS
        .insert(
            bytes::<_, FlowKey<F::Addr>>(&key),
            bytes::<_, Flow<F::Addr>>(&flow),
            0,
        )
        .ok()?;
    Some(new)
}
