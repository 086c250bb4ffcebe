//! Which network devices get programs, followed as they appear, vanish and are renamed.
//!
//! *Node devices* lead out of the node, *pod devices* lead to the pods on it. Without patterns, a node device is one that
//! has the default route or carries an address of the Node, and a pod device is one end of a pair whose other end is in
//! another network namespace, or bears a name that CNI plugins give (`cali*`, `lxc*`, `cni*`, `tap*`). Bridges are no
//! pod devices, their ports are; the loopback device is never any.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::IpAddr,
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp, XdpAttached},
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
};
use rtnetlink::{MulticastGroup, new_multicast_connection, packet_core::NetlinkPayload};
use serde::Serialize;
use tokio::{sync::watch, task::JoinHandle, time::MissedTickBehavior};
use tracing::{debug, info, warn};

use super::{
    attach::{AttachError, Attacher, DeviceStatus},
    netns, rtnl,
};

/// Devices are read again this often even when the kernel reports no change.
const RESYNC: Duration = Duration::from_secs(30);
/// Least time between two passes, so that a node that starts a hundred pods at once does not read all links each time.
const PASS_GAP: Duration = Duration::from_millis(20);
/// Names of pod devices that are not pairs into another namespace (VMs' taps) or whose other end cannot be seen.
const POD_NAMES: [&str; 4] = ["cali*", "lxc*", "cni*", "tap*"];

/// What shunt takes a device for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It leads out of the node.
    Node,
    /// It leads to a pod on this node.
    Pod,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Node => "node",
            Self::Pod => "pod",
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
    /// Its other end is in another network namespace.
    pub peer_elsewhere: bool,
    /// The XDP program on it.
    pub xdp: Option<XdpState>,
    /// It has a default route of either family.
    pub default_route: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
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
        Some((c, rest)) => name.split_first().is_some_and(|(n, name)| c == n && glob(rest, name)),
    }
}

/// Which devices to take.
#[derive(Clone, Debug, Default)]
pub struct DevicePatterns {
    /// `--devices`; empty: those with the default route or a node address.
    pub devices: Vec<Glob>,
    /// `--pod-devices`; empty: found as the module says.
    pub pod_devices: Vec<Glob>,
    /// The Node's addresses.
    pub node_ips: BTreeSet<IpAddr>,
}

impl DevicePatterns {
    /// What a device is, if it is any of shunt's business. A device that is both leads out of the node.
    pub fn role(&self, device: &Device) -> Option<Role> {
        let named = |globs: &[Glob]| globs.iter().any(|g| g.matches(&device.name));
        if device.loopback {
            return None;
        }
        let node = if self.devices.is_empty() {
            device.default_route || device.addresses.iter().any(|a| self.node_ips.contains(a))
        } else {
            named(&self.devices)
        };
        if node {
            return Some(Role::Node);
        }
        let pod = if self.pod_devices.is_empty() {
            match device.kind.as_deref() {
                Some("bridge") => false,
                Some("veth" | "netkit") if device.peer_elsewhere => true,
                _ => POD_NAMES.iter().any(|&p| Glob::new(p).matches(&device.name)),
            }
        } else {
            named(&self.pod_devices)
        };
        pod.then_some(Role::Pod)
    }
}

/// All devices of the calling thread's namespace.
///
/// # Errors
/// When rtnetlink does not answer.
pub fn list() -> io::Result<Vec<Device>> {
    let mut devices: BTreeMap<u32, Device> = rtnl::dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some((link.header.index, device_of(link)?)),
            _ => None,
        })
        .collect();
    for (index, address) in netns::addresses()? {
        if let Some(device) = devices.get_mut(&index) {
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
        }
    }
    Ok(devices.into_values().collect())
}

