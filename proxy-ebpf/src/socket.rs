//! The cgroup hooks: a frontend is replaced by a backend before a packet exists, and shown again
//! when a process asks who its peer is.
//!
//! `connect` of UDP is left alone on the node: its packets are translated. In a pod it has its
//! effect, because the pod's device may have no program yet, and datagrams cost nothing so; when the
//! backend does not serve any more, the packets are translated from there on
//! ([`shunt_common::balance::Maps::hooked`]).
//!
//! With `--socket-lb host` pods' sockets are left to packets too, and with `--socket-lb-labels` those of
//! labelled pods, but for what they were led to before.
//! Those hooks that only show who a peer is stay with `--socket-lb off` as long as such sockets are open.
//!
//! What a connected socket dialled is remembered under its cookie ([`SOCKETS`]) until it closes;
//! what an unconnected one sent to, with the socket itself ([`UDP_PEERS`]).

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_ANY, bpf_sock_addr},
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie,
        bpf_set_retval,
    },
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use shunt_common::{
    address::{self, Unmatched},
    affinity,
    balance::{Maps, socket_frontend},
    event::Event,
    failover,
    family::{Family, MAPPED, V4, V6, Words6},
    filter, hash,
    layout::*,
};

use crate::{
    maps::{
        BACKENDS, KernelFamily, KernelMaps, LEFT_OUT, SOCKETS, Socket, UDP_PEERS, count, words,
    },
    trace,
};

/// Let the call go on.
const ALLOW: i32 = 1;
/// Let it fail, with the error set by `bpf_set_retval`.
const DENY: i32 = 0;

/// What is dialled, or who sent: address and port as the context holds them.
trait Peer: KernelFamily {
    fn addr(ctx: &SockAddrContext) -> Self::Words;
    fn set_addr(ctx: &SockAddrContext, addr: Self::Words);
}

/// The context's fields. The verifier turns each access into the kernel's own.
#[inline(always)]
fn fields(ctx: &SockAddrContext) -> *mut bpf_sock_addr {
    ctx.sock_addr
}

#[inline(always)]
fn word6(ctx: &SockAddrContext, i: usize) -> u32 {
    // SAFETY: the context is valid while the program runs, `i` is below 4.
    unsafe { (&raw const (*fields(ctx)).user_ip6[i]).read_volatile() }
}

#[inline(always)]
fn set_word6(ctx: &SockAddrContext, i: usize, word: u32) {
    // SAFETY: the context is valid while the program runs, `i` is below 4.
    unsafe { (&raw mut (*fields(ctx)).user_ip6[i]).write_volatile(word) };
}

impl Peer for V4 {
    #[inline(always)]
    fn addr(ctx: &SockAddrContext) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (&raw const (*fields(ctx)).user_ip4).read_volatile() }
    }

    #[inline(always)]
    fn set_addr(ctx: &SockAddrContext, addr: u32) {
        // SAFETY: the context is valid while the program runs.
        unsafe { (&raw mut (*fields(ctx)).user_ip4).write_volatile(addr) };
    }
}

impl Peer for V6 {
    #[inline(always)]
    fn addr(ctx: &SockAddrContext) -> Words6 {
        let pair = |i| u64::from(word6(ctx, i)) | u64::from(word6(ctx, i + 1)) << 32;
        Words6 {
            high: pair(0),
            low: pair(2),
        }
    }

    #[inline(always)]
    fn set_addr(ctx: &SockAddrContext, addr: Words6) {
        set_word6(ctx, 0, addr.high as u32);
        set_word6(ctx, 1, (addr.high >> 32) as u32);
        set_word6(ctx, 2, addr.low as u32);
        set_word6(ctx, 3, (addr.low >> 32) as u32);
    }
}

/// An IPv4 address in an IPv6 socket (`::ffff:a.b.c.d`): decided as IPv4, read and written where
/// IPv6 stands.
#[derive(Clone, Copy)]
struct InSocket6<'a>(&'a SockAddrContext);

