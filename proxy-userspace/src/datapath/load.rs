//! Programs and maps into the kernel, pinned under `--bpf-root`.
//!
//! Maps that are pinned there already are used again, with what is in them: that is how flows
//! survive a restart. So are programs that this agent would load the same (`takeover`); others are
//! loaded from as many threads as there are CPUs, for the verifier takes most of a start. Nothing
//! that runs is touched before everything new has loaded, so a start that fails leaves the node as
//! it was.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError},
    programs::{Program, ProgramError},
};
use clap::ValueEnum;
use rustix::fs::{FlockOperation, flock, statfs};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, Visitor},
};
use shunt_common::layout::names;
use tracing::{info, warn};

pub use super::object::object;
use super::{
    CGROUP_PROGRAMS, Capacities, NAMING_PROGRAMS, NODE_PROGRAMS, POD_PROGRAMS, Paths, RUN_MEMORY,
    TAIL_CALLED_PROGRAMS, XDP_PROGRAM,
    bpf::{self, map::MapInfo, probe, program},
    layer3::Layer3,
    lock::{LockError, RootLock},
    object::kernel,
    start::{Part, Stopwatch},
    tail_calls::{self, Kind},
    takeover::{self, Anew, Fingerprint},
    upgrade::Upgrade,
};

/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// Where every distribution mounts the bpffs.
const USUAL_BPFFS: &str = "/sys/fs/bpf";
/// The source of a bpffs that shunt mounted itself, as /proc/self/mountinfo shows it: `cleanup`
/// takes that one away.
pub(crate) const MOUNT_SOURCE: &str = "shunt";
/// One in so many entries of `flows` may be one that waits for its first answer.
const HALF_OPEN_SHARE: u32 = 128;
/// Lines of the verifier's log that an error quotes; the reason is in the last ones.
const VERIFIER_LINES: usize = 12;

/// `--socket-lb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SocketLb {
    /// Sockets of the node and of pods.
    On,
    /// Sockets of the node's own network namespace only.
    Host,
    /// None; those that were served before keep their names.
    Off,
}

impl<'de> Deserialize<'de> for SocketLb {
    /// A word, or `true` and `false` for `on` and `off`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Word;
        impl Visitor<'_> for Word {
            type Value = SocketLb;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("on, host or off")
            }

            fn visit_bool<E>(self, on: bool) -> Result<SocketLb, E> {
                Ok(if on { SocketLb::On } else { SocketLb::Off })
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<SocketLb, E> {
                SocketLb::from_str(word, false)
                    .map_err(|_| E::custom(format_args!("`{word}`: give on, host or off")))
            }
        }
        deserializer.deserialize_any(Word)
    }
}

/// What to load.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// `--bpf-root`.
    pub bpf_root: PathBuf,
    /// `--max-*`.
    pub capacities: Capacities,
    /// `--socket-lb`: with the socket programs.
    pub socket_lb: SocketLb,
    /// `--xdp` is not `off`: with the XDP program.
    pub xdp: bool,
    /// `--fast-path`: tc programs send packets on by themselves.
    pub fast_path: bool,
    /// `--count-traffic`: packets and bytes are counted per backend.
    pub count_traffic: bool,
}

