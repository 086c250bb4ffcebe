//! The hashes that choose: cheap to compute in the kernel, the same on every node and after every
//! restart.
//!
//! Not cryptographic: a client can steer its own flows, as it can by choosing its source port.

use crate::family::Family;

/// Odd constants with well-spread bits (from the golden ratio and MurmurHash3's finaliser).
const K1: u64 = 0x9e37_79b9_7f4a_7c15;
const K2: u64 = 0xff51_afd7_ed55_8ccd;

/// Spreads every input bit over all output bits.
#[inline(always)]
pub fn mix(value: u64) -> u64 {
    let mut h = value;
    h ^= h >> 32;
    h = h.wrapping_mul(K2);
    h ^= h >> 29;
    h = h.wrapping_mul(K1);
    h ^ (h >> 32)
}

/// Hash of one side of a flow: address, port (host order), protocol.
#[inline(always)]
pub fn side<F: Family>(addr: F::Words, port: u16, proto: u8) -> u64 {
    mix(F::fold(addr).wrapping_mul(K1) ^ (u64::from(port) << 40 | u64::from(proto) << 56))
}

/// What tells backends apart that had one id after the other; never 0.
#[inline(always)]
pub fn backend<F: Family>(addr: F::Words, port: u16) -> u32 {
    (side::<F>(addr, port, 0) as u32).max(1)
}

/// The flow hash: the client's side and the frontend's. Equal on all nodes.
#[inline(always)]
pub fn flow<F: Family>(
    client: F::Words,
    client_port: u16,
    frontend: F::Words,
    frontend_port: u16,
    proto: u8,
) -> u32 {
    let client = side::<F>(client, client_port, proto);
    let frontend = F::fold(frontend) ^ u64::from(frontend_port) << 32;
    mix(client.rotate_left(17) ^ frontend.wrapping_mul(K2)) as u32
}

/// Maps a hash onto `0..n` without division. 0 for `n == 0`.
#[inline(always)]
pub fn pick(hash: u32, n: u32) -> u32 {
    ((u64::from(hash) * u64::from(n)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use super::*;
    use crate::family::{V4, V6};

    fn chi_squared(counts: &[u32]) -> f64 {
        let expected = f64::from(counts.iter().sum::<u32>()) / counts.len() as f64;
        counts
            .iter()
            .map(|&n| (f64::from(n) - expected).powi(2) / expected)
            .sum()
    }

    /// P9 on the host: 10,000 flows that differ only in their source port spread evenly (p > 0.001,
    /// 6 degrees: 22.46).
    #[test]
    fn consecutive_ports_spread_evenly() {
        for seed in 0..20u8 {
            let mut v4 = vec![0; 7];
            let mut v6: Vec<u32> = vec![0; 7];
            let mut frontend6 = [0; 16];
            frontend6[..3].copy_from_slice(&[0xfd, 0, seed]);
            for port in 30_000..40_000u16 {
                v4[pick(
                    flow::<V4>(
                        V4::words([10, 0, seed, 2]),
                        port,
                        V4::words([10, 96, 0, 1]),
                        80,
                        6,
                    ),
                    7,
                ) as usize] += 1;
                v6[pick(
                    flow::<V6>(V6::words([seed; 16]), port, V6::words(frontend6), 80, 17),
                    7,
                ) as usize] += 1;
            }
            assert!(chi_squared(&v4) < 22.46, "IPv4, seed {seed}: {v4:?}");
            assert!(chi_squared(&v6) < 22.46, "IPv6, seed {seed}: {v6:?}");
        }
    }

    #[test]
    fn pick_stays_in_range() {
        assert_eq!(pick(u32::MAX, 3), 2);
        assert_eq!(pick(0, 3), 0);
        assert_eq!(pick(u32::MAX, 0), 0);
    }
}
