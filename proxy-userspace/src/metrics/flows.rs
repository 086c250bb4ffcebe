//! What Services got, summed over their backends, from counters in the kernel that come and go with these.
//!
//! A backend's counters begin at zero when its id is given to another, so sums are kept here and grow by differences: they
//! never go back while the agent runs. Only backends that were sent something are looked at, of which a node has few.

use std::collections::{BTreeMap, HashMap, HashSet};

use shunt_common::layout::BackendState;

use crate::{
    datapath::maps::{Maps, Result, name_str},
    object::{ObjectName, Protocol},
    plan::FrontendAddress,
    sync::table::FamilyIndex,
};

/// A port of a Service, as its clients dial it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServicePort {
    /// The Service.
    pub service: ObjectName,
    /// Its port; the node port where there is no other.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
}

/// New flows by the hook that chose the backend: socket, tc, XDP.
pub type Flows = [u64; 3];

/// Names of the hooks, in the order of [`Flows`].
pub const HOOKS: [&str; 3] = ["socket", "tc", "xdp"];

fn flows(state: &BackendState) -> Flows {
    [state.socket_flows, state.tc_flows, state.xdp_flows]
}

/// The sums, and what they were made from.
#[derive(Debug, Default)]
pub struct Totals {
    /// What each backend id had last time, and whose it was.
    counted: HashMap<u32, (ServicePort, Flows)>,
    sums: BTreeMap<ServicePort, Flows>,
    silent: BTreeMap<ServicePort, u64>,
}

impl Totals {
    /// Reads the maps, and adds what is new. Services that are gone leave.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(&mut self, maps: &Maps) -> Result<()> {
        let (mut seen, mut silent) = (Vec::new(), Vec::new());
        maps.backends.for_each_batch(|ids, states| {
            let used = ids.iter().zip(states).map(|(&id, state)| (id, flows(state)));
            seen.extend(used.filter(|(_, flows)| *flows != Flows::default()));
            let failed = ids.iter().zip(states).filter(|(_, state)| state.failures != 0);
            silent.extend(failed.map(|(&id, _)| id));
            Ok(())
        })?;
        let names: HashMap<u32, ObjectName> = maps
            .services
            .entries()?
            .into_iter()
            .map(|(number, info)| {
                let name = ObjectName::new(&name_str(&info.namespace), &name_str(&info.name));
                (number, name)
            })
            .collect();
        let owners = owners(maps, &names, &seen.iter().map(|&(id, _)| id).collect())?;
        self.add(seen, &owners);
        self.silent.clear();
        for port in silent.iter().filter_map(|id| owners.get(id)) {
            *self.silent.entry(port.clone()).or_default() += 1;
        }
        let known: HashSet<&ObjectName> = names.values().collect();
        self.sums.retain(|port, _| known.contains(&port.service));
        Ok(())
    }

    /// New flows of every Service port that was dialled.
    pub fn flows(&self) -> &BTreeMap<ServicePort, Flows> {
        &self.sums
    }

    /// Backends of a Service port that did not answer when they were last sent a connection.
    pub fn silent(&self, port: &ServicePort) -> u64 {
        self.silent.get(port).copied().unwrap_or(0)
    }

    fn add(&mut self, seen: Vec<(u32, Flows)>, owners: &HashMap<u32, ServicePort>) {
        let mut counted = HashMap::with_capacity(seen.len());
        for (id, now) in seen {
            let before = self.counted.remove(&id);
            // A backend that was taken out has no frontend any more, and may still get what was on its way.
            let Some(port) = owners.get(&id).or(before.as_ref().map(|(port, _)| port)).cloned() else {
                continue;
            };
            let base = match before {
                Some((was, then)) if was == port && then.iter().zip(now).all(|(&then, now)| then <= now) => then,
                // The id was somebody else's before.
                _ => Flows::default(),
            };
            let sum = self.sums.entry(port.clone()).or_default();
            for hook in 0..sum.len() {
                sum[hook] += now[hook] - base[hook];
            }
            counted.insert(id, (port, now));
        }
        self.counted = counted;
    }
}

/// Whose the backends are that `wanted` names.
fn owners(maps: &Maps, names: &HashMap<u32, ObjectName>, wanted: &HashSet<u32>) -> Result<HashMap<u32, ServicePort>> {
    let mut owners = HashMap::new();
    for family in FamilyIndex::ALL {
        let table = maps.table(family);
        let mut entries = table.entries()?;
        // Node ports last: other frontends of the same slots say what the Service's own port is.
        entries.sort_by_key(|(id, _)| !matches!(id.address, FrontendAddress::Ip(_)));
        let mut read = HashSet::new();
        for (id, entry) in entries {
            let Some(service) = names.get(&entry.service) else {
                continue;
            };
            if !read.insert((entry.slot_base, entry.slot_count)) {
                continue;
            }
            let end = entry.slot_base.saturating_add(entry.slot_count);
            for slot in (entry.slot_base..end).map_while(|index| table.slot(index)) {
                if wanted.contains(&slot.id) {
                    owners.entry(slot.id).or_insert_with(|| ServicePort {
                        service: service.clone(),
                        port: id.port,
                        protocol: id.protocol,
                    });
                }
            }
        }
    }
    Ok(owners)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str) -> ServicePort {
        ServicePort {
            service: ObjectName::new("shop", name),
            port: 80,
            protocol: Protocol::Tcp,
        }
    }

    /// A2: a Service's counter never goes back, whatever becomes of its backends and their ids.
    #[test]
    fn sums_only_grow() {
        let mut totals = Totals::default();
        let web = HashMap::from([(1, port("web")), (2, port("web"))]);
        totals.add(vec![(1, [5, 0, 0]), (2, [2, 1, 0])], &web);
        assert_eq!(totals.sums[&port("web")], [7, 1, 0]);
        totals.add(vec![(1, [6, 0, 0]), (2, [2, 1, 4])], &web);
        assert_eq!(totals.sums[&port("web")], [8, 1, 4]);
        // Taken out, and it gets one more; then its id is free, and given to another Service.
        let web = HashMap::from([(2, port("web"))]);
        totals.add(vec![(1, [7, 0, 0]), (2, [2, 1, 4])], &web);
        assert_eq!(totals.sums[&port("web")], [9, 1, 4]);
        let both = HashMap::from([(1, port("api")), (2, port("web"))]);
        totals.add(vec![(1, [9, 0, 0]), (2, [2, 1, 4])], &both);
        assert_eq!(totals.sums[&port("web")], [9, 1, 4]);
        assert_eq!(totals.sums[&port("api")], [9, 0, 0]);
        // Given back and used again by the same Service.
        totals.add(vec![(2, [1, 0, 0])], &both);
        assert_eq!(totals.sums[&port("web")], [10, 1, 4]);
        // Of an id that nobody knows, as before the first look at its Service.
        totals.add(vec![(9, [3, 0, 0])], &both);
        assert_eq!(totals.sums.len(), 2);
    }
}
