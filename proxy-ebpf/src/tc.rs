//! tc on pod and node devices: packets of senders that no socket hook sees, forwarded traffic, and replies.
//!
//! Only addresses and ports change here; routing, neighbours and netfilter stay the kernel's, unless there is a fast path
//! ([`fast`]).

use core::mem::MaybeUninit;

use aya_ebpf::{
    EbpfContext, Global,
    bindings::{BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail,
        bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    macros::classifier,
    programs::TcContext,
};
use shunt_common::{
    access::{Access, Number},
    balance::{Arrival, Counted, From, Maps, Outcome, Quick, Translation, answering, established, refused, undecided},
    checksum::Difference,
    event::Event,
    family::{Family, V4, V6},
    icmp,
    layout::UDP,
    odd::{self, Fate, Place},
    packet::{self, ETHERNET, Headers, Packet, Tuple},
    reset,
};

use crate::{
    fast::{self, FastFamily},
    maps::{KernelFamily, KernelMaps, Tc, count},
    traffic,
};

/// `bpf_skb_adjust_room`: between the MAC and the network header (an enum that the bindings lack).
const BPF_ADJ_ROOM_MAC: u32 = 1;
/// Ethernet, the longest IPv4 header and a TCP header without options: all that is ever read.
const HEADERS: usize = ETHERNET + 60 + 20;

/// The linear part of a socket buffer.
pub(crate) struct Buffer<'a>(pub(crate) &'a TcContext);

impl Packet for Buffer<'_> {
    #[inline(always)]
    fn bytes(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let start = self.0.data() + offset;
        (start + len <= self.0.data_end()).then_some(start as *mut u8)
    }
}

impl Access for Buffer<'_> {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn load<T: Number>(&self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        let (skb, to) = (self.0.skb.skb.cast_const().cast(), value.as_mut_ptr().cast());
        // SAFETY: the helper writes all of the value's bytes or says that it did not; a number may be any bytes.
        unsafe { (bpf_skb_load_bytes(skb, offset, to, size_of::<T>() as u32) == 0).then(|| value.assume_init()) }
    }

    #[inline(always)]
    fn store<T: Number>(&self, offset: u32, value: T) -> bool {
        let from = (&raw const value).cast();
        // SAFETY: the helper reads the value's bytes, and checks the offset.
        unsafe { bpf_skb_store_bytes(self.0.skb.skb, offset, from, size_of::<T>() as u32, 0) == 0 }
    }

    #[inline(always)]
    fn replace_checksum(&self, offset: u32, addresses: Difference, ports: Difference, or_none: bool) -> bool {
        let v6 = family(self.0) == Some(V6::ETHERTYPE);
        if or_none && self.load::<u16>(offset) == Some(0) {
            self.changed(if v6 { addresses.and(ports) } else { ports });
            return true;
        }
        // SAFETY: the helper checks the offset.
        replace_addresses(self.0, offset, addresses, v6, or_none)
            && unsafe { bpf_l4_csum_replace(self.0.skb.skb, offset, 0, ports.fold32().into(), none(or_none)) == 0 }
    }

    #[inline(always)]
    fn changed(&self, difference: Difference) {
        // SAFETY: the helper has no preconditions. It says no where nobody summed the packet up, which is as well.
        unsafe { bpf_csum_update(self.0.skb.skb, difference.fold32()) };
    }
}

/// [`BPF_F_IPV6`](https://docs.kernel.org/bpf/) where the kernel has it, set when the programs are loaded.
#[unsafe(no_mangle)]
static CSUM_IPV6: Global<u32> = Global::new(0);

/// Flags for a checksum that may be zero, which means none and must neither be updated nor arise.
#[inline(always)]
fn none(or_none: bool) -> u64 {
    if or_none { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 }
}

