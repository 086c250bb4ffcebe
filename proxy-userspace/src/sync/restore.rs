//! What an agent finds in the maps when it starts.

use std::{
    collections::{BTreeSet, HashMap, HashSet, hash_map::Entry},
    sync::Arc,
    time::{Duration, Instant},
};

use shunt_common::layout::{BACKEND_SERVING, BackendState, FRONTEND_AFFINITY};

use super::{
    Syncer,
    addresses::Addresses,
    ids::BackendIds,
    members::Members,
    slots::{SlotAllocator, SlotRange},
    state::ServiceState,
    table::FamilyIndex,
};
use crate::{
    datapath::maps::{MapError, Maps, name_str},
    object::ObjectName,
    plan::Frontend,
};

impl Syncer {
    /// Reads the pinned maps back; what nothing names any more rests for `grace`.
    pub(super) fn with_grace(maps: Arc<Maps>, grace: Duration) -> Result<Self, MapError> {
        let mut services: HashMap<ObjectName, ServiceState> = HashMap::new();
        let mut names: HashMap<u32, ObjectName> = HashMap::new();
        let mut known = maps.services.entries()?;
        known.sort_by_key(|&(number, _)| number);
        let mut next_number = known
            .last()
            .map_or(1, |&(number, _)| number.wrapping_add(1));
        for (number, info) in known {
            let name = ObjectName::new(&name_str(&info.namespace), &name_str(&info.name));
            if services.contains_key(&name) {
                maps.services.delete(&number)?;
            } else {
                services.insert(name.clone(), ServiceState::new(number));
            }
            names.insert(number, name);
        }

        let mut slots =
            FamilyIndex::ALL.map(|family| SlotAllocator::new(maps.table(family).slots(), grace));
        let mut owners = HashMap::new();
        let mut affine = HashSet::new();
        let mut used_ids = HashSet::new();
        for family in FamilyIndex::ALL {
            let table = maps.table(family);
            let mut range_owners: HashMap<SlotRange, ObjectName> = HashMap::new();
            for (id, entry) in table.entries()? {
                if entry.flags & FRONTEND_AFFINITY != 0 {
                    affine.insert((family, entry.slot_base));
                }
                next_number = next_number.max(entry.service.wrapping_add(1));
                // A number without a name: only an agent of another making leaves that. Pruned like
                // any unknown Service.
                let name = names
                    .entry(entry.service)
                    .or_insert_with(|| ObjectName::new("", &format!("#{}", entry.service)));
                let state = services
                    .entry(name.clone())
                    .or_insert_with(|| ServiceState::new(entry.service));
                let range = SlotRange {
                    base: entry.slot_base,
                    len: entry.slot_count,
                };
                let own = match range_owners.get(&range) {
                    Some(owner) => owner == name,
                    None if slots[family as usize].reserve(range) => {
                        range_owners.insert(range, name.clone());
                        for index in range.base..range.base + range.len {
                            if let Some(choice) = table.slot(index) {
                                state.unclaimed.insert(choice.id);
                                used_ids.insert(choice.id);
                            }
                        }
                        true
                    }
                    None => false,
                };
                state.frontends.insert(id, own.then_some(range));
                owners.insert(id, name.clone());
            }
        }

        // Members of ranges that no frontend with affinity names, and source ranges of nobody: an
        // agent was killed.
        let mut members = Members::new(&maps)?;
        let begun: Vec<_> = members
            .bases()
            .filter(|base| !affine.contains(base))
            .collect();
        for base in begun {
            members.release(base, Instant::now() + grace);
        }
        let mut by_number: HashMap<u32, &mut ServiceState> = services
            .values_mut()
            .map(|state| (state.number, state))
            .collect();
        for family in FamilyIndex::ALL {
            for (number, range) in maps.table(family).source_ranges()? {
                match by_number.get_mut(&number) {
                    Some(state) => drop(state.source_ranges.insert(range)),
                    None => maps.table(family).remove_source_range(number, range)?,
                }
            }
        }

        // A state that is not all zero and that no slot names belonged to a backend that flows may
        // still name.
        let mut resting = HashSet::new();
        maps.backend_states().for_each(|id, state| {
            if *state != BackendState::default() && !used_ids.contains(&id) {
                resting.insert(id);
            }
        })?;
        let ids = BackendIds::new(maps.backends.capacity(), used_ids, resting, Instant::now());
        let addresses = Addresses::new(&maps)?;
        Ok(Self {
            maps,
            slots,
            members,
            ids,
            addresses,
            services,
            owners,
            next_number,
            failed: BTreeSet::new(),
            grace,
        })
    }
}

/// After a restart: gives the ids in a Service's slots back to its backends, so that counters and
/// flows keep their meaning.
pub(super) fn claim_ids(
    maps: &Maps,
    state: &mut ServiceState,
    wanted: &[Frontend],
) -> Result<(), MapError> {
    for frontend in wanted {
        let Some(Some(range)) = state.frontends.get(&frontend.id) else {
            continue;
        };
        let table = maps.table(FamilyIndex::of(&frontend.id));
        for choice in (range.base..range.base + range.len).filter_map(|index| table.slot(index)) {
            // An id belongs to one Service port: the first that claims it.
            if !state.unclaimed.contains(&choice.id) {
                continue;
            }
            let key = (frontend.port_index, choice.address, choice.port);
            if let Entry::Vacant(entry) = state.backends.entry(key) {
                entry.insert(choice.id);
                state.unclaimed.remove(&choice.id);
                let now = maps.backends.get(&choice.id)?.unwrap_or_default();
                if now.flags != BACKEND_SERVING {
                    let flags = BACKEND_SERVING;
                    maps.backends
                        .set(&choice.id, &BackendState { flags, ..now })?;
                }
            }
        }
    }
    Ok(())
}
