//! Processes of this node that no socket hook sees: what they send to Services, where it leaves by
//! a device, and what they get from backends.
//!
//! The kernel has routed such a packet to the frontend's address, most often by the default route,
//! and chosen its source for that way. Here it gets the backend's address and a source that suits
//! the way there, and is sent on by that way past the rest of the stack. Its source port is always a
//! translated one, so that answers are known where they come in, by the same look-up as those of
//! clients from outside.
//!
//! An answer is given back to its process by the loopback device ([`loop_back`]).

use aya_ebpf::{
    EbpfContext,
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::{bpf_fib_lookup, bpf_redirect_neigh},
    programs::TcContext,
};
use shunt_common::{
    balance::{Maps, looped, sent},
    event::Event,
    layout::TCP,
    packet::{Headers, Packet, Tuple},
    slow_path,
    verdict::{Direction, Lookup, Origin},
};

use super::{
    answer::{refuse, reset},
    loopback::{as_frame, is_looped, is_sender, loop_back},
    skb::{Buffer, arrival, count_traffic, parse, rewrite, translate},
    step::{Encoded, Step},
};
use crate::{
    fib::{FRAG_NEEDED, FibLookup, LOOPBACK, NO_NEIGH, RoutedFamily},
    maps::{KernelFamily, KernelMaps, Tc, count},
};

/// `BPF_FIB_LKUP_RET_NOT_FWDED` of linux/bpf.h: it is for this node.
const NOT_FORWARDED: i64 = 4;
/// `BPF_FIB_LKUP_RET_FWD_DISABLED`: the kernel is not asked for the way of packets that it does not
/// forward.
const NO_FORWARDING: i64 = 5;
/// `BPF_FIB_LKUP_RET_UNSUPP_LWT`: the route has an encapsulation of its own.
const UNSUPPORTED: i64 = 6;

/// What becomes of a process's packet, as far as open flows tell; `None`: it is not for a Service.
#[inline(always)]
pub(super) fn decide<F: KernelFamily>(
    ctx: &TcContext,
    headers: &Headers<F::Words>,
) -> Option<Step> {
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let arrival = arrival(headers, Origin::Process);
    let lookup = if is_looped(ctx) {
        looped::<F, _>(&maps, &arrival)
    } else {
        sent::<F, _>(&maps, &arrival)
    };
    match lookup {
        Lookup::Unmatched => None,
        Lookup::Undecided => Some(Step::Dialled),
        // From a process to another, which dialled by packets: it is on its way already.
        Lookup::Translate(to) if to.process => Some(Step::End(translate::<F>(ctx, headers, &to))),
        Lookup::Translate(to) => Some(match Maps::<F>::scratch(&maps) {
            Some(scratch) => {
                scratch.translation = to;
                Step::Sent
            }
            None => Step::End(TC_ACT_UNSPEC),
        }),
    }
}

/// Does what was decided, up to sending the packet to a backend.
#[inline(never)]
pub(super) fn act<F: KernelFamily>(ctx: &TcContext, step: Encoded) -> Encoded {
    acted::<F>(ctx, step.step()).encode()
}

#[inline(always)]
fn acted<F: KernelFamily>(ctx: &TcContext, step: Step) -> Step {
    if matches!(step, Step::End(_)) {
        return step;
    }
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return Step::End(TC_ACT_UNSPEC);
    };
    if step == Step::Translated && !scratch.translation.process {
        return Step::Sent;
    }
    let Some(headers) = parse::<F>(ctx) else {
        return Step::End(TC_ACT_UNSPEC);
    };
    Step::End(match step {
        Step::Refuse if headers.tuple.proto != TCP => refuse::<F>(ctx, &headers),
        Step::Refuse | Step::Reset => reset::<F>(ctx, &headers),
        _ => translate::<F>(ctx, &headers, &scratch.translation),
    })
}

/// Rewrites a process's packet to a backend, as was decided, and sends it there.
#[inline(never)]
pub(super) fn send<F: KernelFamily + RoutedFamily>(ctx: &TcContext) -> i32 {
    let Some(headers) = parse::<F>(ctx) else {
        return TC_ACT_SHOT;
    };
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return TC_ACT_SHOT;
    };
    let to = &scratch.translation;
    if !rewrite::<F>(ctx, &headers, &to.tuple) {
        count(Event::RewriteFailed);
        return TC_ACT_SHOT;
    }
    count_traffic(ctx, to.counted);
    route::<F>(ctx, &to.tuple)
}

/// Sends a packet on the slow path that was rewritten to go to a backend.
#[inline(never)]
pub(super) fn send_slowly<F: KernelFamily + RoutedFamily>(ctx: &TcContext) -> i32 {
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    match slow_path::destination::<F, _>(&maps) {
        Some(tuple) => route::<F>(ctx, tuple),
        None => TC_ACT_SHOT,
    }
}

/// Sends the packet by the way to its destination, which the kernel has not asked for.
#[inline(always)]
fn route<F: RoutedFamily>(ctx: &TcContext, tuple: &Tuple<F::Words>) -> i32 {
    let mut fib = FibLookup::new::<F>(tuple, 0, LOOPBACK);
    // SAFETY: `fib` has the size and layout of the kernel's struct.
    let routed = unsafe {
        bpf_fib_lookup(
            ctx.as_ptr(),
            (&raw mut fib).cast(),
            size_of::<FibLookup>() as i32,
            0,
        )
    };
    // Where the kernel has no next hop for us it is asked for the way once more: it would queue the
    // packet until the neighbour has answered, and then send it to the next hop of the way that it
    // was on at first, unless it has given it another itself.
    let to_neighbour = |device| {
        if !as_frame(ctx) {
            return TC_ACT_SHOT;
        }
        // SAFETY: as in `loop_back`.
        unsafe { bpf_redirect_neigh(device, core::ptr::null_mut(), 0, 0) as i32 }
    };
    match routed {
        NOT_FORWARDED if is_looped(ctx) => TC_ACT_UNSPEC,
        NOT_FORWARDED => loop_back(ctx),
        0 if as_frame(ctx) => fib.send_on(),
        0 => TC_ACT_SHOT,
        NO_NEIGH | FRAG_NEEDED => to_neighbour(fib.ifindex),
        // By the device that it was on its way to.
        NO_FORWARDING | UNSUPPORTED if !is_looped(ctx) => {
            // SAFETY: the context is valid while the program runs.
            to_neighbour(unsafe { (*ctx.skb.skb).ifindex })
        }
        _ => {
            count(Event::NoRoute);
            TC_ACT_SHOT
        }
    }
}

/// Where a process's packet is seen on the slow path: as one that comes in, if it may be for a
/// Service.
#[inline(always)]
pub(super) fn direction<F: KernelFamily>(ctx: &TcContext) -> Direction {
    let destination = shunt_common::access::load_addr::<F>(
        &Buffer(ctx),
        (Buffer(ctx).link_header() + F::ADDRESSES + size_of::<F::Words>()) as u32,
    );
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    match (destination, Maps::<F>::config(&maps)) {
        _ if !is_sender(ctx) => Direction::Egress,
        (Some(destination), Some(config))
            if is_looped(ctx)
                || Maps::<F>::filter(&maps, shunt_common::filter::service::<F>(destination))
                || shunt_common::address::may_be_service::<F>(config, destination) =>
        {
            Direction::Ingress(Origin::Process)
        }
        _ => Direction::Egress,
    }
}
