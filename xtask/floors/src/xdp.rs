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
    hash,
    layout::{Flow, FlowKey, FrontendKey, SCOPE_EXTERNAL, Slot, TCP},
};

use crate::wire::{L3, Seen, Wire, bytes, get, parse, rewrite, set, snat_slot, value};

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
        if bpf_fib_lookup(ctx.as_ptr(), (&raw mut fib).cast(), size_of::<FibLookup>() as i32, 0) != 0 {
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
    let key = old.key::<F>();
    let Some(flow) = value::<_, Flow<F::Words>>(F::FLOWS.get_ptr_mut(bytes::<_, FlowKey<F::Addr>>(&key))) else {
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
    let key = old.key::<F>();
    let Some(flow) = value::<_, Flow<F::Words>>(F::FLOWS.get_ptr_mut(bytes::<_, FlowKey<F::Addr>>(&key))) else {
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

/// A new flow to a node port as it is usually done: frontend, miss, slot, and an entry for each direction.
#[inline(always)]
fn new_flow<F: Wire>(ctx: &XdpContext, remote: bool) -> u32 {
    let Some(old) = parse::<F>(ctx.data(), ctx.data_end()) else {
        return XDP_ABORTED;
    };
    let (src_port, dst_port) = (u16::from_be(old.src_port), u16::from_be(old.dst_port));
    let frontend_key = FrontendKey {
        addr: F::UNSPECIFIED,
        port: dst_port,
        proto: TCP,
        scope: SCOPE_EXTERNAL,
        reserved: 0,
    };
    // SAFETY: read at once; the entry is freed after this run only.
    let Some(frontend) = (unsafe { F::FRONTENDS.get(bytes::<_, FrontendKey<F::Addr>>(&frontend_key)) }) else {
        return XDP_ABORTED;
    };
    let mut key = FlowKey {
        frontend: old.dst,
        frontend_port: dst_port,
        ..old.key::<F>()
    };
    if F::FLOOR_FLOWS.get_ptr(bytes::<_, FlowKey<F::Addr>>(&key)).is_some() {
        return XDP_ABORTED;
    }
    let choice = hash::flow::<F>(old.src, src_port, old.dst, dst_port, TCP);
    let index = frontend.slot_base + hash::pick(choice, frontend.slot_count);
    let Some(slot) = value::<_, Slot<F::Words>>(F::SLOTS.get_ptr_mut(index)) else {
        return XDP_ABORTED;
    };
    let snat = if remote { F::words(F::NODE) } else { old.src };
    let flow = Flow {
        frontend: old.dst,
        backend: slot.addr,
        snat,
        frontend_port: dst_port,
        backend_port: slot.port,
        snat_port: src_port,
        state: 0,
        backend_id: slot.backend,
        last_seen: 1,
        epoch: 0,
        asked: 0,
        tried: 0,
    };
    let new = Seen {
        src: snat,
        dst: slot.addr,
        src_port: old.src_port,
        dst_port: slot.port.to_be(),
        ..old
    };
    if F::FLOOR_FLOWS
        .insert(bytes::<_, FlowKey<F::Addr>>(&key), bytes::<_, Flow<F::Addr>>(&flow), 0)
        .is_err()
    {
        return XDP_ABORTED;
    }
    key.client = slot.addr;
    key.frontend = old.src;
    key.client_port = slot.port;
    key.frontend_port = src_port;
    if F::FLOOR_FLOWS
        .insert(bytes::<_, FlowKey<F::Addr>>(&key), bytes::<_, Flow<F::Addr>>(&flow), 0)
        .is_err()
    {
        return XDP_ABORTED;
    }
    rewrite::<F>(&old, &new, true);
    if remote { send_on::<F>(ctx, &new) } else { XDP_PASS }
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
