//! The BPF programs: where shunt hooks into the kernel. What they decide is
//! `shunt_common::balance`.
//!
//! [`socket`] at the cgroup hooks, [`tc`] on pod and node devices with host routing as an option,
//! [`xdp`] on node devices, [`maps`] for all of them, [`fib`] for routes, [`subprograms`] for those
//! that packets pass, [`trace`] for those who want to know.
#![no_std]
#![no_main]
// No call of `memset` where a few stores do: BPF has no such function, and ours goes byte by byte.
#![no_builtins]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(
    internal_features,
    reason = "the BPF target's `core` has no compare-and-swap on 32 bits, LLVM does"
)]

mod answers;
mod fib;
mod maps;
mod sender;
mod socket;
mod subprograms;
mod tc;
mod trace;
mod traffic;
mod xdp;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier rejects a program that could get here.
    loop {}
}

/// The kernel lends some helpers to programs with a GPL-compatible licence only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
