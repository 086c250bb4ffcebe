//! A SYN that is not answered, or refused, finds another backend; what was answered stays.

use std::collections::HashMap;

use shunt_common::{
    balance::{Clock, Maps},
    failover::{socket_slot, source},
    hash,
};

use super::*;

/// Backends of the tests, half of them on the node.
const BACKENDS: [(u32, u16, bool); 4] = [
    REMOTE,
    LOCAL,
    (u32::from_ne_bytes([10, 44, 1, 8]), 8080, false),
    (u32::from_ne_bytes([10, 44, 0, 8]), 8080, true),
];
/// From where, and whether the hook sends on: a pod's packets, and an outside client's at tc and at
/// XDP.
const WAYS: [(Origin, bool); 3] = [
    (Origin::Pod, false),
    (Origin::Network, false),
    (Origin::Network, true),
];

fn node(count: usize, flags: u16) -> Node<V4> {
    let mut config = config();
    // A second, in ticks of 17 ms, and half a minute.
    (config.quarantine, config.quarantine_max) = (60, 1800);
    let node = Node::new(config);
    let frontend = Frontend {
        flags,
        ..Frontend::default()
    };
    node.serve_as(frontend, ip(10, 96, 0, 1), 80, TCP, &BACKENDS[..count]);
    node
}

fn dialled(port: u16) -> Tuple<u32> {
    to(ip(203, 0, 113, 9), port, ip(10, 96, 0, 1), 80)
}

/// What the backend sees of a client's segment.
fn send(
    node: &Node<V4>,
    tuple: Tuple<u32>,
    flags: u8,
    (origin, sends_on): (Origin, bool),
) -> Tuple<u32> {
    let arrived = node.translated(tuple, flags, origin, sends_on);
    if sends_on && !arrived.local {
        arrived.tuple
    } else {
        node.leave(arrived.tuple, flags)
    }
}

/// What the client sees of a backend's segment; `None` if it was held back.
fn answer(
    node: &Node<V4>,
    seen: Tuple<u32>,
    flags: u8,
    (_, sends_on): (Origin, bool),
) -> Option<Tuple<u32>> {
    let local = BACKENDS
        .iter()
        .any(|backend| backend.0 == seen.dst && backend.2);
    let origin = if local { Origin::Pod } else { Origin::Network };
    let inside = match node.arrive(back(seen), flags, origin, sends_on && !local) {
        Verdict::Pass => back(seen),
        Verdict::Translate(to) if sends_on && !local && !to.local => return Some(to.tuple),
        Verdict::Translate(to) => to.tuple,
        Verdict::Drop => return None,
        other => panic!("{seen:?} got {other:?}"),
    };
    match leaving::<V4, _>(node, &inside, flags) {
        Verdict::Pass => Some(inside),
        Verdict::Translate(to) => Some(to.tuple),
        Verdict::Drop => None,
        other => panic!("{inside:?} got {other:?}"),
    }
}

/// A backend that has failed the client of these tests.
fn failed(until: u32) -> BackendState {
    let source = source::<V4>(dialled(1).src, WAYS[0].0);
    BackendState {
        failures: 1,
        witnesses: [Witness { source, until }; MAX_WITNESSES],
        ..BackendState::default()
    }
}

fn wait(node: &Node<V4>, ticks: u32) {
    node.now.set(node.now.get() + ticks);
}

fn count(node: &Node<V4>, event: Event) -> usize {
    node.events
        .borrow()
        .iter()
        .filter(|&&counted| counted == event)
        .count()
}

/// Flows that wait in `flows`.
fn half_open(node: &Node<V4>) -> i64 {
    let flows = node.flows.borrow();
    flows
        .values()
        .filter(|flow| flow.state & FLOW_HALF_OPEN != 0)
        .count() as i64
}

fn state(node: &Node<V4>, backend: u32) -> BackendState {
    let id = node
        .ids
        .borrow()
        .iter()
        .position(|id| id.0 == backend)
        .unwrap();
    Maps::<V4>::backend(node, id as u32).unwrap().read()
}

