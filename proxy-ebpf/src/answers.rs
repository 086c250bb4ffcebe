//! Whether this node may send an answer of its own (SPEC H4).

use core::intrinsics::{AtomicOrdering, atomic_cxchg};

use aya_ebpf::{
    btf_maps::{Array, LruHashMap},
    helpers::bpf_ktime_get_coarse_ns,
    macros::btf_map,
};
use shunt_common::{
    answer_limit::{IN_ALL, Limit, PER_DESTINATION},
    family::{Family, V4, V6},
};

type Answers<A> = LruHashMap<A, u64, 4096>;

#[btf_map(name = "answers4")]
static ANSWERS4: Answers<[u8; 4]> = Answers::new();
#[btf_map(name = "answers6")]
static ANSWERS6: Answers<[u8; 16]> = Answers::new();
#[btf_map(name = "answers")]
static ANSWERS: Array<u64, 2> = Array::new();

/// A family whose answers are limited.
pub(crate) trait AnsweringFamily: Family {
    /// When the next answer to an address is due.
    const TO: &'static Answers<Self::Addr>;
    /// Index into [`ANSWERS`].
    const IN_ALL: u32;
}

impl AnsweringFamily for V4 {
    const TO: &'static Answers<[u8; 4]> = &ANSWERS4;
    const IN_ALL: u32 = 0;
}

impl AnsweringFamily for V6 {
    const TO: &'static Answers<[u8; 16]> = &ANSWERS6;
    const IN_ALL: u32 = 1;
}

/// Takes the right to send an answer to an address: few have been sent to it, and in all.
#[inline(never)]
pub(crate) fn may_answer<F: AnsweringFamily>(to: &F::Addr) -> bool {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let to_this = match F::TO.get_ptr_mut(to) {
        Some(due) => take(&PER_DESTINATION, due, now),
        // Two CPUs may both be first; the later one's time stands, which is as good.
        None => F::TO
            .insert(to, now + PER_DESTINATION.interval_ns, 0)
            .is_ok(),
    };
    to_this
        && match ANSWERS.get_ptr_mut(F::IN_ALL) {
            Some(due) => take(&IN_ALL, due, now),
            None => false,
        }
}

/// Takes one answer out of a bucket. Of CPUs that want one at the same time each tries again a few
/// times; then it goes without.
#[inline(always)]
fn take(limit: &Limit, due: *mut u64, now: u64) -> bool {
    for _ in 0..4 {
        // SAFETY: an aligned live map value.
        let seen = unsafe { due.read_volatile() };
        let Some(next) = limit.next(seen, now) else {
            return false;
        };
        // SAFETY: as above.
        let (_, taken) = unsafe {
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                due, seen, next,
            )
        };
        if taken {
            return true;
        }
    }
    false
}
