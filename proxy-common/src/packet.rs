//! Headers in, headers out: what a translation reads of a packet and how it is written back.

use crate::{
    checksum::Difference,
    family::{Family, Words6},
    layout::{TCP, UDP},
};

/// A packet that can be read and rewritten: an XDP frame, a socket buffer's linear part, a byte
/// slice in tests.
pub trait Packet {
    /// Address of `len` bytes from `offset`, readable and writable; `None` where the packet ends
    /// before.
    ///
    /// The pointer is good until the packet is resized or a helper invalidates it; callers ask
    /// again after that.
    fn bytes(&self, offset: usize, len: usize) -> Option<*mut u8>;

    /// Length of what stands in front of the IP header: that of an Ethernet header, or nothing
    /// (TUN, WireGuard, IPIP).
    #[inline(always)]
    fn link_header(&self) -> usize {
        ETHERNET
    }
}

/// Length of an Ethernet header without VLAN tags.
pub const ETHERNET: usize = 14;

/// TCP flag FIN.
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;

/// Who talks to whom. Ports in host order. Aligned, so that BPF copies it by words.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// IANA protocol number.
    pub proto: u8,
}

/// What a packet's headers say, and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers<A> {
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the transport header.
    pub l4: usize,
    /// Addresses and ports.
    pub tuple: Tuple<A>,
    /// TCP flags; 0 for other protocols.
    pub tcp_flags: u8,
}

/// Reads a value from packet memory, whatever its alignment.
///
/// # Safety
/// `size_of::<T>()` bytes must be readable at `ptr + offset`, and every bit pattern must be a `T`.
#[inline(always)]
pub(crate) unsafe fn read<T: Copy>(ptr: *const u8, offset: usize) -> T {
    // SAFETY: the caller's promise.
    unsafe {
        let ptr = ptr.add(offset).cast::<T>();
        // The kernel allows unaligned packet access where the CPU is efficient at it; LLVM would
        // load byte by byte.
        if cfg!(target_arch = "bpf") {
            ptr.read_volatile()
        } else {
            ptr.read_unaligned()
        }
    }
}

/// Writes a value to packet memory, whatever its alignment.
///
/// # Safety
/// `size_of::<T>()` bytes must be writable at `ptr + offset`.
#[inline(always)]
pub(crate) unsafe fn write<T: Copy>(ptr: *mut u8, offset: usize, value: T) {
    // SAFETY: the caller's promise.
    unsafe {
        let ptr = ptr.add(offset).cast::<T>();
        if cfg!(target_arch = "bpf") {
            ptr.write_volatile(value)
        } else {
            ptr.write_unaligned(value)
        }
    }
}

/// Reads an address, word by word.
///
/// # Safety
/// As [`read`].
#[inline(always)]
unsafe fn read_addr<F: Family>(ptr: *const u8, offset: usize) -> F::Words {
    // SAFETY: the caller's promise; `Words` is one or two words, and any bit pattern is one.
    unsafe {
        if size_of::<F::Words>() == 4 {
            let word: u32 = read(ptr, offset);
            core::mem::transmute_copy(&word)
        } else {
            let words = Words6 {
                high: read(ptr, offset),
                low: read(ptr, offset + 8),
            };
            core::mem::transmute_copy(&words)
        }
    }
}

/// Writes an address, word by word.
///
/// # Safety
/// As [`write`].
#[inline(always)]
pub(crate) unsafe fn write_addr<F: Family>(ptr: *mut u8, offset: usize, addr: F::Words) {
    // SAFETY: the caller's promise; `Words` is one or two words.
    unsafe {
        if size_of::<F::Words>() == 4 {
            write::<u32>(ptr, offset, core::mem::transmute_copy(&addr));
        } else {
            let words: Words6 = core::mem::transmute_copy(&addr);
            write(ptr, offset, words.high);
            write(ptr, offset + 8, words.low);
        }
    }
}

/// The Ethernet type of a frame, host order.
#[inline(always)]
pub fn ethertype(packet: &impl Packet) -> Option<u16> {
    let ptr = packet.bytes(0, ETHERNET)?;
    // SAFETY: 14 bytes were checked.
    Some(u16::from_be(unsafe { read(ptr, 12) }))
}

/// Reads the headers of a TCP or UDP packet whose IP header stands at `l3`. `None`: not one, or cut
/// short, or a fragment, or (IPv6) with extension headers.
#[inline(always)]
pub fn parse<F: Family>(packet: &impl Packet, l3: usize) -> Option<Headers<F::Words>> {
    let ip = packet.bytes(l3, F::HEADER)?;
    // SAFETY: `F::HEADER` bytes were checked, and all offsets below lie within.
    let (proto, header, src, dst) = unsafe {
        let (proto, header) = if F::HEADER == 20 {
            let first: u8 = read(ip, 0);
            let header = usize::from(first & 0x0f) * 4;
            // More fragments, or an offset: the ports may not be here.
            let fragment = u16::from_be(read(ip, 6)) & 0x3fff;
            if first >> 4 != 4 || header < 20 || fragment != 0 {
                return None;
            }
            (read::<u8>(ip, 9), header)
        } else {
            if read::<u8>(ip, 0) >> 4 != 6 {
                return None;
            }
            (read::<u8>(ip, 6), F::HEADER)
        };
        let src = read_addr::<F>(ip, F::ADDRESSES);
        let dst = read_addr::<F>(ip, F::ADDRESSES + size_of::<F::Words>());
        (proto, header, src, dst)
    };
    let l4 = l3 + header;
    let (ports, tcp_flags) = match proto {
        TCP => {
            let tcp = packet.bytes(l4, 20)?;
            // SAFETY: 20 bytes were checked.
            unsafe { (read::<u32>(tcp, 0), read::<u8>(tcp, 13)) }
        }
        UDP => {
            let udp = packet.bytes(l4, 8)?;
            // SAFETY: 8 bytes were checked.
            (unsafe { read::<u32>(udp, 0) }, 0)
        }
        _ => return None,
    };
    // One load for both: the source port stands first.
    let ports = u32::from_be(ports);
    let (src_port, dst_port) = ((ports >> 16) as u16, ports as u16);
    Some(Headers {
        l3,
        l4,
        tuple: Tuple {
            src,
            dst,
            src_port,
            dst_port,
            proto,
        },
        tcp_flags,
    })
}