impl InSocket6<'_> {
    #[inline(always)]
    fn is_mapped(self) -> bool {
        word6(self.0, 0) == 0 && word6(self.0, 1) == 0 && word6(self.0, 2) == MAPPED
    }
}

#[inline(always)]
fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: the context is valid while the program runs. The port stands in network order in the
    // low half.
    u16::from_be(unsafe { (&raw const (*fields(ctx)).user_port).read_volatile() } as u16)
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: the context is valid while the program runs.
    unsafe { (&raw mut (*fields(ctx)).user_port).write_volatile(u32::from(port.to_be())) };
}

/// What the process does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Connect,
    Send,
}

/// What to dial: a backend, or what was dialled. `Err`: refuse.
// Not an `Option` to leave it alone: LLVM computes with the port that is not there, which the
// verifier forbids.
#[inline(always)]
fn choose<F: Peer>(
    ctx: &SockAddrContext,
    addr: F::Words,
    call: Call,
) -> Result<(F::Words, u16), ()> {
    let maps = KernelMaps::<Socket>::new(ctx.as_ptr());
    // SAFETY: the context is valid while the program runs.
    let proto = unsafe { (&raw const (*fields(ctx)).protocol).read_volatile() } as u8;
    let port = port(ctx);
    let Some(frontend) = socket_frontend::<F, _>(&maps, addr, port, proto, || {
        means_this_node::<F>(ctx, &maps, addr)
    }) else {
        return if is_refused::<F>(ctx, addr, call) && !is_left_out::<F>(ctx, &maps) {
            let peer = || asked_for::<F>(addr, port);
            tell_call(ctx, Event::UnknownPort, None, peer);
            Err(())
        } else {
            forget::<F>(ctx, addr, port, call);
            Ok((addr, port))
        };
    };
    let dialled = F::mapped(addr);
    if proto == UDP {
        let by_packets = match call {
            Call::Connect => frontend.slot_count != 0 && !is_bound_to_device(ctx),
            Call::Send if is_connected(ctx) => {
                if let Some(peer) = connected(cookie(ctx))
                    && peer.frontend_port == port
                    && words(&peer.frontend) == dialled
                {
                    // As what it sends without an address.
                    return Ok((F::unmapped(words(&peer.backend)), peer.backend_port));
                }
                true
            }
            Call::Send => false,
        };
        // A connected UDP socket may outlive its backend by far, and nobody could tell it to dial
        // anew. Where packets of the node itself are translated, its are, one by one; but where
        // there is no backend, it is told at once. Answers come by the loopback device.
        if by_packets && is_host::<F>(ctx, &maps) {
            return Ok((addr, port));
        }
    }
    // What it was led to before goes on.
    if is_left_out::<F>(ctx, &maps) {
        return Ok((addr, port));
    }
    // From a source port of its own choice it may dial the backend itself by another socket: only
    // packets can be given another port.
    if call == Call::Connect
        && frontend.slot_count != 0
        && has_port(ctx)
        && !is_connected(ctx)
        && !is_host::<F>(ctx, &maps)
    {
        return Ok((addr, port));
    }
    if call == Call::Send
        && let Some(peer) = sent(ctx, |peer| {
            peer.frontend_port == port && words(&peer.frontend) == dialled
        })
        && serves::<F>(peer)
    {
        return Ok((F::unmapped(words(&peer.backend)), peer.backend_port));
    }
    // The source of a pod's socket is not chosen yet: its packets will show it, at the pod's
    // device. The node itself is let through whatever the ranges (SPEC P5).
    if frontend.flags & (FRONTEND_SOURCE_RANGES | FRONTEND_PACKETS_ONLY) != 0
        && !is_host::<F>(ctx, &maps)
    {
        return Ok((addr, port));
    }
    let cookie = cookie(ctx);
    // One socket, one choice.
    let choice = hash::mix(cookie ^ u64::from(frontend.slot_base) << 40) as u32;
    let slot = if frontend.slot_count == 0 {
        None
    } else {
        let avoids_silent = proto == TCP && frontend.flags & FRONTEND_NO_RETRY == 0;
        let index = if frontend.flags & FRONTEND_AFFINITY != 0 {
            kept_slot::<F>(ctx, &frontend, choice, avoids_silent)
        } else {
            let index = frontend
                .slot_base
                .wrapping_add(hash::pick(choice, frontend.slot_count));
            if avoids_silent {
                failover::socket_slot::<F, _>(&maps, &frontend, index, choice)
            } else {
                index
            }
        };
        Maps::<F>::slot(&maps, index)
    };
    let Some(slot) = slot else {
        let event = if frontend.flags & FRONTEND_DROP != 0 {
            Event::PolicyDrop
        } else {
            Event::NoBackend
        };
        count(event);
        let peer = || asked_for::<F>(addr, port);
        tell_call(ctx, event, Some(frontend.service), peer);
        return Err(());
    };
    let of_node = if call == Call::Connect && is_host::<F>(ctx, &maps) {
        SOCKET_OF_NODE
    } else {
        0
    };
    let peer = SocketPeer {
        frontend: V6::bytes(dialled),
        backend: V6::bytes(F::mapped(slot.addr)),
        frontend_port: port,
        backend_port: slot.port,
        backend_id: slot.backend | of_node,
    };
    // Where it cannot be remembered packets are translated, but for answers that come by another
    // device than the socket's.
    let stays = is_bound_to_device(ctx) && is_host::<F>(ctx, &maps);
    let recorded = match call {
        Call::Connect => record_connected(cookie, proto, &peer),
        Call::Send => record_sent(ctx, &peer, stays),
    };
    if !recorded {
        if matches!(call, Call::Connect) {
            tell_call(ctx, Event::SocketsFull, Some(frontend.service), || peer);
        }
        if !stays {
            return Ok((addr, port));
        }
    }
    Maps::<F>::count_flow(&maps, slot.backend);
    tell_call(ctx, Event::SocketFlow, Some(frontend.service), || peer);
    Ok((slot.addr, slot.port))
}

