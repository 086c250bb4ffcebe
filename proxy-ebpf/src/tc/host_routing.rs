//! Host routing, which `--fast-path on` asks for: packets of Service flows go from one device
//! straight to the next, past the node's own stack.
//!
//! A packet for a pod on this node is handed to the pod's end of its device (`bpf_redirect_peer`),
//! any other is given its next hop and sent (`bpf_redirect_neigh`). The path is the one of the
//! kernel's routing tables; its netfilter, IPsec and, for pods, the programs on their devices' way
//! in are not passed. So the second half of a translation is done here, where it is [`answering`]'s
//! otherwise. What has no such path (a process of the node, no route, a packet too large or without
//! hops left) goes through the stack as ever.
//!
//! Asking the routing tables costs more than all the rest, so the path to a pod is kept for a
//! second.
//!
//! Deciding and sending are steps of their own, that each have the stack to themselves: [`decide`]
//! leaves what it found in [`Scratch`], and [`send_on`] reads the packet's headers once more.

use aya_ebpf::{
    EbpfContext, Global,
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    btf_maps::{HashMap, LruHashMap, PerCpuArray},
    helpers::{bpf_fib_lookup, bpf_redirect_peer},
    macros::btf_map,
    programs::TcContext,
};
use shunt_common::{
    access::Access,
    balance::{Clock, Maps, Scratch, answering, established},
    event::Event,
    family::{V4, V6},
    layout::TCP,
    packet::{self, ETHERNET, Headers, Packet, Tuple},
    verdict::{Counted, Lookup, Origin, Translation},
};

use super::{
    loopback,
    skb::{Buffer, arrival, count_traffic, headers, rewrite, take_for_us, translate},
    step::{Encoded, Step},
};
use crate::{
    fib::{FibLookup, NO_NEIGH},
    maps::{KernelFamily, KernelMaps, Tc, bytes, count},
};

/// Whether there is host routing: set when the programs are loaded, so that without it the verifier
/// takes it out.
#[unsafe(no_mangle)]
static FAST_PATH: Global<u32> = Global::new(0);

/// Devices that lead into a pod's namespace and hand packets over there (veth, netkit), by index;
/// no value is looked at.
#[btf_map(name = "pod_devices")]
static POD_DEVICES: HashMap<u32, u32, 4096> = HashMap::new();

/// The path to a pod.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Path {
    /// The device's index.
    device: u32,
    /// When the routing tables were asked, in ticks: it holds for that one.
    tick: u32,
    /// The device's MTU.
    mtu: u32,
    /// Source and destination MAC address; zeros where the neighbour was not known.
    macs: [u16; 6],
}

type Paths<A> = LruHashMap<A, Path, 4096>;

#[btf_map(name = "pod_routes4")]
static PATHS4: Paths<[u8; 4]> = Paths::new();
#[btf_map(name = "pod_routes6")]
static PATHS6: Paths<[u8; 16]> = Paths::new();

/// Memory of one run: the stack has no room for it.
#[repr(C)]
struct Work {
    fib: FibLookup,
    path: Path,
}

#[btf_map(name = "host_routing")]
static WORK: PerCpuArray<Work, 1> = PerCpuArray::new();

/// The maps of one family.
pub(super) trait RoutingFamily: KernelFamily {
    const PATHS: &'static Paths<Self::Addr>;
}

impl RoutingFamily for V4 {
    const PATHS: &'static Paths<[u8; 4]> = &PATHS4;
}

impl RoutingFamily for V6 {
    const PATHS: &'static Paths<[u8; 16]> = &PATHS6;
}

/// Whether there is host routing.
#[inline(always)]
pub(super) fn is_on() -> bool {
    FAST_PATH.load() != 0
}

