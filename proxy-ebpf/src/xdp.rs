//! XDP on node devices: packets from the network, before the kernel makes a socket buffer of them.
//!
//! A packet whose receiver is on another node is rewritten in full and sent on from here; one for
//! this node is rewritten and passed up; whatever the kernel must help with (no neighbour yet, no
//! route, too big, last hop) is passed up untouched, and tc finds the same flow there.

use core::arch::asm;

use aya_ebpf::{
    EbpfContext,
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    helpers::{bpf_fib_lookup, bpf_redirect, bpf_xdp_adjust_head, bpf_xdp_adjust_tail},
    macros::xdp,
    programs::XdpContext,
};
use shunt_common::{
    balance::{Maps, established, undecided},
    event::Event,
    family::{Family, V4, V6},
    icmp,
    packet::{self, ETHERNET, Headers, Packet, Tuple},
    reset,
    verdict::{Arrival, InScratch, Lookup, Origin, Translation, Verdict},
};

use crate::{
    fib::FibLookup,
    maps::{KernelFamily, KernelMaps, Xdp, count},
    subprograms::PacketHook,
    traffic,
};

/// A frame in the driver's memory.
struct Frame<'a>(&'a XdpContext);

impl Packet for Frame<'_> {
    #[inline(always)]
    fn bytes(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let start = self.0.data() + offset;
        (start + len <= self.0.data_end()).then_some(start as *mut u8)
    }
}

impl Frame<'_> {
    /// The frame's length in bytes.
    #[inline(always)]
    fn len(&self) -> usize {
        let (start, end): (usize, usize);
        // SAFETY: two moves between registers. They hide from LLVM that the context's fields are 32
        // bits wide, or it would spill half of what the verifier knows to be a pointer.
        unsafe {
            asm!("{0} = {1}", out(reg) start, in(reg) self.0.data(), options(nomem, nostack));
            asm!("{0} = {1}", out(reg) end, in(reg) self.0.data_end(), options(nomem, nostack));
        }
        end - start
    }
}

/// Packets from the network.
#[xdp]
fn xdp_node(ctx: XdpContext) -> u32 {
    match packet::ethertype(&Frame(&ctx)) {
        Some(V4::ETHERTYPE) => whole::<V4>(&ctx, Step::of(node4(&ctx))),
        Some(V6::ETHERTYPE) => whole::<V6>(&ctx, Step::of(node6(&ctx))),
        _ => XDP_PASS,
    }
}

// One function per family: each has a BPF stack of its own.
#[inline(never)]
fn node4(ctx: &XdpContext) -> u32 {
    node::<V4>(ctx)
}

#[inline(never)]
fn node6(ctx: &XdpContext) -> u32 {
    node::<V6>(ctx)
}

/// The path of almost all packets: of flows that are open, and of no Service. For the others it
/// says which step is next.
///
/// That step is taken by [`whole`] and not here, where every packet would pay for its locals.
#[inline(always)]
fn node<F: KernelFamily>(ctx: &XdpContext) -> u32 {
    let Some(headers) = packet::parse::<F>(&Frame(ctx), ETHERNET) else {
        return XDP_PASS;
    };
    let maps = KernelMaps::<Xdp>::new(ctx.as_ptr());
    match established::<F, _>(&maps, &arrival(&headers)) {
        Lookup::Unmatched => XDP_PASS,
        Lookup::Translate(to) => translate::<F>(ctx, &headers, &to),
        Lookup::Undecided => UNDECIDED,
    }
}

#[inline(always)]
fn arrival<A: Copy>(headers: &Headers<A>) -> Arrival<A> {
    let Headers {
        tuple, tcp_flags, ..
    } = *headers;
    Arrival {
        tuple,
        tcp_flags,
        origin: Origin::Network,
        sends_on: true,
    }
}

#[inline(always)]
fn translate<F: KernelFamily>(
    ctx: &XdpContext,
    headers: &Headers<F::Words>,
    to: &Translation<F::Words>,
) -> u32 {
    if to.local {
        rewrite::<F>(ctx, headers, &to.tuple);
        count_traffic(ctx, to);
        XDP_PASS
    } else {
        send_on::<F>(ctx, headers, to)
    }
}

#[inline(always)]
fn count_traffic<A: Copy>(ctx: &XdpContext, to: &Translation<A>) {
    traffic::count(to.counted, 1, (Frame(ctx).len() - ETHERNET) as u32);
}

/// What [`node`] says of a packet that may open a flow; no action has this number.
const UNDECIDED: u32 = u32::MAX;

