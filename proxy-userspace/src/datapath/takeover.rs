//! Whether pinned programs can be used again by an agent that starts, instead of being loaded (and
//! verified) anew.
//!
//! They can when this agent would load the very same ones: the same object, settings, probe results
//! and kernel, over the same maps. All of that is in a [`Fingerprint`], which a small map keeps.
//! That map
//!
//! - is written once and then frozen, so nobody changes it by accident;
//! - is bound to every program before that is pinned (`BPF_PROG_BIND_MAP`), so that each program
//!   says itself which load it comes from: pins of two loads, as a load leaves them that was
//!   interrupted, are told apart;
//! - is pinned as `progs/build` after all programs.
//!
//! Whatever is missing, unreadable or otherwise not as expected means that the programs are loaded
//! anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use aya::Pod;

use super::{
    Paths,
    bpf::{
        self,
        map::{self, BPF_ANY, MapInfo, types::ARRAY},
        program,
    },
    object::kernel,
};

/// The name that the kernel keeps of a program: `BPF_OBJ_NAME_LEN` of linux/bpf.h less the zero.
const KERNEL_NAME: usize = 15;
/// Room for the ids of maps that belong to one load alone: `.rodata` and the like.
const PRIVATE_MAPS: usize = 8;

/// What programs were loaded from; two loads with the same one are the same programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    /// Of the object's bytes.
    object: u64,
    /// Of the running kernel's release and what it was found to have.
    kernel: u64,
    /// Of the values that the programs read as constants.
    settings: u64,
    /// Of the pinned maps' names, ids and sizes.
    maps: u64,
}

/// The value of the map `progs/build`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Build {
    fingerprint: Fingerprint,
    /// Ids of the maps that the programs use and that are not pinned; 0 where there is none.
    private_maps: [u32; PRIVATE_MAPS],
}

// SAFETY: `repr(C)`, `Copy`, no padding, every bit pattern is a value.
unsafe impl Pod for Build {}

/// Why the pinned programs are not used again; reads on after "programs loaded anew: ".
#[derive(Debug)]
pub(crate) enum Anew {
    /// No agent has pinned any here.
    First,
    /// They come from another build of shunt.
    OtherBuild,
    /// Another kernel, or one that has learned something.
    OtherKernel,
    /// Settings that are read when programs are loaded have changed.
    OtherSettings,
    /// The maps are others, or of other sizes.
    OtherMaps,
    /// One that is needed is not pinned.
    Missing(String),
    /// What is pinned is not what an agent pins.
    Unexpected(String),
    /// The kernel does not show it.
    Unreadable(String, io::Error),
}

impl fmt::Display for Anew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First => f.write_str("none are pinned"),
            Self::OtherBuild => f.write_str("the pinned ones come from another build"),
            Self::OtherKernel => f.write_str("the kernel has changed"),
            Self::OtherSettings => f.write_str("settings that are built into them have changed"),
            Self::OtherMaps => f.write_str("their maps have changed"),
            Self::Missing(name) => write!(f, "{name} is not pinned"),
            Self::Unexpected(what) => f.write_str(what),
            Self::Unreadable(name, error) => write!(f, "{name} cannot be read: {error}"),
        }
    }
}

