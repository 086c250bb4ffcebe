//! What shunt decides, and the map layout that the kernel and the agent share.
//!
//! The crate is `no_std` and has no dependency in the kernel, so the same source is unit-tested on
//! the host and runs as BPF. Read it in this order: [`family`] (addresses), [`layout`] (what is in
//! the maps), [`filter`] (how a packet that is nobody's Service traffic is let go cheaply),
//! [`hash`], [`maglev`] and [`affinity`] (which backend), [`verdict`] (what can become of a
//! packet), [`balance`] (the decision itself), [`failover`] (backends that do not answer),
//! [`packet`] (headers in, headers out), [`slow_path`] (packets that are not plain), [`event`]
//! (what is counted), [`trace`] (what tracers are told).
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    expect(
        internal_features,
        reason = "the BPF target's `core` has no OR and AND on 32 bits, LLVM does"
    )
)]

#[cfg(any(feature = "user", test))]
extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod access;
pub mod address;
pub mod affinity;
pub mod answer_limit;
mod atomic;
pub mod balance;
pub mod checksum;
pub mod crc32c;
pub mod event;
pub mod extension;
pub mod failover;
pub mod family;
pub mod filter;
pub mod hash;
pub mod icmp;
pub mod layout;
#[cfg(any(feature = "user", test))]
pub mod maglev;
pub mod packet;
pub mod reset;
pub mod slow_path;
pub mod snat;
pub mod timeouts;
pub mod trace;
pub mod verdict;
