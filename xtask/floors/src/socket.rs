//! Floors of the socket hooks: look up, choose, rewrite.

use aya_ebpf::{
    EbpfContext, helpers::bpf_get_socket_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use shunt_common::{
    family::{V4, V6, Words6},
    hash,
    layout::{FrontendKey, SCOPE_INTERNAL, Slot},
};

use crate::wire::{Wire, bytes, value};

#[inline(always)]
fn choose<F: Wire>(ctx: &SockAddrContext, addr: F::Words) -> Option<Slot<F::Words>> {
    // SAFETY: the context is valid while the program runs.
    let (port, proto) = unsafe {
        let fields = ctx.sock_addr;
        (
            (&raw const (*fields).user_port).read_volatile(),
            (&raw const (*fields).protocol).read_volatile(),
        )
    };
    let key = FrontendKey {
        addr,
        port: u16::from_be(port as u16),
        proto: proto as u8,
        scope: SCOPE_INTERNAL,
        reserved: 0,
    };
    // SAFETY: read at once; the entry is freed after this run only. The helper takes the program's
    // own context.
    let (frontend, cookie) = unsafe {
        (
            F::FRONTENDS.get(bytes::<_, FrontendKey<F::Addr>>(&key))?,
            bpf_get_socket_cookie(ctx.as_ptr()),
        )
    };
    let index = frontend.slot_base + hash::pick(hash::mix(cookie) as u32, frontend.slot_count);
    value::<_, Slot<F::Words>>(F::SLOTS.get_ptr_mut(index)).copied()
}

#[inline(always)]
fn dial4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        let addr = (&raw const (*ctx.sock_addr).user_ip4).read_volatile();
        if let Some(slot) = choose::<V4>(ctx, addr) {
            (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(slot.addr);
            (&raw mut (*ctx.sock_addr).user_port).write_volatile(u32::from(slot.port.to_be()));
        }
    }
    1
}

#[inline(always)]
fn dial6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        let words = &raw mut (*ctx.sock_addr).user_ip6;
        let word = |i: usize| u64::from(words.cast::<u32>().add(i).read_volatile());
        let addr = Words6 {
            high: word(0) | word(1) << 32,
            low: word(2) | word(3) << 32,
        };
        if let Some(slot) = choose::<V6>(ctx, addr) {
            let set =
                |i: usize, value: u64| words.cast::<u32>().add(i).write_volatile(value as u32);
            set(0, slot.addr.high);
            set(1, slot.addr.high >> 32);
            set(2, slot.addr.low);
            set(3, slot.addr.low >> 32);
            (&raw mut (*ctx.sock_addr).user_port).write_volatile(u32::from(slot.port.to_be()));
        }
    }
    1
}

#[cgroup_sock_addr(connect4)]
fn floor_connect4(ctx: SockAddrContext) -> i32 {
    dial4(&ctx)
}

#[cgroup_sock_addr(connect6)]
fn floor_connect6(ctx: SockAddrContext) -> i32 {
    dial6(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
fn floor_sendmsg4(ctx: SockAddrContext) -> i32 {
    dial4(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
fn floor_sendmsg6(ctx: SockAddrContext) -> i32 {
    dial6(&ctx)
}