/// Brings a transport checksum up to date with new addresses.
#[inline(always)]
fn replace_addresses(ctx: &TcContext, offset: u32, addresses: Difference, v6: bool, or_none: bool) -> bool {
    let mut flags = none(or_none) | u64::from(BPF_F_PSEUDO_HDR);
    let known = CSUM_IPV6.load();
    if v6 {
        flags |= u64::from(known);
    }
    // SAFETY: the helpers check the offset, and say no where nobody summed the packet up, which is as well.
    unsafe {
        let done = bpf_l4_csum_replace(ctx.skb.skb, offset, 0, addresses.fold32().into(), flags) == 0;
        if v6 && known == 0 {
            // The helper has taken from the packet's sum what an IPv4 header's checksum makes up for.
            bpf_csum_update(ctx.skb.skb, addresses.fold32());
        }
        done
    }
}

/// Packets from the network.
#[classifier]
fn tc_node_in(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => whole::<V4>(&ctx, Place::In(From::Network), node_in4(&ctx)),
        Some(V6::ETHERTYPE) => whole::<V6>(&ctx, Place::In(From::Network), node_in6(&ctx)),
        _ => TC_ACT_UNSPEC,
    }
}

/// Packets to the network.
#[classifier]
fn tc_node_out(ctx: TcContext) -> i32 {
    out(&ctx)
}

/// Packets from a pod.
#[classifier]
fn tc_pod_in(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => whole::<V4>(&ctx, Place::In(From::Pod), pod_in4(&ctx)),
        Some(V6::ETHERTYPE) => whole::<V6>(&ctx, Place::In(From::Pod), pod_in6(&ctx)),
        _ => TC_ACT_UNSPEC,
    }
}

/// Packets to a pod.
#[classifier]
fn tc_pod_out(ctx: TcContext) -> i32 {
    out(&ctx)
}

// One function per family and place: each has a BPF stack of its own.
#[inline(never)]
fn node_in4(ctx: &TcContext) -> i32 {
    handle::<V4>(ctx, Place::In(From::Network))
}

#[inline(never)]
fn node_in6(ctx: &TcContext) -> i32 {
    handle::<V6>(ctx, Place::In(From::Network))
}

#[inline(never)]
fn pod_in4(ctx: &TcContext) -> i32 {
    handle::<V4>(ctx, Place::In(From::Pod))
}

#[inline(never)]
fn pod_in6(ctx: &TcContext) -> i32 {
    handle::<V6>(ctx, Place::In(From::Pod))
}

#[inline(always)]
fn out(ctx: &TcContext) -> i32 {
    match family(ctx) {
        Some(V4::ETHERTYPE) => whole::<V4>(ctx, Place::Out, out4(ctx)),
        Some(V6::ETHERTYPE) => whole::<V6>(ctx, Place::Out, out6(ctx)),
        _ => TC_ACT_UNSPEC,
    }
}

#[inline(never)]
fn out4(ctx: &TcContext) -> i32 {
    handle::<V4>(ctx, Place::Out)
}

#[inline(never)]
fn out6(ctx: &TcContext) -> i32 {
    handle::<V6>(ctx, Place::Out)
}

/// The packet's Ethernet type. A VLAN tag that stands beside the buffer does not hide it.
#[inline(always)]
fn family(ctx: &TcContext) -> Option<u16> {
    // SAFETY: the context is valid while the program runs.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    Some(u16::from_be(protocol as u16))
}

/// The path of almost all packets: of flows that are open, and of no Service. For the others it says which step is next.
///
/// That step is taken by [`whole`] and not here, where every packet would pay for its locals.
#[inline(always)]
fn handle<F: FastFamily>(ctx: &TcContext, place: Place) -> i32 {
    if fast::is_on()
        && let Place::In(from) = place
    {
        return fast::decide::<F>(ctx, from);
    }
    let Some(headers) = headers::<F>(ctx) else { return ODD };
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let quick = match place {
        Place::In(from) => established::<F, _>(&maps, &arrival(&headers, from)),
        Place::Out => answering::<F, _>(&maps, &headers.tuple, headers.tcp_flags),
    };
    match quick {
        Quick::Pass => TC_ACT_UNSPEC,
        Quick::Translate(to) => translate::<F>(ctx, &headers, &to),
        Quick::Undecided => UNDECIDED,
    }
}

