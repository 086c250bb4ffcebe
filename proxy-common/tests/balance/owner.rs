//! Whose a packet is that comes to a node port's number: each claim in its turn.

use super::*;

const NODE_PORT: u16 = 30_080;
const OUTSIDE: u32 = u32::from_ne_bytes([203, 0, 113, 10]);

fn node() -> Node<V4> {
    let node = Node::new(config());
    for proto in [TCP, UDP, SCTP] {
        node.serve(ip(0, 0, 0, 0), NODE_PORT, proto, &[LOCAL]);
    }
    node.serve(ip(10, 96, 0, 1), 80, TCP, &[LOCAL]);
    let addresses = &node.addresses;
    addresses
        .borrow_mut()
        .insert(ip(10, 96, 0, 1), ADDRESS_CLUSTER_IP);
    node
}

fn node_itself() -> u32 {
    V4::words(config().v4.node)
}

/// What comes from outside to the node port.
fn incoming(proto: u8) -> Tuple<u32> {
    Tuple {
        proto,
        ..to(OUTSIDE, 40_000, node_itself(), NODE_PORT)
    }
}

fn arrives(node: &Node<V4>, tuple: Tuple<u32>, flags: u8) -> bool {
    let both = [Origin::Network, Origin::Pod].map(|origin| {
        match node.arrive(tuple, flags, origin, false) {
            Verdict::Pass => false,
            Verdict::Translate(to) => {
                assert_eq!(to.tuple.dst, LOCAL.0);
                true
            }
            other => panic!("{tuple:?}, {flags:#b}: {other:?}"),
        }
    });
    assert_eq!(both[0], both[1], "{tuple:?}, {flags:#b}");
    both[0]
}

/// Step 1: what our flow table says holds, whoever claims the packet too.
#[test]
fn a_flow_of_ours_comes_first() {
    for (proto, first, next) in [(TCP, SYN, ACK), (UDP, 0, 0)] {
        let node = node();
        let tuple = incoming(proto);
        assert!(arrives(&node, tuple, first));
        node.connections.borrow_mut().insert(tuple);
        for _ in 0..3 {
            assert!(arrives(&node, tuple, next));
        }
        assert!(proto == UDP || arrives(&node, tuple, RST));
    }
}

/// Step 2: a socket of the node has it.
#[test]
fn what_a_socket_of_the_node_has_is_not_the_node_ports() {
    for (proto, flags) in [
        (TCP, SYN | ACK),
        (TCP, ACK),
        (TCP, RST),
        (TCP, SYN),
        (UDP, 0),
    ] {
        let node = node();
        node.connections.borrow_mut().insert(incoming(proto));
        assert!(!arrives(&node, incoming(proto), flags));
        assert!(node.flows.borrow().is_empty() && node.unconfirmed.borrow().is_empty());
        let other = Tuple {
            src_port: 40_001,
            ..incoming(proto)
        };
        let opens = flags != SYN | ACK && flags != RST;
        assert_eq!(arrives(&node, other, flags), opens, "another's");
    }
}

/// Step 3: it answers what left the node.
#[test]
fn what_answers_something_that_left_the_node_is_not_the_node_ports() {
    for (proto, sent, answer) in [
        (TCP, SYN, SYN | ACK),
        (TCP, ACK, ACK),
        (UDP, 0, 0),
        (SCTP, SYN, ACK),
    ] {
        let node = node();
        let tuple = incoming(proto);
        assert_eq!(node.leave(back(tuple), sent), back(tuple));
        assert!(!arrives(&node, tuple, answer), "{proto}");
        assert!(node.flows.borrow().is_empty() && node.unconfirmed.borrow().is_empty());
        // Packets that leave keep the note, time ends it.
        let timeouts = Timeouts::default();
        let limit = match proto {
            TCP => timeouts.tcp_established,
            UDP => timeouts.udp_stream,
            _ => timeouts.sctp_established,
        };
        node.now.set(node.now.get() + limit);
        assert!(!arrives(&node, tuple, answer));
        node.leave(back(tuple), sent);
        node.now.set(node.now.get() + limit);
        assert!(!arrives(&node, tuple, answer));
        node.now.set(node.now.get() + 1);
        assert_eq!(arrives(&node, tuple, answer), answer != SYN | ACK);
    }
}

/// A peer may open a connection of its own later, from the port that it was dialled on.
#[test]
fn a_syn_is_an_answer_for_a_minute_only() {
    let node = node();
    let tuple = incoming(TCP);
    node.leave(back(tuple), ACK);
    assert!(!arrives(&node, tuple, SYN));
    node.now
        .set(node.now.get() + Timeouts::default().tcp_unanswered + 1);
    assert!(!arrives(&node, tuple, ACK));
    assert!(arrives(&node, tuple, SYN));
}

