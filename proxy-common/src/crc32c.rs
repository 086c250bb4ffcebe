//! SCTP's checksum, [RFC 9260 appendix A](https://www.rfc-editor.org/rfc/rfc9260#appendix-A):
//! CRC32c over the SCTP packet, ports and all data, without a pseudo-header. New addresses leave it
//! alone; new ports do not.
//!
//! A CRC is linear: two messages of one length have sums that differ by the (bare) sum of their
//! difference, which here is one word in front of zeros. So a sum is brought up to date without a
//! look at the data: the word is moved over so many zeros by multiplying it with a power of x,
//! modulo the polynomial.

/// The polynomial, lowest power first.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// A value that LLVM must not look behind: it would turn the masks below into jumps, and the
/// verifier would follow each.
#[inline(always)]
fn opaque(mut value: u32) -> u32 {
    // SAFETY: a local variable.
    unsafe { (&raw mut value).read_volatile() }
}

/// `a` times x.
#[inline(always)]
fn times_x(a: u32) -> u32 {
    a >> 1 ^ (POLYNOMIAL & 0u32.wrapping_sub(opaque(a & 1)))
}

/// `a` times `b`. In the kernel a function that the verifier looks at once
/// ([`crate::balance::Subprogram`]).
#[cfg_attr(target_arch = "bpf", unsafe(export_name = "crc32c_times"))]
#[inline(never)]
extern "C" fn times(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    for _ in 0..32 {
        product ^= b & 0u32.wrapping_sub(opaque(a >> 31));
        a <<= 1;
        b = times_x(b);
    }
    product
}

/// x to the power of 8, 16, 32 … 2^18: what 1, 2, 4 … 2^15 bytes multiply by.
const POWERS: [u32; 16] = {
    // Without what LLVM must not see, for the compiler.
    const fn times(mut a: u32, mut b: u32) -> u32 {
        let mut product = 0;
        while a != 0 {
            product ^= b * (a >> 31);
            a <<= 1;
            b = b >> 1 ^ (POLYNOMIAL * (b & 1));
        }
        product
    }
    let mut powers = [1 << 23; 16];
    let mut i = 1;
    while i < powers.len() {
        powers[i] = times(powers[i - 1], powers[i - 1]);
        i += 1;
    }
    powers
};

/// What to add (exclusive or) to the sum of a message of `length` bytes, at most 65535, whose first
/// word changes by `difference`. Words as they stand in memory on a little-endian machine.
// Constants in the code, not a table in memory, which would be one more map.
#[inline(never)]
pub fn first_word_changed(difference: u32, length: u32) -> u32 {
    let mut sum = difference;
    macro_rules! moved_by {
        ($($bit:literal)+) => { $(
            let mask = 0u32.wrapping_sub(opaque(length >> $bit & 1));
            sum = (times(sum, const { POWERS[$bit] }) & mask) | (sum & !mask);
        )+ };
    }
    moved_by!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    sum
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn full(bytes: &[u8]) -> u32 {
        let step = |crc: u32, byte: &u8| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                crc >> 1 ^ (POLYNOMIAL * (crc & 1))
            })
        };
        !bytes.iter().fold(!0, step)
    }

    #[test]
    fn the_sum_is_the_standards() {
        assert_eq!(full(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn incremental_equals_full(old: [u8; 4], new: [u8; 4], rest: Vec<u8>) {
            let message = |first: [u8; 4]| [&first[..], &rest].concat();
            let difference = u32::from_le_bytes(old) ^ u32::from_le_bytes(new);
            let sum = first_word_changed(difference, 4 + rest.len() as u32);
            prop_assert_eq!(full(&message(old)) ^ sum, full(&message(new)));
        }
    }
}