/// Why nothing was loaded. What ran before runs on.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Another agent works there.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The folders under `--bpf-root` cannot be made.
    #[error("--bpf-root {}: {what}: {error}", path.display())]
    Root {
        /// Where.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The maps that are pinned, and in use, were made by another build.
    #[error(
        "pinned map {}: {found}, this shunt needs {wanted}, and programs are attached to it: drain the node, run `shunt cleanup`, start again",
        path.display()
    )]
    Incompatible {
        /// The pin.
        path: PathBuf,
        /// Key and value size and the like, as found.
        found: String,
        /// The same as needed.
        wanted: String,
    },
    /// The kernel has no room for a map.
    #[error(
        "map {map}: no memory for {entries} entries ({error}): lower {setting}, or give the node more memory"
    )]
    Memory {
        /// The map.
        map: String,
        /// Its setting.
        setting: &'static str,
        /// The setting's value.
        entries: u32,
        /// The kernel's answer.
        error: io::Error,
    },
    /// Missing capabilities.
    #[error(
        "{what}: not permitted: shunt needs the capabilities BPF, PERFMON and NET_ADMIN (or SYS_ADMIN): run it as root or add them to the container's securityContext"
    )]
    Permission {
        /// What was not permitted.
        what: String,
    },
    /// The kernel refused a program.
    #[error(
        "program {program}: the verifier of kernel {kernel} refused it ({error}); end of its log:\n{log}"
    )]
    Verifier {
        /// The program.
        program: String,
        /// The running kernel.
        kernel: String,
        /// The kernel's answer.
        error: io::Error,
        /// Last lines of the log.
        log: String,
    },
    /// The kernel does not know something.
    #[error(
        "{what}: kernel {kernel} refused it ({error}): see `shunt check` for the feature that it lacks"
    )]
    Unsupported {
        /// A map or program.
        what: String,
        /// The running kernel.
        kernel: String,
        /// The answer.
        error: String,
    },
    /// The object itself is not as expected.
    #[error("the embedded BPF object: {0}: this build of shunt is broken, build it again")]
    Object(String),
}

/// The loaded programs and pinned maps. Dropping it frees the lock and leaves the rest in the
/// kernel.
#[derive(Debug)]
pub struct Datapath {
    paths: Paths,
    capacities: Capacities,
    programs: BTreeMap<&'static str, OwnedFd>,
    taken_over: bool,
    fast_path: bool,
    layer3: Layer3,
    upgrade: Option<Upgrade>,
    _lock: RootLock,
}

impl Datapath {
    /// The programs for devices without a link-layer header, which are loaded when there is one.
    pub(crate) fn layer3(&self) -> &Layer3 {
        &self.layer3
    }

    /// The folders that things are pinned in.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The sizes that the maps have, which are the pinned maps' own where those are used again.
    pub fn capacities(&self) -> Capacities {
        self.capacities
    }

    /// A loaded program; `None` if its hook is turned off.
    pub fn program(&self, name: &str) -> Option<BorrowedFd<'_>> {
        self.programs.get(name).map(AsFd::as_fd)
    }

    /// All loaded programs by name.
    pub fn programs(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        self.programs.iter().map(|(&name, fd)| (name, fd.as_fd()))
    }

    /// Whether the programs were pinned and are used again, rather than loaded.
    pub fn taken_over(&self) -> bool {
        self.taken_over
    }

    /// Whether the programs send packets on by themselves.
    pub fn fast_path(&self) -> bool {
        self.fast_path
    }

    /// What is left to do to come from another map layout, once.
    pub fn take_upgrade(&mut self) -> Option<Upgrade> {
        self.upgrade.take()
    }

    /// Opens a map.
    ///
    /// # Errors
    /// When there is no map of that name.
    pub fn map(&self, name: &str) -> Result<MapData, MapError> {
        MapData::from_pin(self.paths.map(name))
    }
}

/// Loads everything that `config` asks for and pins it, after taking the lock of `--bpf-root`,
/// which the result keeps.
///
/// Nothing is attached: fill the maps first, then see [`super::attach`].
///
/// # Errors
/// [`LoadError`], each with what to do.
pub fn load(config: &LoadConfig) -> Result<Datapath, LoadError> {
    load_timed(config, &mut Stopwatch::start())
}

/// The same, with `watch` told what took how long.
///
/// # Errors
/// As [`load`].
pub fn load_timed(config: &LoadConfig, watch: &mut Stopwatch) -> Result<Datapath, LoadError> {
    load_object(config, object(), watch)
}

