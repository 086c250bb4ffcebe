//! Which ports the kernel gives to sockets of this node that ask for none.

use std::{fs, ops::RangeInclusive};

/// Linux's default.
const DEFAULT: RangeInclusive<u16> = 32_768..=60_999;

/// The smallest range of ports that holds all of `snat` that the kernel may give to sockets, as it says
/// now for this network namespace, in both families: `ip_local_port_range` without
/// `ip_local_reserved_ports`. Empty: none.
pub fn within(snat: &RangeInclusive<u16>) -> RangeInclusive<u16> {
    let read = |name| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
    given(
        snat,
        &read("ip_local_port_range"),
        &read("ip_local_reserved_ports"),
    )
}

/// The same of the sysctls' texts.
fn given(snat: &RangeInclusive<u16>, range: &str, reserved: &str) -> RangeInclusive<u16> {
    let mut numbers = range.split_whitespace().map(str::parse);
    let local = match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) => first..=last,
        _ => DEFAULT,
    };
    let reserved: Vec<_> = reserved.trim().split(',').filter_map(ports).collect();
    let mut given = snat
        .clone()
        .filter(|port| local.contains(port) && !reserved.iter().any(|ports| ports.contains(port)));
    match (given.next(), given.next_back()) {
        (Some(first), Some(last)) => first..=last,
        (Some(only), None) => only..=only,
        #[expect(clippy::reversed_empty_ranges, reason = "no port")]
        _ => 1..=0,
    }
}

/// One part of the list: a port, or the first and the last.
fn ports(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(first.parse().ok()?..=last.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::given;

    #[test]
    fn ports_that_are_reserved_are_given_to_nobody() {
        let given = |snat, range, reserved| {
            let ports = given(&snat, range, reserved);
            (!ports.is_empty()).then(|| (*ports.start(), *ports.end()))
        };
        let all = 1024..=65_535;
        let range = "32768\t60999\n";
        assert_eq!(given(all.clone(), range, "\n"), Some((32_768, 60_999)));
        assert_eq!(given(all.clone(), "", ""), Some((32_768, 60_999)));
        let edges = "32768-40000,50000,60999\n";
        assert_eq!(given(all.clone(), range, edges), Some((40_001, 60_998)));
        assert_eq!(given(20_000..=20_999, range, ""), None);
        assert_eq!(given(20_000..=32_768, range, ""), Some((32_768, 32_768)));
        // A supply of its own in the middle of them.
        let (own, tuned) = (20_000..=29_999, "1024\t65535\n");
        assert_eq!(given(own.clone(), tuned, ""), Some((20_000, 29_999)));
        assert_eq!(given(own, tuned, "8080,20000-29999\n"), None);
    }
}
