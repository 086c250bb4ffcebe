//! Packets that are not plain TCP or UDP behind a plain IP header.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect,
    macros::classifier,
    programs::TcContext,
};
use shunt_common::{
    family::{Family, V4, V6},
    slow_path::{self, Action},
    verdict::{Direction, Origin},
};

use super::{
    answer::{is_to_us, refuse},
    hand_over::seen,
    loopback, process,
    skb::{Buffer, family},
};
use crate::{
    maps::{KernelFamily, KernelMaps, Tc},
    subprograms::PacketHook,
};

/// What the programs on devices hand over of everything else.
#[classifier]
fn tc_slow_path(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => decide::<V4>(&ctx),
        Some(V6::ETHERTYPE) => decide::<V6>(&ctx),
        _ => TC_ACT_UNSPEC,
    }
}

/// The action, which tracers are told of.
#[inline(always)]
fn decide<F: KernelFamily>(ctx: &TcContext) -> i32 {
    let direction = match seen(ctx) {
        Direction::Ingress(Origin::Process) => process::direction::<F>(ctx),
        direction => direction,
    };
    let action = handle::<F>(ctx, direction);
    Tc::tell::<F>(ctx.as_ptr());
    action
}

#[inline(never)]
fn handle<F: KernelFamily>(ctx: &TcContext, direction: Direction) -> i32 {
    if !is_to_us(ctx, direction) {
        return TC_ACT_UNSPEC;
    }
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    match slow_path::handle::<F, _>(&maps, &Buffer(ctx), direction) {
        Action::Pass => TC_ACT_UNSPEC,
        // On its way from one process to another it is there already.
        Action::Deliver if direction == Direction::Ingress(Origin::Process) => TC_ACT_UNSPEC,
        Action::Deliver => loopback::loop_back(ctx),
        Action::Send => process::send_slowly::<F>(ctx),
        Action::Drop => TC_ACT_SHOT,
        Action::Refuse => match slow_path::headers::<F, _>(&maps, &Buffer(ctx)) {
            Some(headers) => refuse::<F>(ctx, &headers),
            None => TC_ACT_SHOT,
        },
        Action::SendBack => {
            if direction == Direction::Ingress(Origin::Process) {
                return loopback::loop_back(ctx);
            }
            // What a process on this node sends comes back to it as if it had come in.
            let flags = match direction {
                Direction::Ingress(_) => 0,
                Direction::Egress => u64::from(BPF_F_INGRESS),
            };
            // SAFETY: the context is valid while the program runs; the helper only notes where to
            // send.
            unsafe { bpf_redirect((*ctx.skb.skb).ifindex, flags) as i32 }
        }
    }
}
