//! What slots hold: the backends of frontends that have the same, as they are or as a Maglev table.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    time::Instant,
};

use shunt_common::{
    family::{Family, V4, V6},
    hash,
    layout::{BACKEND_SERVING, BackendState, FRONTEND_AFFINITY},
    maglev,
};

use super::{
    Applied, Cause, Syncer,
    slots::SlotRange,
    state::ServiceState,
    table::{Choice, FamilyIndex, FrontendTable},
};
use crate::{
    datapath::maps::{MapError, Maps, settings},
    plan::{Backend, BackendSet, Frontend, Table},
};

/// Frontends that share slots.
pub(super) struct Group<'a> {
    pub(super) family: FamilyIndex,
    port_index: usize,
    table: Table,
    backends: &'a BackendSet,
    pub(super) frontends: Vec<&'a Frontend>,
}

impl Syncer {
    /// The slots of a group: the range that holds them already, or a fresh one. `None` for a group
    /// without backends.
    pub(super) fn slots_for(
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
            let Some(range) =
                self.slots[group.family as usize].allocate(content.len() as u32, Instant::now())
            else {
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
    pub(super) fn ensure_members(
        &mut self,
        group: &Group<'_>,
        range: Option<SlotRange>,
    ) -> Result<(), MapError> {
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
    fn choices(
        &mut self,
        group: &Group<'_>,
        state: &mut ServiceState,
    ) -> Result<Vec<Choice>, Cause> {
        let choice = |&Backend {
                          address,
                          port,
                          local,
                      }: &Backend| {
            let key = (group.port_index, address, port);
            let id = match state.backends.get(&key) {
                Some(&id) => id,
                None if let Some(id) =
                    state.gone.remove(&key).filter(|&id| self.ids.take_back(id)) =>
                {
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
                        identity: identity(address, port),
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

/// Frontends by what their slots must hold.
pub(super) fn group(frontends: &[Frontend]) -> Vec<Group<'_>> {
    let mut index: HashMap<(FamilyIndex, usize, Table, &BackendSet), usize> = HashMap::new();
    let mut groups: Vec<Group<'_>> = Vec::new();
    for frontend in frontends {
        let family = FamilyIndex::of(&frontend.id);
        let key = (
            family,
            frontend.port_index,
            frontend.table,
            &frontend.backends,
        );
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

/// How many slots to ask for, best first: Maglev does with a smaller table, and in the end without
/// one.
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
fn fill(
    table: &dyn FrontendTable,
    group: &Group<'_>,
    backends: &[Choice],
    len: u32,
) -> Vec<Choice> {
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

/// [`BackendState::identity`].
fn identity(address: IpAddr, port: u16) -> u32 {
    match address {
        IpAddr::V4(ip) => hash::backend::<V4>(V4::words(ip.octets()), port),
        IpAddr::V6(ip) => hash::backend::<V6>(V6::words(ip.octets()), port),
    }
}

/// Writes a backend's flags if they differ. A flow that is counted in between may be lost to the
/// count.
pub(super) fn set_flags(maps: &Maps, id: u32, flags: u16) -> Result<(), MapError> {
    let state = maps.backends.get(&id)?.unwrap_or_default();
    if state.flags != flags {
        maps.backends.set(&id, &BackendState { flags, ..state })?;
    }
    Ok(())
}
