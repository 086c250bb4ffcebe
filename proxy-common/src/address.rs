//! What becomes of packets to an address of a Service that no frontend explains: an unknown port,
//! an address that no Service has, a protocol that no Service speaks.
//!
//! A port that no Service has on a cluster IP is refused at once. Everything else that goes to a
//! cluster IP, or to an address in the Service range that no Service has (yet), is dropped: nobody
//! answers there, and a node would send it to its default route, perhaps to come back until its hop
//! limit ends. Dropped and not refused, because the Service may be so new that this node has not
//! heard of it: a client that sends again finds it. Addresses of load balancers, external IPs and
//! node addresses may have more behind them than Services, and are let go.

use crate::{
    balance::Maps,
    event::Event,
    family::Family,
    layout::{ADDRESS_CLUSTER_IP, Config},
    verdict::Verdict,
};

/// What becomes of a packet that no frontend takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Unmatched {
    /// It is not for a Service.
    Pass,
    /// Nobody has the port.
    Refuse,
    /// Nobody is there.
    Drop,
}

/// Whether a destination may be a cluster IP, or lies in the Service range. Cheap, for it is asked
/// for every packet that is not for a frontend.
#[inline(always)]
pub fn may_be_service<F: Family>(config: &Config, dst: F::Words) -> bool {
    let hull = &F::config(config).service_hull;
    F::mask(dst, F::words(hull.mask)) == F::words(hull.addr)
}

/// Judges a TCP, UDP or SCTP packet, or a socket's call, to an address that [`may_be_service`], and
/// a port that no frontend has.
#[inline(never)]
pub fn unknown_port<F: Family, M: Maps<F>>(maps: &M, dst: F::Words) -> Unmatched {
    let verdict = classify(maps, dst);
    match verdict {
        Unmatched::Pass => {}
        Unmatched::Refuse => maps.count(Event::UnknownPort),
        Unmatched::Drop => maps.count(Event::UnknownAddress),
    }
    verdict
}

/// The same for a packet of another protocol, which no socket behind a Service could take.
#[inline(never)]
pub fn unknown_protocol<F: Family, M: Maps<F>>(maps: &M, dst: F::Words) -> Unmatched {
    match classify(maps, dst) {
        Unmatched::Pass => Unmatched::Pass,
        Unmatched::Refuse | Unmatched::Drop => {
            maps.count(Event::UnknownAddress);
            Unmatched::Drop
        }
    }
}

/// What becomes of a packet to a frontend that may not open a flow, and is of none: where nobody
/// else is, it ends here.
#[inline(never)]
pub(crate) fn unopened<F: Family, M: Maps<F>>(maps: &M, dst: F::Words) -> Verdict {
    match classify(maps, dst) {
        Unmatched::Pass => Verdict::Pass,
        Unmatched::Refuse | Unmatched::Drop => {
            maps.count(Event::NoFlow);
            Verdict::Drop
        }
    }
}

#[inline(always)]
fn classify<F: Family, M: Maps<F>>(maps: &M, dst: F::Words) -> Unmatched {
    let Some(config) = maps.config() else {
        return Unmatched::Pass;
    };
    if !may_be_service::<F>(config, dst) {
        return Unmatched::Pass;
    }
    let flags = maps.address(&dst);
    let is_cluster_ip = flags & ADDRESS_CLUSTER_IP != 0;
    if !is_cluster_ip && (flags != 0 || !in_service_range::<F>(config, dst)) {
        return Unmatched::Pass;
    }
    // A mistake in a Service must not cut a node off.
    if maps.is_node_addr(&dst) || F::words(F::config(config).node) == dst {
        return Unmatched::Pass;
    }
    if is_cluster_ip {
        Unmatched::Refuse
    } else {
        Unmatched::Drop
    }
}

#[inline(always)]
fn in_service_range<F: Family>(config: &Config, dst: F::Words) -> bool {
    let config = F::config(config);
    let mut inside = false;
    for (i, cidr) in config.service_cidrs.iter().enumerate() {
        // Not `&&`, which the verifier would follow both ways, for each.
        inside |= ((i as u32) < config.service_cidr_count)
            & (F::mask(dst, F::words(cidr.mask)) == F::words(cidr.addr));
    }
    inside
}
