//! This node's network namespace: its addresses, as they come and go, and its cookie.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    str::FromStr,
    time::Duration,
};

use futures::StreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use tokio::{sync::watch, task::JoinHandle, time::MissedTickBehavior};
use tracing::{debug, warn};

use super::rtnl;

/// Addresses are read again this often even when the kernel reports no change.
const RESYNC: Duration = Duration::from_secs(60);

/// `--nodeport-addresses`: on which of the node's addresses node ports answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// On all but loopback and link-local ones, like kube-proxy's default in iptables mode.
    #[default]
    All,
    /// On the Node object's addresses alone (`primary`).
    Primary(BTreeSet<IpAddr>),
    /// On those within any of these networks.
    Within(Vec<IpNet>),
}

impl NodePortAddresses {
    /// From the values of `--nodeport-addresses`: none, `primary` alone, or networks.
    ///
    /// # Errors
    /// One line that names the value.
    pub fn parse(values: &[String], node_ips: &[IpAddr]) -> Result<Self, String> {
        match values {
            [] => Ok(Self::All),
            [word] if word == "primary" => Ok(Self::Primary(node_ips.iter().copied().collect())),
            networks => networks
                .iter()
                .map(|text| {
                    IpNet::from_str(text).map_err(|_| {
                        format!("--nodeport-addresses {text}: neither a network (10.0.0.0/8, fd00::/8) nor, alone, `primary`")
                    })
                })
                .collect::<Result<_, _>>()
                .map(Self::Within),
        }
    }

    /// Whether node ports answer on this address of the node. Loopback is not decided here: see `CONFIG_NODEPORT_LOOPBACK`.
    pub fn admits(&self, address: IpAddr) -> bool {
        let special = match address {
            IpAddr::V4(a) => a.is_loopback() || a.is_link_local() || a.is_unspecified(),
            IpAddr::V6(a) => a.is_loopback() || a.is_unicast_link_local() || a.is_unspecified(),
        };
        !special
            && match self {
                Self::All => true,
                Self::Primary(addresses) => addresses.contains(&address),
                Self::Within(networks) => networks.iter().any(|n| n.contains(&address)),
            }
    }
}

/// Every address of the calling thread's namespace, with the index of its device.
///
/// # Errors
/// When rtnetlink does not answer.
pub fn addresses() -> io::Result<Vec<(u32, IpAddr)>> {
    let messages = rtnl::dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    Ok(messages
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(m) => Some((m.header.index, address_of(&m)?)),
            _ => None,
        })
        .collect())
}

fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    // On a point-to-point device IFA_ADDRESS is the peer's and IFA_LOCAL the own one; IPv6 mostly has the former only.
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// Follows the addresses of this namespace that `policy` admits.
///
/// The first set is read before this returns; the task ends when all receivers are gone.
///
/// # Errors
/// When rtnetlink does not answer.
pub fn watch_addresses(policy: NodePortAddresses) -> io::Result<(watch::Receiver<BTreeSet<IpAddr>>, JoinHandle<()>)> {
    let admitted = move || -> io::Result<BTreeSet<IpAddr>> {
        Ok(addresses()?
            .into_iter()
            .map(|(_, address)| address)
            .filter(|&a| policy.admits(a))
            .collect())
    };
    // Subscribed before the first read, so that nothing falls between.
    let (connection, _handle, mut messages) =
        new_multicast_connection(&[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])?;
    let (sender, receiver) = watch::channel(admitted()?);
    let task = tokio::spawn(async move {
        let mut connection = std::pin::pin!(connection);
        let mut resync = tokio::time::interval(RESYNC);
        resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = &mut connection => {
                    warn!("the subscription to address changes ended; polling every {RESYNC:?}");
                    break;
                }
                // An overrun (ENOBUFS) comes as a message as well; every message means: read again.
                message = messages.next() => if message.is_none() { break },
                _ = resync.tick() => {}
                () = sender.closed() => return,
            }
            publish(&sender, &admitted);
        }
        loop {
            tokio::select! {
                _ = resync.tick() => publish(&sender, &admitted),
                () = sender.closed() => return,
            }
        }
    });
    Ok((receiver, task))
}

fn publish(sender: &watch::Sender<BTreeSet<IpAddr>>, read: impl Fn() -> io::Result<BTreeSet<IpAddr>>) {
    match read() {
        Ok(now) => {
            sender.send_if_modified(|old| {
                let changed = *old != now;
                if changed {
                    debug!("node addresses: {now:?}");
                    *old = now;
                }
                changed
            });
        }
        Err(error) => warn!("reading the node's addresses: {error}; keeping those known"),
    }
}

/// The cookie by which BPF programs know this network namespace, or 0 when the kernel does not say (before 5.14): then
/// `127.0.0.1:<nodePort>` is not served.
pub fn cookie() -> u64 {
    // SO_NETNS_COOKIE of asm-generic/socket.h.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let read = || -> io::Result<u64> {
        let socket: OwnedFd =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
        let mut cookie = 0_u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the option is a u64; the kernel writes at most `length` bytes.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                std::ptr::from_mut(&mut cookie).cast(),
                &mut length,
            )
        };
        if result == 0 {
            Ok(cookie)
        } else {
            Err(io::Error::last_os_error())
        }
    };
    read().unwrap_or_else(|error| {
        warn!("SO_NETNS_COOKIE: {error} (kernel 5.14 has it): node ports do not answer on loopback addresses");
        0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(values: &[&str]) -> Vec<String> {
        values.iter().map(|&v| v.to_owned()).collect()
    }

    #[test]
    fn which_addresses_node_ports_answer_on() {
        let a = |text: &str| text.parse::<IpAddr>().unwrap();
        let all = NodePortAddresses::parse(&[], &[]).unwrap();
        for (address, admitted) in [
            ("10.0.0.1", true),
            ("fd00::1", true),
            ("127.0.0.1", false),
            ("fe80::1", false),
            ("169.254.0.1", false),
        ] {
            assert_eq!(all.admits(a(address)), admitted, "{address}");
        }
        let primary = NodePortAddresses::parse(&strings(&["primary"]), &[a("10.0.0.1")]).unwrap();
        assert!(primary.admits(a("10.0.0.1")) && !primary.admits(a("10.0.0.2")));
        let within = NodePortAddresses::parse(&strings(&["10.0.0.0/8", "fd00::/8"]), &[]).unwrap();
        assert!(within.admits(a("10.9.9.9")) && within.admits(a("fd00::5")) && !within.admits(a("192.0.2.1")));
        let error = NodePortAddresses::parse(&strings(&["primary", "10.0.0.0/8"]), &[]).unwrap_err();
        assert!(error.contains("--nodeport-addresses primary"), "{error}");
    }
}
