//! One Service is brought to its plan.

use std::{collections::HashSet, time::Instant};

use shunt_common::layout::{self, BACKEND_GONE, BACKEND_SERVING, BackendState, FRONTEND_AFFINITY};

use super::{
    Applied, Cause, Syncer,
    ranges::group,
    restore::claim_ids,
    slots::SlotRange,
    state::{BackendKey, ServiceState},
    table::{self, FamilyIndex},
};
use crate::{
    datapath::maps::{MapError, Maps},
    object::ObjectName,
    plan::{Frontend, FrontendId, ServicePlan},
};

/// A Service on its way to its plan.
struct Change<'a> {
    plan: &'a ServicePlan,
    /// Those of the planned frontends that nobody else has.
    wanted: Vec<&'a Frontend>,
    /// Ranges that it had.
    before: HashSet<(FamilyIndex, SlotRange)>,
    /// Ranges that it was given.
    fresh: Vec<(FamilyIndex, SlotRange)>,
    /// Where the ranges of frontends with affinity begin.
    affine: HashSet<(FamilyIndex, u32)>,
    /// The first thing that did not fit.
    error: Option<Cause>,
}

impl Change<'_> {
    fn fail(&mut self, cause: impl Into<Cause>) {
        self.error.get_or_insert_with(|| cause.into());
    }
}

impl Syncer {
    /// Brings one Service to its plan, as far as it fits; returns the first thing that did not.
    pub(super) fn bring_to(
        &mut self,
        plan: &ServicePlan,
        state: &mut ServiceState,
        applied: &mut Applied,
    ) -> Result<(), Cause> {
        let mut change = Change {
            plan,
            wanted: Vec::with_capacity(plan.frontends.len()),
            before: state.ranges(),
            fresh: Vec::new(),
            affine: HashSet::new(),
            error: None,
        };
        self.members.collect(&self.maps, Instant::now())?;
        // New sources before anyone is asked for his.
        self.add_source_ranges(&mut change, state);
        for frontend in &plan.frontends {
            match self.taken_by_other(&plan.service, frontend) {
                Some(owner) => change.fail(Cause::Taken {
                    frontend: frontend.id,
                    owner,
                }),
                None => change.wanted.push(frontend),
            }
        }
        if !state.live {
            claim_ids(&self.maps, state, &change.wanted)?;
        }
        let entries = self.prepare(&mut change, state, applied);
        self.switch(&mut change, state, entries, applied);
        self.release(&mut change, state);
        state.live = true;
        match change.error {
            Some(cause) => Err(cause),
            None => self.settle_backends(plan, &change.wanted, state),
        }
    }

    fn add_source_ranges(&self, change: &mut Change<'_>, state: &mut ServiceState) {
        for &range in change.plan.source_ranges.difference(&state.source_ranges.clone()) {
            let table = self.maps.table(FamilyIndex::of_address(range.addr()));
            match table.add_source_range(state.number, range) {
                Ok(()) => drop(state.source_ranges.insert(range)),
                Err(cause) => change.fail(cause),
            }
        }
    }

    /// Filter bits, backends and slots: nothing that a packet sees yet. Returns the entries that name them.
    fn prepare(
        &mut self,
        change: &mut Change<'_>,
        state: &mut ServiceState,
        applied: &mut Applied,
    ) -> Vec<(FrontendId, layout::Frontend)> {
        let mut entries = Vec::with_capacity(change.wanted.len());
        for group in group(&change.wanted) {
            let range = match self.slots_for(&group, state, &change.before, &mut change.fresh, applied) {
                Ok(range) => self.ensure_members(&group, range).map(|()| range).map_err(Cause::from),
                Err(cause) => Err(cause),
            };
            let range = match range {
                Ok(range) => range,
                Err(cause) => {
                    change.fail(cause);
                    continue;
                }
            };
            for frontend in group.frontends {
                self.maps
                    .table(group.family)
                    .admit_frontend(&self.maps.filter, &frontend.id);
                let value = layout::Frontend {
                    service: state.number,
                    slot_base: range.map_or(0, |range| range.base),
                    slot_count: range.map_or(0, |range| range.len),
                    affinity_secs: frontend.affinity_secs,
                    flags: frontend.flags,
                    kind: table::kind_number(frontend.kind),
                    set: frontend.set,
                };
                if frontend.flags & FRONTEND_AFFINITY != 0
                    && let Some(range) = range
                {
                    change.affine.insert((group.family, range.base));
                }
                entries.push((frontend.id, value));
            }
        }
        entries
    }

    /// One entry at a time; what does not fit is tried again once the gone entries have made room.
    fn switch(
        &mut self,
        change: &mut Change<'_>,
        state: &mut ServiceState,
        entries: Vec<(FrontendId, layout::Frontend)>,
        applied: &mut Applied,
    ) {
        let plan = change.plan;
        let mut refused = Vec::new();
        for (id, value) in entries {
            if self.put(&plan.service, state, id, value, applied).is_err() {
                refused.push((id, value));
            }
        }
        let names: HashSet<&FrontendId> = plan.frontends.iter().map(|frontend| &frontend.id).collect();
        let gone: Vec<FrontendId> = state
            .frontends
            .keys()
            .filter(|id| !names.contains(id))
            .copied()
            .collect();
        for id in gone {
            match self.maps.table(FamilyIndex::of(&id)).delete(&id) {
                Ok(_) => {
                    applied.deleted += 1;
                    state.frontends.remove(&id);
                    self.owners.remove(&id);
                }
                Err(cause) => change.fail(cause),
            }
        }
        for (id, value) in refused {
            if let Err(cause) = self.put(&plan.service, state, id, value, applied) {
                change.fail(cause);
            }
        }
    }

