//! Bits of words that other CPUs change at the same time.

/// Sets bits; nobody is told what was there before, which costs no more than the locked instruction.
///
/// # Safety
/// `word` must be aligned, readable and writable, and changed by atomic access alone.
#[inline(always)]
pub(crate) unsafe fn or(word: *mut u32, bits: u32) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's promise.
    unsafe {
        core::intrinsics::atomic_or::<u32, u32, { core::intrinsics::AtomicOrdering::Relaxed }>(
            word, bits,
        )
    };
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's promise.
    unsafe {
        core::sync::atomic::AtomicU32::from_ptr(word)
            .fetch_or(bits, core::sync::atomic::Ordering::Relaxed)
    };
}

/// Takes all bits back that are not in `mask`.
///
/// # Safety
/// As [`or`].
#[inline(always)]
pub(crate) unsafe fn and(word: *mut u32, mask: u32) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's promise.
    unsafe {
        core::intrinsics::atomic_and::<u32, u32, { core::intrinsics::AtomicOrdering::Relaxed }>(
            word, mask,
        )
    };
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's promise.
    unsafe {
        core::sync::atomic::AtomicU32::from_ptr(word)
            .fetch_and(mask, core::sync::atomic::Ordering::Relaxed)
    };
}