/// What becomes of a packet that arrives, as far as open flows tell. For theirs, [`send_on`] is
/// next.
#[inline(always)]
pub(super) fn decide<F: RoutingFamily>(ctx: &TcContext, origin: Origin) -> Step {
    let Some(headers) = headers::<F>(ctx) else {
        return Step::SlowPath;
    };
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let (translation, next) = match established::<F, _>(&maps, &arrival(&headers, origin)) {
        Lookup::Undecided => return Step::Undecided,
        Lookup::Translate(to) if to.process => {
            return Step::End(loopback::arrive::<F>(ctx, &headers, &to));
        }
        Lookup::Translate(to) => (to, Step::Translated),
        Lookup::Unmatched => match answering::<F, _>(&maps, &headers.tuple, headers.tcp_flags) {
            Lookup::Translate(out) => (out, Step::Reply),
            _ => return Step::End(TC_ACT_UNSPEC),
        },
    };
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return Step::End(TC_ACT_UNSPEC);
    };
    scratch.translation = translation;
    next
}

/// The action, after `step`.
#[inline(always)]
pub(super) fn send_on<F: RoutingFamily>(ctx: &TcContext, step: Step) -> i32 {
    match step {
        // Asked again for the verifier, which takes what functions return for any number.
        Step::Translated if is_on() => match send_translated::<F>(ctx).step() {
            Step::End(action) => action,
            _ => translate_only::<F>(ctx),
        },
        Step::Reply if is_on() => match send_reply::<F>(ctx).step() {
            Step::End(action) => action,
            _ => TC_ACT_UNSPEC,
        },
        Step::End(action) => action,
        _ => TC_ACT_UNSPEC,
    }
}

/// Rewrites a packet that was translated where it arrived, and sends it on.
#[inline(never)]
fn send_translated<F: RoutingFamily>(ctx: &TcContext) -> Encoded {
    let Some((headers, scratch)) = decided::<F>(ctx) else {
        return Step::Stack.encode();
    };
    let to = &scratch.translation;
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let left = match answering::<F, _>(&maps, &to.tuple, headers.tcp_flags) {
        Lookup::Translate(out) => out,
        Lookup::Unmatched => Translation {
            counted: Counted::ELSEWHERE,
            ..*to
        },
        Lookup::Undecided => return Step::Stack.encode(),
    };
    let step = send::<F>(ctx, &headers, &to.tuple, &left);
    if step != Step::Stack {
        count_traffic(ctx, to.counted);
    }
    step.encode()
}

/// Rewrites a packet that goes through the stack after all.
#[inline(never)]
fn translate_only<F: RoutingFamily>(ctx: &TcContext) -> i32 {
    match decided::<F>(ctx) {
        Some((headers, scratch)) => translate::<F>(ctx, &headers, &scratch.translation),
        None => TC_ACT_SHOT,
    }
}

/// Rewrites a reply and sends it on.
#[inline(never)]
fn send_reply<F: RoutingFamily>(ctx: &TcContext) -> Encoded {
    match decided::<F>(ctx) {
        Some((headers, scratch)) => {
            send::<F>(ctx, &headers, &headers.tuple, &scratch.translation).encode()
        }
        None => Step::Stack.encode(),
    }
}

/// A packet's headers, and what was decided about it.
type Decided<'a, A> = (Headers<A>, &'a Scratch<A>);

/// The packet's headers, read once more, and what was decided about it.
#[inline(always)]
fn decided<'a, F: RoutingFamily>(ctx: &TcContext) -> Option<Decided<'a, F::Words>> {
    let headers = packet::parse::<F>(&Buffer(ctx), ETHERNET)?;
    // This CPU's own memory, which no step from here on writes to.
    Some((headers, F::SCRATCH.get(0)?))
}

