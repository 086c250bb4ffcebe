//! The pinned maps, on maps of this kernel.

use std::collections::HashSet;

use shunt_common::layout::{SCOPE_EXTERNAL, TCP};

use super::{
    testing::{Capacities, Root},
    *,
};
use crate::datapath::bpf;

fn key(n: u16) -> FrontendKey<[u8; 4]> {
    FrontendKey {
        addr: [10, 96, 0, 1],
        port: n,
        proto: TCP,
        scope: SCOPE_EXTERNAL,
        reserved: 0,
    }
}

#[test]
fn a_root_without_an_agent_says_what_to_do() {
    let error = Maps::open(Path::new("/sys/fs/bpf/shunt-nobody"))
        .err()
        .expect("no maps there");
    let message = error.to_string();
    assert!(
        message.contains("no agent has run with --bpf-root /sys/fs/bpf/shunt-nobody"),
        "{message}"
    );
    assert!(!message.contains('\n'));
}

#[test]
fn a_map_of_another_layout_is_not_touched() {
    let root = Root::new(Capacities::default());
    let path = maps_dir(&root.0).join(names::SERVICES);
    fs::remove_file(&path).expect("pin");
    let fd = map::create(map::types::HASH, 4, 8, 16, 0).expect("map");
    bpf::pin(fd.as_fd(), &path).expect("pin");
    let message = Maps::open(&root.0)
        .err()
        .expect("wrong value size")
        .to_string();
    assert!(
        message.contains("the value's size is 8, expected 128"),
        "{message}"
    );
}

#[test]
fn what_is_written_is_walked_and_deleted_in_batches() {
    let root = Root::new(Capacities {
        frontends: 8192,
        ..Default::default()
    });
    let map = root.maps().v4.frontends;
    for n in 0..5000 {
        let value = Frontend {
            slot_base: u32::from(n),
            ..Default::default()
        };
        map.set(&key(n), &value).expect("room");
    }
    let entries = map.entries().expect("walk");
    assert!(
        entries
            .iter()
            .all(|(key, value)| u32::from(key.port) == value.slot_base)
    );
    let seen: HashSet<u16> = entries.iter().map(|(key, _)| key.port).collect();
    assert_eq!((entries.len(), seen.len()), (5000, 5000));

    // Keys that are not there, first, last and in between, do not stop the deletion of the others.
    let doomed: Vec<_> = (4000..6000).chain([7000]).chain(0..10).map(key).collect();
    assert_eq!(map.delete_all(&doomed).expect("delete"), 1010);
    assert_eq!(map.count(|_| true).expect("walk"), 3990);
    assert!(!map.delete(&key(4000)).expect("delete"));
    assert_eq!(
        map.get(&key(11)).expect("read").map(|f| f.slot_base),
        Some(11)
    );
}

#[test]
fn a_full_map_names_its_setting() {
    let root = Root::new(Capacities {
        frontends: 16,
        ..Default::default()
    });
    let map = root.maps().v4.frontends;
    let error = (0..100)
        .find_map(|n| map.set(&key(n), &Frontend::default()).err())
        .expect("16 entries at most");
    assert_eq!(
        error.to_string(),
        "map frontends4 is full (16 entries): start the agent with a larger --max-frontends"
    );
}

#[test]
fn mapped_slots_and_the_kernel_see_one_memory() {
    let root = Root::new(Capacities::default());
    let maps = root.maps();
    // Twelve bytes in a stride of sixteen: a wrong stride would show in the second element.
    for index in 0..10 {
        let slot = Slot {
            addr: [10, 0, 0, index as u8],
            port: 80,
            flags: 0,
            backend: index,
        };
        maps.v4.slots.set(index, slot);
    }
    let by_syscall: Map<u32, Slot<[u8; 4]>> =
        Map::open(&root.0, names::SLOTS[0], "").expect("open");
    for index in 0..10 {
        let slot = by_syscall.get(&index).expect("read").expect("there");
        assert_eq!((slot.addr[3], slot.backend), (index as u8, index));
    }
    assert_eq!(maps.v4.slots.get(4096), None);
    assert!(maps.filter.set(449));
    assert!(!maps.filter.set(449));
}