/// The same with the programs of another build, which must have this build's map layout.
///
/// # Errors
/// As [`load`].
pub fn load_object(
    config: &LoadConfig,
    bytes: &[u8],
    watch: &mut Stopwatch,
) -> Result<Datapath, LoadError> {
    let paths = Paths::new(&config.bpf_root);
    ensure_root(paths.root())?;
    let lock = RootLock::acquire(paths.root())?;
    for folder in [
        paths.maps(),
        paths.programs(),
        paths.links(),
        paths.clsact(),
    ] {
        create_folder(&folder)?;
    }
    watch.lap(Part::Settings);

    let object = aya_obj::Object::parse(bytes).map_err(|e| LoadError::Object(e.to_string()))?;
    // Sections like .rodata come as maps too; they belong to this load alone, as does the memory of
    // a run.
    let wanted: BTreeMap<&str, &aya_obj::Map> = object
        .maps
        .iter()
        .map(|(name, map)| (name.as_str(), map))
        .filter(|(name, _)| !name.starts_with('.') && !RUN_MEMORY.contains(name))
        .collect();
    let mut capacities = config.capacities;
    let upgrade = find_upgrade(&paths, &wanted, &mut capacities)?;
    reuse(&paths, &wanted, &mut capacities)?;
    // A kernel that does not let it be tried has no BPF for us either, which the programs' loading
    // will tell.
    let csum_ipv6 = probe::probe_csum_ipv6().unwrap_or(false);
    let fib_source = probe::probe_fib_source().unwrap_or(false);
    let build = BuildInputs {
        object: bytes,
        globals: [
            ("FAST_PATH", config.fast_path.into()),
            ("COUNT_TRAFFIC", config.count_traffic.into()),
            ("MAX_HALF_OPEN", capacities.flows / HALF_OPEN_SHARE),
            ("CSUM_IPV6", if csum_ipv6 { probe::BPF_F_IPV6 } else { 0 }),
            (
                "FIB_SOURCE",
                if fib_source {
                    probe::BPF_FIB_LOOKUP_SOURCE
                } else {
                    0
                },
            ),
        ],
        probes: [("csum_ipv6", csum_ipv6), ("fib_source", fib_source)],
    };
    let layer3 = Layer3 {
        paths: paths.clone(),
        capacities,
        globals: build.globals.to_vec(),
    };
    let remembers = remembers_sockets(&paths);
    let wanted_programs: Vec<&'static str> = program_names(config, remembers)
        // Another build's object may not have it.
        .filter(|&name| !TAIL_CALLED_PROGRAMS.contains(&name) || object.programs.contains_key(name))
        .collect();
    let found = build.find(&paths, &wanted, &wanted_programs);
    watch.lap(Part::Maps);

    let taken_over = found.is_ok();
    let programs = match found {
        Ok(programs) => {
            info!("the pinned programs are of this build and for these settings: taken over");
            take_links(&paths, upgrade.as_ref())?;
            programs
        }
        Err(reason) => {
            match reason {
                Anew::First => {}
                reason => info!("programs loaded anew: {reason}"),
            }
            let mut fresh = FreshPins(Vec::new());
            let entry = tail_calls::next(&paths, Kind::Ethernet).map_err(root_error(
                paths.programs(),
                "find the pinned programs' tail calls",
            ))?;
            let mut ebpf = load_maps(&paths, &wanted, &capacities, &build, entry, &mut fresh)?;
            watch.lap(Part::Maps);
            let programs = load_programs(&mut ebpf, &wanted_programs)?;
            tail_calls::set(&paths, Kind::Ethernet, entry, &programs).map_err(root_error(
                paths.map(names::TAIL_CALLS),
                "put the programs there that others call",
            ))?;
            take_links(&paths, upgrade.as_ref())?;
            pin_programs(&paths, &wanted, &build, &programs)?;
            fresh.0.clear();
            programs
        }
    };
    for name in all_programs().filter(|name| !programs.contains_key(name)) {
        let path = paths.program(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(root_error(path, "remove the program of a hook that is off")(e));
            }
            _ => {}
        }
    }
    watch.lap(Part::Programs);
    Ok(Datapath {
        paths,
        capacities,
        programs,
        taken_over,
        fast_path: config.fast_path,
        layer3,
        upgrade,
        _lock: lock,
    })
}

fn root_error(path: PathBuf, what: &'static str) -> impl Fn(io::Error) -> LoadError {
    move |error| LoadError::Root {
        path: path.clone(),
        what,
        error,
    }
}

fn upgrade_error(paths: &Paths) -> impl Fn(io::Error) -> LoadError {
    root_error(paths.root().to_owned(), "take over from another map layout")
}

