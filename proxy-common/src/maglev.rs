//! Maglev hashing: tables on which all nodes agree, and of which a backend's coming or going moves
//! little.
//!
//! Eisenbud et al., *Maglev: A Fast and Reliable Software Network Load Balancer*, NSDI 2016,
//! section 3.4. Backends take turns, so their shares differ by at most one slot.

use alloc::{vec, vec::Vec};

use crate::hash;

/// Table sizes: primes, so that every backend's permutation visits every slot.
const SIZES: [u32; 10] = [
    251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071,
];

/// Slots per backend that a table should have: shares then differ by less than two per cent.
const SLOTS_PER_BACKEND: u32 = 64;

/// The table size for a number of backends: at least `SLOTS_PER_BACKEND` slots each while the
/// largest size allows it.
pub fn table_size(backends: usize) -> u32 {
    let wanted = u32::try_from(backends)
        .unwrap_or(u32::MAX)
        .saturating_mul(SLOTS_PER_BACKEND);
    SIZES
        .into_iter()
        .find(|&size| size >= wanted)
        .unwrap_or(SIZES[SIZES.len() - 1])
}

/// Fills a table of `size` slots (a prime from [`table_size`]) with indices into `identities`.
///
/// An identity is a hash of a backend's address and port, never of its position. Empty when there
/// are no backends; only the first `size` backends count.
pub fn table(identities: &[u64], size: u32) -> Vec<u32> {
    const FREE: u32 = u32::MAX;
    if identities.is_empty() {
        return Vec::new();
    }
    let modulus = u64::from(size);
    let mut next: Vec<(u64, u64)> = identities
        .iter()
        .take(size as usize)
        .map(|&id| {
            (
                hash::mix(id ^ 0x6d61_676c_6576) % modulus,
                hash::mix(id) % (modulus - 1) + 1,
            )
        })
        .collect();
    let mut table = vec![FREE; size as usize];
    let mut filled = 0;
    loop {
        for (backend, (position, skip)) in next.iter_mut().enumerate() {
            while table[*position as usize] != FREE {
                *position = (*position + *skip) % modulus;
            }
            table[*position as usize] = backend as u32;
            filled += 1;
            if filled == size {
                return table;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn identities(n: u64) -> Vec<u64> {
        (0..n).map(|i| hash::mix(i + 1)).collect()
    }

    #[test]
    fn shares_differ_by_at_most_one() {
        for n in [1, 2, 3, 7, 100, 1000] {
            let table = table(&identities(n), table_size(n as usize));
            let mut shares = BTreeMap::<u32, u32>::new();
            table
                .iter()
                .for_each(|&backend| *shares.entry(backend).or_default() += 1);
            let (min, max) = (
                shares.values().min().unwrap(),
                shares.values().max().unwrap(),
            );
            assert_eq!(shares.len() as u64, n);
            assert!(max - min <= 1, "{n} backends: {min}..{max}");
        }
    }

    #[test]
    fn order_of_backends_does_not_matter_to_who_owns_a_slot_much() {
        let ids = identities(10);
        let size = table_size(10);
        let before = table(&ids, size);
        let mut fewer = ids.clone();
        let gone = fewer.remove(4);
        let after = table(&fewer, size);
        let moved = before
            .iter()
            .zip(&after)
            .filter(|&(&b, &a)| ids[b as usize] != gone && ids[b as usize] != fewer[a as usize])
            .count();
        assert!(
            moved * 10 < size as usize,
            "{moved} of {size} slots moved without need"
        );
    }

    #[test]
    fn no_backends_no_table() {
        assert!(table(&[], 251).is_empty());
    }
}
