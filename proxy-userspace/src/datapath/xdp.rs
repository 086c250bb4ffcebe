//! Where XDP may do the work: what the kernel says of a device, and of what stands in the way that
//! XDP leaves out.
//!
//! XDP sends packets for other nodes on by itself, out of the device that they came in by. A device
//! that takes no frames from XDP (`NETDEV_XDP_ACT_NDO_XMIT`) would lose them all without a word, so
//! it gets none. And what XDP sends on passes no FORWARD chain: where one has rules, only `--xdp
//! native` passes it by.

use std::{collections::BTreeMap, fs, io, os::fd::OwnedFd};

use clap::ValueEnum;
use rustix::net::{AddressFamily, SocketType, socket};
use serde::{Deserialize, Serialize};

use super::{
    devices::{Device, LinkHeader},
    netlink::{Attributes, Generic, dump_netfilter, text_attribute, u16_at, u32_at},
};

/// `NETDEV_XDP_ACT_NDO_XMIT` of linux/netdev.h: the device sends frames that XDP redirects to it.
const NDO_XMIT: u64 = 1 << 2;
/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY` and attributes of linux/genetlink.h.
const CTRL: u16 = 16;
const CTRL_GET_FAMILY: u8 = 3;
const CTRL_FAMILY_ID: u16 = 1;
const CTRL_FAMILY_NAME: u16 = 2;
const CTRL_MCAST_GROUPS: u16 = 7;
const CTRL_GROUP_NAME: u16 = 1;
const CTRL_GROUP_ID: u16 = 2;
/// `NETDEV_CMD_DEV_GET`, `NETDEV_A_DEV_IFINDEX`, `NETDEV_A_DEV_XDP_FEATURES` of linux/netdev.h.
const DEV_GET: u8 = 1;
const DEV_IFINDEX: u16 = 1;
const DEV_XDP_FEATURES: u16 = 3;

/// `--xdp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// No XDP; tc does the work.
    Off,
    /// In the stack, after the skb is made: slower than tc, for tests.
    Generic,
    /// In the driver of every node device, veths included.
    Native,
    /// In the driver where it has XDP, and never on a veth: XDP there costs bulk throughput.
    Auto,
}

/// What [`refusal`] looks at, read once for all devices.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// XDP features by device index; `None` where the kernel does not tell them (before 6.3).
    pub features: Option<BTreeMap<u32, u64>>,
    /// The FORWARD chain that has rules, if there is one.
    pub forward: Option<String>,
}

impl Facts {
    /// Reads them, as far as the mode needs them.
    pub fn read(mode: XdpMode) -> Self {
        match mode {
            XdpMode::Off | XdpMode::Generic => Self::default(),
            XdpMode::Native => Self {
                features: features().ok(),
                forward: None,
            },
            XdpMode::Auto => Self {
                features: features().ok(),
                forward: forward_rules(),
            },
        }
    }
}

impl Facts {
    /// Whether the kernel says that a device takes frames from XDP.
    pub(crate) fn takes_frames(&self, device: &Device) -> bool {
        self.features
            .as_ref()
            .and_then(|features| features.get(&device.index))
            .is_some_and(|bits| bits & NDO_XMIT != 0)
    }
}

/// Why a node device gets no XDP program; `None` when it gets one.
pub fn refusal(mode: XdpMode, device: &Device, facts: &Facts) -> Option<String> {
    if mode == XdpMode::Off {
        return Some("--xdp off".to_owned());
    }
    if device.header != LinkHeader::Ethernet {
        return Some("its packets have no Ethernet header".to_owned());
    }
    if mode == XdpMode::Generic {
        return None;
    }
    // Many drivers take frames once they have a program, so theirs are looked at again then; a
    // pair's depends on its other end.
    let refuses = device.kind.as_deref() == Some("veth")
        && facts.features.is_some()
        && !facts.takes_frames(device);
    if mode == XdpMode::Native {
        // Before 6.3 it is the user who knows.
        return refuses.then(|| takes_no_frames(device));
    }
    // Devices without a kind are those of a driver; a bond hands packets of XDP to its own.
    if let Some(kind) = device.kind.as_deref().filter(|&kind| kind != "bond") {
        return Some(format!("--xdp auto leaves devices of kind {kind} to tc"));
    }
    if facts.features.is_none() {
        return Some(
            "this kernel does not tell whether it takes frames from XDP (6.3 does); --xdp native does not ask".into(),
        );
    }
    facts.forward.as_ref().map(|chain| passes_by(chain))
}

fn passes_by(chain: &str) -> String {
    format!("XDP would pass by netfilter's {chain}, which has rules; --xdp native does")
}

/// What is said of a device that the kernel sends no frames of XDP through.
pub fn takes_no_frames(device: &Device) -> String {
    let hint = if device.kind.as_deref() == Some("veth") {
        " (GRO on its other end turns it on)"
    } else {
        ""
    };
    format!("the kernel says that it takes no frames from XDP{hint}")
}

/// The id of the family `netdev`, and of its multicast group for changes.
fn family(socket: &Generic) -> io::Result<(u16, Option<u32>)> {
    let answers = socket.command(
        CTRL,
        CTRL_GET_FAMILY,
        false,
        &text_attribute(CTRL_FAMILY_NAME, "netdev"),
    )?;
    let unreadable = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "generic netlink: an unreadable answer",
        )
    };
    let attributes = answers.first().ok_or_else(unreadable)?.attributes();
    let id = attributes
        .get(CTRL_FAMILY_ID)
        .and_then(|value| u16_at(value, 0))
        .ok_or_else(unreadable)?;
    let group = attributes.get(CTRL_MCAST_GROUPS).and_then(|groups| {
        Attributes::nested(groups)
            .map(|(_, group)| Attributes::nested(group))
            .find(|group| group.text(CTRL_GROUP_NAME).as_deref() == Some("mgmt"))
            .and_then(|group| u32_at(group.get(CTRL_GROUP_ID)?, 0))
    });
    Ok((id, group))
}

