//! The decision on the host: the same source as in the kernel, over `std` maps.

use std::{collections::HashSet, hash::Hash};

use proptest::prelude::*;
use shunt_common::{
    balance::{arriving, leaving},
    event::Event,
    family::{Family, V4, V6},
    layout::*,
    packet::{ACK, FIN, RST, SYN, Tuple},
    verdict::{Arrival, Origin, Translation, Verdict},
};

use crate::support::Node;

#[path = "balance/affinity.rs"]
mod affinity;
#[path = "balance/failover.rs"]
mod failover;
#[path = "balance/networks.rs"]
mod networks;
#[path = "balance/owner.rs"]
mod owner;
#[path = "balance/reset.rs"]
mod reset;
#[path = "balance/source_ports.rs"]
mod source_ports;
#[path = "balance/stale.rs"]
mod stale;
mod support;

impl<F: Family<Words: Hash>> Node<F> {
    fn arrive(
        &self,
        tuple: Tuple<F::Words>,
        tcp_flags: u8,
        origin: Origin,
        sends_on: bool,
    ) -> Verdict<Translation<F::Words>> {
        arriving::<F, _>(
            self,
            &Arrival {
                tuple,
                tcp_flags,
                origin,
                sends_on,
            },
        )
    }

    fn translated(
        &self,
        tuple: Tuple<F::Words>,
        flags: u8,
        origin: Origin,
        sends_on: bool,
    ) -> Translation<F::Words> {
        match self.arrive(tuple, flags, origin, sends_on) {
            Verdict::Translate(translation) => translation,
            other => panic!("{tuple:?} got {other:?}"),
        }
    }

    fn leave(&self, tuple: Tuple<F::Words>, flags: u8) -> Tuple<F::Words> {
        match leaving::<F, _>(self, &tuple, flags) {
            Verdict::Pass => tuple,
            Verdict::Translate(to) => to.tuple,
            other => panic!("{tuple:?} got {other:?}"),
        }
    }
}

fn config() -> Config {
    let mut config = Config {
        snat_first: 10_240,
        snat_ports: 1000,
        snat_entries: 4096,
        ..Config::default()
    };
    config.v4.node = [192, 168, 50, 11];
    config.v6.node = [0xfd, 0x50, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x11];
    config
}

fn ip(a: u8, b: u8, c: u8, d: u8) -> u32 {
    V4::words([a, b, c, d])
}

fn to<A>(src: A, src_port: u16, dst: A, dst_port: u16) -> Tuple<A> {
    Tuple {
        src,
        dst,
        src_port,
        dst_port,
        proto: TCP,
    }
}

fn back<A>(tuple: Tuple<A>) -> Tuple<A> {
    Tuple {
        src: tuple.dst,
        dst: tuple.src,
        src_port: tuple.dst_port,
        dst_port: tuple.src_port,
        proto: tuple.proto,
    }
}

fn node(backends: &[(u32, u16, bool)]) -> Node<V4> {
    let node = Node::new(config());
    node.serve(ip(10, 96, 0, 1), 80, TCP, backends);
    node.serve(ip(10, 96, 0, 2), 80, TCP, backends);
    node
}

const CLIENT: u32 = u32::from_ne_bytes([10, 44, 0, 5]);
const REMOTE: (u32, u16, bool) = (u32::from_ne_bytes([10, 44, 1, 7]), 8080, false);
const LOCAL: (u32, u16, bool) = (u32::from_ne_bytes([10, 44, 0, 7]), 8080, true);

#[test]
fn a_flow_is_confirmed_by_both_sides_and_then_moves() {
    let node = node(&[REMOTE]);
    let dialled = to(CLIENT, 40_000, ip(10, 96, 0, 1), 80);
    let sent = node.translated(dialled, SYN, Origin::Pod, false).tuple;
    assert_eq!(sent, to(CLIENT, 40_000, REMOTE.0, 8080));
    assert_eq!(
        (node.unconfirmed.borrow().len(), node.flows.borrow().len()),
        (1, 0)
    );
    assert_eq!(
        node.translated(dialled, SYN, Origin::Pod, false).tuple,
        sent,
        "a retransmitted SYN"
    );
    assert_eq!(
        node.flows.borrow().len(),
        0,
        "one side's packets confirm nothing"
    );
    assert_eq!(node.leave(back(sent), SYN | ACK), back(dialled));
    assert_eq!(
        node.translated(dialled, ACK, Origin::Pod, false).tuple,
        sent
    );
    assert_eq!(
        (node.unconfirmed.borrow().len(), node.flows.borrow().len()),
        (0, 1)
    );
}

