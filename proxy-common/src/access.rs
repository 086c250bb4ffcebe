//! A packet read and written by copies: for what is too rare, or too far into a packet, for
//! [`crate::packet::Packet`]'s pointers. Each access costs a helper call in the kernel, and reaches
//! what stands in page fragments too.

use crate::{
    checksum::Difference,
    family::{Family, Words6},
    packet::ETHERNET,
};

/// An unsigned number, as it stands in memory: fields of a packet are in network order.
pub trait Number: Copy {}
impl Number for u8 {}
impl Number for u16 {}
impl Number for u32 {}
impl Number for u64 {}

/// A packet with its link-layer header.
pub trait Access {
    /// Length in bytes.
    fn length(&self) -> u32;
    /// Length of what stands in front of the IP header, as [`crate::packet::Packet::link_header`].
    #[inline(always)]
    fn link_length(&self) -> u32 {
        ETHERNET as u32
    }
    /// The number at `offset`; `None` where the packet ends before.
    fn load<T: Number>(&self, offset: u32) -> Option<T>;
    /// Writes a number; `false` where the packet ends before.
    ///
    /// A sum over the whole packet that a device computed (`CHECKSUM_COMPLETE`) is left alone:
    /// callers bring a checksum in the packet up to date as well, after which that sum is what it
    /// was, or say so by [`Self::changed`].
    #[must_use]
    fn store<T: Number>(&self, offset: u32, value: T) -> bool;
    /// Brings the transport checksum at `offset`, complete or still to be filled in, up to date.
    /// `or_none`: zero means that there is none (UDP), and stays.
    #[must_use]
    fn replace_checksum(
        &self,
        offset: u32,
        addresses: Difference,
        ports: Difference,
        or_none: bool,
    ) -> bool;
    /// Tells of a change that no checksum in this packet makes up for.
    fn changed(&self, difference: Difference);
}

/// Loads an address.
#[inline(always)]
pub fn load_addr<F: Family>(packet: &impl Access, offset: u32) -> Option<F::Words> {
    // SAFETY: an address is one word, or two as `Words6` has them, and any bit pattern is one.
    unsafe {
        Some(if size_of::<F::Words>() == 4 {
            core::mem::transmute_copy(&packet.load::<u32>(offset)?)
        } else {
            let words = Words6 {
                high: packet.load(offset)?,
                low: packet.load(offset + 8)?,
            };
            core::mem::transmute_copy(&words)
        })
    }
}

/// Stores an address.
#[inline(always)]
#[must_use]
pub fn store_addr<F: Family>(packet: &impl Access, offset: u32, addr: F::Words) -> bool {
    // SAFETY: as above.
    unsafe {
        if size_of::<F::Words>() == 4 {
            packet.store::<u32>(offset, core::mem::transmute_copy(&addr))
        } else {
            let words: Words6 = core::mem::transmute_copy(&addr);
            packet.store(offset, words.high) && packet.store(offset + 8, words.low)
        }
    }
}

/// Writes the addresses of an IP header, from `old` to `new`, and the checksum that an IPv4 header
/// has.
#[inline(always)]
#[must_use]
pub fn store_addrs<F: Family>(
    packet: &impl Access,
    l3: u32,
    old: (F::Words, F::Words),
    new: (F::Words, F::Words),
) -> bool {
    if F::HEADER == 20 {
        let difference =
            Difference::address::<F>(old.0, new.0).and(Difference::address::<F>(old.1, new.1));
        let Some(field) = packet.load(l3 + 10) else {
            return false;
        };
        if !packet.store(l3 + 10, difference.apply(field)) {
            return false;
        }
    }
    let src = l3 + F::ADDRESSES as u32;
    store_addr::<F>(packet, src, new.0)
        && store_addr::<F>(packet, src + size_of::<F::Words>() as u32, new.1)
}
