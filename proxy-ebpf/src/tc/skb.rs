//! A socket buffer: its headers, read and rewritten.

use core::mem::MaybeUninit;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_skb_change_type, bpf_skb_load_bytes,
        bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use shunt_common::{
    access::{Access, Number},
    checksum::Difference,
    event::Event,
    family::{Family, V6},
    layout::UDP,
    packet::{self, ETHERNET, Headers, Packet, Tuple},
    verdict::{Arrival, Counted, Origin, Translation},
};

use crate::{
    maps::{KernelFamily, count},
    traffic,
};

/// The longest link-layer and IPv4 headers, and a TCP header without options: all that is ever
/// read.
const HEADERS: usize = ETHERNET + 60 + 20;

/// `skb->pkt_type` of linux/if_packet.h: to this host.
pub(super) const PACKET_HOST: u32 = 0;
/// To all hosts of the link.
pub(super) const PACKET_BROADCAST: u32 = 1;
/// To a group.
pub(super) const PACKET_MULTICAST: u32 = 2;

/// The linear part of a socket buffer.
pub(super) struct Buffer<'a>(pub(super) &'a TcContext);

impl Packet for Buffer<'_> {
    #[inline(always)]
    fn bytes(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let start = self.0.data() + offset;
        (start + len <= self.0.data_end()).then_some(start as *mut u8)
    }

    #[inline(always)]
    fn link_header(&self) -> usize {
        LINK_HEADER.load() as usize
    }
}

/// Length of what stands in front of the IP header on the devices that the programs are for: set
/// when they are loaded, once for Ethernet and once for devices without a link-layer header. The
/// verifier takes it for the constant that it is.
#[unsafe(no_mangle)]
static LINK_HEADER: Global<u32> = Global::new(ETHERNET as u32);

impl Access for Buffer<'_> {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn link_length(&self) -> u32 {
        LINK_HEADER.load()
    }

    #[inline(always)]
    fn load<T: Number>(&self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        let (skb, to) = (
            self.0.skb.skb.cast_const().cast(),
            value.as_mut_ptr().cast(),
        );
        // SAFETY: the helper writes all of the value's bytes or says that it did not; a number may
        // be any bytes.
        unsafe {
            (bpf_skb_load_bytes(skb, offset, to, size_of::<T>() as u32) == 0)
                .then(|| value.assume_init())
        }
    }

    #[inline(always)]
    fn store<T: Number>(&self, offset: u32, value: T) -> bool {
        let from = (&raw const value).cast();
        // SAFETY: the helper reads the value's bytes, and checks the offset.
        unsafe { bpf_skb_store_bytes(self.0.skb.skb, offset, from, size_of::<T>() as u32, 0) == 0 }
    }

    #[inline(always)]
    fn replace_checksum(
        &self,
        offset: u32,
        addresses: Difference,
        ports: Difference,
        or_none: bool,
    ) -> bool {
        let v6 = family(self.0) == Some(V6::ETHERTYPE);
        if or_none && self.load::<u16>(offset) == Some(0) {
            self.changed(if v6 { addresses.and(ports) } else { ports });
            return true;
        }
        // SAFETY: the helper checks the offset.
        replace_addresses(self.0, offset, addresses, v6, or_none)
            && unsafe {
                bpf_l4_csum_replace(
                    self.0.skb.skb,
                    offset,
                    0,
                    ports.fold32().into(),
                    none(or_none),
                ) == 0
            }
    }

    #[inline(always)]
    fn changed(&self, difference: Difference) {
        // SAFETY: the helper has no preconditions. It says no where nobody summed the packet up,
        // which is as well.
        unsafe { bpf_csum_update(self.0.skb.skb, difference.fold32()) };
    }
}

/// [`BPF_F_IPV6`](https://docs.kernel.org/bpf/) where the kernel has it, set when the programs are
/// loaded.
#[unsafe(no_mangle)]
static CSUM_IPV6: Global<u32> = Global::new(0);

