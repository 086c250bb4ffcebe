//! Entries of maps: read and changed in place, while other CPUs do the same.

use core::{marker::PhantomData, mem::offset_of, ptr::NonNull};

use super::Clock;
use crate::{
    atomic,
    layout::{Flow, SnatSlot},
};

/// An entry in a map: alive while the program runs, and written by other CPUs at any time.
pub struct Entry<'m, T> {
    ptr: NonNull<T>,
    map: PhantomData<&'m T>,
}

impl<T> Clone for Entry<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Entry<'_, T> {}

impl<T: Copy> Entry<'_, T> {
    /// Wraps what a map look-up returned.
    ///
    /// # Safety
    /// `ptr` must stay readable and writable for the entry's lifetime, and nobody may hold a
    /// reference into it.
    #[inline(always)]
    pub unsafe fn new(ptr: NonNull<T>) -> Self {
        Self {
            ptr,
            map: PhantomData,
        }
    }

    /// Where the value stands, for atomic access.
    #[inline(always)]
    pub fn as_ptr(self) -> *mut T {
        self.ptr.as_ptr()
    }

    /// A copy of the value; fields that are not looked at are not loaded.
    #[inline(always)]
    pub fn read(self) -> T {
        // SAFETY: valid by `new`'s contract. A value that another CPU changes in between is a mix
        // of two valid ones.
        unsafe { self.ptr.as_ptr().read() }
    }

    /// Replaces the value in place: no map operation, so a full LRU evicts nobody.
    #[inline(always)]
    pub fn write(self, value: &T) {
        // SAFETY: valid by `new`'s contract.
        unsafe { copy(value, self.ptr.as_ptr()) };
    }

    /// Copies the value to memory of the caller's.
    #[inline(always)]
    pub fn copy_to(self, value: &mut T) {
        // SAFETY: valid by `new`'s contract.
        unsafe { copy(self.ptr.as_ptr(), value) };
    }
}

impl<A: Copy> Entry<'_, SnatSlot<A>> {
    /// [`Maps::claim`](super::Maps::claim) of a slot that nobody else writes to: in a copy of the
    /// maps, or a test's.
    pub fn claim_alone(self, old: (u32, u32), new: (u32, u32)) -> bool {
        let mut slot = self.read();
        let free = (slot.last_seen, slot.owner) == old;
        if free {
            (slot.last_seen, slot.owner) = new;
            self.write(&slot);
        }
        free
    }
}

/// Copies word by word: LLVM would call a `memmove` for it that goes byte by byte.
///
/// # Safety
/// `from` must be readable, `to` writable, both aligned; `T` must be made of whole words, without
/// padding.
#[inline(always)]
unsafe fn copy<T>(from: *const T, to: *mut T) {
    const { assert!(align_of::<T>() >= 4 && size_of::<T>().is_multiple_of(4)) };
    // SAFETY: the caller's promise.
    unsafe {
        if align_of::<T>() == 8 {
            let (from, to) = (from.cast::<u64>(), to.cast::<u64>());
            (0..size_of::<T>() / 8).for_each(|i| to.add(i).write_volatile(from.add(i).read()));
        } else {
            let (from, to) = (from.cast::<u32>(), to.cast::<u32>());
            (0..size_of::<T>() / 4).for_each(|i| to.add(i).write_volatile(from.add(i).read()));
        }
    }
}

/// A value that carries a flow's state and age.
pub trait Tracked: Copy {
    /// Offset of the `FLOW_*` bits, in bytes.
    const STATE: usize;
    /// Offset of the time stamp, in bytes.
    const LAST_SEEN: usize;
    /// Offset of the cheap clock's time stamp, in bytes.
    const EPOCH: usize;
}

impl<A: Copy> Tracked for Flow<A> {
    const STATE: usize = offset_of!(Self, state);
    const LAST_SEEN: usize = offset_of!(Self, last_seen);
    const EPOCH: usize = offset_of!(Self, epoch);
}