/// A bit that somebody needs for good, before it is lent or after, is not taken back.
#[test]
fn lent_bits_are_taken_back_and_no_others() {
    let root = Root::new(Capacities::default());
    let maps = Maps::open(&root.0).expect("open");
    let is_set = |bit: u32| {
        let word = maps.filter.get(bit / 64).expect("there");
        word & 1 << (bit % 64) != 0
    };
    maps.filter.set(70);
    maps.filter.lend(&[70, 71, 72, 140].into());
    assert!([70, 71, 72, 140].into_iter().all(is_set));
    maps.filter.set(71);
    maps.filter.lend(&[140].into());
    assert_eq!(
        [70, 71, 72, 140].map(is_set),
        [true, true, false, true],
        "72 alone was only lent"
    );
    maps.filter.lend(&[72].into());
    assert_eq!([72, 140].map(is_set), [true, false]);
}

#[test]
fn names_survive_the_map() {
    let longest = "x".repeat(63);
    assert_eq!(name_str(&name_bytes(&longest)), longest);
    assert_eq!(name_str(&name_bytes("")), "");
}

/// The state of every backend, by id, that some were given.
fn states(maps: &Maps) -> Vec<(u32, u64)> {
    let mut seen = Vec::new();
    let read = maps.backend_states();
    read.for_each(|id, state| seen.push((id, state.tc_flows)))
        .expect("states");
    assert_eq!(seen.len(), read.ids() as usize);
    seen.retain(|&(_, flows)| flows != 0);
    seen
}

#[test]
fn backend_states_are_read_from_shared_memory_and_from_maps_that_have_none() {
    let root = Root::new(Capacities {
        backends: 5000,
        ..Default::default()
    });
    for flags in [0, map::BPF_F_MMAPABLE] {
        let path = maps_dir(&root.0).join(names::BACKENDS);
        fs::remove_file(&path).expect("pin");
        let (kind, value) = (map::types::ARRAY, size_of::<BackendState>());
        let fd = map::create(kind, size_of::<u32>(), value, 5000, flags).expect("map");
        bpf::pin(fd.as_fd(), &path).expect("pin");
        let maps = root.maps();
        assert_eq!(states(&maps), []);
        for id in [0, 17, 4999] {
            let state = BackendState {
                tc_flows: u64::from(id) + 1,
                ..BackendState::default()
            };
            maps.backends.set(&id, &state).expect("write");
        }
        assert_eq!(states(&maps), [(0, 1), (17, 18), (4999, 5000)], "{flags}");
    }
}

#[test]
fn traffic_of_all_backends_is_that_of_each() {
    let root = Root::new(Capacities {
        backends: 4096,
        ..Default::default()
    });
    let maps = root.maps();
    let walk = || {
        let mut seen = Vec::new();
        maps.for_each_traffic(|id, traffic| seen.push((id, traffic)))
            .expect("walk");
        seen.sort_by_key(|&(id, _)| id);
        seen
    };
    assert_eq!(walk(), []);
    let mut info = map::map_info(maps.traffic.as_fd()).expect("info");
    info.value_size *= maps.cpus as u32;
    // More than are read at once.
    for id in 0..2000_u32 {
        let on_a_cpu = |cpu: usize| [u64::from(id) + 1, cpu as u64, 2, 3].map(u64::to_ne_bytes);
        let value = (0..maps.cpus).flat_map(|cpu| on_a_cpu(cpu).concat());
        let value: Vec<u8> = value.collect();
        map::update_raw(maps.traffic.as_fd(), &info, &id.to_ne_bytes(), &value, 0).expect("write");
    }
    let seen = walk();
    assert_eq!(seen.len(), 2000);
    for (id, traffic) in seen {
        assert_eq!(traffic, maps.traffic(id).expect("read"));
        let cpus = maps.cpus as u64;
        assert_eq!(traffic.to_packets, cpus * (u64::from(id) + 1));
        assert_eq!(traffic.from_bytes, cpus * 3);
    }
}
