//! Addresses and node ports for Services that name none, as an API server would give them.
//!
//! Every agent that reads the same manifests must come to the same result without asking another:
//! the search starts at a hash of the Service's name, what manifests ask for by number is never
//! given away, and Services are taken in order of their names. What was given stays given while the
//! agent runs.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::Hash,
    net::IpAddr,
    ops::RangeInclusive,
};

use ipnet::IpNet;

/// What one pool gives: numbers out of ranges, to owners.
#[derive(Debug)]
pub(super) struct Pool<K> {
    given: HashMap<K, u128>,
}

impl<K> Default for Pool<K> {
    fn default() -> Self {
        Self {
            given: HashMap::new(),
        }
    }
}

/// Numbers that can be given; of one address family, or ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Range {
    first: u128,
    count: u128,
}

impl Range {
    /// The addresses of a network that a Service can have: not the network's and the broadcast
    /// address of IPv4, not the subnet-router anycast address of IPv6 ([RFC 4291,
    /// 2.6.1](https://www.rfc-editor.org/rfc/rfc4291#section-2.6.1)).
    pub(super) fn of_net(net: &IpNet) -> Self {
        let host_bits = u32::from(net.max_prefix_len() - net.prefix_len());
        let first = to_number(net.network());
        let size = 1u128.checked_shl(host_bits).unwrap_or(u128::MAX);
        let (skip_first, skip_last) = match (net, host_bits) {
            // Point to point and single addresses have neither (RFC 3021).
            (_, 0 | 1) => (0, 0),
            (IpNet::V4(_), _) => (1, 1),
            (IpNet::V6(_), _) => (1, 0),
        };
        Self {
            first: first + skip_first,
            count: size - skip_first - skip_last,
        }
    }

    /// Ports.
    pub(super) fn of_ports(ports: &RangeInclusive<u16>) -> Self {
        let first = u128::from(*ports.start());
        Self {
            first,
            count: (u128::from(*ports.end()) + 1).saturating_sub(first),
        }
    }

    fn contains(&self, number: u128) -> bool {
        number >= self.first && number - self.first < self.count
    }
}

/// An address as a number, within its family.
pub(super) fn to_number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

/// The address of a family that a number means.
pub(super) fn to_ip(number: u128, is_v6: bool) -> IpAddr {
    match is_v6 {
        false => IpAddr::V4((number as u32).into()),
        true => IpAddr::V6(number.into()),
    }
}

impl<K: Clone + Eq + Hash + Ord> Pool<K> {
    /// Gives every owner a number that nobody else has and that is not `taken`; the owners that got
    /// none are missing from the result. What owners of before do not ask for any more is free
    /// again.
    ///
    /// `owners`: by key, with the text whose hash the search begins at.
    pub(super) fn give(
        &mut self,
        owners: &BTreeMap<K, String>,
        ranges: &[Range],
        taken: &HashSet<u128>,
    ) -> BTreeMap<K, u128> {
        self.given.retain(|owner, number| {
            owners.contains_key(owner)
                && !taken.contains(number)
                && ranges.iter().any(|range| range.contains(*number))
        });
        let mut used: HashSet<u128> = self.given.values().copied().collect();
        for (owner, seed) in owners {
            if self.given.contains_key(owner) {
                continue;
            }
            let free = ranges.iter().find_map(|range| {
                let start = u128::from(fnv1a(seed)).checked_rem(range.count)?;
                // Of n + 1 numbers one is not among n.
                let tries = range.count.min((used.len() + taken.len()) as u128 + 1);
                (0..tries)
                    .map(|i| range.first + (start + i) % range.count)
                    .find(|number| !used.contains(number) && !taken.contains(number))
            });
            if let Some(number) = free {
                used.insert(number);
                self.given.insert(owner.clone(), number);
            }
        }
        self.given
            .iter()
            .map(|(owner, number)| (owner.clone(), *number))
            .collect()
    }
}

/// 64-bit FNV-1a: the same on every node and in every release, which `std`'s hasher does not
/// promise.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(names: &[&str]) -> BTreeMap<String, String> {
        names
            .iter()
            .map(|name| ((*name).to_owned(), (*name).to_owned()))
            .collect()
    }

    fn net(text: &str) -> Vec<Range> {
        vec![Range::of_net(&text.parse().unwrap())]
    }

    #[test]
    fn network_and_broadcast_addresses_are_never_given() {
        let names: Vec<String> = (0..300).map(|i| format!("svc-{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let given = Pool::default().give(&owners(&names), &net("192.0.2.0/24"), &HashSet::new());
        let numbers: HashSet<u128> = given.values().copied().collect();
        assert_eq!(numbers.len(), 254, "each once, and no more than there are");
        assert!(!numbers.contains(&to_number("192.0.2.0".parse().unwrap())));
        assert!(!numbers.contains(&to_number("192.0.2.255".parse().unwrap())));
    }

    #[test]
    fn single_addresses_and_whole_families_are_ranges_too() {
        for (text, first) in [
            ("192.0.2.7/32", "192.0.2.7"),
            ("2001:db8::7/128", "2001:db8::7"),
        ] {
            let given = Pool::default().give(&owners(&["a"]), &net(text), &HashSet::new());
            assert_eq!(given["a"], to_number(first.parse().unwrap()));
        }
        assert_eq!(
            Pool::default()
                .give(&owners(&["a"]), &net("::/0"), &HashSet::new())
                .len(),
            1
        );
    }

    #[test]
    fn what_was_given_stays_when_others_come_and_go() {
        let mut pool = Pool::default();
        let ranges = net("192.0.2.0/29");
        let before = pool.give(&owners(&["m", "n", "o"]), &ranges, &HashSet::new());
        let after = pool.give(&owners(&["a", "b", "m", "o"]), &ranges, &HashSet::new());
        assert_eq!((before["m"], before["o"]), (after["m"], after["o"]));
        assert_eq!(after.values().collect::<HashSet<_>>().len(), 4);
    }

    #[test]
    fn what_is_asked_for_by_number_is_never_given_away() {
        let mut pool = Pool::default();
        let ranges = [Range::of_ports(&(30_000..=30_001))];
        let first = pool.give(&owners(&["a"]), &ranges, &HashSet::new())["a"];
        let moved = pool.give(&owners(&["a"]), &ranges, &HashSet::from([first]))["a"];
        assert_eq!(
            HashSet::from([first, moved]),
            HashSet::from([30_000, 30_001])
        );
        let full = pool.give(&owners(&["a", "b"]), &ranges, &HashSet::from([30_000]));
        assert_eq!(full.len(), 1, "a full range gives nothing twice");
    }

    #[test]
    fn the_hash_is_the_published_one() {
        assert_eq!(fnv1a(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a("foobar"), 0x8594_4171_f739_67e8);
    }
}
