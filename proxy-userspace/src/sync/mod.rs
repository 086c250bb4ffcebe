//! Brings the pinned maps to the plan, writing only differences, in an order that never leaves a packet between two states.
//!
//! For one Service, in this order: source ranges, filter bits, backend states, new slots in a range that no frontend names,
//! their members, and then one
//! update per frontend entry, which switches it from the old range to the new. What is gone is deleted last. Old ranges rest
//! for a grace period ([`slots`]), backend ids until no flow names them ([`ids`]).
//!
//! The maps themselves are the base of the difference: slots are compared where they are mapped, frontends are looked up.
//! So a restarted agent that finds the maps as they should be writes nothing, and an agent that was killed between two
//! writes finishes what is missing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use shunt_common::{
    layout::{self, BACKEND_GONE, BACKEND_SERVING, BackendState, FRONTEND_AFFINITY, ServiceInfo},
    maglev,
};

mod addresses;
pub mod ids;
pub mod members;
pub mod node;
pub mod slots;
pub mod table;

use addresses::Addresses;
use ids::{BackendIds, IdSet};
use ipnet::IpNet;
use members::Members;
use slots::{SlotAllocator, SlotRange};
use table::{Choice, FamilyIndex, FrontendTable};

use crate::{
    datapath::maps::{MapError, Maps, name_bytes, name_str, settings},
    object::{ObjectName, Problem},
    plan::{Backend, BackendSet, Frontend, FrontendAddress, FrontendId, ServicePlan, Table},
};

/// Why a Service is not (wholly) in the maps. What it had there before goes on serving.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.problem())]
pub struct SyncError {
    /// The Service.
    pub service: ObjectName,
    /// What happened.
    #[source]
    pub cause: Cause,
}

impl SyncError {
    /// The same, for those who keep problems by object.
    pub fn problem(&self) -> Problem {
        let message = format!("{}; what it had before goes on, the rest is tried again", self.cause);
        Problem::new("Service", &self.service, "", message)
    }
}

/// What kept an entry out of the maps.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// A map is full or the kernel refused.
    #[error(transparent)]
    Map(#[from] MapError),
    /// No consecutive free slots.
    #[error(
        "map {map} has no {needed} consecutive free slots ({free} of {capacity} are free): start the agent with a larger {}",
        settings::MAX_SLOTS
    )]
    Slots {
        /// The map.
        map: &'static str,
        /// How many were asked for.
        needed: u32,
        /// How many are free or resting, in pieces.
        free: u32,
        /// All.
        capacity: u32,
    },
    /// No free backend id.
    #[error(
        "map backends is full ({capacity} entries, {used} of them in use, the rest named by open flows): start the agent \
         with a larger {}",
        settings::MAX_BACKENDS
    )]
    Backends {
        /// All.
        capacity: u32,
        /// How many live backends use.
        used: usize,
    },
    /// Somebody else has it.
    #[error("{} belongs to Service {owner}", describe(frontend))]
    Taken {
        /// What both want.
        frontend: FrontendId,
        /// Who has it.
        owner: ObjectName,
    },
}

fn describe(id: &FrontendId) -> String {
    match id.address {
        FrontendAddress::Ip(address) => format!("{} {}", id.protocol, std::net::SocketAddr::new(address, id.port)),
        FrontendAddress::NodePortV4 | FrontendAddress::NodePortV6 => format!("{} node port {}", id.protocol, id.port),
    }
}

/// What [`Syncer::apply`] wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Frontend entries created or replaced.
    pub frontends: usize,
    /// Frontend entries deleted.
    pub deleted: usize,
    /// Slots written.
    pub slots: usize,
    /// One line each, for the log.
    pub warnings: Vec<String>,
}

