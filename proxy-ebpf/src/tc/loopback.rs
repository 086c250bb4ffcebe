//! The loopback device: how processes of this node get packets past the kernel's judgement of where
//! these come from.
//!
//! What `bpf_redirect_neigh` sends by the loopback device has its route already, as what processes
//! send to each other: so the kernel judges neither its source, which may be an address of this node,
//! nor the device, which may not be that of the way to the source (strict `rp_filter`).

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::{bpf_redirect_neigh, bpf_skb_change_head, bpf_skb_store_bytes, bpf_skb_vlan_pop},
    programs::TcContext,
};
use shunt_common::{
    packet::{ETHERNET, Headers, Packet},
    verdict::Translation,
};

use super::skb::{Buffer, take_for_us, translate};
use crate::{fib::LOOPBACK, maps::KernelFamily};

/// Whether a process of this node sends the packet: it has come in by no device.
#[inline(always)]
pub(super) fn is_sender(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*ctx.skb.skb).ingress_ifindex == 0 }
}

/// Whether the packet stays on this node, as far as the kernel knows.
#[inline(always)]
pub(super) fn is_looped(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*ctx.skb.skb).ifindex == LOOPBACK }
}

/// Rewrites a packet where it arrives, and gives it to a process of this node if it is for one that
/// dialled by packets.
#[inline(always)]
pub(super) fn arrive<F: KernelFamily>(
    ctx: &TcContext,
    headers: &Headers<F::Words>,
    to: &Translation<F::Words>,
) -> i32 {
    match translate::<F>(ctx, headers, to) {
        TC_ACT_UNSPEC if to.process => loop_back(ctx),
        action => action,
    }
}

/// Gives the packet to the process of this node that it is for, by the loopback device.
#[inline(never)]
pub(super) fn loop_back(ctx: &TcContext) -> i32 {
    // Or the kernel would drop what a bridge's port has got for the bridge: the loopback device
    // leaves that packet as it is, for another host.
    if !as_frame(ctx) || !take_for_us(ctx) {
        return TC_ACT_SHOT;
    }
    // SAFETY: without an address the helper reads nothing; it notes where to send.
    unsafe { bpf_redirect_neigh(LOOPBACK, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Makes the packet one that `bpf_redirect_neigh` takes: behind an Ethernet header, which it
/// replaces, and without a VLAN tag. The header's bytes are zero, because the loopback device
/// leaves them in the sum that a NIC has made of the frame.
#[inline(always)]
pub(super) fn as_frame(ctx: &TcContext) -> bool {
    const ZEROS: [u8; ETHERNET] = [0; ETHERNET];
    // SAFETY: the context is valid while the program runs; the helpers check their arguments.
    unsafe {
        let skb = ctx.skb.skb;
        if Buffer(ctx).link_header() == 0 {
            return bpf_skb_change_head(skb, ETHERNET as u32, 0) == 0;
        }
        ((*skb).vlan_present == 0 || bpf_skb_vlan_pop(skb) == 0)
            && bpf_skb_store_bytes(skb, 0, ZEROS.as_ptr().cast(), ETHERNET as u32, 0) == 0
    }
}
