//! tc on pod and node devices: packets of senders that no socket hook sees, forwarded traffic, and
//! replies.
//!
//! Only addresses and ports change here; routing, neighbours and netfilter stay the kernel's,
//! unless there is [`host_routing`].

mod answer;
mod host_routing;
mod loopback;
mod process;
mod skb;
mod step;

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect,
    macros::classifier,
    programs::TcContext,
};
use shunt_common::{
    balance::{Maps, departing, established, refused, undecided},
    family::{Family, V4, V6},
    packet::Headers,
    slow_path::{self, Action},
    verdict::{Direction, InScratch, Lookup, Origin, Verdict},
};

use self::{
    answer::{refuse, reset},
    host_routing::RoutingFamily,
    skb::{Buffer, arrival, family, headers, parse, translate},
    step::{Encoded, Step},
};
use crate::{
    maps::{KernelFamily, KernelMaps, Tc},
    subprograms::PacketHook,
};

/// `skb->pkt_type` of linux/if_packet.h: to this host.
const PACKET_HOST: u32 = 0;
/// To all hosts of the link.
const PACKET_BROADCAST: u32 = 1;
/// To a group.
const PACKET_MULTICAST: u32 = 2;

/// Packets from the network.
#[classifier]
fn tc_node_in(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => whole::<V4>(
            &ctx,
            Direction::Ingress(Origin::Network),
            node_in4(&ctx).step(),
        ),
        Some(V6::ETHERTYPE) => whole::<V6>(
            &ctx,
            Direction::Ingress(Origin::Network),
            node_in6(&ctx).step(),
        ),
        _ => TC_ACT_UNSPEC,
    }
}

/// Packets to the network, and those that processes of this node send to each other.
#[classifier]
fn tc_node_out(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => sent::<V4>(&ctx, node_out4(&ctx).step()),
        Some(V6::ETHERTYPE) => sent::<V6>(&ctx, node_out6(&ctx).step()),
        _ => TC_ACT_UNSPEC,
    }
}

/// Packets from a pod.
#[classifier]
fn tc_pod_in(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => {
            whole::<V4>(&ctx, Direction::Ingress(Origin::Pod), pod_in4(&ctx).step())
        }
        Some(V6::ETHERTYPE) => {
            whole::<V6>(&ctx, Direction::Ingress(Origin::Pod), pod_in6(&ctx).step())
        }
        _ => TC_ACT_UNSPEC,
    }
}

/// Packets to a pod.
#[classifier]
fn tc_pod_out(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => whole::<V4>(&ctx, Direction::Egress, pod_out4(&ctx).step()),
        Some(V6::ETHERTYPE) => whole::<V6>(&ctx, Direction::Egress, pod_out6(&ctx).step()),
        _ => TC_ACT_UNSPEC,
    }
}

// One function per family and place: each has a BPF stack of its own.
#[inline(never)]
fn node_in4(ctx: &TcContext) -> Encoded {
    handle::<V4>(ctx, Direction::Ingress(Origin::Network)).encode()
}

#[inline(never)]
fn node_in6(ctx: &TcContext) -> Encoded {
    handle::<V6>(ctx, Direction::Ingress(Origin::Network)).encode()
}

#[inline(never)]
fn pod_in4(ctx: &TcContext) -> Encoded {
    handle::<V4>(ctx, Direction::Ingress(Origin::Pod)).encode()
}

#[inline(never)]
fn pod_in6(ctx: &TcContext) -> Encoded {
    handle::<V6>(ctx, Direction::Ingress(Origin::Pod)).encode()
}

#[inline(never)]
fn node_out4(ctx: &TcContext) -> Encoded {
    node_out::<V4>(ctx).encode()
}

#[inline(never)]
fn node_out6(ctx: &TcContext) -> Encoded {
    node_out::<V6>(ctx).encode()
}

#[inline(never)]
fn pod_out4(ctx: &TcContext) -> Encoded {
    handle::<V4>(ctx, Direction::Egress).encode()
}

#[inline(never)]
fn pod_out6(ctx: &TcContext) -> Encoded {
    handle::<V6>(ctx, Direction::Egress).encode()
}

/// [`handle`] of a packet that leaves the node, or goes from one of its processes to another.
#[inline(always)]
fn node_out<F: RoutingFamily>(ctx: &TcContext) -> Step {
    let sender = loopback::is_sender(ctx);
    if !sender && loopback::is_looped(ctx) {
        // An answer that [`loopback::loop_back`] has sent.
        return Step::End(TC_ACT_UNSPEC);
    }
    let Some(headers) = headers::<F>(ctx) else {
        return Step::SlowPath;
    };
    if sender {
        if let Some(step) = process::decide::<F>(ctx, &headers) {
            return step;
        }
        if loopback::is_looped(ctx) {
            return Step::End(TC_ACT_UNSPEC);
        }
    }
    leave::<F>(ctx, &headers)
}