/// One Service as it is in the maps.
#[derive(Debug)]
struct ServiceState {
    /// [`layout::Frontend::service`].
    number: u32,
    /// Whether the source has named it since this agent started; else it is known from the maps only.
    live: bool,
    /// Its entries and their slots; `None` without slots, or with slots that are not its own.
    frontends: BTreeMap<FrontendId, Option<SlotRange>>,
    /// Ids of its backends, those included that get no new flows.
    backends: HashMap<BackendKey, u32>,
    /// Ids of endpoints that went, as long as flows may name them: for those that come back.
    gone: HashMap<BackendKey, u32>,
    /// Those of `backends` that do not serve.
    resting: HashSet<u32>,
    /// Its source ranges.
    source_ranges: BTreeSet<IpNet>,
    /// Ids found in its slots at start that no backend has claimed yet.
    unclaimed: HashSet<u32>,
}

/// Port index, address and port.
type BackendKey = (usize, std::net::IpAddr, u16);

impl ServiceState {
    fn new(number: u32) -> Self {
        Self {
            number,
            live: false,
            frontends: BTreeMap::new(),
            backends: HashMap::new(),
            gone: HashMap::new(),
            resting: HashSet::new(),
            source_ranges: BTreeSet::new(),
            unclaimed: HashSet::new(),
        }
    }

    fn ranges(&self) -> HashSet<(FamilyIndex, SlotRange)> {
        self.frontends
            .iter()
            .filter_map(|(id, range)| Some((FamilyIndex::of(id), (*range)?)))
            .collect()
    }
}

/// Frontends that share slots.
struct Group<'a> {
    family: FamilyIndex,
    port_index: usize,
    table: Table,
    backends: &'a BackendSet,
    frontends: Vec<&'a Frontend>,
}

/// The only writer of frontends, slots, backends, services and filter.
pub struct Syncer {
    maps: Arc<Maps>,
    slots: [SlotAllocator; 2],
    members: Members,
    ids: BackendIds,
    addresses: Addresses,
    services: HashMap<ObjectName, ServiceState>,
    /// Who has which entry.
    owners: HashMap<FrontendId, ObjectName>,
    next_number: u32,
    failed: BTreeSet<ObjectName>,
    grace: Duration,
}

