//! Which network devices get programs; [`super::device_watcher`] follows them as they appear, vanish
//! and are renamed.
//!
//! *Node devices* lead out of the node, *pod devices* lead to the pods on it. Without patterns, a
//! pod device is one end of a pair whose other end is in another network namespace, one that bears
//! a name that CNI plugins give (`cali*`, `lxc*`, `cni*`, `tap*`), or a TUN device without address
//! that host routes lead to. One with a default route, an address of the Node or a network of its
//! own leads out all the same. Every other device is a node device, tunnels and second NICs
//! included, but for those where no packet passes that another device does not have
//! ([`DevicePatterns::select`]): a packet is to be translated once. With `--devices` only those
//! that it names are node devices. The loopback device is always taken: by it processes of the node
//! dial node ports on its own addresses.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::IpAddr,
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressMessage,
    link::{
        InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp,
        XdpAttached,
    },
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
};
use serde::Serialize;

use super::{netns, rtnl};

/// Names of pod devices that are not pairs into another namespace (VMs' taps) or whose other end
/// cannot be seen.
const POD_NAMES: [&str; 4] = ["cali*", "lxc*", "cni*", "tap*"];

/// What shunt takes a device for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It leads out of the node.
    Node,
    /// It leads to a pod on this node.
    Pod,
    /// It leads from one process of this node to another.
    Loopback,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Node => "node",
            Self::Pod => "pod",
            Self::Loopback => "loopback",
        })
    }
}

/// The XDP program on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpState {
    /// Its id.
    pub program: u32,
    /// It runs in the stack, not in the driver.
    pub generic: bool,
}

/// What stands in front of a device's IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkHeader {
    /// An Ethernet header.
    #[default]
    Ethernet,
    /// Nothing: TUN, WireGuard, IPIP, PPP.
    None,
    /// Something that programs do not read, by its number in linux/if_arp.h.
    Other(u16),
}

impl LinkHeader {
    fn of(kind: LinkLayerType) -> Self {
        match kind {
            LinkLayerType::Ether | LinkLayerType::Loopback => Self::Ethernet,
            LinkLayerType::None
            | LinkLayerType::Ppp
            | LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit
            | LinkLayerType::Ipgre
            | LinkLayerType::Ip6gre
            | LinkLayerType::Rawip => Self::None,
            other => Self::Other(other.into()),
        }
    }
}

/// A network device of this namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// `veth`, `bridge`, …; `None` for the device of a driver.
    pub kind: Option<String>,
    /// It is the loopback device.
    pub loopback: bool,
    /// What stands in front of its IP packets.
    pub header: LinkHeader,
    /// Index of the bridge, bond or VRF that it belongs to.
    pub master: Option<u32>,
    /// Index of the device below it, in this namespace, or of its other end.
    pub lower: Option<u32>,
    /// Its other end, or the device below it, is in another network namespace.
    pub peer_elsewhere: bool,
    /// The XDP program on it.
    pub xdp: Option<XdpState>,
    /// It has a default route of either family.
    pub default_route: bool,
    /// It has an address in a network of more than two addresses, link-local ones aside.
    pub on_network: bool,
    /// Routes to single addresses lead to it directly.
    pub host_routes: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl Device {
    /// Whether packets through it come in from the network, whatever its kind says.
    fn leads_out(&self, node_ips: &BTreeSet<IpAddr>) -> bool {
        self.default_route || self.on_network || self.addresses.iter().any(|a| node_ips.contains(a))
    }

    fn is(&self, kinds: &[&str]) -> bool {
        self.kind
            .as_deref()
            .is_some_and(|kind| kinds.contains(&kind))
    }
}

/// A device that gets no programs, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Its name.
    pub name: String,
    /// Why nothing is missed there.
    pub reason: Cow<'static, str>,
}

/// A name, or several with `*` for any characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(String);

impl Glob {
    /// From a value of `--devices`.
    pub fn new(pattern: &str) -> Self {
        Self(pattern.to_owned())
    }

    /// Whether `name` is meant.
    pub fn matches(&self, name: &str) -> bool {
        glob(self.0.as_bytes(), name.as_bytes())
    }
}

fn glob(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|skip| glob(rest, &name[skip..])),
        Some((c, rest)) => name
            .split_first()
            .is_some_and(|(n, name)| c == n && glob(rest, name)),
    }
}

/// Which devices to take.
#[derive(Clone, Debug, Default)]
pub struct DevicePatterns {
    /// `--devices`; empty: every device where packets may pass, but for pod devices.
    pub devices: Vec<Glob>,
    /// `--pod-devices`; empty: found as the module says.
    pub pod_devices: Vec<Glob>,
    /// The Node's addresses.
    pub node_ips: BTreeSet<IpAddr>,
}