/// The headers of a plain packet.
#[inline(always)]
pub(crate) fn headers<F: KernelFamily>(ctx: &TcContext) -> Option<Headers<F::Words>> {
    let buffer = Buffer(ctx);
    // Headers may stand in page fragments, where programs cannot read: have them pulled into the linear part.
    if buffer.bytes(0, ETHERNET + F::HEADER + 20).is_none() {
        let len = ctx.len().min(HEADERS as u32);
        // SAFETY: the helper checks the length; pointers are taken anew afterwards.
        if unsafe { bpf_skb_pull_data(ctx.skb.skb, len) } != 0 {
            return None;
        }
    }
    packet::parse::<F>(&buffer, ETHERNET)
}

#[inline(always)]
pub(crate) fn arrival<A: Copy>(headers: &Headers<A>, from: From) -> Arrival<A> {
    let Headers { tuple, tcp_flags, .. } = *headers;
    Arrival {
        tuple,
        tcp_flags,
        from,
        sends_on: false,
    }
}

#[inline(always)]
pub(crate) fn translate<F: Family>(ctx: &TcContext, headers: &Headers<F::Words>, to: &Translation<F::Words>) -> i32 {
    if rewrite::<F>(ctx, headers, &to.tuple) {
        count_traffic(ctx, to.counted);
        TC_ACT_UNSPEC
    } else {
        count(Event::RewriteFailed);
        TC_ACT_SHOT
    }
}

/// Counts the packet, or the segments that it will become.
#[inline(always)]
pub(crate) fn count_traffic(ctx: &TcContext, counted: Counted) {
    // SAFETY: the context is valid while the program runs.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    traffic::count(counted, segments.max(1), ctx.len().wrapping_sub(ETHERNET as u32));
}

/// What [`handle`] says of a packet that is not plain TCP or UDP; no action has this number.
pub(crate) const ODD: i32 = i32::MIN + 1;
/// What [`handle`] says of a packet that may open a flow, or refuses to; no action has this number.
pub(crate) const UNDECIDED: i32 = i32::MIN + 2;

/// The action, after the steps that `plain` asks for.
///
/// They are called one after the other from here and not by each other, because the BPF stack holds 512 bytes for a whole chain of
/// calls.
#[inline(always)]
fn whole<F: FastFamily>(ctx: &TcContext, place: Place, plain: i32) -> i32 {
    // An action, the least of which this is; the steps' numbers are below.
    if plain >= TC_ACT_UNSPEC {
        return plain;
    }
    match (plain, place) {
        (ODD, _) => odd::<F>(ctx, place),
        (UNDECIDED, Place::In(from)) => fast::send_on::<F>(ctx, open::<F>(ctx, from)),
        (UNDECIDED, Place::Out) => refusal::<F>(ctx),
        (_, Place::In(_)) => fast::send_on::<F>(ctx, plain),
        (_, Place::Out) => plain,
    }
}

/// A packet that may open a flow; with the fast path it is left to that, as [`fast::TRANSLATED`].
#[inline(never)]
fn open<F: KernelFamily>(ctx: &TcContext, from: From) -> i32 {
    let Some(headers) = packet::parse::<F>(&Buffer(ctx), ETHERNET) else {
        return TC_ACT_UNSPEC;
    };
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return TC_ACT_UNSPEC;
    };
    match undecided::<F, _>(&maps, scratch, &arrival(&headers, from)) {
        Outcome::Pass => TC_ACT_UNSPEC,
        Outcome::Drop => TC_ACT_SHOT,
        Outcome::Refuse => refuse::<F>(ctx, &headers),
        Outcome::Reset => reset::<F>(ctx, &headers),
        Outcome::Translate if fast::is_on() => fast::TRANSLATED,
        Outcome::Translate => translate::<F>(ctx, &headers, &scratch.translation),
    }
}

/// A backend's refusal of a SYN, on its way to the client.
#[inline(never)]
fn refusal<F: KernelFamily>(ctx: &TcContext) -> i32 {
    let Some(headers) = packet::parse::<F>(&Buffer(ctx), ETHERNET) else {
        return TC_ACT_UNSPEC;
    };
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return TC_ACT_UNSPEC;
    };
    match refused::<F, _>(&maps, scratch, &headers.tuple, headers.tcp_flags) {
        Outcome::Translate => translate::<F>(ctx, &headers, &scratch.translation),
        Outcome::Drop => TC_ACT_SHOT,
        _ => TC_ACT_UNSPEC,
    }
}

