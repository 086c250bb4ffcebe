//! Brings the pinned maps to the plan, writing only differences, in an order that never leaves a
//! packet between two states.
//!
//! For one Service, in this order: source ranges, filter bits, backend states, new slots in a range
//! that no frontend names, their members, and then one update per frontend entry, which switches it
//! from the old range to the new. What is gone is deleted last. Several Services that change
//! together are each brought so far that only deletions are left, and then those are done: what one
//! of them gives up and another takes is one update of the entry, in whichever order they come
//! (SPEC L9). Old ranges rest for a grace period ([`slots`]), backend ids until no flow names them
//! ([`ids`]).
//!
//! The maps themselves are the base of the difference: slots are compared where they are mapped,
//! frontends are looked up. So a restarted agent that finds the maps as they should be writes
//! nothing, and an agent that was killed between two writes finishes what is missing.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use shunt_common::layout::{self, BackendState, ServiceInfo};

mod addresses;
mod apply;
pub mod direct;
mod error;
pub mod ids;
pub mod members;
pub mod node;
mod ranges;
mod restore;
pub mod slots;
mod state;
pub mod table;
#[cfg(test)]
mod tests;

use addresses::Addresses;
pub use error::{Cause, SyncError};
use ids::{BackendIds, IdSet};
use members::Members;
use slots::SlotAllocator;
use state::ServiceState;

