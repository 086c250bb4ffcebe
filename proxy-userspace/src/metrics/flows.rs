//! What Services got, summed over their backends, from counters in the kernel that come and go with
//! these.
//!
//! A backend's counters begin at zero when its id is given to another, so sums are kept here and
//! grow by differences: they never go back while the agent runs. Only backends that were sent
//! something are looked at, of which a node has few.

use std::collections::{BTreeMap, HashMap, HashSet};

use shunt_common::layout::{BackendState, Traffic};

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

/// What is counted of a Service port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// New flows by the hook that chose the backend, as in [`HOOKS`].
    pub flows: [u64; 3],
    /// Flows refused for lack of a source port.
    pub snat_refused: u64,
    /// What the packet path carried, where that is counted.
    pub traffic: Traffic,
}

/// Names of the hooks.
pub const HOOKS: [&str; 3] = ["socket", "tc", "xdp"];

impl Counts {
    fn new(state: &BackendState, traffic: Traffic) -> Self {
        Self {
            flows: [state.socket_flows, state.tc_flows, state.xdp_flows],
            snat_refused: state.snat_refused,
            traffic,
        }
    }

    fn numbers(&self) -> [u64; 8] {
        let [socket, tc, xdp] = self.flows;
        let Traffic {
            to_packets,
            to_bytes,
            from_packets,
            from_bytes,
        } = self.traffic;
        [
            socket,
            tc,
            xdp,
            to_packets,
            to_bytes,
            from_packets,
            from_bytes,
            self.snat_refused,
        ]
    }

    fn from_numbers(
        [
            socket,
            tc,
            xdp,
            to_packets,
            to_bytes,
            from_packets,
            from_bytes,
            snat_refused,
        ]: [u64; 8],
    ) -> Self {
        Self {
            flows: [socket, tc, xdp],
            snat_refused,
            traffic: Traffic {
                to_packets,
                to_bytes,
                from_packets,
                from_bytes,
            },
        }
    }

    /// What came on top of `before`; `None` where something is less than it was.
    fn since(&self, before: &Self) -> Option<Self> {
        let mut numbers = self.numbers();
        for (now, then) in numbers.iter_mut().zip(before.numbers()) {
            *now = now.checked_sub(then)?;
        }
        Some(Self::from_numbers(numbers))
    }

    fn plus(&self, more: &Self) -> Self {
        let mut numbers = self.numbers();
        numbers
            .iter_mut()
            .zip(more.numbers())
            .for_each(|(sum, more)| *sum += more);
        Self::from_numbers(numbers)
    }
}

/// The sums, and what they were made from.
#[derive(Debug)]
pub struct Totals {
    /// Most ports with sums of their own.
    limit: usize,
    /// What each backend id had last time, and whose it was.
    counted: HashMap<u32, (ServicePort, Counts)>,
    sums: BTreeMap<ServicePort, Counts>,
    quarantined: BTreeMap<ServicePort, u64>,
}

impl ServicePort {
    /// All that have no sums of their own.
    fn others() -> Self {
        Self {
            service: ObjectName::new("", ""),
            port: 0,
            protocol: Protocol::Tcp,
        }
    }

    /// Whether this is the sum of those that have none of their own.
    pub fn is_others(&self) -> bool {
        self.service.name.is_empty()
    }
}

impl Totals {
    /// Of at most so many ports; what the others get is summed too, so that sums grow only.
    pub fn new(limit: u32) -> Self {
        Self {
            limit: limit as usize,
            counted: HashMap::new(),
            sums: BTreeMap::new(),
            quarantined: BTreeMap::new(),
        }
    }

    /// How many backends had left connections unanswered, and not answered since, when the maps
    /// were read.
    pub fn quarantined(&self) -> &BTreeMap<ServicePort, u64> {
        &self.quarantined
    }

