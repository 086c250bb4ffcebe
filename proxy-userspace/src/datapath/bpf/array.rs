//! Arrays in this process's memory. Kernel 5.5.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicU64},
};

use aya::Pod;
use shunt_common::layout::{Octets, SnatSlot};

/// An array map with `BPF_F_MMAPABLE`, mapped into this process: reads and writes without a system
/// call.
pub struct MappedArray<T> {
    base: NonNull<u8>,
    bytes: usize,
    len: u32,
    _element: PhantomData<T>,
}

// SAFETY: the memory is shared with the kernel anyway; elements are plain bytes, read and written
// whole without references to them, and words that several write at once are atomics.
unsafe impl<T: Pod + Send> Send for MappedArray<T> {}
// SAFETY: as above.
unsafe impl<T: Pod + Sync> Sync for MappedArray<T> {}

impl<T: Pod> MappedArray<T> {
    /// The kernel places elements at multiples of eight bytes.
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// Maps an array of `len` elements.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` or `ENOTSUPP` without `BPF_F_MMAPABLE`.
    pub fn new(fd: BorrowedFd<'_>, len: u32) -> io::Result<Self> {
        const { assert!(align_of::<T>() <= 8) };
        // SAFETY: asks for a constant of the kernel.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let bytes = (len as usize * Self::STRIDE).next_multiple_of(page);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or_else(io::Error::last_os_error)?,
            bytes,
            len,
            _element: PhantomData,
        })
    }

    /// Number of elements.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where an element stands, for atomic access.
    pub(in crate::datapath) fn at(&self, index: u32) -> *mut T {
        assert!(
            index < self.len,
            "index {index} of an array of {}",
            self.len
        );
        // SAFETY: in the mapping, by the assertion above; aligned, because the base is a page and
        // the stride a multiple of 8.
        unsafe { self.base.as_ptr().add(index as usize * Self::STRIDE).cast() }
    }

    /// One element. Whoever writes it at the same time may be seen half done.
    pub fn get(&self, index: u32) -> T {
        // SAFETY: valid and aligned (see `at`); volatile, because others write it; any bytes are a
        // Pod.
        unsafe { self.at(index).read_volatile() }
    }

    /// Writes one element, which nobody may be reading yet: publish it afterwards with a release
    /// operation or a system call.
    pub fn set(&self, index: u32, value: T) {
        // SAFETY: valid and aligned (see `at`).
        unsafe { self.at(index).write_volatile(value) }
    }
}

impl<A: Octets> MappedArray<SnatSlot<A>> {
    /// When a slot's flow was last seen, as an atomic: programs claim slots by it.
    pub fn last_seen(&self, index: u32) -> &AtomicU32 {
        // SAFETY: valid and alive as long as the mapping (see `at`), an aligned field; all writers
        // use atomics to claim it.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.at(index)).last_seen) }
    }

    /// A slot's `FLOW_*` bits as an atomic: programs set and clear them at any time.
    pub fn state(&self, index: u32) -> &AtomicU32 {
        // SAFETY: valid and alive as long as the mapping (see `at`), an aligned field; all writers
        // of a slot that is in use change its state by atomics.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.at(index)).state) }
    }
}

impl MappedArray<u64> {
    /// One word as an atomic, for words that several write at once.
    pub fn atomic(&self, index: u32) -> &AtomicU64 {
        // SAFETY: valid, aligned to eight bytes and alive as long as the mapping; all writers use
        // atomics.
        unsafe { AtomicU64::from_ptr(self.at(index)) }
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which no reference is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