/// XDP features (`enum netdev_xdp_act`) of all devices of the calling thread's namespace.
///
/// # Errors
/// The kernel's: `ENOENT` where it does not know the family (before 6.3).
pub fn features() -> io::Result<BTreeMap<u32, u64>> {
    let socket = Generic::open()?;
    let (id, _) = family(&socket)?;
    let devices = socket.command(id, DEV_GET, true, &[])?;
    Ok(devices
        .iter()
        .filter_map(|device| {
            let index = u32_at(device.attributes().get(DEV_IFINDEX)?, 0)?;
            let bits = device.attributes().get(DEV_XDP_FEATURES)?;
            Some((index, u64::from_ne_bytes(bits.try_into().ok()?)))
        })
        .collect())
}

/// A socket that becomes readable when the features of a device change; `None` where the kernel
/// does not tell.
pub(crate) fn changes() -> Option<OwnedFd> {
    const SOL_NETLINK: libc::c_int = 270;
    const NETLINK_ADD_MEMBERSHIP: libc::c_int = 1;
    let socket = Generic::open().ok()?;
    let (_, group) = family(&socket).ok()?;
    let (group, socket) = (group?, socket.into_inner());
    // SAFETY: the option takes a number, which outlives the call, and its size.
    let joined = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            SOL_NETLINK,
            NETLINK_ADD_MEMBERSHIP,
            (&raw const group).cast(),
            size_of_val(&group) as libc::socklen_t,
        )
    };
    (joined == 0 && rustix::io::ioctl_fionbio(&socket, true).is_ok()).then_some(socket)
}

/// A chain at netfilter's FORWARD hook that has rules, or drops by default; `None` also where
/// netfilter does not answer.
pub fn forward_rules() -> Option<String> {
    nftables_forward().ok().flatten().or_else(iptables_forward)
}

/// `NFNL_SUBSYS_NFTABLES` << 8 | `NFT_MSG_GETCHAIN`.
const GET_CHAIN: u16 = (10 << 8) | 4;
/// Attributes of linux/netfilter/nf_tables.h.
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_USE: u16 = 6;
const HOOK_NUMBER: u16 = 1;
/// `NF_INET_FORWARD`.
const FORWARD: u32 = 2;
/// `NF_DROP`.
const DROP: u32 = 0;

fn nftables_forward() -> io::Result<Option<String>> {
    Ok(dump_netfilter(GET_CHAIN)?.iter().find_map(|chain| {
        // NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6.
        let family = match chain.first() {
            1 => "inet",
            2 => "ip",
            10 => "ip6",
            _ => return None,
        };
        let attributes = chain.attributes();
        let hook = Attributes::nested(attributes.get(CHAIN_HOOK)?);
        let acts = attributes.be32(CHAIN_USE).unwrap_or(0) > 0
            || attributes.be32(CHAIN_POLICY) == Some(DROP);
        (hook.be32(HOOK_NUMBER) == Some(FORWARD) && acts).then(|| {
            format!(
                "chain {} of table {family} {} (nftables)",
                attributes.text(CHAIN_NAME).unwrap_or_default(),
                attributes.text(CHAIN_TABLE).unwrap_or_default()
            )
        })
    }))
}

/// The same of the older `iptables`, whose tables are made by their first look: only those that are
/// there are looked at.
fn iptables_forward() -> Option<String> {
    /// `SO_GET_INFO` of linux/netfilter_ipv4/ip_tables.h and linux/netfilter_ipv6/ip6_tables.h.
    const GET_INFO: libc::c_int = 64;
    /// `struct ipt_getinfo`.
    #[repr(C)]
    struct Info {
        name: [u8; 32],
        valid_hooks: u32,
        hook_entry: [u32; 5],
        underflow: [u32; 5],
        num_entries: u32,
        size: u32,
    }
    let families = [
        (
            "ip_tables_names",
            AddressFamily::INET,
            libc::IPPROTO_IP,
            "iptables",
        ),
        (
            "ip6_tables_names",
            AddressFamily::INET6,
            libc::IPPROTO_IPV6,
            "ip6tables",
        ),
    ];
    for (file, family, level, tool) in families {
        let tables =
            fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        for table in tables
            .lines()
            .filter(|&table| matches!(table, "filter" | "mangle"))
        {
            let Ok(socket) = socket(family, SocketType::RAW, Some(rustix::net::ipproto::RAW))
            else {
                continue;
            };
            // SAFETY: all zeros are a value of every field.
            let mut info: Info = unsafe { std::mem::zeroed() };
            info.name[..table.len()].copy_from_slice(table.as_bytes());
            let mut length = size_of::<Info>() as libc::socklen_t;
            // SAFETY: the kernel reads the name and writes at most `length` bytes.
            let read = unsafe {
                libc::getsockopt(
                    std::os::fd::AsRawFd::as_raw_fd(&socket),
                    level,
                    GET_INFO,
                    (&raw mut info).cast(),
                    &raw mut length,
                )
            };
            let forward = FORWARD as usize;
            if read == 0
                && info.valid_hooks & (1 << FORWARD) != 0
                && info.hook_entry[forward] != info.underflow[forward]
            {
                return Some(format!("chain FORWARD of table {table} ({tool})"));
            }
        }
    }
    None
}