/// Whether the backend of an unconnected socket's peer serves, and is that of its id still: nobody
/// keeps count of what such sockets remember.
#[inline(always)]
fn serves<F: Peer>(peer: &SocketPeer) -> bool {
    BACKENDS.get(peer.backend_id).is_some_and(|backend| {
        backend.flags & BACKEND_SERVING != 0
            && (backend.identity == 0
                || backend.identity
                    == hash::backend::<F>(F::unmapped(words(&peer.backend)), peer.backend_port))
    })
}

/// The socket's number.
#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes the program's own context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// What was dialled, without a backend.
#[inline(always)]
fn asked_for<F: Peer>(addr: F::Words, port: u16) -> SocketPeer {
    SocketPeer {
        frontend: V6::bytes(F::mapped(addr)),
        frontend_port: port,
        ..SocketPeer::default()
    }
}

/// Of [`state`]: bound to a device, to a port, connected.
const BOUND: u32 = 1 << 0;
const PORT: u32 = 1 << 1;
const PEER: u32 = 1 << 2;

/// What the socket is before the call.
// Not inlined: LLVM would make one load of several, by a pointer that the verifier does not take.
#[inline(never)]
fn state(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the context is valid while the program runs, and so is its socket.
    unsafe {
        let sock = (&raw const (*fields(ctx)).__bindgen_anon_1.sk).read_volatile();
        let device = (&raw const (*sock).bound_dev_if).read_volatile();
        let port = (&raw const (*sock).src_port).read_volatile();
        let peer = (&raw const (*sock).dst_port).read_volatile();
        [(device != 0, BOUND), (port != 0, PORT), (peer != 0, PEER)]
            .iter()
            .fold(0, |state, (is, bit)| if *is { state | bit } else { state })
    }
}