impl Fingerprint {
    /// Of a load of `object` with `globals` over `maps`, on a kernel with these `probes`.
    pub(crate) fn new(
        object: &[u8],
        globals: &[(&'static str, u32)],
        probes: &[(&'static str, bool)],
        maps: &BTreeMap<&str, MapInfo>,
    ) -> Self {
        Self {
            object: hash(object),
            kernel: hash((kernel(), probes)),
            settings: hash(globals),
            maps: hash(maps),
        }
    }

    fn difference(&self, found: &Self) -> Option<Anew> {
        if self.object != found.object {
            Some(Anew::OtherBuild)
        } else if self.kernel != found.kernel {
            Some(Anew::OtherKernel)
        } else if self.settings != found.settings {
            Some(Anew::OtherSettings)
        } else if self.maps != found.maps {
            Some(Anew::OtherMaps)
        } else {
            None
        }
    }
}

/// Another release of Rust may hash otherwise; its programs are then loaded anew, as those of any
/// other build.
fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The pinned maps of these names, by name.
///
/// # Errors
/// The first that is not pinned, or that the kernel does not show.
pub(crate) fn pinned_maps<'n>(
    paths: &Paths,
    names: impl Iterator<Item = &'n str>,
) -> Result<BTreeMap<&'n str, MapInfo>, Anew> {
    names
        .map(|name| {
            let info = open(&paths.map(name), name).and_then(|fd| {
                map::map_info(fd.as_fd()).map_err(|e| Anew::Unreadable(name.to_owned(), e))
            });
            Ok((name, info?))
        })
        .collect()
}

fn open(path: &std::path::Path, name: &str) -> Result<OwnedFd, Anew> {
    bpf::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Anew::Missing(name.to_owned()),
        _ => Anew::Unreadable(name.to_owned(), error),
    })
}

/// The pinned programs with these names, if all of them are what a load with `fingerprint` over
/// `maps` would bring.
///
/// # Errors
/// Why they have to be loaded.
pub(crate) fn find(
    paths: &Paths,
    fingerprint: &Fingerprint,
    maps: &BTreeMap<&str, MapInfo>,
    names: &[&'static str],
) -> Result<BTreeMap<&'static str, OwnedFd>, Anew> {
    let unreadable = |name: &str| {
        let name = name.to_owned();
        move |error| Anew::Unreadable(name, error)
    };
    let pin = paths.build();
    let build_map = match open(&pin, "build") {
        // Programs without it are those of an agent that did not make one.
        Err(Anew::Missing(_)) if names.iter().any(|name| paths.program(name).exists()) => {
            return Err(Anew::OtherBuild);
        }
        Err(Anew::Missing(_)) => return Err(Anew::First),
        result => result?,
    };
    let info = map::map_info(build_map.as_fd()).map_err(unreadable("build"))?;
    let (key_size, value_size) = (size_of::<u32>() as u32, size_of::<Build>() as u32);
    if (info.map_type, info.key_size, info.value_size) != (ARRAY, key_size, value_size) {
        return Err(Anew::OtherBuild);
    }
    let build: Build = map::lookup(build_map.as_fd(), &0_u32)
        .map_err(unreadable("build"))?
        .ok_or(Anew::OtherBuild)?;
    if let Some(difference) = fingerprint.difference(&build.fingerprint) {
        return Err(difference);
    }
    let known: BTreeSet<u32> = maps
        .values()
        .map(|map| map.id)
        .chain(build.private_maps)
        .chain([info.id])
        .collect();
    let mut programs = BTreeMap::new();
    for &name in names {
        let program = open(&paths.program(name), name)?;
        let found = program::info(&program).map_err(unreadable(name))?;
        if found.name != name[..name.len().min(KERNEL_NAME)] {
            return Err(Anew::Unexpected(format!(
                "{} is pinned as {name}",
                found.name
            )));
        }
        if !found.maps.contains(&info.id) {
            return Err(Anew::Unexpected(format!("{name} comes from another load")));
        }
        if found.maps.iter().any(|id| !known.contains(id)) {
            return Err(Anew::Unexpected(format!("{name} uses another map")));
        }
        programs.insert(name, program);
    }
    Ok(programs)
}

