//! Packets that no open flow accounts for: those that may open one, and refusals.
//!
//! Its functions are called one after the other and not by each other ([`Step`] says which is next):
//! so each has the stack to itself.

use aya_ebpf::{
    EbpfContext,
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use shunt_common::{
    balance::{Maps, refused, undecided},
    family::{Family, V4, V6},
    verdict::{Direction, InScratch, Origin, Verdict},
};

use super::{
    answer::{is_to_us, refuse, reset},
    hand_over::seen,
    host_routing::{self, RoutingFamily},
    loopback, process,
    skb::{arrival, family, parse, translate},
    step::{Encoded, Step},
};
use crate::{
    maps::{KernelFamily, KernelMaps, Tc},
    subprograms::PacketHook,
};

/// What the programs on devices hand over of TCP and UDP.
#[classifier]
fn tc_undecided(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => decide::<V4>(&ctx),
        Some(V6::ETHERTYPE) => decide::<V6>(&ctx),
        _ => TC_ACT_UNSPEC,
    }
}

/// The action, which tracers are told of.
#[inline(always)]
fn decide<F: RoutingFamily>(ctx: &TcContext) -> i32 {
    let action = match seen(ctx) {
        Direction::Egress => refusal::<F>(ctx),
        Direction::Ingress(origin) => {
            let step = open::<F>(ctx, origin);
            if origin == Origin::Process {
                match process::act::<F>(ctx, step).step() {
                    Step::End(action) => action,
                    _ => process::send::<F>(ctx),
                }
            } else {
                host_routing::send_on::<F>(ctx, act::<F>(ctx, origin, step).step())
            }
        }
    };
    Tc::tell::<F>(ctx.as_ptr());
    action
}

/// A packet that may open a flow: what becomes of it. [`act`] does it, so that the locals here and
/// those of the decision have the stack for themselves.
#[inline(never)]
fn open<F: KernelFamily>(ctx: &TcContext, origin: Origin) -> Encoded {
    let Some(headers) = parse::<F>(ctx) else {
        return Step::End(TC_ACT_UNSPEC).encode();
    };
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return Step::End(TC_ACT_UNSPEC).encode();
    };
    let verdict = undecided::<F, _>(&maps, scratch, &arrival(&headers, origin));
    Step::from(verdict).encode()
}

/// Does what was decided; with host routing a translation is left to that.
#[inline(never)]
fn act<F: KernelFamily>(ctx: &TcContext, origin: Origin, step: Encoded) -> Encoded {
    acted::<F>(ctx, origin, step.step()).encode()
}

#[inline(always)]
fn acted<F: KernelFamily>(ctx: &TcContext, origin: Origin, step: Step) -> Step {
    if matches!(step, Step::End(_)) {
        return step;
    }
    let Some(headers) = parse::<F>(ctx) else {
        return Step::End(TC_ACT_UNSPEC);
    };
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return Step::End(TC_ACT_UNSPEC);
    };
    Step::End(match step {
        // Perhaps it is for a device on top of this one, which sees it next.
        Step::Refuse | Step::Reset if !is_to_us(ctx, Direction::Ingress(origin)) => TC_ACT_UNSPEC,
        Step::Refuse => refuse::<F>(ctx, &headers),
        Step::Reset => reset::<F>(ctx, &headers),
        _ if host_routing::is_on() && !scratch.translation.process => return Step::Translated,
        _ => loopback::arrive::<F>(ctx, &headers, &scratch.translation),
    })
}

/// A backend's refusal of a SYN, on its way to the client.
#[inline(never)]
fn refusal<F: KernelFamily>(ctx: &TcContext) -> i32 {
    let Some(headers) = parse::<F>(ctx) else {
        return TC_ACT_UNSPEC;
    };
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    let Some(scratch) = Maps::<F>::scratch(&maps) else {
        return TC_ACT_UNSPEC;
    };
    match refused::<F, _>(&maps, scratch, &headers.tuple, headers.tcp_flags) {
        Verdict::Translate(InScratch) => translate::<F>(ctx, &headers, &scratch.translation),
        Verdict::Drop => TC_ACT_SHOT,
        _ => TC_ACT_UNSPEC,
    }
}
