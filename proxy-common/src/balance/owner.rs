//! Whose a packet is that no flow of ours explains: asked before any frontend is.
//!
//! The node's own connections may come from the number of a node port, and so may those of others
//! that it gives its address to (masquerading, published container ports). Their answers look like
//! packets for a Service.
//!
//! Sockets tell of most. What else left the node from such a port is noted where it leaves
//! ([`note`]), and the agent notes what was open before the port was a frontend's.

use super::{
    Maps, Scratch,
    flow::{client_key, shared_key, shared_port_bit, snat_slot},
};
use crate::{
    address,
    family::Family,
    filter,
    layout::*,
    packet::{ACK, FIN, RST, SYN, Tuple},
    snat,
    verdict::{Step, Verdict},
};

/// Whose the packet in `scratch.arrival` is, in the order of their claims; it goes on if nobody's,
/// and may then open a flow. The flow tables were asked before.
#[inline(never)]
pub(super) fn find_owner<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    if may_be_the_nodes(maps, &scratch.arrival.tuple)
        && (maps.socket_owns(&scratch.arrival.tuple) || is_noted(maps, scratch))
    {
        return Step::Break(Verdict::Pass);
    }
    let (tuple, flags) = (&scratch.arrival.tuple, scratch.arrival.tcp_flags);
    if may_open(tuple.proto, flags) {
        Step::Continue(())
    } else {
        Step::Break(address::unopened(maps, tuple.dst))
    }
}

/// Whether a socket of the node, or netfilter on it, may have the packet's destination. Nobody but
/// Services has a cluster IP.
#[inline(always)]
fn may_be_the_nodes<F: Family>(maps: &impl Maps<F>, tuple: &Tuple<F::Words>) -> bool {
    match maps.address(&tuple.dst) {
        0 => maps.is_node_addr(&tuple.dst),
        flags => flags & ADDRESS_CLUSTER_IP == 0,
    }
}

/// Whether a packet that nobody claims may open a flow, or bring one back that was forgotten. A
/// SYN-ACK and a reset answer somebody, and what nobody answers opens nothing.
#[inline(always)]
fn may_open(proto: u8, flags: u8) -> bool {
    match proto {
        // Nobody answers SYN and FIN at once.
        TCP => matches!(flags & (SYN | ACK | RST), SYN | ACK) && flags & (SYN | FIN) != SYN | FIN,
        SCTP => flags & RST == 0 && flags & (SYN | ACK) != SYN | ACK,
        _ => true,
    }
}

/// Whether the packet answers what left the node, and is no Service's.
#[inline(always)]
fn is_noted<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let (tuple, flags) = (&scratch.arrival.tuple, scratch.arrival.tcp_flags);
    scratch.direct = direct_key(
        tuple.src,
        tuple.dst,
        tuple.src_port,
        tuple.dst_port,
        tuple.proto,
    );
    let (Some(entry), Some(config)) = (maps.direct(&scratch.direct), maps.config()) else {
        return false;
    };
    let timeouts = &config.timeouts;
    let limit = match tuple.proto {
        UDP => timeouts.udp_stream,
        // The other side opens a connection of its own.
        _ if flags & (SYN | ACK | RST) == SYN => timeouts.tcp_unanswered,
        TCP => timeouts.tcp_established,
        _ => timeouts.sctp_established,
    };
    maps.now().saturating_sub(entry.read()) <= limit
}

#[inline(always)]
pub(super) fn direct_key<A>(
    peer: A,
    local: A,
    peer_port: u16,
    local_port: u16,
    proto: u8,
) -> DirectKey<A> {
    DirectKey {
        peer,
        local,
        peer_port,
        local_port,
        proto: proto.into(),
    }
}

/// Whether a packet that leaves, and is no reply of ours, is to be [noted](note). Almost none is.
#[inline(always)]
pub(super) fn is_noteworthy<F: Family>(
    maps: &impl Maps<F>,
    tuple: &Tuple<F::Words>,
    flags: u8,
) -> bool {
    (maps.filter(filter::node_port(tuple.src_port))
        || maps.filter(filter::service::<F>(tuple.src))
            && maps.filter(filter::frontend::<F>(
                tuple.src,
                tuple.src_port,
                tuple.proto,
            )))
        // A reset ends something, and a SYN-ACK may be a listener's that was there before the
        // Service.
        && flags & RST == 0
        && flags & (SYN | ACK) != SYN | ACK
}

/// Notes that the packet in `scratch.arrival`, which leaves, is no Service's: what answers it is
/// not either.
#[inline(never)]
pub(super) fn note<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Scratch {
        arrival,
        key,
        direct,
        reply: answer,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    *answer = Tuple {
        src: tuple.dst,
        dst: tuple.src,
        src_port: tuple.dst_port,
        dst_port: tuple.src_port,
        proto: tuple.proto,
    };
    if !may_be_the_nodes(maps, answer) {
        return;
    }
    // A flow of ours, translated on another device of its way.
    *key = client_key::<F>(answer);
    if is_ours(maps, key, answer) {
        return;
    }
    if maps.port_is_shared(shared_port_bit::<F>(answer)) {
        *key = shared_key::<F>(answer);
        if is_ours(maps, key, answer) {
            return;
        }
    }
    let Some(config) = maps.config() else { return };
    if snat::may_be(maps, answer.dst)
        && snat_slot(
            maps,
            config,
            answer.dst_port,
            answer.src,
            answer.src_port,
            answer.proto,
        )
        .is_some()
    {
        return;
    }
    *direct = direct_key(
        answer.src,
        answer.dst,
        answer.src_port,
        answer.dst_port,
        answer.proto,
    );
    let now = maps.now();
    match maps.direct(direct) {
        Some(entry) if entry.read() == now => {}
        Some(entry) => entry.write(&now),
        None => maps.add_direct(direct, now),
    }
}

/// Whether the client's side of a flow of ours has sent the answer.
#[inline(always)]
fn is_ours<F: Family, M: Maps<F>>(
    maps: &M,
    key: &FlowKey<F::Words>,
    answer: &Tuple<F::Words>,
) -> bool {
    match maps.flow(key).or_else(|| maps.unconfirmed_flow(key)) {
        Some(entry) => {
            let flow = entry.read();
            flow.frontend == answer.dst && flow.frontend_port == answer.dst_port
        }
        None => false,
    }
}
