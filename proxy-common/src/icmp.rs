//! The answer to packets that nobody can take: ICMP and ICMPv6 port unreachable.
//!
//! [RFC 792](https://www.rfc-editor.org/rfc/rfc792) type 3 code 3, [RFC
//! 4443](https://www.rfc-editor.org/rfc/rfc4443#section-3.1) type 1 code 4. A Linux client that is
//! connecting takes it as `ECONNREFUSED` at once.

use crate::{
    checksum,
    family::Family,
    layout::{TCP, UDP},
    packet::{ETHERNET, Headers, Packet, read, write, write_addr},
};

/// Length of an ICMP or ICMPv6 error's own header.
const ICMP: usize = 8;
/// Most bytes that are quoted: the longest IPv4 header, and a TCP header without options or the
/// start of an SCTP packet.
const MAX_QUOTE: usize = 60 + 20;

/// How many bytes of the refused packet are quoted, from its IP header on. The whole TCP header,
/// because the kernel refuses to cut a socket buffer before a checksum that is still to be filled
/// in; an SCTP INIT up to its tag, without which its sender takes the error for a forged one ([RFC
/// 5927](https://www.rfc-editor.org/rfc/rfc5927)).
#[inline(always)]
pub fn quote_len<A: Copy>(headers: &Headers<A>) -> usize {
    headers.l4 - headers.l3 + if headers.tuple.proto == UDP { 8 } else { 20 }
}

/// Length of the headers that go in front of the quote, after the link layer's.
#[inline(always)]
pub const fn prefix_len<F: Family>() -> usize {
    F::HEADER + ICMP
}

/// Writes the refusal of a packet that has been cut after `quote` bytes and moved [`prefix_len`]
/// bytes to the back; its link-layer header, if any, is still the refused packet's. `false` if the
/// packet is too short after all.
#[inline(always)]
#[must_use]
pub fn port_unreachable<F: Family>(
    packet: &impl Packet,
    refused: &Headers<F::Words>,
    quote: usize,
) -> bool {
    let link = packet.link_header();
    let inner = link + prefix_len::<F>();
    if !settle_checksum::<F>(packet, refused, inner) {
        return false;
    }
    let Some(sum) = sum(packet, inner, quote) else {
        return false;
    };
    let Some(start) = packet.bytes(0, link + prefix_len::<F>()) else {
        return false;
    };
    let (ip, icmp) = (link, link + F::HEADER);
    let length = (ICMP + quote) as u16;
    // SAFETY: all writes lie within the bytes checked above.
    unsafe {
        if link == ETHERNET {
            let (to_low, to_high): (u32, u16) = (read(start, 6), read(start, 10));
            let (from_low, from_high): (u32, u16) = (read(start, 0), read(start, 4));
            write(start, 0, to_low);
            write(start, 4, to_high);
            write(start, 6, from_low);
            write(start, 10, from_high);
        }

        let (kind, mut icmp_sum) = if F::HEADER == 20 {
            let total = F::HEADER as u16 + length;
            write::<u32>(
                start,
                ip,
                u32::from_be_bytes([0x45, 0, (total >> 8) as u8, total as u8]).to_be(),
            );
            // No identification, don't fragment; 64 hops, ICMP.
            write::<u32>(start, ip + 4, 0x0000_4000u32.to_be());
            write::<u32>(start, ip + 8, 0x4001_0000u32.to_be());
            let header = u64::from(0x4500u16.to_be())
                + u64::from(total.to_be())
                + u64::from(0x4000u16.to_be())
                + u64::from(0x4001u16.to_be())
                + F::sum(refused.tuple.src)
                + F::sum(refused.tuple.dst);
            write::<u16>(start, ip + 10, !checksum::fold(header));
            (u16::from_be_bytes([3, 3]), sum)
        } else {
            write::<u32>(start, ip, 0x6000_0000u32.to_be());
            // ICMPv6, 64 hops.
            write::<u32>(start, ip + 4, (u32::from(length) << 16 | 0x3a40).to_be());
            let pseudo = F::sum(refused.tuple.src)
                + F::sum(refused.tuple.dst)
                + u64::from(length.to_be())
                + u64::from(58u16.to_be());
            (u16::from_be_bytes([1, 4]), sum + pseudo)
        };
        // The client dialled the frontend, so the frontend answers.
        write_addr::<F>(start, ip + F::ADDRESSES, refused.tuple.dst);
        write_addr::<F>(
            start,
            ip + F::ADDRESSES + size_of::<F::Words>(),
            refused.tuple.src,
        );
        icmp_sum += u64::from(kind.to_be());
        write::<u16>(start, icmp, kind.to_be());
        write::<u16>(start, icmp + 2, !checksum::fold(icmp_sum));
        write::<u32>(start, icmp + 4, 0);
    }
    true
}

/// Makes the quoted transport header its own checksum.
///
/// A socket buffer of a sender on this machine may say that the quoted checksum is still to be
/// filled in (`CHECKSUM_PARTIAL`), and no helper takes that back: the device may or may not
/// overwrite the field with the sum over the quote, after ours was computed over it. So a field
/// that no receiver of the error looks at (TCP's urgent pointer, UDP's length) is set such that
/// filling in would write what stands there already.
#[inline(always)]
fn settle_checksum<F: Family>(
    packet: &impl Packet,
    refused: &Headers<F::Words>,
    inner: usize,
) -> bool {
    let l4 = inner + (refused.l4 - refused.l3);
    match refused.tuple.proto {
        TCP => settle::<20, 16, 18>(packet, l4),
        UDP => settle::<8, 6, 4>(packet, l4),
        _ => true,
    }
}

/// [`settle_checksum`] of a header of `LEN` bytes with its checksum at `FIELD` and the other field
/// at `SPARE`.
// Constants, and one check for all of the header, because the verifier follows a variable length to
// one comparison only.
#[inline(always)]
fn settle<const LEN: usize, const FIELD: usize, const SPARE: usize>(
    packet: &impl Packet,
    l4: usize,
) -> bool {
    let Some(ptr) = packet.bytes(l4, LEN) else {
        return false;
    };
    let mut rest = 0;
    // SAFETY: `LEN` bytes were checked, and all offsets lie within.
    unsafe {
        for i in 0..LEN / 2 {
            if i * 2 != SPARE {
                rest += u64::from(read::<u16>(ptr, i * 2));
            }
        }
        let field: u16 = read(ptr, FIELD);
        // rest + spare = !field, with rest including the field.
        write(
            ptr,
            SPARE,
            checksum::fold(u64::from(!field) + u64::from(!checksum::fold(rest))),
        );
    }
    true
}

/// Sum of the 16-bit words of `len` bytes (even, at most [`MAX_QUOTE`]) from `offset`.
#[inline(always)]
fn sum(packet: &impl Packet, offset: usize, len: usize) -> Option<u64> {
    let mut sum = 0;
    for i in 0..MAX_QUOTE / 2 {
        if i * 2 >= len {
            break;
        }
        let word = packet.bytes(offset + i * 2, 2)?;
        // SAFETY: 2 bytes were checked.
        sum += u64::from(unsafe { read::<u16>(word, 0) });
    }
    Some(sum)
}
