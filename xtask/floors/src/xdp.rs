//! Floors of `xdp_node`.

use aya_ebpf::{
    EbpfContext,
    bindings::xdp_action::{XDP_ABORTED, XDP_PASS},
    helpers::{bpf_fib_lookup, bpf_redirect},
    macros::xdp,
    programs::XdpContext,
};
use shunt_common::{
    family::{V4, V6, Words6},
    layout::{SCOPE_EXTERNAL, TCP},
};

use crate::{
    flow::{flow, open},
    wire::{L3, Seen, Wire, get, parse, rewrite, set, snat_slot},
};

/// The kernel's `struct bpf_fib_lookup`, without its unions.
#[repr(C)]
struct FibLookup {
    family: u8,
    l4_protocol: u8,
    sport: u16,
    dport: u16,
    tot_len: u16,
    ifindex: u32,
    flowinfo: u32,
    src: Words6,
    dst: Words6,
    vlan: u32,
    macs: [u16; 6],
}

/// Routes, takes a hop off, writes the MAC addresses, redirects.
#[inline(always)]
fn send_on<F: Wire>(ctx: &XdpContext, new: &Seen<F::Words>) -> u32 {
    let ingress = ctx.ingress_ifindex() as u32;
    let packet = new.packet;
    let mut fib = FibLookup {
        family: F::AF,
        l4_protocol: TCP,
        sport: new.src_port,
        dport: new.dst_port,
        tot_len: 0,
        ifindex: ingress,
        flowinfo: 0,
        src: F::fib(new.src),
        dst: F::fib(new.dst),
        vlan: 0,
        macs: [0; 6],
    };
    // SAFETY: `fib` has the kernel's layout; the headers were checked by `parse`.
    unsafe {
        if bpf_fib_lookup(
            ctx.as_ptr(),
            (&raw mut fib).cast(),
            size_of::<FibLookup>() as i32,
            0,
        ) != 0
        {
            return XDP_ABORTED;
        }
        if F::HEADER == 20 {
            let hops: u8 = get(packet, L3 + 8);
            set(packet, L3 + 8, hops - 1);
            let sum = u32::from(get::<u16>(packet, L3 + 10)) + 1;
            set(packet, L3 + 10, (sum + (sum >> 16)) as u16);
        } else {
            let hops: u8 = get(packet, L3 + 7);
            set(packet, L3 + 7, hops - 1);
        }
        for i in 0..3 {
            set(packet, 2 * i, fib.macs[3 + i]);
            set(packet, 6 + 2 * i, fib.macs[i]);
        }
        bpf_redirect(fib.ifindex, 0) as u32
    }
}

/// Established, backend elsewhere: one look-up.
#[inline(always)]
fn forward<F: Wire>(ctx: &XdpContext) -> u32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return XDP_ABORTED;
    };
    let Some(flow) = flow::<F>(&old.key::<F>()) else {
        return XDP_ABORTED;
    };
    let new = Seen {
        src: flow.snat,
        dst: flow.backend,
        src_port: flow.snat_port.to_be(),
        dst_port: flow.backend_port.to_be(),
        ..old
    };
    rewrite::<F>(&old, &new, true);
    send_on::<F>(ctx, &new)
}

/// Established, backend here: one look-up, up to the kernel.
#[inline(always)]
fn local<F: Wire>(ctx: &XdpContext) -> u32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return XDP_ABORTED;
    };
    let Some(flow) = flow::<F>(&old.key::<F>()) else {
        return XDP_ABORTED;
    };
    let new = Seen {
        dst: flow.backend,
        dst_port: flow.backend_port.to_be(),
        ..old
    };
    rewrite::<F>(&old, &new, true);
    XDP_PASS
}

/// A reply to a translated source: one array entry.
#[inline(always)]
fn reply<F: Wire>(ctx: &XdpContext) -> u32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return XDP_ABORTED;
    };
    let Some(slot) = snat_slot::<F>(old.dst_port, old.src, old.src_port) else {
        return XDP_ABORTED;
    };
    let new = Seen {
        src: slot.frontend,
        dst: slot.client,
        src_port: slot.frontend_port.to_be(),
        dst_port: slot.client_port.to_be(),
        ..old
    };
    rewrite::<F>(&old, &new, true);
    send_on::<F>(ctx, &new)
}

/// A new flow to a node port.
#[inline(always)]
fn new_flow<F: Wire>(ctx: &XdpContext, remote: bool) -> u32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return XDP_ABORTED;
    };
    let src = if remote { F::words(F::NODE) } else { old.src };
    let Some(new) = open::<F>(&old, F::UNSPECIFIED, SCOPE_EXTERNAL, src) else {
        return XDP_ABORTED;
    };
    let new = Seen { src, ..new };
    rewrite::<F>(&old, &new, true);
    if remote {
        send_on::<F>(ctx, &new)
    } else {
        XDP_PASS
    }
}

/// One program per family.
macro_rules! programs {
    ($($name4:ident $name6:ident = $body:ident($($arg:expr)?);)+) => { $(
        #[xdp]
        fn $name4(ctx: XdpContext) -> u32 {
            $body::<V4>(&ctx $(, $arg)?)
        }

        #[xdp]
        fn $name6(ctx: XdpContext) -> u32 {
            $body::<V6>(&ctx $(, $arg)?)
        }
    )+ };
}

programs! {
    floor_fwd4 floor_fwd6 = forward();
    floor_local4 floor_local6 = local();
    floor_reply4 floor_reply6 = reply();
    floor_new4 floor_new6 = new_flow(true);
    floor_new_lcl4 floor_new_lcl6 = new_flow(false);
}