/// What is next for a packet, after [`node`].
enum Step {
    /// This action.
    End(u32),
    /// It may open a flow.
    Undecided,
}

impl Step {
    #[inline(always)]
    fn of(number: u32) -> Self {
        match number {
            UNDECIDED => Self::Undecided,
            action => Self::End(action),
        }
    }
}

/// The action, after the step that is next.
#[inline(always)]
fn whole<F: KernelFamily>(ctx: &XdpContext, step: Step) -> u32 {
    match step {
        Step::End(action) => action,
        Step::Undecided => {
            let action = open::<F>(ctx);
            Xdp::tell::<F>(ctx.as_ptr());
            action
        }
    }
}

/// A packet that may open a flow.
#[inline(never)]
fn open<F: KernelFamily>(ctx: &XdpContext) -> u32 {
    let Some(headers) = packet::parse::<F>(&Frame(ctx), ETHERNET) else {
        return XDP_PASS;
    };
    let maps = KernelMaps::<Xdp>::new(ctx.as_ptr());
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return XDP_PASS;
    };
    match undecided::<F, _>(&maps, scratch, &arrival(&headers)) {
        Verdict::Pass => XDP_PASS,
        Verdict::Drop => XDP_DROP,
        Verdict::Refuse => refuse::<F>(ctx, &headers),
        Verdict::Reset => reset::<F>(ctx, &headers),
        Verdict::Translate(InScratch) => deliver::<F>(ctx),
    }
}

/// Sends the first packet of a flow where [`open`] has found that it goes.
// A function of its own, which reads the headers once more: its locals and those of the search for
// a backend are too many for one stack where the kernel rounds every frame up to 32 bytes (before
// 6.8).
#[inline(never)]
fn deliver<F: KernelFamily>(ctx: &XdpContext) -> u32 {
    let Some(headers) = packet::parse::<F>(&Frame(ctx), ETHERNET) else {
        return XDP_PASS;
    };
    let maps = KernelMaps::<Xdp>::new(ctx.as_ptr());
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return XDP_PASS;
    };
    let translation = scratch.translation;
    translate::<F>(ctx, &headers, &translation)
}

/// Writes the new tuple; every offset was checked when the headers were read, so it does not fail.
#[inline(always)]
fn rewrite<F: Family>(
    ctx: &XdpContext,
    headers: &Headers<F::Words>,
    new: &Tuple<F::Words>,
) -> bool {
    let frame = Frame(ctx);
    packet::update_checksum::<F>(&frame, headers, new)
        && packet::write_tuple::<F>(&frame, headers, new)
}

/// Sends the frame out of a device.
// Not `XDP_TX`, though the device is the one it came from: a veth leaves such frames in its peer's
// ring until something else wakes the peer, unless the peer runs XDP too.
#[inline(always)]
fn send(device: u32) -> u32 {
    // SAFETY: the helper only notes where to send.
    unsafe { bpf_redirect(device, 0) as u32 }
}

/// Routes the packet by the kernel's tables and sends it, if it can be sent from here.
#[inline(always)]
fn send_on<F: KernelFamily>(
    ctx: &XdpContext,
    headers: &Headers<F::Words>,
    to: &Translation<F::Words>,
) -> u32 {
    let new = &to.tuple;
    let frame = Frame(ctx);
    let ingress = ctx.ingress_ifindex() as u32;
    let mut fib = FibLookup::new::<F>(new, (frame.len() - ETHERNET) as u16, ingress);
    // SAFETY: `fib` has the size and layout of the kernel's struct.
    let routed = unsafe {
        bpf_fib_lookup(
            ctx.as_ptr(),
            (&raw mut fib).cast(),
            size_of::<FibLookup>() as i32,
            0,
        )
    };
    // Another device may lack the means to send XDP frames, and would lose them without a word.
    if routed != 0 || fib.ifindex != ingress || !packet::decrement_hops::<F>(&frame, headers.l3) {
        count(Event::XdpToTc);
        return XDP_PASS;
    }
    if !rewrite::<F>(ctx, headers, new) {
        count(Event::RewriteFailed);
        return XDP_DROP;
    }
    let Some(ethernet) = frame.bytes(0, ETHERNET) else {
        return XDP_DROP;
    };
    // SAFETY: 14 bytes were checked, and frames start at even addresses.
    unsafe {
        let ethernet = ethernet.cast::<u16>();
        for i in 0..3 {
            ethernet.add(i).write_volatile(fib.macs[3 + i]);
            ethernet.add(3 + i).write_volatile(fib.macs[i]);
        }
    }
    count_traffic(ctx, to);
    send(ingress)
}

