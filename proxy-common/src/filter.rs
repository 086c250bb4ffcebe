//! Letting go of packets that are nobody's Service traffic, without a hash lookup.
//!
//! `filter` is a bitmap in an array map. The agent sets the bits of a frontend and of a backend
//! *before* the entry that needs them appears; a clear bit therefore proves that a packet has
//! nothing to do with any frontend or backend, for the price of one multiplication and one cached
//! load. A set bit proves nothing (two things may share it): the lookups that follow decide. Bits
//! outlive their entries, so that open flows of deleted ones are still found, but for those that are
//! [lent](stale). `clients` is the same
//! for the clients of flows, set by the programs.
//!
//! What every packet asks for depends on an address alone ([`service`], [`client`]) or a port alone
//! ([`node_port`], [`backend_port`]): a bit that is hashed from a client's port lies on another
//! cache line, and another page, for every connection, and costs ten times as much.

use crate::{
    family::Family,
    layout::{CLIENT_WORDS, FILTER_HASHED_WORDS},
};

const BITS: u32 = FILTER_HASHED_WORDS as u32 * 64;
const CLIENT_BITS: u32 = CLIENT_WORDS as u32 * 64;
/// Odd, with well-spread bits: the golden ratio, and the square roots of primes.
const FRONTEND: u64 = 0x9e37_79b9_7f4a_7c15;
const BACKEND: u64 = 0xbb67_ae85_84ca_a73b;
const SERVICE: u64 = 0x3c6e_f372_fe94_f82b;
const CLIENT: u64 = 0xa54f_f53a_5f1d_36f1;
const UNCONFIRMED: u64 = 0x510e_527f_ade6_82d1;
const TRANSLATED: u64 = 0x9b05_688c_2b3e_6c1f;
const STALE: u64 = 0x1f83_d9ab_fb41_bd6b;

/// The bit of a frontend that has an address of its own.
#[inline(always)]
pub fn frontend<F: Family>(addr: F::Words, port: u16, proto: u8) -> u32 {
    hash(tuple::<F>(addr, port, proto), FRONTEND, BITS)
}

/// The bit of a backend. Differs from the frontend bit of the same address and port.
#[inline(always)]
pub fn backend<F: Family>(addr: F::Words, port: u16, proto: u8) -> u32 {
    hash(tuple::<F>(addr, port, proto), BACKEND, BITS)
}

/// The bit of a backend that is gone while sockets are connected to it, by the socket hook's choice.
/// As long as they are, its address has the bit of [`service`] too.
#[inline(always)]
pub fn stale<F: Family>(addr: F::Words, port: u16, proto: u8) -> u32 {
    hash(tuple::<F>(addr, port, proto), STALE, BITS)
}

/// The bit of an address that frontends have, whatever their ports.
#[inline(always)]
pub fn service<F: Family>(addr: F::Words) -> u32 {
    hash(F::fold(addr), SERVICE, BITS)
}

/// The bit of a node port of any protocol: no hash, so no mistake.
#[inline(always)]
pub fn node_port(port: u16) -> u32 {
    BITS + u32::from(port)
}

/// The bit of a port that backends have, of any protocol.
#[inline(always)]
pub fn backend_port(port: u16) -> u32 {
    BITS + (1 << 16) + u32::from(port)
}

/// The bit in `clients` of a client that has, or had, flows in the connection tables.
#[inline(always)]
pub fn client<F: Family>(addr: F::Words) -> u32 {
    hash(F::fold(addr), CLIENT, CLIENT_BITS)
}

/// The bit in `clients` of a client that has, or had, flows in `unconfirmed`.
#[inline(always)]
pub fn unconfirmed<F: Family>(addr: F::Words) -> u32 {
    hash(F::fold(addr), UNCONFIRMED, CLIENT_BITS)
}

/// The bit in `clients` of an address that is, or was, one side of a translated source: a client's,
/// or that which was put in its place.
#[inline(always)]
pub fn translated<F: Family>(addr: F::Words) -> u32 {
    hash(F::fold(addr), TRANSLATED, CLIENT_BITS)
}

#[inline(always)]
fn tuple<F: Family>(addr: F::Words, port: u16, proto: u8) -> u64 {
    F::fold(addr) ^ u64::from(port) << 32 ^ u64::from(proto) << 48
}

/// Multiplicative hashing: the product's highest bits depend on every bit. Every packet pays for
/// it, so no more.
#[inline(always)]
fn hash(what: u64, factor: u64, bits: u32) -> u32 {
    (what.wrapping_mul(factor) >> (64 - bits.ilog2())) as u32
}

/// Word and mask of a bit in the map.
#[inline(always)]
pub fn word_and_mask(bit: u32) -> (u32, u64) {
    (bit / 64, 1 << (bit % 64))
}
