//! One agent per `--bpf-root`: a lock on its directory, which the kernel frees when the agent dies.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// Why the lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error("--bpf-root {}: another shunt{} works with it: stop that one first, or give this one a --bpf-root of its own",
        root.display(), pid.map(|p| format!(" (pid {p})")).unwrap_or_default())]
    Held {
        /// The directory.
        root: PathBuf,
        /// Who has it, if /proc/locks says so.
        pid: Option<u32>,
    },
    /// The directory does not open.
    #[error("--bpf-root {}: {error}", root.display())]
    Io {
        /// The directory.
        root: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// The right to change what is under a `--bpf-root`, until dropped.
#[derive(Debug)]
pub struct RootLock {
    // Closing it frees the lock; it is close-on-exec, so children do not inherit it.
    _directory: File,
}

impl RootLock {
    /// Locks `root`, which must exist.
    ///
    /// # Errors
    /// [`LockError::Held`] when another process, or this one, has it already.
    pub fn acquire(root: &Path) -> Result<Self, LockError> {
        let io_error = |error| LockError::Io {
            root: root.to_owned(),
            error,
        };
        let directory = File::open(root).map_err(io_error)?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                _directory: directory,
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let holder = directory
                    .metadata()
                    .ok()
                    .and_then(|m| holder(m.dev(), m.ino()));
                Err(LockError::Held {
                    root: root.to_owned(),
                    pid: holder,
                })
            }
            Err(errno) => Err(io_error(errno.into())),
        }
    }
}

/// The pid of an agent that has `root` locked, for `status` and messages; `None` when nobody has,
/// or it cannot be known.
pub fn agent_pid(root: &Path) -> Option<u32> {
    let metadata = fs::metadata(root).ok()?;
    holder(metadata.dev(), metadata.ino())
}

/// Looks the holder of a flock up in /proc/locks: `1: FLOCK  ADVISORY  WRITE 742 00:1f:12345 0
/// EOF`.
fn holder(dev: u64, inode: u64) -> Option<u32> {
    holder_in(&fs::read_to_string("/proc/locks").ok()?, dev, inode)
}

fn holder_in(locks: &str, dev: u64, inode: u64) -> Option<u32> {
    let file = format!(
        "{:02x}:{:02x}:{inode}",
        rustix::fs::major(dev),
        rustix::fs::minor(dev)
    );
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        match fields[..] {
            // A process that waits has "->" as its second field and does not match.
            [_, "FLOCK", _, "WRITE", pid, place, ..] if place == file => {
                pid.parse().ok().filter(|&p| p != 0)
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_refused_and_told_who_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let first = RootLock::acquire(folder.path()).unwrap();
        match RootLock::acquire(folder.path()).unwrap_err() {
            LockError::Held { pid, root } => {
                assert_eq!(pid, Some(std::process::id()));
                assert_eq!(root, folder.path());
            }
            other => panic!("{other}"),
        }
        assert_eq!(agent_pid(folder.path()), Some(std::process::id()));
        drop(first);
        assert_eq!(agent_pid(folder.path()), None);
        RootLock::acquire(folder.path()).unwrap();
    }

    #[test]
    fn the_holder_is_found_among_other_locks() {
        let locks = "1: POSIX  ADVISORY  WRITE 10 00:1f:7 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 11 00:1f:70 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 12 00:1f:7 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 13 00:1f:7 0 EOF\n";
        assert_eq!(holder_in(locks, rustix::fs::makedev(0, 0x1f), 7), Some(13));
        assert_eq!(holder_in(locks, rustix::fs::makedev(0, 0x1f), 8), None);
    }
}
