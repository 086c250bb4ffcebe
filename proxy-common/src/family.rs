//! IPv4 and IPv6 as one type parameter: every map, decision and rewrite is written once over
//! [`Family`].

use core::fmt::Debug;

use crate::layout::{CONFIG_NODEPORT_LOOPBACK4, CONFIG_NODEPORT_LOOPBACK6, Config, FamilyConfig};

/// An address family.
pub trait Family: Copy + Debug + Eq + 'static {
    /// An address as bytes in reading (network) order: what maps are declared with, so that
    /// `bpftool` prints it well.
    type Addr: Copy + Debug + Eq + 'static;
    /// The same bytes as one or two words in memory order: what decisions are made with. LLVM's BPF
    /// back end copies byte arrays through the (small) stack, and compares them as 128-bit values,
    /// which it cannot do.
    type Words: Copy + Debug + Eq + 'static;

    /// `0.0.0.0` or `::`: in a [`FrontendKey`](crate::layout::FrontendKey) "any node address",
    /// elsewhere "none".
    const UNSPECIFIED: Self::Words;
    /// All bits one.
    const ONES: Self::Words;
    /// Ethernet type of the family, host order.
    const ETHERTYPE: u16;
    /// Length of the IP header without options or extensions, in bytes.
    const HEADER: usize;
    /// Offset of the source address in the IP header; the destination follows it.
    const ADDRESSES: usize;
    /// Bit of [`Config::flags`] that says that node ports answer on loopback addresses.
    const NODEPORT_LOOPBACK: u32;

    /// Bytes as words.
    fn words(addr: Self::Addr) -> Self::Words;

    /// Words as bytes.
    fn bytes(words: Self::Words) -> Self::Addr;

    /// The address as an IPv6 socket shows it: IPv4 ones mapped (`::ffff:a.b.c.d`).
    fn mapped(words: Self::Words) -> Words6;
    /// The address that [`mapped`](Self::mapped) was asked for.
    fn unmapped(mapped: Words6) -> Self::Words;

    /// The address folded into 64 bits for hashing; injective for IPv4.
    fn fold(addr: Self::Words) -> u64;

    /// Sum of the address's 32-bit words, for [`crate::checksum`].
    fn sum(addr: Self::Words) -> u64;

    /// `addr & mask`.
    fn mask(addr: Self::Words, mask: Self::Words) -> Self::Words;

    /// The network that an address's owner may have all of: a `/24` or a `/64`.
    fn network(addr: Self::Words) -> u64;

    /// Whether the address is a loopback address (`127.0.0.0/8`, `::1`).
    fn is_loopback(addr: Self::Words) -> bool;

    /// Whether no single machine can be told by the address: multicast, broadcast, unspecified and
    /// loopback ones.
    fn is_group(addr: Self::Words) -> bool;

    /// This family's part of the configuration.
    fn config(config: &Config) -> &FamilyConfig<Self::Addr>;
}

/// What stands before an IPv4 address in an IPv6 one: bytes 8 to 11 of `::ffff:0:0`, in memory order.
pub const MAPPED: u32 = 0xffffu32.to_be();

/// Internet Protocol version 4, [RFC 791](https://www.rfc-editor.org/rfc/rfc791).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct V4;

/// Internet Protocol version 6, [RFC 8200](https://www.rfc-editor.org/rfc/rfc8200).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct V6;

/// An IPv6 address as words in memory order. Two fields, because rustc keeps pairs in registers:
/// see [`Family::Words`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Words6 {
    /// Bytes 0 to 7.
    pub high: u64,
    /// Bytes 8 to 15.
    pub low: u64,
}

impl Family for V4 {
    type Addr = [u8; 4];
    type Words = u32;
    const UNSPECIFIED: u32 = 0;
    const ONES: u32 = u32::MAX;
    const ETHERTYPE: u16 = 0x0800;
    const HEADER: usize = 20;
    const ADDRESSES: usize = 12;
    const NODEPORT_LOOPBACK: u32 = CONFIG_NODEPORT_LOOPBACK4;

