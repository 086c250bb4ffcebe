//! Blocking requests to rtnetlink and its kin in the calling thread's network namespace: short
//! ones, answered by the kernel at once.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
        NetlinkPayload, NetlinkSerializable,
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, netdevice, socket},
};

/// Set on a dump during which the tables changed.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// How often a dump is begun anew because of changes before it is taken as it is.
const DUMP_ATTEMPTS: usize = 5;
/// Longest the kernel may take for an answer.
const TIMEOUT: libc::timeval = libc::timeval {
    tv_sec: 10,
    tv_usec: 0,
};

/// Everything that the kernel lists for `message`.
///
/// # Errors
/// The kernel's answer: `EOPNOTSUPP` where it has no such list.
pub(crate) fn dump(message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut result = Vec::new();
    for _ in 0..DUMP_ATTEMPTS {
        let interrupted;
        (result, interrupted) =
            exchange(NETLINK_ROUTE, message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
        if !interrupted {
            break;
        }
    }
    Ok(result)
}

/// One change, acknowledged.
///
/// # Errors
/// The kernel's answer: `EPERM` without `CAP_NET_ADMIN`, `ENODEV` when the device is gone, `EEXIST`
/// when somebody else has made the same.
pub(crate) fn change(message: RouteNetlinkMessage) -> io::Result<()> {
    exchange(NETLINK_ROUTE, message, NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// The index of the device with this name; `None` if there is none.
///
/// # Errors
/// When there is no socket to ask with.
pub(crate) fn device_index(name: &str) -> io::Result<Option<u32>> {
    match netdevice::name_to_index(datagram_socket()?, name) {
        Ok(index) => Ok(Some(index)),
        Err(Errno::NODEV) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The name of the device with this index; `None` if there is none.
///
/// # Errors
/// When there is no socket to ask with.
pub(crate) fn device_name(index: u32) -> io::Result<Option<String>> {
    match netdevice::index_to_name(datagram_socket()?, index) {
        Ok(name) => Ok(Some(name)),
        Err(Errno::NODEV | Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn datagram_socket() -> rustix::io::Result<OwnedFd> {
    socket(AddressFamily::INET, SocketType::DGRAM, None)
}

/// Sends one message of a protocol (`NETLINK_*`) and gathers the answers; says whether a dump was
/// interrupted by changes.
///
/// # Errors
/// The kernel's answer to the message, or `EAGAIN` when it gives none in time.
pub(crate) fn exchange<M>(protocol: isize, message: M, flags: u16) -> io::Result<(Vec<M>, bool)>
where
    M: NetlinkSerializable + NetlinkDeserializable + Into<NetlinkPayload<M>>,
{
    let mut socket = Socket::new(protocol)?;
    // SAFETY: the option takes a timeval of this size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            std::ptr::from_ref(&TIMEOUT).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;

    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = 1;
    let mut request = NetlinkMessage::new(header, message.into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;

    let mut messages = Vec::new();
    let mut interrupted = false;
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let mut rest = &answer[..];
        while !rest.is_empty() {
            let length = rest
                .first_chunk::<4>()
                .map_or(0, |l| u32::from_ne_bytes(*l) as usize);
            let parsed = NetlinkMessage::<M>::deserialize(rest);
            if length < size_of::<libc::nlmsghdr>() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "netlink: a message without a length",
                ));
            }
            // Messages are aligned to 4 bytes.
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match parsed {
                Ok(message) => {
                    interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                    match message.payload {
                        // A list may end so before it has begun.
                        NetlinkPayload::Done(done) if done.code < 0 => {
                            return Err(io::Error::from_raw_os_error(-done.code));
                        }
                        NetlinkPayload::Done(_) => return Ok((messages, interrupted)),
                        NetlinkPayload::Error(e) if e.code.is_none() => {
                            return Ok((messages, interrupted));
                        }
                        NetlinkPayload::Error(e) => return Err(e.to_io()),
                        NetlinkPayload::InnerMessage(inner) => messages.push(inner),
                        _ => {}
                    }
                }
                // One object with an attribute that the library does not understand must not hide
                // the others.
                Err(error) => tracing::debug!("netlink: skipping a message: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_sock_diag::{
        SockDiagMessage,
        inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
    };
    use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;

    use super::*;

    /// As `tcp_diag`, where the kernel has no such module: it says so where the list ends.
    #[test]
    fn what_the_kernel_cannot_list_is_not_an_empty_list() {
        let request = SockDiagMessage::InetRequest(InetRequest {
            family: libc::AF_INET as u8,
            protocol: 254,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: SocketId::new_v4(),
        });
        let answer = exchange(NETLINK_SOCK_DIAG, request, NLM_F_REQUEST | NLM_F_DUMP);
        let error = answer.map(|(list, _)| list.len()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