/// A packet that leaves by a device, as far as open flows tell.
#[inline(always)]
fn leave<F: RoutingFamily>(ctx: &TcContext, headers: &Headers<F::Words>) -> Step {
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    match departing::<F, _>(&maps, &headers.tuple, headers.tcp_flags) {
        Lookup::Unmatched => Step::End(TC_ACT_UNSPEC),
        Lookup::Translate(to) => Step::End(translate::<F>(ctx, headers, &to)),
        Lookup::Undecided => Step::Undecided,
    }
}

/// The path of almost all packets: of flows that are open, and of no Service. For the others it
/// says which step is next.
///
/// That step is taken by [`whole`] and not here, where every packet would pay for its locals.
#[inline(always)]
fn handle<F: RoutingFamily>(ctx: &TcContext, direction: Direction) -> Step {
    if host_routing::is_on()
        && let Direction::Ingress(origin) = direction
    {
        return host_routing::decide::<F>(ctx, origin);
    }
    let Some(headers) = headers::<F>(ctx) else {
        return Step::SlowPath;
    };
    let Direction::Ingress(origin) = direction else {
        return leave::<F>(ctx, &headers);
    };
    let maps = KernelMaps::<Tc>::new(ctx.as_ptr());
    match established::<F, _>(&maps, &arrival(&headers, origin)) {
        Lookup::Unmatched => Step::End(TC_ACT_UNSPEC),
        Lookup::Translate(to) => Step::End(loopback::arrive::<F>(ctx, &headers, &to)),
        Lookup::Undecided => Step::Undecided,
    }
}

/// The action for what leaves the node, after the steps that are next.
#[inline(always)]
fn sent<F: RoutingFamily>(ctx: &TcContext, step: Step) -> i32 {
    let step = match step {
        Step::Dialled => {
            let step = process::act::<F>(ctx, process::dial::<F>(ctx)).step();
            Tc::tell::<F>(ctx.as_ptr());
            step
        }
        step => step,
    };
    match step {
        Step::Sent => process::send::<F>(ctx),
        Step::SlowPath => told::<F>(ctx, slow_sent::<F>(ctx)),
        step => whole::<F>(ctx, Direction::Egress, step),
    }
}

/// The action, after the steps that are next.
#[inline(always)]
fn whole<F: RoutingFamily>(ctx: &TcContext, direction: Direction, step: Step) -> i32 {
    match (step, direction) {
        (Step::End(action), _) => action,
        (Step::SlowPath, Direction::Ingress(origin)) => {
            told::<F>(ctx, slow_ingress::<F>(ctx, origin))
        }
        (Step::SlowPath, Direction::Egress) => told::<F>(ctx, slow_egress::<F>(ctx)),
        (Step::Undecided, Direction::Ingress(origin)) => {
            let step = act::<F>(ctx, origin, open::<F>(ctx, origin)).step();
            told::<F>(ctx, host_routing::send_on::<F>(ctx, step))
        }
        (Step::Undecided, Direction::Egress) => told::<F>(ctx, refusal::<F>(ctx)),
        (step, Direction::Ingress(_)) => host_routing::send_on::<F>(ctx, step),
        // Host routing is where packets come in; the verifier would walk through it here as well.
        (_, Direction::Egress) => TC_ACT_UNSPEC,
    }
}

/// The action, after tracers were told what it is about.
#[inline(always)]
fn told<F: KernelFamily>(ctx: &TcContext, action: i32) -> i32 {
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

/// A packet that is not plain TCP or UDP, where it comes in.
// One function a direction: programs on the way out have no use for the search for a backend.
#[inline(never)]
fn slow_ingress<F: KernelFamily>(ctx: &TcContext, origin: Origin) -> i32 {
    slow::<F>(ctx, Direction::Ingress(origin))
}

/// The same where it leaves.
#[inline(never)]
fn slow_egress<F: KernelFamily>(ctx: &TcContext) -> i32 {
    slow::<F>(ctx, Direction::Egress)
}

/// The same where it leaves the node, or goes from one of its processes to another.
#[inline(never)]
fn slow_sent<F: KernelFamily>(ctx: &TcContext) -> i32 {
    slow::<F>(ctx, process::direction::<F>(ctx))
}

#[inline(always)]
fn slow<F: KernelFamily>(ctx: &TcContext, direction: Direction) -> i32 {
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

/// Whether the frame is one that this node may answer (SPEC H4): not one to a group, nor, from the
/// network, one for another host that this device only sees. A pod's goes to its bridge, whose
/// address its own device does not have.
#[inline(always)]
fn is_to_us(ctx: &TcContext, direction: Direction) -> bool {
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
