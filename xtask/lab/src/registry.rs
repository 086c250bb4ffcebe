//! Which labs exist: one locked file per lab, so that several run side by side and those of killed runs can be told.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

use crate::{agent, cgroup, netns};

/// One file per lab, locked while its owner lives.
const REGISTRY_DIR: &str = "/run/shunt-lab";
/// Where BPF objects are pinned.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

/// A lab's number; while it is held the number belongs to this process.
#[derive(Debug)]
pub(crate) struct LabId {
    number: u32,
    path: PathBuf,
    // The lock goes with the descriptor, also when the process is killed.
    _lock: File,
}

impl LabId {
    /// Takes the lowest number that no living process has.
    pub(crate) fn take() -> Result<Self> {
        let _guard = registry_lock()?;
        for number in 0.. {
            let path = Path::new(REGISTRY_DIR).join(number.to_string());
            let mut file = match File::create_new(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    let Some(file) = lock_if_dead(&path)? else { continue };
                    sweep(number);
                    file.set_len(0).with_context(|| format!("{}", path.display()))?;
                    file
                }
                Err(error) => return Err(error).with_context(|| format!("{}: cannot create", path.display())),
            };
            flock(&file, FlockOperation::NonBlockingLockExclusive)
                .with_context(|| format!("{}: cannot lock", path.display()))?;
            // For a reader only: the lock is what counts.
            let _ = writeln!(file, "{}", std::process::id());
            return Ok(Self {
                number,
                path,
                _lock: file,
            });
        }
        unreachable!("a machine has fewer than 2^32 labs")
    }

    /// The prefix of everything that has a machine-wide name.
    pub(crate) fn prefix(&self) -> String {
        prefix(self.number)
    }
}

impl Drop for LabId {
    fn drop(&mut self) {
        // The lock is still held, so nobody else can take the number for dead meanwhile.
        sweep(self.number);
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes what labs of dead processes left; returns how many there were.
pub(crate) fn sweep_stale() -> Result<usize> {
    let _guard = registry_lock()?;
    let mut swept = 0;
    for entry in fs::read_dir(REGISTRY_DIR)
        .with_context(|| REGISTRY_DIR.to_owned())?
        .flatten()
    {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if let Some(_lock) = lock_if_dead(&entry.path())? {
            sweep(number);
            let _ = fs::remove_file(entry.path());
            swept += 1;
        }
    }
    Ok(swept)
}

/// Serialises taking numbers and sweeping between processes.
fn registry_lock() -> Result<File> {
    fs::create_dir_all(REGISTRY_DIR).with_context(|| format!("{REGISTRY_DIR}: cannot create (needs root)"))?;
    let path = Path::new(REGISTRY_DIR).join("lock");
    let file = File::create(&path).with_context(|| format!("{}: cannot create", path.display()))?;
    flock(&file, FlockOperation::LockExclusive).with_context(|| format!("{}: cannot lock", path.display()))?;
    Ok(file)
}

/// The lab's file, locked, if its owner is dead.
fn lock_if_dead(path: &Path) -> Result<Option<File>> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("{}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}: cannot lock", path.display())),
    }
}

fn prefix(number: u32) -> String {
    format!("shunt-lab{number}")
}

/// Removes the processes, namespaces, pins and cgroups of one lab.
fn sweep(number: u32) {
    let prefix = prefix(number);
    let starts = |name: &std::ffi::OsStr| {
        name.to_str()
            .and_then(|name| name.strip_prefix(&prefix))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    if let Ok(root) = cgroup::mount_point() {
        cgroup::remove(&root.join(&prefix));
    }
    for (dir, remove) in [
        (BPFFS, agent::remove_pins as fn(&Path)),
        (netns::NETNS_DIR, netns::remove),
    ] {
        for entry in fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| starts(&entry.file_name()))
        {
            remove(&entry.path());
        }
    }
}
