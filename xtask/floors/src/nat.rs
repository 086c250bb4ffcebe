//! The least that a stateful DNAT at tc can be, for real connections: TCP over IPv4, one entry per
//! flow, no policies.
//!
//! What comes in is looked up in an LRU by the client's side, a new flow in a table of frontends;
//! what goes out to the client gets the frontend's address back. Routing is the kernel's.

use aya_ebpf::{
    bindings::TC_ACT_UNSPEC,
    btf_maps::{HashMap, LruHashMap},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use shunt_common::family::V4;

use crate::{
    tc::translate,
    wire::{Seen, parse},
};

/// An address and a port as they stand in packets.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Side {
    addr: u32,
    port: u32,
}

/// Where a flow leads.
#[repr(C)]
#[derive(Clone, Copy)]
struct Nat {
    frontend: Side,
    backend: Side,
}

#[btf_map(name = "nat_frontends")]
static FRONTENDS: HashMap<Side, Side, 1024> = HashMap::new();
/// By the client's side.
#[btf_map(name = "nat_flows")]
static FLOWS: LruHashMap<Side, Nat, 524_288> = LruHashMap::new();

/// Towards the backend.
#[classifier]
fn floor_nat_in(ctx: TcContext) -> i32 {
    let Some(old) = parse::<V4>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_UNSPEC;
    };
    let client = Side {
        addr: old.src,
        port: old.src_port.into(),
    };
    let frontend = Side {
        addr: old.dst,
        port: old.dst_port.into(),
    };
    // SAFETY: copied at once; an entry that is replaced meanwhile is freed after this run only.
    let known = unsafe { FLOWS.get(client) }.copied();
    let backend = match known {
        Some(nat) if nat.frontend == frontend => nat.backend,
        _ => {
            // SAFETY: as above.
            let Some(&backend) = (unsafe { FRONTENDS.get(frontend) }) else {
                return TC_ACT_UNSPEC;
            };
            let nat = Nat { frontend, backend };
            let _full = FLOWS.insert(client, nat, 0);
            backend
        }
    };
    let new = Seen {
        dst: backend.addr,
        dst_port: backend.port as u16,
        ..old
    };
    translate::<V4>(&ctx, &old, &new)
}

/// Back to the client.
#[classifier]
fn floor_nat_out(ctx: TcContext) -> i32 {
    let Some(old) = parse::<V4>(ctx.data(), ctx.data_end()) else {
        return TC_ACT_UNSPEC;
    };
    let client = Side {
        addr: old.dst,
        port: old.dst_port.into(),
    };
    // SAFETY: copied at once; an entry that is replaced meanwhile is freed after this run only.
    let Some(nat) = unsafe { FLOWS.get(client) }.copied() else {
        return TC_ACT_UNSPEC;
    };
    if nat.backend.addr != old.src || nat.backend.port != u32::from(old.src_port) {
        return TC_ACT_UNSPEC;
    }
    let new = Seen {
        src: nat.frontend.addr,
        src_port: nat.frontend.port as u16,
        ..old
    };
    translate::<V4>(&ctx, &old, &new)
}
