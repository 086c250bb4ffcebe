//! The end of a connection whose backend is no more: a TCP reset to the client.
//!
//! [RFC 9293](https://www.rfc-editor.org/rfc/rfc9293#section-3.5.2), group 1: the reset takes its
//! sequence number from the acknowledgement field of the segment that it answers, and the client
//! believes it. A SYN has none: its reset acknowledges it (same section). A process of this node is
//! refused so, because its socket is busy sending when the answer comes, and forgets ICMP errors
//! meanwhile.

use crate::{
    checksum::{self, Difference},
    family::Family,
    layout::TCP,
    packet::{ACK, ETHERNET, Headers, Packet, RST, SYN, read, write, write_addr},
};

/// Length of a TCP header without options.
const HEADER: usize = 20;

/// Whether a segment may be answered: one of an open connection, whose acknowledgement says where
/// the client stands.
#[inline(always)]
pub fn is_due(proto: u8, tcp_flags: u8) -> bool {
    proto == TCP && tcp_flags & (SYN | RST | ACK) == ACK
}

/// Whether the reset refuses a connection: it answers a SYN.
#[inline(always)]
fn is_refusal(tcp_flags: u8) -> bool {
    tcp_flags & (SYN | RST | ACK) == SYN
}

/// Length of the whole frame.
#[inline(always)]
pub fn len<A>(headers: &Headers<A>) -> usize {
    headers.l4 + HEADER
}

/// Turns a segment that has been cut to [`len`] into its reset, on the way back. `false` if it is
/// too short after all.
#[inline(always)]
#[must_use]
pub fn reset<F: Family>(packet: &impl Packet, answered: &Headers<F::Words>) -> bool {
    let tuple = &answered.tuple;
    let Some(ip) = packet.bytes(answered.l3, F::HEADER) else {
        return false;
    };
    let length = (answered.l4 - answered.l3 + HEADER) as u16;
    // SAFETY: `F::HEADER` bytes were checked, and all offsets lie within.
    unsafe {
        if F::HEADER == 20 {
            let (old, hops): (u16, u16) = (read(ip, 2), read(ip, 8));
            let new_hops = u16::from_be_bytes([64, TCP]);
            let difference = Difference::port(u16::from_be(old), length)
                .and(Difference::port(u16::from_be(hops), new_hops));
            write::<u16>(ip, 10, difference.apply(read(ip, 10)));
            write::<u16>(ip, 2, length.to_be());
            write::<u16>(ip, 8, new_hops.to_be());
        } else {
            write::<u16>(ip, 4, (HEADER as u16).to_be());
            write::<u8>(ip, 7, 64);
        }
        write_addr::<F>(ip, F::ADDRESSES, tuple.dst);
        write_addr::<F>(ip, F::ADDRESSES + size_of::<F::Words>(), tuple.src);
    }
    let Some(tcp) = packet.bytes(answered.l4, HEADER) else {
        return false;
    };
    let pseudo = checksum::fold(
        F::sum(tuple.src)
            + F::sum(tuple.dst)
            + u64::from(u16::from(TCP).to_be())
            + u64::from((HEADER as u16).to_be()),
    );
    // SAFETY: 20 bytes were checked.
    unsafe {
        let (mut seq, mut acknowledged): (u32, u32) = (read(tcp, 8), 0);
        let mut flags = RST;
        if is_refusal(answered.tcp_flags) {
            let first = u32::from_be(read(tcp, 4));
            (seq, acknowledged) = (0, first.wrapping_add(1).to_be());
            flags |= ACK;
        }
        let ports = u32::from(tuple.dst_port) << 16 | u32::from(tuple.src_port);
        // Five words long.
        let flags = u16::from_be_bytes([5 << 4, flags]).to_be();
        write::<u32>(tcp, 0, ports.to_be());
        write::<u32>(tcp, 4, seq);
        write::<u32>(tcp, 8, acknowledged);
        write::<u16>(tcp, 12, flags);
        write::<u16>(tcp, 14, 0);
        // A sender on this machine may have left the checksum to be filled in, which nothing takes
        // back: the urgent pointer, at which nobody looks, makes the pseudo-header's sum the right
        // checksum, filled in or not.
        let rest = u64::from(ports.to_be())
            + u64::from(seq)
            + u64::from(acknowledged)
            + u64::from(flags)
            + 2 * u64::from(pseudo);
        write::<u16>(tcp, 16, pseudo);
        write::<u16>(tcp, 18, !checksum::fold(rest));
    }
    if packet.link_header() != ETHERNET {
        return true;
    }
    let Some(ethernet) = packet.bytes(0, ETHERNET) else {
        return false;
    };
    // SAFETY: 14 bytes were checked.
    unsafe {
        let (to_low, to_high): (u32, u16) = (read(ethernet, 6), read(ethernet, 10));
        let (from_low, from_high): (u32, u16) = (read(ethernet, 0), read(ethernet, 4));
        write(ethernet, 0, to_low);
        write(ethernet, 4, to_high);
        write(ethernet, 6, from_low);
        write(ethernet, 10, from_high);
    }
    true
}
