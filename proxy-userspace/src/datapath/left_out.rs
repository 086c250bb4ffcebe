//! Pods that the socket hook leaves to packets (`--socket-lb-labels`): their cgroups' ids in `left_out`.
//!
//! The kubelet names a pod's cgroup by its UID and makes it before any container, later than the label is
//! known as a rule. So a thread looks for cgroups that are missing: often at first, then now and then.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::DirEntryExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use shunt_common::layout::{MAX_PODS_LEFT_OUT, names};
use tracing::warn;

use super::load::Datapath;

/// Between two looks for a cgroup that is missing: containers start later than that.
const SOON: Duration = Duration::from_millis(200);
/// So long after pods were named a missing cgroup is looked for: the kubelet makes it before it mounts
/// volumes or pulls images, and with `cgroupsPerQOS: false` never.
const EAGER: Duration = Duration::from_secs(60);
/// Between two looks otherwise: one may be made late, or anew.
const LATER: Duration = Duration::from_secs(10);
/// So deep below `--cgroup-root` pods' cgroups lie at most.
const DEPTH: u32 = 6;

/// Keeps the map as it should be. Its thread ends some time after this is dropped.
#[derive(Debug)]
pub(crate) struct LeftOut {
    state: Arc<Mutex<State>>,
    thread: Thread,
}

impl LeftOut {
    /// Opens and reads the map; until [`Self::set`] it stays as an agent before has left it.
    ///
    /// # Errors
    /// When the kernel refuses, or no thread can be made.
    pub(crate) fn spawn(datapath: &Datapath, cgroup_root: PathBuf) -> io::Result<Self> {
        let open = || -> Result<State, MapError> {
            let map = HashMap::try_from(Map::HashMap(datapath.map(names::LEFT_OUT)?))?;
            let held = map.keys().collect::<Result<_, _>>()?;
            Ok(State {
                map,
                held,
                wanted: None,
                named: Instant::now(),
                cgroup_root,
                failed: None,
            })
        };
        let state = Arc::new(Mutex::new(open().map_err(io::Error::other)?));
        let weak = Arc::downgrade(&state);
        let thread = thread::Builder::new()
            .name("left-out".into())
            .spawn(move || follow(&weak))?;
        Ok(Self {
            state,
            thread: thread.thread().clone(),
        })
    }

    /// Leaves out the pods with these UIDs and no others: at once, or when they have a cgroup.
    pub(crate) fn set(&self, uids: BTreeSet<Arc<str>>) {
        let mut state = lock(&self.state);
        state.wanted = Some(uids);
        state.named = Instant::now();
        state.look();
        self.thread.unpark();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn follow(state: &Weak<Mutex<State>>) {
    let mut pause = LATER;
    loop {
        thread::park_timeout(pause);
        let Some(state) = state.upgrade() else { return };
        let mut state = lock(&state);
        let all = state.look();
        pause = if all || state.named.elapsed() > EAGER {
            LATER
        } else {
            SOON
        };
    }
}

#[derive(Debug)]
struct State {
    map: HashMap<MapData, u64, u32>,
    /// Cgroup ids in the map.
    held: BTreeSet<u64>,
    /// UIDs of pods; `None`: nobody has said yet.
    wanted: Option<BTreeSet<Arc<str>>>,
    /// When they were named.
    named: Instant,
    cgroup_root: PathBuf,
    /// The last error, so that each is said once.
    failed: Option<String>,
}

impl State {
    /// Brings the map to the cgroups that there are; says whether none is missing.
    fn look(&mut self) -> bool {
        let Some(wanted) = &self.wanted else {
            return true;
        };
        let mut found = BTreeMap::new();
        if !wanted.is_empty() {
            find(&self.cgroup_root, wanted, DEPTH, &mut found);
        }
        let all = found.len() == wanted.len();
        let failed = self.write(&found.into_values().collect()).err();
        let failed = failed.map(|error| error.to_string());
        if let Some(error) = failed.as_ref().filter(|_| failed != self.failed) {
            warn!(
                "not all pods with the label shunt.dev/socket-lb=off are left out of the socket hook \
                 (at most {MAX_PODS_LEFT_OUT} can be): {error}; --socket-lb host leaves out all"
            );
        }
        self.failed = failed;
        all
    }

    fn write(&mut self, wanted: &BTreeSet<u64>) -> Result<(), MapError> {
        for id in &self.held - wanted {
            match self.map.remove(&id) {
                Ok(()) | Err(MapError::KeyNotFound) => drop(self.held.remove(&id)),
                Err(error) => return Err(error),
            }
        }
        for id in wanted - &self.held {
            self.map.insert(id, 0, 0)?;
            self.held.insert(id);
        }
        Ok(())
    }
}

/// Cgroup ids of pods below a folder. What cannot be read is being taken away.
fn find(
    folder: &Path,
    wanted: &BTreeSet<Arc<str>>,
    depth: u32,
    found: &mut BTreeMap<Arc<str>, u64>,
) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        match entry.file_name().to_str().and_then(pod_uid) {
            Some(uid) => {
                if let Some(uid) = wanted.get(&*uid) {
                    // The folder's number is the cgroup's id.
                    found.insert(uid.clone(), entry.ino());
                }
            }
            None if depth > 1 => find(&entry.path(), wanted, depth - 1, found),
            None => {}
        }
    }
}

/// The UID in the name of a pod's cgroup, as the kubelet has it with either cgroup driver.
fn pod_uid(name: &str) -> Option<String> {
    match name.strip_suffix(".slice") {
        // systemd's: `-` leads a level down there.
        Some(name) => name
            .split_once("-pod")
            .map(|(_, uid)| uid.replace('_', "-")),
        None => name.strip_prefix("pod").map(str::to_owned),
    }
    .filter(|uid| !uid.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_known_by_either_drivers_names() {
        for (name, uid) in [
            ("kubepods.slice", None),
            ("kubelet-kubepods-besteffort.slice", None),
            ("kubepods", None),
            ("kubepods-burstable-podaf1b_22.slice", Some("af1b-22")),
            ("kubepods-podaf1b_22.slice", Some("af1b-22")),
            ("kubelet-kubepods-podaf1b_22.slice", Some("af1b-22")),
            ("podaf1b-22", Some("af1b-22")),
            ("pod", None),
            ("cri-containerd-af1b.scope", None),
        ] {
            assert_eq!(pod_uid(name).as_deref(), uid, "{name}");
        }
    }
}
