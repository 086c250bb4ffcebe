//! Incremental Internet checksums, [RFC 1624](https://www.rfc-editor.org/rfc/rfc1624) equation 3.
//!
//! Sums are over words as they stand in memory: the one's complement sum does not care for byte
//! order (RFC 1071).

use crate::family::Family;

/// A one's complement difference, not yet folded: what a checksum's field must take up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference(u64);

impl Difference {
    /// An address that becomes another.
    #[inline(always)]
    pub fn address<F: Family>(old: F::Words, new: F::Words) -> Self {
        // Each complemented 32-bit word adds 2^32 - 1, which is zero in one's complement:
        // subtracting the sum from a multiple of it large enough never borrows.
        Self((u64::from(u32::MAX) << 8) - F::sum(old) + F::sum(new))
    }

    /// A port (host order) that becomes another.
    #[inline(always)]
    pub fn port(old: u16, new: u16) -> Self {
        Self(u64::from(!old.to_be()) + u64::from(new.to_be()))
    }

    /// A 16-bit word, as it stands in memory, that becomes another.
    #[inline(always)]
    pub fn word(old: u16, new: u16) -> Self {
        Self(u64::from(!old) + u64::from(new))
    }

    /// A 32-bit word, as it stands in memory, that becomes another.
    #[inline(always)]
    pub fn word32(old: u32, new: u32) -> Self {
        Self(u64::from(!old) + u64::from(new))
    }

    /// Both together.
    #[inline(always)]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// Folded to 32 bits, as `bpf_l4_csum_replace` takes it.
    #[inline(always)]
    pub fn fold32(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((sum & 0xffff_ffff) + (sum >> 32)) as u32
    }

    /// A checksum field (as it stands in memory) brought up to date.
    #[inline(always)]
    pub fn apply(self, field: u16) -> u16 {
        !fold(self.0 + u64::from(!field))
    }
}

/// Folds a sum of words to 16 bits.
#[inline(always)]
pub fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::family::{V4, V6};

    fn full(bytes: &[u8]) -> u16 {
        !fold(
            bytes
                .chunks(2)
                .map(|c| u64::from(u16::from_ne_bytes([c[0], *c.get(1).unwrap_or(&0)])))
                .sum(),
        )
    }

    /// 0 and 0xffff are both zero in one's complement.
    fn same(a: u16, b: u16) -> bool {
        a == b || (a == 0 && b == 0xffff) || (a == 0xffff && b == 0)
    }

    proptest! {
        #[test]
        fn incremental_equals_full(
            old: [u8; 16], new: [u8; 16], old4: [u8; 4], new4: [u8; 4], ports: (u16, u16), rest: Vec<u16>,
        ) {
            let message = |six: [u8; 16], four: [u8; 4], port: u16| {
                let mut bytes: Vec<u8> = six.into_iter().chain(four).chain(port.to_be_bytes()).collect();
                rest.iter().for_each(|w| bytes.extend(w.to_be_bytes()));
                full(&bytes)
            };
            let difference = Difference::address::<V6>(V6::words(old), V6::words(new))
                .and(Difference::address::<V4>(V4::words(old4), V4::words(new4)))
                .and(Difference::port(ports.0, ports.1));
            let updated = difference.apply(message(old, old4, ports.0));
            prop_assert!(same(updated, message(new, new4, ports.1)));
            prop_assert!(same(!fold(u64::from(difference.fold32()) + u64::from(!message(old, old4, ports.0))), updated));
        }
    }
}
