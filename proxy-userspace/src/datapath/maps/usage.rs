//! How full the maps are.

use std::collections::{HashMap, HashSet};

use aya::Pod;
use shunt_common::layout::BackendState;

use super::{Map, MapFamily, Maps, PerFamily, Result};

/// Fill of one map, for `shunt status` and metrics.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Usage {
    /// Name of the map.
    pub map: &'static str,
    /// Entries in use.
    pub entries: u64,
    /// Most entries.
    pub capacity: u32,
    /// The flag of `shunt run` that sets the capacity.
    pub setting: &'static str,
}

/// What is left of translated source ports, of which each backend has its own.
#[derive(Clone, Copy, Debug)]
pub struct SnatUse {
    /// Those of the backend that has most in use, of IPv4 and of IPv6.
    pub busiest: [u64; 2],
    /// How many each has.
    pub supply: u16,
}

impl Maps {
    /// How near the busiest backends are to the end of their source ports.
    ///
    /// # Errors
    /// `MapError::Kernel` when the configuration cannot be read: `EPERM` without `CAP_BPF`.
    pub fn snat_use(&self) -> Result<SnatUse> {
        fn busiest<F: MapFamily>(maps: &PerFamily<F>) -> u64 {
            let mut used: HashMap<_, u64> = HashMap::new();
            let slots = (0..maps.snat.capacity()).filter_map(|index| maps.snat.get(index));
            for slot in slots.filter(|slot| slot.last_seen != 0) {
                let backend = (slot.backend, slot.backend_port, slot.proto);
                *used.entry(backend).or_default() += 1;
            }
            used.into_values().max().unwrap_or(0)
        }
        Ok(SnatUse {
            busiest: [busiest(&self.v4), busiest(&self.v6)],
            supply: self.config()?.snat_ports,
        })
    }

    /// How full every map is. Walks them all, without marking entries as used.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
    /// memory for a batch. Nothing has changed: try again.
    pub fn usage(&self) -> Result<Vec<Usage>> {
        fn of<K: Pod, V: Pod>(map: &Map<K, V>, counts: impl FnMut(&V) -> bool) -> Result<Usage> {
            Ok(Usage {
                map: map.name(),
                entries: map.count(counts)?,
                capacity: map.capacity(),
                setting: map.setting(),
            })
        }
        fn family<F: MapFamily>(maps: &PerFamily<F>, usage: &mut Vec<Usage>) -> Result<()> {
            let mut ranges = HashSet::new();
            usage.push(of(&maps.frontends, |frontend| {
                ranges.insert((frontend.slot_base, frontend.slot_count));
                true
            })?);
            usage.push(Usage {
                map: maps.slots.name(),
                entries: ranges.iter().map(|&(_, count)| u64::from(count)).sum(),
                capacity: maps.slots.capacity(),
                setting: maps.slots.setting(),
            });
            usage.push(of(&maps.unconfirmed, |_| true)?);
            usage.push(of(&maps.flows, |_| true)?);
            let in_use =
                |&index: &u32| maps.snat.get(index).is_some_and(|slot| slot.last_seen != 0);
            usage.push(Usage {
                map: maps.snat.name(),
                entries: (0..maps.snat.capacity()).filter(in_use).count() as u64,
                capacity: maps.snat.capacity(),
                setting: maps.snat.setting(),
            });
            usage.push(of(&maps.node_addrs, |_| true)?);
            usage.push(of(&maps.new_affinity, |_| true)?);
            usage.push(of(&maps.affinity, |_| true)?);
            usage.push(of(&maps.members, |_| true)?);
            usage.push(of(&maps.source_ranges, |_| true)?);
            usage.push(of(&maps.addresses, |_| true)?);
            Ok(())
        }
        let mut usage = Vec::new();
        family(&self.v4, &mut usage)?;
        family(&self.v6, &mut usage)?;
        usage.push(of(&self.backends, |state| {
            *state != BackendState::default()
        })?);
        usage.push(of(&self.services, |_| true)?);
        usage.push(of(&self.sockets, |_| true)?);
        Ok(usage)
    }
}
