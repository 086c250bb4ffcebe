//! The connections that netfilter's own table holds, read over netlink (ctnetlink,
//! linux/netfilter/nfnetlink_conntrack.h). All of it is of the calling thread's network namespace.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
    netlink::NETFILTER,
    recv, send, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

/// One direction of a connection, as its packets come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Who sends.
    pub src: SocketAddr,
    /// Who receives.
    pub dst: SocketAddr,
}

/// A connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// IANA protocol number.
    pub proto: u8,
    /// From whoever opened it.
    pub original: Tuple,
    /// The answers.
    pub reply: Tuple,
    /// `TCP_CONNTRACK_*` of linux/netfilter/nf_conntrack_tcp.h; 0 for other protocols.
    pub tcp_state: u8,
}

impl Connection {
    /// Whether its last packets have been sent.
    pub fn is_over(&self) -> bool {
        const TIME_WAIT: u8 = 7;
        const CLOSE: u8 = 8;
        matches!(self.tcp_state, TIME_WAIT | CLOSE)
    }
}

/// `NFNL_SUBSYS_CTNETLINK` << 8 | `IPCTNL_MSG_CT_GET`.
const GET: u16 = (1 << 8) | 1;
/// `NLM_F_REQUEST` | `NLM_F_DUMP`.
const DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `nlmsghdr`.
const HEADER: usize = 16;
/// `nfgenmsg` behind it.
const GENERIC: usize = 4;
/// Attributes of a connection: `CTA_TUPLE_ORIG`, `CTA_TUPLE_REPLY`, `CTA_PROTOINFO`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const PROTOCOL_STATE: u16 = 4;

/// Reads all connections there are.
///
/// # Errors
/// The kernel's: without `CAP_NET_ADMIN`, without such a table, or when it does not answer.
pub fn for_each(mut visit: impl FnMut(&Connection)) -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let protocol = Some(NETFILTER);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    set_socket_timeout(socket.as_fd(), Timeout::Recv, Some(Duration::from_secs(5)))?;
    let mut request = Vec::new();
    request.extend(((HEADER + GENERIC) as u32).to_ne_bytes());
    request.extend(GET.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.extend([0; 8]);
    // Both families.
    request.extend([libc::AF_UNSPEC as u8, 0, 0, 0]);
    send(&socket, &request, SendFlags::empty())?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (length, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some(length) = word32(rest, 0) {
            let Some(message) = rest.get(..length as usize).filter(|m| m.len() >= HEADER) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            match word16(message, 4) {
                Some(NLMSG_DONE) => return Ok(()),
                Some(NLMSG_ERROR) => {
                    let error = word32(message, HEADER).unwrap_or(0).cast_signed();
                    return Err(io::Error::from_raw_os_error(-error));
                }
                _ => {
                    let attributes = message.get(HEADER + GENERIC..).unwrap_or_default();
                    if let Some(connection) = connection(attributes) {
                        visit(&connection);
                    }
                }
            }
            rest = rest
                .get(message.len().next_multiple_of(4)..)
                .unwrap_or_default();
        }
    }
}

fn word16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The value of an attribute.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let (length, kind) = (usize::from(word16(bytes, 0)?), word16(bytes, 2)?);
        let value = bytes.get(4..length)?;
        // Above the number: nested, in network order.
        if kind & 0x3fff == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

/// A connection of a protocol that has ports.
fn connection(attributes: &[u8]) -> Option<Connection> {
    let (proto, original) = tuple(attribute(attributes, ORIGINAL)?)?;
    let (_, reply) = tuple(attribute(attributes, REPLY)?)?;
    // `CTA_PROTOINFO_TCP`, and `CTA_PROTOINFO_TCP_STATE` within.
    let tcp_state = attribute(attributes, PROTOCOL_STATE)
        .and_then(|state| attribute(attribute(state, 1)?, 1)?.first().copied());
    Some(Connection {
        proto,
        original,
        reply,
        tcp_state: tcp_state.unwrap_or(0),
    })
}

fn tuple(bytes: &[u8]) -> Option<(u8, Tuple)> {
    // `CTA_TUPLE_IP` and `CTA_TUPLE_PROTO`.
    let (addresses, ports) = (attribute(bytes, 1)?, attribute(bytes, 2)?);
    // `CTA_IP_V4_SRC`, `CTA_IP_V6_SRC`, and those of the destination.
    let address = |v4, v6| match attribute(addresses, v4) {
        Some(bytes) => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        None => {
            let bytes = attribute(addresses, v6)?;
            Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?))
        }
    };
    let port = |kind| Some(u16::from_be_bytes(attribute(ports, kind)?.try_into().ok()?));
    let tuple = Tuple {
        src: SocketAddr::new(address(1, 3)?, port(2)?),
        dst: SocketAddr::new(address(2, 4)?, port(3)?),
    };
    Some((*attribute(ports, 1)?.first()?, tuple))
}
