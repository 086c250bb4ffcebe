//! Connections that were open before a node port was there: noted as no Service's
//! ([`shunt_common::layout::DirectKey`]).
//!
//! What leaves the node from a node port's number is noted by the programs from then on.

use std::{collections::HashSet, io, net::SocketAddr};

use shunt_common::{
    filter,
    layout::{DirectKey, TCP, TICK_NS},
};

use crate::datapath::{
    conntrack,
    maps::{MapFamily, Maps, PerFamily},
    netfilter,
};

/// Which of these ports no node port had so far. From here on the programs note what leaves from
/// them.
pub fn new_ports(maps: &Maps, ports: impl Iterator<Item = u16>) -> HashSet<u16> {
    ports
        .filter(|&port| maps.filter.set(filter::node_port(port)))
        .collect()
}

/// Notes the connections that netfilter knows from or to these ports of `addresses`. Returns how
/// many.
///
/// # Errors
/// The kernel's; what was noted stays.
pub fn note_open(
    maps: &Maps,
    ports: &HashSet<u16>,
    is_local: impl Fn(SocketAddr) -> bool,
) -> io::Result<usize> {
    // To ask would bring the table's modules in where nobody uses them.
    if !netfilter::is_there() {
        return Ok(0);
    }
    let now = now();
    let mut noted = 0;
    conntrack::for_each(|connection| {
        if connection.is_over() {
            return;
        }
        // Answers to what the node sent, and what others send to a port that was somebody's: a
        // published container port, or kube-proxy's. UDP to a port is the Service's as soon as
        // there is one.
        let is_wanted = |to: SocketAddr| ports.contains(&to.port()) && is_local(to);
        let tuple = if is_wanted(connection.reply.dst) {
            connection.reply
        } else if connection.proto == TCP && is_wanted(connection.original.dst) {
            connection.original
        } else {
            return;
        };
        let (peer, local, proto) = (tuple.src, tuple.dst, connection.proto);
        noted += usize::from(
            note(&maps.v4, peer, local, proto, now) || note(&maps.v6, peer, local, proto, now),
        );
    })?;
    Ok(noted)
}

fn note<F: MapFamily>(
    maps: &PerFamily<F>,
    peer: SocketAddr,
    local: SocketAddr,
    proto: u8,
    now: u32,
) -> bool {
    let (Some(peer_address), Some(local_address)) = (F::octets(peer.ip()), F::octets(local.ip()))
    else {
        return false;
    };
    let key = DirectKey {
        peer: peer_address,
        local: local_address,
        peer_port: peer.port(),
        local_port: local.port(),
        proto: proto.into(),
    };
    maps.direct.set(&key, &now).is_ok()
}

/// The programs' clock.
fn now() -> u32 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    ((ns / TICK_NS) as u32).max(1)
}
