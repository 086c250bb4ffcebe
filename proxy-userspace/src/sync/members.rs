//! Which backends stand among a frontend's slots: what session affinity asks before it keeps a
//! client's backend (`set_members*`, see [`shunt_common::affinity`]).
//!
//! The entries of a range of slots are written before a frontend names it. They rest as long as the
//! slots do when it no longer is: a program that has just read the frontend still asks for them.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Instant,
};

use shunt_common::layout::MemberKey;

use super::{
    slots::SlotRange,
    table::{FamilyIndex, FrontendTable},
};
use crate::datapath::maps::{Maps, Result};

/// Family and first slot: whose members they are.
type Base = (FamilyIndex, u32);

/// The entries of both `members` maps.
#[derive(Debug, Default)]
pub struct Members {
    /// Backend ids and their first slots.
    known: HashMap<Base, BTreeMap<u32, u32>>,
    /// What no frontend names any more, oldest first, and when it may go.
    resting: VecDeque<(Instant, Base)>,
}

impl Members {
    /// Reads the maps back.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
    /// memory for a batch. Nothing has changed: try again.
    pub fn new(maps: &Maps) -> Result<Self> {
        let mut known: HashMap<Base, BTreeMap<u32, u32>> = HashMap::new();
        for family in FamilyIndex::ALL {
            for (key, index) in maps.table(family).members().entries()? {
                known
                    .entry((family, key.slot_base))
                    .or_default()
                    .insert(key.backend, index);
            }
        }
        Ok(Self {
            known,
            resting: VecDeque::new(),
        })
    }

    /// First slots whose members are known.
    pub fn bases(&self) -> impl Iterator<Item = Base> {
        self.known.keys().copied()
    }

    /// Makes the members of a range those that its slots hold, and keeps them.
    ///
    /// # Errors
    /// The map is full, or the kernel's.
    pub fn ensure(
        &mut self,
        table: &dyn FrontendTable,
        family: FamilyIndex,
        range: SlotRange,
    ) -> Result<()> {
        let base = (family, range.base);
        self.resting.retain(|(_, resting)| *resting != base);
        let mut wanted = BTreeMap::new();
        for index in range.base..range.base + range.len {
            if let Some(choice) = table.slot(index) {
                wanted.entry(choice.id).or_insert(index);
            }
        }
        let known = self.known.entry(base).or_default();
        let slot_base = range.base;
        for (&backend, &index) in &wanted {
            if known.get(&backend) != Some(&index) {
                table
                    .members()
                    .set(&MemberKey { slot_base, backend }, &index)?;
                known.insert(backend, index);
            }
        }
        // Left by the range that began here before.
        for (backend, _) in known.extract_if(.., |backend, _| !wanted.contains_key(backend)) {
            table.members().delete(&MemberKey { slot_base, backend })?;
        }
        Ok(())
    }

    /// No frontend with affinity names this range from now on; its members may go at `when`.
    pub fn release(&mut self, base: Base, when: Instant) {
        if self.known.contains_key(&base)
            && !self.resting.iter().any(|(_, resting)| *resting == base)
        {
            self.resting.push_back((when, base));
        }
    }

    /// Deletes what has rested long enough.
    ///
    /// # Errors
    /// `MapError::Kernel` when an entry cannot be deleted: `EPERM` without `CAP_BPF`. What was
    /// deleted before stays so: call it again.
    pub fn collect(&mut self, maps: &Maps, now: Instant) -> Result<()> {
        while let Some(&(when, base)) = self.resting.front()
            && when <= now
        {
            self.resting.pop_front();
            let (family, slot_base) = base;
            for backend in self.known.remove(&base).unwrap_or_default().into_keys() {
                maps.table(family)
                    .members()
                    .delete(&MemberKey { slot_base, backend })?;
            }
        }
        Ok(())
    }
}
