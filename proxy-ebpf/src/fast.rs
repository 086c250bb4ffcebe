//! The opt-in fast path of `--fast-path on`: packets of Service flows go from one device straight to the next, past the
//! node's own stack.
//!
//! A packet for a pod on this node is handed to the pod's end of its device (`bpf_redirect_peer`), any other is given its
//! next hop and sent (`bpf_redirect_neigh`). The way is the one of the kernel's routing tables; its netfilter, IPsec and, for
//! pods, the programs on their devices' way in are not passed. So the second half of a translation is done here, where
//! it is [`leaving`]'s otherwise. What has no such way (a process of the node, no route, a packet too large or without
//! hops left) goes through the stack as ever.

use aya_ebpf::{
    EbpfContext, Global,
    bindings::{TC_ACT_SHOT, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1},
    btf_maps::HashMap,
    helpers::{bpf_fib_lookup, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_type},
    macros::btf_map,
    programs::TcContext,
};
use shunt_common::{
    balance::{Verdict, leaving},
    event::Event,
    family::Words6,
    packet::{self, ETHERNET, Headers, Packet, Tuple},
};

use crate::{
    maps::{Hook, KernelFamily, KernelMaps, count},
    tc::{Buffer, rewrite},
    xdp::{FibLookup, words},
};

/// Whether there is a fast path: set when the programs are loaded, so that without it the verifier takes it out.
#[unsafe(no_mangle)]
static FAST_PATH: Global<u32> = Global::new(0);

/// Devices that lead into a pod's namespace and hand packets over there (veth, netkit), by index; no value is looked at.
#[btf_map(name = "pod_devices")]
static POD_DEVICES: HashMap<u32, u32, 4096> = HashMap::new();

/// `BPF_FIB_LKUP_RET_NO_NEIGH` of linux/bpf.h: a way, but the next hop's MAC address is not known yet.
const NO_NEIGH: i64 = 7;
/// `PACKET_HOST` of linux/if_packet.h: for the receiver itself.
const PACKET_HOST: u32 = 0;

/// Whether there is a fast path.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    FAST_PATH.load() != 0
}

/// A packet that was not translated where it arrived: sends it on if it is a reply that would be on its way out.
#[inline(never)]
pub(crate) fn send_reply<F: KernelFamily>(ctx: &TcContext, headers: &Headers<F::Words>) -> Option<i32> {
    let maps = KernelMaps::new(ctx.as_ptr(), Hook::Tc);
    match leaving::<F, _>(&maps, &headers.tuple, headers.tcp_flags) {
        Verdict::Translate(out) => send::<F>(ctx, headers, &headers.tuple, &out.tuple),
        _ => None,
    }
}

/// A packet whose tuple was translated where it arrived: rewrites it and sends it on.
#[inline(never)]
pub(crate) fn send_translated<F: KernelFamily>(
    ctx: &TcContext,
    headers: &Headers<F::Words>,
    arrived: &Tuple<F::Words>,
) -> Option<i32> {
    let maps = KernelMaps::new(ctx.as_ptr(), Hook::Tc);
    match leaving::<F, _>(&maps, arrived, headers.tcp_flags) {
        Verdict::Translate(out) => send::<F>(ctx, headers, arrived, &out.tuple),
        Verdict::Pass => send::<F>(ctx, headers, arrived, arrived),
        _ => None,
    }
}

/// Sends the packet on: with the tuple `left` into a pod here, else with `arrived`, for the program on the device it leaves
/// through. `None`: it is as it was, and goes through the stack.
#[inline(always)]
fn send<F: KernelFamily>(
    ctx: &TcContext,
    headers: &Headers<F::Words>,
    arrived: &Tuple<F::Words>,
    left: &Tuple<F::Words>,
) -> Option<i32> {
    // SAFETY: the context is valid while the program runs.
    let (ingress, tagged, kind) = unsafe {
        let skb = ctx.skb.skb;
        ((*skb).ifindex, (*skb).vlan_present, (*skb).pkt_type)
    };
    if tagged != 0 {
        return None;
    }
    let mut fib = FibLookup {
        family: F::AF,
        l4_protocol: arrived.proto,
        sport: arrived.src_port.to_be(),
        dport: arrived.dst_port.to_be(),
        // None: the kernel compares the packet's own length, or its segments', with the route's MTU.
        tot_len: 0,
        ifindex: ingress,
        flowinfo: 0,
        src: words::<F>(arrived.src),
        dst: words::<F>(arrived.dst),
        vlan: 0,
        macs: [0; 6],
    };
    // SAFETY: `fib` has the size and layout of the kernel's struct.
    let routed = unsafe { bpf_fib_lookup(ctx.as_ptr(), (&raw mut fib).cast(), size_of::<FibLookup>() as i32, 0) };
    if routed != 0 && routed != NO_NEIGH {
        return None;
    }
    let peer = POD_DEVICES.get_ptr(&fib.ifindex).is_some();
    if !packet::decrement_hops::<F>(&Buffer(ctx), headers.l3) {
        return None;
    }
    if !rewrite::<F>(ctx, headers, if peer { left } else { arrived }) {
        count(Event::RewriteFailed);
        return Some(TC_ACT_SHOT);
    }
    if !peer {
        let Words6 { high, low } = fib.dst;
        // The kernel put the gateway's address, of whichever family, in place of the destination's.
        let mut hop = bpf_redir_neigh {
            nh_family: fib.family.into(),
            __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 {
                ipv6_nh: [high as u32, (high >> 32) as u32, low as u32, (low >> 32) as u32],
            },
        };
        let size = size_of::<bpf_redir_neigh>() as i32;
        // SAFETY: the helper reads `hop` and notes where to send.
        return Some(unsafe { bpf_redirect_neigh(fib.ifindex, &raw mut hop, size, 0) } as i32);
    }
    if routed == 0
        && let Some(ethernet) = Buffer(ctx).bytes(0, ETHERNET)
    {
        // SAFETY: 14 bytes were checked.
        unsafe {
            let ethernet = ethernet.cast::<u16>();
            for i in 0..3 {
                ethernet.add(i).write_volatile(fib.macs[3 + i]);
                ethernet.add(3 + i).write_volatile(fib.macs[i]);
            }
        }
    }
    // SAFETY: the context is valid; the helpers check their arguments.
    unsafe {
        // A bridge's port gets packets that are addressed to the bridge; the pod would drop what is for another host.
        if kind != PACKET_HOST && bpf_skb_change_type(ctx.skb.skb, PACKET_HOST) != 0 {
            return Some(TC_ACT_SHOT);
        }
        Some(bpf_redirect_peer(fib.ifindex, 0) as i32)
    }
}
