//! Where a packet's payload begins behind IPv4 options or IPv6 extension headers, and whether it is
//! a fragment.

use crate::{access::Access, family::Family};

/// Most IPv6 extension headers before the transport header: each of the four kinds that are walked,
/// twice. RFC 8200 section 4.1 has each at most once, destination options twice.
pub const MAX_HEADERS: u32 = 8;

/// Hop-by-hop options.
const HOP_BY_HOP: u8 = 0;
/// Routing header.
const ROUTING: u8 = 43;
/// Fragment header.
const FRAGMENT: u8 = 44;
/// Destination options.
const DESTINATION: u8 = 60;

/// Where things stand in a packet. Words, because it stands in a map's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Offset of the payload, in bytes.
    pub l4: u32,
    /// Its IANA protocol number; in a fragment other than the first what the fragment header says.
    pub proto: u32,
    /// Identification of the datagram that it is a fragment of, as it stands in the packet.
    pub id: u32,
    /// Where the fragment belongs in its datagram, in bytes.
    pub offset: u32,
    /// 1: more fragments follow.
    pub more: u32,
}

impl Path {
    /// Whether the packet is a whole datagram.
    #[inline(always)]
    pub fn is_whole(&self) -> bool {
        self.offset == 0 && self.more == 0
    }
}

/// Finds the payload of the packet whose IP header stands at `l3`. `false`: it is not of the
/// family, ends too soon, has more than [`MAX_HEADERS`] extension headers, or a routing header that
/// still has somewhere else to go.
#[inline(never)]
pub fn find<F: Family>(packet: &impl Access, l3: u32, path: &mut Path) -> bool {
    walk::<F>(packet, l3, path).is_some()
}

#[inline(always)]
fn walk<F: Family>(packet: &impl Access, l3: u32, path: &mut Path) -> Option<()> {
    path.id = 0;
    path.offset = 0;
    path.more = 0;
    let first: u8 = packet.load(l3)?;
    if F::HEADER == 20 {
        let header = u32::from(first & 0x0f) * 4;
        if first >> 4 != 4 || header < 20 {
            return None;
        }
        let fragment = u16::from_be(packet.load(l3 + 6)?);
        path.id = u32::from(packet.load::<u16>(l3 + 4)?);
        path.offset = u32::from(fragment & 0x1fff) * 8;
        path.more = u32::from(fragment >> 13 & 1);
        path.proto = u32::from(packet.load::<u8>(l3 + 9)?);
        path.l4 = l3 + header;
        return Some(());
    }
    if first >> 4 != 6 {
        return None;
    }
    let mut next: u8 = packet.load(l3 + 6)?;
    let mut at = l3 + F::HEADER as u32;
    for _ in 0..MAX_HEADERS {
        let mut words: u8 = 0;
        match next {
            HOP_BY_HOP | DESTINATION => words = packet.load(at + 1)?,
            ROUTING => {
                // The destination is the next stop's address, not the receiver's.
                if packet.load::<u8>(at + 3)? != 0 {
                    return None;
                }
                words = packet.load(at + 1)?;
            }
            FRAGMENT => {
                let place = u16::from_be(packet.load(at + 2)?);
                path.id = packet.load(at + 4)?;
                path.offset = u32::from(place & !7);
                path.more = u32::from(place & 1);
            }
            _ => break,
        }
        next = packet.load(at)?;
        at += 8 + u32::from(words) * 8;
        if path.offset != 0 {
            // What follows is the middle of something.
            break;
        }
    }
    if path.offset == 0 && matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
        return None;
    }
    path.proto = u32::from(next);
    path.l4 = at;
    Some(())
}
