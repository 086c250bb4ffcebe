//! What the programs must know of this node: `config`, and the addresses that node ports answer on.

use std::{collections::BTreeSet, net::IpAddr, ops::RangeInclusive, time::Duration};

use ipnet::IpNet;
use shunt_common::{
    layout::{
        AFFINITY_TICK_NS, CONFIG_ANSWER_PING, CONFIG_NODEPORT_LOOPBACK4, CONFIG_NODEPORT_LOOPBACK6,
        CONFIG_PODS_LEFT_OUT, CONFIG_SOCKETS_OF_NODE, Config, MAX_CLUSTER_CIDRS, MAX_SERVICE_CIDRS,
        Octets, Prefix, Timeouts,
    },
    snat,
};

use super::addresses;

use crate::datapath::maps::{MapError, MapFamily, Maps, PerFamily, settings};

/// The SNAT range where the user names none: all that need no right. Node ports and what sockets of
/// the node have are left out, and what Linux gives to its sockets (`ip_local_port_range` without
/// `ip_local_reserved_ports`) comes last.
pub const SNAT_PORTS: RangeInclusive<u16> = 1024..=65_535;

/// Longest time that a backend which does not answer gets no new connections: its trial may come so
/// late after its recovery.
pub const MAX_QUARANTINE: Duration = Duration::from_secs(60);

/// What [`Config`] is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSettings {
    /// This node's addresses; the first of each family becomes the source of translated packets.
    pub addresses: Vec<IpAddr>,
    /// `--cluster-cidr`.
    pub cluster_cidrs: Vec<IpNet>,
    /// `--service-cidr`, where it says what belongs to Services or to nobody.
    pub service_cidrs: Vec<IpNet>,
    /// `--answer-ping`.
    pub answer_ping: bool,
    /// `--retry-silence`.
    pub retry_silence: Duration,
    /// `--snat-ports`.
    pub snat_ports: RangeInclusive<u16>,
    /// Those of `snat_ports` that the kernel gives to sockets
    /// ([`local_ports`](crate::datapath::local_ports)); empty: none.
    pub local_ports: RangeInclusive<u16>,
    /// When flows are over.
    pub timeouts: Timeouts,
    /// Whether node ports answer on loopback addresses, to processes in the node's own namespace:
    /// IPv4's, IPv6's.
    pub loopback: [bool; 2],
    /// `SO_NETNS_COOKIE` of the node's network namespace.
    pub host_netns: u64,
    /// `--socket-lb host`.
    pub sockets_of_node: bool,
    /// Whether the socket hook leaves out pods by their label.
    pub pods_left_out: bool,
}

/// A setting that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NodeError {
    /// Too many for the array in [`Config`].
    #[error(
        "{setting}: {count} networks of one family, at most {most} are supported: give larger ones"
    )]
    TooManyCidrs {
        /// The setting.
        setting: &'static str,
        /// How many were given.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// Nothing in it, or port 0.
    #[error(
        "--snat-ports {first}-{last}: give a first port from 1 on and a last port that is not below it"
    )]
    EmptyRange {
        /// As given.
        first: u16,
        /// As given.
        last: u16,
    },
    /// Fewer entries than can be searched.
    #[error(
        "{} {entries}: give {} at least",
        settings::MAX_SNAT,
        snat::MIN_ENTRIES
    )]
    TooFewEntries {
        /// Entries of the `snat` maps.
        entries: u32,
    },
}

/// The configuration of the programs; `snat_entries` is the capacity of the `snat` maps.
///
/// # Errors
/// [`NodeError`], which names the setting.
pub fn config(settings: &NodeSettings, snat_entries: u32) -> Result<Config, NodeError> {
    let (first, last) = (*settings.snat_ports.start(), *settings.snat_ports.end());
    if first == 0 || last < first {
        return Err(NodeError::EmptyRange { first, last });
    }
    // 65535 ports at most, since port 0 is none.
    let ports = last - first + 1;
    if snat_entries < snat::MIN_ENTRIES {
        return Err(NodeError::TooFewEntries {
            entries: snat_entries,
        });
    }
    let mut config = Config {
        host_netns: settings.host_netns,
        snat_first: first,
        snat_ports: ports,
        snat_entries: snat::entries(snat_entries),
        local_first: *settings.local_ports.start(),
        local_ports: settings.local_ports.len().min(u16::MAX.into()) as u16,
        flags: flags(settings),
        timeouts: settings.timeouts,
        quarantine: ticks(settings.retry_silence.min(MAX_QUARANTINE)),
        quarantine_max: ticks(MAX_QUARANTINE),
        ..Default::default()
    };
    family::<shunt_common::family::V4>(settings, &mut config)?;
    family::<shunt_common::family::V6>(settings, &mut config)?;
    Ok(config)
}