/// Some first packets may wait for both sides to speak where open flows are; a flood of them may
/// not, though it is answered.
#[test]
fn few_unanswered_flows_stand_among_the_open_ones() {
    let node = node(&[REMOTE]);
    node.max_half_open.set(2);
    let tables = || (node.unconfirmed.borrow().len(), node.flows.borrow().len());
    let dialled = to(CLIENT, 40_000, ip(10, 96, 0, 1), 80);
    let sent = node.translated(dialled, SYN, Origin::Pod, false).tuple;
    assert_eq!((tables(), node.half_open.get()), ((0, 1), 1));
    assert_eq!(
        node.translated(dialled, SYN, Origin::Pod, false).tuple,
        sent,
        "sent again"
    );
    assert_eq!((tables(), node.half_open.get()), ((0, 1), 1));
    assert_eq!(node.leave(back(sent), SYN | ACK), back(dialled));
    for flags in [SYN, RST, RST | ACK] {
        node.translated(dialled, flags, Origin::Pod, false);
        assert_eq!((tables(), node.half_open.get()), ((0, 1), 1), "answered");
    }
    for _ in 0..2 {
        node.translated(dialled, ACK, Origin::Pod, false);
        assert_eq!(
            (tables(), node.half_open.get()),
            ((0, 1), 0),
            "confirmed once"
        );
    }
    for n in 1..=100 {
        let dialled = to(CLIENT, 40_000 + n, ip(10, 96, 0, 1), 80);
        let sent = node.translated(dialled, SYN, Origin::Pod, false).tuple;
        assert_eq!(node.leave(back(sent), SYN | ACK), back(dialled));
    }
    assert_eq!((tables(), node.half_open.get()), ((98, 3), 2));
    // One whose source is translated is answered elsewhere.
    node.max_half_open.set(1000);
    let dialled = to(ip(203, 0, 113, 1), 40_000, ip(10, 96, 0, 1), 80);
    node.translated(dialled, SYN, Origin::Network, true);
    assert_eq!((tables(), node.half_open.get()), ((99, 3), 2));
}

/// A node whose Service has affinity for a minute and eight backends, of which the first `count`
/// are eligible.
fn node_with_affinity(count: usize) -> Node<V4> {
    let node = Node::new(config());
    serve_with_affinity(&node, 0..count);
    node
}

fn serve_with_affinity(node: &Node<V4>, backends: std::ops::Range<usize>) {
    let frontend = Frontend {
        service: 7,
        affinity_secs: 60,
        flags: FRONTEND_AFFINITY,
        ..Frontend::default()
    };
    let backends: Vec<_> = backends
        .map(|n| (ip(10, 44, 1, n as u8 + 1), 8080, false))
        .collect();
    for last in [1, 2] {
        node.serve_as(frontend, ip(10, 96, 0, last), 80, TCP, &backends);
    }
}

/// P1: whatever its ports, a client goes where it went before, on every frontend with the same
/// backends.
#[test]
fn a_client_keeps_its_backend_until_it_is_idle_for_the_time_out() {
    let node = node_with_affinity(8);
    let backend = |client, port: u16, frontend| {
        let dialled = to(client, port, ip(10, 96, 0, frontend), 80);
        node.translated(dialled, SYN, Origin::Pod, false).tuple.dst
    };
    let first = backend(CLIENT, 40_000, 1);
    for port in 1..50 {
        // Half a minute from one to the next: each new flow counts as a use.
        node.now.set(node.now.get() + 28);
        assert_eq!(backend(CLIENT, 40_000 + port, 1 + port as u8 % 2), first);
    }
    let others: HashSet<_> = (1..50)
        .map(|n| backend(ip(10, 44, 0, n), 40_000, 1))
        .collect();
    assert!(others.len() > 5, "other clients are spread: {others:?}");
    let after: HashSet<_> = (1..50)
        .map(|n| {
            node.now.set(node.now.get() + 57);
            backend(CLIENT, 50_000 + n, 1)
        })
        .collect();
    assert!(
        after.len() > 3,
        "a minute of silence, and the choice is free: {after:?}"
    );
}