#[test]
fn the_third_syn_goes_to_another_backend_and_its_connection_stays_there() {
    for way in WAYS {
        for port in 40_000..40_200 {
            let node = node(4, 0);
            // Every other one stands in `flows` from the beginning.
            node.max_half_open.set(i64::from(port % 2));
            let first = send(&node, dialled(port), SYN, way);
            wait(&node, 1);
            assert_eq!(
                send(&node, dialled(port), SYN, way),
                first,
                "the first retransmission"
            );
            // XDP has left it to tc.
            assert_eq!(
                send(&node, dialled(port), SYN, way),
                first,
                "the same packet once more"
            );
            wait(&node, 1);
            let second = send(&node, dialled(port), SYN, way);
            assert_ne!(second.dst, first.dst);
            assert_eq!(count(&node, Event::Retry), 1);
            assert_eq!(node.half_open.get(), half_open(&node));
            assert_eq!(
                send(&node, dialled(port), SYN, way),
                second,
                "the same packet once more"
            );

            // The first one's answer comes late: the client, which has dialled somebody else, must
            // not take it for theirs.
            let late = answer(&node, first, SYN | ACK, way);
            assert_ne!(late, Some(back(dialled(port))), "{way:?}");

            assert_eq!(
                answer(&node, second, SYN | ACK, way),
                Some(back(dialled(port))),
                "{way:?}"
            );
            for _ in 0..4 {
                wait(&node, 1);
                assert_eq!(
                    send(&node, dialled(port), SYN, way),
                    second,
                    "answered: the answer was lost"
                );
            }
            assert_eq!(send(&node, dialled(port), ACK, way), second);
            assert_eq!(
                answer(&node, second, RST | ACK, way),
                Some(back(dialled(port))),
                "a reset is no refusal"
            );
        }
    }
}

#[test]
fn a_refusal_is_held_back_while_another_backend_is_left() {
    for way in WAYS {
        for port in 40_000..40_200 {
            let node = node(3, 0);
            node.max_half_open.set(i64::from(port % 2) * 2);
            let mut tried = HashSet::new();
            for n in 0..3 {
                let seen = send(&node, dialled(port), SYN, way);
                assert!(tried.insert(seen.dst), "{way:?}: {tried:?} twice");
                let heard = answer(&node, seen, RST | ACK, way);
                assert_eq!(
                    heard,
                    (n == 2).then_some(back(dialled(port))),
                    "{way:?}: refusal {n}"
                );
                assert_eq!(node.half_open.get(), half_open(&node));
            }
            assert_eq!(
                (count(&node, Event::RefusalHeld), count(&node, Event::Retry)),
                (2, 2)
            );
            // All have refused just now: the next client hears it at once.
            let seen = send(&node, dialled(port + 1000), SYN, way);
            assert_eq!(
                answer(&node, seen, RST | ACK, way),
                Some(back(dialled(port + 1000)))
            );
            // And the first, which dials anew, finds who answers again.
            wait(&node, 3);
            let seen = send(&node, dialled(port), SYN, way);
            assert_eq!(
                answer(&node, seen, SYN | ACK, way),
                Some(back(dialled(port)))
            );
            assert_eq!(send(&node, dialled(port), ACK, way), seen);
        }
    }
}

#[test]
fn a_single_backend_is_waited_for_and_its_refusal_heard() {
    for way in WAYS {
        let node = node(1, 0);
        let seen = send(&node, dialled(40_000), SYN, way);
        for _ in 0..4 {
            wait(&node, 1);
            assert_eq!(send(&node, dialled(40_000), SYN, way), seen);
        }
        assert_eq!(
            answer(&node, seen, RST | ACK, way),
            Some(back(dialled(40_000)))
        );
    }
}

