//! Packets that others forget, in a cluster of namespaces: path-MTU discovery, pings, unknown ports and addresses. Rows of the specification are named at each
//! check. Needs root.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use shunt_lab::{Agent, AgentOptions, Answer, Client, Dial, Lab, PodSpec, Port, Proto, Sockets};
use socket2::{Domain, Protocol, Socket, Type};
use tempfile::TempDir;

const APP: u16 = 8080;
/// Of Service `near`; `far` has the next, `none` the one after.
const NODE_PORT: u16 = 30080;
/// What a bulk transfer carries each way: some hundred full segments, more than any initial window.
const BULK: usize = 600_000;

/// Two nodes with an agent each. Service `near` has a backend on node-a, `far` one on node-b, `none` nobody. Clients are on
/// node-a (`packets` is a pod there whose sockets no hook sees) and outside.
struct Cluster {
    _agents: Vec<Agent>,
    lab: Lab,
    _manifests: TempDir,
}

impl Cluster {
    fn start(lab: Lab, xdp: &str, extra: &[&str]) -> Self {
        let ports = [Port::tcp(APP), Port::udp(APP)];
        let manifests = TempDir::new().unwrap();
        for (number, (name, node)) in [("near", "node-a"), ("far", "node-b"), ("none", "")]
            .into_iter()
            .enumerate()
        {
            let mut text = service(name, number as u16 + 1);
            if !node.is_empty() {
                lab.add_pod(&PodSpec::new(name, node, &ports)).unwrap();
                text += &pod(name, node, &lab.ips(name).unwrap());
            }
            fs::write(manifests.path().join(format!("{name}.yaml")), text).unwrap();
        }
        lab.add_pod(&PodSpec::new("packets", "node-a", &[])).unwrap();
        lab.add_pod(&PodSpec::new("hooked", "node-a", &[])).unwrap();
        let options = AgentOptions::manifests(manifests.path())
            .xdp(xdp)
            .args(extra)
            .shunt(env!("CARGO_BIN_EXE_shunt"));
        let agents = ["node-a", "node-b"].map(|node| lab.start_agent(node, &options).unwrap());
        Self {
            _agents: agents.into(),
            lab,
            _manifests: manifests,
        }
    }

    fn client(&self, name: &str) -> Client {
        let sockets = match name {
            "hooked" | "node-a" => Sockets::Hooked,
            _ => Sockets::Unhooked,
        };
        self.lab.client(name, sockets).unwrap()
    }

    fn ip(&self, name: &str, v6: bool) -> IpAddr {
        let ips = self.lab.ips(name).unwrap();
        ips.into_iter().find(|ip| ip.is_ipv6() == v6).unwrap()
    }

    /// The node port of the Service with this number on node-a.
    fn node_port(&self, number: u16, v6: bool) -> SocketAddr {
        let ip = self.lab.node_ips("node-a").unwrap()[usize::from(v6)];
        SocketAddr::new(ip, NODE_PORT + number - 1)
    }

    /// How many packets a node or the fabric would not forward because they were too big.
    fn too_big(&self, router: &str, v6: bool) -> u64 {
        let router = self.lab.ns(router).unwrap();
        let read = |path: &str| router.run(|| fs::read_to_string(path)).unwrap();
        if v6 {
            let text = read("/proc/thread-self/net/snmp6");
            let line = text
                .lines()
                .find(|line| line.starts_with("Icmp6OutPktTooBigs"))
                .unwrap();
            return line.split_whitespace().nth(1).unwrap().parse().unwrap();
        }
        let text = read("/proc/thread-self/net/snmp");
        let mut lines = text.lines().filter(|line| line.starts_with("Ip: "));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let mut both = names.split(' ').zip(values.split(' '));
        both.find(|(name, _)| *name == "FragFails").unwrap().1.parse().unwrap()
    }
}

