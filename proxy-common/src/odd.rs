//! Packets that are not plain TCP or UDP behind a plain IP header: what [`crate::packet::parse`] leaves.
//!
//! They are few, so they take their time: headers are read by copies ([`crate::access`]), and nothing here weighs on the path
//! of plain packets. XDP leaves them to tc, which sees them next.

use crate::{
    access::{Access, load_addr, store_addrs},
    address::{self, Stranger},
    balance::{From, Maps, Outcome, Scratch, Subprograms, arriving_slowly, leaving_slowly},
    checksum::Difference,
    crc32c, echo,
    event::Event,
    extension,
    extension::Path,
    family::Family,
    fragment, icmp_error,
    layout::{SCTP, TCP, UDP},
    packet::{ACK, ETHERNET, FIN, Headers, RST, SCTP_CHECKSUM, SYN, Tuple, checksum_offset, differences, port_word},
};

/// Where a packet is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It arrives through a device.
    In(From),
    /// It leaves through one.
    Out,
}

/// What becomes of an odd packet, which is rewritten by then if it had to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Fate {
    /// On its way.
    Pass,
    /// Not possible, or not allowed.
    Drop,
    /// It is its own answer now, and goes back to where it came from.
    Back,
    /// Nobody takes it: answer with port unreachable. Its [`headers`] say about what.
    Refuse,
}

/// What is known of the packet at hand; part of [`crate::balance::Scratch`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Odd<A> {
    /// Where its payload stands.
    pub path: Path,
    /// An ICMP error's: where the quoted packet's payload stands.
    pub quoted: Path,
    /// Its addresses; ports where it has any.
    pub tuple: Tuple<A>,
    /// An ICMP error's: what an answer to the quoted packet would carry.
    pub answer: Tuple<A>,
    /// An ICMP error's: what that answer would become.
    pub becomes: Tuple<A>,
}

/// A packet that [`crate::packet::parse`] made nothing of.
#[inline(always)]
pub fn odd<F: Family, M: Subprograms<F>>(maps: &M, packet: &impl Access, place: Place) -> Fate {
    let Some(scratch) = maps.scratch() else {
        return Fate::Pass;
    };
    let l3 = ETHERNET as u32;
    if !extension::find::<F>(packet, l3, &mut scratch.odd.path) {
        return Fate::Pass;
    }
    let src = l3 + F::ADDRESSES as u32;
    let (Some(from), Some(to)) = (
        load_addr::<F>(packet, src),
        load_addr::<F>(packet, src + size_of::<F::Words>() as u32),
    ) else {
        return Fate::Pass;
    };
    let odd = &mut scratch.odd;
    odd.tuple = Tuple {
        src: from,
        dst: to,
        src_port: 0,
        dst_port: 0,
        proto: odd.path.proto as u8,
    };
    if odd.tuple.proto == icmp_error::proto::<F>() && odd.path.is_whole() {
        match packet.load::<u8>(odd.path.l4) {
            Some(kind) if icmp_error::is_error::<F>(kind) => {
                return icmp_error::translate(maps, packet, scratch, place);
            }
            Some(kind) if kind == echo::request::<F>() => {
                if let Some(fate) = echo::answer(maps, packet, scratch) {
                    return fate;
                }
            }
            _ => {}
        }
    }
    if matches!(scratch.odd.tuple.proto, TCP | UDP | SCTP) || scratch.odd.path.offset != 0 {
        return transport(maps, packet, scratch, place);
    }
    match place {
        Place::In(_) => other(maps, scratch),
        Place::Out => Fate::Pass,
    }
}

/// The headers of a packet that gets [`Fate::Refuse`]; `None` if they are too long to be quoted.
#[inline(always)]
pub fn headers<F: Family, M: Maps<F>>(maps: &M) -> Option<Headers<F::Words>> {
    let odd = &maps.scratch()?.odd;
    let l4 = odd.path.l4 as usize;
    (l4 >= ETHERNET + F::HEADER && l4 <= ETHERNET + 60).then_some(Headers {
        l3: ETHERNET,
        l4,
        tuple: odd.tuple,
        tcp_flags: 0,
    })
}