    #[inline(always)]
    fn words(addr: [u8; 4]) -> u32 {
        u32::from_ne_bytes(addr)
    }

    #[inline(always)]
    fn bytes(words: u32) -> [u8; 4] {
        words.to_ne_bytes()
    }

    #[inline(always)]
    fn unmapped(mapped: Words6) -> u32 {
        (mapped.low >> 32) as u32
    }

    #[inline(always)]
    fn mapped(addr: u32) -> Words6 {
        Words6 {
            high: 0,
            low: u64::from(MAPPED) | u64::from(addr) << 32,
        }
    }

    #[inline(always)]
    fn fold(addr: u32) -> u64 {
        u64::from(addr)
    }

    #[inline(always)]
    fn sum(addr: u32) -> u64 {
        u64::from(addr)
    }

    #[inline(always)]
    fn mask(addr: u32, mask: u32) -> u32 {
        addr & mask
    }

    #[inline(always)]
    fn network(addr: u32) -> u64 {
        u64::from(addr & u32::from_ne_bytes([255, 255, 255, 0]))
    }

    #[inline(always)]
    fn is_loopback(addr: u32) -> bool {
        addr.to_ne_bytes()[0] == 127
    }

    #[inline(always)]
    fn is_group(addr: u32) -> bool {
        let first = addr.to_ne_bytes()[0];
        first >= 224 || first == 0 || first == 127
    }

    #[inline(always)]
    fn config(config: &Config) -> &FamilyConfig<[u8; 4]> {
        &config.v4
    }
}

impl Family for V6 {
    type Addr = [u8; 16];
    type Words = Words6;
    const UNSPECIFIED: Words6 = Words6 { high: 0, low: 0 };
    const ONES: Words6 = Words6 {
        high: u64::MAX,
        low: u64::MAX,
    };
    const ETHERTYPE: u16 = 0x86dd;
    const HEADER: usize = 40;
    const ADDRESSES: usize = 8;
    const NODEPORT_LOOPBACK: u32 = CONFIG_NODEPORT_LOOPBACK6;

    #[inline(always)]
    fn words(x: [u8; 16]) -> Words6 {
        Words6 {
            high: u64::from_ne_bytes([x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]]),
            low: u64::from_ne_bytes([x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15]]),
        }
    }

    #[inline(always)]
    fn bytes(words: Words6) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&words.high.to_ne_bytes());
        bytes[8..].copy_from_slice(&words.low.to_ne_bytes());
        bytes
    }

    #[inline(always)]
    fn unmapped(mapped: Words6) -> Words6 {
        mapped
    }

    #[inline(always)]
    fn mapped(addr: Words6) -> Words6 {
        addr
    }

    #[inline(always)]
    fn fold(addr: Words6) -> u64 {
        // Pods of one node differ in the low half only, nodes in the high half: mix one before they
        // meet.
        addr.high
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
            ^ addr.low
    }

    #[inline(always)]
    fn sum(addr: Words6) -> u64 {
        let half = |word: u64| (word & 0xffff_ffff) + (word >> 32);
        half(addr.high) + half(addr.low)
    }

    #[inline(always)]
    fn mask(addr: Words6, mask: Words6) -> Words6 {
        Words6 {
            high: addr.high & mask.high,
            low: addr.low & mask.low,
        }
    }

    #[inline(always)]
    fn network(addr: Words6) -> u64 {
        addr.high
    }

    #[inline(always)]
    fn is_loopback(addr: Words6) -> bool {
        addr.high == 0 && addr.low == 1u64.to_be()
    }

    #[inline(always)]
    fn is_group(addr: Words6) -> bool {
        addr.high.to_ne_bytes()[0] == 0xff
            || (addr.high == 0 && (addr.low == 0 || addr.low == 1u64.to_be()))
    }

    #[inline(always)]
    fn config(config: &Config) -> &FamilyConfig<[u8; 16]> {
        &config.v6
    }
}
