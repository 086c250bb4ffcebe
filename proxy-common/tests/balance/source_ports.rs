//! Who gets how many of the source ports towards a backend (SPEC L10, H3).

use std::collections::HashSet;

use super::*;

const OTHER: (u32, u16, bool) = (0x0507_2c0a, 8080, false);

/// A node with ports and places as by default: two Services with one backend, one with another.
fn node_with_all_ports(proto: u8) -> Node<V4> {
    let node = Node::new(Config {
        snat_first: 1024,
        snat_ports: 64_512,
        snat_entries: 262_144,
        local_first: 32_768,
        local_ports: 28_232,
        ..config()
    });
    node.serve(ip(10, 96, 0, 1), 80, proto, &[REMOTE]);
    node.serve(ip(10, 96, 0, 2), 80, proto, &[REMOTE]);
    node.serve(ip(10, 96, 0, 3), 80, proto, &[OTHER]);
    // The test's node has one id for an address and port; the agent one for each Service.
    let mut slots = node.slots.borrow_mut();
    slots[1].backend = 7;
    drop(slots);
    node
}

fn dial(proto: u8, client: u32, port: u16, service: u8) -> Tuple<u32> {
    Tuple {
        proto,
        ..to(client, port, ip(10, 96, 0, service), 80)
    }
}

/// Sends the first packet, has it answered, and goes on. The source port, if it was given one.
fn open(node: &Node<V4>, dialled: Tuple<u32>) -> Option<u16> {
    let Verdict::Translate(to) = node.arrive(dialled, SYN, Origin::Network, true) else {
        return None;
    };
    node.translated(back(to.tuple), SYN | ACK, Origin::Network, true);
    let again = node.translated(dialled, ACK, Origin::Network, true);
    assert_eq!(again.tuple, to.tuple, "{dialled:?}");
    Some(to.tuple.src_port)
}

/// What the next few dials of a client get.
fn opens(node: &Node<V4>, proto: u8, client: u32, service: u8, dials: u16) -> usize {
    (0..dials)
        .filter(|n| open(node, dial(proto, client, 40_000 + n, service)).is_some())
        .count()
}

#[test]
fn one_client_may_have_sixty_thousand_connections_to_a_backend_and_no_other_misses_them() {
    let node = node_with_all_ports(TCP);
    let greedy = ip(203, 0, 113, 9);
    let mut ports = HashSet::new();
    let mut refused = 0;
    for port in 1024..=65_535 {
        match open(&node, dial(TCP, greedy, port, 1)) {
            Some(port) => assert!(ports.insert(port), "{port} was given twice"),
            None => {
                assert!(ports.len() >= 60_000, "refused after {}", ports.len());
                refused += 1;
            }
        }
    }
    assert!(refused > 1000, "what is kept back is not for it: {refused}");
    assert!(node.events.borrow().contains(&Event::SnatLimited));
    assert_eq!(node.backends.borrow()[&0].snat_refused, refused);
    // It has the other Service's share of nothing, and nor have others.
    for (client, service) in [
        (greedy, 2),
        (greedy, 3),
        (ip(198, 51, 100, 1), 1),
        (ip(198, 51, 101, 1), 2),
    ] {
        assert_eq!(opens(&node, TCP, client, service, 100), 100, "{service}");
    }
    // Nor do the greedy who come after it leave nothing for the next.
    let mut least = usize::MAX;
    for network in 0..8 {
        least = least.min(opens(&node, TCP, ip(198, 51, network, 1), 1, 600));
    }
    assert!(least >= 20, "{least}");
    // A sample of the ports may miss the few that are left: most dials get one at once.
    let other = opens(&node, TCP, ip(192, 0, 2, 1), 2, 20);
    assert!(other >= 10, "the other Service: {other} of 20");
}

