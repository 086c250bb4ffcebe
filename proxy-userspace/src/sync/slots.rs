//! Which ranges of the `slots` array are free.
//!
//! A frontend's slots are consecutive, so this allocates ranges, best fit first. A released range
//! rests for a grace period: a program that looked the frontend up just before it was switched
//! still reads the old slots.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

/// How long a released range rests. A program runs for microseconds; the rest is for a preempted
/// virtual CPU.
pub const GRACE: Duration = Duration::from_secs(1);

/// Consecutive slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotRange {
    /// First slot.
    pub base: u32,
    /// Number of slots, at least 1.
    pub len: u32,
}

/// Free and resting ranges of one `slots` map.
#[derive(Debug)]
pub struct SlotAllocator {
    grace: Duration,
    /// Free ranges, base → length; neighbours are always merged.
    by_base: BTreeMap<u32, u32>,
    /// The same as (length, base): the first at or above a length is the best fit.
    by_len: BTreeSet<(u32, u32)>,
    /// Released ranges, oldest first, and when they may be used again.
    resting: VecDeque<(Instant, SlotRange)>,
}

impl SlotAllocator {
    /// All of `capacity` slots are free.
    pub fn new(capacity: u32, grace: Duration) -> Self {
        let mut this = Self {
            grace,
            by_base: BTreeMap::new(),
            by_len: BTreeSet::new(),
            resting: VecDeque::new(),
        };
        if capacity > 0 {
            this.insert(SlotRange {
                base: 0,
                len: capacity,
            });
        }
        this
    }

    /// Takes a range that is in use already (read back from the maps). False when not all of it is
    /// free.
    pub fn reserve(&mut self, range: SlotRange) -> bool {
        let Some((&base, &len)) = self.by_base.range(..=range.base).next_back() else {
            return false;
        };
        let (Some(end), free_end) = (range.base.checked_add(range.len), base + len) else {
            return false;
        };
        if range.len == 0 || end > free_end {
            return false;
        }
        self.remove(SlotRange { base, len });
        if range.base > base {
            self.insert(SlotRange {
                base,
                len: range.base - base,
            });
        }
        if free_end > end {
            self.insert(SlotRange {
                base: end,
                len: free_end - end,
            });
        }
        true
    }

    /// Takes `len` free slots; `None` when there is no such range now.
    pub fn allocate(&mut self, len: u32, now: Instant) -> Option<SlotRange> {
        self.wake(now);
        let &(free_len, base) = (len > 0)
            .then(|| self.by_len.range((len, 0)..).next())
            .flatten()?;
        let range = SlotRange { base, len };
        self.remove(SlotRange {
            base,
            len: free_len,
        });
        if free_len > len {
            self.insert(SlotRange {
                base: base + len,
                len: free_len - len,
            });
        }
        Some(range)
    }

    /// Gives back a range that no frontend names any more; it is free again after the grace period.
    pub fn release(&mut self, range: SlotRange, now: Instant) {
        self.resting.push_back((now + self.grace, range));
    }

    /// Gives back a range that no frontend has named yet; it is free at once.
    pub fn give_back(&mut self, range: SlotRange) {
        self.insert(range);
    }

    /// Slots that are free or will be after the grace period.
    pub fn free(&self) -> u32 {
        self.by_base.values().sum::<u32>()
            + self.resting.iter().map(|(_, range)| range.len).sum::<u32>()
    }

    /// Whether ranges are resting: an allocation that fails now may succeed after the grace period.
    pub fn is_resting(&self) -> bool {
        !self.resting.is_empty()
    }

    fn wake(&mut self, now: Instant) {
        while let Some(&(ready, range)) = self.resting.front()
            && ready <= now
        {
            self.resting.pop_front();
            self.insert(range);
        }
    }

    fn remove(&mut self, range: SlotRange) {
        self.by_base.remove(&range.base);
        self.by_len.remove(&(range.len, range.base));
    }

