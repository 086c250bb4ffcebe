//! The compiled programs, and the kernel that they are for.

/// The compiled `proxy-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shunt-bpf"));

/// The ELF object with all programs and map definitions, as [`load`](super::load::load) loads it.
pub fn object() -> &'static [u8] {
    OBJECT
}

/// The running kernel's release, for messages.
pub(crate) fn kernel() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}