fn cluster_ip(number: u16, v6: bool) -> SocketAddr {
    let text = if v6 {
        format!("[fd96::{number}]:80")
    } else {
        format!("10.96.0.{number}:80")
    };
    text.parse().unwrap()
}

fn service(name: &str, number: u16) -> String {
    let node_port = NODE_PORT + number - 1;
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec:\n  type: NodePort\n  clusterIP: 10.96.0.{number}\n  \
         clusterIPs: [10.96.0.{number}, 'fd96::{number}']\n  ipFamilies: [IPv4, IPv6]\n  selector: {{ app: {name} }}\n  ports:\n  \
         - {{ name: t, protocol: TCP, port: 80, targetPort: {APP}, nodePort: {node_port} }}\n  \
         - {{ name: u, protocol: UDP, port: 80, targetPort: {APP}, nodePort: {node_port} }}\n---\n"
    )
}

fn pod(name: &str, node: &str, ips: &[IpAddr]) -> String {
    let list: Vec<_> = ips.iter().map(|ip| format!("{{ ip: '{ip}' }}")).collect();
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, labels: {{ app: {name} }} }}\n\
         spec: {{ nodeName: {node}, containers: [{{ name: app }}] }}\n\
         status: {{ podIP: '{}', podIPs: [{}], conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
        ips[0],
        list.join(", "),
    )
}

/// A request and an answer of so many bytes.
fn transfer(client: &Client, proto: Proto, to: SocketAddr, bytes: usize) -> Answer {
    let dial = Dial {
        padding: bytes,
        ..Dial::default()
    };
    match client.once(proto, to, &dial) {
        Ok(answer) => answer,
        Err(error) => panic!("{proto} {to} from {}, {bytes} bytes: {error}", client.name()),
    }
}

/// Sends what node-a and node-b have for each other's pods, and the fabric for the client, over links with small MTUs.
fn narrow(lab: &Lab) {
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
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

/// L6 with real transfers: a middle link has a smaller MTU than both ends, in each direction, behind a ClusterIP and behind a
/// node port whose flows are translated to the node's address.
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

/// L6 where the node itself is the router before the narrow link, as with an overlay network: it tells the client about packets
/// that it has translated already.
fn path_mtu_of_the_node(xdp: &str, extra: &[&str]) {
    let lab = Lab::new().unwrap();
    let narrow = ["10.44.1.0/24 via 192.168.50.12", "fd44:0:0:b::/64 via fd50::12"];
    let narrow = narrow.map(|way| format!("route replace {way} mtu lock 1300"));
    lab.ns("node-a").unwrap().ip(&narrow).unwrap();
    let cluster = Cluster::start(lab, xdp, extra);
    for v6 in [false, true] {
        for (from, to) in [("packets", cluster_ip(2, v6)), ("client", cluster.node_port(2, v6))] {
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

/// What a datagram with so many hops gets: an answer, or an error, which the kernel gives to the socket that the quoted packet is of.
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
            libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), size)
        };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
        socket.connect(&to.into())?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        let socket = UdpSocket::from(socket);
        socket.send(b"hello\n")?;
        socket.recv(&mut [0; 2048])
    })
}

