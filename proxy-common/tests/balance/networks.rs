//! Ways through the node that others than the lab's plain one have.

use super::*;

/// P10: the backend sees the address of the way to it; open flows keep theirs when the way changes.
#[test]
fn the_source_follows_the_route_when_a_flow_is_opened() {
    let node = node(&[REMOTE]);
    let (own, overlay, moved) = (ip(192, 168, 50, 11), ip(10, 44, 0, 0), ip(10, 44, 0, 9));
    let client = ip(203, 0, 113, 10);
    let dial = |port: u16| {
        let dialled = to(client, port, ip(10, 96, 0, 1), 80);
        let sent = node.translated(dialled, SYN, Origin::Network, false).tuple;
        let left = node.leave(sent, SYN);
        (dialled, sent, left)
    };
    assert_eq!(dial(40_000).2.src, own, "no route says anything");
    node.route_sources.borrow_mut().insert(REMOTE.0, overlay);
    let (dialled, sent, left) = dial(40_001);
    assert_eq!(left.src, overlay);
    node.route_sources.borrow_mut().insert(REMOTE.0, moved);
    node.now.set(node.now.get() + 1);
    // Whichever device the answer comes in by, its addresses tell.
    let answer = node
        .translated(back(left), SYN | ACK, Origin::Network, false)
        .tuple;
    assert_eq!(answer, back(sent));
    assert_eq!(node.leave(answer, SYN | ACK), back(dialled));
    assert_eq!(
        node.translated(dialled, ACK, Origin::Network, false).tuple,
        sent
    );
    assert_eq!(
        node.leave(sent, ACK).src,
        overlay,
        "an open flow keeps its address"
    );
    assert_eq!(dial(40_002).2.src, moved);
    // XDP, which does both halves at once.
    let dialled = to(client, 40_003, ip(10, 96, 0, 1), 80);
    assert_eq!(
        node.translated(dialled, SYN, Origin::Network, true)
            .tuple
            .src,
        moved
    );
}

/// A backend of the node itself, whose port is another Service's node port: XDP translates, and tc
/// sees the packet again.
#[test]
fn a_packet_is_translated_once() {
    let here = ip(192, 168, 50, 11);
    let node = node(&[(here, 30_200, true)]);
    // The other Service: everything to that port of the node goes elsewhere.
    node.serve(here, 30_200, TCP, &[REMOTE]);
    let client = ip(203, 0, 113, 10);
    let dialled = to(client, 40_000, ip(10, 96, 0, 1), 80);
    for flags in [SYN, SYN, ACK, ACK | FIN] {
        let sent = node.translated(dialled, flags, Origin::Network, true).tuple;
        assert_eq!(sent, to(client, 40_000, here, 30_200));
        assert_eq!(
            node.arrive(sent, flags, Origin::Network, false),
            Verdict::Pass,
            "seen again"
        );
        if flags == SYN {
            assert_eq!(node.leave(back(sent), SYN | ACK), back(dialled));
        }
    }
    // Who dials that port itself gets the other Service.
    let direct = to(client, 40_001, here, 30_200);
    assert_eq!(
        node.translated(direct, SYN, Origin::Network, true)
            .tuple
            .dst,
        REMOTE.0
    );
    // So does the same port of the client, once its connection is long over.
    node.now.set(node.now.get() + 10_000);
    let direct = to(client, 40_000, here, 30_200);
    assert_eq!(
        node.translated(direct, SYN, Origin::Network, false)
            .tuple
            .dst,
        REMOTE.0
    );
}