/// What there is of another map layout, whose maps `capacities` follow and whose like maps are
/// shared.
fn find_upgrade(
    paths: &Paths,
    wanted: &BTreeMap<&str, &aya_obj::Map>,
    capacities: &mut Capacities,
) -> Result<Option<Upgrade>, LoadError> {
    let mut upgrade = Upgrade::find(paths).map_err(upgrade_error(paths))?;
    if let Some(upgrade) = &mut upgrade {
        upgrade
            .keep_sizes(capacities)
            .map_err(upgrade_error(paths))?;
        let info = |(&name, &map): (&&str, &&aya_obj::Map)| {
            let entries = capacities
                .of_map(name)
                .map_or(map.max_entries(), |(_, entries)| entries);
            let info = MapInfo {
                map_type: map.map_type(),
                id: 0,
                key_size: map.key_size(),
                value_size: map.value_size(),
                max_entries: entries,
                map_flags: map.map_flags(),
            };
            (name.to_owned(), info)
        };
        upgrade
            .share(&wanted.iter().map(info).collect())
            .map_err(upgrade_error(paths))?;
    }
    Ok(upgrade)
}

/// Entries and links of another map layout, if there is one.
fn take_links(paths: &Paths, upgrade: Option<&Upgrade>) -> Result<(), LoadError> {
    upgrade.map_or(Ok(()), |upgrade| {
        upgrade.take_over(paths).map_err(upgrade_error(paths))
    })
}

