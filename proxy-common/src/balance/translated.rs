//! A packet that was translated already, on another hook or device of its way: once is enough.
//!
//! XDP hands packets for backends of the node itself up to tc, a bridge's port to the bridge, a
//! device to the VLAN above it. When the backend's address and port are a frontend too (the node's
//! own address, and another Service's node port), the packet would be translated again. An open
//! flow of its client tells: to the backend that the packet is for, and seen just now.

use super::{
    Maps, Scratch,
    flow::{client_key, slot_of},
};
use crate::{family::Family, filter, layout::*, snat, timeouts::is_closed, verdict::Origin};

/// How long ago the flow was seen at most, in ticks ([`TICK_NS`]): `last_seen` is written when
/// [`Flow::epoch`] changes, every 2.6 s at most.
const JUST_NOW: u32 = 4;

/// Whether the packet is what an open flow has made of its client's.
#[inline(never)]
pub(super) fn is_translated<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    let tuple = &scratch.arrival.tuple;
    if scratch.arrival.origin == Origin::Process && maps.is_senders_own(tuple) {
        return false;
    }
    if !maps.filter(filter::backend::<F>(tuple.dst, tuple.dst_port, tuple.proto)) {
        return false;
    }
    let now = maps.now();
    scratch.key = client_key::<F>(tuple);
    let entry = match maps.flow(&scratch.key) {
        Some(entry) => Some(entry),
        None => maps.unconfirmed_flow(&scratch.key),
    };
    if let Some(entry) = entry {
        let flow = entry.read();
        if flow.backend == tuple.dst
            && flow.backend_port == tuple.dst_port
            && flow.state & FLOW_SNAT == 0
            && !(flow.frontend == tuple.dst && flow.frontend_port == tuple.dst_port)
            && !is_closed(flow.state)
            && now.saturating_sub(flow.last_seen) <= JUST_NOW
        {
            return true;
        }
    }
    let Some(config) = maps.config() else {
        return false;
    };
    snat::may_be(maps, tuple.src)
        && match slot_of(maps, config, tuple) {
            Some((_, slot)) => {
                (slot.client == tuple.src || slot.snat == tuple.src)
                    && !is_closed(slot.state)
                    && now.saturating_sub(slot.last_seen) <= JUST_NOW
            }
            None => false,
        }
}