#[test]
fn a_service_that_does_not_want_it_is_left_as_it_is() {
    for way in WAYS {
        let node = node(4, FRONTEND_NO_RETRY);
        let seen = send(&node, dialled(40_000), SYN, way);
        for _ in 0..4 {
            wait(&node, 1);
            assert_eq!(send(&node, dialled(40_000), SYN, way), seen);
        }
        assert_eq!(
            answer(&node, seen, RST | ACK, way),
            Some(back(dialled(40_000)))
        );
        assert_eq!(state(&node, seen.dst), BackendState::default());
    }
}

/// Dials from new ports until a backend is chosen; the others answer.
fn dial_until(node: &Node<V4>, ports: &mut impl Iterator<Item = u16>, backend: u32) -> Option<u16> {
    ports.by_ref().take(64).find(|&port| {
        let seen = send(node, dialled(port), SYN, WAYS[0]);
        if seen.dst != backend {
            assert_eq!(
                answer(node, seen, SYN | ACK, WAYS[0]),
                Some(back(dialled(port)))
            );
        }
        seen.dst == backend
    })
}

#[test]
fn a_silent_backend_is_passed_over_for_a_growing_while_and_then_tried_by_one() {
    let node = node(4, 0);
    let mut ports = 20_000..60_000;
    let silent = BACKENDS[2].0;
    let first = dial_until(&node, &mut ports, silent).unwrap();
    for _ in 0..2 {
        wait(&node, 1);
        send(&node, dialled(first), SYN, WAYS[0]);
    }
    for (failures, ticks) in [(1, 1), (2, 2), (3, 4), (4, 8)] {
        assert_eq!(state(&node, silent).failures, failures);
        // Ticks of 1.07 s, and silences of 0.94 s: always within the last one.
        wait(&node, ticks - 1);
        assert_eq!(
            dial_until(&node, &mut ports, silent),
            None,
            "silent, failure {failures}"
        );
        wait(&node, 1);
        let probe = dial_until(&node, &mut ports, silent).expect("a probe");
        assert_eq!(
            dial_until(&node, &mut ports, silent),
            None,
            "one SYN is enough for a probe"
        );
        wait(&node, 1);
        // No second one for it: its client has waited for nothing already.
        assert_ne!(send(&node, dialled(probe), SYN, WAYS[0]).dst, silent);
    }
    for _ in 0..2 {
        wait(&node, 64);
        let probe = dial_until(&node, &mut ports, silent).expect("a probe");
        let seen = to(dialled(probe).src, probe, silent, 8080);
        assert_eq!(
            answer(&node, seen, SYN | ACK, WAYS[0]),
            Some(back(dialled(probe)))
        );
        assert_eq!(state(&node, silent).failures, 0);
        assert!(
            dial_until(&node, &mut ports, silent).is_some(),
            "it answers: all is as ever"
        );
    }
}

#[test]
fn a_silent_backends_share_falls_to_all_others_and_nobody_else_moves() {
    let healthy = node(4, 0);
    let failing = node(4, 0);
    let silent = BACKENDS[1].0;
    Maps::<V4>::backend(&failing, 1)
        .unwrap()
        .write(&failed(failing.affinity_now() + 1000));
    let mut shares = HashMap::new();
    for port in 20_000..32_000 {
        let before = send(&healthy, dialled(port), SYN, WAYS[0]).dst;
        let now = send(&failing, dialled(port), SYN, WAYS[0]).dst;
        assert_ne!(now, silent);
        if before == silent {
            *shares.entry(now).or_insert(0u32) += 1;
        } else {
            assert_eq!(now, before);
        }
    }
    // A thousand each.
    assert!(
        shares.len() == 3 && shares.values().all(|n| (850..1150).contains(n)),
        "{shares:?}"
    );
}

