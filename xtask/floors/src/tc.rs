//! Floors of the tc programs, right for packets whose checksum is not complete yet
//! (`CHECKSUM_PARTIAL`).

use aya_ebpf::{
    bindings::{BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_l4_csum_replace,
    macros::classifier,
    programs::TcContext,
};
use shunt_common::{
    family::{V4, V6},
    layout::{FlowKey, SCOPE_EXTERNAL, SCOPE_INTERNAL},
};

use crate::{
    flow::{flow, open},
    wire::{Seen, Wire, addresses, fold32, parse, ports, rewrite, snat_slot},
};

/// The transport checksum by the kernel, the rest into the packet.
#[inline(always)]
pub(crate) fn translate<F: Wire>(
    ctx: &TcContext,
    old: &Seen<F::Words>,
    new: &Seen<F::Words>,
) -> i32 {
    let offset = (F::L4 + 16) as u32;
    // SAFETY: the helper checks the offset.
    unsafe {
        if bpf_l4_csum_replace(
            ctx.skb.skb,
            offset,
            0,
            fold32(addresses::<F>(old, new)),
            u64::from(BPF_F_PSEUDO_HDR),
        ) != 0
            || bpf_l4_csum_replace(ctx.skb.skb, offset, 0, fold32(ports(old, new)), 0) != 0
        {
            return TC_ACT_SHOT;
        }
    }
    // The helper may have moved the packet.
    let Some(again) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_SHOT;
    };
    rewrite::<F>(
        &Seen {
            packet: again.packet,
            ..*old
        },
        new,
        false,
    );
    TC_ACT_UNSPEC
}

/// Established, towards the backend: one look-up.
#[inline(always)]
fn forward<F: Wire>(ctx: &TcContext) -> i32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_SHOT;
    };
    let Some(flow) = flow::<F>(&old.key::<F>()) else {
        return TC_ACT_SHOT;
    };
    let new = Seen {
        dst: flow.backend,
        dst_port: flow.backend_port.to_be(),
        ..old
    };
    translate::<F>(ctx, &old, &new)
}

/// A reply on its way to the client: one look-up.
#[inline(always)]
fn reply<F: Wire>(ctx: &TcContext) -> i32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_SHOT;
    };
    let key = FlowKey {
        client: old.dst,
        client_port: u16::from_be(old.dst_port),
        ..old.key::<F>()
    };
    let Some(flow) = flow::<F>(&key) else {
        return TC_ACT_SHOT;
    };
    let new = Seen {
        src: flow.frontend,
        src_port: flow.frontend_port.to_be(),
        ..old
    };
    translate::<F>(ctx, &old, &new)
}

/// Established and SNAT, where it arrives: one look-up; the source's port changes, its address only
/// when it leaves.
#[inline(always)]
fn snat_in<F: Wire>(ctx: &TcContext) -> i32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_SHOT;
    };
    let Some(flow) = flow::<F>(&old.key::<F>()) else {
        return TC_ACT_SHOT;
    };
    let new = Seen {
        dst: flow.backend,
        src_port: flow.snat_port.to_be(),
        dst_port: flow.backend_port.to_be(),
        ..old
    };
    translate::<F>(ctx, &old, &new)
}

/// The same where it leaves: one array entry.
#[inline(always)]
fn snat_out<F: Wire>(ctx: &TcContext) -> i32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_SHOT;
    };
    let Some(slot) = snat_slot::<F>(old.src_port, old.dst, old.dst_port) else {
        return TC_ACT_SHOT;
    };
    let new = Seen {
        src: slot.snat,
        ..old
    };
    translate::<F>(ctx, &old, &new)
}

/// A reply to a translated source, where it arrives: one array entry; the frontend comes in where
/// it leaves.
#[inline(always)]
fn snat_reply_in<F: Wire>(ctx: &TcContext) -> i32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_SHOT;
    };
    let Some(slot) = snat_slot::<F>(old.dst_port, old.src, old.src_port) else {
        return TC_ACT_SHOT;
    };
    let new = Seen {
        dst: slot.client,
        ..old
    };
    translate::<F>(ctx, &old, &new)
}

/// The same where it leaves: one array entry.
#[inline(always)]
fn snat_reply_out<F: Wire>(ctx: &TcContext) -> i32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_SHOT;
    };
    let Some(slot) = snat_slot::<F>(old.dst_port, old.src, old.src_port) else {
        return TC_ACT_SHOT;
    };
    let new = Seen {
        src: slot.frontend,
        src_port: slot.frontend_port.to_be(),
        dst_port: slot.client_port.to_be(),
        ..old
    };
    translate::<F>(ctx, &old, &new)
}

/// A new flow. Its source, where it comes through a node port, is translated where it leaves.
#[inline(always)]
fn new_flow<F: Wire>(ctx: &TcContext, node_port: bool) -> i32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_SHOT;
    };
    let (addr, scope) = match node_port {
        true => (F::UNSPECIFIED, SCOPE_EXTERNAL),
        false => (old.dst, SCOPE_INTERNAL),
    };
    let Some(new) = open::<F>(&old, addr, scope, old.src) else {
        return TC_ACT_SHOT;
    };
    translate::<F>(ctx, &old, &new)
}

/// One program per family.
macro_rules! programs {
    ($($name4:ident $name6:ident = $body:ident($($arg:expr)?);)+) => { $(
        #[classifier]
        fn $name4(ctx: TcContext) -> i32 {
            $body::<V4>(&ctx $(, $arg)?)
        }

        #[classifier]
        fn $name6(ctx: TcContext) -> i32 {
            $body::<V6>(&ctx $(, $arg)?)
        }
    )+ };
}

programs! {
    floor_tc_fwd4 floor_tc_fwd6 = forward();
    floor_tc_reply4 floor_tc_reply6 = reply();
    floor_snat_in4 floor_snat_in6 = snat_in();
    floor_snat_out4 floor_snat_out6 = snat_out();
    floor_sreply_in4 floor_sreply_in6 = snat_reply_in();
    floor_sreply_out4 floor_sreply_out6 = snat_reply_out();
    floor_tc_new4 floor_tc_new6 = new_flow(false);
    floor_tc_new_np4 floor_tc_new_np6 = new_flow(true);
}
