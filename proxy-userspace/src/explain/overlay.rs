//! A map as one decision would leave it: entries are copied when they are first asked for, and
//! changes stay with the copies.

use std::{cell::RefCell, collections::HashMap, hash::Hash, ptr::NonNull};

use shunt_common::balance::Entry;

/// What was read of a map, and what was changed since. `None`: there is no such entry.
#[derive(Debug)]
pub(super) struct Overlay<K, V> {
    entries: RefCell<HashMap<K, Option<NonNull<V>>>>,
    /// All copies ever made: an entry that was removed may still be held.
    copies: RefCell<Vec<NonNull<V>>>,
}

impl<K, V> Default for Overlay<K, V> {
    fn default() -> Self {
        Self {
            entries: RefCell::default(),
            copies: RefCell::default(),
        }
    }
}

impl<K, V> Drop for Overlay<K, V> {
    fn drop(&mut self) {
        for copy in self.copies.get_mut().drain(..) {
            // SAFETY: of `Box::into_raw`, once each; entries do not outlive the overlay.
            drop(unsafe { Box::from_raw(copy.as_ptr()) });
        }
    }
}

impl<K: Eq + Hash, V: Copy> Overlay<K, V> {
    /// The copy of an entry, `read` from the map the first time.
    pub(super) fn get(&self, key: K, read: impl FnOnce() -> Option<V>) -> Option<Entry<'_, V>> {
        let mut entries = self.entries.borrow_mut();
        let entry = *entries
            .entry(key)
            .or_insert_with(|| read().map(|value| self.copy(value)));
        // SAFETY: copies stay where they are until the overlay is dropped, and nobody makes
        // references into them.
        entry.map(|entry| unsafe { Entry::new(entry) })
    }

    /// Adds an entry, or puts it in the place of another.
    pub(super) fn set(&self, key: K, value: V) {
        let copy = self.copy(value);
        self.entries.borrow_mut().insert(key, Some(copy));
    }

    /// Removes an entry.
    pub(super) fn remove(&self, key: K) {
        self.entries.borrow_mut().insert(key, None);
    }

    fn copy(&self, value: V) -> NonNull<V> {
        let copy = NonNull::from(Box::leak(Box::new(value)));
        self.copies.borrow_mut().push(copy);
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_once_and_changed_in_the_copy() {
        let overlay = Overlay::<u32, u32>::default();
        let first = overlay.get(1, || Some(7)).unwrap();
        first.write(&8);
        let again = overlay.get(1, || unreachable!("it was read"));
        assert_eq!(again.unwrap().read(), 8);
        overlay.remove(1);
        assert!(overlay.get(1, || Some(9)).is_none());
        assert_eq!(first.read(), 8, "whoever holds it may go on");
        overlay.set(1, 10);
        assert_eq!(overlay.get(1, || None).unwrap().read(), 10);
        assert!(overlay.get(2, || None).is_none());
    }
}
