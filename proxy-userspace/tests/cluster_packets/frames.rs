//! Frames that no socket of a client sends.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use shunt_lab::Lab;

use crate::{Cluster, cluster_ip};

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
