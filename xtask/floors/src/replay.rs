//! Runs a program again and again on the same packet, or on packets that differ in one field.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_MMAPABLE, xdp_action::XDP_ABORTED},
    btf_maps::{Array, ProgramArray},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};

use crate::wire::set;

/// Words of the packet that are put back: Ethernet, IPv6 and TCP are 74 bytes.
const WORDS: usize = 10;
/// In [`Script::vary`]: all packets of the mask once, in a random order.
const RANDOM: u32 = 1 << 8;
/// Entries of [`PORTS`].
const PORTS_LEN: usize = 65_536;

/// What to play.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Script {
    /// The packet's first bytes.
    packet: [u64; WORDS],
    /// Where the number of the packet is added to a 32-bit word in network order: 0 nowhere, 1 IPv4
    /// source, 2 IPv6 source (last word), 3 IPv4 destination, 4 IPv6 destination; 5 and 6 (IPv4,
    /// IPv6): destination port and the last byte of the source from `ports`. With [`RANDOM`] the
    /// numbers come in an order that no prefetcher foresees.
    vary: u32,
    /// Number of packets before the first comes again, less one; ones from the lowest bit on.
    mask: u32,
    /// Number of the next packet.
    next: u32,
    /// The word that the number is added to, host order.
    base: u32,
}

#[btf_map(name = "script")]
static SCRIPT: Array<Script, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
/// Destination port in the low half, last byte of the source address in the third byte.
#[btf_map(name = "ports")]
static PORTS: Array<u32, PORTS_LEN, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map(name = "xdp_target")]
static XDP_TARGET: ProgramArray<1> = ProgramArray::new();
#[btf_map(name = "tc_target")]
static TC_TARGET: ProgramArray<1> = ProgramArray::new();

#[inline(always)]
fn prepare(start: usize, end: usize) -> bool {
    if start + WORDS * 8 > end {
        return false;
    }
    let Some(script) = SCRIPT.get_ptr_mut(0) else {
        return false;
    };
    let packet = start as *mut u8;
    // SAFETY: the length was checked, and all offsets below lie within; the script is this run's
    // alone.
    unsafe {
        for i in 0..WORDS {
            set(packet, i * 8, (&raw const (*script).packet[i]).read());
        }
        let n = (*script).next;
        (*script).next = n.wrapping_add(1);
        let mut n = n & (*script).mask;
        if (*script).vary & RANDOM != 0 {
            // Each step is one to one on the bits of the mask.
            n ^= n >> 7;
            n = n.wrapping_mul(0x9e37_79b1) & (*script).mask;
            n ^= n >> 5;
        }
        let word = ((*script).base.wrapping_add(n)).to_be();
        match (*script).vary & !RANDOM {
            1 => set(packet, 26, word),
            2 => set(packet, 34, word),
            3 => set(packet, 30, word),
            4 => set(packet, 50, word),
            5 | 6 => {
                let Some(entry) = PORTS.get(n) else {
                    return false;
                };
                let (port, last) = ((*entry as u16).to_be(), (*entry >> 16) as u8);
                if (*script).vary & !RANDOM == 5 {
                    set(packet, 36, port);
                    set(packet, 29, last);
                } else {
                    set(packet, 56, port);
                    set(packet, 37, last);
                }
            }
            _ => {}
        }
    }
    true
}

#[xdp]
fn replay_xdp(ctx: XdpContext) -> u32 {
    if prepare(ctx.data(), ctx.data_end()) {
        // SAFETY: nothing here waits to be dropped.
        unsafe { XDP_TARGET.tail_call(&ctx, 0) };
    }
    XDP_ABORTED
}

#[classifier]
fn replay_tc(ctx: TcContext) -> i32 {
    if prepare(ctx.data(), ctx.data_end()) {
        // SAFETY: nothing here waits to be dropped.
        unsafe { TC_TARGET.tail_call(&ctx, 0) };
    }
    -1000
}

/// The bare hook.
#[xdp]
fn empty_xdp(ctx: XdpContext) -> u32 {
    let _ = ctx.as_ptr();
    2
}

/// The bare hook.
#[classifier]
fn empty_tc(ctx: TcContext) -> i32 {
    let _ = ctx.as_ptr();
    -1
}
