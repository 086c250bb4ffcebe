//! Whether a flow uses the port that a client's packet comes from.

use super::{Maps, Scratch, client_key, shared_port_bit};
use crate::{
    family::Family,
    filter,
    layout::*,
    packet::{ACK, RST, SYN},
    timeouts::is_closed,
    verdict::PortUse,
};

/// Whether a flow uses the port that the packet in `scratch.arrival` comes from.
#[inline(never)]
pub(super) fn port_use<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> PortUse {
    let tuple = &scratch.arrival.tuple;
    if maps.client(filter::unconfirmed::<F>(tuple.src))
        || maps.port_is_shared(shared_port_bit::<F>(tuple))
    {
        return PortUse::Unclear;
    }
    let Some(entry) = maps.flow(&client_key::<F>(tuple)) else {
        return PortUse::Free;
    };
    let flow = entry.read();
    let same = (flow.frontend == tuple.dst) & (flow.frontend_port == tuple.dst_port);
    let anew = scratch.arrival.tcp_flags & (SYN | ACK | RST) == SYN;
    if same & anew & (flow.state & FLOW_SNAT == 0) & is_closed(flow.state) {
        PortUse::Over
    } else {
        PortUse::Unclear
    }
}