/// Flags for a checksum that may be zero, which means none and must neither be updated nor arise.
#[inline(always)]
fn none(or_none: bool) -> u64 {
    if or_none {
        u64::from(BPF_F_MARK_MANGLED_0)
    } else {
        0
    }
}

/// Brings a transport checksum up to date with new addresses.
#[inline(always)]
fn replace_addresses(
    ctx: &TcContext,
    offset: u32,
    addresses: Difference,
    v6: bool,
    or_none: bool,
) -> bool {
    let mut flags = none(or_none) | u64::from(BPF_F_PSEUDO_HDR);
    let known = CSUM_IPV6.load();
    if v6 {
        flags |= u64::from(known);
    }
    // SAFETY: the helpers check the offset, and say no where nobody summed the packet up, which is
    // as well.
    unsafe {
        let done =
            bpf_l4_csum_replace(ctx.skb.skb, offset, 0, addresses.fold32().into(), flags) == 0;
        if v6 && known == 0 {
            // The helper has taken from the packet's sum what an IPv4 header's checksum makes up
            // for.
            bpf_csum_update(ctx.skb.skb, addresses.fold32());
        }
        done
    }
}

/// The packet's Ethernet type. A VLAN tag that stands beside the buffer does not hide it.
#[inline(always)]
pub(super) fn family(ctx: &TcContext) -> Option<u16> {
    // SAFETY: the context is valid while the program runs.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    Some(u16::from_be(protocol as u16))
}

/// The headers of a plain packet.
#[inline(always)]
pub(super) fn headers<F: KernelFamily>(ctx: &TcContext) -> Option<Headers<F::Words>> {
    let buffer = Buffer(ctx);
    // Headers may stand in page fragments, where programs cannot read: have them pulled into the
    // linear part.
    let link = buffer.link_header();
    if buffer.bytes(0, link + F::HEADER + 20).is_none() {
        let len = ctx.len().min(HEADERS as u32);
        // SAFETY: the helper checks the length; pointers are taken anew afterwards.
        if unsafe { bpf_skb_pull_data(ctx.skb.skb, len) } != 0 {
            return None;
        }
    }
    packet::parse::<F>(&buffer, link)
}

/// The headers, once [`headers`] has had them pulled.
#[inline(always)]
pub(super) fn parse<F: KernelFamily>(ctx: &TcContext) -> Option<Headers<F::Words>> {
    packet::parse::<F>(&Buffer(ctx), Buffer(ctx).link_header())
}

#[inline(always)]
pub(super) fn arrival<A: Copy>(headers: &Headers<A>, origin: Origin) -> Arrival<A> {
    let Headers {
        tuple, tcp_flags, ..
    } = *headers;
    Arrival {
        tuple,
        tcp_flags,
        origin,
        sends_on: false,
    }
}

#[inline(always)]
pub(super) fn translate<F: Family>(
    ctx: &TcContext,
    headers: &Headers<F::Words>,
    to: &Translation<F::Words>,
) -> i32 {
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
pub(super) fn count_traffic(ctx: &TcContext, counted: Counted) {
    // SAFETY: the context is valid while the program runs.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    traffic::count(
        counted,
        segments.max(1),
        ctx.len().wrapping_sub(LINK_HEADER.load()),
    );
}

/// Writes the new tuple. The transport checksum goes through the kernel, which knows whether it is
/// complete yet.
#[inline(always)]
pub(super) fn rewrite<F: Family>(
    ctx: &TcContext,
    headers: &Headers<F::Words>,
    new: &Tuple<F::Words>,
) -> bool {
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
            Buffer(ctx).changed(if F::HEADER == 40 {
                addresses.and(ports)
            } else {
                ports
            });
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

/// Says that the packet is for this host, whatever the frame says; `false` where the kernel refuses.
#[inline(always)]
pub(super) fn take_for_us(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid while the program runs; the helper checks its argument.
    unsafe {
        let skb = ctx.skb.skb;
        (*skb).pkt_type == PACKET_HOST || bpf_skb_change_type(skb, PACKET_HOST) == 0
    }
}
