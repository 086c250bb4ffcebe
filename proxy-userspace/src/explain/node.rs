//! What the node's kernel says of a packet's way, beside the maps: sockets, routes, neighbours,
//! filters of return paths.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST},
    sys::protocols::NETLINK_ROUTE,
};
use shunt_common::{layout, packet};

use crate::datapath::{devices, maps::MapFamily, rtnl};

/// Who talks to whom, in std's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Source address and port.
    pub src: SocketAddr,
    /// Destination address and port.
    pub dst: SocketAddr,
    /// IANA protocol number.
    pub proto: u8,
}

/// A tuple of the decision's.
pub fn tuple<F: MapFamily>(tuple: &packet::Tuple<F::Words>) -> Tuple {
    Tuple {
        src: SocketAddr::new(F::address(F::bytes(tuple.src)), tuple.src_port),
        dst: SocketAddr::new(F::address(F::bytes(tuple.dst)), tuple.dst_port),
        proto: tuple.proto,
    }
}

/// A tuple for the decision; `None` where the addresses are of another family.
pub fn words<F: MapFamily>(tuple: &Tuple) -> Option<packet::Tuple<F::Words>> {
    Some(packet::Tuple {
        src: F::words(F::octets(tuple.src.ip())?),
        dst: F::words(F::octets(tuple.dst.ip())?),
        src_port: tuple.src.port(),
        dst_port: tuple.dst.port(),
        proto: tuple.proto,
    })
}

/// Whether a socket of this network namespace would get packets of this tuple.
pub(super) fn socket_takes(tuple: &Tuple) -> bool {
    any_socket(tuple, takes)
}

/// Whether a socket of this network namespace is connected to where packets of this tuple come
/// from.
pub(super) fn socket_owns(tuple: &Tuple) -> bool {
    any_socket(tuple, owns)
}

/// Whether a test accepts the line in `/proc/net` of any socket of the tuple's protocol.
fn any_socket(tuple: &Tuple, accepts: impl Fn(&str, &Tuple) -> bool) -> bool {
    let kind = match tuple.proto {
        layout::TCP => "tcp",
        layout::UDP => "udp",
        _ => return false,
    };
    // An IPv6 socket may take IPv4 packets.
    ["", "6"].iter().any(|suffix| {
        let path = format!("/proc/thread-self/net/{kind}{suffix}");
        let sockets = fs::read_to_string(path).unwrap_or_default();
        sockets.lines().skip(1).any(|line| accepts(line, tuple))
    })
}

/// The addresses of a line of `/proc/net/tcp` or its like: the socket's own, and its peer's.
fn ends(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = proc_address(fields.next()?)?;
    Some((local, proc_address(fields.next()?)?))
}

/// Whether the socket of a line takes a tuple.
fn takes(line: &str, tuple: &Tuple) -> bool {
    let Some((local, remote)) = ends(line) else {
        return false;
    };
    local.port() == tuple.dst.port()
        && (local.ip() == tuple.dst.ip() || local.ip().is_unspecified())
        && (remote == tuple.src || (remote.port() == 0 && remote.ip().is_unspecified()))
}

/// Whether the socket of a line is connected, and takes a tuple.
fn owns(line: &str, tuple: &Tuple) -> bool {
    takes(line, tuple) && ends(line).is_some_and(|(_, remote)| remote == tuple.src)
}

/// An address as `/proc/net` has it: words in the machine's order, in hexadecimal.
fn proc_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |n: usize| u32::from_str_radix(address.get(8 * n..8 * n + 8)?, 16).ok();
    let ip = match address.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?.to_ne_bytes())),
        32 => {
            let mut bytes = [0; 16];
            for (n, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(n)?.to_ne_bytes());
            }
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Where the kernel sends a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Route {
    /// Index of the device it leaves by.
    pub(super) device: u32,
    /// The next hop; `None`: the destination itself.
    pub(super) gateway: Option<IpAddr>,
    /// The source address that the route gives.
    pub(super) source: Option<IpAddr>,
    /// The destination is this node itself.
    pub(super) local: bool,
}

