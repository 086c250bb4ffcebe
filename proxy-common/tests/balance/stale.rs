//! Connections that the socket hook made, once their backend is gone.

use shunt_common::{balance::Hooked, filter};

use super::*;

/// What a connection's packets carry, and those of its kind.
const PACKET: Tuple<u32> = Tuple {
    src: CLIENT,
    dst: REMOTE.0,
    src_port: 40_000,
    dst_port: REMOTE.1,
    proto: TCP,
};

const FRONTEND: u32 = u32::from_ne_bytes([10, 96, 0, 1]);
/// Its backend's id.
const ID: u32 = 7;

/// A node with a pod's connection to [`REMOTE`], made by the hook.
fn hooked() -> Node<V4> {
    let node = node(&[LOCAL]);
    node.serve(FRONTEND, 53, UDP, &[LOCAL]);
    let hooked = Hooked {
        frontend: FRONTEND,
        frontend_port: 53,
        backend: ID,
    };
    for proto in [TCP, UDP] {
        let packet = Tuple { proto, ..PACKET };
        node.hooked.borrow_mut().insert(packet, hooked);
    }
    node
}

/// Takes the backend away, and has packets to it seen.
fn remove(node: &Node<V4>) {
    node.gone.borrow_mut().insert(ID);
    let bits = [
        filter::service::<V4>(REMOTE.0),
        filter::stale::<V4>(REMOTE.0, REMOTE.1, TCP),
        filter::stale::<V4>(REMOTE.0, REMOTE.1, UDP),
    ];
    node.filter.borrow_mut().extend(bits);
}

fn sends(node: &Node<V4>, flags: u8) -> Verdict<Tuple<u32>> {
    match node.arrive(PACKET, flags, Origin::Pod, false) {
        Verdict::Translate(to) => Verdict::Translate(to.tuple),
        Verdict::Pass => Verdict::Pass,
        Verdict::Reset => Verdict::Reset,
        other => panic!("{other:?}"),
    }
}

/// One that is answered goes on as it was, however long; one that is not is reset, and a SYN is at
/// once.
#[test]
fn a_connection_of_the_socket_hook_is_judged_once_its_backend_is_gone() {
    let node = hooked();
    assert_eq!(sends(&node, ACK), Verdict::Pass);
    assert_eq!(node.flows.borrow().len(), 0, "it serves");

    remove(&node);
    assert_eq!(sends(&node, ACK), Verdict::Pass);
    assert_eq!(node.flows.borrow().len(), 1);
    for _ in 0..20 {
        node.now.set(node.now.get() + 3);
        assert_eq!(node.leave(back(PACKET), ACK), back(PACKET));
        assert_eq!(sends(&node, ACK), Verdict::Translate(PACKET));
    }
    for _ in 0..3 {
        assert_eq!(sends(&node, ACK), Verdict::Translate(PACKET));
        node.now.set(node.now.get() + 1);
    }
    assert_eq!(sends(&node, ACK), Verdict::Reset);
    assert_eq!(node.events.borrow().last(), Some(&Event::BackendGone));

    let node = hooked();
    remove(&node);
    assert_eq!(sends(&node, SYN), Verdict::Reset);
    assert_eq!(node.flows.borrow().len(), 0);
}

/// The pod itself dialled, another's packet, a backend that is back, a port that another flow has:
/// none is touched.
#[test]
fn no_other_connection_is_judged_for_a_backend_that_is_gone() {
    let untouched = |node: &Node<V4>, flows: usize| {
        for _ in 0..10 {
            assert_eq!(sends(node, ACK), Verdict::Pass);
            node.now.set(node.now.get() + 1);
        }
        assert_eq!(node.flows.borrow().len(), flows);
    };
    let node = hooked();
    remove(&node);
    node.hooked.borrow_mut().clear();
    untouched(&node, 0);
    assert_eq!(sends(&node, SYN), Verdict::Pass);

    let node = hooked();
    remove(&node);
    node.gone.borrow_mut().clear();
    untouched(&node, 0);

    let node = hooked();
    remove(&node);
    for origin in [Origin::Network, Origin::Process] {
        assert_eq!(node.arrive(PACKET, ACK, origin, false), Verdict::Pass);
    }

    let node = hooked();
    let dialled = Tuple {
        dst: ip(10, 96, 0, 1),
        dst_port: 80,
        ..PACKET
    };
    node.max_half_open.set(1);
    node.translated(dialled, SYN, Origin::Pod, false);
    remove(&node);
    untouched(&node, 1);
}

/// Its answers bear the address that the socket is connected to. When the backend is back, they are
/// its own again; when there is none at all, the socket is told.
#[test]
fn datagrams_of_the_socket_hooks_go_to_another_backend() {
    let packet = Tuple {
        proto: UDP,
        ..PACKET
    };
    let node = hooked();
    let sends = || node.arrive(packet, 0, Origin::Pod, false);
    assert_eq!(sends(), Verdict::Pass);
    remove(&node);
    for waits in [0, 1] {
        node.max_half_open.set(waits);
        node.flows.borrow_mut().clear();
        node.unconfirmed.borrow_mut().clear();
        for _ in 0..3 {
            let to = node.translated(packet, 0, Origin::Pod, false).tuple;
            let moved = Tuple {
                dst: LOCAL.0,
                dst_port: LOCAL.1,
                ..packet
            };
            assert_eq!(to, moved);
            assert_eq!(node.leave(back(moved), 0), back(packet));
        }
        let flows = node.flows.borrow().len() + node.unconfirmed.borrow().len();
        assert_eq!(flows, 1);
    }

    node.gone.borrow_mut().clear();
    node.flows.borrow_mut().clear();
    assert_eq!(sends(), Verdict::Pass);

    remove(&node);
    node.serve(FRONTEND, 53, UDP, &[]);
    assert_eq!(sends(), Verdict::Refuse);
    assert_eq!(
        node.arrive(packet, 0, Origin::Network, false),
        Verdict::Pass
    );
}