impl Syncer {
    /// Reads the pinned maps back as the base of all differences.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(maps: Arc<Maps>) -> Result<Self, MapError> {
        Self::with_grace(maps, slots::GRACE)
    }

    fn with_grace(maps: Arc<Maps>, grace: Duration) -> Result<Self, MapError> {
        let mut services: HashMap<ObjectName, ServiceState> = HashMap::new();
        let mut names: HashMap<u32, ObjectName> = HashMap::new();
        let mut known = maps.services.entries()?;
        known.sort_by_key(|&(number, _)| number);
        let mut next_number = known.last().map_or(1, |&(number, _)| number.wrapping_add(1));
        for (number, info) in known {
            let name = ObjectName::new(&name_str(&info.namespace), &name_str(&info.name));
            if services.contains_key(&name) {
                maps.services.delete(&number)?;
            } else {
                services.insert(name.clone(), ServiceState::new(number));
            }
            names.insert(number, name);
        }

        let mut slots = FamilyIndex::ALL.map(|family| SlotAllocator::new(maps.table(family).slots(), grace));
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
                // A number without a name: only an agent of another making leaves that. Pruned like any unknown Service.
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

        // Members of ranges that no frontend with affinity names, and source ranges of nobody: an agent was killed.
        let mut members = Members::new(&maps)?;
        let begun: Vec<_> = members.bases().filter(|base| !affine.contains(base)).collect();
        for base in begun {
            members.release(base, Instant::now() + grace);
        }
        let mut by_number: HashMap<u32, &mut ServiceState> =
            services.values_mut().map(|state| (state.number, state)).collect();
        for family in FamilyIndex::ALL {
            for (number, range) in maps.table(family).source_ranges()? {
                match by_number.get_mut(&number) {
                    Some(state) => drop(state.source_ranges.insert(range)),
                    None => maps.table(family).remove_source_range(number, range)?,
                }
            }
        }

        // A state that is not all zero and that no slot names belonged to a backend that flows may still name.
        let mut resting = HashSet::new();
        maps.backends.for_each_batch(|ids, states| {
            let once_used = ids
                .iter()
                .zip(states)
                .filter(|&(_, state)| *state != BackendState::default());
            resting.extend(once_used.map(|(&id, _)| id).filter(|id| !used_ids.contains(id)));
            Ok(())
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

    /// The maps this writes to.
    pub fn maps(&self) -> &Arc<Maps> {
        &self.maps
    }

    /// Widens a configuration that is to be written to all cluster IPs that are in the maps.
    pub fn cover(&self, config: &mut layout::Config) {
        self.addresses.cover(config);
    }

    /// Number of Services that have entries, and of live backends (one per Service port and endpoint).
    pub fn counts(&self) -> (usize, usize) {
        (self.services.len(), self.ids.used())
    }

    /// Services whose last [`Self::apply`] failed: to be planned and applied again when something was freed, and after
    /// [`slots::GRACE`].
    pub fn failed(&self) -> &BTreeSet<ObjectName> {
        &self.failed
    }

    /// Brings one Service's entries to its plan. A plan without frontends removes the Service. Writes nothing when the
    /// maps are as they should be. Costs what the Service has, whatever else is in the maps.
    ///
    /// # Errors
    /// The first thing that did not fit. Every frontend then either is as planned or stays as it was, and the Service is
    /// in [`Self::failed`].
    pub fn apply(&mut self, plan: &ServicePlan) -> Result<Applied, SyncError> {
        let mut applied = Applied::default();
        let result = self.apply_inner(plan, &mut applied);
        match result {
            Ok(()) => {
                self.failed.remove(&plan.service);
                Ok(applied)
            }
            Err(cause) => {
                self.failed.insert(plan.service.clone());
                Err(SyncError {
                    service: plan.service.clone(),
                    cause,
                })
            }
        }
    }

    /// Removes a Service's entries.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&mut self, service: &ObjectName) -> Result<Applied, SyncError> {
        self.apply(&ServicePlan::empty(service.clone()))
    }

    /// Removes every Service that `keep` says no to. To be called only when the source has told everything there is
    /// ([`Event::Complete`](crate::object::Event::Complete)): what was not named yet is not gone.
    ///
    /// # Errors
    /// The kernel's; the others are removed nevertheless.
    pub fn prune(&mut self, keep: impl Fn(&ObjectName) -> bool) -> Result<Applied, SyncError> {
        let gone: Vec<_> = self.services.keys().filter(|name| !keep(name)).cloned().collect();
        let mut total = Applied::default();
        let mut first_error = None;
        for name in gone {
            match self.remove(&name) {
                Ok(applied) => total.deleted += applied.deleted,
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        self.failed.retain(|name| keep(name));
        if let Err(error) = self.addresses.prune(&self.maps) {
            first_error = first_error.or(Some(SyncError {
                service: ObjectName::new("", "(gone)"),
                cause: error.into(),
            }));
        }
        first_error.map_or(Ok(total), Err)
    }

    /// Tells which backend ids a complete walk over all flows found; those of removed backends that it did not find, and
    /// that were removed before it began, are used again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reclaim(&mut self, started: Instant, referenced: &IdSet) -> Result<usize, MapError> {
        let reclaimed = self.ids.reclaim(started, referenced);
        for id in &reclaimed {
            self.maps.backends.set(id, &BackendState::default())?;
            self.maps.forget_traffic(*id)?;
        }
        Ok(reclaimed.len())
    }

    fn apply_inner(&mut self, plan: &ServicePlan, applied: &mut Applied) -> Result<(), Cause> {
        let mut state = match self.services.remove(&plan.service) {
            Some(state) => state,
            None if plan.frontends.is_empty() => return Ok(()),
            None => self.introduce(&plan.service)?,
        };
        let mut result = self.bring_to(plan, &mut state, applied);
        // Last: an address that is known refuses the ports that are not there yet.
        if let Err(error) = self.addresses.bring(&self.maps, plan) {
            result = result.and(Err(error.into()));
        }
        if state.frontends.is_empty() && plan.frontends.is_empty() && result.is_ok() {
            self.maps.services.delete(&state.number)?;
        } else {
            self.services.insert(plan.service.clone(), state);
        }
        result
    }

    /// A number and a `services` entry for a new Service.
    fn introduce(&mut self, name: &ObjectName) -> Result<ServiceState, Cause> {
        let number = self.next_number;
        let info = ServiceInfo {
            namespace: name_bytes(&name.namespace),
            name: name_bytes(&name.name),
        };
        self.maps.services.set(&number, &info)?;
        // After four thousand million Services the numbers begin again; those of the first are long gone.
        self.next_number = number.wrapping_add(1).max(1);
        Ok(ServiceState::new(number))
    }

    fn bring_to(&mut self, plan: &ServicePlan, state: &mut ServiceState, applied: &mut Applied) -> Result<(), Cause> {
        let maps = self.maps.clone();
        let before = state.ranges();
        let mut error: Option<Cause> = None;
        self.members.collect(&maps, Instant::now())?;
        // New sources before anyone is asked for his.
        for &range in plan.source_ranges.difference(&state.source_ranges.clone()) {
            match maps
                .table(FamilyIndex::of_address(range.addr()))
                .add_source_range(state.number, range)
            {
                Ok(()) => drop(state.source_ranges.insert(range)),
                Err(cause) => drop(error.get_or_insert(cause.into())),
            }
        }

        let mut wanted: Vec<&Frontend> = Vec::with_capacity(plan.frontends.len());
        for frontend in &plan.frontends {
            match self.taken_by_other(&plan.service, frontend) {
                Some(owner) => {
                    error.get_or_insert(Cause::Taken {
                        frontend: frontend.id,
                        owner,
                    });
                }
                None => wanted.push(frontend),
            }
        }
        if !state.live {
            claim_ids(&maps, state, &wanted)?;
        }

        // Filter bits, backends and slots: nothing that a packet sees yet.
        let mut entries: Vec<(FrontendId, layout::Frontend)> = Vec::with_capacity(wanted.len());
        let mut fresh: Vec<(FamilyIndex, SlotRange)> = Vec::new();
        let mut affine: HashSet<(FamilyIndex, u32)> = HashSet::new();
        for group in group(&wanted) {
            let range = match self.slots_for(&group, state, &before, &mut fresh, applied) {
                Ok(range) => self.ensure_members(&group, range).map(|()| range).map_err(Cause::from),
                Err(cause) => Err(cause),
            };
            let range = match range {
                Ok(range) => range,
                Err(cause) => {
                    error.get_or_insert(cause);
                    continue;
                }
            };
            for frontend in group.frontends {
                maps.table(group.family).admit_frontend(&maps.filter, &frontend.id);
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
                    affine.insert((group.family, range.base));
                }
                entries.push((frontend.id, value));
            }
        }

        // The switch, one entry at a time; what does not fit is tried again once the gone entries have made room.
        let mut refused = Vec::new();
        for (id, value) in entries {
            if let Err(cause) = self.put(&plan.service, state, id, value, applied) {
                refused.push((id, value, cause));
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
            match maps.table(FamilyIndex::of(&id)).delete(&id) {
                Ok(_) => {
                    applied.deleted += 1;
                    state.frontends.remove(&id);
                    self.owners.remove(&id);
                }
                Err(cause) => drop(error.get_or_insert(cause.into())),
            }
        }
        for (id, value, _) in refused {
            if let Err(cause) = self.put(&plan.service, state, id, value, applied) {
                error.get_or_insert(cause.into());
            }
        }

        // What nothing names any more.
        let now = Instant::now();
        let after = state.ranges();
        for &(family, range) in before.difference(&after) {
            self.slots[family as usize].release(range, now);
        }
        for &(family, range) in before.union(&after) {
            // What failed keeps the slots and the members that it had.
            let kept = after.contains(&(family, range)) && error.is_some();
            if !kept && !affine.contains(&(family, range.base)) {
                self.members.release((family, range.base), now + self.grace);
            }
        }
        for (family, range) in fresh {
            if !after.contains(&(family, range)) {
                self.slots[family as usize].give_back(range);
                self.members.release((family, range.base), now);
            }
        }
        for range in state
            .source_ranges
            .extract_if(.., |range| !plan.source_ranges.contains(range))
        {
            let table = maps.table(FamilyIndex::of_address(range.addr()));
            if let Err(cause) = table.remove_source_range(state.number, range) {
                error.get_or_insert(cause.into());
            }
        }
        state.live = true;
        if let Some(cause) = error {
            return Err(cause);
        }
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
                set_flags(&maps, id, flags)?;
            }
            match flags {
                0 => state.resting.insert(id),
                _ => state.resting.remove(&id),
            };
        }
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

    /// The slots of a group: the range that holds them already, or a fresh one. `None` for a group without backends.
    fn slots_for(
        &mut self,
        group: &Group<'_>,
        state: &mut ServiceState,
        existing: &HashSet<(FamilyIndex, SlotRange)>,
        fresh: &mut Vec<(FamilyIndex, SlotRange)>,
        applied: &mut Applied,
    ) -> Result<Option<SlotRange>, Cause> {
        if group.backends.is_empty() {
            return Ok(None);
        }
        let maps = self.maps.clone();
        let table = maps.table(group.family);
        let backends = self.choices(group, state)?;
        for protocol in group
            .frontends
            .iter()
            .map(|frontend| frontend.id.protocol)
            .collect::<BTreeSet<_>>()
        {
            for backend in group.backends.iter() {
                table.admit_backend(&maps.filter, backend.address, backend.port, protocol);
            }
        }

        let lens = table_lens(group.table, backends.len());
        for &len in &lens {
            let content = fill(table, group, &backends, len);
            let holds = |range: &SlotRange| {
                range.len as usize == content.len()
                    && content
                        .iter()
                        .zip(range.base..)
                        .all(|(choice, i)| table.slot(i) == Some(*choice))
            };
            let of_family = existing
                .iter()
                .chain(&*fresh)
                .filter(|(family, _)| *family == group.family);
            if let Some((_, range)) = of_family.into_iter().find(|(_, range)| holds(range)) {
                return Ok(Some(*range));
            }
            let Some(range) = self.slots[group.family as usize].allocate(content.len() as u32, Instant::now()) else {
                continue;
            };
            for (choice, index) in content.iter().zip(range.base..) {
                table.set_slot(index, choice);
            }
            applied.slots += content.len();
            fresh.push((group.family, range));
            if len != lens[0] {
                applied.warnings.push(format!(
                    "map {} has no {} consecutive free slots for a full Maglev table, {len} are used: backend changes will \
                     move more flows; a larger {} helps",
                    group.family.slots_name(),
                    lens[0],
                    settings::MAX_SLOTS,
                ));
            }
            return Ok(Some(range));
        }
        let allocator = &self.slots[group.family as usize];
        Err(Cause::Slots {
            map: group.family.slots_name(),
            needed: lens.last().copied().unwrap_or_default(),
            free: allocator.free(),
            capacity: table.slots(),
        })
    }

    /// Writes down which backends a range holds, if a frontend of the group has affinity.
    fn ensure_members(&mut self, group: &Group<'_>, range: Option<SlotRange>) -> Result<(), MapError> {
        let is_affine = |frontend: &&Frontend| frontend.flags & FRONTEND_AFFINITY != 0;
        match range {
            Some(range) if group.frontends.iter().any(is_affine) => {
                self.members
                    .ensure(self.maps.clone().table(group.family), group.family, range)
            }
            _ => Ok(()),
        }
    }

    /// The group's backends with their ids, allocated where they have none yet.
    fn choices(&mut self, group: &Group<'_>, state: &mut ServiceState) -> Result<Vec<Choice>, Cause> {
        let choice = |&Backend { address, port, local }: &Backend| {
            let key = (group.port_index, address, port);
            let id = match state.backends.get(&key) {
                Some(&id) => id,
                None if let Some(id) = state.gone.remove(&key).filter(|&id| self.ids.take_back(id)) => {
                    set_flags(&self.maps, id, BACKEND_SERVING)?;
                    state.backends.insert(key, id);
                    id
                }
                None => {
                    let id = self.ids.allocate().ok_or_else(|| Cause::Backends {
                        capacity: self.maps.backends.capacity(),
                        used: self.ids.used(),
                    })?;
                    let new = BackendState {
                        flags: BACKEND_SERVING,
                        ..Default::default()
                    };
                    self.maps.backends.set(&id, &new)?;
                    state.backends.insert(key, id);
                    id
                }
            };
            Ok(Choice {
                address,
                port,
                local,
                id,
            })
        };
        group.backends.iter().map(choice).collect()
    }
}

/// Writes a backend's flags if they differ. A flow that is counted in between may be lost to the count.
fn set_flags(maps: &Maps, id: u32, flags: u16) -> Result<(), MapError> {
    let state = maps.backends.get(&id)?.unwrap_or_default();
    if state.flags != flags {
        maps.backends.set(&id, &BackendState { flags, ..state })?;
    }
    Ok(())
}

/// After a restart: gives the ids in a Service's slots back to its backends, so that counters and flows keep their meaning.
fn claim_ids(maps: &Maps, state: &mut ServiceState, wanted: &[&Frontend]) -> Result<(), MapError> {
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
            if let std::collections::hash_map::Entry::Vacant(entry) = state.backends.entry(key) {
                entry.insert(choice.id);
                state.unclaimed.remove(&choice.id);
                let now = maps.backends.get(&choice.id)?.unwrap_or_default();
                if now.flags != BACKEND_SERVING {
                    let flags = BACKEND_SERVING;
                    maps.backends.set(&choice.id, &BackendState { flags, ..now })?;
                }
            }
        }
    }
    Ok(())
}

