//! This node's network namespace: its addresses, as they come and go, and its cookie.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
    str::FromStr,
    time::Duration,
};

use futures::StreamExt;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
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

/// `localhost`, IPv4 and IPv6.
const LOOPBACK: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
];
/// `all`.
const EVERYTHING: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0)),
];

/// `--nodeport-addresses`: on which of the node's addresses node ports answer. Each family has a
/// say of its own: networks of IPv4 do not limit IPv6, and the other way round
/// (`pkg/proxy/util/nodeport_addresses.go` of kube-proxy).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePortAddresses {
    v4: Admitted,
    v6: Admitted,
}

/// Addresses of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Admitted {
    /// All but link-local ones.
    #[default]
    All,
    /// Those within any of these networks.
    Within(Vec<IpNet>),
}

impl NodePortAddresses {
    /// From the values of `--nodeport-addresses`: networks and the words `primary` (the best of the
    /// node's own addresses, of each family), `localhost` and `all`. None at all admits everything.
    ///
    /// # Errors
    /// One line that names the value.
    pub fn parse(values: &[String], node_ips: &[IpAddr]) -> Result<Self, String> {
        let mut networks = Vec::new();
        for value in values {
            match value.as_str() {
                "primary" => networks.extend([false, true].into_iter().filter_map(|v6| {
                    let of_family = |ip: &&IpAddr| ip.is_ipv6() == v6 && !ip.is_loopback();
                    node_ips.iter().find(of_family).map(|&ip| IpNet::from(ip))
                })),
                "localhost" => networks.extend(LOOPBACK),
                "all" => networks.extend(EVERYTHING),
                text => networks.push(IpNet::from_str(text).map_err(|_| {
                    format!(
                        "--nodeport-addresses {text}: neither a network (10.0.0.0/8, fd00::/8) nor `primary`, `localhost` or `all`"
                    )
                })?),
            }
        }
        let (v6, v4): (Vec<IpNet>, Vec<IpNet>) = networks
            .into_iter()
            .partition(|network| network.addr().is_ipv6());
        Ok(Self {
            v4: Admitted::from(v4),
            v6: Admitted::from(v6),
        })
    }

    fn of(&self, v6: bool) -> &Admitted {
        if v6 { &self.v6 } else { &self.v4 }
    }

    /// Whether node ports answer on this address of the node. Loopback is not decided here: see
    /// [`Self::admits_loopback`].
    pub fn admits(&self, address: IpAddr) -> bool {
        let special = match address {
            IpAddr::V4(a) => a.is_loopback() || a.is_link_local() || a.is_unspecified(),
            IpAddr::V6(a) => a.is_loopback() || a.is_unicast_link_local() || a.is_unspecified(),
        };
        !special
            && match self.of(address.is_ipv6()) {
                Admitted::All => true,
                Admitted::Within(networks) => {
                    networks.iter().any(|network| network.contains(&address))
                }
            }
    }

    /// Whether node ports answer on loopback addresses of a family, to processes of the node
    /// (`CONFIG_NODEPORT_LOOPBACK*`).
    pub fn admits_loopback(&self, v6: bool) -> bool {
        let loopback = LOOPBACK[usize::from(v6)];
        match self.of(v6) {
            Admitted::All => true,
            Admitted::Within(networks) => networks
                .iter()
                .any(|network| network.contains(&loopback.network()) || loopback.contains(network)),
        }
    }

    /// Whether a server that is told to listen where node ports do answers on this address,
    /// loopback addresses among them.
    pub fn answers(&self, address: IpAddr) -> bool {
        if address.is_loopback() {
            return self.admits_loopback(address.is_ipv6());
        }
        match self.of(address.is_ipv6()) {
            Admitted::All => true,
            Admitted::Within(networks) => networks.iter().any(|network| network.contains(&address)),
        }
    }

    /// Whether some address of a family is left out.
    pub fn restricts(&self, v6: bool) -> bool {
        *self.of(v6) != Admitted::All
    }
}

