//! The addresses of Services, whatever the port: who answers pings, and where an unknown port is
//! refused (see [`shunt_common::address`]).
//!
//! Several Services may share an address (external IPs, some load balancers), so each one's part is
//! remembered, and the entry is what they make together. The smallest network around all cluster
//! IPs goes into the configuration, where the programs ask for it before they look an address up.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;
use shunt_common::layout::{ADDRESS_CLUSTER_IP, ADDRESS_READY, Config, Prefix};

use crate::{
    datapath::maps::{MapError, MapFamily, Maps, PerFamily},
    object::ObjectName,
    plan::{FrontendAddress, FrontendKind, ServicePlan},
};

/// What is in `addresses*`, and whose it is.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// The entries as they are in the maps.
    there: HashMap<IpAddr, u32>,
    /// Each Service's part.
    parts: HashMap<IpAddr, BTreeMap<ObjectName, u32>>,
    /// The addresses of each Service.
    of_service: HashMap<ObjectName, Vec<IpAddr>>,
}

impl Addresses {
    /// Reads the maps back.
    pub(super) fn new(maps: &Maps) -> Result<Self, MapError> {
        fn family<F: MapFamily>(
            maps: &PerFamily<F>,
            there: &mut HashMap<IpAddr, u32>,
        ) -> Result<(), MapError> {
            let entries = maps.addresses.entries()?;
            there.extend(
                entries
                    .iter()
                    .map(|(addr, flags)| (F::address(*addr), *flags)),
            );
            Ok(())
        }
        let mut there = HashMap::new();
        family(&maps.v4, &mut there)?;
        family(&maps.v6, &mut there)?;
        Ok(Self {
            there,
            ..Self::default()
        })
    }

    /// Takes in which addresses a Service has by its plan; returns those that must be
    /// [written](Self::write).
    pub(super) fn take(&mut self, plan: &ServicePlan) -> HashSet<IpAddr> {
        let mut parts: BTreeMap<IpAddr, u32> = BTreeMap::new();
        for frontend in &plan.frontends {
            let FrontendAddress::Ip(address) = frontend.id.address else {
                continue;
            };
            let part = parts.entry(address).or_default();
            if frontend.kind == FrontendKind::ClusterIp {
                *part |= ADDRESS_CLUSTER_IP;
            }
            if !frontend.backends.is_empty() {
                *part |= ADDRESS_READY;
            }
        }
        let before = self.of_service.remove(&plan.service).unwrap_or_default();
        let touched: HashSet<IpAddr> = before.into_iter().chain(parts.keys().copied()).collect();
        if !parts.is_empty() {
            self.of_service
                .insert(plan.service.clone(), parts.keys().copied().collect());
        }
        for &address in &touched {
            let owners = self.parts.entry(address).or_default();
            match parts.get(&address) {
                Some(&part) => owners.insert(plan.service.clone(), part),
                None => owners.remove(&plan.service),
            };
            if owners.is_empty() {
                self.parts.remove(&address);
            }
        }
        touched
    }

    /// Deletes the entries that no Service named since this agent started.
    pub(super) fn prune(&mut self, maps: &Maps) -> Result<(), MapError> {
        let gone: Vec<_> = self
            .there
            .keys()
            .filter(|address| !self.parts.contains_key(address))
            .copied()
            .collect();
        gone.into_iter()
            .try_for_each(|address| self.write(maps, address))
    }

    /// Makes the entry what the address's Services make of it.
    pub(super) fn write(&mut self, maps: &Maps, address: IpAddr) -> Result<(), MapError> {
        let wanted = self
            .parts
            .get(&address)
            .map(|owners| owners.values().fold(0, |all, part| all | part));
        if wanted == self.there.get(&address).copied() {
            return Ok(());
        }
        match address {
            IpAddr::V4(_) => write(&maps.v4, address, wanted)?,
            IpAddr::V6(_) => write(&maps.v6, address, wanted)?,
        }
        match wanted {
            Some(flags) => self.there.insert(address, flags),
            None => self.there.remove(&address),
        };
        if wanted.is_some_and(|flags| flags & ADDRESS_CLUSTER_IP != 0) {
            let mut config = maps.config()?;
            if cover(&mut config, address.into()) {
                maps.set_config(&config)?;
            }
        }
        Ok(())
    }

