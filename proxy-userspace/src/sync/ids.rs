//! Backend ids: indices into `backends`, never given to another backend while a flow may still name
//! them.

use std::{
    collections::{HashSet, VecDeque},
    time::Instant,
};

/// A set of backend ids, one bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdSet {
    words: Vec<u64>,
}

impl IdSet {
    /// Adds an id.
    pub fn insert(&mut self, id: u32) {
        let word = id as usize / 64;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (id % 64);
    }

    /// Whether an id is in it.
    pub fn contains(&self, id: u32) -> bool {
        self.words
            .get(id as usize / 64)
            .is_some_and(|word| word >> (id % 64) & 1 == 1)
    }
}

/// Free, used and resting backend ids. Id 0 stays unused, so that zeroed memory names no backend.
///
/// An id is used again as late as possible: first all that were never used, then the one longest
/// free.
#[derive(Debug)]
pub struct BackendIds {
    capacity: u32,
    /// Ids from here on were never used.
    fresh: u32,
    /// Ids below `fresh` that are in use: read back, or given out.
    used: HashSet<u32>,
    free: VecDeque<u32>,
    resting: Vec<(Instant, u32)>,
}

impl BackendIds {
    /// Of an array of `capacity` backends, `used` are named by slots, and `resting` were removed by
    /// an earlier agent.
    pub fn new(capacity: u32, used: HashSet<u32>, resting: HashSet<u32>, now: Instant) -> Self {
        let fresh = used.iter().chain(&resting).max().map_or(1, |id| id + 1);
        let free = (1..fresh)
            .filter(|id| !used.contains(id) && !resting.contains(id))
            .collect();
        Self {
            capacity,
            fresh,
            free,
            resting: resting.difference(&used).map(|&id| (now, id)).collect(),
            used,
        }
    }

    /// An id that no flow names; `None` when all are in use or resting.
    pub fn allocate(&mut self) -> Option<u32> {
        let id = if self.fresh < self.capacity {
            self.fresh += 1;
            self.fresh - 1
        } else {
            self.free.pop_front()?
        };
        self.used.insert(id);
        Some(id)
    }

    /// No frontend's slots name this id from `now` on; it rests until [`Self::reclaim`] finds no
    /// flow that does.
    pub fn release(&mut self, id: u32, now: Instant) {
        if self.used.remove(&id) {
            self.resting.push((now, id));
        }
    }

    /// Uses an id again that still rests, for the backend that had it. `false` if it rests no more.
    pub fn take_back(&mut self, id: u32) -> bool {
        let Some(place) = self.resting.iter().position(|&(_, resting)| resting == id) else {
            return false;
        };
        self.resting.swap_remove(place);
        self.used.insert(id)
    }

    /// After a walk over all flows that began at `started` and found `referenced`: the ids released
    /// before it that no flow names are free again, and returned.
    pub fn reclaim(&mut self, started: Instant, referenced: &IdSet) -> Vec<u32> {
        let mut reclaimed = Vec::new();
        self.resting.retain(|&(released, id)| {
            let rests = released >= started || referenced.contains(id);
            if !rests {
                reclaimed.push(id);
            }
            rests
        });
        self.free.extend(&reclaimed);
        reclaimed
    }

    /// Number of ids in use.
    pub fn used(&self) -> usize {
        self.used.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_id_rests_until_a_walk_that_began_later_finds_no_flow() {
        let t0 = Instant::now();
        let second = Duration::from_secs(1);
        let mut ids = BackendIds::new(4, HashSet::new(), HashSet::new(), t0);
        let all: Vec<_> = std::iter::from_fn(|| ids.allocate()).collect();
        assert_eq!(all, [1, 2, 3]);
        ids.release(2, t0 + second);
        assert_eq!(ids.allocate(), None);

        assert!(
            ids.reclaim(t0, &IdSet::default()).is_empty(),
            "the walk began before the release"
        );
        let mut referenced = IdSet::default();
        referenced.insert(2);
        assert!(
            ids.reclaim(t0 + 2 * second, &referenced).is_empty(),
            "a flow names it"
        );
        assert_eq!(ids.reclaim(t0 + 3 * second, &IdSet::default()), [2]);
        assert_eq!(ids.allocate(), Some(2));
    }

    #[test]
    fn after_a_restart_used_and_once_used_ids_are_not_given_out() {
        let now = Instant::now();
        let mut ids = BackendIds::new(7, [1, 4].into(), [2, 4].into(), now);
        assert_eq!(
            std::iter::from_fn(|| ids.allocate()).collect::<Vec<_>>(),
            [5, 6, 3]
        );
        assert_eq!(
            ids.reclaim(now + Duration::from_secs(1), &IdSet::default()),
            [2]
        );
        assert_eq!(ids.used(), 5);
    }

    #[test]
    fn an_id_is_taken_back_only_while_it_rests() {
        let now = Instant::now();
        let mut ids = BackendIds::new(3, HashSet::new(), HashSet::new(), now);
        let id = ids.allocate().unwrap();
        ids.release(id, now);
        assert!(ids.take_back(id));
        assert!(!ids.take_back(id));
        assert!(
            ids.reclaim(now + Duration::from_secs(1), &IdSet::default())
                .is_empty()
        );
    }

    #[test]
    fn releasing_twice_is_releasing_once() {
        let now = Instant::now();
        let mut ids = BackendIds::new(3, HashSet::new(), HashSet::new(), now);
        let id = ids.allocate().unwrap();
        ids.release(id, now);
        ids.release(id, now);
        assert_eq!(
            ids.reclaim(now + Duration::from_secs(1), &IdSet::default()),
            [id]
        );
    }
}