/// Makes the map that says what `programs` were loaded from, and binds it to all of them. To be
/// pinned after them. `private_maps`: ids of maps that they use and that are not pinned.
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF`, `EINVAL` before Linux 5.10. Without it the next agent
/// loads its programs anew.
pub(crate) fn sign<'p>(
    fingerprint: Fingerprint,
    private_maps: &[u32],
    programs: impl Iterator<Item = BorrowedFd<'p>>,
) -> io::Result<OwnedFd> {
    let mut build = Build {
        fingerprint,
        private_maps: [0; PRIVATE_MAPS],
    };
    // What has no room here is a map that is not known: such programs are loaded anew each time.
    for (slot, &id) in build.private_maps.iter_mut().zip(private_maps) {
        *slot = id;
    }
    let map = map::create_named("build", ARRAY, size_of::<u32>(), size_of::<Build>(), 1, 0)?;
    map::update(map.as_fd(), &0_u32, &build, BPF_ANY)?;
    map::freeze(map.as_fd())?;
    for program in programs {
        program::bind_map(program, map.as_fd())?;
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
        sync::atomic::{AtomicU32, Ordering},
    };

    use super::{super::bpf::probe::load_named, *};

    const NAMES: [&str; 2] = ["first", "second"];
    const GLOBALS: [(&str, u32); 1] = [("FAST_PATH", 0)];

    /// A bpf root with the smallest programs there are, pinned as a load pins its own.
    struct Place(PathBuf);

    impl Place {
        fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let root = PathBuf::from(format!(
                "/sys/fs/bpf/shunt-takeover-{}-{number}",
                std::process::id()
            ));
            let place = Self(root);
            for folder in [place.paths().maps(), place.paths().programs()] {
                fs::create_dir_all(folder).expect("a bpf file system at /sys/fs/bpf and root");
            }
            place.load(&GLOBALS);
            place
        }

        fn paths(&self) -> Paths {
            Paths::new(&self.0)
        }

        fn maps(&self) -> Result<BTreeMap<&'static str, MapInfo>, Anew> {
            pinned_maps(&self.paths(), ["flows"].into_iter())
        }

        /// What an agent does that takes nothing over.
        fn load(&self, globals: &[(&'static str, u32)]) {
            let paths = self.paths();
            let pin = paths.map("flows");
            if !pin.exists() {
                let map = map::create(ARRAY, 4, 8, 16, 0).unwrap();
                bpf::pin(map.as_fd(), &pin).unwrap();
            }
            let flows = bpf::open(&pin).unwrap();
            let private = map::create(ARRAY, 4, 8, 1, 0).unwrap();
            let programs = NAMES.map(|name| load_named(name, 3, None, 0).unwrap());
            for program in &programs {
                for map in [&flows, &private] {
                    program::bind_map(program, map.as_fd()).unwrap();
                }
            }
            let private = [map::map_info(private.as_fd()).unwrap().id];
            let fingerprint = Fingerprint::new(b"object", globals, &[], &self.maps().unwrap());
            let build = sign(fingerprint, &private, programs.iter().map(AsFd::as_fd)).unwrap();
            for (name, program) in NAMES.iter().zip(&programs) {
                bpf::pin_over(program.as_fd(), &paths.program(name)).unwrap();
            }
            bpf::pin_over(build.as_fd(), &paths.build()).unwrap();
        }

        fn look(
            &self,
            object: &[u8],
            globals: &[(&'static str, u32)],
            probes: &[(&'static str, bool)],
        ) -> String {
            let found = self.maps().and_then(|maps| {
                let fingerprint = Fingerprint::new(object, globals, probes, &maps);
                find(&self.paths(), &fingerprint, &maps, &NAMES)
            });
            found.map_or_else(
                |reason| reason.to_string(),
                |programs| format!("{} taken over", programs.len()),
            )
        }

        /// As an agent of the same build and settings sees it.
        fn find(&self) -> String {
            self.look(b"object", &GLOBALS, &[])
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// Pins at `to` what is pinned at `from`.
    fn copy_pin(from: &Path, to: &Path) {
        bpf::pin_over(bpf::open(from).unwrap().as_fd(), to).unwrap();
    }

    #[test]
    fn programs_of_the_same_build_are_taken_over_and_no_others() {
        let place = Place::new();
        assert_eq!(place.find(), "2 taken over");
        assert_eq!(
            place.look(b"another", &GLOBALS, &[]),
            "the pinned ones come from another build"
        );
        assert_eq!(
            place.look(b"object", &[("FAST_PATH", 1)], &[]),
            "settings that are built into them have changed"
        );
        assert_eq!(
            place.look(b"object", &GLOBALS, &[("csum_ipv6", true)]),
            "the kernel has changed"
        );
        assert_eq!(place.find(), "2 taken over");
    }

    #[test]
    fn damaged_pins_are_not_taken_over() {
        let other = Place::new();
        type Damage<'d> = &'d dyn Fn(&Paths);
        let damages: [(Damage<'_>, &str); 10] = [
            (
                &|paths| fs::remove_file(paths.program("second")).unwrap(),
                "second is not pinned",
            ),
            (
                &|paths| fs::remove_file(paths.map("flows")).unwrap(),
                "flows is not pinned",
            ),
            (
                &|paths| {
                    let map = map::create(ARRAY, 4, 8, 16, 0).unwrap();
                    bpf::pin_over(map.as_fd(), &paths.map("flows")).unwrap();
                },
                "their maps have changed",
            ),
            (
                &|paths| fs::remove_file(paths.build()).unwrap(),
                "the pinned ones come from another build",
            ),
            (
                &|paths| copy_pin(&other.paths().build(), &paths.build()),
                "their maps have changed",
            ),
            (
                &|paths| copy_pin(&paths.map("flows"), &paths.build()),
                "the pinned ones come from another build",
            ),
            (
                &|paths| copy_pin(&paths.program("first"), &paths.build()),
                "the pinned ones come from another build",
            ),
            (
                &|paths| copy_pin(&paths.program("first"), &paths.program("second")),
                "first is pinned as second",
            ),
            (
                &|paths| copy_pin(&other.paths().program("second"), &paths.program("second")),
                "second comes from another load",
            ),
            (
                &|paths| copy_pin(&paths.map("flows"), &paths.program("second")),
                " is pinned as second",
            ),
        ];
        for (damage, reason) in damages {
            let place = Place::new();
            assert_eq!(place.find(), "2 taken over", "before {reason}");
            damage(&place.paths());
            assert_eq!(place.find(), reason);
            place.load(&GLOBALS);
            assert_eq!(place.find(), "2 taken over", "after {reason}");
        }
    }

    #[test]
    fn an_interrupted_load_is_not_taken_over() {
        let place = Place::new();
        let paths = place.paths();
        let kept = bpf::open(&paths.build()).unwrap();
        let first = bpf::open(&paths.program("first")).unwrap();
        place.load(&[("FAST_PATH", 1)]);
        // Before its last pin; then before another of its programs.
        bpf::pin_over(kept.as_fd(), &paths.build()).unwrap();
        assert_eq!(place.find(), "first comes from another load");
        bpf::pin_over(first.as_fd(), &paths.program("first")).unwrap();
        assert_eq!(place.find(), "second comes from another load");
    }

    #[test]
    fn what_programs_were_loaded_from_cannot_be_changed() {
        let place = Place::new();
        let build = bpf::open(&place.paths().build()).unwrap();
        let info = map::map_info(build.as_fd()).unwrap();
        let value = vec![0; info.value_size as usize];
        let error = map::update_raw(build.as_fd(), &info, &[0; 4], &value, BPF_ANY).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_program_over_another_map_is_not_taken_over() {
        let place = Place::new();
        let paths = place.paths();
        let stale = map::create(ARRAY, 4, 8, 16, 0).unwrap();
        let program = bpf::open(&paths.program("first")).unwrap();
        program::bind_map(&program, stale.as_fd()).unwrap();
        assert_eq!(place.find(), "first uses another map");
    }
}