/// Offset of the Internet checksum in the transport header; SCTP has another kind
/// ([`crate::crc32c`]).
#[inline(always)]
pub fn checksum_offset(proto: u8) -> Option<usize> {
    match proto {
        TCP => Some(16),
        UDP => Some(6),
        _ => None,
    }
}

/// What a new tuple means for the transport checksum: addresses (pseudo-header) and ports apart.
#[inline(always)]
pub fn differences<F: Family>(
    old: &Tuple<F::Words>,
    new: &Tuple<F::Words>,
) -> (Difference, Difference) {
    let addresses =
        Difference::address::<F>(old.src, new.src).and(Difference::address::<F>(old.dst, new.dst));
    let ports = Difference::port(old.src_port, new.src_port)
        .and(Difference::port(old.dst_port, new.dst_port));
    (addresses, ports)
}

/// Writes a new tuple's addresses and ports, and the IPv4 header checksum; the transport checksum
/// is not touched.
#[inline(always)]
#[must_use]
pub fn write_tuple<F: Family>(
    packet: &impl Packet,
    headers: &Headers<F::Words>,
    new: &Tuple<F::Words>,
) -> bool {
    let old = &headers.tuple;
    let Some(ip) = packet.bytes(headers.l3, F::HEADER) else {
        return false;
    };
    // SAFETY: `F::HEADER` bytes were checked, and all offsets lie within.
    unsafe {
        if F::HEADER == 20 {
            let (addresses, _) = differences::<F>(old, new);
            write::<u16>(ip, 10, addresses.apply(read(ip, 10)));
        }
        if old.src != new.src {
            write_addr::<F>(ip, F::ADDRESSES, new.src);
        }
        if old.dst != new.dst {
            write_addr::<F>(ip, F::ADDRESSES + size_of::<F::Words>(), new.dst);
        }
    }
    let Some(ports) = packet.bytes(headers.l4, 4) else {
        return false;
    };
    // SAFETY: 4 bytes were checked.
    unsafe {
        write::<u32>(
            ports,
            0,
            (u32::from(new.src_port) << 16 | u32::from(new.dst_port)).to_be(),
        )
    };
    true
}

/// Brings the transport checksum up to date in the packet itself: right where it is complete, as on
/// a wire. Socket buffers may hold a partial one (`CHECKSUM_PARTIAL`), for which the kernel's
/// helper must be asked.
#[inline(always)]
#[must_use]
pub fn update_checksum<F: Family>(
    packet: &impl Packet,
    headers: &Headers<F::Words>,
    new: &Tuple<F::Words>,
) -> bool {
    let Some(offset) = checksum_offset(headers.tuple.proto) else {
        return true;
    };
    let Some(field) = packet.bytes(headers.l4 + offset, 2) else {
        return false;
    };
    let (addresses, ports) = differences::<F>(&headers.tuple, new);
    // SAFETY: 2 bytes were checked.
    unsafe {
        let old: u16 = read(field, 0);
        if headers.tuple.proto == UDP && old == 0 {
            // No checksum (RFC 768): none it stays.
            return true;
        }
        let mut new = addresses.and(ports).apply(old);
        if headers.tuple.proto == UDP && new == 0 {
            new = 0xffff;
        }
        write(field, 0, new);
    }
    true
}

/// Offset of the CRC32c in an SCTP header.
pub(crate) const SCTP_CHECKSUM: usize = 8;

/// The two ports as they stand in memory.
#[inline(always)]
pub(crate) fn port_word<A>(tuple: &Tuple<A>) -> u32 {
    u32::from(tuple.src_port.to_be()) | u32::from(tuple.dst_port.to_be()) << 16
}

/// Takes one hop off a packet that is forwarded without the kernel's help; `false` when none is
/// left to take.
#[inline(always)]
#[must_use]
pub fn decrement_hops<F: Family>(packet: &impl Packet, l3: usize) -> bool {
    let Some(ip) = packet.bytes(l3, F::HEADER) else {
        return false;
    };
    // SAFETY: `F::HEADER` bytes were checked.
    unsafe {
        let offset = if F::HEADER == 20 { 8 } else { 7 };
        let hops: u8 = read(ip, offset);
        if hops <= 1 {
            return false;
        }
        write(ip, offset, hops - 1);
        if F::HEADER == 20 {
            // The field is the high byte of its word: one less there is 0x0100 more in the checksum
            // (RFC 1141).
            let sum = u32::from(read::<u16>(ip, 10)) + u32::from(0x0100u16.to_be());
            write(ip, 10, (sum + (sum >> 16)) as u16);
        }
    }
    true
}
