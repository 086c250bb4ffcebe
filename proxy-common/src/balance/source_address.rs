//! The source address of a flow whose client and backend are both elsewhere: that of the way to the
//! backend.
//!
//! It is what `MASQUERADE` would take, and the `src` of the route goes first: a node may reach its
//! peers' pods by an overlay whose device has an address of its own, and the network in between may
//! drop every other. It is asked for when the flow is opened, and stays with it.

use super::{Maps, Scratch};
use crate::{family::Family, layout::FLOW_PROCESS, packet::Tuple};

/// Puts the address of the way to the backend in place of the node's, where the routes know one.
// A step of its own, whose locals (the kernel's `struct bpf_fib_lookup`) share the stack with the
// other steps'.
#[inline(never)]
pub(super) fn follow_route<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Scratch { arrival, flow, .. } = scratch;
    let mut tuple = Tuple {
        dst: flow.backend,
        dst_port: flow.backend_port,
        ..arrival.tuple
    };
    let process = flow.state & FLOW_PROCESS != 0;
    if process {
        // What it has was chosen for the way to the frontend.
        tuple.src = F::UNSPECIFIED;
    }
    match maps.route_source(&tuple) {
        Some(source) => flow.snat = source,
        // A backend with an address of this node, or a kernel that does not tell.
        None if process && !F::is_loopback(arrival.tuple.src) => flow.snat = arrival.tuple.src,
        None => {}
    }
}