impl From<Vec<IpNet>> for Admitted {
    fn from(networks: Vec<IpNet>) -> Self {
        match networks.is_empty() || networks.iter().any(|network| network.prefix_len() == 0) {
            true => Self::All,
            false => Self::Within(networks),
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

pub(super) fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    // On a point-to-point device IFA_ADDRESS is the peer's and IFA_LOCAL the own one; IPv6 mostly
    // has the former only.
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
pub fn watch_addresses(
    policy: NodePortAddresses,
) -> io::Result<(watch::Receiver<BTreeSet<IpAddr>>, JoinHandle<()>)> {
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

fn publish(
    sender: &watch::Sender<BTreeSet<IpAddr>>,
    read: impl Fn() -> io::Result<BTreeSet<IpAddr>>,
) {
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

/// The cookie by which BPF programs know this network namespace, or 0 when the kernel does not say
/// (before 5.14): then `127.0.0.1:<nodePort>` is not served.
pub fn cookie() -> u64 {
    // SO_NETNS_COOKIE of asm-generic/socket.h.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let read = || -> io::Result<u64> {
        let socket: OwnedFd = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::DGRAM,
            None,
        )?;
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

    /// F13: each family by itself. Of a node with 10.0.0.1 and fd00::1 as the Node object has them,
    /// and others.
    #[test]
    fn which_addresses_node_ports_answer_on() {
        let node_ips = ["10.0.0.1", "10.0.0.9", "fd00::1"].map(|text| text.parse().unwrap());
        // In this order: the primary address, another, loopback; IPv4, then IPv6.
        let asked = [
            "10.0.0.1",
            "192.0.2.1",
            "127.0.0.1",
            "fd00::1",
            "2001:db8::1",
            "::1",
        ];
        for (values, expected) in [
            (&[][..], "yyy yyy"),
            (&["all"], "yyy yyy"),
            (&["primary"], "y-- y--"),
            (&["localhost"], "--y --y"),
            (&["primary", "localhost"], "y-y y-y"),
            (&["localhost", "all"], "yyy yyy"),
            (&["10.0.0.0/24"], "y-- yyy"),
            (&["192.0.2.0/24", "localhost"], "-yy --y"),
            (&["192.0.2.0/24", "primary"], "yy- y--"),
            (&["0.0.0.0/0"], "yyy yyy"),
            (&["0.0.0.0/0", "fd00::/64"], "yyy y--"),
            (&["fd00::/64"], "yyy y--"),
            (&["::/0"], "yyy yyy"),
            (&["::1/128"], "yyy --y"),
            (&["127.0.0.0/8"], "--y yyy"),
            (&["127.0.0.1/32"], "--y yyy"),
            (&["10.0.0.0/24", "0.0.0.0/0"], "yyy yyy"),
            (&["172.16.0.0/12", "2001:db8:1::/48"], "--- ---"),
        ] {
            let admitted = NodePortAddresses::parse(&strings(values), &node_ips).unwrap();
            let answers: Vec<_> = asked
                .iter()
                .map(|text| {
                    let address: IpAddr = text.parse().unwrap();
                    match address.is_loopback() {
                        true => admitted.admits_loopback(address.is_ipv6()),
                        false => admitted.admits(address),
                    }
                })
                .map(|yes| if yes { "y" } else { "-" })
                .collect();
            let found = format!("{} {}", answers[..3].concat(), answers[3..].concat());
            assert_eq!(found, expected, "{values:?}");
        }
        let all = NodePortAddresses::default();
        for never in ["127.0.0.1", "::1", "fe80::1", "169.254.0.1", "0.0.0.0"] {
            assert!(!all.admits(never.parse().unwrap()), "{never}");
        }
        // A family without primary address is not limited by the word.
        let one = NodePortAddresses::parse(&strings(&["primary"]), &node_ips[..1]).unwrap();
        assert!(one.admits(node_ips[2]) && one.restricts(false) && !one.restricts(true));
        let error = NodePortAddresses::parse(&strings(&["primary", "10.0.0.0"]), &[]).unwrap_err();
        assert!(
            error.starts_with("--nodeport-addresses 10.0.0.0: neither"),
            "{error}"
        );
    }
}
