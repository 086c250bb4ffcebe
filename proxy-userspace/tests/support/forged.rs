//! TCP segments from whatever address: floods, and strangers who speak in others' names.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use etherparse::{PacketBuilder, PacketBuilderStep, TcpHeader};
use socket2::{Domain, Protocol, Socket, Type};

/// Raw sockets of both families, in the network namespace that they were made in.
pub(crate) struct Forger {
    v4: Socket,
    v6: Socket,
}

impl Forger {
    pub(crate) fn new() -> io::Result<Self> {
        let raw = |domain| Socket::new(domain, Type::RAW, Some(Protocol::from(255)));
        let (v4, v6) = (raw(Domain::IPV4)?, raw(Domain::IPV6)?);
        v4.set_header_included_v4(true)?;
        Ok(Self { v4, v6 })
    }

    /// Sends a segment with the flag that is set by `flag`.
    pub(crate) fn send(
        &self,
        from: SocketAddr,
        to: SocketAddr,
        sequence: u32,
        flag: fn(PacketBuilderStep<TcpHeader>) -> PacketBuilderStep<TcpHeader>,
    ) -> io::Result<()> {
        let (builder, socket) = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => (
                PacketBuilder::ipv4(from.octets(), to.octets(), 64),
                &self.v4,
            ),
            (IpAddr::V6(from), IpAddr::V6(to)) => (
                PacketBuilder::ipv6(from.octets(), to.octets(), 64),
                &self.v6,
            ),
            _ => unreachable!("one family"),
        };
        let mut packet = Vec::new();
        flag(builder.tcp(from.port(), to.port(), sequence, 64_000))
            .write(&mut packet, &[])
            .map_err(io::Error::other)?;
        socket.send_to(&packet, &SocketAddr::new(to.ip(), 0).into())?;
        Ok(())
    }
}