/// A socket's connection stays where it is led to, so it is led elsewhere while a backend is known
/// to be silent.
#[test]
fn sockets_pass_over_a_silent_backend() {
    const SOCKETS: u32 = 12_000;
    let node = node(4, 0);
    let frontend = Frontend {
        slot_count: 4,
        ..Frontend::default()
    };
    let now = node.affinity_now();
    let shares = || {
        let mut shares = [0u32; 4];
        for socket in 0..SOCKETS {
            let choice = hash::mix(socket.into()) as u32;
            let index = hash::pick(choice, frontend.slot_count);
            shares[socket_slot::<V4, _>(&node, &frontend, index, choice) as usize] += 1;
        }
        shares
    };
    let quarantine = |id: u32, failures, until| {
        Maps::<V4>::backend(&node, id)
            .unwrap()
            .write(&BackendState {
                failures,
                sockets_until: until,
                ..BackendState::default()
            });
    };
    let evenly = |shares: &[u32]| {
        shares
            .iter()
            .all(|n| n.abs_diff(SOCKETS / shares.len() as u32) < 200)
    };
    let before = shares();
    assert!(evenly(&before), "{before:?}");
    quarantine(0, 1, now + 1);
    let without_one = shares();
    assert!(
        without_one[0] == 0 && evenly(&without_one[1..]),
        "{without_one:?}"
    );
    quarantine(0, 1, now);
    assert_eq!(shares(), before, "its quarantine is over");
    (0..4).for_each(|id| quarantine(id, 3, now + 100));
    assert_eq!(shares(), before, "all are silent");
    (0..3).for_each(|id| quarantine(id, 3, now + 100));
    quarantine(3, 0, 0);
    assert_eq!(shares(), [0, 0, 0, SOCKETS]);
}

#[test]
fn a_client_that_keeps_its_backend_keeps_the_other_one_from_then_on() {
    let mut config = config();
    (config.quarantine, config.quarantine_max) = (60, 1800);
    let node: Node<V4> = Node::new(config);
    let frontend = Frontend {
        flags: FRONTEND_AFFINITY,
        affinity_secs: 600,
        ..Frontend::default()
    };
    node.serve_as(frontend, ip(10, 96, 0, 1), 80, TCP, &BACKENDS);
    let first = send(&node, dialled(40_000), SYN, WAYS[0]).dst;
    for _ in 0..2 {
        wait(&node, 1);
        send(&node, dialled(40_000), SYN, WAYS[0]);
    }
    let second = send(&node, dialled(40_000), SYN, WAYS[0]).dst;
    assert_ne!(second, first);
    for port in 41_000..41_100 {
        wait(&node, 1);
        assert_eq!(send(&node, dialled(port), SYN, WAYS[0]).dst, second);
    }
}

/// SYNs that nobody answers, from made-up sources, and of one client that is there: those who are
/// failed go elsewhere, and nobody else.
#[test]
fn nobody_takes_a_backend_from_another_client() {
    for way in WAYS {
        let (node, calm) = (node(4, 0), node(4, 0));
        let made_up = |n: u32| match way.0 {
            // A pod sends from its own address.
            Origin::Pod | Origin::Process => ip(203, 0, 113, 9),
            Origin::Network => ip(10, 77, (n >> 2) as u8, n as u8),
        };
        for round in 0..3 {
            for n in 0..1024 {
                let syn = Tuple {
                    src: made_up(n),
                    ..dialled(10_000 + n as u16)
                };
                let seen = send(&node, syn, SYN, way);
                if round == 0 && n % 7 == 0 {
                    // In a backend's name.
                    answer(&node, seen, RST | ACK, way);
                }
            }
            wait(&node, 1);
        }
        assert!(count(&node, Event::Retry) > 500);
        for port in 30_000..31_000 {
            let dialled = Tuple {
                src: ip(198, 51, 100, 77),
                ..dialled(port)
            };
            assert_eq!(
                send(&node, dialled, SYN, way).dst,
                send(&calm, dialled, SYN, way).dst,
                "{way:?}"
            );
        }
    }
}

