//! How full the maps are.

use std::collections::HashSet;

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

impl Maps {
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
