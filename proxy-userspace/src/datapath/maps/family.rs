//! The two address families.

use std::{hash::Hash, net::IpAddr};

use shunt_common::{
    family::{Family, V4, V6},
    layout::{Config, FamilyConfig, Octets},
};

/// An address family as userspace handles it.
pub trait MapFamily: Family<Addr: Octets + Hash + Ord + Send + Sync> + Send + Sync {
    /// Index into the pairs of names in [`names`](shunt_common::layout::names).
    const INDEX: usize;
    /// The bytes of an address of this family; `None` for the other one.
    fn octets(address: IpAddr) -> Option<Self::Addr>;
    /// The address of some bytes.
    fn address(octets: Self::Addr) -> IpAddr;
    /// This family's part of the node's configuration.
    fn config_mut(config: &mut Config) -> &mut FamilyConfig<Self::Addr>;
}

impl MapFamily for V4 {
    const INDEX: usize = 0;

    fn octets(address: IpAddr) -> Option<[u8; 4]> {
        match address {
            IpAddr::V4(address) => Some(address.octets()),
            IpAddr::V6(_) => None,
        }
    }

    fn address(octets: [u8; 4]) -> IpAddr {
        octets.into()
    }

    fn config_mut(config: &mut Config) -> &mut FamilyConfig<[u8; 4]> {
        &mut config.v4
    }
}

impl MapFamily for V6 {
    const INDEX: usize = 1;

    fn octets(address: IpAddr) -> Option<[u8; 16]> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address.octets()),
        }
    }

    fn address(octets: [u8; 16]) -> IpAddr {
        octets.into()
    }

    fn config_mut(config: &mut Config) -> &mut FamilyConfig<[u8; 16]> {
        &mut config.v6
    }
}