/// P1, and cilium#27096: a backend that the frontend no longer has is not kept; one that it still
/// has is.
#[test]
fn a_kept_backend_must_still_be_eligible() {
    let node = node_with_affinity(8);
    let backend = |n: u8| {
        let dialled = to(
            ip(10, 44, 0, n),
            40_000 + node.slots.borrow().len() as u16,
            ip(10, 96, 0, 1),
            80,
        );
        node.translated(dialled, SYN, Origin::Pod, false).tuple.dst
    };
    let before: Vec<_> = (1..100).map(backend).collect();
    // Backends 3 to 8 stay, at other places among the slots.
    serve_with_affinity(&node, 2..8);
    let gone = [ip(10, 44, 1, 1), ip(10, 44, 1, 2)];
    for (n, before) in (1..100).zip(before) {
        let now = backend(n);
        if gone.contains(&before) {
            assert!(!gone.contains(&now), "client {n}");
        } else {
            assert_eq!(now, before, "client {n}");
        }
    }
}

/// P1, and cilium#26709: nodes that know nothing of each other choose alike for a client from
/// outside.
#[test]
fn nodes_agree_on_the_backend_of_an_outside_client() {
    let nodes = [node_with_affinity(8), node_with_affinity(8)];
    for n in 1..100 {
        let chosen = [0, 1].map(|i: usize| {
            let dialled = to(
                ip(203, 0, 113, n),
                40_000 + i as u16,
                ip(10, 96, 0, 1 + i as u8),
                80,
            );
            nodes[i]
                .translated(dialled, SYN, Origin::Network, false)
                .tuple
                .dst
        });
        assert_eq!(chosen[0], chosen[1], "client {n}");
    }
}

/// P5: a source outside of the ranges is dropped and counted, one inside is served.
#[test]
fn source_ranges_let_in_who_is_in_them() {
    let node: Node<V4> = Node::new(config());
    let frontend = Frontend {
        service: 7,
        flags: FRONTEND_SOURCE_RANGES,
        ..Frontend::default()
    };
    node.serve_as(frontend, ip(10, 96, 0, 1), 80, TCP, &[REMOTE]);
    let range = SourceRangeKey {
        prefix_len: 64,
        service: 7,
        addr: CLIENT,
    };
    node.source_ranges.borrow_mut().insert(range);
    let dialled = |client| to(client, 40_000, ip(10, 96, 0, 1), 80);
    node.translated(dialled(CLIENT), SYN, Origin::Pod, false);
    let other = dialled(ip(10, 44, 0, 6));
    assert_eq!(node.arrive(other, SYN, Origin::Pod, false), Verdict::Drop);
    assert_eq!(*node.events.borrow(), [Event::SourceDenied]);
}

#[test]
fn what_is_nobodys_passes() {
    let node = node(&[REMOTE]);
    let tuple = to(CLIENT, 40_000, ip(1, 1, 1, 1), 80);
    assert_eq!(node.arrive(tuple, SYN, Origin::Pod, false), Verdict::Pass);
    assert_eq!(node.leave(back(tuple), ACK), back(tuple));
}

#[test]
fn nobody_behind_it_is_refused_and_counted() {
    let node = node(&[]);
    assert_eq!(
        node.arrive(
            to(CLIENT, 40_000, ip(10, 96, 0, 1), 80),
            SYN,
            Origin::Pod,
            false
        ),
        Verdict::Refuse
    );
    assert_eq!(*node.events.borrow(), [Event::NoBackend]);
}

#[test]
fn a_closed_connection_is_opened_anew_with_the_backends_of_now() {
    let node = node(&[REMOTE]);
    let dialled = to(CLIENT, 40_000, ip(10, 96, 0, 1), 80);
    let sent = node.translated(dialled, SYN, Origin::Pod, false).tuple;
    node.leave(back(sent), SYN | ACK);
    node.translated(dialled, ACK, Origin::Pod, false);
    node.serve(ip(10, 96, 0, 1), 80, TCP, &[LOCAL]);
    assert_eq!(
        node.translated(dialled, ACK, Origin::Pod, false).tuple,
        sent,
        "an open flow keeps its backend"
    );
    node.translated(dialled, FIN | ACK, Origin::Pod, false);
    node.leave(back(sent), FIN | ACK);
    assert_eq!(
        node.translated(dialled, SYN, Origin::Pod, false).tuple.dst,
        LOCAL.0
    );
}