/// Whether the frame is for another host, as far as is known: the device by which the answer would
/// leave is this one, and has another address than the frame is for.
#[inline(always)]
fn is_foreign<F: KernelFamily>(ctx: &XdpContext, headers: &Headers<F::Words>) -> bool {
    let Tuple { src, dst, .. } = headers.tuple;
    let ingress = ctx.ingress_ifindex() as u32;
    let back = Tuple {
        src: dst,
        dst: src,
        ..headers.tuple
    };
    let mut fib = FibLookup::new::<F>(&back, 0, ingress);
    // SAFETY: `fib` has the size and layout of the kernel's struct.
    let routed = unsafe {
        bpf_fib_lookup(
            ctx.as_ptr(),
            (&raw mut fib).cast(),
            size_of::<FibLookup>() as i32,
            0,
        )
    };
    let frame = Frame(ctx);
    let Some(ethernet) = frame.bytes(0, ETHERNET) else {
        return true;
    };
    // SAFETY: 14 bytes were checked, and frames start at even addresses.
    unsafe {
        let to = ethernet.cast::<u16>();
        let is_other = |i: usize| to.add(i).read_volatile() != fib.macs[i];
        routed == 0 && fib.ifindex == ingress && (is_other(0) || is_other(1) || is_other(2))
    }
}

/// Whether the frame is for a group of hosts: broadcast and multicast.
#[inline(always)]
fn is_to_group(ctx: &XdpContext) -> bool {
    let frame = Frame(ctx);
    // SAFETY: the bytes were checked.
    frame
        .bytes(0, ETHERNET)
        .is_none_or(|ethernet| unsafe { ethernet.cast::<u8>().read_volatile() } & 1 != 0)
}

/// Takes the right to answer a packet.
#[inline(always)]
fn may_answer<F: KernelFamily>(ctx: &XdpContext, headers: &Headers<F::Words>) -> bool {
    Maps::<F>::may_answer(&KernelMaps::<Xdp>::new(ctx.as_ptr()), &headers.tuple)
}

/// Turns the packet into its refusal and sends it back.
#[inline(never)]
fn refuse<F: KernelFamily>(ctx: &XdpContext, headers: &Headers<F::Words>) -> u32 {
    if is_to_group(ctx) || is_foreign::<F>(ctx, headers) {
        return XDP_PASS;
    }
    if !may_answer::<F>(ctx, headers) {
        return XDP_DROP;
    }
    let quote = icmp::quote_len(headers);
    let surplus = (ETHERNET + quote) as i32 - Frame(ctx).len() as i32;
    // SAFETY: both helpers check their arguments against the frame; pointers are taken anew
    // afterwards.
    unsafe {
        if surplus > 0
            || bpf_xdp_adjust_tail(ctx.ctx, surplus) != 0
            || bpf_xdp_adjust_head(ctx.ctx, -(icmp::prefix_len::<F>() as i32)) != 0
        {
            return XDP_DROP;
        }
    }
    let frame = Frame(ctx);
    let prefix = icmp::prefix_len::<F>();
    let (Some(old), Some(new)) = (frame.bytes(prefix, ETHERNET), frame.bytes(0, ETHERNET)) else {
        return XDP_DROP;
    };
    // SAFETY: both were checked for 14 bytes, and lie at least 28 bytes apart.
    unsafe {
        new.cast::<[u8; ETHERNET]>()
            .write_unaligned(old.cast::<[u8; ETHERNET]>().read_unaligned())
    };
    if !icmp::port_unreachable::<F>(&frame, headers, quote) {
        return XDP_DROP;
    }
    send(ctx.ingress_ifindex() as u32)
}

/// Turns the segment into its reset and sends it back.
#[inline(never)]
fn reset<F: KernelFamily>(ctx: &XdpContext, headers: &Headers<F::Words>) -> u32 {
    if is_to_group(ctx) || is_foreign::<F>(ctx, headers) {
        return XDP_PASS;
    }
    if !may_answer::<F>(ctx, headers) {
        return XDP_DROP;
    }
    let surplus = reset::len(headers) as i32 - Frame(ctx).len() as i32;
    if surplus > 0
        // SAFETY: the helper checks its argument against the frame; pointers are taken anew
        // afterwards.
        || unsafe { bpf_xdp_adjust_tail(ctx.ctx, surplus) } != 0
        || !reset::reset::<F>(&Frame(ctx), headers)
    {
        return XDP_DROP;
    }
    send(ctx.ingress_ifindex() as u32)
}
