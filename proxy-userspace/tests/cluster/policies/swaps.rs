//! Frontends that go from one Service to another while clients dial them without a pause: every dial
//! is answered by one or the other, whichever name comes first (L9).

use std::sync::atomic::AtomicBool;

use super::*;

/// With manifests many objects change at once. An API server's change one by one, and its Services
/// and slices are told apart from each other, so who is to have an address claims it before the other
/// gives it up; a cluster IP or a node port it gives to one Service only.
pub(super) fn frontends_change_their_service(cluster: &Cluster) {
    match cluster.source {
        Source::Manifests => at_once(cluster),
        Source::ApiServer => one_by_one(cluster),
    }
}

/// Two Services swap their external IPs, and one is renamed and keeps all of its own.
fn at_once(cluster: &Cluster) {
    let state = |first: &str, swapped: bool| {
        let [one, two]: [&[u8]; 2] = if swapped { [&[2], &[1]] } else { [&[1], &[2]] };
        [
            with_external_ips(cluster, first, 1, one),
            with_external_ips(cluster, "mm", 2, two),
        ]
        .concat()
    };
    let frontends = |v6| {
        vec![
            external_ip(1, v6),
            external_ip(2, v6),
            cluster_ip(1, v6),
            load_balancer_ip(1, v6),
            SocketAddr::new(cluster.ip("node-a", v6), node_port(1)),
        ]
    };
    cluster.apply(&state("aa", false));
    while_dialled(cluster, frontends, || {
        // The taker sorts first, then the giver.
        for (first, swapped) in [
            ("aa", true),
            ("aa", false),
            ("zy", false),
            ("zy", true),
            ("aa", true),
            ("ab", false),
            ("zy", true),
            ("aa", false),
        ] {
            cluster.apply(&state(first, swapped));
        }
    });
    for agent in &cluster.agents {
        assert!(
            !agent.output().contains("already belongs"),
            "{}",
            agent.output()
        );
    }
}

/// Two Services swap their external IPs, and a third takes one over from one that is deleted.
fn one_by_one(cluster: &Cluster) {
    // What each wants; nothing: it is not there.
    let states: [[&[u8]; 3]; 8] = [
        [&[1], &[2], &[]],
        [&[1, 2], &[2, 1], &[]],
        [&[2], &[1], &[]],
        [&[2], &[1], &[2]],
        [&[], &[1], &[2]],
        [&[], &[1, 2], &[1, 2]],
        [&[], &[2], &[1]],
        [&[1], &[2], &[1]],
    ];
    let services = [("aa", 1), ("mm", 2), ("zy", 3)];
    let apply = |state: [&[u8]; 3]| {
        let mut documents = Vec::new();
        for ((name, number), wanted) in services.into_iter().zip(state) {
            let of = with_external_ips(cluster, name, number, wanted);
            // Slices come before their Service is served, and are collected after it.
            documents.extend(of.into_iter().skip(usize::from(wanted.is_empty())));
        }
        cluster.apply(&documents);
    };
    apply(states[0]);
    let frontends = |v6| vec![external_ip(1, v6), external_ip(2, v6)];
    while_dialled(cluster, frontends, || {
        let there_and_back = states.iter().chain(states.iter().rev());
        there_and_back.for_each(|state| apply(*state));
    });
}

/// A Service that wants the external IPs with these numbers.
fn with_external_ips(cluster: &Cluster, name: &str, number: u8, wanted: &[u8]) -> Vec<String> {
    let pod = ["web-a", "web-b", "web-c"][usize::from(number) - 1];
    let ips = |numbers: &[u8]| {
        let of = |number: &u8| {
            let [v4, v6] = [false, true].map(|v6| external_ip(*number, v6).ip());
            format!("{v4}, '{v6}'")
        };
        let ips: Vec<String> = numbers.iter().map(of).collect();
        format!("externalIPs: [{}]", ips.join(", "))
    };
    let mut documents = cluster.documents(name, number, "", &ready(&[pod]));
    documents[0] = documents[0].replace(&ips(&[number]), &ips(wanted));
    documents
}

/// All clients dial these frontends for as long as `change` takes.
fn while_dialled(
    cluster: &Cluster,
    frontends: impl Fn(bool) -> Vec<SocketAddr>,
    change: impl FnOnce(),
) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut dialling = Vec::new();
        for name in CLIENTS {
            for v6 in [false, true] {
                let (client, frontends, done) = (cluster.client(name), frontends(v6), &done);
                dialling.push(scope.spawn(move || {
                    let mut dials = 0;
                    while !done.load(Ordering::Relaxed) {
                        for &to in &frontends {
                            for proto in BOTH {
                                dial(&client, proto, to);
                                dials += 1;
                            }
                        }
                    }
                    dials
                }));
            }
        }
        // A change that fails ends the dialling too.
        let changed = catch_unwind(AssertUnwindSafe(change));
        done.store(true, Ordering::Relaxed);
        for client in dialling {
            assert!(client.join().unwrap() > 20);
        }
        changed.unwrap();
    });
}