impl DevicePatterns {
    /// Devices that get programs, each with its role, and those that get none.
    pub fn select(&self, devices: Vec<Device>) -> (Vec<(Device, Role)>, Vec<LeftOut>) {
        let judged: Vec<Result<Role, Cow<'static, str>>> = devices
            .iter()
            .map(|device| self.role_of(device, &devices))
            .collect();
        let (mut taken, mut left_out) = (Vec::new(), Vec::new());
        for (device, judged) in devices.into_iter().zip(judged) {
            match judged {
                Ok(role) => taken.push((device, role)),
                Err(reason) => left_out.push(LeftOut {
                    name: device.name,
                    reason,
                }),
            }
        }
        (taken, left_out)
    }

    /// What a device is taken for, or why it is not.
    fn role_of(&self, device: &Device, all: &[Device]) -> Result<Role, Cow<'static, str>> {
        let named = |globs: &[Glob]| globs.iter().any(|g| g.matches(&device.name));
        if device.loopback {
            return Ok(Role::Loopback);
        }
        if let LinkHeader::Other(number) = device.header {
            return Err(
                format!("its link layer (type {number} of linux/if_arp.h) is not known").into(),
            );
        }
        if !self.devices.is_empty() && named(&self.devices) {
            return Ok(Role::Node);
        }
        if self.is_pod(device) {
            return Ok(Role::Pod);
        }
        if !self.devices.is_empty() {
            return Err("--devices does not name it".into());
        }
        let of = |index: Option<u32>| {
            index.and_then(|index| all.iter().find(|other| other.index == index))
        };
        if device.is(&["bridge"]) {
            return Err("its ports have programs".into());
        }
        if device.is(&["vrf"]) {
            return Err("its devices have programs".into());
        }
        if device.is(&["dummy", "ifb", "nlmon"]) {
            return Err("no packet of a client or backend comes or goes there".into());
        }
        match of(device.master) {
            Some(master) if master.is(&["bond", "team"]) => {
                return Err(format!("{} has programs", master.name).into());
            }
            Some(master) if master.is(&["openvswitch"]) => {
                return Err("a port of Open vSwitch, whose internal ports have programs".into());
            }
            _ => {}
        }
        match of(device.lower) {
            // Programs see the frames of the VLANs above their device, with the tag aside.
            Some(parent) if device.is(&["vlan"]) => {
                Err(format!("{} has programs", parent.name).into())
            }
            _ => Ok(Role::Node),
        }
    }

    fn is_pod(&self, device: &Device) -> bool {
        if !self.pod_devices.is_empty() {
            return self.pod_devices.iter().any(|g| g.matches(&device.name));
        }
        if device.leads_out(&self.node_ips) {
            return false;
        }
        match device.kind.as_deref() {
            Some("bridge") => false,
            Some("veth" | "netkit") if device.peer_elsewhere => true,
            Some("tun")
                if device.header == LinkHeader::None
                    && device.addresses.iter().all(is_link_local)
                    && device.host_routes =>
            {
                true
            }
            _ => POD_NAMES
                .iter()
                .any(|&p| Glob::new(p).matches(&device.name)),
        }
    }

    /// Patterns that match none of `devices`, with their settings.
    pub(super) fn unmatched(&self, devices: &[Device]) -> BTreeSet<(&'static str, String)> {
        [
            ("--devices", &self.devices),
            ("--pod-devices", &self.pod_devices),
        ]
        .into_iter()
        .flat_map(|(setting, globs)| globs.iter().map(move |glob| (setting, glob)))
        .filter(|(_, glob)| !devices.iter().any(|device| glob.matches(&device.name)))
        .map(|(setting, glob)| (setting, glob.0.clone()))
        .collect()
    }
}

pub(crate) fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// All devices of the calling thread's namespace.
///
/// # Errors
/// When rtnetlink does not answer.
pub fn list() -> io::Result<Vec<Device>> {
    let mut devices: BTreeMap<u32, Device> =
        rtnl::dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some((link.header.index, device_of(link)?)),
                _ => None,
            })
            .collect();
    for message in rtnl::dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        if let RouteNetlinkMessage::NewAddress(message) = message
            && let Some(address) = netns::address_of(&message)
            && let Some(device) = devices.get_mut(&message.header.index)
        {
            let widest = if address.is_ipv4() { 31 } else { 127 };
            device.on_network |= message.header.prefix_len < widest && !is_link_local(&address);
            device.addresses.push(address);
        }
    }
    for message in rtnl::dump(RouteNetlinkMessage::GetRoute(RouteMessage::default()))? {
        if let RouteNetlinkMessage::NewRoute(route) = message {
            for index in default_route_devices(&route) {
                if let Some(device) = devices.get_mut(&index) {
                    device.default_route = true;
                }
            }
            if let Some(device) =
                host_route_device(&route).and_then(|index| devices.get_mut(&index))
            {
                device.host_routes = true;
            }
        }
    }
    Ok(devices.into_values().collect())
}