/// What makes one load's programs other than another's, besides the maps.
struct BuildInputs<'o, const G: usize, const P: usize> {
    /// The ELF object.
    object: &'o [u8],
    /// What the programs read as constants, by the name of the static.
    globals: [(&'static str, u32); G],
    /// What the kernel was found to have.
    probes: [(&'static str, bool); P],
}

impl<const G: usize, const P: usize> BuildInputs<'_, G, P> {
    fn fingerprint(&self, maps: &BTreeMap<&str, MapInfo>) -> Fingerprint {
        Fingerprint::new(self.object, &self.globals, &self.probes, maps)
    }

    /// The pinned programs, if they are what a load would bring.
    fn find(
        &self,
        paths: &Paths,
        wanted: &BTreeMap<&str, &aya_obj::Map>,
        programs: &[&'static str],
    ) -> Result<BTreeMap<&'static str, OwnedFd>, Anew> {
        if !paths.build().exists() && programs.iter().all(|name| !paths.program(name).exists()) {
            return Err(Anew::First);
        }
        let maps = takeover::pinned_maps(paths, wanted.keys().copied())?;
        let programs = takeover::find(paths, &self.fingerprint(&maps), &maps, programs)?;
        match tail_calls::are_set(paths, Kind::Ethernet) {
            Ok(false) => Err(Anew::Unexpected(
                "they do not find each other in tail_calls".to_owned(),
            )),
            Ok(true) => Ok(programs),
            Err(error) => Err(Anew::Unreadable(names::TAIL_CALLS.to_owned(), error)),
        }
    }
}

/// Makes the maps that are not pinned and pins them, noted in `fresh`; parses the programs for
/// them.
fn load_maps<const G: usize, const P: usize>(
    paths: &Paths,
    wanted: &BTreeMap<&str, &aya_obj::Map>,
    capacities: &Capacities,
    build: &BuildInputs<'_, G, P>,
    tail_call: u32,
    fresh: &mut FreshPins,
) -> Result<Ebpf, LoadError> {
    let tail_call = (tail_calls::GLOBAL, tail_call);
    let mut loader = EbpfLoader::new();
    for (name, value) in build.globals.iter().chain([&tail_call]) {
        // Another build's object may not have it.
        let must_exist = std::ptr::eq(build.object, object());
        loader.override_global(name, value, must_exist);
    }
    for &name in wanted.keys() {
        if let Some((_, entries)) = capacities.of_map(name) {
            loader.map_max_entries(name, entries);
        }
        let pin = paths.map(name);
        if !pin.exists() {
            fresh.0.push(pin.clone());
        }
        loader.map_pin_path(name, pin);
    }
    loader
        .load(build.object)
        .map_err(|e| map_error(e, capacities))
}

/// Loads programs, several at a time where there are CPUs for it.
fn load_programs(
    ebpf: &mut Ebpf,
    names: &[&'static str],
) -> Result<BTreeMap<&'static str, OwnedFd>, LoadError> {
    let mut queue: Vec<(&'static str, &mut Program)> = ebpf
        .programs_mut()
        .filter_map(|(name, program)| {
            Some((*names.iter().find(|&&wanted| wanted == name)?, program))
        })
        .collect();
    if let Some(name) = names
        .iter()
        .find(|&name| !queue.iter().any(|(found, _)| found == name))
    {
        return Err(LoadError::Object(format!("no program {name}")));
    }
    // Taken from the end: the longest first, so that no thread is left with one of those while
    // others have nothing to do.
    queue.sort_by_key(|(name, _)| {
        (
            !CGROUP_PROGRAMS.iter().any(|(cgroup, _)| cgroup == name),
            *name,
        )
    });
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(queue.len());
    let queue = Mutex::new(queue);
    let worker = || {
        let mut loaded = Vec::new();
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some((name, program)) = next else {
                return Ok(loaded);
            };
            match load_program(name, program) {
                Ok(fd) => loaded.push((name, fd)),
                Err(error) => {
                    // Nobody needs the others any more.
                    queue.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    return Err(error);
                }
            }
        }
    };
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (1..threads).map(|_| scope.spawn(worker)).collect();
        let own = worker();
        let others = threads.into_iter().map(|thread| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        std::iter::once(own).chain(others).collect()
    });
    let mut programs = BTreeMap::new();
    for result in results {
        programs.extend(result?);
    }
    Ok(programs)
}

fn load_program(name: &str, program: &mut Program) -> Result<OwnedFd, LoadError> {
    let loaded = match program {
        Program::CgroupSockAddr(p) => p.load(),
        Program::CgroupSock(p) => p.load(),
        Program::SchedClassifier(p) => p.load(),
        Program::Xdp(p) => p.load(),
        other => {
            return Err(LoadError::Object(format!(
                "program {name} is a {:?}",
                other.prog_type()
            )));
        }
    };
    loaded.map_err(|e| program_error(name, e))?;
    let fd = program.fd().map_err(|e| program_error(name, e))?.as_fd();
    fd.try_clone_to_owned()
        .map_err(|e| program_error(name, e.into()))
}

/// Pins programs that were loaded, and then the map that says what from.
fn pin_programs<const G: usize, const P: usize>(
    paths: &Paths,
    wanted: &BTreeMap<&str, &aya_obj::Map>,
    build: &BuildInputs<'_, G, P>,
    programs: &BTreeMap<&'static str, OwnedFd>,
) -> Result<(), LoadError> {
    let sign = || {
        let maps = takeover::pinned_maps(paths, wanted.keys().copied())
            .map_err(|e| io::Error::other(e.to_string()))?;
        let mut private = BTreeSet::new();
        for program in programs.values() {
            private.extend(program::info(program)?.maps);
        }
        for map in maps.values() {
            private.remove(&map.id);
        }
        let private: Vec<u32> = private.into_iter().collect();
        takeover::sign(
            build.fingerprint(&maps),
            &private,
            programs.values().map(AsFd::as_fd),
        )
    };
    let signed = sign();
    for (&name, fd) in programs {
        let path = paths.program(name);
        bpf::pin_over(fd.as_fd(), &path).map_err(root_error(path, "pin the program"))?;
    }
    let path = paths.build();
    match signed {
        Ok(map) => bpf::pin_over(map.as_fd(), &path)
            .map_err(root_error(path, "pin the map of the build"))?,
        // The agent serves all the same; its next start takes as long as this one.
        Err(error) => warn!("what the programs were loaded from cannot be noted: {error}"),
    }
    Ok(())
}

/// Pins that a failed load takes back.
struct FreshPins(Vec<PathBuf>);

impl Drop for FreshPins {
    fn drop(&mut self) {
        for pin in &self.0 {
            // Most were not made before the failure.
            let _ = fs::remove_file(pin);
        }
    }
}

fn all_programs() -> impl Iterator<Item = &'static str> {
    let tc = NODE_PROGRAMS.iter().chain(&POD_PROGRAMS);
    CGROUP_PROGRAMS
        .iter()
        .chain(tc)
        .map(|&(name, _)| name)
        .chain(TAIL_CALLED_PROGRAMS)
        .chain([XDP_PROGRAM])
}

