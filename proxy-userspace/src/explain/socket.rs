//! The node's socket that would get a packet: one exact question to the kernel, which looks where
//! the programs' `bpf_skc_lookup_tcp` and `bpf_sk_lookup_udp` look. `/proc/net/tcp` would be a walk
//! through a table as large as the machine's memory makes it.

use std::{io, net::SocketAddr};

use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::TCP_LISTEN,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST},
    sys::protocols::NETLINK_SOCK_DIAG,
};
use shunt_common::layout::{TCP, UDP};

use super::Tuple;
use crate::datapath::rtnl;

/// `INET_DIAG_NOCOOKIE`: whichever socket it is.
const ANY_COOKIE: [u8; 8] = [0xff; 8];

/// Whether the socket of this network namespace that would get packets of this tuple is connected,
/// or about to be; `None`: there is none. `device`: the index of the one that they come in by, for
/// sockets that are bound to one; 0: not known.
///
/// # Errors
/// The kernel's: it has no `tcp_diag` or `udp_diag`, or refuses the question.
pub(super) fn of(tuple: &Tuple, device: u32) -> io::Result<Option<bool>> {
    if !matches!(tuple.proto, TCP | UDP) {
        return Ok(None);
    }
    let request = SockDiagMessage::InetRequest(InetRequest {
        family: family(tuple),
        protocol: tuple.proto,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: id(tuple, device),
    });
    let answers = rtnl::exchange(NETLINK_SOCK_DIAG, request, NLM_F_REQUEST | NLM_F_ACK);
    let (answers, _) = match answers {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        answers => answers?,
    };
    let found = answers.into_iter().find_map(|answer| match answer {
        SockDiagMessage::InetResponse(response) => Some(response.header),
        _ => None,
    });
    Ok(found.map(|socket| is_connected(tuple.proto, &socket)))
}

/// As the programs see it (`socket` of `proxy-ebpf/src/maps.rs`).
fn is_connected(proto: u8, socket: &InetResponseHeader) -> bool {
    match proto {
        TCP => socket.state != TCP_LISTEN,
        _ => socket.socket_id.destination_port != 0,
    }
}

fn family(tuple: &Tuple) -> u8 {
    match tuple.dst {
        SocketAddr::V4(_) => libc::AF_INET as u8,
        SocketAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// Source and destination as the kernel reads them: the socket's for TCP, the packet's for UDP,
/// "swapped for historical reasons" (`udp_dump_one`).
fn id(tuple: &Tuple, device: u32) -> SocketId {
    let (source, destination) = match tuple.proto {
        TCP => (tuple.dst, tuple.src),
        _ => (tuple.src, tuple.dst),
    };
    SocketId {
        source_port: source.port(),
        destination_port: destination.port(),
        source_address: source.ip(),
        destination_address: destination.ip(),
        interface_id: device,
        cookie: ANY_COOKIE,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    fn told(proto: u8, src: SocketAddr, dst: SocketAddr) -> Option<bool> {
        of(&Tuple { src, dst, proto }, 0).unwrap()
    }

    /// Listening and connected sockets of both families, and one of IPv6 that takes IPv4.
    #[test]
    fn a_socket_is_found_as_packets_find_it() {
        for own in ["127.0.0.1:0", "[::1]:0"] {
            let (near, far): (SocketAddr, SocketAddr) = (
                own.parse().unwrap(),
                own.replace(":0", ":9").parse().unwrap(),
            );
            let listener = TcpListener::bind(near).unwrap();
            let served = listener.local_addr().unwrap();
            let client = TcpStream::connect(served).unwrap();
            let dialled = client.local_addr().unwrap();
            assert_eq!(told(TCP, far, served), Some(false), "{own}");
            assert_eq!(told(TCP, dialled, served), Some(true), "{own}");
            assert_eq!(told(TCP, served, dialled), Some(true), "{own}");
            assert_eq!(told(TCP, far, dialled), None, "{own}");

            let open = UdpSocket::bind(near).unwrap();
            let bound = open.local_addr().unwrap();
            assert_eq!(told(UDP, far, bound), Some(false), "{own}");
            open.connect(served).unwrap();
            assert_eq!(told(UDP, served, bound), Some(true), "{own}");
            assert_eq!(told(UDP, far, bound), None, "{own}");
        }
        let both = TcpListener::bind("[::]:0").unwrap();
        let port = both.local_addr().unwrap().port();
        let at = SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(told(TCP, "192.0.2.1:9".parse().unwrap(), at), Some(false));
    }
}