fn device_of(link: LinkMessage) -> Option<Device> {
    let mut device = Device {
        index: link.header.index,
        loopback: link.header.flags.contains(LinkFlags::Loopback),
        header: LinkHeader::of(link.header.link_layer_type),
        ..Device::default()
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::LinkNetNsId(_) => device.peer_elsewhere = true,
            LinkAttribute::Controller(index) => device.master = Some(index),
            LinkAttribute::Link(index) => device.lower = Some(index),
            LinkAttribute::LinkInfo(infos) => {
                device.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(InfoKind::Other(kind)) => Some(kind),
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            LinkAttribute::Xdp(xdp) => {
                let generic = xdp
                    .iter()
                    .any(|x| matches!(x, LinkXdp::Attached(XdpAttached::SocketBuffer)));
                device.xdp = xdp.iter().find_map(|x| match x {
                    LinkXdp::ProgId(program) => Some(XdpState {
                        program: *program,
                        generic,
                    }),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    if device.peer_elsewhere {
        // The number is of another namespace.
        device.lower = None;
    }
    (!device.name.is_empty()).then_some(device)
}

/// The device that a route to one address leads to, without a next hop in between.
pub(super) fn host_route_device(route: &RouteMessage) -> Option<u32> {
    let whole = match route.header.address_family {
        AddressFamily::Inet => 32,
        AddressFamily::Inet6 => 128,
        _ => return None,
    };
    if route.header.destination_prefix_length != whole || route.header.kind != RouteType::Unicast {
        return None;
    }
    let mut device = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => return None,
            RouteAttribute::Oif(index) => device = Some(*index),
            _ => {}
        }
    }
    device
}

pub(super) fn is_default(route: &RouteMessage) -> bool {
    let table = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    route.header.destination_prefix_length == 0
        && route.header.kind == RouteType::Unicast
        && table.unwrap_or_else(|| u32::from(route.header.table))
            == u32::from(RouteHeader::RT_TABLE_MAIN)
}

fn default_route_devices(route: &RouteMessage) -> Vec<u32> {
    if !is_default(route) {
        return Vec::new();
    }
    route
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => vec![*index],
            RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
            _ => Vec::new(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, kind: Option<&str>) -> Device {
        Device {
            index: 2,
            name: name.to_owned(),
            kind: kind.map(str::to_owned),
            ..Device::default()
        }
    }

    #[test]
    fn globs() {
        for (pattern, name, matches) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth*", "eth", true),
            ("*", "", true),
            ("e*0*x", "eth0.1x", true),
            ("e*0*x", "eth1x", false),
        ] {
            assert_eq!(
                Glob::new(pattern).matches(name),
                matches,
                "{pattern} {name}"
            );
        }
    }

    fn roles(
        patterns: &DevicePatterns,
        devices: &[&Device],
    ) -> Vec<(String, Result<Role, String>)> {
        let devices: Vec<Device> = (1..)
            .zip(devices)
            .map(|(index, &device)| Device {
                index,
                ..device.clone()
            })
            .collect();
        devices
            .iter()
            .map(|device| {
                let judged = patterns.role_of(device, &devices);
                (device.name.clone(), judged.map_err(Cow::into_owned))
            })
            .collect()
    }

    fn expect(patterns: &DevicePatterns, expected: &[(&Device, Result<Role, &str>)]) {
        let devices: Vec<&Device> = expected.iter().map(|(device, _)| *device).collect();
        for ((name, got), (_, wanted)) in roles(patterns, &devices).into_iter().zip(expected) {
            match (&got, wanted) {
                (Err(reason), Err(part)) => assert!(reason.contains(part), "{name}: {reason}"),
                _ => assert_eq!(got, wanted.map_err(str::to_owned), "{name}"),
            }
        }
    }

    #[test]
    fn roles_without_patterns() {
        let patterns = DevicePatterns {
            node_ips: ["192.0.2.1".parse().unwrap()].into(),
            ..DevicePatterns::default()
        };
        let nic = Device {
            default_route: true,
            ..device("eth0", None)
        };
        let second = Device {
            addresses: vec!["192.0.2.1".parse().unwrap()],
            ..device("eth1", None)
        };
        let pod = Device {
            peer_elsewhere: true,
            ..device("veth12ab", Some("veth"))
        };
        // The node itself may be a container: its own ways out are ends of pairs too.
        let nested = Device {
            default_route: true,
            ..pod.clone()
        };
        let second_nested = Device {
            on_network: true,
            ..pod.clone()
        };
        let loopback = Device {
            loopback: true,
            default_route: true,
            ..device("lo", None)
        };
        let vpn = Device {
            header: LinkHeader::None,
            addresses: vec!["10.8.0.1".parse().unwrap()],
            host_routes: true,
            ..device("tun0", Some("tun"))
        };
        let pod_tun = Device {
            addresses: vec!["fe80::1".parse().unwrap()],
            ..vpn.clone()
        };
        let wireguard = Device {
            header: LinkHeader::None,
            host_routes: true,
            ..device("wg0", Some("wireguard"))
        };
        let can = Device {
            header: LinkHeader::Other(280),
            ..device("can0", None)
        };
        expect(
            &patterns,
            &[
                (&nic, Ok(Role::Node)),
                (&second, Ok(Role::Node)),
                (&device("eth2", None), Ok(Role::Node)),
                (&pod, Ok(Role::Pod)),
                (&nested, Ok(Role::Node)),
                (&second_nested, Ok(Role::Node)),
                (&device("veth0", Some("veth")), Ok(Role::Node)),
                (&device("cni0", Some("bridge")), Err("its ports")),
                (&device("kube-ipvs0", Some("dummy")), Err("no packet")),
                (&device("flannel.1", Some("vxlan")), Ok(Role::Node)),
                (&device("tap3f", Some("tun")), Ok(Role::Pod)),
                (&vpn, Ok(Role::Node)),
                (&pod_tun, Ok(Role::Pod)),
                (&wireguard, Ok(Role::Node)),
                (&can, Err("type 280")),
                (&loopback, Ok(Role::Loopback)),
            ],
        );
    }

    #[test]
    fn devices_that_share_packets_are_handled_once() {
        let on = |name: &str, kind: Option<&str>, master: Option<u32>, lower: Option<u32>| Device {
            master,
            lower,
            ..device(name, kind)
        };
        // Indices are those of the list, from 1 on.
        expect(
            &DevicePatterns::default(),
            &[
                (&on("bond0", Some("bond"), None, None), Ok(Role::Node)),
                (&on("eth0", None, Some(1), None), Err("bond0")),
                (&on("eth1", None, Some(1), None), Err("bond0")),
                (&on("bond0.7", Some("vlan"), None, Some(1)), Err("bond0")),
                (&on("br0", Some("bridge"), None, None), Err("its ports")),
                (&on("eth2", None, Some(5), None), Ok(Role::Node)),
                (&on("blue", Some("vrf"), None, None), Err("its devices")),
                (&on("eth3", None, Some(7), None), Ok(Role::Node)),
                (
                    &on("ovs-system", Some("openvswitch"), None, None),
                    Ok(Role::Node),
                ),
                (&on("eth4", None, Some(9), None), Err("Open vSwitch")),
                // Its parent is in another namespace: nobody else sees its packets.
                (&on("eth5", Some("vlan"), None, None), Ok(Role::Node)),
                (&on("mac0", Some("macvlan"), None, Some(6)), Ok(Role::Node)),
            ],
        );
    }

    #[test]
    fn patterns_replace_the_search() {
        let patterns = DevicePatterns {
            devices: vec![Glob::new("eth*"), Glob::new("wan7")],
            pod_devices: vec![Glob::new("p-*")],
            ..DevicePatterns::default()
        };
        let nic = device("eth5", None);
        let wan = Device {
            default_route: true,
            ..device("wan", None)
        };
        let veth = Device {
            peer_elsewhere: true,
            ..device("veth1", Some("veth"))
        };
        expect(
            &patterns,
            &[
                (&nic, Ok(Role::Node)),
                (&device("p-1", Some("veth")), Ok(Role::Pod)),
                (&wan, Err("--devices")),
                (&veth, Err("--devices")),
            ],
        );
        assert_eq!(
            patterns.unmatched(&[nic]),
            [
                ("--devices", "wan7".to_owned()),
                ("--pod-devices", "p-*".to_owned())
            ]
            .into()
        );
    }
}