/// The route of a packet. `from`: source address and the device it came in by; `None` for one that
/// the node itself sends.
///
/// # Errors
/// The kernel's: no route, a route that refuses, or a source that may not come in there.
pub(super) fn route(to: IpAddr, from: Option<(IpAddr, u32)>) -> io::Result<Route> {
    let prefix = if to.is_ipv4() { 32 } else { 128 };
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(to),
        destination_prefix_length: prefix,
        source_prefix_length: if from.is_some() { prefix } else { 0 },
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Destination(to.into())];
    if let Some((source, device)) = from {
        message
            .attributes
            .push(RouteAttribute::Source(source.into()));
        message.attributes.push(RouteAttribute::Iif(device));
    }
    let (answers, _) = rtnl::exchange(
        NETLINK_ROUTE,
        RouteNetlinkMessage::GetRoute(message),
        NLM_F_REQUEST | NLM_F_ACK,
    )?;
    let answer = answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    });
    let answer = answer.ok_or(io::ErrorKind::NotFound)?;
    let mut route = Route {
        local: answer.header.kind == RouteType::Local,
        ..Route::default()
    };
    for attribute in answer.attributes {
        match attribute {
            RouteAttribute::Oif(index) => route.device = index,
            RouteAttribute::Gateway(gateway) => route.gateway = address(gateway),
            RouteAttribute::PrefSource(source) => route.source = address(source),
            _ => {}
        }
    }
    Ok(route)
}

/// Whether an error of [`route`] says that the way back leads elsewhere, which the device's
/// `rp_filter` (the greater of `all` and its own) does not let pass. Kernels say `EXDEV` or
/// `EINVAL`; IPv6 has none.
pub(super) fn is_return_path(error: &io::Error, from: IpAddr, device: &str) -> bool {
    let strict = |name: &str| {
        fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"))
            .is_ok_and(|text| text.trim() == "1")
    };
    from.is_ipv4()
        && matches!(error.raw_os_error(), Some(libc::EXDEV | libc::EINVAL))
        && (strict("all") || strict(device))
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn address(address: RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(address.into()),
        RouteAddress::Inet6(address) => Some(address.into()),
        _ => None,
    }
}

/// The source address that the routes give to a packet, as the programs ask for it.
pub(super) fn route_source(tuple: &Tuple) -> Option<IpAddr> {
    // A route for what comes in names no source; that for what the node sends does.
    let source = route(tuple.dst.ip(), None).ok()?.source?;
    (source != tuple.src.ip() && !devices::is_link_local(&source)).then_some(source)
}

/// Whether the kernel knows the next hop on a device: `None` where it has not asked yet.
///
/// # Errors
/// The kernel's answer to a dump of neighbours: `ENOBUFS` when it changed too fast; try again.
pub(super) fn neighbour(hop: IpAddr, device: u32) -> io::Result<Option<bool>> {
    let mut message = NeighbourMessage::default();
    message.header.family = family(hop);
    let entries = rtnl::dump(RouteNetlinkMessage::GetNeighbour(message))?;
    let wanted = match hop {
        IpAddr::V4(hop) => NeighbourAddress::Inet(hop),
        IpAddr::V6(hop) => NeighbourAddress::Inet6(hop),
    };
    Ok(entries.into_iter().find_map(|entry| match entry {
        RouteNetlinkMessage::NewNeighbour(entry)
            if entry.header.ifindex == device
                && entry
                    .attributes
                    .contains(&NeighbourAttribute::Destination(wanted.clone())) =>
        {
            match entry.header.state {
                NeighbourState::Failed => Some(false),
                NeighbourState::Incomplete | NeighbourState::None => None,
                _ => Some(true),
            }
        }
        _ => None,
    }))
}

/// Whether the node forwards packets of an address's family.
pub(super) fn forwards(address: IpAddr) -> bool {
    let path = match address {
        IpAddr::V4(_) => "/proc/sys/net/ipv4/ip_forward",
        IpAddr::V6(_) => "/proc/sys/net/ipv6/conf/all/forwarding",
    };
    fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_proc_take_what_they_would() {
        let line =
            |local: &str, remote: &str| format!("   0: {local} {remote} 0A 00000000:00000000");
        let tuple = Tuple {
            src: "10.0.0.7:8080".parse().unwrap(),
            dst: "192.0.2.1:40000".parse().unwrap(),
            proto: layout::TCP,
        };
        let hex = |ip: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(ip));
        let any = "00000000:0000";
        let own = format!("{}:9C40", hex([192, 0, 2, 1]));
        let far = format!("{}:1F90", hex([10, 0, 0, 7]));
        let other = format!("{}:1F90", hex([10, 0, 0, 8]));
        assert!(takes(&line(&own, any), &tuple));
        assert!(takes(&line("00000000:9C40", any), &tuple));
        assert!(takes(&line(&own, &far), &tuple));
        assert!(!takes(&line(&own, &other), &tuple));
        assert!(owns(&line(&own, &far), &tuple));
        assert!(!owns(&line(&own, any), &tuple) && !owns(&line(&own, &other), &tuple));
        assert!(!takes(&line("00000000:9C41", any), &tuple));
        let zeros = "0".repeat(32);
        assert!(takes(
            &line(&format!("{zeros}:9C40"), &format!("{zeros}:0000")),
            &Tuple {
                dst: "[fd00::1]:40000".parse().unwrap(),
                src: "[fd00::2]:80".parse().unwrap(),
                ..tuple
            }
        ));
    }
}
