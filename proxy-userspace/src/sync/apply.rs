//! One Service is brought to its plan.

use std::{collections::HashSet, time::Instant};

use shunt_common::layout::{self, BACKEND_GONE, BACKEND_SERVING, FRONTEND_AFFINITY};

use super::{
    Applied, Cause, Syncer,
    ranges::{group, set_flags},
    restore::claim_ids,
    slots::SlotRange,
    state::{BackendKey, ServiceState},
    table::{self, FamilyIndex},
};
use crate::{
    datapath::maps::MapError,
    object::ObjectName,
    plan::{FrontendId, ServicePlan},
};

/// A Service on its way to its plan.
pub(super) struct Change {
    /// Ranges that it had.
    before: HashSet<(FamilyIndex, SlotRange)>,
    /// Ranges that it was given.
    fresh: Vec<(FamilyIndex, SlotRange)>,
    /// Where the ranges of frontends with affinity begin.
    affine: HashSet<(FamilyIndex, u32)>,
    /// Frontends that it had and has no more.
    gone: Vec<FrontendId>,
    /// Entries that did not fit; they are tried again when `gone` has made room.
    refused: Vec<(FrontendId, layout::Frontend)>,
    /// The first thing that did not fit.
    error: Option<Cause>,
}

impl Change {
    fn fail(&mut self, cause: impl Into<Cause>) {
        self.error.get_or_insert_with(|| cause.into());
    }

    /// Whether other Services may be brought in before this one is [finished](Syncer::finish).
    pub(super) fn may_wait(&self) -> bool {
        !self.gone.is_empty() && self.refused.is_empty()
    }
}

impl Syncer {
    /// Brings one Service to its plan as far as nothing is taken away by it. `None`: there is
    /// nothing to do.
    pub(super) fn begin(
        &mut self,
        plan: &ServicePlan,
        applied: &mut Applied,
    ) -> Result<Option<Change>, Cause> {
        let mut state = match self.services.remove(&plan.service) {
            Some(state) => state,
            None if plan.frontends.is_empty() => return Ok(None),
            None => self.introduce(&plan.service)?,
        };
        let result = self.begin_with(plan, &mut state, applied);
        state.is_unfinished = result.is_ok();
        self.services.insert(plan.service.clone(), state);
        result.map(Some)
    }

    fn begin_with(
        &mut self,
        plan: &ServicePlan,
        state: &mut ServiceState,
        applied: &mut Applied,
    ) -> Result<Change, Cause> {
        let mut change = Change {
            before: state.ranges(),
            fresh: Vec::new(),
            affine: HashSet::new(),
            gone: Vec::new(),
            refused: Vec::new(),
            error: None,
        };
        self.members.collect(&self.maps, Instant::now())?;
        // New sources before anyone is asked for his.
        self.add_source_ranges(plan, &mut change, state);
        if !state.live {
            claim_ids(&self.maps, state, &plan.frontends)?;
        }
        let entries = self.prepare(plan, &mut change, state, applied);
        for (id, value) in entries {
            if self.put(&plan.service, state, id, value, applied).is_err() {
                change.refused.push((id, value));
            }
        }
        let names: HashSet<&FrontendId> =
            plan.frontends.iter().map(|frontend| &frontend.id).collect();
        change.gone = state
            .frontends
            .keys()
            .filter(|id| !names.contains(id))
            .copied()
            .collect();
        Ok(change)
    }

    /// Takes away what the plan has no more, and returns the first thing that did not fit.
    pub(super) fn finish(
        &mut self,
        plan: &ServicePlan,
        mut change: Change,
        applied: &mut Applied,
    ) -> Result<(), Cause> {
        let Some(mut state) = self.services.remove(&plan.service) else {
            return Ok(());
        };
        state.is_unfinished = false;
        self.delete_gone(plan, &mut change, &mut state, applied);
        self.release(plan, &mut change, &mut state);
        state.live = true;
        let result = match change.error {
            Some(cause) => Err(cause),
            None => self.settle_backends(plan, &mut state),
        };
        if state.frontends.is_empty() && plan.frontends.is_empty() && result.is_ok() {
            self.maps.services.delete(&state.number)?;
        } else {
            self.services.insert(plan.service.clone(), state);
        }
        result
    }

    fn add_source_ranges(&self, plan: &ServicePlan, change: &mut Change, state: &mut ServiceState) {
        for &range in plan.source_ranges.difference(&state.source_ranges.clone()) {
            let table = self.maps.table(FamilyIndex::of_address(range.addr()));
            match table.add_source_range(state.number, range) {
                Ok(()) => drop(state.source_ranges.insert(range)),
                Err(cause) => change.fail(cause),
            }
        }
    }

    /// Filter bits, backends and slots: nothing that a packet sees yet. Returns the entries that
    /// name them.
    fn prepare(
        &mut self,
        plan: &ServicePlan,
        change: &mut Change,
        state: &mut ServiceState,
        applied: &mut Applied,
    ) -> Vec<(FrontendId, layout::Frontend)> {
        let mut entries = Vec::with_capacity(plan.frontends.len());
        for group in group(&plan.frontends) {
            let range =
                match self.slots_for(&group, state, &change.before, &mut change.fresh, applied) {
                    Ok(range) => self
                        .ensure_members(&group, range)
                        .map(|()| range)
                        .map_err(Cause::from),
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

    /// Deletes the entries that nobody else has taken meanwhile; what did not fit is tried again
    /// once they have made room.
    fn delete_gone(
        &mut self,
        plan: &ServicePlan,
        change: &mut Change,
        state: &mut ServiceState,
        applied: &mut Applied,
    ) {
        for id in std::mem::take(&mut change.gone) {
            if !state.frontends.contains_key(&id) {
                continue;
            }
            match self.maps.table(FamilyIndex::of(&id)).delete(&id) {
                Ok(_) => {
                    applied.deleted += 1;
                    state.frontends.remove(&id);
                    self.owners.remove(&id);
                }
                Err(cause) => change.fail(cause),
            }
        }
        for (id, value) in std::mem::take(&mut change.refused) {
            if let Err(cause) = self.put(&plan.service, state, id, value, applied) {
                change.fail(cause);
            }
        }
    }

    /// Gives back the slots, members and source ranges that nothing names any more.
    fn release(&mut self, plan: &ServicePlan, change: &mut Change, state: &mut ServiceState) {
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

    /// Writes which backends serve, and lets those go that are neither named nor endpoints any
    /// more.
    fn settle_backends(
        &mut self,
        plan: &ServicePlan,
        state: &mut ServiceState,
    ) -> Result<(), Cause> {
        let needed: HashSet<BackendKey> = plan
            .frontends
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
                // Of a Service that was deleted nobody tells what became of its pods: connections
                // are left alone.
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
        // A program that still reads old slots may store a flow with this id until the grace period
        // is over.
        for id in released
            .iter()
            .map(|&(_, id)| id)
            .chain(state.unclaimed.drain())
        {
            self.ids.release(id, now + self.grace);
        }
        state.gone.extend(released);
        Ok(())
    }

    /// Writes a frontend's entry if it differs, and takes note of who has it. Another Service's is
    /// taken over: the model says whose it is, and whoever had it has no claim to it any more.
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
            // Or it releases what it has no more itself.
            && !other.is_unfinished
            && !other.ranges().contains(&(family, range))
        {
            self.slots[family as usize].release(range, Instant::now());
            self.members
                .release((family, range.base), Instant::now() + self.grace);
        }
        Ok(())
    }
}
