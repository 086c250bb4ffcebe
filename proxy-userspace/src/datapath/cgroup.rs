//! Where cgroup2 is mounted, which the socket programs are attached to.

use std::path::{Path, PathBuf};

use rustix::fs::statfs;

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// Whether `path` is in a cgroup2 file system.
pub(crate) fn is_cgroup2(path: &Path) -> bool {
    // The field's width differs between architectures.
    statfs(path).is_ok_and(|s| s.f_type as u64 & 0xffff_ffff == CGROUP2_MAGIC)
}

/// The cgroup2 mount: `/sys/fs/cgroup`, or its folder `unified` where cgroup1 has the first place.
pub fn default_root() -> PathBuf {
    let usual = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let found = usual.into_iter().find(|path| is_cgroup2(path));
    found.unwrap_or(usual[0]).to_owned()
}