/// Replies to a translated source do not pass by the flow, but its end counts all the same, in
/// whichever order it comes.
#[test]
fn a_closed_connection_with_a_translated_source_is_opened_anew_too() {
    for backend_first in [true, false] {
        let node = node(&[REMOTE]);
        let dialled = to(ip(203, 0, 113, 10), 40_000, ip(10, 96, 0, 1), 80);
        let sent = node.translated(dialled, SYN, Origin::Network, true).tuple;
        let reply = |flags| node.translated(back(sent), flags, Origin::Network, true);
        reply(SYN | ACK);
        node.translated(dialled, ACK, Origin::Network, true);
        node.serve(ip(10, 96, 0, 1), 80, TCP, &[LOCAL]);
        assert_eq!(
            node.translated(dialled, SYN, Origin::Network, true).tuple,
            sent,
            "still open"
        );
        if backend_first {
            reply(FIN | ACK);
        }
        node.translated(dialled, FIN | ACK, Origin::Network, true);
        if !backend_first {
            reply(FIN | ACK);
        }
        node.translated(dialled, ACK, Origin::Network, true);
        assert_eq!(
            node.translated(dialled, SYN, Origin::Network, true)
                .tuple
                .dst,
            LOCAL.0
        );
    }
}

#[test]
fn a_closed_flow_does_not_claim_replies_of_a_direct_connection() {
    let node = node(&[REMOTE]);
    let dialled = to(CLIENT, 40_000, ip(10, 96, 0, 1), 80);
    let sent = node.translated(dialled, SYN, Origin::Pod, false).tuple;
    node.leave(back(sent), RST);
    assert_eq!(node.leave(back(sent), SYN | ACK), back(sent));
    assert_eq!(node.leave(back(sent), ACK), back(sent));
}

#[test]
fn one_client_port_to_two_frontends_gets_two_ports_at_the_backend() {
    let node = node(&[REMOTE]);
    let dialled = [1, 2].map(|n| to(CLIENT, 40_000, ip(10, 96, 0, n), 80));
    let sent = dialled.map(|tuple| node.translated(tuple, SYN, Origin::Pod, false).tuple);
    assert_eq!((sent[0].src, sent[0].src_port), (CLIENT, 40_000));
    assert_eq!(sent[1].src, CLIENT, "the address is kept");
    assert_ne!(sent[1].src_port, 40_000);
    for (sent, dialled) in sent.into_iter().zip(dialled) {
        assert_eq!(
            node.leave(sent, SYN),
            sent,
            "nothing is left to do on the way out"
        );
        assert_eq!(node.leave(back(sent), SYN | ACK), back(dialled));
        assert_eq!(
            node.translated(dialled, ACK, Origin::Pod, false).tuple,
            sent
        );
    }
}

#[test]
fn an_evicted_flow_finds_its_source_port_again() {
    let node = node(&[REMOTE]);
    let dialled = to(ip(203, 0, 113, 10), 40_000, ip(10, 96, 0, 1), 80);
    let sent = node.translated(dialled, SYN, Origin::Network, true).tuple;
    assert_eq!(sent.src, ip(192, 168, 50, 11));
    node.unconfirmed.borrow_mut().clear();
    assert_eq!(
        node.translated(dialled, ACK, Origin::Network, true).tuple,
        sent
    );
}

#[test]
fn a_client_port_in_the_range_is_kept_unless_a_socket_of_the_node_has_it() {
    let node = node(&[REMOTE]);
    let dialled = |port| to(ip(203, 0, 113, 10), port, ip(10, 96, 0, 1), 80);
    assert_eq!(
        node.translated(dialled(10_300), SYN, Origin::Network, true)
            .tuple
            .src_port,
        10_300
    );
    let reply = to(REMOTE.0, 8080, ip(192, 168, 50, 11), 10_400);
    node.sockets.borrow_mut().insert(reply);
    assert_ne!(
        node.translated(dialled(10_400), SYN, Origin::Network, true)
            .tuple
            .src_port,
        10_400
    );
}

