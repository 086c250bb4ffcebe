//! Fragments of translated datagrams: only the first has ports, so it leaves them where the others
//! find them.
//!
//! A datagram's fragments carry one identification between one pair of addresses. When a first
//! fragment is translated, its ports are noted under that name, as they were before; a later one is
//! then decided as if it had them, and reaches the same backend. Both where packets arrive and
//! where they leave, for the addresses differ.
//!
//! A fragment that comes before its first one, and goes to a cluster IP, is dropped: nobody could
//! tell where to. The sender sends the datagram again or does without it, as when a network loses a
//! fragment; networks that put fragments of one flow out of order are rare. To other addresses it
//! passes, and is the receiver's to judge.

use super::Context;
use crate::{
    balance::{Maps, Scratch},
    family::Family,
    layout::{FragmentKey, FragmentPorts},
};

fn key<F: Family>(slow: &Context<F::Words>) -> FragmentKey<F::Words> {
    FragmentKey {
        src: slow.tuple.src,
        dst: slow.tuple.dst,
        id: slow.path.id,
        proto: if F::HEADER == 20 { slow.path.proto } else { 0 },
    }
}

/// Forgets what is recorded under the name of the datagram whose first fragment is at hand:
/// another's, with whose ports the rest of this one would go astray. Names come round: IPv4 has
/// 65,536 for a pair of addresses and a protocol.
#[inline(never)]
pub(super) fn forget<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) {
    maps.remove_fragment(&key::<F>(&scratch.slow));
}

/// Records the ports of a first fragment.
#[inline(never)]
pub(super) fn record<F: Family, M: Maps<F>>(maps: &M, scratch: &Scratch<F::Words>) {
    let slow = &scratch.slow;
    maps.add_fragment(
        &key::<F>(slow),
        &FragmentPorts {
            src_port: slow.tuple.src_port,
            dst_port: slow.tuple.dst_port,
            proto: slow.path.proto,
        },
    );
}

/// Gives a later fragment the ports of its first; `false` when that was not seen.
#[inline(never)]
pub(super) fn find<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let slow = &mut scratch.slow;
    let Some(ports) = maps.fragment(&key::<F>(slow)) else {
        return false;
    };
    slow.tuple.src_port = ports.src_port;
    slow.tuple.dst_port = ports.dst_port;
    slow.tuple.proto = ports.proto as u8;
    true
}
