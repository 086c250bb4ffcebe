//! The capabilities that `bpf(2)` asks for: capabilities(7).

use std::fs;

/// Number of `CAP_SYS_ADMIN`, which includes `CAP_BPF` and `CAP_PERFMON` (they were split off it in
/// Linux 5.8).
const SYS_ADMIN: u32 = 21;
/// What the agent needs: names without `CAP_`, as a container's `securityContext` has them, and
/// numbers.
pub const NEEDED: [(&str, u32); 3] = [("BPF", 39), ("NET_ADMIN", 12), ("PERFMON", 38)];

/// Which of [`NEEDED`] this process does not have.
pub fn missing() -> Vec<&'static str> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    missing_in(effective(&status))
}

fn missing_in(effective: u64) -> Vec<&'static str> {
    let has = |number: u32| effective & (1 << number) != 0;
    NEEDED
        .iter()
        .filter(|&&(name, number)| !has(number) && (name == "NET_ADMIN" || !has(SYS_ADMIN)))
        .map(|&(name, _)| name)
        .collect()
}

/// The bits of `CapEff:` in a `/proc/<pid>/status`; none when it is not there.
fn effective(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing() {
        let of = |hex: &str| {
            missing_in(effective(&format!(
                "Name:\tshunt\nCapEff:\t{hex}\nCapBnd:\t0\n"
            )))
        };
        assert_eq!(of("000000c000001000"), [""; 0]);
        assert_eq!(of("0000000000000000"), ["BPF", "NET_ADMIN", "PERFMON"]);
        assert_eq!(of("0000008000001000"), ["PERFMON"]);
        // SYS_ADMIN stands for both that were once part of it, and for no other.
        assert_eq!(of("0000000000200000"), ["NET_ADMIN"]);
    }
}
