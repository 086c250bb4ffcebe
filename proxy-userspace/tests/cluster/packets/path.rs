//! What routers on the way say: path-MTU discovery, hop limits.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    time::Duration,
};

use shunt_lab::{Lab, Proto};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Cluster, cluster_ip, transfer};

/// What a bulk transfer carries each way: some hundred full segments, more than any initial window.
const BULK: usize = 600_000;

/// Sends what node-a and node-b have for each other's pods, and the fabric for the client, over
/// links with small MTUs.
fn narrow(lab: &Lab) {
    let lines = |lines: &[&str]| {
        lines
            .iter()
            .map(|line| (*line).to_owned())
            .collect::<Vec<_>>()
    };
    let via_fabric = |node: &str, cidrs: [&str; 2]| {
        lab.ns(node)
            .unwrap()
            .ip(&lines(&[
                &format!("route replace {} via 192.168.50.1", cidrs[0]),
                &format!("route replace {} via fd50::1", cidrs[1]),
            ]))
            .unwrap();
    };
    via_fabric("node-a", ["10.44.1.0/24", "fd44:0:0:b::/64"]);
    via_fabric("node-b", ["10.44.0.0/24", "fd44:0:0:a::/64"]);
    lab.ns("fabric")
        .unwrap()
        .ip(&lines(&[
            "route replace 10.44.1.0/24 via 192.168.50.12 mtu lock 1340",
            "route replace fd44:0:0:b::/64 via fd50::12 mtu lock 1340",
            "route replace 10.44.0.0/24 via 192.168.50.11 mtu lock 1320",
            "route replace fd44:0:0:a::/64 via fd50::11 mtu lock 1320",
            "route replace 203.0.113.10/32 dev wan0 mtu lock 1300",
            "route replace 2001:db8:113::10/128 dev wan0 mtu lock 1300",
        ]))
        .unwrap();
}

/// L6 with real transfers: a middle link has a smaller MTU than both ends, in each direction,
/// behind a ClusterIP and behind a node port whose flows are translated to the node's address.
fn path_mtu(xdp: &str) {
    let cluster = Cluster::start(Lab::new().unwrap(), xdp, &[]);
    narrow(&cluster.lab);
    let pod = cluster.client("packets");
    let outside = cluster.client("client");
    for v6 in [false, true] {
        // Of the frontend, the number of links on the way there and back that are too narrow.
        for (client, to, seen, narrow_links) in [
            (&pod, cluster_ip(2, v6), "packets", 2),
            (&outside, cluster.node_port(2, v6), "node-a", 2),
            (&outside, cluster.node_port(1, v6), "client", 1),
        ] {
            let before = cluster.too_big("fabric", v6);
            let answer = transfer(client, Proto::Tcp, to, BULK);
            assert_eq!((answer.echo.len() > BULK, answer.peer), (true, to));
            assert_eq!(answer.seen_peer.ip(), cluster.ip(seen, v6), "{to}");
            let too_big = cluster.too_big("fabric", v6) - before;
            assert!(
                too_big >= narrow_links,
                "{to}, --xdp {xdp}: only {too_big} packets met a narrow link"
            );
        }
    }
}

#[test]
fn path_mtu_discovery_works_with_xdp() {
    path_mtu("native");
}

#[test]
fn path_mtu_discovery_works_without_xdp() {
    path_mtu("off");
}

/// L6 where the node itself is the router before the narrow link, as with an overlay network: it
/// tells the client about packets that it has translated already.
fn path_mtu_of_the_node(xdp: &str, extra: &[&str]) {
    let lab = Lab::new().unwrap();
    let narrow = [
        "10.44.1.0/24 via 192.168.50.12",
        "fd44:0:0:b::/64 via fd50::12",
    ];
    let narrow = narrow.map(|way| format!("route replace {way} mtu lock 1300"));
    lab.ns("node-a").unwrap().ip(&narrow).unwrap();
    let cluster = Cluster::start(lab, xdp, extra);
    for v6 in [false, true] {
        for (from, to) in [
            ("packets", cluster_ip(2, v6)),
            ("client", cluster.node_port(2, v6)),
        ] {
            let before = cluster.too_big("node-a", v6);
            let answer = transfer(&cluster.client(from), Proto::Tcp, to, BULK);
            assert_eq!((answer.echo.len() > BULK, answer.peer), (true, to));
            let too_big = cluster.too_big("node-a", v6) - before;
            assert!(
                too_big > 0,
                "{to} from {from}, --xdp {xdp}: no packet met the narrow link"
            );
        }
    }
}

#[test]
fn path_mtu_discovery_works_from_the_node_itself() {
    path_mtu_of_the_node("native", &[]);
    path_mtu_of_the_node("off", &[]);
    path_mtu_of_the_node("off", &["--fast-path", "on"]);
}

/// What a datagram with so many hops gets: an answer, or an error, which the kernel gives to the
/// socket that the quoted packet is of.
fn with_hops(cluster: &Cluster, from: &str, to: SocketAddr, hops: u32) -> io::Result<usize> {
    cluster.lab.ns(from).unwrap().run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
        match to {
            SocketAddr::V4(_) => socket.set_ttl_v4(hops)?,
            SocketAddr::V6(_) => socket.set_unicast_hops_v6(hops)?,
        }
        let (level, option) = match to {
            SocketAddr::V4(_) => (libc::SOL_IP, libc::IP_RECVERR),
            SocketAddr::V6(_) => (libc::SOL_IPV6, libc::IPV6_RECVERR),
        };
        let on: libc::c_int = 1;
        // SAFETY: the call reads a number of the size that it is told.
        let set = unsafe {
            let size = size_of_val(&on) as u32;
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                (&raw const on).cast(),
                size,
            )
        };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
        socket.connect(&to.into())?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        let socket = UdpSocket::from(socket);
        socket.send(b"hello\n")?;
        socket.recv(&mut [0; 2048])
    })
}

/// The last hop: whoever would have to forward the packet tells the client, about the packet that
/// the client sent, and one hop more gets an answer. A backend here is one hop behind its node, one
/// there two.
fn hop_limits(xdp: &str) {
    let lab = Lab::new().unwrap();
    for node in ["node-a", "node-b"] {
        let all = [("ipv4.icmp_ratelimit", "0"), ("ipv6.icmp.ratelimit", "0")];
        lab.ns(node).unwrap().sysctl(&all).unwrap();
    }
    let cluster = Cluster::start(lab, xdp, &[]);
    for v6 in [false, true] {
        // The fabric is a router before the node.
        for (from, before) in [("packets", 0), ("client", 1)] {
            for number in [1, 2] {
                for to in [cluster_ip(number, v6), cluster.node_port(number, v6)] {
                    let enough = before + 1 + u32::from(number);
                    for hops in before + 1..enough + 2 {
                        let result = with_hops(&cluster, from, to, hops);
                        let case =
                            format!("{to} from {from} with {hops} hops, --xdp {xdp}: {result:?}");
                        match result {
                            Ok(_) => assert!(hops >= enough, "{case}"),
                            Err(error) => {
                                assert_eq!(
                                    error.raw_os_error(),
                                    Some(libc::EHOSTUNREACH),
                                    "{case}"
                                );
                                assert!(hops < enough, "{case}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_last_hop_is_told_with_xdp() {
    hop_limits("native");
}

#[test]
fn the_last_hop_is_told_without_xdp() {
    hop_limits("off");
}