    /// Widens a fresh configuration to all cluster IPs.
    pub(super) fn cover(&self, config: &mut Config) {
        for (address, flags) in &self.there {
            if flags & ADDRESS_CLUSTER_IP != 0 {
                cover(config, (*address).into());
            }
        }
    }
}

fn write<F: MapFamily>(
    maps: &PerFamily<F>,
    address: IpAddr,
    wanted: Option<u32>,
) -> Result<(), MapError> {
    let Some(octets) = F::octets(address) else {
        return Ok(());
    };
    match wanted {
        Some(flags) => maps.addresses.set(&octets, &flags),
        None => maps.addresses.delete(&octets).map(drop),
    }
}

/// A hull that no address matches: all ones under an empty mask.
pub(super) fn empty_hull<F: MapFamily>() -> Prefix<F::Addr> {
    Prefix {
        addr: F::bytes(F::ONES),
        mask: F::bytes(F::UNSPECIFIED),
    }
}

/// Widens the configuration's hull of cluster IPs to a network; says whether that was needed.
pub(super) fn cover(config: &mut Config, net: IpNet) -> bool {
    fn family<F: MapFamily>(config: &mut Config, net: IpNet) -> bool {
        let hull = &mut F::config_mut(config).service_hull;
        let new = if *hull == empty_hull::<F>() {
            net
        } else {
            let Ok(old) = IpNet::with_netmask(F::address(hull.addr), F::address(hull.mask)) else {
                return false;
            };
            union(old, net)
        };
        let (Some(addr), Some(mask)) = (F::octets(new.network()), F::octets(new.netmask())) else {
            return false;
        };
        let new = Prefix { addr, mask };
        let widened = *hull != new;
        *hull = new;
        widened
    }
    match net {
        IpNet::V4(_) => family::<shunt_common::family::V4>(config, net),
        IpNet::V6(_) => family::<shunt_common::family::V6>(config, net),
    }
}

/// The smallest network with both in it, which are of one family.
fn union(a: IpNet, b: IpNet) -> IpNet {
    let mut net = a;
    while !net.contains(&b) {
        match net.supernet() {
            Some(wider) => net = wider,
            None => break,
        }
    }
    net
}

#[cfg(test)]
mod tests {
    use shunt_common::{
        address::may_be_service,
        family::{Family, V4, V6},
    };

    use super::*;

    fn config(nets: &[&str]) -> Config {
        let mut config = Config::default();
        config.v4.service_hull = empty_hull::<V4>();
        config.v6.service_hull = empty_hull::<V6>();
        for net in nets {
            cover(&mut config, net.parse().unwrap());
        }
        config
    }

    fn matches(config: &Config, address: &str) -> bool {
        match address.parse().unwrap() {
            IpAddr::V4(address) => may_be_service::<V4>(config, V4::words(address.octets())),
            IpAddr::V6(address) => may_be_service::<V6>(config, V6::words(address.octets())),
        }
    }

    #[test]
    fn the_hull_holds_every_network_and_little_else() {
        let none = config(&[]);
        for address in ["0.0.0.0", "255.255.255.255", "10.96.0.1", "::", "fd96::1"] {
            assert!(!matches(&none, address), "{address}");
        }
        let one = config(&["10.96.0.7/32", "fd96::7/128"]);
        assert!(matches(&one, "10.96.0.7") && matches(&one, "fd96::7"));
        assert!(!matches(&one, "10.96.0.6") && !matches(&one, "fd96::6"));
        let some = config(&[
            "10.96.0.7/32",
            "10.96.3.1/32",
            "fd96::/112",
            "fd96::1:0/128",
        ]);
        for (address, inside) in [
            ("10.96.0.7", true),
            ("10.96.3.1", true),
            ("10.96.4.0", false),
            ("10.95.255.255", false),
            ("fd96::1", true),
            ("fd96::1:0", true),
            ("fd96::2:0", false),
        ] {
            assert_eq!(matches(&some, address), inside, "{address}");
        }
        let all = config(&["10.0.0.0/8", "192.168.0.0/16"]);
        assert!(matches(&all, "10.1.2.3") && matches(&all, "192.168.0.1"));
    }
}
