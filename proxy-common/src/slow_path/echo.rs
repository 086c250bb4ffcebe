//! Echo requests to addresses of Services, answered in the kernel: a ping says whether anybody is
//! behind a Service.
//!
//! [RFC 792](https://www.rfc-editor.org/rfc/rfc792) types 8 and 0, [RFC
//! 4443](https://www.rfc-editor.org/rfc/rfc4443#section-4) types 128 and 129. Fragmented requests
//! are dropped: a ping of more than a link's MTU tests the path, which ends here.

use super::Action;
use crate::{
    access::{Access, store_addrs},
    balance::{Maps, Scratch},
    checksum::Difference,
    event::Event,
    family::Family,
    layout::{ADDRESS_READY, CONFIG_ANSWER_PING},
    packet::ETHERNET,
};

/// Hop limit of an answer.
const HOPS: u8 = 64;

/// Type of an echo request.
pub(super) const fn request<F: Family>() -> u8 {
    if F::HEADER == 20 { 8 } else { 128 }
}

/// Type of its answer.
const fn reply<F: Family>() -> u8 {
    if F::HEADER == 20 { 0 } else { 129 }
}

/// An echo request whose path and addresses stand in `scratch.slow`; `None`: not to a Service's
/// address, or nobody's to answer.
#[inline(never)]
pub(super) fn answer<F: Family, M: Maps<F>>(
    maps: &M,
    packet: &impl Access,
    scratch: &mut Scratch<F::Words>,
) -> Option<Action> {
    let slow = &mut scratch.slow;
    let flags = maps.address(&slow.tuple.dst);
    let on = maps
        .config()
        .is_some_and(|config| config.flags & CONFIG_ANSWER_PING != 0);
    if flags == 0 || !on || maps.is_node_addr(&slow.tuple.dst) {
        return None;
    }
    if flags & ADDRESS_READY == 0 || F::is_group(slow.tuple.src) {
        maps.count(Event::UnknownAddress);
        return Some(Action::Drop);
    }
    if !maps.may_answer(&slow.tuple) {
        return Some(Action::Drop);
    }
    if turn::<F>(packet, scratch).is_none() {
        maps.count(Event::RewriteFailed);
        return Some(Action::Drop);
    }
    maps.count(Event::EchoAnswered);
    Some(Action::SendBack)
}

/// Makes the request its answer.
#[inline(always)]
fn turn<F: Family>(packet: &impl Access, scratch: &mut Scratch<F::Words>) -> Option<()> {
    let slow = &scratch.slow;
    let (l3, icmp) = (packet.link_length(), slow.path.l4);
    // The type is the first byte of its word, and a code of 0 the second. The pseudo-header of
    // ICMPv6 keeps its sum when the addresses change places.
    let old: u16 = packet.load(icmp)?;
    let new = u16::from_ne_bytes([reply::<F>(), 0]);
    let sum = Difference::word(old, new).apply(packet.load(icmp + 2)?);
    let (src, dst) = (slow.tuple.src, slow.tuple.dst);
    let hops = if F::HEADER == 20 {
        let word: u16 = packet.load(l3 + 8)?;
        let renewed = u16::from_ne_bytes([HOPS, word.to_ne_bytes()[1]]);
        let sum = Difference::word(word, renewed).apply(packet.load(l3 + 10)?);
        packet.store(l3 + 10, sum) && packet.store(l3 + 8, renewed)
    } else {
        packet.store(l3 + 7, HOPS)
    };
    (hops
        && packet.store(icmp, new)
        && packet.store(icmp + 2, sum)
        && store_addrs::<F>(packet, l3, (src, dst), (dst, src))
        && (l3 != ETHERNET as u32 || turn_frame(packet).is_some()))
    .then_some(())
}

/// Lets the frame's addresses change places.
#[inline(always)]
fn turn_frame(packet: &impl Access) -> Option<()> {
    let (to_high, to_low): (u32, u16) = (packet.load(6)?, packet.load(10)?);
    let (from_high, from_low): (u32, u16) = (packet.load(0)?, packet.load(4)?);
    (packet.store(0, to_high)
        && packet.store(4, to_low)
        && packet.store(6, from_high)
        && packet.store(10, from_low))
    .then_some(())
}