/// `remembers`: there are sockets that the hook has connected.
fn program_names(config: &LoadConfig, remembers: bool) -> impl Iterator<Item = &'static str> {
    let is_wanted = move |name: &&'static str| match config.socket_lb {
        SocketLb::On | SocketLb::Host => true,
        SocketLb::Off => remembers && NAMING_PROGRAMS.contains(name),
    };
    all_programs().filter(move |name| {
        (!CGROUP_PROGRAMS.iter().any(|(n, _)| n == name) || is_wanted(name))
            && (config.xdp || *name != XDP_PROGRAM)
    })
}

/// Whether the pinned maps say that sockets are open which the hook has connected.
fn remembers_sockets(paths: &Paths) -> bool {
    let open = || -> io::Result<bool> {
        let sockets = bpf::open(&paths.map(names::SOCKETS))?;
        Ok(!bpf::map::is_empty(sockets.as_fd())?)
    };
    open().unwrap_or(false)
}

/// Settles what becomes of maps that are pinned from before: used again where they fit, made anew
/// where nothing is attached to them, and an error or a warning where they differ and packets run
/// through them.
fn reuse(
    paths: &Paths,
    wanted: &BTreeMap<&str, &aya_obj::Map>,
    capacities: &mut Capacities,
) -> Result<(), LoadError> {
    let mut incompatible = None;
    let mut resized = Vec::new();
    for (&name, &map) in wanted {
        let path = paths.map(name);
        if !path.exists() {
            continue;
        }
        let info = MapData::from_pin(&path)
            .and_then(|map| map.info())
            .map_err(|e| LoadError::Root {
                path: path.clone(),
                what: "open the pinned map",
                error: io::Error::other(e),
            })?;
        // bpf_map_info's type, unlike aya's enum, is there for types that aya does not know.
        let kind = info.map_type().map_or(0, |t| t as u32);
        let setting = capacities.of_map(name);
        let entries = setting.map_or(map.max_entries(), |(_, entries)| entries);
        // The kernel rounds a size of 0 (socket storage) and per-CPU sizes itself, so those are not
        // compared.
        let sized = map.max_entries() != 0;
        let found = (kind, info.key_size(), info.value_size());
        let needs = (map.map_type(), map.key_size(), map.value_size());
        if found != needs || (setting.is_none() && sized && info.max_entries() != entries) {
            let show = |(kind, key, value), entries| {
                format!("type {kind}, key {key}, value {value} bytes, {entries} entries")
            };
            incompatible.get_or_insert_with(|| LoadError::Incompatible {
                path,
                found: show(found, info.max_entries()),
                wanted: show(needs, entries),
            });
        } else if let Some((setting, entries)) = setting
            && info.max_entries() != entries
        {
            resized.push((name, setting, entries, info.max_entries()));
        }
    }
    if incompatible.is_none() && resized.is_empty() {
        return Ok(());
    }
    if !in_use(paths) {
        // Entries of one map point into another: all of them start anew.
        return remove_all(&paths.maps());
    }
    if let Some(error) = incompatible {
        return Err(error);
    }
    let mut said = Vec::new();
    for (name, setting, entries, found) in resized {
        capacities.set(name, found);
        let text = format!("{setting} {entries} (map has {found})");
        if !said.contains(&text) {
            said.push(text);
        }
    }
    warn!(
        "pinned maps keep their size while programs are attached, so these settings wait: {}; to apply them drain the node, run `shunt cleanup`, start again",
        said.join(", ")
    );
    Ok(())
}

/// Whether packets run through what is pinned.
fn in_use(paths: &Paths) -> bool {
    [paths.links(), paths.clsact()]
        .iter()
        .any(|folder| fs::read_dir(folder).is_ok_and(|mut d| d.next().is_some()))
}

