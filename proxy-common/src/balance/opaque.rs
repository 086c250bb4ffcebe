//! Values that the verifier does not follow.

/// A value that the verifier knows nothing about, because it stands in memory that it does not
/// follow. It walks a loop once for every combination of what it does know, and would not come to
/// an end.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opaque<T = u32>(T);

impl<T: Copy> Opaque<T> {
    #[inline(always)]
    pub(crate) fn get(&self) -> T {
        // SAFETY: a reference is readable; volatile, so that LLVM does not remember what was
        // written.
        unsafe { (&raw const self.0).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn set(&mut self, value: T) {
        // SAFETY: a reference is writable.
        unsafe { (&raw mut self.0).write_volatile(value) };
    }

    /// The value, forgotten and remembered.
    #[inline(always)]
    pub(crate) fn hide(&mut self, value: T) -> T {
        self.set(value);
        self.get()
    }
}
