//! Real maps in a bpf root of their own, for the tests of everything above them.

use shunt_common::{
    event::MAX_EVENTS,
    layout::{CLIENT_WORDS, FILTER_WORDS, SHARED_PORT_WORDS},
};
use shunt_lab::UniqueName;

use super::*;
use crate::datapath::bpf;

/// How large the maps are.
#[derive(Clone, Copy)]
pub(crate) struct Capacities {
    pub(crate) frontends: u32,
    pub(crate) slots: u32,
    pub(crate) backends: u32,
    pub(crate) flows: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            frontends: 256,
            slots: 4096,
            backends: 256,
            flows: 1024,
        }
    }
}

/// A bpf root that removes itself.
pub(crate) struct Root(
    pub(crate) PathBuf,
    #[expect(dead_code, reason = "held for its name")] UniqueName,
);

impl Root {
    pub(crate) fn new(capacities: Capacities) -> Self {
        let name = UniqueName::take().expect("root");
        let root = name.bpf_root("maps");
        fs::create_dir_all(maps_dir(&root)).expect("a bpf file system at /sys/fs/bpf and root");
        let this = Self(root, name);
        this.family::<V4>(capacities);
        this.family::<V6>(capacities);
        use map::types::{ARRAY, HASH, PERCPU_ARRAY, PERCPU_HASH};
        this.make::<u32, u64>(
            names::FILTER,
            ARRAY,
            FILTER_WORDS as u32,
            map::BPF_F_MMAPABLE,
        );
        this.make::<u32, u64>(names::CLIENTS, ARRAY, CLIENT_WORDS as u32, 0);
        this.make::<u32, u64>(names::HALF_OPEN, ARRAY, 2, 0);
        this.make::<u32, u64>(names::SHARED_PORTS, ARRAY, SHARED_PORT_WORDS as u32, 0);
        this.make::<u32, BackendState>(names::BACKENDS, ARRAY, capacities.backends, 0);
        this.make::<u32, ServiceInfo>(names::SERVICES, HASH, capacities.frontends, 0);
        this.make::<u64, SocketPeer>(names::SOCKETS, HASH, 1024, 0);
        this.make::<u32, Config>(names::CONFIG, ARRAY, 1, 0);
        this.make::<u32, u64>(names::EVENTS, PERCPU_ARRAY, MAX_EVENTS as u32, 0);
        this.make::<u32, Traffic>(
            names::TRAFFIC,
            PERCPU_HASH,
            capacities.backends,
            map::BPF_F_NO_PREALLOC,
        );
        this
    }

    fn family<F: MapFamily>(&self, capacities: Capacities) {
        use map::types::{ARRAY, HASH, LPM_TRIE, LRU_HASH};
        let i = F::INDEX;
        let (trie, frontends) = (names::SOURCE_RANGES[i], capacities.frontends);
        self.make::<SourceRangeKey<F::Addr>, u32>(
            trie,
            LPM_TRIE,
            frontends,
            map::BPF_F_NO_PREALLOC,
        );
        for affinity in [names::AFFINITY[i], names::NEW_AFFINITY[i]] {
            self.make::<AffinityKey<F::Addr>, Affinity>(affinity, LRU_HASH, capacities.flows, 0);
        }
        self.make::<MemberKey, u32>(
            names::SET_MEMBERS[i],
            HASH,
            capacities.backends,
            map::BPF_F_NO_PREALLOC,
        );
        self.make::<FrontendKey<F::Addr>, Frontend>(
            names::FRONTENDS[i],
            HASH,
            capacities.frontends,
            0,
        );
        self.make::<u32, Slot<F::Addr>>(
            names::SLOTS[i],
            ARRAY,
            capacities.slots,
            map::BPF_F_MMAPABLE,
        );
        self.make::<FlowKey<F::Addr>, Flow<F::Addr>>(
            names::FLOWS[i],
            LRU_HASH,
            capacities.flows,
            0,
        );
        self.make::<FlowKey<F::Addr>, Flow<F::Addr>>(
            names::UNCONFIRMED[i],
            LRU_HASH,
            capacities.flows,
            0,
        );
        self.make::<u32, SnatSlot<F::Addr>>(names::SNAT[i], ARRAY, 1024, map::BPF_F_MMAPABLE);
        self.make::<DirectKey<F::Addr>, u32>(names::DIRECT[i], LRU_HASH, 1024, 0);
        self.make::<DirectKey<F::Addr>, u32>(names::BYPASS[i], LRU_HASH, 1024, 0);
        self.make::<F::Addr, u32>(names::NODE_ADDRS[i], HASH, 64, 0);
        self.make::<F::Addr, u32>(names::SERVICE_ADDRS[i], HASH, capacities.frontends, 0);
    }

    fn make<K, V>(&self, name: &str, map_type: u32, entries: u32, flags: u32) {
        let fd = map::create(map_type, size_of::<K>(), size_of::<V>(), entries, flags).expect(name);
        bpf::pin(fd.as_fd(), &maps_dir(&self.0).join(name)).expect(name);
    }

    pub(crate) fn maps(&self) -> Maps {
        Maps::open(&self.0).expect("maps just made")
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // bpffs knows no recursive removal of its own, but unlinks pins like files.
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}