/// `Config::flags`.
fn flags(settings: &NodeSettings) -> u32 {
    let [v4, v6] = settings.loopback;
    [
        (v4, CONFIG_NODEPORT_LOOPBACK4),
        (v6, CONFIG_NODEPORT_LOOPBACK6),
        (settings.answer_ping, CONFIG_ANSWER_PING),
        (settings.sockets_of_node, CONFIG_SOCKETS_OF_NODE),
        (settings.pods_left_out, CONFIG_PODS_LEFT_OUT),
    ]
    .iter()
    .fold(
        0,
        |flags, (is_set, flag)| if *is_set { flags | flag } else { flags },
    )
}

/// A time in [`AFFINITY_TICK_NS`].
fn ticks(time: Duration) -> u32 {
    (time.as_nanos() / u128::from(AFFINITY_TICK_NS)) as u32
}

fn family<F: MapFamily>(settings: &NodeSettings, config: &mut Config) -> Result<(), NodeError> {
    let part = F::config_mut(config);
    if let Some(node) = settings
        .addresses
        .iter()
        .find_map(|&address| F::octets(address))
    {
        part.node = node;
    }
    let cluster = prefixes::<F>("--cluster-cidr", &settings.cluster_cidrs, MAX_CLUSTER_CIDRS)?;
    part.cluster_cidr_count = cluster.len() as u32;
    part.cluster_cidrs[..cluster.len()].copy_from_slice(&cluster);
    let service = prefixes::<F>("--service-cidr", &settings.service_cidrs, MAX_SERVICE_CIDRS)?;
    part.service_cidr_count = service.len() as u32;
    part.service_cidrs[..service.len()].copy_from_slice(&service);
    part.service_hull = addresses::empty_hull::<F>();
    let of_family = |net: &&IpNet| F::octets(net.addr()).is_some();
    for net in settings.service_cidrs.iter().filter(of_family) {
        addresses::cover(config, *net);
    }
    Ok(())
}

/// The networks of one family.
fn prefixes<F: MapFamily>(
    setting: &'static str,
    cidrs: &[IpNet],
    most: usize,
) -> Result<Vec<Prefix<F::Addr>>, NodeError> {
    let prefixes: Vec<_> = cidrs
        .iter()
        .filter_map(|cidr| {
            Some(Prefix {
                addr: F::octets(cidr.network())?,
                mask: F::octets(cidr.netmask())?,
            })
        })
        .collect();
    if prefixes.len() > most {
        return Err(NodeError::TooManyCidrs {
            setting,
            count: prefixes.len(),
            most,
        });
    }
    Ok(prefixes)
}

