//! Netlink messages by hand, for families that no library of ours speaks: netfilter's tables and
//! generic netlink.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
    netlink::{GENERIC, NETFILTER},
    recv, send, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of `struct nfgenmsg` and of `struct genlmsghdr`.
const FAMILY_HEADER: usize = 4;
/// Longest the kernel may take for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// One message: what stands behind `struct nlmsghdr`.
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// The first byte: `nfgen_family`, or a generic netlink command.
    pub(crate) fn first(&self) -> u8 {
        self.0.first().copied().unwrap_or_default()
    }

    /// Its attributes.
    pub(crate) fn attributes(&self) -> Attributes<'_> {
        Attributes(self.0.get(FAMILY_HEADER..).unwrap_or_default())
    }
}

/// Attributes, one behind the other.
#[derive(Clone, Copy)]
pub(crate) struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16_at(self.0, 0)?);
        // The upper bits are flags (NLA_F_NESTED and its like).
        let kind = u16_at(self.0, 2)? & 0x3fff;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

impl<'a> Attributes<'a> {
    /// Those that stand within an attribute.
    pub(crate) fn nested(value: &'a [u8]) -> Self {
        Self(value)
    }

    /// The value of an attribute.
    pub(crate) fn get(mut self, wanted: u16) -> Option<&'a [u8]> {
        self.find(|(kind, _)| *kind == wanted)
            .map(|(_, value)| value)
    }

    /// A text.
    pub(crate) fn text(self, wanted: u16) -> Option<String> {
        let text = String::from_utf8_lossy(self.get(wanted)?);
        Some(text.trim_end_matches('\0').to_owned())
    }

    /// A number in network order.
    pub(crate) fn be32(self, wanted: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(wanted)?.try_into().ok()?))
    }
}

/// What netfilter lists for a request (`NFNL_SUBSYS_*` << 8 | message), of every family.
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_NET_ADMIN`, `EPROTONOSUPPORT` or `EINVAL` where it has no
/// such part of netfilter: then there is nothing to list.
pub(crate) fn dump_netfilter(kind: u16) -> io::Result<Vec<Message>> {
    let socket = open(NETFILTER)?;
    exchange(&socket, kind, NLM_F_DUMP, &[0; FAMILY_HEADER])
}

/// Generic netlink.
pub(crate) struct Generic(OwnedFd);

impl Generic {
    /// A socket of its own.
    ///
    /// # Errors
    /// The kernel's: `EPROTONOSUPPORT` where it has no generic netlink, `EMFILE` without a free
    /// descriptor.
    pub(crate) fn open() -> io::Result<Self> {
        open(GENERIC).map(Self)
    }

    /// Sends a command of a family with attributes; the answers.
    ///
    /// # Errors
    /// The kernel's answer to the command: `ENOENT` where it does not know the family, `EOPNOTSUPP`
    /// the command, `EPERM` without the right to it.
    pub(crate) fn command(
        &self,
        family: u16,
        command: u8,
        dump: bool,
        attributes: &[u8],
    ) -> io::Result<Vec<Message>> {
        let mut body = vec![command, 1, 0, 0];
        body.extend(attributes);
        exchange(&self.0, family, if dump { NLM_F_DUMP } else { 0 }, &body)
    }

    /// The socket, for one that listens.
    pub(crate) fn into_inner(self) -> OwnedFd {
        self.0
    }
}

/// An attribute with a text.
pub(crate) fn text_attribute(kind: u16, text: &str) -> Vec<u8> {
    let length = 4 + text.len() + 1;
    let mut attribute = Vec::new();
    // No text of ours is so long.
    attribute.extend((length as u16).to_ne_bytes());
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(text.as_bytes());
    attribute.resize(length.next_multiple_of(4), 0);
    attribute
}

fn open(protocol: rustix::net::Protocol) -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(protocol),
    )?;
    set_socket_timeout(socket.as_fd(), Timeout::Recv, Some(TIMEOUT))?;
    Ok(socket)
}

fn exchange(socket: &OwnedFd, kind: u16, flags: u16, body: &[u8]) -> io::Result<Vec<Message>> {
    let mut request = Vec::new();
    request.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend(1_u32.to_ne_bytes());
    request.extend([0; 4]);
    request.extend(body);
    send(socket, &request, SendFlags::empty())?;
    let mut messages = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let (length, _) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some(length) = u32_at(rest, 0)
            .map(|l| l as usize)
            .filter(|&l| l >= HEADER && l <= rest.len())
        {
            let message = &rest[..length];
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match u16_at(message, 4) {
                Some(NLMSG_DONE) => return Ok(messages),
                Some(NLMSG_ERROR) => {
                    let errno = u32_at(message, HEADER).unwrap_or(0).cast_signed();
                    return if errno == 0 {
                        Ok(messages)
                    } else {
                        Err(io::Error::from_raw_os_error(-errno))
                    };
                }
                _ => messages.push(Message(message[HEADER..].to_vec())),
            }
        }
        if flags & NLM_F_DUMP == 0 {
            return Ok(messages);
        }
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
