//! Packets that are not plain TCP, UDP or SCTP behind a plain IP header: what [`crate::packet::parse`] leaves.
//!
//! They are few, so they take their time: headers are read by copies ([`crate::access`]), and nothing here weighs on the path
//! of plain packets. XDP leaves them to tc, which sees them next.

use crate::{
    access::{Access, load_addr},
    address::{self, Stranger},
    balance::{From, Maps, Scratch},
    echo, extension,
    extension::Path,
    family::Family,
    icmp_error,
    layout::{SCTP, TCP, UDP},
    packet::{ETHERNET, Tuple},
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
pub fn odd<F: Family, M: Maps<F>>(maps: &M, packet: &impl Access, place: Place) -> Fate {
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
    match place {
        Place::In(_) if !matches!(scratch.odd.tuple.proto, TCP | UDP | SCTP) => other(maps, scratch),
        _ => Fate::Pass,
    }
}

/// A packet of a protocol that no Service speaks.
#[inline(always)]
fn other<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) -> Fate {
    match address::unknown_protocol(maps, scratch.odd.tuple.dst) {
        Stranger::Pass => Fate::Pass,
        Stranger::Refuse | Stranger::Drop => Fate::Drop,
    }
}
