//! Addresses as Go read them before 1.17 and Kubernetes still reads what it has stored: leading
//! zeros are only zeros.
//!
//! `010` is eight to C's `inet_aton` and ten to Kubernetes (`ParseIPSloppy`); Rust takes neither.
//! New objects with such numbers are refused since Kubernetes 1.36, old ones go on.

use std::{net::IpAddr, str::FromStr};

use ipnet::IpNet;

/// An address, and whether it has leading zeros.
pub(crate) fn ip(text: &str) -> Option<(IpAddr, bool)> {
    let (ip, had_zeros) = parse::<IpAddr>(text)?;
    Some((ip.to_canonical(), had_zeros))
}

/// A network, and whether it has leading zeros.
pub(crate) fn net(text: &str) -> Option<(IpNet, bool)> {
    parse(text)
}

fn parse<T: FromStr>(text: &str) -> Option<(T, bool)> {
    let text = text.trim();
    let shorter = without_leading_zeros(text);
    if let Ok(value) = text.parse() {
        // Some parsers take them in silence. In IPv6 groups they are usual.
        return Some((value, !text.contains(':') && shorter != text));
    }
    Some((shorter.parse().ok()?, true))
}

/// The text with every number as short as it can be.
fn without_leading_zeros(text: &str) -> String {
    let mut shorter = String::with_capacity(text.len());
    for part in text.split_inclusive(['.', ':', '/']) {
        let digits = part.trim_end_matches(['.', ':', '/']);
        let kept = digits.trim_start_matches('0');
        if kept.is_empty() && !digits.is_empty() {
            shorter.push('0');
        }
        shorter.push_str(kept);
        shorter.push_str(&part[digits.len()..]);
    }
    shorter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_zeros_are_only_zeros() {
        for (text, want) in [
            ("10.44.0.11", Some(("10.44.0.11", false))),
            (" 10.44.0.11 ", Some(("10.44.0.11", false))),
            ("10.44.000.011", Some(("10.44.0.11", true))),
            ("010.010.010.010", Some(("10.10.10.10", true))),
            ("010.0000000.0.1", Some(("10.0.0.1", true))),
            ("0.0.0.0", Some(("0.0.0.0", false))),
            ("00.00.00.00", Some(("0.0.0.0", true))),
            ("10.44.0.0256", None),
            ("10.44.0", None),
            ("10.44..1", None),
            ("0x10.0.0.1", None),
            ("10.0.0.1/024", None),
            ("::ffff:10.0.0.011", Some(("10.0.0.11", true))),
            ("2001:db8::1", Some(("2001:db8::1", false))),
            ("2001:0db8::0001", Some(("2001:db8::1", false))),
            ("2001:00db8::00001", Some(("2001:db8::1", true))),
            ("::", Some(("::", false))),
            (":", None),
            ("", None),
            ("localhost", None),
        ] {
            let want = want.map(|(ip, zeros)| (ip.parse::<IpAddr>().unwrap(), zeros));
            assert_eq!(ip(text), want, "{text:?}");
        }
        for (text, want) in [
            ("10.0.0.0/24", Some(("10.0.0.0/24", false))),
            ("010.0.0.0/024", Some(("10.0.0.0/24", true))),
            ("10.0.0.0/00", Some(("10.0.0.0/0", true))),
            ("010.0.0.0/8", Some(("10.0.0.0/8", true))),
            ("10.0.0.0/033", None),
            ("fd00::/0064", Some(("fd00::/64", true))),
            ("10.0.0.0", None),
            ("10.0.0.0/", None),
        ] {
            let want = want.map(|(net, zeros)| (net.parse::<IpNet>().unwrap(), zeros));
            assert_eq!(net(text), want, "{text:?}");
        }
    }
}