    /// Reads the maps, and adds what is new. Services that are gone leave.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
    /// memory for a batch. Nothing has changed: try again.
    pub fn read(&mut self, maps: &Maps) -> Result<()> {
        let (mut seen, mut silent) = (Vec::new(), Vec::new());
        let mut carried = HashMap::new();
        maps.for_each_traffic(|id, traffic| {
            carried.insert(id, traffic);
        })?;
        maps.backend_states().for_each(|id, state| {
            // Whoever had a packet has had a flow.
            if Counts::new(state, Traffic::default()) != Counts::default() {
                let traffic = carried.get(&id).copied().unwrap_or_default();
                seen.push((id, Counts::new(state, traffic)));
            }
            if state.failures != 0 {
                silent.push(id);
            }
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
        let wanted = seen.iter().map(|&(id, _)| id);
        let owners = owners(
            maps,
            &names,
            &wanted.chain(silent.iter().copied()).collect(),
        )?;
        self.add(seen, &owners);
        self.quarantined.clear();
        for port in silent.iter().filter_map(|id| owners.get(id)) {
            *self.quarantined.entry(self.row(port)).or_default() += 1;
        }
        let known: HashSet<&ObjectName> = names.values().collect();
        self.sums
            .retain(|port, _| port.is_others() || known.contains(&port.service));
        Ok(())
    }

    /// What each port got, as far as the maps were read.
    pub fn sums(&self) -> &BTreeMap<ServicePort, Counts> {
        &self.sums
    }

    /// Where a port is counted.
    fn row(&self, port: &ServicePort) -> ServicePort {
        let others = ServicePort::others();
        let taken = self.sums.len() - usize::from(self.sums.contains_key(&others));
        match self.sums.contains_key(port) || taken < self.limit {
            true => port.clone(),
            false => others,
        }
    }

    fn add(&mut self, seen: Vec<(u32, Counts)>, owners: &HashMap<u32, ServicePort>) {
        let mut counted = HashMap::with_capacity(seen.len());
        for (id, now) in seen {
            let before = self.counted.remove(&id);
            // A backend that was taken out has no frontend any more, and may still get what was on
            // its way.
            let Some(port) = owners
                .get(&id)
                .or(before.as_ref().map(|(port, _)| port))
                .cloned()
            else {
                continue;
            };
            let more = match before {
                Some((was, then)) if was == port => now.since(&then),
                _ => None,
            };
            let sum = self.sums.entry(self.row(&port)).or_default();
            // Without a before, or with less than before, the id was somebody else's.
            *sum = sum.plus(&more.unwrap_or(now));
            counted.insert(id, (port, now));
        }
        self.counted = counted;
    }
}

/// Whose the backends are that `wanted` names.
fn owners(
    maps: &Maps,
    names: &HashMap<u32, ObjectName>,
    wanted: &HashSet<u32>,
) -> Result<HashMap<u32, ServicePort>> {
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

    fn flows(flows: [u64; 3]) -> Counts {
        let traffic = Traffic {
            to_packets: flows[0] * 10,
            ..Traffic::default()
        };
        Counts {
            flows,
            traffic,
            ..Counts::default()
        }
    }

    /// A2: a Service's counter never goes back, whatever becomes of its backends and their ids.
    #[test]
    fn sums_only_grow() {
        let mut totals = Totals::new(10);
        let web = HashMap::from([(1, port("web")), (2, port("web"))]);
        totals.add(vec![(1, flows([5, 0, 0])), (2, flows([2, 1, 0]))], &web);
        assert_eq!(totals.sums[&port("web")].flows, [7, 1, 0]);
        totals.add(vec![(1, flows([6, 0, 0])), (2, flows([2, 1, 4]))], &web);
        assert_eq!(totals.sums[&port("web")].flows, [8, 1, 4]);
        // Taken out, and it gets one more; then its id is free, and given to another Service.
        let web = HashMap::from([(2, port("web"))]);
        totals.add(vec![(1, flows([7, 0, 0])), (2, flows([2, 1, 4]))], &web);
        assert_eq!(totals.sums[&port("web")].flows, [9, 1, 4]);
        let both = HashMap::from([(1, port("api")), (2, port("web"))]);
        totals.add(vec![(1, flows([9, 0, 0])), (2, flows([2, 1, 4]))], &both);
        assert_eq!(totals.sums[&port("web")].flows, [9, 1, 4]);
        assert_eq!(totals.sums[&port("api")].flows, [9, 0, 0]);
        // Given back and used again by the same Service.
        totals.add(vec![(2, flows([1, 0, 0]))], &both);
        assert_eq!(totals.sums[&port("web")].flows, [10, 1, 4]);
        assert_eq!(totals.sums[&port("web")].traffic.to_packets, 100);
        // Of an id that nobody knows, as before the first look at its Service.
        totals.add(vec![(9, flows([3, 0, 0]))], &both);
        assert_eq!(totals.sums.len(), 2);
    }

    /// A2: so many Services have samples of their own, whatever a cluster has; nothing is lost of
    /// the others, and a place that is free again begins at zero.
    #[test]
    fn the_number_of_samples_is_bounded() {
        let mut totals = Totals::new(2);
        let owners: HashMap<u32, ServicePort> =
            (0..5).map(|id| (id, port(&format!("s{id}")))).collect();
        let all = |n| (0..5).map(|id| (id, flows([n, 0, 0]))).collect::<Vec<_>>();
        totals.add(all(1), &owners);
        assert_eq!(totals.sums.len(), 3);
        assert_eq!(totals.sums[&ServicePort::others()].flows, [3, 0, 0]);
        totals.add(all(4), &owners);
        assert_eq!(totals.sums[&port("s0")].flows, [4, 0, 0]);
        assert_eq!(totals.sums[&ServicePort::others()].flows, [12, 0, 0]);
        totals.sums.remove(&port("s0"));
        totals.add((1..5).map(|id| (id, flows([5, 0, 0]))).collect(), &owners);
        assert_eq!(totals.sums[&port("s1")].flows, [5, 0, 0]);
        assert_eq!(totals.sums[&port("s2")].flows, [1, 0, 0]);
        assert_eq!(totals.sums[&ServicePort::others()].flows, [14, 0, 0]);
        let mut none = Totals::new(0);
        none.add(all(1), &owners);
        assert_eq!(none.sums[&ServicePort::others()].flows, [5, 0, 0]);
        assert_eq!(none.sums.len(), 1);
    }
}