/// Sends the packet on: with the tuple `left` into a pod here, else with `arrived`, for the program
/// on the device it leaves through. [`Step::Stack`]: it is as it was, and goes through the stack.
#[inline(always)]
fn send<F: RoutingFamily>(
    ctx: &TcContext,
    headers: &Headers<F::Words>,
    arrived: &Tuple<F::Words>,
    left: &Translation<F::Words>,
) -> Step {
    // SAFETY: the context is valid while the program runs.
    let (ingress, tagged, segments) = unsafe {
        let skb = ctx.skb.skb;
        ((*skb).ifindex, (*skb).vlan_present, (*skb).gso_size)
    };
    if tagged != 0 {
        return Step::Stack;
    }
    let now = KernelMaps::<Tc>::new(ctx.as_ptr()).now();
    // SAFETY: entries are replaced as a whole, and freed after this run only.
    if let Some(path) = unsafe { F::PATHS.get(bytes::<_, F::Addr>(&arrived.dst)) }
        && path.tick == now
        && (segments != 0 || ctx.len() <= path.mtu + ETHERNET as u32)
    {
        return hand_over::<F>(ctx, headers, left, path);
    }
    // SAFETY: per-CPU memory that only this run writes meanwhile.
    let Some(Work { fib, path }) = WORK
        .get_ptr_mut(0)
        .and_then(|work| unsafe { work.as_mut() })
    else {
        return Step::Stack;
    };
    // Without a length the kernel would compare the packet's with the device's MTU, and not the
    // route's. It tells the MTU in its place.
    *fib = FibLookup::new::<F>(arrived, length(ctx, headers, segments) as u16, ingress);
    // SAFETY: `fib` has the size and layout of the kernel's struct.
    let routed = unsafe {
        bpf_fib_lookup(
            ctx.as_ptr(),
            core::ptr::from_mut(fib).cast(),
            size_of::<FibLookup>() as i32,
            0,
        )
    };
    if routed != 0 && routed != NO_NEIGH {
        return Step::Stack;
    }
    if POD_DEVICES.get_ptr(fib.ifindex).is_some() {
        *path = Path {
            device: fib.ifindex,
            tick: now,
            mtu: fib.tot_len.into(),
            macs: fib.macs,
        };
        // Without a neighbour the kernel did not look at the length: ask again next time.
        if routed == 0 {
            let known = &*path;
            let _asked_again = F::PATHS.insert(bytes::<_, F::Addr>(&arrived.dst), known, 0);
        }
        return hand_over::<F>(ctx, headers, left, path);
    }
    if !packet::decrement_hops::<F>(&Buffer(ctx), headers.l3) {
        return Step::Stack;
    }
    if !rewrite::<F>(ctx, headers, arrived) {
        count(Event::RewriteFailed);
        return Step::End(TC_ACT_SHOT);
    }
    Step::End(fib.send_on())
}

/// Length of the packet from its IP header on; of one of the segments that it will be cut into.
#[inline(always)]
fn length<A>(ctx: &TcContext, headers: &Headers<A>, segments: u32) -> u32 {
    if segments == 0 {
        return ctx.len().wrapping_sub(ETHERNET as u32);
    }
    let transport = if headers.tuple.proto == TCP {
        // The data offset, in words.
        let offset = Buffer(ctx).load::<u8>((headers.l4 + 12) as u32);
        u32::from(offset.unwrap_or(0) >> 4) * 4
    } else {
        8
    };
    (headers.l4 - ETHERNET) as u32 + transport + segments
}

/// Gives the packet to the pod's end of its device.
#[inline(always)]
fn hand_over<F: RoutingFamily>(
    ctx: &TcContext,
    headers: &Headers<F::Words>,
    left: &Translation<F::Words>,
    path: &Path,
) -> Step {
    if !packet::decrement_hops::<F>(&Buffer(ctx), headers.l3) {
        return Step::Stack;
    }
    if !rewrite::<F>(ctx, headers, &left.tuple) {
        count(Event::RewriteFailed);
        return Step::End(TC_ACT_SHOT);
    }
    if path.macs[3] | path.macs[4] | path.macs[5] != 0
        && let Some(ethernet) = Buffer(ctx).bytes(0, ETHERNET)
    {
        // SAFETY: 14 bytes were checked.
        unsafe {
            let ethernet = ethernet.cast::<u16>();
            for i in 0..3 {
                ethernet.add(i).write_volatile(path.macs[3 + i]);
                ethernet.add(3 + i).write_volatile(path.macs[i]);
            }
        }
    }
    // The program on the pod's device does not see it.
    count_traffic(ctx, left.counted);
    // The pod would drop what a bridge's port has got for the bridge: it is for another host.
    if !take_for_us(ctx) {
        return Step::End(TC_ACT_SHOT);
    }
    // SAFETY: the helper only notes where to send.
    Step::End(unsafe { bpf_redirect_peer(path.device, 0) } as i32)
}
