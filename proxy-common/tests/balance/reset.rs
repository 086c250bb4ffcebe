//! RSTs that are not their side's own, and those that are.

use super::*;

/// How a connection comes: from a pod, from outside at tc, from outside at XDP.
const WAYS: [(Origin, bool); 3] = [
    (Origin::Pod, false),
    (Origin::Network, false),
    (Origin::Network, true),
];

/// A connection to [`REMOTE`].
struct Connection {
    node: Node<V4>,
    origin: Origin,
    sends_on: bool,
    dialled: Tuple<u32>,
    /// What its backend sees.
    seen: Tuple<u32>,
}

impl Connection {
    fn open((origin, sends_on): (Origin, bool)) -> Self {
        let client = if origin == Origin::Pod {
            CLIENT
        } else {
            ip(203, 0, 113, 10)
        };
        let dialled = to(client, 40_000, ip(10, 96, 0, 1), 80);
        let mut connection = Self {
            node: node(&[REMOTE]),
            origin,
            sends_on,
            dialled,
            seen: dialled,
        };
        connection.seen = connection.client(SYN);
        connection.backend(SYN | ACK);
        assert_eq!(connection.client(ACK), connection.seen);
        // It would go elsewhere if it were opened now.
        connection.node.serve(ip(10, 96, 0, 1), 80, TCP, &[LOCAL]);
        connection
    }

    /// A packet of the client's, as it leaves the node.
    fn client(&self, flags: u8) -> Tuple<u32> {
        let translated = self
            .node
            .translated(self.dialled, flags, self.origin, self.sends_on);
        if self.sends_on {
            translated.tuple
        } else {
            self.node.leave(translated.tuple, flags)
        }
    }

    /// A packet of the backend's, which the client must see as the frontend's.
    fn backend(&self, flags: u8) {
        let reply = back(self.seen);
        let seen = match self
            .node
            .arrive(reply, flags, Origin::Network, self.sends_on)
        {
            Verdict::Translate(to) if self.sends_on => to.tuple,
            Verdict::Translate(to) => self.node.leave(to.tuple, flags),
            Verdict::Pass => self.node.leave(reply, flags),
            other => panic!("{other:?}"),
        };
        assert_eq!(seen, back(self.dialled));
    }

    fn side(&self, client: bool, flags: u8) {
        if client {
            self.client(flags);
        } else {
            self.backend(flags);
        }
    }

    /// Whether it is open for this node: a SYN is none of its own, and starts nothing.
    fn is_open(&self) -> bool {
        self.client(SYN) == self.seen
    }
}

/// Who resets a connection is silent from then on. So if that side speaks, the RST was a
/// stranger's, or the receiver did not believe it: what the other side says was under way, and
/// means nothing.
#[test]
fn a_reset_is_taken_back_by_its_own_side_only() {
    for way in WAYS {
        for client in [true, false] {
            let case = format!("{way:?}, by the client {client}");
            for reset in [RST, RST | ACK] {
                let connection = Connection::open(way);
                connection.side(client, reset);
                connection.side(!client, ACK);
                connection.side(client, reset);
                assert!(!connection.is_open(), "{case}");

                let connection = Connection::open(way);
                connection.side(client, reset);
                connection.side(client, ACK);
                assert!(connection.is_open(), "{case}");

                let connection = Connection::open(way);
                connection.side(true, reset);
                connection.side(false, reset);
                connection.side(client, ACK);
                assert!(!connection.is_open(), "{case}: one of two");
                let connection = Connection::open(way);
                connection.side(true, reset);
                connection.side(false, reset);
                connection.side(client, ACK);
                connection.side(!client, ACK);
                assert!(connection.is_open(), "{case}: both");
            }
        }
    }
}

/// A forged RST and a forged SYN of the backend look like a client that has closed its connection
/// and dials the backend itself. It shows that it has not.
#[test]
fn a_connection_that_seems_superseded_comes_back_with_its_client() {
    for reset_by_client in [true, false] {
        for flags in [SYN, SYN | ACK] {
            let connection = Connection::open(WAYS[0]);
            let (node, reply) = (&connection.node, back(connection.seen));
            connection.side(reset_by_client, RST);
            assert_eq!(
                node.leave(reply, flags),
                reply,
                "the client may have dialled it"
            );
            assert_eq!(node.leave(reply, ACK), reply);
            connection.client(ACK);
            connection.backend(ACK);
            connection.backend(ACK | FIN);
        }
    }
    // Closed by both sides it is over, whoever sends what.
    let connection = Connection::open(WAYS[0]);
    let (node, reply) = (&connection.node, back(connection.seen));
    connection.client(FIN | ACK);
    connection.backend(FIN | ACK);
    assert_eq!(node.leave(reply, SYN | ACK), reply);
    connection.client(ACK);
    assert_eq!(node.leave(reply, ACK), reply);
}

/// A client whose port is free again after its own RST uses it at once, whatever it dials.
#[test]
fn the_port_of_a_reset_connection_serves_the_next_at_once() {
    for way in WAYS {
        for client in [true, false] {
            let connection = Connection::open(way);
            connection.side(client, RST);
            let node = &connection.node;
            let other = Tuple {
                dst: ip(10, 96, 0, 2),
                ..connection.dialled
            };
            let to = node.translated(other, SYN, way.0, way.1);
            assert_eq!(to.tuple.dst, REMOTE.0, "another frontend");
            let again = node.translated(connection.dialled, SYN, way.0, way.1);
            assert_eq!(again.tuple.dst, LOCAL.0, "the same one");
        }
    }
}

/// Until its side has spoken again, nobody takes what a connection needs that a stranger has reset.
#[test]
fn a_reset_connection_keeps_its_entry_and_its_source_port_for_a_while() {
    for way in WAYS {
        for client in [true, false] {
            let connection = Connection::open(way);
            let node = &connection.node;
            connection.side(client, RST);
            node.now.set(node.now.get() + 2);
            // The client's port serves a connection to another frontend too.
            let other = Tuple {
                dst: ip(10, 96, 0, 2),
                ..connection.dialled
            };
            let to = node.translated(other, SYN, way.0, way.1).tuple;
            assert_ne!(
                (to.src, to.src_port),
                (connection.seen.src, connection.seen.src_port)
            );
            connection.side(client, ACK);
            assert!(connection.is_open(), "{way:?}, by the client {client}");
        }
    }
    // Translated source ports, when there are others and when there are none.
    let keeps = |ports, ticks, expected| {
        let node: Node<V4> = Node::new(Config {
            snat_ports: ports,
            snat_entries: 128,
            ..config()
        });
        node.serve(ip(10, 96, 0, 1), 80, TCP, &[REMOTE]);
        let dialled = |client| to(ip(203, 0, 113, client), 10_240, ip(10, 96, 0, 1), 80);
        let sent = node
            .translated(dialled(1), SYN, Origin::Network, true)
            .tuple;
        node.translated(back(sent), SYN | ACK, Origin::Network, true);
        node.translated(dialled(1), ACK, Origin::Network, true);
        node.translated(back(sent), RST, Origin::Network, true);
        node.now.set(node.now.get() + ticks);
        let port = match node.arrive(dialled(2), SYN, Origin::Network, true) {
            Verdict::Translate(to) => to.tuple.src_port,
            _ => 0,
        };
        assert_eq!(
            port != sent.src_port,
            expected,
            "{ports} ports, {ticks} ticks"
        );
    };
    let closed = Timeouts::default().closed;
    keeps(1000, closed, true);
    keeps(1000, closed + 1, false);
    keeps(1, 2, true);
    keeps(1, 3, false);
}