impl<A: Copy> Tracked for SnatSlot<A> {
    const STATE: usize = offset_of!(Self, state);
    const LAST_SEEN: usize = offset_of!(Self, last_seen);
    const EPOCH: usize = offset_of!(Self, epoch);
}

impl<A: Copy> Entry<'_, Flow<A>> {
    /// Notes when a packet went to a backend that may not answer ([`Flow::unanswered_since`]).
    #[inline(always)]
    pub(crate) fn ask(self, time: u16) {
        // SAFETY: an aligned field of an entry that is valid by `new`'s contract.
        unsafe { (&raw mut (*self.ptr.as_ptr()).unanswered_since).write(time) };
    }
}

impl<T: Tracked> Entry<'_, T> {
    /// Address of the state, for atomic access: several CPUs see packets of one flow at once.
    #[inline(always)]
    fn state(self) -> *mut u32 {
        // SAFETY: the offset lies within the value.
        unsafe { self.ptr.as_ptr().byte_add(T::STATE).cast() }
    }

    /// Sets state bits, and nothing else.
    #[inline(always)]
    pub(crate) fn set(self, bits: u32) {
        // SAFETY: an aligned field of an entry that is valid by `new`'s contract.
        unsafe { atomic::or(self.state(), bits) };
    }

    /// Takes state bits back.
    #[inline(always)]
    pub(crate) fn clear(self, bits: u32) {
        // SAFETY: an aligned field of an entry that is valid by `new`'s contract.
        unsafe { atomic::and(self.state(), !bits) };
    }

    /// Address of the time stamp, for an atomic exchange.
    #[inline(always)]
    pub fn last_seen(self) -> *mut u32 {
        // SAFETY: the offset lies within the value.
        unsafe { self.ptr.as_ptr().byte_add(T::LAST_SEEN).cast() }
    }

    /// Records a packet: state bits when they are new, the time when the cheap clock has moved on.
    /// Returns whether it had.
    #[inline(always)]
    pub(super) fn record(self, clock: &impl Clock, bits: u32) -> bool {
        // SAFETY: aligned fields of an entry that is valid by `new`'s contract.
        unsafe {
            let state = self.state();
            let epoch: *mut u16 = self.ptr.as_ptr().byte_add(T::EPOCH).cast();
            let old = *state;
            if old | bits != old {
                atomic::or(state, bits);
            }
            let now = clock.epoch();
            let passed = *epoch != now;
            if passed {
                *epoch = now;
                *self.last_seen() = clock.now();
            }
            passed
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Barrier, thread};

    use super::*;
    use crate::layout::{FLOW_BACKEND_FIN, FLOW_CLIENT_FIN, FLOW_CONFIRMED};

    struct At(u16);

    impl Clock for At {
        fn now(&self) -> u32 {
            u32::from(self.0)
        }
        fn epoch(&self) -> u16 {
            self.0
        }
        fn affinity_now(&self) -> u32 {
            0
        }
    }

    /// Packets of both directions are seen by a CPU each, and what one notes the other does not
    /// take back.
    #[test]
    fn a_bit_that_another_cpu_sets_meanwhile_is_not_lost() {
        // SAFETY: integers, of which zero is one.
        let mut flow: Flow<u32> = unsafe { core::mem::zeroed() };
        let ptr = &raw mut flow as usize;
        let start = Barrier::new(3);
        let noted = |fin: u32| {
            // SAFETY: it lives until the threads have ended, and nobody refers to it meanwhile.
            let entry = unsafe { Entry::new(NonNull::new_unchecked(ptr as *mut Flow<u32>)) };
            start.wait();
            for round in 0..300_000u32 {
                entry.record(&At(round as u16), fin);
                assert_eq!(entry.read().state & fin, fin, "round {round}");
                entry.clear(fin);
                assert_eq!(entry.read().state & fin, 0, "round {round}");
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| noted(FLOW_CLIENT_FIN));
            scope.spawn(|| noted(FLOW_CONFIRMED));
            noted(FLOW_BACKEND_FIN);
        });
        assert_eq!(flow.state, 0);
    }
}