/// A packet that is not plain TCP or UDP.
#[inline(never)]
fn odd<F: KernelFamily>(ctx: &TcContext, place: Place) -> i32 {
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    match odd::odd::<F, _>(&maps, &Buffer(ctx), place) {
        Fate::Pass => TC_ACT_UNSPEC,
        Fate::Drop => TC_ACT_SHOT,
        Fate::Refuse => match odd::headers::<F, _>(&maps) {
            Some(headers) => refuse::<F>(ctx, &headers),
            None => TC_ACT_SHOT,
        },
        Fate::Back => {
            // What a process on this node sends comes back to it as if it had come in.
            let flags = if place == Place::Out {
                u64::from(BPF_F_INGRESS)
            } else {
                0
            };
            // SAFETY: the context is valid while the program runs; the helper only notes where to send.
            unsafe { bpf_redirect((*ctx.skb.skb).ifindex, flags) as i32 }
        }
    }
}

/// Writes the new tuple. The transport checksum goes through the kernel, which knows whether it is complete yet.
#[inline(always)]
pub(crate) fn rewrite<F: Family>(ctx: &TcContext, headers: &Headers<F::Words>, new: &Tuple<F::Words>) -> bool {
    let old = &headers.tuple;
    if let Some(offset) = packet::checksum_offset(old.proto) {
        let offset = (headers.l4 + offset) as u32;
        let (addresses, ports) = packet::differences::<F>(old, new);
        let or_none = old.proto == UDP;
        if or_none
            && let Some(field) = Buffer(ctx).bytes(offset as usize, 2)
            // SAFETY: two bytes were checked.
            && unsafe { field.cast::<u16>().read_unaligned() } == 0
        {
            // None stays none, and makes up for nothing.
            Buffer(ctx).changed(if F::HEADER == 40 { addresses.and(ports) } else { ports });
            return packet::write_tuple::<F>(&Buffer(ctx), headers, new);
        }
        if !replace_addresses(ctx, offset, addresses, F::HEADER == 40, or_none) {
            return false;
        }
        if (old.src_port != new.src_port || old.dst_port != new.dst_port)
            // SAFETY: the helper checks the offset; pointers are taken anew afterwards.
            && unsafe { bpf_l4_csum_replace(ctx.skb.skb, offset, 0, ports.fold32().into(), none(or_none)) } != 0
        {
            return false;
        }
    }
    packet::write_tuple::<F>(&Buffer(ctx), headers, new)
}

/// Turns the packet into its refusal and sends it back through the device it came from.
#[inline(never)]
fn refuse<F: Family>(ctx: &TcContext, headers: &Headers<F::Words>) -> i32 {
    let quote = icmp::quote_len(headers);
    let prefix = icmp::prefix_len::<F>() as i32;
    // SAFETY: the helpers check their arguments against the buffer; pointers are taken anew afterwards.
    unsafe {
        if bpf_skb_change_tail(ctx.skb.skb, (ETHERNET + quote) as u32, 0) != 0
            || bpf_skb_adjust_room(ctx.skb.skb, prefix, BPF_ADJ_ROOM_MAC, 0) != 0
        {
            return TC_ACT_SHOT;
        }
    }
    if !icmp::port_unreachable::<F>(&Buffer(ctx), headers, quote) {
        return TC_ACT_SHOT;
    }
    // SAFETY: the context is valid while the program runs; the helper only notes where to send.
    unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) as i32 }
}

/// Turns the segment into its reset and sends it back through the device it came from.
#[inline(never)]
fn reset<F: Family>(ctx: &TcContext, headers: &Headers<F::Words>) -> i32 {
    // SAFETY: the helper checks its arguments against the buffer; pointers are taken anew afterwards.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, reset::len(headers) as u32, 0) } != 0
        || !reset::reset::<F>(&Buffer(ctx), headers)
    {
        return TC_ACT_SHOT;
    }
    // SAFETY: the context is valid while the program runs; the helper only notes where to send.
    unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) as i32 }
}
