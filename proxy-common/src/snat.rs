//! Translated source ports: which there are towards a backend, and where their owners stand.
//!
//! The supply is each backend's own: a port is taken by what its replies carry (the backend's
//! address and port, the port, the protocol), so one backend's flows take nothing from another's.
//! The owners stand in an array that all backends share, each at one of two [`places`] that follow
//! from the tuple; neighbouring ports are neighbours there.
//!
//! Every 32nd port, and every 32nd place with it, is kept [back](is_reserved): for those who have
//! few when somebody else has all others.

use crate::{
    balance::Maps,
    family::Family,
    filter, hash,
    layout::{Config, SnatSlot},
};

/// One port in so many is kept back.
pub const RESERVED: u16 = 32;
/// Fewest entries of the `snat` maps: a few rows of neighbours.
pub const MIN_ENTRIES: u32 = 128;

/// Number of `snat` entries that are used of so many: a power of two.
pub const fn entries(capacity: u32) -> u32 {
    if capacity == 0 {
        0
    } else {
        1 << capacity.ilog2()
    }
}

/// The two places of a port towards a backend: its owner stands at one of them, or nowhere.
#[inline(always)]
pub fn places<F: Family>(
    config: &Config,
    port: u16,
    backend: F::Words,
    backend_port: u16,
    proto: u8,
) -> [u32; 2] {
    let side = hash::side::<F>(backend, backend_port, proto);
    let mask = config.snat_entries.wrapping_sub(1);
    // A port that is kept back has a place that is kept back.
    let place = |base: u32| (base & !(RESERVED as u32 - 1)).wrapping_add(port.into()) & mask;
    [place(side as u32), place((side >> 32) as u32)]
}

/// Whether a port is only for those who have few, in a range of so many.
#[inline(always)]
pub fn is_reserved(config: &Config, port: u16) -> bool {
    config.snat_ports >= 4 * RESERVED && port % RESERVED == RESERVED - 1
}

/// Whether a port (host order) belongs to the SNAT range.
#[inline(always)]
pub fn in_range(config: &Config, port: u16) -> bool {
    port.wrapping_sub(config.snat_first) < config.snat_ports
}

/// The first port, and the number, of those in the SNAT range that the kernel gives to sockets.
#[inline(always)]
pub(crate) fn local(config: &Config) -> (u32, u32) {
    let (first, ports) = (u32::from(config.snat_first), u32::from(config.snat_ports));
    let (local, locals) = (u32::from(config.local_first), u32::from(config.local_ports));
    let begin = first.max(local);
    let end = (first + ports).min(local + locals);
    (begin, end.saturating_sub(begin))
}

/// How many ports of the SNAT range the kernel gives to no socket.
pub fn of_their_own(config: &Config) -> u16 {
    config.snat_ports.saturating_sub(local(config).1 as u16)
}

/// Whether an address may be one side of a translated source: a client's, or that which was put in
/// its place. `false` proves that there is none.
#[inline(always)]
pub(crate) fn may_be<F: Family>(maps: &impl Maps<F>, addr: F::Words) -> bool {
    maps.client(filter::translated::<F>(addr))
}

/// Whether a slot is in use for this port towards this backend.
#[inline(always)]
pub fn is_of<A: Copy + Eq>(
    slot: &SnatSlot<A>,
    port: u16,
    backend: A,
    backend_port: u16,
    proto: u8,
) -> bool {
    (slot.snat_port == port)
        & (slot.backend_port == backend_port)
        & (slot.proto == proto)
        & (slot.last_seen != 0)
        && slot.backend == backend
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::{
        family::{V4, V6},
        layout::{TCP, UDP},
    };

    /// One backend's ports are in each other's way nowhere, and what is kept back is kept back for
    /// all.
    #[test]
    fn ports_of_a_backend_have_places_of_their_own() {
        let config = Config {
            snat_entries: entries(262_144),
            snat_first: 1024,
            snat_ports: 64_512,
            ..Config::default()
        };
        for proto in [TCP, UDP] {
            let mut seen = [HashSet::new(), HashSet::new()];
            for port in 1024..=65_535u16 {
                let four = places::<V4>(&config, port, V4::words([10, 0, 0, 7]), 8080, proto);
                let six = places::<V6>(&config, port, V6::words([0xfd; 16]), 8080, proto);
                for (place, seen) in four.into_iter().zip(&mut seen) {
                    assert!(seen.insert(place), "port {port}");
                }
                for place in four.into_iter().chain(six) {
                    assert!(place < config.snat_entries);
                    assert_eq!(place % 32 == 31, is_reserved(&config, port));
                }
            }
        }
        assert_eq!(
            [0, 1, 127, 128, 40_000, 262_144].map(entries),
            [0, 1, 64, 128, 32_768, 262_144]
        );
    }
}