use crate::{
    datapath::maps::{MapError, Maps, name_bytes},
    object::ObjectName,
    plan::{FrontendId, ServicePlan},
};

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
    /// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
    /// memory for a batch. Nothing has changed: try again.
    pub fn new(maps: Arc<Maps>) -> Result<Self, MapError> {
        Self::with_grace(maps, slots::GRACE)
    }

    /// The maps this writes to.
    pub fn maps(&self) -> &Arc<Maps> {
        &self.maps
    }

    /// Widens a configuration that is to be written to all cluster IPs that are in the maps.
    pub fn cover(&self, config: &mut layout::Config) {
        self.addresses.cover(config);
    }

    /// Number of Services that have entries, and of live backends (one per Service port and
    /// endpoint).
    pub fn counts(&self) -> (usize, usize) {
        (self.services.len(), self.ids.used())
    }

    /// Services whose last [`Self::apply`] failed: to be planned and applied again when something
    /// was freed, and after [`slots::GRACE`].
    pub fn failed(&self) -> &BTreeSet<ObjectName> {
        &self.failed
    }

    /// Brings one Service's entries to its plan. A plan without frontends removes the Service.
    /// Writes nothing when the maps are as they should be. Costs what the Service has, whatever
    /// else is in the maps.
    ///
    /// # Errors
    /// The first thing that did not fit. Every frontend then either is as planned or stays as it
    /// was, and the Service is in [`Self::failed`].
    pub fn apply(&mut self, plan: &ServicePlan) -> Result<Applied, SyncError> {
        let mut applied = Applied::default();
        let mut result = match self.begin(plan, &mut applied) {
            Ok(Some(change)) => self.finish(plan, change, &mut applied),
            Ok(None) => Ok(()),
            Err(cause) => Err(cause),
        };
        let touched = self.addresses.take(plan);
        result = result.and(self.write_addresses(touched));
        self.conclude(&plan.service, result).map(|()| applied)
    }

    /// Brings several Services to their plans, of which no two have a frontend in common. A
    /// frontend that one of them had and another has now changes its owner in one update. Returns
    /// what became of each, in their order.
    pub fn apply_all(
        &mut self,
        plans: impl IntoIterator<Item = ServicePlan>,
    ) -> Vec<(ObjectName, Result<Applied, SyncError>)> {
        struct Outcome {
            service: ObjectName,
            applied: Applied,
            result: Result<(), Cause>,
            touched: HashSet<IpAddr>,
        }
        let mut outcomes: Vec<Outcome> = Vec::new();
        let mut unfinished = Vec::new();
        for plan in plans {
            let mut applied = Applied::default();
            let mut waiting = None;
            let result = match self.begin(&plan, &mut applied) {
                // What did not fit needs the room that deletions make.
                Ok(Some(change)) if change.may_wait() => {
                    waiting = Some(change);
                    Ok(())
                }
                Ok(Some(change)) => self.finish(&plan, change, &mut applied),
                Ok(None) => Ok(()),
                Err(cause) => Err(cause),
            };
            outcomes.push(Outcome {
                service: plan.service.clone(),
                applied,
                result,
                touched: self.addresses.take(&plan),
            });
            if let Some(change) = waiting {
                unfinished.push((outcomes.len() - 1, plan, change));
            }
        }
        for (at, plan, change) in unfinished {
            let outcome = &mut outcomes[at];
            outcome.result = self.finish(&plan, change, &mut outcome.applied);
        }
        outcomes
            .into_iter()
            .map(|outcome| {
                let result = outcome.result.and(self.write_addresses(outcome.touched));
                let result = self
                    .conclude(&outcome.service, result)
                    .map(|()| outcome.applied);
                (outcome.service, result)
            })
            .collect()
    }

    fn conclude(
        &mut self,
        service: &ObjectName,
        result: Result<(), Cause>,
    ) -> Result<(), SyncError> {
        match result {
            Ok(()) => {
                self.failed.remove(service);
                Ok(())
            }
            Err(cause) => {
                self.failed.insert(service.clone());
                Err(SyncError {
                    service: service.clone(),
                    cause,
                })
            }
        }
    }

    /// To be called after the frontends are in the maps: an address that is known refuses the ports
    /// that are not there yet.
    fn write_addresses(&mut self, touched: HashSet<IpAddr>) -> Result<(), Cause> {
        let mut result = Ok(());
        // One that does not fit must not keep the others out.
        for address in touched {
            result = result.and(self.addresses.write(&self.maps, address));
        }
        Ok(result?)
    }

    /// Removes a Service's entries.
    ///
    /// # Errors
    /// `SyncError` when a map cannot be read or written; the maps are as before or half changed,
    /// never without a frontend that stays: apply it again.
    pub fn remove(&mut self, service: &ObjectName) -> Result<Applied, SyncError> {
        self.apply(&ServicePlan::empty(service.clone()))
    }

    /// Removes every Service that `keep` says no to. To be called only when the source has told
    /// everything there is ([`Event::Complete`](crate::object::Event::Complete)): what was not
    /// named yet is not gone.
    ///
    /// # Errors
    /// The kernel's; the others are removed nevertheless.
    pub fn prune(&mut self, keep: impl Fn(&ObjectName) -> bool) -> Result<Applied, SyncError> {
        let gone: Vec<_> = self
            .services
            .keys()
            .filter(|name| !keep(name))
            .cloned()
            .collect();
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

    /// Tells which backend ids a complete walk over all flows found; those of removed backends that
    /// it did not find, and that were removed before it began, are used again.
    ///
    /// # Errors
    /// `MapError::Kernel` when an entry cannot be deleted: `EPERM` without `CAP_BPF`. What was
    /// deleted before stays so: call it again.
    pub fn reclaim(&mut self, started: Instant, referenced: &IdSet) -> Result<usize, MapError> {
        let reclaimed = self.ids.reclaim(started, referenced);
        for id in &reclaimed {
            self.maps.backends.set(id, &BackendState::default())?;
            self.maps.forget_traffic(*id)?;
        }
        Ok(reclaimed.len())
    }

    /// A number and a `services` entry for a new Service.
    fn introduce(&mut self, name: &ObjectName) -> Result<ServiceState, Cause> {
        let number = self.next_number;
        let info = ServiceInfo {
            namespace: name_bytes(&name.namespace),
            name: name_bytes(&name.name),
        };
        self.maps.services.set(&number, &info)?;
        // After four thousand million Services the numbers begin again; those of the first are long
        // gone.
        self.next_number = number.wrapping_add(1).max(1);
        Ok(ServiceState::new(number))
    }
}
