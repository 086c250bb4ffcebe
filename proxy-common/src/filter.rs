//! Letting go of packets that are nobody's Service traffic, without a hash lookup.
//!
//! `filter` is a bitmap in an array map. The agent sets one bit per frontend and one per backend *before* the entry
//! that needs it appears; a clear bit therefore proves that a packet has nothing to do with any frontend or backend,
//! for the price of one multiplication and one cached load. A set bit proves nothing (two tuples may share it): the
//! lookups that follow decide. Bits outlive their entries, so that open flows of deleted ones are still found.

use crate::{family::Family, layout::FILTER_WORDS};

const BITS: u32 = FILTER_WORDS as u32 * 64;
/// Odd, with well-spread bits: the golden ratio, and the square root of three.
const FRONTEND: u64 = 0x9e37_79b9_7f4a_7c15;
const BACKEND: u64 = 0xbb67_ae85_84ca_a73b;

/// The bit of a frontend. A node port uses the unspecified address.
#[inline(always)]
pub fn frontend<F: Family>(addr: F::Words, port: u16, proto: u8) -> u32 {
    bit::<F>(addr, port, proto, FRONTEND)
}

/// The bit of a backend. Differs from the frontend bit of the same address and port.
#[inline(always)]
pub fn backend<F: Family>(addr: F::Words, port: u16, proto: u8) -> u32 {
    bit::<F>(addr, port, proto, BACKEND)
}

/// Multiplicative hashing: the product's highest bits depend on every bit of the tuple. Every packet pays for it, so no more.
#[inline(always)]
fn bit<F: Family>(addr: F::Words, port: u16, proto: u8, factor: u64) -> u32 {
    let tuple = F::fold(addr) ^ u64::from(port) << 32 ^ u64::from(proto) << 48;
    (tuple.wrapping_mul(factor) >> (64 - BITS.ilog2())) as u32
}

/// [`frontend`] for an address in bytes.
pub fn frontend_bit<F: Family>(addr: F::Addr, port: u16, proto: u8) -> u32 {
    frontend::<F>(F::words(addr), port, proto)
}

/// [`backend`] for an address in bytes.
pub fn backend_bit<F: Family>(addr: F::Addr, port: u16, proto: u8) -> u32 {
    backend::<F>(F::words(addr), port, proto)
}

/// Word and mask of a bit in the map.
#[inline(always)]
pub fn word_and_mask(bit: u32) -> (u32, u64) {
    (bit / 64, 1 << (bit % 64))
}