    /// Gives back the slots, members and source ranges that nothing names any more.
    fn release(&mut self, change: &mut Change<'_>, state: &mut ServiceState) {
        let now = Instant::now();
        let after = state.ranges();
        for &(family, range) in change.before.difference(&after) {
            self.slots[family as usize].release(range, now);
        }
        for &(family, range) in change.before.union(&after) {
            // What failed keeps the slots and the members that it had.
            let kept = after.contains(&(family, range)) && change.error.is_some();
            if !kept && !change.affine.contains(&(family, range.base)) {
                self.members.release((family, range.base), now + self.grace);
            }
        }
        for &(family, range) in &change.fresh {
            if !after.contains(&(family, range)) {
                self.slots[family as usize].give_back(range);
                self.members.release((family, range.base), now);
            }
        }
        let plan = change.plan;
        for range in state
            .source_ranges
            .extract_if(.., |range| !plan.source_ranges.contains(range))
        {
            let table = self.maps.table(FamilyIndex::of_address(range.addr()));
            if let Err(cause) = table.remove_source_range(state.number, range) {
                change.fail(cause);
            }
        }
    }

    /// Writes which backends serve, and lets those go that are neither named nor endpoints any more.
    fn settle_backends(
        &mut self,
        plan: &ServicePlan,
        wanted: &[&Frontend],
        state: &mut ServiceState,
    ) -> Result<(), Cause> {
        let needed: HashSet<BackendKey> = wanted
            .iter()
            .flat_map(|frontend| {
                frontend
                    .backends
                    .iter()
                    .map(|b| (frontend.port_index, b.address, b.port))
            })
            .collect();
        let stays = |key: &BackendKey| needed.contains(key) || plan.endpoints.contains_key(key);
        for (key, &id) in &state.backends {
            let flags = match (needed.contains(key), plan.endpoints.get(key)) {
                (true, _) | (_, Some(true)) => BACKEND_SERVING,
                (false, Some(false)) => 0,
                // Of a Service that was deleted nobody tells what became of its pods: connections are left alone.
                (false, None) if plan.frontends.is_empty() => 0,
                (false, None) => BACKEND_GONE,
            };
            // Almost all serve, as they did before.
            if flags != BACKEND_SERVING || state.resting.contains(&id) {
                set_flags(&self.maps, id, flags)?;
            }
            match flags {
                0 => state.resting.insert(id),
                _ => state.resting.remove(&id),
            };
        }
        let now = Instant::now();
        let released: Vec<_> = state.backends.extract_if(|key, _| !stays(key)).collect();
        // A program that still reads old slots may store a flow with this id until the grace period is over.
        for id in released.iter().map(|&(_, id)| id).chain(state.unclaimed.drain()) {
            self.ids.release(id, now + self.grace);
        }
        state.gone.extend(released);
        Ok(())
    }

    /// The owner of a frontend, if that is another Service that the source has named. From one that is known from the
    /// maps only (it was deleted while no agent ran) the frontend is taken over.
    fn taken_by_other(&self, service: &ObjectName, frontend: &Frontend) -> Option<ObjectName> {
        let owner = self.owners.get(&frontend.id).filter(|owner| *owner != service)?;
        self.services
            .get(owner)
            .is_some_and(|state| state.live)
            .then(|| owner.clone())
    }

    /// Writes a frontend's entry if it differs, and takes note of who has it.
    fn put(
        &mut self,
        service: &ObjectName,
        state: &mut ServiceState,
        id: FrontendId,
        value: layout::Frontend,
        applied: &mut Applied,
    ) -> Result<(), MapError> {
        let family = FamilyIndex::of(&id);
        let table = self.maps.table(family);
        if table.get(&id)? != Some(value) {
            table.put(&id, &value)?;
            applied.frontends += 1;
        }
        let range = (value.slot_count > 0).then_some(SlotRange {
            base: value.slot_base,
            len: value.slot_count,
        });
        state.frontends.insert(id, range);
        let previous = self.owners.insert(id, service.clone());
        if let Some(previous) = previous.filter(|previous| previous != service)
            && let Some(other) = self.services.get_mut(&previous)
            && let Some(Some(range)) = other.frontends.remove(&id)
            && !other.ranges().contains(&(family, range))
        {
            self.slots[family as usize].release(range, Instant::now());
            self.members.release((family, range.base), Instant::now() + self.grace);
        }
        Ok(())
    }
}

/// Writes a backend's flags if they differ. A flow that is counted in between may be lost to the count.
pub(super) fn set_flags(maps: &Maps, id: u32, flags: u16) -> Result<(), MapError> {
    let state = maps.backends.get(&id)?.unwrap_or_default();
    if state.flags != flags {
        maps.backends.set(&id, &BackendState { flags, ..state })?;
    }
    Ok(())
}