/// Whether the socket is bound to a device (`SO_BINDTODEVICE`).
#[inline(always)]
fn is_bound_to_device(ctx: &SockAddrContext) -> bool {
    state(ctx) & BOUND != 0
}

/// Whether the socket has a source port already.
#[inline(always)]
fn has_port(ctx: &SockAddrContext) -> bool {
    state(ctx) & PORT != 0
}

/// The socket asks a peer itself, and not a Service: what is remembered of the socket must not give that
/// peer a Service's name.
#[inline(always)]
fn forget<F: Peer>(ctx: &SockAddrContext, addr: F::Words, port: u16, call: Call) {
    if may_be_backend(ctx.as_ptr(), port) || call == Call::Connect && is_connected(ctx) {
        forget_peer(ctx, F::mapped(addr), port, call);
    }
}

#[inline(never)]
fn forget_peer(ctx: &SockAddrContext, addr: Words6, port: u16, call: Call) -> i32 {
    if call == Call::Send {
        // SAFETY: as in [`sent`].
        if let Some(peers) = unsafe { UDP_PEERS.get_ptr_mut(ctx).as_mut() } {
            for peer in &mut peers.peers {
                if peer.backend_port == port && words(&peer.backend) == addr {
                    // The backend stays: no Service is asked there any more but by packets.
                    peer.frontend = [0; 16];
                    peer.frontend_port = 0;
                }
            }
        }
        return 0;
    }
    let cookie = cookie(ctx);
    // Looking takes no lock.
    if connected(cookie).is_some() {
        let _gone_already = SOCKETS.remove(cookie);
    }
    0
}

/// Whether the socket is connected already.
#[inline(always)]
fn is_connected(ctx: &SockAddrContext) -> bool {
    state(ctx) & PEER != 0
}

/// Refuses a port that no Service has on a cluster IP (see [`address`]). Other destinations are
/// left alone, those that nobody has too: tc drops what is sent there, and a client that tries
/// again may find that a Service has come.
///
/// `connect` of a UDP socket sends nothing, and resolvers use it to learn whether an address of a
/// family can be reached, with ports of their own choice (Go's 9, musl's 65535; RFC 6724). So that
/// goes through, but in the node's own namespace, where no device would refuse the datagrams.
#[inline(never)]
fn is_refused<F: Peer>(ctx: &SockAddrContext, addr: F::Words, call: Call) -> bool {
    let maps = KernelMaps::<Socket>::new(ctx.as_ptr());
    // SAFETY: the context is valid while the program runs.
    let proto = unsafe { (&raw const (*fields(ctx)).protocol).read_volatile() } as u8;
    let Some(config) = Maps::<F>::config(&maps) else {
        return false;
    };
    if !matches!(proto, TCP | UDP | SCTP) || !address::may_be_service::<F>(config, addr) {
        return false;
    }
    if proto == UDP
        && call == Call::Connect
        // SAFETY: the helper takes the program's own context.
        && unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } != config.host_netns
    {
        return false;
    }
    address::unknown_port::<F, _>(&maps, addr) == Unmatched::Refuse
}

#[inline(always)]
fn means_this_node<F: Peer>(
    ctx: &SockAddrContext,
    maps: &KernelMaps<Socket>,
    addr: F::Words,
) -> bool {
    if !F::is_loopback(addr) {
        return Maps::<F>::is_node_addr(maps, &addr);
    }
    // A pod's loopback is the pod itself.
    Maps::<F>::config(maps).is_some_and(|config| config.flags & F::NODEPORT_LOOPBACK != 0)
        && is_host::<F>(ctx, maps)
}

/// Whether the socket is in the node's own network namespace.
#[inline(always)]
fn is_host<F: Peer>(ctx: &SockAddrContext, maps: &KernelMaps<Socket>) -> bool {
    // SAFETY: the helper takes the program's own context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    Maps::<F>::config(maps).is_some_and(|config| config.host_netns == netns)
}