/// The last hop: whoever would have to forward the packet tells the client, about the packet that the client sent, and one hop
/// more gets an answer. A backend here is one hop behind its node, one there two.
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
                        let case = format!("{to} from {from} with {hops} hops, --xdp {xdp}: {result:?}");
                        match result {
                            Ok(_) => assert!(hops >= enough, "{case}"),
                            Err(error) => {
                                assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{case}");
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

const BOTH: [Proto; 2] = [Proto::Tcp, Proto::Udp];

/// Whether an echo request with so many hops is answered, by whom it went to.
fn ping(cluster: &Cluster, from: &str, to: IpAddr, hops: u32) -> bool {
    let ns = cluster.lab.ns(from).unwrap();
    ns.sysctl(&[("ipv4.ping_group_range", "0 0")]).unwrap();
    ns.run(|| {
        let (domain, protocol, request) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128),
        };
        // The kernel fills in identifier and checksum, and hands over answers to this socket's requests only.
        let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).unwrap();
        match to {
            IpAddr::V4(_) => socket.set_ttl_v4(hops).unwrap(),
            IpAddr::V6(_) => socket.set_unicast_hops_v6(hops).unwrap(),
        }
        socket.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
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

/// F11, and LESSONS' loop: whatever its hop limit, a ping is answered or dropped where it meets the first node.
fn pings(xdp: &str) {
    let cluster = Cluster::start(Lab::new().unwrap(), xdp, &[]);
    for v6 in [false, true] {
        for from in ["packets", "node-a", "client"] {
            for (number, answered) in [(1, true), (2, true), (3, false), (77, false)] {
                let to = cluster_ip(number, v6).ip();
                assert_eq!(ping(&cluster, from, to, 64), answered, "{to} from {from}, --xdp {xdp}");
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
                    let quick = error.after().is_some_and(|after| after < Duration::from_millis(limit));
                    assert!(
                        error.is_refused() && quick,
                        "{proto} {to} from {name}, --xdp {xdp}: {error}"
                    );
                }
                if name != "node-a" {
                    let error = client.once(proto, cluster_ip(77, v6), &dial(true, 400)).unwrap_err();
                    assert!(error.is_timeout(), "{proto} from {name}, --xdp {xdp}: {error}");
                }
            }
            // A port of a node that no Service has is the node's own affair: its kernel refuses, or a process answers.
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

/// L7 with sockets, and bulk TCP: datagrams that need six fragments there and back, by ClusterIP and node port, to backends
/// here and there; with `offloads`, segments of 64 KiB whose payload stands in pages, and checksums still to be filled in.
fn large(lab: Lab, xdp: &str, extra: &[&str]) {
    let cluster = Cluster::start(lab, xdp, extra);
    for v6 in [false, true] {
        for name in ["packets", "client"] {
            let client = cluster.client(name);
            for number in [1, 2] {
                for to in [cluster_ip(number, v6), cluster.node_port(number, v6)] {
                    let wanted = ["near", "far"][usize::from(number == 2)];
                    for (proto, bytes) in [(Proto::Udp, 8_000), (Proto::Udp, 1_473), (Proto::Tcp, 4_000_000)] {
                        let answer = transfer(&client, proto, to, bytes);
                        assert_eq!(
                            (answer.server.as_str(), answer.peer),
                            (wanted, to),
                            "{proto} from {name}"
                        );
                        assert!(answer.echo.len() >= bytes, "{proto} {to} from {name}");
                    }
                }
            }
        }
    }
}

#[test]
fn fragments_and_bulk_with_xdp() {
    large(Lab::new().unwrap(), "native", &[]);
}

#[test]
fn fragments_and_bulk_without_xdp() {
    large(Lab::new().unwrap(), "off", &[]);
}

#[test]
fn fragments_and_bulk_with_offloads() {
    let lab = || Lab::builder().strict_rp_filter().checksum_offload().build().unwrap();
    large(lab(), "off", &[]);
    large(lab(), "off", &["--fast-path", "on"]);
}

/// The VLAN of the next frame that a packet socket gets and that satisfies a test; `None` in vain.
fn tag_of_answer(socket: &OwnedFd, is_it: impl Fn(&[u8]) -> bool) -> Option<u16> {
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < deadline {
        let (mut frame, mut control) = ([0u8; 2048], [0u64; 16]);
        let mut part = libc::iovec {
            iov_base: frame.as_mut_ptr().cast(),
            iov_len: frame.len(),
        };
        // SAFETY: all zeros is a message header; it names buffers that outlive the calls, with their sizes.
        let (length, tag) = unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = size_of_val(&control);
            let length = libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT);
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            let tag = (!header.is_null() && (*header).cmsg_type == libc::PACKET_AUXDATA).then(|| {
                let data = libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned();
                (data.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(data.tp_vlan_tci)
            });
            (length, tag.flatten())
        };
        match usize::try_from(length) {
            Ok(length) if is_it(&frame[..length]) => return Some(tag.unwrap_or(0)),
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    None
}

/// Frames with a VLAN tag in them, from the wire: XDP leaves them to tc, for which the kernel takes the tag out, and what goes
/// back has it again.
fn vlan(xdp: &str) {
    const VLAN: u16 = 100;
    let cluster = Cluster::start(Lab::new().unwrap(), xdp, &[]);
    let link = cluster
        .lab
        .ns("node-a")
        .unwrap()
        .output("ip", &["-o", "link", "show", "eth0"])
        .unwrap();
    let mac: Vec<u8> = {
        let mut words = link.split_whitespace().skip_while(|word| *word != "link/ether");
        let text = words.nth(1).unwrap();
        text.split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect()
    };
    let mac: [u8; 6] = mac.try_into().unwrap();
    let socket = cluster.lab.ns("fabric").unwrap().run(|| {
        // SAFETY: the calls take numbers, and structures that outlive them with their sizes.
        unsafe {
            let all = u32::from((libc::ETH_P_ALL as u16).to_be()) as i32;
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all);
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            let on: libc::c_int = 1;
            let size = size_of_val(&on) as u32;
            libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, (&raw const on).cast(), size);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = all as u16;
            address.sll_ifindex = libc::if_nametoindex(c"node-a".as_ptr()) as i32;
            let bound = libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32);
            assert_eq!(bound, 0, "{}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        }
    });
    let ours = [2, 0, 0, 0, 0, 9];
    for v6 in [false, true] {
        let frame = |port: Option<u16>| {
            let tagged = PacketBuilder::ethernet2(ours, mac).single_vlan(VLAN.try_into().unwrap());
            let ip = match (cluster.ip("client", v6), cluster_ip(1, v6).ip()) {
                (IpAddr::V4(from), IpAddr::V4(to)) => tagged.ipv4(from.octets(), to.octets(), 9),
                (IpAddr::V6(from), IpAddr::V6(to)) => tagged.ipv6(from.octets(), to.octets(), 9),
                _ => unreachable!("one family"),
            };
            let mut frame = Vec::new();
            match port {
                Some(port) => ip.tcp(5000, port, 1, 1000).syn().write(&mut frame, &[]).unwrap(),
                None if v6 => ip.icmpv6_echo_request(1, 1).write(&mut frame, b"hello").unwrap(),
                None => ip.icmpv4_echo_request(1, 1).write(&mut frame, b"hello").unwrap(),
            }
            frame
        };
        let (protocol, icmp) = [(23, 34), (20, 54)][usize::from(v6)];
        // An answer to a ping, and a refusal of a port that nobody has.
        for (port, kind) in [(None, [0, 129][usize::from(v6)]), (Some(81), [3, 1][usize::from(v6)])] {
            let sent = frame(port);
            // SAFETY: the buffer outlives the call.
            let length = unsafe { libc::send(socket.as_raw_fd(), sent.as_ptr().cast(), sent.len(), 0) };
            assert_eq!(length as usize, sent.len(), "{}", io::Error::last_os_error());
            let is_answer =
                |frame: &[u8]| frame[..6] == ours && frame[protocol] == [1, 58][usize::from(v6)] && frame[icmp] == kind;
            assert_eq!(
                tag_of_answer(&socket, is_answer),
                Some(VLAN),
                "port {port:?}, --xdp {xdp}"
            );
        }
    }
}

#[test]
fn vlan_tags_stay_with_xdp() {
    vlan("native");
}

#[test]
fn vlan_tags_stay_without_xdp() {
    vlan("off");
}