#[test]
fn source_ports_run_out_without_breaking_an_open_flow() {
    let node: Node<V4> = Node::new(Config {
        snat_ports: 8,
        snat_entries: 128,
        ..config()
    });
    node.serve(ip(10, 96, 0, 1), 80, TCP, &[REMOTE]);
    let mut ports = HashSet::new();
    let mut open = Vec::new();
    for client in 1..=20u8 {
        let dialled = to(ip(203, 0, 113, client), 40_000, ip(10, 96, 0, 1), 80);
        match node.arrive(dialled, SYN, Origin::Network, true) {
            Verdict::Translate(to) => {
                assert!(ports.insert(to.tuple.src_port), "a port was given twice");
                open.push((dialled, to.tuple));
            }
            verdict => assert_eq!(verdict, Verdict::Refuse),
        }
    }
    assert_eq!(ports.len(), 8, "every port was found");
    assert!(node.events.borrow().contains(&Event::SnatExhausted));
    for (dialled, sent) in open {
        assert_eq!(
            node.translated(back(sent), SYN | ACK, Origin::Network, true)
                .tuple,
            back(dialled)
        );
    }
}

#[test]
fn a_pod_that_is_its_own_backend_is_translated() {
    let node = node(&[(CLIENT, 8080, true)]);
    let dialled = to(CLIENT, 40_000, ip(10, 96, 0, 1), 80);
    let inside = node.translated(dialled, SYN, Origin::Pod, false).tuple;
    let seen = node.leave(inside, SYN);
    assert_eq!(
        (seen.src, seen.dst, seen.dst_port),
        (ip(192, 168, 50, 11), CLIENT, 8080)
    );
    let reply = node
        .translated(back(seen), SYN | ACK, Origin::Pod, false)
        .tuple;
    assert_eq!(node.leave(reply, SYN | ACK), back(dialled));
}

#[test]
fn the_cluster_networks_are_internal_wherever_they_come_in() {
    let mut config = config();
    config.v4.cluster_cidrs[0] = Prefix {
        addr: [10, 44, 0, 0],
        mask: [255, 255, 0, 0],
    };
    config.v4.cluster_cidr_count = 1;
    let node: Node<V4> = Node::new(config);
    node.serve(ip(10, 96, 0, 1), 80, TCP, &[LOCAL]);
    let key = |scope| FrontendKey {
        addr: ip(10, 96, 0, 1),
        port: 80,
        proto: TCP,
        scope,
        reserved: 0,
    };
    node.frontends.borrow_mut().remove(&key(SCOPE_EXTERNAL));
    let dialled = |src| to(src, 40_000, ip(10, 96, 0, 1), 80);
    assert!(matches!(
        node.arrive(dialled(ip(10, 44, 1, 9)), SYN, Origin::Network, false),
        Verdict::Translate(Translation { local: true, .. })
    ));
    assert_eq!(
        node.arrive(dialled(ip(203, 0, 113, 9)), SYN, Origin::Network, false),
        Verdict::Pass
    );
}

/// There and back through whichever hooks: the client sees the frontend that it dialled, and the
/// backend one sender.
fn round_trip<F: Family>(
    client: F::Words,
    client_port: u16,
    frontend: F::Words,
    backend: F::Words,
    proto: u8,
    case: u8,
) where
    F::Words: Hash,
{
    let local = case & 1 != 0;
    let from = if case & 2 != 0 {
        Origin::Pod
    } else {
        Origin::Network
    };
    let sends_on = case & 4 != 0 && from == Origin::Network;
    let node: Node<F> = Node::new(config());
    node.serve(frontend, 80, proto, &[(backend, 8080, local)]);
    let dialled = Tuple {
        proto,
        ..to(client, client_port, frontend, 80)
    };
    for flags in [SYN, ACK, ACK] {
        let arrived = node.translated(dialled, flags, from, sends_on);
        let seen = if sends_on && !arrived.local {
            arrived.tuple
        } else {
            node.leave(arrived.tuple, flags)
        };
        assert_eq!((seen.dst, seen.dst_port), (backend, 8080));
        let kept = from == Origin::Pod || local;
        assert_eq!(
            seen.src == client,
            kept,
            "P7: kept exactly when client or backend is here"
        );
        let reply = back(seen);
        let shown = match node.arrive(reply, ACK, Origin::Network, sends_on) {
            Verdict::Translate(to) if sends_on && !to.local => to.tuple,
            Verdict::Translate(to) => node.leave(to.tuple, ACK),
            Verdict::Pass => node.leave(reply, ACK),
            other => panic!("{other:?}"),
        };
        assert_eq!(shown, back(dialled));
    }
}

