//! tc on pod and node devices: packets of senders that no socket hook sees, forwarded traffic, and
//! replies.
//!
//! Only addresses and ports change here; routing, neighbours and netfilter stay the kernel's,
//! unless there is [`host_routing`].
//!
//! The programs on the devices know the path of almost all packets: of flows that are open, and of
//! no Service. They hand the others over to two programs for all of them, [`undecided`] and
//! [`slow_path`], by a tail call ([`hand_over`]): so these are verified once, and no packet of an
//! open flow pays for what they need.

mod answer;
mod hand_over;
mod host_routing;
mod loopback;
mod process;
mod skb;
mod slow_path;
mod step;
mod undecided;

use aya_ebpf::{EbpfContext, bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};
use shunt_common::{
    balance::{departing, established, port_collides},
    family::{Family, V4, V6},
    packet::Headers,
    verdict::{Direction, Lookup, Origin},
};

use self::{
    hand_over::hand_over,
    host_routing::RoutingFamily,
    skb::{arrival, family, headers, translate},
    step::{Encoded, Step},
};
use crate::maps::{KernelMaps, Tc};

/// Packets from the network.
#[classifier]
fn tc_node_in(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => arrived::<V4>(&ctx, Origin::Network, node_in4(&ctx).step()),
        Some(V6::ETHERTYPE) => arrived::<V6>(&ctx, Origin::Network, node_in6(&ctx).step()),
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
        Some(V4::ETHERTYPE) => arrived::<V4>(&ctx, Origin::Pod, pod_in4(&ctx).step()),
        Some(V6::ETHERTYPE) => arrived::<V6>(&ctx, Origin::Pod, pod_in6(&ctx).step()),
        _ => TC_ACT_UNSPEC,
    }
}

/// Packets to a pod.
#[classifier]
fn tc_pod_out(ctx: TcContext) -> i32 {
    match family(&ctx) {
        Some(V4::ETHERTYPE) => left(&ctx, pod_out4(&ctx).step()),
        Some(V6::ETHERTYPE) => left(&ctx, pod_out6(&ctx).step()),
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
        Lookup::Unmatched
            if loopback::is_sender(ctx)
                && port_collides::<F, _>(&maps, &headers.tuple, headers.tcp_flags) =>
        {
            Step::Dialled
        }
        Lookup::Unmatched => Step::End(TC_ACT_UNSPEC),
        Lookup::Translate(to) => Step::End(translate::<F>(ctx, headers, &to)),
        Lookup::Undecided => Step::Undecided,
    }
}

/// The path of almost all packets: of flows that are open, and of no Service. For the others it
/// says which step is next.
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

/// The action for what arrives, after the step that is next.
#[inline(always)]
fn arrived<F: RoutingFamily>(ctx: &TcContext, origin: Origin, step: Step) -> i32 {
    match step {
        Step::End(action) => action,
        Step::Undecided | Step::SlowPath => hand_over(ctx, Direction::Ingress(origin), step),
        step => host_routing::send_on::<F>(ctx, step),
    }
}

/// The action for what leaves the node, after the step that is next.
#[inline(always)]
fn sent<F: RoutingFamily>(ctx: &TcContext, step: Step) -> i32 {
    match step {
        Step::Sent => process::send::<F>(ctx),
        Step::SlowPath => hand_over(ctx, Direction::Ingress(Origin::Process), step),
        step => left(ctx, step),
    }
}

/// The action for what leaves, after the step that is next.
#[inline(always)]
fn left(ctx: &TcContext, step: Step) -> i32 {
    match step {
        Step::End(action) => action,
        Step::Dialled => hand_over(ctx, Direction::Ingress(Origin::Process), step),
        step => hand_over(ctx, Direction::Egress, step),
    }
}