/// Whether the socket's packets are translated instead, by `--socket-lb host` or its pod's label.
#[inline(always)]
fn is_left_out<F: Peer>(ctx: &SockAddrContext, maps: &KernelMaps<Socket>) -> bool {
    let flags = Maps::<F>::config(maps).map_or(0, |config| config.flags);
    flags & (CONFIG_SOCKETS_OF_NODE | CONFIG_PODS_LEFT_OUT) != 0
        && !is_host::<F>(ctx, maps)
        && (flags & CONFIG_SOCKETS_OF_NODE != 0 || is_of_pod_left_out(ctx) != 0)
}

/// Levels of cgroups that are looked at: a pod's is the third or fourth, of a node in a container some
/// more.
const CGROUP_LEVELS: i32 = 16;

/// Whether the process that calls is in a pod of [`LEFT_OUT`].
// How deep pods' cgroups lie is nothing that the agent could know: what it takes for the root may be a
// part of the machine's tree.
#[inline(never)]
fn is_of_pod_left_out(_ctx: &SockAddrContext) -> u32 {
    for level in 1..=CGROUP_LEVELS {
        // SAFETY: the helper takes any number.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        // Below the process's own.
        if cgroup == 0 {
            break;
        }
        if LEFT_OUT.get_ptr(cgroup).is_some() {
            return 1;
        }
    }
    0
}

/// [`affinity::slot_index`] for a socket: all sockets of a network namespace are one client.
#[inline(never)]
fn kept_slot<F: Peer>(
    ctx: &SockAddrContext,
    frontend: &Frontend,
    choice: u32,
    avoids_silent: bool,
) -> u32 {
    // SAFETY: the helper takes the program's own context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let key = AffinityKey {
        client: F::UNSPECIFIED,
        service: frontend.service,
        set: frontend.set,
        netns: [netns as u32, (netns >> 32) as u32],
    };
    let maps = KernelMaps::<Socket>::new(ctx.as_ptr());
    let kept = affinity::slot_index::<F, _>(&maps, &key, frontend, choice, true);
    if !avoids_silent {
        return kept;
    }
    let index = failover::socket_slot::<F, _>(&maps, frontend, kept, choice);
    if index != kept
        && let Some(slot) = Maps::<F>::slot(&maps, index)
    {
        affinity::replace::<F, _>(&maps, &key, slot.backend);
    }
    index
}

/// The first of an unconnected socket's peers that a test accepts.
#[inline(always)]
fn sent(ctx: &SockAddrContext, accept: impl Fn(&SocketPeer) -> bool) -> Option<&SocketPeer> {
    // SAFETY: the storage lives as long as the socket, which outlives the call; only its own calls
    // write it.
    let peers = unsafe { UDP_PEERS.get_ptr_mut(ctx).as_ref() }?;
    peers.peers.iter().find(|peer| accept(peer))
}

/// Remembers what an unconnected socket sends to, if there is room for it, and no other of its peers
/// has the same backend, whose answers could not be told apart; `stays`: in any case.
#[inline(always)]
fn record_sent(ctx: &SockAddrContext, peer: &SocketPeer, stays: bool) -> bool {
    // SAFETY: as above.
    let Some(peers) = (unsafe { UDP_PEERS.get_or_insert_ptr_mut(ctx, None).as_mut() }) else {
        return false;
    };
    let mut place = SOCKET_PEERS;
    for (i, known) in peers.peers.iter().enumerate() {
        let same = known.frontend_port == peer.frontend_port
            && words(&known.frontend) == words(&peer.frontend);
        if !same
            && known.backend_port == peer.backend_port
            && words(&known.backend) == words(&peer.backend)
            && !stays
        {
            return false;
        }
        if same || known.backend_port == 0 {
            place = i;
        }
    }
    if place == SOCKET_PEERS {
        if !stays {
            return false;
        }
        place = peers.next as usize % SOCKET_PEERS;
        peers.next = peers.next.wrapping_add(1);
    }
    if let Some(place) = peers.peers.get_mut(place) {
        *place = *peer;
    }
    true
}