/// A TCP, UDP or SCTP packet behind extension headers, in a buffer's pages, or in fragments.
#[inline(always)]
fn transport<F: Family, M: Subprograms<F>>(
    maps: &M,
    packet: &impl Access,
    scratch: &mut Scratch<F::Words>,
    place: Place,
) -> Fate {
    let is_later = scratch.odd.path.offset != 0;
    if is_later {
        if !fragment::recall(maps, scratch) {
            let fate = match place {
                Place::In(_) => other(maps, scratch),
                Place::Out => Fate::Pass,
            };
            if fate == Fate::Drop {
                maps.count(Event::FragmentLost);
            }
            return fate;
        }
        scratch.arrival.tcp_flags = 0;
    } else if !read_ports(packet, scratch) {
        return Fate::Pass;
    }
    scratch.arrival.tuple = scratch.odd.tuple;
    scratch.arrival.sends_on = false;
    let outcome = match place {
        Place::In(from) => {
            scratch.arrival.from = from;
            arriving_slowly(maps, scratch)
        }
        Place::Out => leaving_slowly(maps, scratch),
    };
    match outcome {
        Outcome::Pass => Fate::Pass,
        // Behind extension headers a reset is not worth its code: the client asks again, and its next connection is refused.
        Outcome::Drop | Outcome::Reset => Fate::Drop,
        Outcome::Refuse if is_later => Fate::Drop,
        Outcome::Refuse => Fate::Refuse,
        Outcome::Translate => {
            if scratch.odd.path.more != 0 && !is_later {
                fragment::note(maps, scratch);
            }
            if write::<F>(packet, scratch) {
                Fate::Pass
            } else {
                maps.count(Event::RewriteFailed);
                Fate::Drop
            }
        }
    }
}

/// Reads the transport header; `false` if the packet ends within.
#[inline(never)]
fn read_ports<A: Copy>(packet: &impl Access, scratch: &mut Scratch<A>) -> bool {
    let Scratch { odd, arrival, .. } = scratch;
    let Some(ports) = packet.load::<u32>(odd.path.l4) else {
        return false;
    };
    odd.tuple.src_port = u16::from_be(ports as u16);
    odd.tuple.dst_port = u16::from_be((ports >> 16) as u16);
    // What ends within its transport header is the kernel's to drop.
    let last = match odd.tuple.proto {
        TCP => 19,
        UDP => 7,
        _ => 11,
    };
    if packet.load::<u8>(odd.path.l4 + last).is_none() {
        return false;
    }
    arrival.tcp_flags = match odd.tuple.proto {
        TCP => match packet.load::<u8>(odd.path.l4 + 13) {
            Some(flags) => flags,
            None => return false,
        },
        UDP => 0,
        // The type of the first chunk (RFC 9260, section 3.2).
        _ => match packet.load::<u8>(odd.path.l4 + 12) {
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

/// Brings an SCTP packet's checksum up to date, which covers its ports but no address. A first fragment does not say how long its
/// datagram is: with other ports its checksum would be wrong.
#[inline(never)]
fn update_sctp<F: Family>(packet: &impl Access, path: &Path, difference: u32) -> bool {
    if difference == 0 {
        return true;
    }
    let l3 = ETHERNET as u32;
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
        // `CHECKSUM_PARTIAL`: the device that sends it computes it over the zero that its socket left. (A finished checksum is zero
        // once in 2^32 packets; that packet is lost, and sent again with others.)
        return true;
    }
    let new = sum ^ crc32c::first_word_changed(difference, length);
    packet.changed(Difference::word32(sum, new));
    path.more == 0 && packet.store(path.l4 + SCTP_CHECKSUM as u32, new)
}

/// Writes `scratch.translation`. A later fragment has no ports, and its datagram's checksum stands in the first.
#[inline(never)]
fn write<F: Family>(packet: &impl Access, scratch: &mut Scratch<F::Words>) -> bool {
    let (path, old, new) = (&scratch.odd.path, &scratch.odd.tuple, &scratch.translation.tuple);
    let (addresses, ports) = differences::<F>(old, new);
    if path.offset == 0 {
        if let Some(offset) = checksum_offset(old.proto)
            && !packet.replace_checksum(path.l4 + offset as u32, addresses, ports, old.proto == UDP)
        {
            return false;
        }
        if old.proto == SCTP {
            // Its checksum is of another kind, and makes up for nothing.
            packet.changed(if F::HEADER == 40 { addresses.and(ports) } else { ports });
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
    store_addrs::<F>(packet, ETHERNET as u32, (old.src, old.dst), (new.src, new.dst))
}

/// A packet of a protocol that no Service speaks.
#[inline(always)]
fn other<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) -> Fate {
    match address::unknown_protocol(maps, scratch.odd.tuple.dst) {
        Stranger::Pass => Fate::Pass,
        Stranger::Refuse | Stranger::Drop => Fate::Drop,
    }
}
