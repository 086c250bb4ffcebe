//! What is known of a Service's entries.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{slots::SlotRange, table::FamilyIndex};
use crate::plan::FrontendId;

/// One Service as it is in the maps.
#[derive(Debug)]
pub(super) struct ServiceState {
    /// [`Frontend::service`](shunt_common::layout::Frontend::service).
    pub(super) number: u32,
    /// Whether the source has named it since this agent started; else it is known from the maps
    /// only.
    pub(super) live: bool,
    /// Whether its change has begun and is not finished.
    pub(super) is_unfinished: bool,
    /// Its entries and their slots; `None` without slots, or with slots that are not its own.
    pub(super) frontends: BTreeMap<FrontendId, Option<SlotRange>>,
    /// Ids of its backends, those included that get no new flows.
    pub(super) backends: HashMap<BackendKey, u32>,
    /// Ids of endpoints that went, as long as flows may name them: for those that come back.
    pub(super) gone: HashMap<BackendKey, u32>,
    /// Those of `backends` that do not serve.
    pub(super) resting: HashSet<u32>,
    /// Its source ranges.
    pub(super) source_ranges: BTreeSet<IpNet>,
    /// Ids found in its slots at start that no backend has claimed yet.
    pub(super) unclaimed: HashSet<u32>,
}

/// Port index, address and port.
pub(super) type BackendKey = (usize, IpAddr, u16);

impl ServiceState {
    pub(super) fn new(number: u32) -> Self {
        Self {
            number,
            live: false,
            is_unfinished: false,
            frontends: BTreeMap::new(),
            backends: HashMap::new(),
            gone: HashMap::new(),
            resting: HashSet::new(),
            source_ranges: BTreeSet::new(),
            unclaimed: HashSet::new(),
        }
    }

    pub(super) fn ranges(&self) -> HashSet<(FamilyIndex, SlotRange)> {
        self.frontends
            .iter()
            .filter_map(|(id, range)| Some((FamilyIndex::of(id), (*range)?)))
            .collect()
    }
}