fn device_of(link: LinkMessage) -> Option<Device> {
    let mut device = Device {
        index: link.header.index,
        loopback: link.header.flags.contains(LinkFlags::Loopback),
        ..Device::default()
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::LinkNetNsId(_) => device.peer_elsewhere = true,
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
    (!device.name.is_empty()).then_some(device)
}

fn is_default(route: &RouteMessage) -> bool {
    let table = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    route.header.destination_prefix_length == 0
        && route.header.kind == RouteType::Unicast
        && table.unwrap_or_else(|| u32::from(route.header.table)) == u32::from(RouteHeader::RT_TABLE_MAIN)
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

/// Keeps the programs on the devices while they come and go.
#[derive(Debug)]
pub struct DeviceWatcher {
    /// The devices with programs, after each pass.
    pub status: watch::Receiver<Vec<DeviceStatus>>,
    /// Ends when it is aborted; the programs stay attached.
    pub task: JoinHandle<()>,
}

impl DeviceWatcher {
    /// Attaches programs to all devices that are there now, then follows changes in a task.
    ///
    /// Works on the network namespace of the calling thread, which all threads of the runtime must share.
    ///
    /// # Errors
    /// When the first pass cannot read devices or pins; what goes wrong on one device is in its status and the log.
    pub fn spawn(mut attacher: Attacher, patterns: DevicePatterns) -> Result<Self, WatchError> {
        // Subscribed before the first pass, so that no device falls between.
        let (connection, _handle, mut messages) = new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])?;
        let first = pass(&mut attacher, &patterns)?;
        if !first.iter().any(|d| d.role == Role::Node) {
            warn!(
                "no node device (no default route, no device with a node address): traffic from outside is not translated until one appears; name one with --devices"
            );
        }
        let (sender, status) = watch::channel(first);
        let task = tokio::spawn(async move {
            let mut connection = std::pin::pin!(connection.fuse());
            let mut resync = tokio::time::interval_at(tokio::time::Instant::now() + RESYNC, RESYNC);
            resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut connected = true;
            loop {
                let changed = tokio::select! {
                    () = &mut connection, if connected => {
                        warn!("the subscription to device changes ended; polling every {RESYNC:?}");
                        connected = false;
                        true
                    }
                    message = messages.next(), if connected => match message {
                        Some((message, _)) => concerns(&message.payload),
                        None => {
                            connected = false;
                            true
                        }
                    },
                    _ = resync.tick() => true,
                };
                if !changed {
                    continue;
                }
                // Whatever else came at the same time is in the same pass.
                while let Some(Some(_)) = messages.next().now_or_never() {}
                match pass(&mut attacher, &patterns) {
                    Ok(now) => {
                        sender.send_if_modified(|old| {
                            let changed = *old != now;
                            if changed {
                                say(old, &now);
                                *old = now;
                            }
                            changed
                        });
                    }
                    Err(error) => warn!("devices: {error}; trying again within {RESYNC:?}"),
                }
                tokio::time::sleep(PASS_GAP).await;
            }
        });
        Ok(Self { status, task })
    }
}

/// Why a pass over the devices failed.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The kernel does not list devices.
    #[error("rtnetlink: {0}")]
    Netlink(#[from] io::Error),
    /// Pins do not work.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

fn pass(attacher: &mut Attacher, patterns: &DevicePatterns) -> Result<Vec<DeviceStatus>, WatchError> {
    let devices: Vec<(Device, Role)> = list()?
        .into_iter()
        .filter_map(|device| patterns.role(&device).map(|role| (device, role)))
        .collect();
    Ok(attacher.reconcile(&devices)?)
}

fn concerns(payload: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
    match payload {
        // Routes come and go by the thousand where BGP runs; the default route alone makes a node device.
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(r) | RouteNetlinkMessage::DelRoute(r)) => {
            is_default(r)
        }
        // NetlinkPayload::Overrun (ENOBUFS) is here too: messages were lost.
        _ => true,
    }
}

fn say(old: &[DeviceStatus], now: &[DeviceStatus]) {
    for device in now {
        match old.iter().find(|o| o.index == device.index) {
            None => info!(
                device = device.name,
                "{} device: {}",
                device.role,
                device.programs.join(", ")
            ),
            Some(before) if before.name != device.name => info!(device = device.name, "was {}", before.name),
            Some(before) if before != device => {
                debug!(
                    device = device.name,
                    "{} device: {}",
                    device.role,
                    device.programs.join(", ")
                );
            }
            Some(_) => {}
        }
    }
    for device in old.iter().filter(|o| !now.iter().any(|n| n.index == o.index)) {
        info!(device = device.name, "gone");
    }
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
            assert_eq!(Glob::new(pattern).matches(name), matches, "{pattern} {name}");
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
        // The node itself may be a container: its own way out is one end of a pair too.
        let nested = Device {
            default_route: true,
            ..pod.clone()
        };
        let loopback = Device {
            loopback: true,
            default_route: true,
            ..device("lo", None)
        };
        for (device, role) in [
            (&nic, Some(Role::Node)),
            (&second, Some(Role::Node)),
            (&device("eth2", None), None),
            (&pod, Some(Role::Pod)),
            (&nested, Some(Role::Node)),
            (&device("veth0", Some("veth")), None),
            (&device("cni0", Some("bridge")), None),
            (&device("tap3f", Some("tun")), Some(Role::Pod)),
            (&loopback, None),
        ] {
            assert_eq!(patterns.role(device), role, "{}", device.name);
        }
    }

    #[test]
    fn patterns_replace_the_search() {
        let patterns = DevicePatterns {
            devices: vec![Glob::new("eth*")],
            pod_devices: vec![Glob::new("p-*")],
            ..DevicePatterns::default()
        };
        assert_eq!(patterns.role(&device("eth5", None)), Some(Role::Node));
        assert_eq!(patterns.role(&device("p-1", Some("veth"))), Some(Role::Pod));
        assert_eq!(
            patterns.role(&Device {
                default_route: true,
                ..device("wan", None)
            }),
            None
        );
        assert_eq!(
            patterns.role(&Device {
                peer_elsewhere: true,
                ..device("veth1", Some("veth"))
            }),
            None
        );
    }
}
