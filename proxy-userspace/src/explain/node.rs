//! What the node's kernel says of a packet's way, beside the maps: routes, neighbours, filters of
//! return paths.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
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
use shunt_common::packet;

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
