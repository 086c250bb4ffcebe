//! What is kept for clients that are there, and what made-up ones cannot change.

use super::*;

/// From where, and whether the hook sends on: a pod's packets, and an outside client's at tc and at
/// XDP.
const WAYS: [(Origin, bool); 3] = [
    (Origin::Pod, false),
    (Origin::Network, false),
    (Origin::Network, true),
];
const FRONTENDS: [u8; 2] = [1, 2];

/// Two frontends of a Service port with affinity for a minute.
struct Kept {
    node: Node<V4>,
    proto: u8,
    way: (Origin, bool),
}

impl Kept {
    fn new(proto: u8, way: (Origin, bool), backends: std::ops::Range<u8>) -> Self {
        let mut config = config();
        (config.quarantine, config.quarantine_max) = (60, 1800);
        let kept = Self {
            node: Node::new(config),
            proto,
            way,
        };
        // Open flows would stand among the others, which tells nothing of their clients.
        kept.node.max_half_open.set(1000);
        kept.serve(backends);
        kept
    }

    fn serve(&self, backends: std::ops::Range<u8>) {
        let frontend = Frontend {
            service: 7,
            affinity_secs: 60,
            flags: FRONTEND_AFFINITY,
            ..Frontend::default()
        };
        let backends: Vec<_> = backends.map(|n| (ip(10, 44, 1, n), 8080, false)).collect();
        for last in FRONTENDS {
            self.node
                .serve_as(frontend, ip(10, 96, 0, last), 80, self.proto, &backends);
        }
    }

    fn dialled(&self, port: u16, frontend: u8) -> Tuple<u32> {
        let client = match self.way.0 {
            Origin::Pod | Origin::Process => CLIENT,
            Origin::Network => ip(203, 0, 113, 9),
        };
        Tuple {
            proto: self.proto,
            ..to(client, port, ip(10, 96, 0, frontend), 80)
        }
    }

    /// A packet of the client's; what its backend sees.
    fn send(&self, dialled: Tuple<u32>, flags: u8) -> Tuple<u32> {
        let (origin, sends_on) = self.way;
        let flags = if self.proto == UDP { 0 } else { flags };
        let translated = self.node.translated(dialled, flags, origin, sends_on).tuple;
        if sends_on {
            translated
        } else {
            self.node.leave(translated, flags)
        }
    }

    /// Its answer.
    fn answer(&self, seen: Tuple<u32>) {
        let flags = if self.proto == UDP { 0 } else { SYN | ACK };
        if let Verdict::Pass = self
            .node
            .arrive(back(seen), flags, Origin::Network, self.way.1)
        {
            self.node.leave(back(seen), flags);
        } else if !self.way.1 {
            let inside = self
                .node
                .translated(back(seen), flags, Origin::Network, false)
                .tuple;
            self.node.leave(inside, flags);
        }
    }

    /// A flow that is confirmed: number of its backend.
    fn exchange(&self, port: u16, frontend: u8) -> u8 {
        let dialled = self.dialled(port, frontend);
        let seen = self.send(dialled, SYN);
        self.answer(seen);
        assert_eq!(self.send(dialled, ACK), seen);
        number(seen)
    }

    /// Clients that are there, and others.
    fn known(&self) -> (usize, usize) {
        (
            self.node.affinity.borrow().len(),
            self.node.new_affinity.borrow().len(),
        )
    }

    /// First packets so many that everything that they are noted in forgets all else.
    fn flood(&self) {
        let before = self.node.affinity.borrow().clone();
        for n in 0..200 {
            let dialled = Tuple {
                src: ip(198, 18, 0, n),
                ..self.dialled(1000, FRONTENDS[usize::from(n) % 2])
            };
            let seen = self.send(dialled, SYN);
            if n % 2 == 0 {
                self.answer(seen);
                if self.proto == TCP {
                    // Its owner, who never asked.
                    self.node.arrive(dialled, RST, self.way.0, self.way.1);
                }
            }
        }
        assert!(*self.node.affinity.borrow() == before);
        self.node.new_affinity.borrow_mut().clear();
        self.node.unconfirmed.borrow_mut().clear();
    }
}

/// Of a backend.
fn number(seen: Tuple<u32>) -> u8 {
    V4::bytes(seen.dst)[3]
}

fn for_all(test: impl Fn(u8, (Origin, bool))) {
    for proto in [TCP, UDP] {
        WAYS.iter().for_each(|&way| test(proto, way));
    }
}

