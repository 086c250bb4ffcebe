//! Which labs exist: one locked file per lab, so that several run side by side and those of killed
//! runs can be told.
//!
//! A lab's number is never given again while its process lives: what is dropped late (a namespace
//! that a test still holds) removes nothing of another lab. A number holds the process's id;
//! another process that has the same id later sweeps first. Files are made, taken for dead and
//! removed under one lock, so that nobody sees a file that is not locked yet, or locks one that is
//! gone.

use std::{
    env,
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use crate::{cgroup, netns};

/// One file per lab, locked while its owner lives. Its text is for readers: the owner's process id
/// and the run of tests it belongs to.
pub(crate) const REGISTRY_DIR: &str = "/run/shunt-lab";
/// Serialises making, sweeping and removing the files beside it.
const LOCK: &str = "lock";
/// Where BPF objects are pinned.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";
/// Names a run of tests to everything that it starts: `cargo xtask test` looks for what the run
/// left.
pub const RUN_VARIABLE: &str = "SHUNT_TEST_RUN";
/// What the name of everything that a lab makes begins with.
const NAME: &str = "shunt-lab";

/// A name that nothing else on this machine has, for namespaces, pins and cgroups. What begins with
/// it goes when this is dropped, and by the next sweep when the process is killed.
#[derive(Debug)]
pub struct UniqueName {
    /// `PID-COUNT`.
    number: String,
    path: PathBuf,
    // The lock goes with the descriptor, also when the process is killed.
    _lock: File,
}

impl UniqueName {
    /// Takes a number.
    ///
    /// # Errors
    ///
    /// When the registry cannot be written: not root.
    pub fn take() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let _guard = registry_lock()?;
        netns::share_dir()?;
        let number = format!(
            "{}-{}",
            process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = Path::new(REGISTRY_DIR).join(&number);
        let mut file = match File::create_new(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // Of a dead process that had our id.
                let file = lock_if_dead(&path)?
                    .with_context(|| format!("{}: another process has our id", path.display()))?;
                if !sweep(&number) {
                    bail!(
                        "{}: what a process with our id left cannot be removed",
                        prefix(&number)
                    );
                }
                file.set_len(0)
                    .with_context(|| format!("{}", path.display()))?;
                file
            }
            Err(error) => {
                return Err(error).with_context(|| format!("{}: cannot create", path.display()));
            }
        };
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .with_context(|| format!("{}: cannot lock", path.display()))?;
        // For readers only: the lock is what counts.
        let run = env::var(RUN_VARIABLE).unwrap_or_default();
        let _ = writeln!(file, "{} {run}", process::id());
        Ok(Self {
            number,
            path,
            _lock: file,
        })
    }

    /// What the name of everything that has a machine-wide name begins with: nothing, or `-` and
    /// more, follows.
    #[must_use]
    pub fn prefix(&self) -> String {
        prefix(&self.number)
    }

    /// The folder for pins of this name, with a word of the caller's own at its end. It is not
    /// made.
    #[must_use]
    pub fn bpf_root(&self, word: &str) -> PathBuf {
        Path::new(BPFFS).join(format!("{}-{word}", self.prefix()))
    }
}

impl Drop for UniqueName {
    fn drop(&mut self) {
        // The file's lock is still held, so nobody takes this for dead meanwhile. What will not go
        // is left to a later sweep.
        if sweep(&self.number) {
            let guard = registry_lock();
            let _ = fs::remove_file(&self.path);
            drop(guard);
        }
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
        let name = entry.file_name();
        let Some(number) = name.to_str().filter(|name| *name != LOCK) else {
            continue;
        };
        if let Some(_lock) = lock_if_dead(&entry.path())?
            && sweep(number)
        {
            let _ = fs::remove_file(entry.path());
            swept += 1;
        }
    }
    Ok(swept)
}

/// Serialises taking numbers, sweeping and removing between processes.
pub(crate) fn registry_lock() -> Result<File> {
    fs::create_dir_all(REGISTRY_DIR)
        .with_context(|| format!("{REGISTRY_DIR}: cannot create (needs root)"))?;
    let path = Path::new(REGISTRY_DIR).join(LOCK);
    let file = File::create(&path).with_context(|| format!("{}: cannot create", path.display()))?;
    flock(&file, FlockOperation::LockExclusive)
        .with_context(|| format!("{}: cannot lock", path.display()))?;
    Ok(file)
}

/// The lab's file, locked, if its owner is dead. Only under [`registry_lock`].
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

fn prefix(number: &str) -> String {
    // Files of earlier versions, whose numbers stood without a process id.
    let dash = if number.contains('-') { "-" } else { "" };
    format!("{NAME}{dash}{number}")
}

/// Removes the processes, namespaces, pins and cgroups of one lab; whether nothing is left.
fn sweep(number: &str) -> bool {
    let prefix = prefix(number);
    let starts = |name: &std::ffi::OsStr| {
        name.to_str()
            .and_then(|name| name.strip_prefix(&prefix))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    let cgroup = cgroup::mount_point().map(|root| root.join(&prefix));
    if let Ok(cgroup) = &cgroup {
        cgroup::remove(cgroup);
    }
    let mut left = cgroup.is_ok_and(|cgroup| cgroup.exists());
    for (dir, remove) in [
        (BPFFS, remove_pins as fn(&Path)),
        (netns::NETNS_DIR, netns::remove),
    ] {
        for entry in fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| starts(&entry.file_name()))
        {
            remove(&entry.path());
            left |= entry.path().exists();
        }
    }
    !left
}

/// Whose something with a machine-wide name is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A lab's, or another [`UniqueName`]'s.
    Lab {
        /// The run of tests that it belongs to; empty for none.
        run: String,
        /// Whether the process that took the name lives.
        alive: bool,
    },
    /// Of a process that put its id into the name.
    Process {
        /// Whether there is such a process.
        alive: bool,
    },
    /// Nobody knows.
    Unknown,
}

/// Whose a name is: of a namespace, a folder of pins or a cgroup.
#[must_use]
pub fn owner(name: &str) -> Owner {
    let rest = name.strip_prefix(NAME).unwrap_or_default();
    let mut words = rest.split('-');
    // `shunt-lab-PID-COUNT…`, or `shunt-labN…` of earlier versions.
    let number = match (words.next(), words.next(), words.next()) {
        (Some(""), Some(pid), Some(count)) => format!("{pid}-{count}"),
        (Some(number), ..) => number.to_owned(),
        _ => String::new(),
    };
    let path = Path::new(REGISTRY_DIR).join(&number);
    if let (false, Ok(text)) = (number.is_empty(), fs::read_to_string(&path)) {
        let run = text.trim().split(' ').nth(1).unwrap_or_default().to_owned();
        let locked = File::open(&path)
            .map(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err());
        return Owner::Lab {
            run,
            alive: locked.unwrap_or(false),
        };
    }
    let pid = name
        .split(['-', '.'])
        .find_map(|word| word.parse::<u32>().ok());
    match pid {
        Some(pid) => Owner::Process {
            alive: Path::new(&format!("/proc/{pid}")).exists(),
        },
        None => Owner::Unknown,
    }
}

/// Unlinks everything below a folder of pins, and the folder; what nothing else holds is unloaded
/// by the kernel.
pub fn remove_pins(path: &Path) {
    // bpffs is gone or never was: nothing to remove.
    let _ = fs::remove_dir_all(path);
}