/// What a connected socket dialled.
#[inline(always)]
fn connected(cookie: u64) -> Option<&'static mut SocketPeer> {
    // SAFETY: only the socket's own calls use its entry, and the kernel makes them one after the
    // other.
    unsafe { SOCKETS.get_ptr_mut(cookie)?.as_mut() }
}

/// Whether there was room for it.
#[inline(always)]
fn record_connected(cookie: u64, proto: u8, peer: &SocketPeer) -> bool {
    // A UDP socket may be connected anew; most TCP sockets are new.
    if proto == UDP
        && let Some(place) = connected(cookie)
    {
        *place = *peer;
        return true;
    }
    let recorded = SOCKETS.insert(cookie, peer, BPF_ANY.into()).is_ok();
    if !recorded {
        count(Event::SocketsFull);
    }
    recorded
}

/// Tells tracers what became of a call at a socket. `peer` is what was dialled, and the backend
/// where there is one.
#[inline(always)]
fn tell_call(
    ctx: &SockAddrContext,
    event: Event,
    service: Option<u32>,
    peer: impl FnOnce() -> SocketPeer,
) {
    if trace::is_on() {
        let (known, service) = match service {
            Some(service) => (TRACE_HAS_SERVICE, service),
            None => (0, 0),
        };
        told_call(ctx, event, known, service, &peer());
    }
}

#[inline(never)]
fn told_call(
    ctx: &SockAddrContext,
    event: Event,
    known: u8,
    service: u32,
    peer: &SocketPeer,
) -> i32 {
    let mut record = of_a_socket(peer);
    record.events = event.bit();
    record.flags |= known;
    record.service = service;
    // SAFETY: the context is valid while the program runs.
    record.proto = unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() } as u8;
    trace::send(&mut record);
    0
}

/// Tells tracers that a connected socket closes.
#[inline(always)]
fn tell_release(ctx: &SockContext, peer: &SocketPeer) {
    if trace::is_on() {
        told_release(ctx, peer);
    }
}

#[inline(never)]
fn told_release(ctx: &SockContext, peer: &SocketPeer) -> i32 {
    let mut record = of_a_socket(peer);
    record.flags |= TRACE_CLIENT_CLOSES;
    // SAFETY: the context is valid while the program runs.
    record.proto = unsafe { (&raw const (*ctx.sock).protocol).read_volatile() } as u8;
    trace::send(&mut record);
    0
}

#[inline(always)]
fn of_a_socket(peer: &SocketPeer) -> trace::Record {
    let mut record = trace::Record {
        dst: words(&peer.frontend),
        dst_port: peer.frontend_port,
        hook: TRACE_AT_SOCKET,
        ..trace::Record::default()
    };
    if peer.backend_port != 0 {
        record.flags = TRACE_HAS_BACKEND;
        record.backend = words(&peer.backend);
        record.backend_port = peer.backend_port;
    }
    record
}

#[inline(always)]
fn refused() -> i32 {
    const ECONNREFUSED: i32 = 111;
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    DENY
}

/// `connect` or `sendmsg` of an address of the socket's own family.
#[inline(always)]
fn dial<F: Peer>(ctx: &SockAddrContext, call: Call) -> i32 {
    match choose::<F>(ctx, F::addr(ctx), call) {
        Ok((addr, port)) => {
            F::set_addr(ctx, addr);
            set_port(ctx, port);
            ALLOW
        }
        Err(()) => refused(),
    }
}