/// Each datagram from somebody else, as fast as can be.
#[test]
fn a_flood_of_datagrams_takes_no_source_port_from_another_service() {
    let mut node = node_with_all_ports(UDP);
    (node.config.snat_first, node.config.snat_ports) = (10_240, 4096);
    node.config.snat_entries = 8192;
    let made_up = |n: u32| ip(11, (n >> 14) as u8, (n >> 6) as u8, n as u8);
    for n in 0..8000 {
        let dialled = dial(UDP, made_up(n), 5000, 1);
        if let Verdict::Translate(to) = node.arrive(dialled, 0, Origin::Network, true)
            && n % 2 == 0
        {
            node.translated(back(to.tuple), 0, Origin::Network, true);
        }
    }
    assert_eq!(opens(&node, UDP, ip(198, 51, 100, 1), 2, 200), 200);
    assert_eq!(opens(&node, UDP, ip(198, 51, 100, 1), 3, 200), 200);
    // Three seconds later the ports serve the next; netfilter's need half a minute.
    node.now.set(node.now.get() + 3);
    let served = (8000..11_500)
        .filter(|&n| {
            let dialled = dial(UDP, made_up(n), 5000, 1);
            matches!(
                node.arrive(dialled, 0, Origin::Network, true),
                Verdict::Translate(_)
            )
        })
        .count();
    assert_eq!(served, 3500);
}

/// Another range takes no port from a flow that has one.
#[test]
fn another_range_leaves_open_connections_alone() {
    let mut node = node_with_all_ports(TCP);
    let dialled = dial(TCP, ip(203, 0, 113, 9), 40_000, 1);
    let port = open(&node, dialled).unwrap();
    node.config.snat_first = 20_000;
    node.config.snat_ports = 10;
    assert!(!(20_000..20_010).contains(&port));
    let sent = node.translated(dialled, ACK, Origin::Network, true).tuple;
    assert_eq!(sent.src_port, port);
    let answer = node.translated(back(sent), ACK, Origin::Network, true);
    assert_eq!(answer.tuple, back(dialled));
    assert!(
        (20_000..20_010).contains(&open(&node, dial(TCP, ip(203, 0, 113, 9), 40_001, 1)).unwrap())
    );
}

/// The entry is gone, the source port is not: the connection finds it, though others are free that
/// are looked at first.
#[test]
fn a_connection_whose_entry_was_evicted_has_its_source_port_still() {
    let node = node_with_all_ports(TCP);
    let mut flows = Vec::new();
    for n in 0..3000u16 {
        let dialled = dial(TCP, ip(203, 0, 113, 9), 33_000 + n, 1);
        flows.push((dialled, open(&node, dialled).unwrap()));
    }
    for (dialled, _) in flows.iter().step_by(3) {
        let sent = node
            .translated(*dialled, FIN | ACK, Origin::Network, true)
            .tuple;
        node.translated(back(sent), FIN | ACK, Origin::Network, true);
    }
    node.now.set(node.now.get() + 100);
    node.flows.borrow_mut().clear();
    node.unconfirmed.borrow_mut().clear();
    for (n, (dialled, port)) in flows.iter().enumerate() {
        if n % 3 != 0 {
            let sent = node.translated(*dialled, ACK, Origin::Network, true).tuple;
            assert_eq!(sent.src_port, *port, "connection {n}");
        }
    }
}

#[test]
fn ports_of_the_node_are_given_to_nobody() {
    let node = node_with_all_ports(TCP);
    for port in 2000..3000 {
        node.filter
            .borrow_mut()
            .insert(shunt_common::filter::node_port(port));
    }
    let mut seen = HashSet::new();
    for port in 1024..=20_000 {
        if let Some(port) = open(&node, dial(TCP, ip(203, 0, 113, 9), port, 1)) {
            assert!(seen.insert(port) && !(2000..3000).contains(&port));
        }
    }
    let local = seen
        .iter()
        .filter(|port| (32_768..=60_999).contains(*port))
        .count();
    assert!(local < 100, "the kernel's own come last: {local}");
}