    fn insert(&mut self, mut range: SlotRange) {
        if let Some((&base, &len)) = self.by_base.range(..range.base).next_back() {
            debug_assert!(base + len <= range.base, "slots given back twice");
            if base + len == range.base {
                self.remove(SlotRange { base, len });
                range = SlotRange {
                    base,
                    len: len + range.len,
                };
            }
        }
        let end = range.base + range.len;
        if let Some(&len) = self.by_base.get(&end) {
            self.remove(SlotRange { base: end, len });
            range.len += len;
        }
        self.by_base.insert(range.base, range.len);
        self.by_len.insert((range.len, range.base));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u32),
        Release(usize),
        GiveBack(usize),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1u32..60).prop_map(Step::Allocate),
            2 => any::<usize>().prop_map(Step::Release),
            1 => any::<usize>().prop_map(Step::GiveBack),
            2 => (0u64..1500).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Whatever happens: no slot has two owners or is used again within the grace period, none
        /// is lost, and what is all given back is one range again.
        #[test]
        fn ranges_never_overlap_and_none_is_lost(steps in proptest::collection::vec(step(), 1..200)) {
            const CAPACITY: u32 = 500;
            let mut now = Instant::now();
            let mut allocator = SlotAllocator::new(CAPACITY, GRACE);
            let mut held: Vec<SlotRange> = Vec::new();
            // Per slot: whether held, and until when it rests.
            let mut owned = [false; CAPACITY as usize];
            let mut rests: [Option<Instant>; CAPACITY as usize] = [None; CAPACITY as usize];
            for step in steps {
                match step {
                    Step::Allocate(len) => {
                        let Some(range) = allocator.allocate(len, now) else {
                            let mut run = 0;
                            for slot in 0..CAPACITY as usize {
                                let free = !owned[slot] && rests[slot].is_none_or(|until| until <= now);
                                run = if free { run + 1 } else { 0 };
                                prop_assert!(run < len, "refused {len} slots that are free");
                            }
                            continue;
                        };
                        prop_assert_eq!(range.len, len);
                        for slot in range.base..range.base + range.len {
                            prop_assert!(!std::mem::replace(&mut owned[slot as usize], true), "two owners");
                            prop_assert!(rests[slot as usize].is_none_or(|until| until <= now), "grace period");
                        }
                        held.push(range);
                    }
                    Step::Release(i) | Step::GiveBack(i) if !held.is_empty() => {
                        let range = held.swap_remove(i % held.len());
                        let slots = range.base as usize..(range.base + range.len) as usize;
                        owned[slots.clone()].fill(false);
                        if matches!(step, Step::Release(_)) {
                            rests[slots].fill(Some(now + GRACE));
                            allocator.release(range, now);
                        } else {
                            allocator.give_back(range);
                        }
                    }
                    Step::Wait(ms) => now += Duration::from_millis(ms),
                    _ => {}
                }
                let in_use: u32 = held.iter().map(|range| range.len).sum();
                prop_assert_eq!(allocator.free() + in_use, CAPACITY);
            }
            for range in held.drain(..) {
                allocator.release(range, now);
            }
            now += GRACE;
            prop_assert_eq!(allocator.allocate(CAPACITY, now), Some(SlotRange { base: 0, len: CAPACITY }));
        }

        /// Reserving what another allocator held gives an allocator with the same free slots.
        #[test]
        fn a_restart_finds_the_same_slots_free(lens in proptest::collection::vec(1u32..40, 1..20), keep in any::<u32>()) {
            let now = Instant::now();
            let mut before = SlotAllocator::new(1000, GRACE);
            let mut after = SlotAllocator::new(1000, GRACE);
            let ranges: Vec<_> = lens.iter().filter_map(|&len| before.allocate(len, now)).collect();
            for (i, &range) in ranges.iter().enumerate() {
                if keep >> (i % 32) & 1 == 1 {
                    prop_assert!(after.reserve(range));
                    prop_assert!(!after.reserve(range), "reserved twice");
                } else {
                    before.release(range, now);
                }
            }
            before.wake(now + GRACE);
            prop_assert_eq!(before.by_base, after.by_base);
        }
    }

    #[test]
    fn the_smallest_range_that_fits_is_taken() {
        let now = Instant::now();
        let mut allocator = SlotAllocator::new(100, GRACE);
        let ranges: Vec<_> = [10, 1, 5, 1]
            .map(|len| allocator.allocate(len, now).unwrap())
            .into();
        allocator.give_back(ranges[0]);
        allocator.give_back(ranges[2]);
        assert_eq!(
            allocator.allocate(4, now),
            Some(SlotRange { base: 11, len: 4 })
        );
    }

    #[test]
    fn a_range_beyond_the_end_is_not_reserved() {
        let mut allocator = SlotAllocator::new(100, GRACE);
        assert!(!allocator.reserve(SlotRange { base: 90, len: 11 }));
        assert!(!allocator.reserve(SlotRange {
            base: u32::MAX,
            len: 2
        }));
        assert!(!allocator.reserve(SlotRange { base: 5, len: 0 }));
        assert_eq!(allocator.free(), 100);
    }
}