/// The same on an IPv6 socket, where the address may be an IPv4 one.
#[inline(always)]
fn dial6(ctx: &SockAddrContext, call: Call) -> i32 {
    if InSocket6(ctx).is_mapped() {
        dial_mapped(ctx, call)
    } else {
        dial_plain6(ctx, call)
    }
}

#[inline(never)]
fn dial_plain6(ctx: &SockAddrContext, call: Call) -> i32 {
    dial::<V6>(ctx, call)
}

#[inline(never)]
fn dial_mapped(ctx: &SockAddrContext, call: Call) -> i32 {
    match choose::<V4>(ctx, word6(ctx, 3), call) {
        Ok((addr, port)) => {
            set_word6(ctx, 3, addr);
            set_port(ctx, port);
            ALLOW
        }
        Err(()) => refused(),
    }
}

/// Shows the frontend where the kernel would show the backend.
#[inline(always)]
fn show<F: Peer>(ctx: &SockAddrContext, call: Asked) -> i32 {
    let (addr, port) = (F::mapped(F::addr(ctx)), port(ctx));
    // `accept` asks too, of every connection that comes in.
    if !may_be_backend(ctx.as_ptr(), port) {
        return ALLOW;
    }
    let is_shown = |peer: &SocketPeer| {
        peer.frontend_port != 0 && peer.backend_port == port && words(&peer.backend) == addr
    };
    let peer = match connected(cookie(ctx)) {
        Some(peer) if is_shown(peer) => Some(&*peer),
        _ if call == Asked::Sender => sent(ctx, is_shown),
        _ => None,
    };
    if let Some(peer) = peer {
        F::set_addr(ctx, F::unmapped(words(&peer.frontend)));
        set_port(ctx, peer.frontend_port);
    }
    ALLOW
}

/// Whether any backend has the port.
#[inline(always)]
fn may_be_backend(ctx: *mut c_void, port: u16) -> bool {
    Maps::<V4>::filter(&KernelMaps::<Socket>::new(ctx), filter::backend_port(port))
}

/// What a process asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// Who sent a datagram.
    Sender,
    /// Whom the socket is connected to.
    Peer,
}

/// A socket closes.
#[cgroup_sock(sock_release)]
fn sock_release(ctx: SockContext) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let peer = u16::from_be(unsafe { (&raw const (*ctx.sock).dst_port).read_volatile() });
    // 0: no more, or never, connected.
    if peer != 0 && !may_be_backend(ctx.as_ptr(), peer) {
        return ALLOW;
    }
    // SAFETY: the helper takes the program's own context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // Looking takes no lock.
    if let Some(peer) = connected(cookie) {
        tell_release(&ctx, peer);
        let _gone_already = SOCKETS.remove(cookie);
    }
    ALLOW
}

#[cgroup_sock_addr(connect4)]
fn sock_connect4(ctx: SockAddrContext) -> i32 {
    dial::<V4>(&ctx, Call::Connect)
}

#[cgroup_sock_addr(connect6)]
fn sock_connect6(ctx: SockAddrContext) -> i32 {
    dial6(&ctx, Call::Connect)
}

#[cgroup_sock_addr(sendmsg4)]
fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
    dial::<V4>(&ctx, Call::Send)
}

#[cgroup_sock_addr(sendmsg6)]
fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
    dial6(&ctx, Call::Send)
}

#[cgroup_sock_addr(recvmsg4)]
fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
    show::<V4>(&ctx, Asked::Sender)
}

// Peers are remembered IPv4-mapped, which is what an IPv6 socket shows of them.
#[cgroup_sock_addr(recvmsg6)]
fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
    show::<V6>(&ctx, Asked::Sender)
}

#[cgroup_sock_addr(getpeername4)]
fn sock_getpeer4(ctx: SockAddrContext) -> i32 {
    show::<V4>(&ctx, Asked::Peer)
}

#[cgroup_sock_addr(getpeername6)]
fn sock_getpeer6(ctx: SockAddrContext) -> i32 {
    show::<V6>(&ctx, Asked::Peer)
}
