//! IPv4 and IPv6 as one type parameter: every map, decision and rewrite is written once over [`Family`].

use core::fmt::Debug;

/// An address family: the address type that its map keys carry.
pub trait Family: Copy + Debug + Eq + 'static {
    /// An address as bytes in reading (network) order, as `bpftool` prints it.
    type Addr: Copy + Debug + Eq + 'static;

    /// `0.0.0.0` or `::`: in a [`FrontendKey`](crate::layout::FrontendKey) "any node address", elsewhere "none".
    const UNSPECIFIED: Self::Addr;

    /// The address folded into 64 bits for hashing; injective for IPv4.
    fn fold(addr: Self::Addr) -> u64;
}

/// Internet Protocol version 4, [RFC 791](https://www.rfc-editor.org/rfc/rfc791).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct V4;

/// Internet Protocol version 6, [RFC 8200](https://www.rfc-editor.org/rfc/rfc8200).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct V6;

impl Family for V4 {
    type Addr = [u8; 4];
    const UNSPECIFIED: [u8; 4] = [0; 4];

    #[inline(always)]
    fn fold(addr: [u8; 4]) -> u64 {
        u64::from(u32::from_ne_bytes(addr))
    }
}

impl Family for V6 {
    type Addr = [u8; 16];
    const UNSPECIFIED: [u8; 16] = [0; 16];

    #[inline(always)]
    fn fold(addr: [u8; 16]) -> u64 {
        let words: [u64; 2] = [
            u64::from_ne_bytes([addr[0], addr[1], addr[2], addr[3], addr[4], addr[5], addr[6], addr[7]]),
            u64::from_ne_bytes([
                addr[8], addr[9], addr[10], addr[11], addr[12], addr[13], addr[14], addr[15],
            ]),
        ];
        // Pods of one node differ in the low half only, nodes in the high half: mix one before they meet.
        words[0].wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ words[1]
    }
}
