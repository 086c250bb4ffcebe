//! What a dial must come to.

use super::*;

/// How to dial: UDP from a port that no dial had before, for a flow that the node remembers goes
/// where it went.
pub(super) fn how(proto: Proto, to: SocketAddr) -> Dial {
    const FIRST: u16 = 1024;
    /// Up to where node ports and the kernel's own choice begin.
    const PORTS: u16 = 30_000 - FIRST;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let port = || FIRST + NEXT.fetch_add(1, Ordering::Relaxed) % PORTS;
    Dial {
        bind: (proto == Proto::Udp).then(|| SocketAddr::new(any, port())),
        ..Dial::default()
    }
}

pub(super) fn dial(client: &Client, proto: Proto, to: SocketAddr) -> Answer {
    match client.once(proto, to, &how(proto, to)) {
        Ok(answer) => answer,
        Err(error) => panic!("{proto} {to} from {}: {error}", client.name()),
    }
}

/// The servers that answer so many dials.
pub(super) fn servers(
    client: &Client,
    proto: Proto,
    to: SocketAddr,
    dials: usize,
) -> BTreeSet<String> {
    (0..dials).map(|_| dial(client, proto, to).server).collect()
}

/// The one server that answers several dials.
pub(super) fn one_server(client: &Client, proto: Proto, to: SocketAddr) -> String {
    let servers = servers(client, proto, to, 6);
    assert_eq!(
        servers.len(),
        1,
        "{proto} {to} from {}: {servers:?}",
        client.name()
    );
    servers.into_iter().next().unwrap()
}

/// Dials that must come to nothing: no answer, and nothing that says so.
pub(super) fn silence(client: &Client, proto: Proto, to: SocketAddr) {
    let dial = Dial {
        timeout: Duration::from_millis(400),
        connected: true,
        ..how(proto, to)
    };
    let error = unanswered(client, proto, to, &dial);
    assert!(
        error.is_timeout(),
        "{proto} {to} from {}: {error}",
        client.name()
    );
}

fn unanswered(client: &Client, proto: Proto, to: SocketAddr, dial: &Dial) -> DialError {
    match client.once(proto, to, dial) {
        Ok(answer) => panic!(
            "{proto} {to} from {}: answered by {}",
            client.name(),
            answer.server
        ),
        Err(error) => error,
    }
}

/// Asserts that a client reaches exactly these servers, and that each dial shows what was dialled.
pub(super) fn reaches(client: &Client, proto: Proto, to: SocketAddr, wanted: &[&str]) {
    let mut seen = BTreeSet::new();
    for _ in 0..48 {
        let answer = dial(client, proto, to);
        assert_eq!(answer.peer, to, "{proto} from {}", client.name());
        assert!(
            wanted.contains(&answer.server.as_str()),
            "{proto} {to} from {}: answered by {}, not one of {wanted:?}",
            client.name(),
            answer.server
        );
        seen.insert(answer.server);
        // Whether others answer as well shows only by and by.
        if seen.len() == wanted.len() && seen.len() > 1 {
            break;
        }
        if wanted.len() == 1 {
            let again: BTreeSet<_> = (0..7).map(|_| dial(client, proto, to).server).collect();
            assert_eq!(again, seen, "{proto} {to} from {}", client.name());
            break;
        }
    }
    assert_eq!(
        seen,
        wanted.iter().map(|&server| server.to_owned()).collect(),
        "{proto} {to} from {}",
        client.name()
    );
}

/// Asserts that a client is refused at once.
pub(super) fn is_refused(client: &Client, proto: Proto, to: SocketAddr) {
    let dial = Dial {
        connected: true,
        ..how(proto, to)
    };
    let error = unanswered(client, proto, to, &dial);
    // IPv6 keeps an early error until the first retransmission: see `services`.
    let quick = error
        .after()
        .is_some_and(|after| after < Duration::from_millis(1500));
    assert!(
        error.is_refused() && quick,
        "{proto} {to} from {}: {error}",
        client.name()
    );
}
