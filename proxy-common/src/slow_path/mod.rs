//! Packets that are not plain TCP or UDP behind a plain IP header: what [`crate::packet::parse`]
//! leaves.
//!
//! They are few, so they take their time: headers are read by copies ([`crate::access`]), and
//! nothing here weighs on the path of plain packets. XDP leaves them to tc, which sees them next.

mod context;
mod decision;
mod echo;
mod fragment;
mod icmp_error;

pub use self::context::Action;
pub(crate) use self::context::Context;
use self::decision::{arriving, leaving};
use crate::{
    access::{Access, load_addr, store_addrs},
    address::{self, Unmatched},
    balance::{Maps, Scratch, Subprograms},
    checksum::Difference,
    crc32c,
    event::Event,
    extension::{self, Path},
    family::Family,
    layout::{SCTP, TCP, UDP},
    packet::{
        ACK, FIN, Headers, Packet, RST, SCTP_CHECKSUM, SYN, Tuple, checksum_offset, differences,
        port_word,
    },
    verdict::{Direction, InScratch, Origin, Verdict},
};

/// A packet that [`crate::packet::parse`] made nothing of.
#[inline(always)]
pub fn handle<F: Family, M: Subprograms<F>>(
    maps: &M,
    packet: &impl Access,
    direction: Direction,
) -> Action {
    let Some(scratch) = maps.scratch() else {
        return Action::Pass;
    };
    scratch.counted = 0;
    let l3 = packet.link_length();
    if !extension::find::<F>(packet, l3, &mut scratch.slow.path) {
        return Action::Pass;
    }
    let src = l3 + F::ADDRESSES as u32;
    let (Some(from), Some(to)) = (
        load_addr::<F>(packet, src),
        load_addr::<F>(packet, src + size_of::<F::Words>() as u32),
    ) else {
        return Action::Pass;
    };
    let slow = &mut scratch.slow;
    slow.tuple = Tuple {
        src: from,
        dst: to,
        src_port: 0,
        dst_port: 0,
        proto: slow.path.proto as u8,
    };
    scratch.arrival.tuple = slow.tuple;
    scratch.arrival.tcp_flags = 0;
    if slow.path.more != 0 && slow.path.offset == 0 {
        fragment::forget(maps, scratch);
    }
    let slow = &scratch.slow;
    if slow.tuple.proto == icmp_error::proto::<F>() && slow.path.is_whole() {
        match packet.load::<u8>(slow.path.l4) {
            Some(kind) if icmp_error::is_error::<F>(kind) => {
                return icmp_error::translate(maps, packet, scratch, direction);
            }
            Some(kind) if kind == echo::request::<F>() => {
                if let Some(action) = echo::answer(maps, packet, scratch) {
                    return action;
                }
            }
            _ => {}
        }
    }
    if matches!(scratch.slow.tuple.proto, TCP | UDP | SCTP) || scratch.slow.path.offset != 0 {
        return transport(maps, packet, scratch, direction);
    }
    match direction {
        Direction::Ingress(_) => unmatched(maps, scratch),
        Direction::Egress => Action::Pass,
    }
}

/// Where a packet goes that gets [`Action::Send`].
#[inline(always)]
pub fn destination<F: Family, M: Maps<F>>(maps: &M) -> Option<&Tuple<F::Words>> {
    Some(&maps.scratch()?.translation.tuple)
}

/// The headers of a packet that gets [`Action::Refuse`]; `None` if they are too long to be quoted.
#[inline(always)]
pub fn headers<F: Family, M: Maps<F>>(maps: &M, packet: &impl Packet) -> Option<Headers<F::Words>> {
    let slow = &maps.scratch()?.slow;
    let (l3, l4) = (packet.link_header(), slow.path.l4 as usize);
    (l4 >= l3 + F::HEADER && l4 <= l3 + 60).then_some(Headers {
        l3,
        l4,
        tuple: slow.tuple,
        tcp_flags: 0,
    })
}

/// A TCP, UDP or SCTP packet behind extension headers, in a buffer's pages, or in fragments.
#[inline(always)]
fn transport<F: Family, M: Subprograms<F>>(
    maps: &M,
    packet: &impl Access,
    scratch: &mut Scratch<F::Words>,
    direction: Direction,
) -> Action {
    let is_later = scratch.slow.path.offset != 0;
    if is_later {
        if !fragment::find(maps, scratch) {
            let action = match direction {
                Direction::Ingress(_) => unmatched(maps, scratch),
                Direction::Egress => Action::Pass,
            };
            if action == Action::Drop {
                maps.count(Event::FragmentLost);
            }
            return action;
        }
        scratch.arrival.tcp_flags = 0;
    } else if !read_ports(packet, scratch) {
        return Action::Pass;
    }
    scratch.arrival.tuple = scratch.slow.tuple;
    scratch.arrival.sends_on = false;
    let verdict = match direction {
        Direction::Ingress(origin) => {
            scratch.arrival.origin = origin;
            arriving(maps, scratch)
        }
        Direction::Egress => leaving(maps, scratch),
    };
    match verdict {
        Verdict::Pass => Action::Pass,
        // Behind extension headers a reset is not worth its code: the client asks again, and its
        // next connection is refused.
        Verdict::Drop | Verdict::Reset => Action::Drop,
        Verdict::Refuse if is_later => Action::Drop,
        Verdict::Refuse => Action::Refuse,
        Verdict::Translate(InScratch) => {
            if scratch.slow.path.more != 0 && !is_later {
                fragment::record(maps, scratch);
            }
            if write::<F>(packet, scratch) {
                if scratch.translation.process {
                    Action::Deliver
                } else if direction == Direction::Ingress(Origin::Process) {
                    Action::Send
                } else {
                    Action::Pass
                }
            } else {
                maps.count(Event::RewriteFailed);
                Action::Drop
            }
        }
    }
}