/// What is noted: nothing but what the node itself or somebody behind its address begins.
#[test]
fn replies_of_ours_resets_and_answers_of_listeners_are_not_noted() {
    let tuple = incoming(TCP);
    for flags in [RST, RST | ACK, SYN | ACK] {
        let node = node();
        node.leave(back(tuple), flags);
        assert!(node.direct.borrow().is_empty(), "{flags:#b}");
    }
    // A reply that another device has translated already, of a flow at any stage.
    let node = node();
    for flags in [SYN, ACK, ACK, FIN | ACK] {
        assert!(arrives(&node, tuple, flags));
        node.leave(back(tuple), ACK);
        assert!(node.direct.borrow().is_empty(), "{flags:#b}");
    }
    // From another's address, or another port.
    let pod = to(ip(10, 44, 0, 9), NODE_PORT, OUTSIDE, 443);
    let port = to(node_itself(), NODE_PORT + 1, OUTSIDE, 443);
    for tuple in [pod, port] {
        node.leave(tuple, SYN);
        assert!(node.direct.borrow().is_empty());
    }
    node.leave(to(node_itself(), NODE_PORT, OUTSIDE, 443), SYN);
    assert_eq!(node.direct.borrow().len(), 1);
}

/// Step 4: nobody claims it. A SYN or a datagram opens a flow, an ACK brings one back, and a SYN-ACK
/// or a reset does neither.
#[test]
fn only_what_begins_something_opens_a_flow() {
    for (proto, flags, opens) in [
        (TCP, SYN, true),
        (TCP, ACK, true),
        (TCP, FIN | ACK, true),
        (TCP, SYN | ACK, false),
        (TCP, RST, false),
        (TCP, RST | ACK, false),
        (TCP, RST | SYN, false),
        (TCP, FIN, false),
        (TCP, 0, false),
        (UDP, 0, true),
        (SCTP, SYN, true),
        (SCTP, ACK, true),
        (SCTP, SYN | ACK, false),
        (SCTP, RST, false),
    ] {
        let node = node();
        assert_eq!(
            arrives(&node, incoming(proto), flags),
            opens,
            "{proto}, {flags:#b}"
        );
        let held = node.flows.borrow().len() + node.unconfirmed.borrow().len();
        assert_eq!(held, usize::from(opens), "{proto}, {flags:#b}");
    }
    // Nobody but the Service is at a cluster IP.
    let node = node();
    let tuple = to(CLIENT, 40_000, ip(10, 96, 0, 1), 80);
    for flags in [SYN | ACK, RST] {
        assert_eq!(node.arrive(tuple, flags, Origin::Pod, false), Verdict::Drop);
    }
    assert_eq!(*node.events.borrow(), [Event::NoFlow; 2]);
    node.connections.borrow_mut().insert(tuple);
    node.translated(tuple, SYN, Origin::Pod, false);
}

/// What a process sends to a backend itself by the source port of a flow to that backend gets another,
/// and its answers come back to it. What was translated already is left alone.
#[test]
fn a_process_shares_no_source_port_with_a_flow() {
    for (proto, first, answer) in [(TCP, SYN, SYN | ACK), (UDP, 0, 0)] {
        let node = Node::<V4>::new(config());
        node.serve(ip(10, 96, 0, 1), 80, proto, &[REMOTE]);
        let of = |tuple: Tuple<u32>| Tuple { proto, ..tuple };
        let dialled = of(to(OUTSIDE, 40_000, ip(10, 96, 0, 1), 80));
        let flow = node.translated(dialled, first, Origin::Network, true).tuple;
        assert_eq!(flow.src, node_itself());
        let pass = |tuple| {
            assert_eq!(
                node.arrive(tuple, first, Origin::Process, false),
                Verdict::Pass
            )
        };
        pass(flow);
        let other = Tuple {
            src_port: flow.src_port + 1,
            ..flow
        };
        node.senders.borrow_mut().extend([flow, other]);
        pass(other);
        let moved = node.translated(flow, first, Origin::Process, false).tuple;
        assert_eq!((moved.src, moved.dst), (flow.src, flow.dst));
        assert_ne!(moved.src_port, flow.src_port);
        pass(moved);
        let arrives = |tuple, on| node.translated(back(tuple), answer, Origin::Network, on);
        let answered = arrives(moved, false);
        assert_eq!((answered.tuple, answered.process), (back(flow), true));
        let answered = arrives(flow, true);
        assert_eq!((answered.tuple, answered.process), (back(dialled), false));
        let next = node.translated(flow, ACK, Origin::Process, false).tuple;
        assert_eq!(next, moved, "{proto}");
    }
}
