//! The devices that the fast path hands packets over to: `pod_devices`.

use std::{
    collections::BTreeSet,
    io::{self, Error},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use shunt_common::layout::names;

use super::{
    devices::{Device, LinkHeader, Role},
    load::Datapath,
};

/// The map, and what is in it.
#[derive(Debug)]
pub(crate) struct PodDevices {
    map: HashMap<MapData, u32, u32>,
    held: BTreeSet<u32>,
}

impl PodDevices {
    /// Opens and reads the map; `None` without a fast path, when no program looks at it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn open(datapath: &Datapath) -> io::Result<Option<Self>> {
        if !datapath.fast_path() {
            return Ok(None);
        }
        let open = || -> Result<Self, MapError> {
            let map = HashMap::try_from(Map::HashMap(datapath.map(names::POD_DEVICES)?))?;
            let held = map.keys().collect::<Result<_, _>>()?;
            Ok(Self { map, held })
        };
        open().map(Some).map_err(Error::other)
    }

    /// Brings the map to the pod devices among `devices`.
    ///
    /// # Errors
    /// When the map is full or the kernel refuses; then packets to the devices that are missing
    /// take the next best way.
    pub(crate) fn set(&mut self, devices: &[(Device, Role)]) -> io::Result<()> {
        let wanted: BTreeSet<u32> = devices
            .iter()
            .filter(|(d, role)| hands_over(d, *role))
            .map(|(d, _)| d.index)
            .collect();
        for index in self.held.difference(&wanted) {
            match self.map.remove(index) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(Error::other(error)),
            }
        }
        self.held.retain(|index| wanted.contains(index));
        for &index in &wanted {
            if !self.held.contains(&index) {
                self.map.insert(index, 0, 0).map_err(Error::other)?;
                self.held.insert(index);
            }
        }
        Ok(())
    }
}

/// Whether `bpf_redirect_peer` delivers through the device: it drops what would stay in this
/// namespace.
fn hands_over(device: &Device, role: Role) -> bool {
    role == Role::Pod
        && device.peer_elsewhere
        && device.header == LinkHeader::Ethernet
        && matches!(device.kind.as_deref(), Some("veth" | "netkit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pairs_into_other_namespaces_hand_over() {
        let device = |kind: &str, peer_elsewhere| Device {
            kind: Some(kind.to_owned()),
            peer_elsewhere,
            ..Device::default()
        };
        assert!(hands_over(&device("veth", true), Role::Pod));
        assert!(hands_over(&device("netkit", true), Role::Pod));
        assert!(!hands_over(&device("veth", false), Role::Pod));
        assert!(!hands_over(&device("tap", true), Role::Pod));
        // A node device that is a veth, as in tests, leads to a router.
        assert!(!hands_over(&device("veth", true), Role::Node));
    }
}
