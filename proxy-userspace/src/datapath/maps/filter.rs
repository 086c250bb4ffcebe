//! The bitmap of [`shunt_common::filter`].

use std::{
    collections::HashSet,
    path::Path,
    sync::{Mutex, PoisonError, atomic::Ordering},
};

use shunt_common::{filter::word_and_mask, layout::names};

use super::{Array, Result};

/// The bitmap: bits are set for good, or lent until nobody needs them.
pub struct Filter {
    words: Array<u64>,
    /// Bits that are set only because somebody has [asked](Self::lend) for them.
    lent: Mutex<HashSet<u32>>,
}

impl Filter {
    /// Opens and maps the pinned map.
    ///
    /// # Errors
    /// As [`Array::open`].
    pub(super) fn open(bpf_root: &Path) -> Result<Self> {
        Ok(Self {
            words: Array::open(bpf_root, names::FILTER, "")?,
            lent: Mutex::default(),
        })
    }

    /// One word; `None` beyond the end.
    pub fn get(&self, index: u32) -> Option<u64> {
        self.words.get(index)
    }

    /// Writes by this process so far.
    pub fn writes(&self) -> u64 {
        self.words.writes()
    }

    /// Sets a bit for good, with release order. Says whether it was clear.
    pub fn set(&self, bit: u32) -> bool {
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        lent.remove(&bit);
        let (word, mask) = word_and_mask(bit);
        self.words.set_bits(word, mask)
    }

    /// Sets these bits for now, and takes back what was lent before and is not among them. A bit that
    /// an agent before this one has lent stays: nobody knows whose it is.
    pub fn lend(&self, bits: &HashSet<u32>) {
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        lent.retain(|&bit| {
            let wanted = bits.contains(&bit);
            if !wanted {
                let (word, mask) = word_and_mask(bit);
                self.words.clear_bits(word, mask);
            }
            wanted
        });
        for &bit in bits {
            let (word, mask) = word_and_mask(bit);
            if self.words.set_bits(word, mask) {
                lent.insert(bit);
            }
        }
    }
}

impl Array<u64> {
    /// Sets bits of a word, with release order. Says whether any was clear.
    fn set_bits(&self, index: u32, mask: u64) -> bool {
        let word = self.word(index);
        if word.load(Ordering::Relaxed) & mask == mask {
            return false;
        }
        self.wrote();
        word.fetch_or(mask, Ordering::Release);
        true
    }

    fn clear_bits(&self, index: u32, mask: u64) {
        self.wrote();
        self.word(index).fetch_and(!mask, Ordering::Release);
    }
}
