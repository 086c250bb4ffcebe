//! Floor programs: what no load balancer of this kind can do without, and nothing else.
//!
//! Each does what the program of `proxy-ebpf` that it stands beside must do at least (parse, the
//! same number of map operations, rewrite, route, redirect) for one kind of packet, TCP without
//! options, straight down. They share shunt's maps, so that both meet the same caches, and nothing
//! of its code but the types of the maps.
//!
//! [`replay`] puts the packet back before each run and calls the program to measure.
#![no_std]
#![no_main]
#![no_builtins]
#![feature(core_intrinsics)]
#![expect(
    internal_features,
    reason = "volatile access without alignment, as packets need it"
)]

mod flow;
mod nat;
mod replay;
mod socket;
mod tc;
mod wire;
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