/// A backend that answers anybody is no more in quarantine for anybody.
#[test]
fn an_answer_to_one_ends_the_quarantine_for_all() {
    let node = node(4, 0);
    let silent = BACKENDS[2].0;
    let mut ports = 20_000..60_000;
    let first = dial_until(&node, &mut ports, silent).unwrap();
    for _ in 0..2 {
        wait(&node, 1);
        send(&node, dialled(first), SYN, WAYS[0]);
    }
    assert_eq!(dial_until(&node, &mut ports, silent), None);
    let other = |port| Tuple {
        src: ip(198, 51, 100, 77),
        ..dialled(port)
    };
    let seen = (20_000..)
        .map(|port| send(&node, other(port), SYN, WAYS[0]))
        .find(|seen| seen.dst == silent)
        .unwrap();
    answer(&node, seen, SYN | ACK, WAYS[0]);
    assert_eq!(state(&node, silent).failures, 0);
    assert!(dial_until(&node, &mut ports, silent).is_some());
}

/// What no host sends opens nothing, and says nothing of a backend.
#[test]
fn a_syn_with_fin_opens_nothing() {
    for way in WAYS {
        let node = node(4, 0);
        for flags in [SYN | FIN, SYN | FIN | ACK, SYN | FIN | RST] {
            for _ in 0..4 {
                let verdict = node.arrive(dialled(40_000), flags, way.0, way.1);
                assert!(!matches!(verdict, Verdict::Translate(_)), "{verdict:?}");
                wait(&node, 1);
            }
        }
        assert!(node.flows.borrow().is_empty() && node.unconfirmed.borrow().is_empty());
    }
}

#[test]
fn all_silent_is_as_if_none_were() {
    let healthy = node(4, 0);
    let failing = node(4, 0);
    for id in 0..4 {
        Maps::<V4>::backend(&failing, id)
            .unwrap()
            .write(&failed(failing.affinity_now() + 1000));
    }
    for port in 20_000..20_500 {
        let now = send(&failing, dialled(port), SYN, WAYS[0]);
        assert_eq!(now, send(&healthy, dialled(port), SYN, WAYS[0]));
    }
    // Unanswered, it tries the others nevertheless.
    let seen = [0, 1, 2].map(|_| {
        wait(&failing, 1);
        send(&failing, dialled(40_000), SYN, WAYS[0]).dst
    });
    assert!(seen[0] == seen[1] && seen[1] != seen[2], "{seen:?}");
}

proptest! {
    /// Whatever answers, refuses or keeps silent: the client hears one backend at most, an answered
    /// connection stays where it is, and with a backend that answers, no client waits in vain.
    #[test]
    fn some_backend_answers_or_the_client_hears_that_none_does(
        moods in prop::collection::vec(0..3u8, 1..=4),
        way in 0..3usize,
        ports in prop::collection::vec(20_000..60_000u16, 1..12),
    ) {
        const ANSWERS: u8 = 0;
        const REFUSES: u8 = 1;
        let way = WAYS[way];
        let node = node(moods.len(), 0);
        let mood = |seen: Tuple<u32>| moods[BACKENDS.iter().position(|backend| backend.0 == seen.dst).unwrap()];
        let ports: HashSet<u16> = ports.into_iter().collect();
        for port in ports {
            let mut end = None;
            for _ in 0..9 {
                let seen = send(&node, dialled(port), SYN, way);
                let heard = match mood(seen) {
                    ANSWERS => answer(&node, seen, SYN | ACK, way).map(|tuple| (tuple, true)),
                    REFUSES => answer(&node, seen, RST | ACK, way).map(|tuple| (tuple, false)),
                    _ => None,
                };
                if let Some((tuple, open)) = heard {
                    prop_assert_eq!(tuple, back(dialled(port)));
                    end = Some((seen, open));
                    break;
                }
                wait(&node, 1);
            }
            match end {
                Some((seen, true)) => {
                    prop_assert_eq!(send(&node, dialled(port), ACK, way), seen);
                    prop_assert_eq!(answer(&node, seen, ACK, way), Some(back(dialled(port))));
                }
                Some((_, false)) => prop_assert!(moods.contains(&REFUSES) && !moods.contains(&ANSWERS), "{:?} and refused", moods),
                None => prop_assert!(!moods.contains(&ANSWERS), "{:?} and no answer", moods),
            }
        }
    }
}