proptest! {
    #[test]
    fn replies_undo_what_was_done(client: [u8; 16], frontend: [u8; 16], backend: [u8; 16], port: u16, udp: bool, case in 0u8..8) {
        prop_assume!(client != frontend && frontend != backend && client != backend && port != 0);
        let proto = if udp { UDP } else { TCP };
        round_trip::<V6>(V6::words(client), port, V6::words(frontend), V6::words(backend), proto, case);
        let four = |x: [u8; 16]| V4::words([x[0], x[1], x[2], x[3]]);
        let (client, frontend, backend) = (four(client), four(frontend), four(backend));
        prop_assume!(client != frontend && frontend != backend && client != backend);
        round_trip::<V4>(client, port, frontend, backend, proto, case);
    }
}

/// A node with eight source ports towards its remote backend.
fn node_with_few_ports(proto: u8) -> Node<V4> {
    let node = Node::new(Config {
        snat_ports: 8,
        snat_entries: 128,
        ..config()
    });
    node.serve(ip(10, 96, 0, 1), 80, proto, &[REMOTE]);
    node
}

fn outsider(client: u8, proto: u8) -> Tuple<u32> {
    Tuple {
        proto,
        ..to(ip(203, 0, 113, client), 40_000, ip(10, 96, 0, 1), 80)
    }
}

/// Opens a flow and has it answered. The source port that it got, if any.
fn open_from_outside(node: &Node<V4>, client: u8, proto: u8) -> Option<u16> {
    let dialled = outsider(client, proto);
    let Verdict::Translate(to) = node.arrive(dialled, SYN, Origin::Network, true) else {
        return None;
    };
    node.translated(back(to.tuple), SYN | ACK, Origin::Network, true);
    assert_eq!(
        node.translated(dialled, ACK, Origin::Network, true).tuple,
        to.tuple
    );
    Some(to.tuple.src_port)
}

#[test]
fn the_port_that_was_closed_first_is_used_again_first() {
    let node = node_with_few_ports(TCP);
    let ports: Vec<u16> = (1..=8)
        .map(|client| open_from_outside(&node, client, TCP).unwrap())
        .collect();
    assert_eq!(open_from_outside(&node, 9, TCP), None);
    let close = |client: u8| {
        let dialled = outsider(client, TCP);
        let sent = node
            .translated(dialled, FIN | ACK, Origin::Network, true)
            .tuple;
        node.translated(back(sent), FIN | ACK, Origin::Network, true);
    };
    let tick = |ticks| node.now.set(node.now.get() + ticks);
    close(5);
    tick(1);
    close(2);
    tick(1);
    close(7);
    assert_eq!(
        open_from_outside(&node, 9, TCP),
        None,
        "the backend may still send"
    );
    tick(3);
    for (client, closed) in [(10, 5), (11, 2), (12, 7)] {
        assert_eq!(
            open_from_outside(&node, client, TCP),
            Some(ports[closed - 1])
        );
    }
    tick(1000);
    assert_eq!(
        open_from_outside(&node, 13, TCP),
        None,
        "an open connection may be silent for long"
    );
    for client in [1, 3, 4, 6, 8, 10, 11, 12] {
        node.translated(outsider(client, TCP), ACK, Origin::Network, true);
    }
}

/// L3: a flood of SYNs that the backend answers holds no source port for long.
#[test]
fn a_port_whose_client_never_acknowledged_is_soon_free() {
    let node = node_with_few_ports(TCP);
    let kept = open_from_outside(&node, 1, TCP).unwrap();
    let half_open = |client| match node.arrive(outsider(client, TCP), SYN, Origin::Network, true) {
        Verdict::Translate(to) => {
            node.translated(back(to.tuple), SYN | ACK, Origin::Network, true);
            true
        }
        _ => false,
    };
    let flood = |clients: std::ops::Range<u8>| clients.filter(|&client| half_open(client)).count();
    assert_eq!(flood(2..20), 7);
    assert_eq!(open_from_outside(&node, 20, TCP), None, "they may be slow");
    node.now.set(node.now.get() + 3);
    assert_eq!(flood(21..30), 7);
    node.now.set(node.now.get() + 3);
    assert!(open_from_outside(&node, 30, TCP).is_some_and(|port| port != kept));
    let to = node
        .translated(outsider(1, TCP), ACK, Origin::Network, true)
        .tuple;
    assert_eq!(to.src_port, kept);
}