fn remove_all(folder: &Path) -> Result<(), LoadError> {
    let attempt = || {
        for entry in fs::read_dir(folder)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    };
    attempt().map_err(|error| LoadError::Root {
        path: folder.to_owned(),
        what: "remove maps of another size",
        error,
    })
}

fn create_folder(folder: &Path) -> Result<(), LoadError> {
    fs::create_dir_all(folder).map_err(|error| LoadError::Root {
        path: folder.to_owned(),
        what: "create the folder (bpffs takes no dots in names)",
        error,
    })
}

/// Makes `root`, on a bpffs: under /sys/fs/bpf that of the system, mounted if it is not, elsewhere
/// one of its own.
fn ensure_root(root: &Path) -> Result<(), LoadError> {
    let existing = root
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"));
    if !is_bpffs(existing) {
        let mount_point = if root.starts_with(USUAL_BPFFS) {
            Path::new(USUAL_BPFFS)
        } else {
            root
        };
        if mount_point == root {
            create_folder(mount_point)?;
        }
        let fail = |error| LoadError::Root {
            path: mount_point.to_owned(),
            what: "mount a bpffs",
            error,
        };
        // Two agents that start at once must not mount one over the other's.
        let directory = fs::File::open(mount_point).map_err(fail)?;
        flock(&directory, FlockOperation::LockExclusive).map_err(|e| fail(e.into()))?;
        if !is_bpffs(mount_point) {
            let source = if mount_point == root {
                MOUNT_SOURCE
            } else {
                "bpf"
            };
            rustix::mount::mount(
                source,
                mount_point,
                "bpf",
                rustix::mount::MountFlags::empty(),
                Some(c"mode=0700"),
            )
            .map_err(|errno| match errno {
                rustix::io::Errno::PERM => LoadError::Permission {
                    what: format!("mount a bpffs at {}", mount_point.display()),
                },
                other => fail(other.into()),
            })?;
        }
    }
    create_folder(root)
}

pub(crate) fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|s| s.f_type as u64 & 0xffff_ffff == BPF_FS_MAGIC)
}

fn not_permitted(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

fn map_error(error: EbpfError, capacities: &Capacities) -> LoadError {
    match error {
        EbpfError::MapError(MapError::CreateError { name, io_error }) => {
            let sized = capacities.of_map(&name);
            match (io_error.raw_os_error(), sized) {
                (Some(libc::EPERM), _) => LoadError::Permission {
                    what: format!("create map {name}"),
                },
                (Some(libc::ENOMEM | libc::E2BIG | libc::EINVAL), Some((setting, entries))) => {
                    LoadError::Memory {
                        map: name,
                        setting,
                        entries,
                        error: io_error,
                    }
                }
                _ => LoadError::Unsupported {
                    what: format!("map {name}"),
                    kernel: kernel(),
                    error: io_error.to_string(),
                },
            }
        }
        EbpfError::BtfError(e) => LoadError::Unsupported {
            what: "type information (BTF)".to_owned(),
            kernel: kernel(),
            error: e.to_string(),
        },
        EbpfError::ParseError(e) => LoadError::Object(e.to_string()),
        other => {
            // The chain of causes, which aya does not print.
            let mut text = other.to_string();
            let mut source = std::error::Error::source(&other);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            LoadError::Unsupported {
                what: "maps".to_owned(),
                kernel: kernel(),
                error: text,
            }
        }
    }
}

fn program_error(program: &str, error: ProgramError) -> LoadError {
    match error {
        ProgramError::LoadError { io_error, .. } if not_permitted(&io_error) => {
            LoadError::Permission {
                what: format!("load program {program}"),
            }
        }
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().filter(|l| !l.trim().is_empty()).collect();
            LoadError::Verifier {
                program: program.to_owned(),
                kernel: kernel(),
                error: io_error,
                log: lines[lines.len().saturating_sub(VERIFIER_LINES)..].join("\n"),
            }
        }
        other => LoadError::Unsupported {
            what: format!("program {program}"),
            kernel: kernel(),
            error: other.to_string(),
        },
    }
}