/// Reads the transport header; `false` if the packet ends within.
#[inline(never)]
fn read_ports<A: Copy>(packet: &impl Access, scratch: &mut Scratch<A>) -> bool {
    let Scratch { slow, arrival, .. } = scratch;
    let Some(ports) = packet.load::<u32>(slow.path.l4) else {
        return false;
    };
    slow.tuple.src_port = u16::from_be(ports as u16);
    slow.tuple.dst_port = u16::from_be((ports >> 16) as u16);
    // What ends within its transport header is the kernel's to drop.
    let last = match slow.tuple.proto {
        TCP => 19,
        UDP => 7,
        _ => 11,
    };
    if packet.load::<u8>(slow.path.l4 + last).is_none() {
        return false;
    }
    arrival.tcp_flags = match slow.tuple.proto {
        TCP => match packet.load::<u8>(slow.path.l4 + 13) {
            Some(flags) => flags,
            None => return false,
        },
        UDP => 0,
        // The type of the first chunk (RFC 9260, section 3.2).
        _ => match packet.load::<u8>(slow.path.l4 + 12) {
            Some(1) => SYN,
            Some(2) => SYN | ACK,
            Some(6) => RST,
            // SHUTDOWN, and its answer.
            Some(7 | 8) => FIN,
            _ => ACK,
        },
    };
    true
}

/// Brings an SCTP packet's checksum up to date, which covers its ports but no address. A first
/// fragment does not say how long its datagram is: with other ports its checksum would be wrong.
#[inline(never)]
fn update_sctp<F: Family>(packet: &impl Access, path: &Path, difference: u32) -> bool {
    if difference == 0 {
        return true;
    }
    let l3 = packet.link_length();
    let (length_at, fixed) = if F::HEADER == 20 {
        (l3 + 2, 0)
    } else {
        (l3 + 4, F::HEADER as u32)
    };
    let (Some(length), Some(sum)) = (
        packet.load::<u16>(length_at),
        packet.load::<u32>(path.l4 + SCTP_CHECKSUM as u32),
    ) else {
        return false;
    };
    let length = (u32::from(u16::from_be(length)) + fixed).wrapping_sub(path.l4 - l3);
    if sum == 0 {
        // `CHECKSUM_PARTIAL`: the device that sends it computes it over the zero that its socket
        // left. (A finished checksum is zero once in 2^32 packets; that packet is lost, and sent
        // again with others.)
        return true;
    }
    let new = sum ^ crc32c::first_word_changed(difference, length);
    packet.changed(Difference::word32(sum, new));
    path.more == 0 && packet.store(path.l4 + SCTP_CHECKSUM as u32, new)
}

/// Writes `scratch.translation`. A later fragment has no ports, and its datagram's checksum stands
/// in the first.
#[inline(never)]
fn write<F: Family>(packet: &impl Access, scratch: &mut Scratch<F::Words>) -> bool {
    let (path, old, new) = (
        &scratch.slow.path,
        &scratch.slow.tuple,
        &scratch.translation.tuple,
    );
    let (addresses, ports) = differences::<F>(old, new);
    if path.offset == 0 {
        if let Some(offset) = checksum_offset(old.proto)
            && !packet.replace_checksum(path.l4 + offset as u32, addresses, ports, old.proto == UDP)
        {
            return false;
        }
        if old.proto == SCTP {
            // Its checksum is of another kind, and makes up for nothing.
            packet.changed(if F::HEADER == 40 {
                addresses.and(ports)
            } else {
                ports
            });
            if !update_sctp::<F>(packet, path, port_word(old) ^ port_word(new)) {
                return false;
            }
        }
        if !packet.store(path.l4, port_word(new)) {
            return false;
        }
    } else if F::HEADER == 40 {
        packet.changed(addresses);
    }
    store_addrs::<F>(
        packet,
        packet.link_length(),
        (old.src, old.dst),
        (new.src, new.dst),
    )
}

/// A packet of a protocol that no Service speaks.
#[inline(always)]
fn unmatched<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) -> Action {
    match address::unknown_protocol(maps, scratch.slow.tuple.dst) {
        Unmatched::Pass => Action::Pass,
        Unmatched::Refuse | Unmatched::Drop => Action::Drop,
    }
}