/// Brings `node_addrs*` to the addresses that node ports answer on, writing only differences.
/// Returns how many it wrote.
///
/// # Errors
/// The map is full (it holds 1024 addresses), or the kernel's.
pub fn set_addresses(maps: &Maps, admitted: &BTreeSet<IpAddr>) -> Result<usize, MapError> {
    fn family<F: MapFamily>(
        maps: &PerFamily<F>,
        admitted: &BTreeSet<IpAddr>,
    ) -> Result<usize, MapError>
    where
        F::Addr: Octets,
    {
        let wanted: BTreeSet<F::Addr> = admitted
            .iter()
            .filter_map(|&address| F::octets(address))
            .collect();
        let there: BTreeSet<F::Addr> = maps
            .node_addrs
            .entries()?
            .into_iter()
            .map(|(address, _)| address)
            .collect();
        for address in wanted.difference(&there) {
            maps.node_addrs.set(address, &0)?;
        }
        for address in there.difference(&wanted) {
            maps.node_addrs.delete(address)?;
        }
        Ok(wanted.symmetric_difference(&there).count())
    }
    Ok(family(&maps.v4, admitted)? + family(&maps.v6, admitted)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::maps::testing::{Capacities, Root};

    fn settings() -> NodeSettings {
        NodeSettings {
            addresses: ["192.0.2.1", "192.0.2.9", "2001:db8::1"]
                .map(|a| a.parse().unwrap())
                .into(),
            cluster_cidrs: ["10.244.3.7/16", "fd00:10::/48"]
                .map(|c| c.parse().unwrap())
                .into(),
            service_cidrs: ["10.96.0.0/12", "fd96::/112"]
                .map(|c| c.parse().unwrap())
                .into(),
            answer_ping: true,
            retry_silence: Duration::from_secs(1),
            snat_ports: SNAT_PORTS,
            local_ports: 32_768..=60_999,
            timeouts: Timeouts::default(),
            loopback: [false, true],
            host_netns: 7,
            sockets_of_node: false,
            pods_left_out: false,
        }
    }

    #[test]
    fn the_configuration_follows_the_settings() {
        let config = config(&settings(), 262_144).unwrap();
        assert_eq!(
            (config.snat_first, config.snat_ports, config.snat_entries),
            (1024, 64_512, 262_144)
        );
        assert_eq!((config.local_first, config.local_ports), (32_768, 28_232));
        assert_eq!(
            (config.quarantine, config.quarantine_max),
            (59, 3576),
            "17 ms each"
        );
        assert_eq!(
            (config.host_netns, config.flags),
            (7, CONFIG_NODEPORT_LOOPBACK6 | CONFIG_ANSWER_PING)
        );
        assert_eq!(
            (config.v4.node, config.v4.cluster_cidr_count),
            ([192, 0, 2, 1], 1)
        );
        // Host bits of a CIDR are dropped: the programs compare masked addresses.
        let prefix = config.v4.cluster_cidrs[0];
        assert_eq!(
            (prefix.addr, prefix.mask),
            ([10, 244, 0, 0], [255, 255, 0, 0])
        );
        assert_eq!(config.v6.node[..4], [0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!(
            config.v6.cluster_cidrs[0].mask[..7],
            [255, 255, 255, 255, 255, 255, 0]
        );
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        let with = |change: fn(&mut NodeSettings)| {
            let mut settings = settings();
            change(&mut settings);
            config(&settings, 4096).unwrap_err().to_string()
        };
        let too_few = config(&settings(), 127).unwrap_err().to_string();
        assert_eq!(too_few, "--max-snat 127: give 128 at least");
        #[expect(clippy::reversed_empty_ranges, reason = "that is the mistake")]
        let message = with(|s| s.snat_ports = 20..=10);
        assert!(message.starts_with("--snat-ports 20-10"), "{message}");
        assert!(with(|s| s.snat_ports = 0..=10).contains("--snat-ports"));
        let message = with(|s| {
            s.snat_ports = 100..=200;
            s.cluster_cidrs = (0..5)
                .map(|n| format!("10.{n}.0.0/16").parse().unwrap())
                .collect();
        });
        assert!(
            message.starts_with("--cluster-cidr: 5 networks"),
            "{message}"
        );
    }

    #[test]
    fn addresses_and_configuration_are_written_only_when_they_differ() {
        let root = Root::new(Capacities::default());
        let maps = root.maps();
        let set = |addresses: &[&str]| {
            addresses
                .iter()
                .map(|a| a.parse().unwrap())
                .collect::<BTreeSet<IpAddr>>()
        };
        assert_eq!(
            set_addresses(&maps, &set(&["192.0.2.1", "192.0.2.2", "2001:db8::1"])).unwrap(),
            3
        );
        assert_eq!(
            set_addresses(&maps, &set(&["192.0.2.1", "192.0.2.2", "2001:db8::1"])).unwrap(),
            0
        );
        assert_eq!(
            set_addresses(&maps, &set(&["192.0.2.2", "192.0.2.3"])).unwrap(),
            3
        );
        let left: BTreeSet<_> = maps
            .v4
            .node_addrs
            .entries()
            .unwrap()
            .into_iter()
            .map(|(a, _)| a)
            .collect();
        assert_eq!(left, [[192, 0, 2, 2], [192, 0, 2, 3]].into());
        assert_eq!(maps.v6.node_addrs.count(|_| true).unwrap(), 0);

        let config = config(&settings(), 262_144).unwrap();
        assert!(maps.set_config(&config).unwrap());
        let writes = maps.writes();
        assert!(!maps.set_config(&config).unwrap());
        assert_eq!((maps.config().unwrap(), maps.writes()), (config, writes));
    }
}