/// Frontends by what their slots must hold.
fn group<'a>(frontends: &[&'a Frontend]) -> Vec<Group<'a>> {
    let mut index: HashMap<(FamilyIndex, usize, Table, &BackendSet), usize> = HashMap::new();
    let mut groups: Vec<Group<'a>> = Vec::new();
    for frontend in frontends {
        let family = FamilyIndex::of(&frontend.id);
        let key = (family, frontend.port_index, frontend.table, &frontend.backends);
        let at = *index.entry(key).or_insert(groups.len());
        if at == groups.len() {
            groups.push(Group {
                family,
                port_index: frontend.port_index,
                table: frontend.table,
                backends: &frontend.backends,
                frontends: Vec::new(),
            });
        }
        groups[at].frontends.push(frontend);
    }
    groups
}

/// How many slots to ask for, best first: Maglev does with a smaller table, and in the end without one.
fn table_lens(table: Table, backends: usize) -> Vec<u32> {
    let mut lens = Vec::new();
    if table == Table::Maglev {
        let mut wanted = backends;
        loop {
            let len = maglev::table_size(wanted);
            if len as usize > backends && lens.last() != Some(&len) {
                lens.push(len);
            }
            if wanted <= 1 {
                break;
            }
            wanted /= 2;
        }
    }
    lens.push(backends as u32);
    lens
}

/// The content of a range of `len` slots: the backends themselves, or a Maglev table of them.
fn fill(table: &dyn FrontendTable, group: &Group<'_>, backends: &[Choice], len: u32) -> Vec<Choice> {
    if len as usize == backends.len() {
        return backends.to_vec();
    }
    let protocol = group.frontends[0].id.protocol;
    let identities: Vec<u64> = backends
        .iter()
        .map(|backend| table.identity(backend.address, backend.port, protocol))
        .collect();
    let order = maglev::table(&identities, len);
    order.into_iter().map(|i| backends[i as usize]).collect()
}

#[cfg(test)]
mod tests;