#[test]
fn a_connection_that_another_cpu_saw_later_is_not_taken_for_an_idle_one() {
    let node = node_with_few_ports(TCP);
    for client in 1..=8 {
        open_from_outside(&node, client, TCP).unwrap();
    }
    node.now.set(node.now.get() - 1);
    assert_eq!(open_from_outside(&node, 9, TCP), None);
}

#[test]
fn datagrams_answered_once_keep_their_port_for_a_shorter_time_than_streams() {
    let node = node_with_few_ports(UDP);
    let timeouts = node.config.timeouts;
    for client in 1..=8 {
        let dialled = outsider(client, UDP);
        let sent = node.translated(dialled, 0, Origin::Network, true).tuple;
        node.translated(back(sent), 0, Origin::Network, true);
        if client > 2 {
            node.translated(dialled, 0, Origin::Network, true);
        }
    }
    let open = |client| {
        matches!(
            node.arrive(outsider(client, UDP), 0, Origin::Network, true),
            Verdict::Translate(_)
        )
    };
    let start = node.now.get();
    // One question and its answer, when ports are short.
    node.now.set(start + 2);
    assert!(!open(9));
    node.now.set(start + 3);
    assert!(open(9) && open(10) && !open(11));
    node.now.set(start + timeouts.udp_stream + 1);
    assert!(open(11));
}

#[test]
fn datagrams_that_go_on_after_an_answer_are_a_stream() {
    let node = node(&[REMOTE]);
    node.serve(ip(10, 96, 0, 1), 53, UDP, &[REMOTE]);
    let dialled = Tuple {
        proto: UDP,
        ..to(CLIENT, 40_000, ip(10, 96, 0, 1), 53)
    };
    let sent = node.translated(dialled, 0, Origin::Pod, false).tuple;
    let state = || {
        let flows = [&node.flows, &node.unconfirmed]
            .map(|map| map.borrow().values().next().map(|flow| flow.state));
        flows.into_iter().flatten().next().unwrap()
    };
    node.now.set(node.now.get() + 1);
    node.translated(dialled, 0, Origin::Pod, false);
    assert_eq!(state() & FLOW_CONFIRMED, 0, "nobody has answered");
    node.leave(back(sent), 0);
    assert_eq!(state() & FLOW_CONFIRMED, 0);
    node.now.set(node.now.get() + 1);
    node.translated(dialled, 0, Origin::Pod, false);
    assert_eq!(
        state() & (FLOW_SEEN_REPLY | FLOW_CONFIRMED),
        FLOW_SEEN_REPLY | FLOW_CONFIRMED
    );
}

/// L2: the entry of a flow may outlast its source port, which others take when it was silent for
/// long, or the agent gives up. With its next datagram the client gets a port of its own again, and
/// so its answer; also on a port that it shares between frontends.
#[test]
fn datagrams_of_a_flow_that_has_lost_its_port_get_another() {
    for (is_given_up, is_stream, is_shared) in [false, true]
        .into_iter()
        .flat_map(|a| [(a, false, false), (a, true, false), (a, true, true)])
    {
        let node = node_with_few_ports(UDP);
        node.serve(ip(10, 96, 0, 2), 80, UDP, &[LOCAL]);
        let ask = |client| {
            let dialled = outsider(client, UDP);
            let sent = node.translated(dialled, 0, Origin::Network, true).tuple;
            let answer = node.translated(back(sent), 0, Origin::Network, true).tuple;
            assert_eq!(
                answer,
                back(dialled),
                "client {client}, stream {is_stream}, shared {is_shared}"
            );
        };
        let share = |client| {
            if is_shared {
                let dialled = Tuple {
                    dst: ip(10, 96, 0, 2),
                    ..outsider(client, UDP)
                };
                node.translated(dialled, 0, Origin::Network, true);
            }
        };
        for client in 1..=8 {
            share(client);
            (0..=u8::from(is_stream)).for_each(|_| ask(client));
        }
        let timeouts = node.config.timeouts;
        let silence = if is_stream {
            timeouts.udp_stream
        } else {
            timeouts.udp
        };
        node.now.set(node.now.get() + silence + 1);
        if is_given_up {
            let mut slots = node.snat.borrow_mut();
            slots.values_mut().for_each(|slot| slot.last_seen = 0);
        }
        (9..=12).for_each(ask);
        for client in 1..=4 {
            share(client);
            (0..3).for_each(|_| ask(client));
        }
    }
}
