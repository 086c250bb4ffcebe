//! Packets that become their own answer: refusals and resets.

use aya_ebpf::{
    EbpfContext,
    bindings::TC_ACT_SHOT,
    helpers::{bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail},
    programs::TcContext,
};
use shunt_common::{
    balance::Maps,
    icmp,
    packet::{Headers, Packet},
    reset,
    verdict::{Direction, Origin},
};

use super::{
    loopback,
    skb::{Buffer, PACKET_BROADCAST, PACKET_HOST, PACKET_MULTICAST},
};
use crate::maps::{KernelFamily, KernelMaps, Tc};

/// `bpf_skb_adjust_room`: between the MAC and the network header (an enum that the bindings lack).
const BPF_ADJ_ROOM_MAC: u32 = 1;

/// Takes the right to answer a packet.
#[inline(always)]
fn may_answer<F: KernelFamily>(ctx: &TcContext, headers: &Headers<F::Words>) -> bool {
    // What a process is told leaves no device.
    loopback::is_sender(ctx)
        || Maps::<F>::may_answer(&KernelMaps::<Tc>::new(ctx.as_ptr()), &headers.tuple)
}

/// Turns the packet into its refusal and sends it back through the device it came from.
#[inline(never)]
pub(super) fn refuse<F: KernelFamily>(ctx: &TcContext, headers: &Headers<F::Words>) -> i32 {
    if !may_answer::<F>(ctx, headers) {
        return TC_ACT_SHOT;
    }
    let quote = icmp::quote_len(headers);
    let prefix = icmp::prefix_len::<F>() as i32;
    // SAFETY: the helpers check their arguments against the buffer; pointers are taken anew
    // afterwards.
    unsafe {
        if bpf_skb_change_tail(ctx.skb.skb, (Buffer(ctx).link_header() + quote) as u32, 0) != 0
            || bpf_skb_adjust_room(ctx.skb.skb, prefix, BPF_ADJ_ROOM_MAC, 0) != 0
        {
            return TC_ACT_SHOT;
        }
    }
    if !icmp::port_unreachable::<F>(&Buffer(ctx), headers, quote) {
        return TC_ACT_SHOT;
    }
    send_back(ctx)
}

/// Turns the segment into its reset and sends it back through the device it came from.
#[inline(never)]
pub(super) fn reset<F: KernelFamily>(ctx: &TcContext, headers: &Headers<F::Words>) -> i32 {
    if !may_answer::<F>(ctx, headers) {
        return TC_ACT_SHOT;
    }
    // SAFETY: the helper checks its arguments against the buffer; pointers are taken anew
    // afterwards.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, reset::len(headers) as u32, 0) } != 0
        || !reset::reset::<F>(&Buffer(ctx), headers)
    {
        return TC_ACT_SHOT;
    }
    send_back(ctx)
}

/// Sends an answer to where the packet came from that it was.
#[inline(always)]
fn send_back(ctx: &TcContext) -> i32 {
    if loopback::is_sender(ctx) {
        return loopback::loop_back(ctx);
    }
    // SAFETY: the context is valid while the program runs; the helper only notes where to send.
    unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) as i32 }
}

/// Whether the frame is one that this node may answer (SPEC H4): not one to a group, nor, from the
/// network, one for another host that this device only sees. A pod's goes to its bridge, whose
/// address its own device does not have.
#[inline(always)]
pub(super) fn is_to_us(ctx: &TcContext, direction: Direction) -> bool {
    // SAFETY: the context is valid while the program runs.
    let packet_type = unsafe { (*ctx.skb.skb).pkt_type };
    match direction {
        Direction::Egress | Direction::Ingress(Origin::Process) => true,
        Direction::Ingress(Origin::Network) => packet_type == PACKET_HOST,
        Direction::Ingress(Origin::Pod) => {
            !matches!(packet_type, PACKET_BROADCAST | PACKET_MULTICAST)
        }
    }
}