/// L3: a client is known for good once it has spoken after an answer, by the first flow that has,
/// or that takes a used port again.
#[test]
fn a_client_is_known_when_a_flow_is_confirmed() {
    for_all(|proto, way| {
        let kept = Kept::new(proto, way, 1..9);
        let dialled = kept.dialled(40_000, 1);
        let seen = kept.send(dialled, SYN);
        assert_eq!(kept.send(dialled, SYN), seen);
        assert_eq!(kept.known(), (0, 1), "{proto} {way:?}: not answered");
        kept.answer(seen);
        assert_eq!(kept.known(), (0, 1), "{proto} {way:?}: answered");
        if proto == TCP {
            kept.send(dialled, SYN);
            assert_eq!(kept.known(), (0, 1), "{way:?}: a SYN of whoever");
        }
        kept.send(dialled, ACK);
        assert_eq!(kept.known(), (1, 0), "{proto} {way:?}: confirmed");
        assert_eq!(kept.exchange(40_001, 2), number(seen));
        assert_eq!(kept.known(), (1, 0));
    });
    for way in WAYS {
        let kept = Kept::new(TCP, way, 1..9);
        let first = kept.exchange(40_000, 1);
        kept.send(kept.dialled(40_000, 1), RST);
        kept.node.affinity.borrow_mut().clear();
        kept.exchange(40_000, 1);
        assert_eq!(kept.known(), (1, 0), "{way:?}: {first} was evicted");
    }
}

/// P1 and L3: whoever made up clients, those that are there keep their backends.
#[test]
fn first_packets_make_nobody_forget_a_client() {
    for_all(|proto, way| {
        let kept = Kept::new(proto, way, 5..6);
        assert_eq!(kept.exchange(40_000, 1), 5);
        kept.serve(1..9);
        for n in 1..20 {
            kept.flood();
            assert_eq!(
                kept.exchange(40_000 + n, 1 + n as u8 % 2),
                5,
                "{proto} {way:?}"
            );
        }
    });
}

/// P1: flows that a new client opens at once have one backend, and so have all that follow;
/// datagrams that are answered once too.
#[test]
fn flows_of_a_new_client_go_one_way() {
    for_all(|proto, way| {
        let kept = Kept::new(proto, way, 1..9);
        let seen: Vec<_> = (0..20)
            .map(|n| kept.send(kept.dialled(40_000 + n, 1 + n as u8 % 2), SYN))
            .collect();
        let first = number(seen[0]);
        for seen in &seen {
            assert_eq!(number(*seen), first, "{proto} {way:?}: at once");
        }
        seen.iter().for_each(|&seen| kept.answer(seen));
        for n in 0..20 {
            // Half a minute from one to the next.
            kept.node.now.set(kept.node.now.get() + 28);
            let seen = kept.send(kept.dialled(50_000 + n, 1), SYN);
            kept.answer(seen);
            assert_eq!(number(seen), first, "{proto} {way:?}: later");
        }
    });
}

/// P1: what is no endpoint any more when the flow is confirmed is not kept, and is nothing to the
/// client when it is back.
#[test]
fn endpoints_change_before_a_flow_is_confirmed() {
    for_all(|proto, way| {
        let kept = Kept::new(proto, way, 1..2);
        let dialled = kept.dialled(40_000, 1);
        let seen = kept.send(dialled, SYN);
        kept.serve(2..9);
        kept.answer(seen);
        assert_eq!(kept.send(dialled, ACK), seen, "the flow stays");
        let second = kept.exchange(40_001, 2);
        assert_ne!(second, 1);
        kept.serve(1..9);
        kept.flood();
        assert_eq!(kept.exchange(40_002, 1), second, "{proto} {way:?}");
    });
}

/// L8: a client leaves a backend that does not answer, known or not, and keeps the other one.
#[test]
fn another_backend_is_kept_when_the_first_is_silent() {
    for way in WAYS {
        for known in [false, true] {
            let kept = Kept::new(TCP, way, 1..9);
            let kept_one = known.then(|| kept.exchange(40_000, 1));
            let dialled = kept.dialled(40_001, 1);
            let first = kept.send(dialled, SYN);
            assert!(kept_one.is_none_or(|kept| kept == number(first)));
            let mut last = first;
            for _ in 0..2 {
                kept.node.now.set(kept.node.now.get() + 1);
                last = kept.send(dialled, SYN);
            }
            assert_ne!(number(last), number(first), "{way:?}, known {known}");
            assert_eq!(kept.known(), if known { (1, 0) } else { (0, 1) }, "{way:?}");
            kept.answer(last);
            kept.send(dialled, ACK);
            assert_eq!(kept.known(), (1, 0));
            kept.node.now.set(kept.node.now.get() + 28);
            kept.flood();
            assert_eq!(
                kept.exchange(40_002, 2),
                number(last),
                "{way:?}, known {known}"
            );
        }
    }
}
