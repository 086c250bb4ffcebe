//! Frames that no socket of a client sends.

use std::{
    ffi::CString,
    io,
    net::IpAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use shunt_lab::{Lab, Proto};

use super::{BOTH, Cluster, cluster_ip};

/// The VLAN of the next frame that a packet socket gets and that satisfies a test; `None` in vain.
fn tag_of_answer(socket: &OwnedFd, is_it: impl Fn(&[u8]) -> bool) -> Option<u16> {
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < deadline {
        let (mut frame, mut control) = ([0u8; 2048], [0u64; 16]);
        let mut part = libc::iovec {
            iov_base: frame.as_mut_ptr().cast(),
            iov_len: frame.len(),
        };
        // SAFETY: all zeros is a message header; it names buffers that outlive the calls, with
        // their sizes.
        let (length, tag) = unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = size_of_val(&control);
            let length = libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT);
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            let tag =
                (!header.is_null() && (*header).cmsg_type == libc::PACKET_AUXDATA).then(|| {
                    let data = libc::CMSG_DATA(header)
                        .cast::<libc::tpacket_auxdata>()
                        .read_unaligned();
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

/// The MAC address of a device.
fn mac_of(cluster: &Cluster, ns: &str, device: &str) -> [u8; 6] {
    let ns = cluster.lab.ns(ns).unwrap();
    let link = ns.output("ip", &["-o", "link", "show", device]).unwrap();
    let mut words = link
        .split_whitespace()
        .skip_while(|word| *word != "link/ether");
    let bytes = words.nth(1).unwrap().split(':');
    let mac: Vec<u8> = bytes
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    mac.try_into().unwrap()
}

/// A packet socket on a device: gets all frames, and says what tag they had.
fn packet_socket(cluster: &Cluster, ns: &str, device: &str) -> OwnedFd {
    let device = CString::new(device).unwrap();
    cluster.lab.ns(ns).unwrap().run(|| {
        // SAFETY: the calls take numbers, and structures that outlive them with their sizes.
        unsafe {
            let all = u32::from((libc::ETH_P_ALL as u16).to_be()) as i32;
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all);
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            let on: libc::c_int = 1;
            let size = size_of_val(&on) as u32;
            libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                libc::PACKET_AUXDATA,
                (&raw const on).cast(),
                size,
            );
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = all as u16;
            address.sll_ifindex = libc::if_nametoindex(device.as_ptr()) as i32;
            let bound = libc::bind(
                fd,
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            );
            assert_eq!(bound, 0, "{}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        }
    })
}

/// Frames with a VLAN tag in them, from the wire: XDP leaves them to tc, for which the kernel takes
/// the tag out, and what goes back has it again.
fn vlan(xdp: &str) {
    const VLAN: u16 = 100;
    let cluster = Cluster::start(Lab::new().unwrap(), xdp, &[]);
    let mac = mac_of(&cluster, "node-a", "eth0");
    let socket = packet_socket(&cluster, "fabric", "node-a");
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
                Some(port) => ip
                    .tcp(5000, port, 1, 1000)
                    .syn()
                    .write(&mut frame, &[])
                    .unwrap(),
                None if v6 => ip
                    .icmpv6_echo_request(1, 1)
                    .write(&mut frame, b"hello")
                    .unwrap(),
                None => ip
                    .icmpv4_echo_request(1, 1)
                    .write(&mut frame, b"hello")
                    .unwrap(),
            }
            frame
        };
        let (protocol, icmp) = [(23, 34), (20, 54)][usize::from(v6)];
        // An answer to a ping, and a refusal of a port that nobody has.
        for (port, kind) in [
            (None, [0, 129][usize::from(v6)]),
            (Some(81), [3, 1][usize::from(v6)]),
        ] {
            let sent = frame(port);
            // SAFETY: the buffer outlives the call.
            let length =
                unsafe { libc::send(socket.as_raw_fd(), sent.as_ptr().cast(), sent.len(), 0) };
            assert_eq!(
                length as usize,
                sent.len(),
                "{}",
                io::Error::last_os_error()
            );
            let is_answer = |frame: &[u8]| {
                frame[..6] == ours
                    && frame[protocol] == [1, 58][usize::from(v6)]
                    && frame[icmp] == kind
            };
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

/// Sends a frame out of a packet socket's ring, whose memory the kernel takes as it is: but for the
/// Ethernet header the packet stands in the pages of its socket buffer, headers and all.
fn send_in_pages(socket: &OwnedFd, frame: &[u8]) {
    const PAGE: u32 = 4096;
    let check = |result: i64| assert!(result >= 0, "{}", io::Error::last_os_error());
    let fd = socket.as_raw_fd();
    let set = |option: libc::c_int, value: *const libc::c_void, size: usize| {
        // SAFETY: callers pass a structure that outlives the call, with its size.
        check(unsafe { libc::setsockopt(fd, libc::SOL_PACKET, option, value, size as u32) }.into());
    };
    let version = libc::tpacket_versions::TPACKET_V2 as libc::c_int;
    set(
        libc::PACKET_VERSION,
        (&raw const version).cast(),
        size_of_val(&version),
    );
    let ring = libc::tpacket_req {
        tp_block_size: PAGE,
        tp_block_nr: 1,
        tp_frame_size: PAGE,
        tp_frame_nr: 1,
    };
    set(
        libc::PACKET_TX_RING,
        (&raw const ring).cast(),
        size_of_val(&ring),
    );
    // SAFETY: the ring is a page long, its frame begins with a header, and the packet behind that
    // fits in.
    unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let ring = libc::mmap(
            std::ptr::null_mut(),
            PAGE as usize,
            access,
            libc::MAP_SHARED,
            fd,
            0,
        );
        assert_ne!(ring, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        let header = ring.cast::<libc::tpacket2_hdr>();
        let begin = size_of::<libc::tpacket2_hdr>().next_multiple_of(libc::TPACKET_ALIGNMENT);
        assert!(begin + frame.len() <= PAGE as usize);
        ring.cast::<u8>()
            .add(begin)
            .copy_from_nonoverlapping(frame.as_ptr(), frame.len());
        (*header).tp_len = frame.len() as u32;
        (&raw mut (*header).tp_status).write_volatile(libc::TP_STATUS_SEND_REQUEST);
        check(libc::send(fd, std::ptr::null(), 0, 0) as i64);
        check(libc::munmap(ring, PAGE as usize).into());
    }
}

/// First packets whose headers stand in pages, from a pod and from the network, to backends here
/// and there: answered as others.
fn in_pages(xdp: &str) {
    let cluster = Cluster::start(Lab::new().unwrap(), xdp, &[]);
    let pod_device = cluster.lab.device("packets").unwrap();
    for (ns, device, to_mac, client) in [
        (
            "packets",
            "eth0",
            mac_of(&cluster, "node-a", &pod_device),
            "packets",
        ),
        (
            "fabric",
            "node-a",
            mac_of(&cluster, "node-a", "eth0"),
            "client",
        ),
    ] {
        let from_mac = mac_of(&cluster, ns, device);
        let answers = packet_socket(&cluster, ns, device);
        for v6 in [false, true] {
            for (number, proto) in [1, 2]
                .into_iter()
                .flat_map(|number| BOTH.map(|proto| (number, proto)))
            {
                let to = cluster_ip(number, v6);
                let ethernet = PacketBuilder::ethernet2(from_mac, to_mac);
                let (ip, source): (_, Vec<u8>) = match (cluster.ip(client, v6), to.ip()) {
                    (IpAddr::V4(from), IpAddr::V4(to)) => (
                        ethernet.ipv4(from.octets(), to.octets(), 9),
                        to.octets().into(),
                    ),
                    (IpAddr::V6(from), IpAddr::V6(to)) => (
                        ethernet.ipv6(from.octets(), to.octets(), 9),
                        to.octets().into(),
                    ),
                    _ => unreachable!("one family"),
                };
                let mut frame = Vec::new();
                match proto {
                    Proto::Tcp => ip
                        .tcp(5100, 80, 1, 1000)
                        .syn()
                        .write(&mut frame, &[])
                        .unwrap(),
                    _ => ip.udp(5100, 80).write(&mut frame, b"hello\n").unwrap(),
                }
                let sender = packet_socket(&cluster, ns, device);
                send_in_pages(&sender, &frame);
                let (source_at, payload) = [(26, 34), (22, 54)][usize::from(v6)];
                let is_answer = |frame: &[u8]| {
                    frame.len() > payload + 13
                        && frame[source_at..].starts_with(&source)
                        && frame[payload..].starts_with(&[
                            0,
                            80,
                            5100u16.to_be_bytes()[0],
                            5100u16.to_be_bytes()[1],
                        ])
                        && (proto == Proto::Udp || frame[payload + 13] == 0x12)
                };
                assert!(
                    tag_of_answer(&answers, is_answer).is_some(),
                    "{proto} {to} from {client}, --xdp {xdp}"
                );
            }
        }
    }
}

#[test]
fn headers_in_pages_are_read_with_xdp() {
    in_pages("native");
}

#[test]
fn headers_in_pages_are_read_without_xdp() {
    in_pages("off");
}
