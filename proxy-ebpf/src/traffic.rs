//! Packets and bytes per backend, where `--count-traffic on` asks for them: 20 ns a packet that
//! others need not pay.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::PerCpuHashMap,
    macros::btf_map,
};
use shunt_common::{layout::Traffic, verdict::Counted};

/// Whether traffic is counted: set when the programs are loaded, so that without it the verifier
/// takes it out.
#[unsafe(no_mangle)]
static COUNT_TRAFFIC: Global<u32> = Global::new(0);

// Entries of backends that have traffic only, and none where it is not counted.
#[btf_map(name = "traffic")]
static TRAFFIC: PerCpuHashMap<u32, Traffic, 131_072, { BPF_F_NO_PREALLOC as usize }> =
    PerCpuHashMap::new();

/// Counts `packets` with `bytes` in all.
#[inline(always)]
pub(crate) fn count(counted: Counted, packets: u32, bytes: u32) {
    if COUNT_TRAFFIC.load() != 0 && counted.backend != Counted::NOBODY {
        add(counted.backend, counted.reply, packets, bytes);
    }
}

#[inline(never)]
fn add(backend: u32, reply: bool, packets: u32, bytes: u32) -> u32 {
    let (packets, bytes) = (u64::from(packets), u64::from(bytes));
    if let Some(traffic) = TRAFFIC.get_ptr_mut(backend) {
        // SAFETY: this CPU's own value, and programs of the packet path do not interrupt each
        // other.
        let traffic = unsafe { &mut *traffic };
        if reply {
            traffic.from_packets += packets;
            traffic.from_bytes += bytes;
        } else {
            traffic.to_packets += packets;
            traffic.to_bytes += bytes;
        }
        return 0;
    }
    let mut first = Traffic::default();
    if reply {
        first.from_packets = packets;
        first.from_bytes = bytes;
    } else {
        first.to_packets = packets;
        first.to_bytes = bytes;
    }
    // Another CPU may be first, and the map full: a packet more or less.
    let _counted = TRAFFIC.insert(backend, first, BPF_NOEXIST.into());
    0
}
