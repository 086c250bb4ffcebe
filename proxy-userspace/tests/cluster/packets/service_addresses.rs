//! Pings, unknown ports and unknown addresses.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use shunt_lab::{Dial, Lab, Proto, Sockets};
use socket2::{Domain, Protocol, Socket, Type};

use super::{BOTH, Cluster, cluster_ip, transfer};

/// Whether an echo request with so many hops is answered, by whom it went to.
fn ping(cluster: &Cluster, from: &str, to: IpAddr, hops: u32) -> bool {
    let ns = cluster.lab.ns(from).unwrap();
    ns.sysctl(&[("ipv4.ping_group_range", "0 0")]).unwrap();
    ns.run(|| {
        let (domain, protocol, request) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128),
        };
        // The kernel fills in identifier and checksum, and hands over answers to this socket's
        // requests only.
        let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).unwrap();
        match to {
            IpAddr::V4(_) => socket.set_ttl_v4(hops).unwrap(),
            IpAddr::V6(_) => socket.set_unicast_hops_v6(hops).unwrap(),
        }
        socket
            .set_read_timeout(Some(Duration::from_millis(400)))
            .unwrap();
        let message = [request, 0, 0, 0, 0, 0, 0, 1, b'h', b'e', b'l', b'l', b'o'];
        match socket.send_to(&message, &SocketAddr::new(to, 0).into()) {
            Ok(_) => {}
            // Dropped while it leaves the node that sends it: the sender hears of that.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return false,
            Err(error) => panic!("{to} from {from}: {error}"),
        }
        let socket = UdpSocket::from(socket);
        let mut answer = [0; 64];
        let (length, sender) = match socket.recv_from(&mut answer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) => panic!("{to} from {from}: {error}"),
        };
        assert_eq!((sender.ip(), &answer[6..length]), (to, &message[6..]));
        true
    })
}

/// F11, and LESSONS' loop: whatever its hop limit, a ping is answered or dropped where it meets the
/// first node.
fn pings(xdp: &str) {
    let cluster = Cluster::start(Lab::new().unwrap(), xdp, &[]);
    for v6 in [false, true] {
        for from in ["packets", "node-a", "client"] {
            for (number, answered) in [(1, true), (2, true), (3, false), (77, false)] {
                let to = cluster_ip(number, v6).ip();
                assert_eq!(
                    ping(&cluster, from, to, 64),
                    answered,
                    "{to} from {from}, --xdp {xdp}"
                );
            }
            // One hop is enough from a pod, two from outside (the fabric is a router).
            assert!(
                ping(
                    &cluster,
                    from,
                    cluster_ip(1, v6).ip(),
                    if from == "client" { 2 } else { 1 }
                ),
                "{from}"
            );
            let node = cluster.lab.node_ips("node-b").unwrap()[usize::from(v6)];
            assert!(ping(&cluster, from, node, 64), "a node answers for itself");
        }
    }
    let quiet = Cluster::start(Lab::new().unwrap(), xdp, &["--answer-ping", "off"]);
    for v6 in [false, true] {
        assert!(!ping(&quiet, "packets", cluster_ip(1, v6).ip(), 64));
    }
}

#[test]
fn pings_of_services_are_answered_with_xdp() {
    pings("native");
}

#[test]
fn pings_of_services_are_answered_without_xdp() {
    pings("off");
}

/// F12: at the socket hook (pods and the node), at tc and at XDP.
fn unknown(xdp: &str) {
    let cluster = Cluster::start(Lab::new().unwrap(), xdp, &[]);
    for v6 in [false, true] {
        for proto in BOTH {
            for name in ["hooked", "packets", "node-a", "client"] {
                let client = cluster.client(name);
                // So that no neighbour must be found first.
                transfer(&client, proto, cluster_ip(1, v6), 1);
                let dial = |connected, timeout| Dial {
                    connected,
                    timeout: Duration::from_millis(timeout),
                    ..Dial::default()
                };
                for connected in [true, false] {
                    let to = SocketAddr::new(cluster_ip(1, v6).ip(), 81);
                    let error = client.once(proto, to, &dial(connected, 3000)).unwrap_err();
                    // See `nobody_is_refused_at_once_and_oneself_is_reached` about TCP over IPv6.
                    let limit = if v6 && proto == Proto::Tcp { 1500 } else { 500 };
                    let quick = error
                        .after()
                        .is_some_and(|after| after < Duration::from_millis(limit));
                    assert!(
                        error.is_refused() && quick,
                        "{proto} {to} from {name}, --xdp {xdp}: {error}"
                    );
                }
                if name != "node-a" {
                    let error = client
                        .once(proto, cluster_ip(77, v6), &dial(true, 400))
                        .unwrap_err();
                    assert!(
                        error.is_timeout(),
                        "{proto} from {name}, --xdp {xdp}: {error}"
                    );
                }
            }
            // A port of a node that no Service has is the node's own affair: its kernel refuses, or
            // a process answers.
            let node = cluster.lab.node_ips("node-b").unwrap()[usize::from(v6)];
            let server = cluster.lab.client("node-b", Sockets::Hooked).unwrap();
            let own = SocketAddr::new(node, 9000);
            let again = server.serve("own", &[(proto, own)]);
            assert!(again.is_ok(), "{again:?}");
            for name in ["hooked", "packets", "node-a", "client"] {
                assert_eq!(transfer(&cluster.client(name), proto, own, 1).server, "own");
            }
        }
    }
}

#[test]
fn unknown_ports_and_addresses_with_xdp() {
    unknown("native");
}

#[test]
fn unknown_ports_and_addresses_without_xdp() {
    unknown("off");
}
