//! Programs into the packets' way: the cgroup root and the devices, by links that outlive the
//! agent.
//!
//! A link that is pinned from before is moved to the new program in place (`BPF_LINK_UPDATE`), so a
//! restart has no moment without a program; one that runs this agent's program already is left
//! alone. A pin whose device is gone is removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use serde::Serialize;
use tracing::{debug, info, warn};

use super::{
    CGROUP_PROGRAMS, LAYER3_NODE_PROGRAMS, LAYER3_POD_PROGRAMS, LOOPBACK_PROGRAMS, NODE_PROGRAMS,
    POD_PROGRAMS, Paths, XDP_PROGRAM,
    bpf::{
        self,
        link::{self, Hook, OpenLink, Target},
        program,
    },
    cgroup, clsact, device_programs,
    devices::{Device, LinkHeader, Role, XdpState},
    layer3::Layer3,
    load::Datapath,
    pods::PodDevices,
    rtnl, tc_programs, unescape,
    xdp::{self, Facts, XdpMode},
};

/// `XDP_FLAGS_SKB_MODE` of linux/if_link.h.
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
/// `XDP_FLAGS_DRV_MODE` of linux/if_link.h.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// How tc programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcMode {
    /// BPF links (kernel 6.6).
    Tcx,
    /// Filters of a clsact qdisc.
    Clsact,
}

impl TcMode {
    /// What the running kernel has.
    pub fn probe() -> Self {
        // Index 1 is the loopback device of every namespace. A kernel without TCX does not know the
        // hook (EINVAL).
        match link::query(1, Hook::TcxIngress) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Self::Clsact,
            _ => Self::Tcx,
        }
    }
}

/// Why a program is not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// `--cgroup-root` is not usable.
    #[error("--cgroup-root {}: {reason}", path.display())]
    CgroupRoot {
        /// The setting.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The kernel refused.
    #[error("attach {program} to {target}: {error}{}", hint(error))]
    Attach {
        /// The program.
        program: &'static str,
        /// A device or cgroup.
        target: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// A pin cannot be read or written.
    #[error("{}: {error}", path.display())]
    Pin {
        /// The pin or its folder.
        path: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            ": it needs the capabilities BPF and NET_ADMIN, and no program above in the cgroup tree that excludes others (`bpftool cgroup tree`)"
        }
        Some(libc::EBUSY | libc::EEXIST) => {
            ": another program is there alone (`bpftool net list`); detach it, or set --xdp off"
        }
        Some(libc::EOPNOTSUPP) => ": the driver has no native XDP; set --xdp auto or off",
        Some(libc::ERANGE) => ": the MTU is too large for native XDP; lower it, or set --xdp off",
        Some(libc::E2BIG) => ": the hook is full (64 programs)",
        _ => "",
    }
}

/// One device in `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// What shunt takes it for.
    pub role: Role,
    /// Programs that are attached.
    pub programs: Vec<&'static str>,
    /// Why a node device has no XDP program.
    pub no_xdp: Option<String>,
    /// What did not work, one line each.
    pub problems: Vec<String>,
}

/// A link that is pinned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PinnedLink {
    /// `cgroup`, or the device's name when it was pinned.
    pub target: String,
    /// The program's name.
    pub program: String,
    /// The link's id.
    pub link: u32,
    /// The id of the program that it runs.
    pub program_id: u32,
    /// The device's index; `None` for a cgroup. 0: the device is gone.
    pub index: Option<u32>,
}

/// The links pinned under a `--bpf-root`, agent running or not.
///
/// # Errors
/// When the folder is there and does not list, or a link does not open.
pub fn pinned_links(paths: &Paths) -> Result<Vec<PinnedLink>, AttachError> {
    let mut links = Vec::new();
    for path in list(&paths.links())? {
        let Some((target, program)) = parse_pin(&path) else {
            continue;
        };
        let link = OpenLink::open(&path).map_err(|error| AttachError::Pin { path, error })?;
        let index = match link.info.target {
            Target::Device { index } => Some(index),
            _ => None,
        };
        links.push(PinnedLink {
            target,
            program,
            link: link.info.id,
            program_id: link.info.program,
            index,
        });
    }
    links.sort_by(|a, b| (&a.target, &a.program).cmp(&(&b.target, &b.program)));
    Ok(links)
}

/// The files in a folder; none if there is no folder.
pub(crate) fn list(folder: &Path) -> Result<Vec<PathBuf>, AttachError> {
    let pin_error = |error| AttachError::Pin {
        path: folder.to_owned(),
        error,
    };
    match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(pin_error(e)),
        Ok(entries) => entries.map(|e| Ok(e.map_err(pin_error)?.path())).collect(),
    }
}

/// The device (or `cgroup`) and program that a pin names.
fn parse_pin(path: &Path) -> Option<(String, String)> {
    let (target, program) = path.file_name()?.to_str()?.rsplit_once('-')?;
    Some((unescape(target), program.to_owned()))
}

fn remove_pin(path: &Path) -> Result<(), AttachError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(AttachError::Pin {
            path: path.to_owned(),
            error,
        }),
        _ => Ok(()),
    }
}

/// A link on a device that this agent holds.
#[derive(Debug)]
struct AttachedLink {
    fd: OwnedFd,
    pin: PathBuf,
    /// It runs this agent's program.
    current: bool,
}

/// Attaches the loaded programs, and remembers what is attached.
///
/// All of it works on the network namespace of the calling thread.
#[derive(Debug)]
pub struct Attacher {
    paths: Paths,
    programs: BTreeMap<&'static str, OwnedFd>,
    xdp: XdpMode,
    tc: TcMode,
    /// By device index and program. `None` until the pins of an agent before this one were read.
    links: Option<BTreeMap<(u32, &'static str), AttachedLink>>,
    /// clsact filters that this agent attached.
    filters: BTreeMap<(u32, &'static str), String>,
    /// What failed last time, so that each failure is said once.
    problems: BTreeMap<(u32, &'static str), String>,
    /// Devices that XDP was tried on in vain, and why: not again while they are there.
    no_xdp: BTreeMap<u32, String>,
    layer3: Layer3,
    /// With a fast path: where it leads.
    pods: Option<PodDevices>,
}

impl Attacher {
    /// For the programs of `datapath`, with what this kernel has.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(datapath: &Datapath, xdp: XdpMode) -> io::Result<Self> {
        Self::with_tc(datapath, xdp, TcMode::probe())
    }

    /// The same with tc programs attached in a given way.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn with_tc(datapath: &Datapath, xdp: XdpMode, tc: TcMode) -> io::Result<Self> {
        let programs = datapath
            .programs()
            .map(|(name, fd)| Ok((name, fd.try_clone_to_owned()?)));
        Ok(Self {
            paths: datapath.paths().clone(),
            programs: programs.collect::<io::Result<_>>()?,
            xdp,
            tc,
            links: None,
            filters: BTreeMap::new(),
            problems: BTreeMap::new(),
            no_xdp: BTreeMap::new(),
            layer3: datapath.layer3().clone(),
            pods: PodDevices::open(datapath)?,
        })
    }

    /// How tc programs are attached.
    pub fn tc_mode(&self) -> TcMode {
        self.tc
    }

    /// Attaches the socket programs to `cgroup_root`; takes them away if they were not loaded
    /// (`--socket-lb off`).
    ///
    /// # Errors
    /// When `cgroup_root` is no cgroup2 directory or the kernel refuses; then none is newly
    /// attached.
    pub fn attach_cgroup(&mut self, cgroup_root: &Path) -> Result<(), AttachError> {
        let root_error = |reason| AttachError::CgroupRoot {
            path: cgroup_root.to_owned(),
            reason,
        };
        let directory = fs::File::open(cgroup_root).map_err(|e| root_error(e.to_string()))?;
        if !cgroup::is_cgroup2(cgroup_root) {
            return Err(root_error(
                "no cgroup2 directory: name one, often /sys/fs/cgroup or /sys/fs/cgroup/unified, or set --socket-lb off".into(),
            ));
        }
        let id = directory
            .metadata()
            .map_err(|e| root_error(e.to_string()))?
            .ino();
        let mut fresh: Vec<PathBuf> = Vec::new();
        for (program, hook) in CGROUP_PROGRAMS {
            let pin = self.paths.cgroup_link(program);
            let result = self.attach_to_cgroup(program, hook, &directory, id, &pin);
            match result {
                Ok(true) => fresh.push(pin),
                Ok(false) => {}
                Err(error) => {
                    // A hook alone, say connect without getpeername, would show applications half
                    // of the truth.
                    for pin in fresh {
                        let _ = remove_pin(&pin);
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Whether a link was made that was not there before.
    fn attach_to_cgroup(
        &self,
        program: &'static str,
        hook: Hook,
        directory: &fs::File,
        id: u64,
        pin: &Path,
    ) -> Result<bool, AttachError> {
        use std::os::fd::AsRawFd;
        let pin_error = |error| AttachError::Pin {
            path: pin.to_owned(),
            error,
        };
        let old = match OpenLink::open(pin) {
            Ok(link) => Some(link),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(pin_error(error)),
        };
        let Some(fd) = self.programs.get(program) else {
            if let Some(old) = old {
                link::detach(old.fd.as_fd()).map_err(pin_error)?;
                remove_pin(pin)?;
            }
            return Ok(false);
        };
        if let Some(old) = &old
            && old.info.target == (Target::Cgroup { id })
            && run_by(old.fd.as_fd(), fd)
        {
            return Ok(false);
        }
        let attach_error = |error| AttachError::Attach {
            program,
            target: "the cgroup root".to_owned(),
            error,
        };
        let link = link::create(fd.as_fd(), directory.as_raw_fd() as u32, hook, 0)
            .map_err(attach_error)?;
        bpf::pin_over(link.as_fd(), pin).map_err(pin_error)?;
        if let Some(old) = old {
            // Of another --cgroup-root, or of a cgroup that is gone.
            let _ = link::detach(old.fd.as_fd());
        }
        Ok(true)
    }

    /// Brings the devices' programs to what `devices` asks for, and removes all others that are
    /// shunt's.
    ///
    /// A device that vanishes meanwhile is none of its problems. Each problem is logged once.
    ///
    /// # Errors
    /// When the folder of links cannot be read. What concerns one device is in its status.
    pub fn reconcile(
        &mut self,
        devices: &[(Device, Role)],
    ) -> Result<Vec<DeviceStatus>, AttachError> {
        let mut links = match self.links.take() {
            Some(links) => links,
            None => self.read_pins()?,
        };
        links.retain(|_, held| {
            let target = link::info(held.fd.as_fd()).map(|info| info.target);
            !matches!(target, Ok(Target::Device { index: 0 }))
        });
        let indices: BTreeSet<u32> = devices.iter().map(|(d, _)| d.index).collect();
        self.no_xdp.retain(|index, _| indices.contains(index));
        self.filters.retain(|(index, _), _| indices.contains(index));
        self.problems
            .retain(|(index, _), _| indices.contains(index));

        if let Some(pods) = &mut self.pods
            && let Err(error) = pods.set(devices)
        {
            warn!(
                "--fast-path: {error}: packets to some pods are not handed over, they take the next best way"
            );
        }
        let mut facts = Facts::read(self.xdp);
        let mut wanted = BTreeSet::new();
        let mut status = Vec::new();
        for (device, role) in devices {
            let no_xdp = match role {
                Role::Node => xdp::refusal(self.xdp, device, &facts)
                    .or_else(|| self.no_xdp.get(&device.index).cloned()),
                Role::Pod | Role::Loopback => None,
            };
            let mut state = DeviceStatus {
                name: device.name.clone(),
                index: device.index,
                role: *role,
                programs: Vec::new(),
                no_xdp,
                problems: Vec::new(),
            };
            for (program, hook) in self.wanted(device, *role, state.no_xdp.is_none()) {
                let key = (device.index, program);
                let result = if hook != Hook::Xdp && self.tc == TcMode::Clsact {
                    self.attach_filter(device, program, hook)
                } else {
                    wanted.insert(key);
                    self.attach_link(device, program, hook, &mut links)
                };
                match result {
                    Ok(()) if hook == Hook::Xdp && !self.sends(device, &mut facts) => {
                        // A driver that has its program and still takes no frames from it: tc does
                        // the work.
                        wanted.remove(&key);
                        let reason = xdp::takes_no_frames(device);
                        info!(
                            device = device.name,
                            "no XDP here, tc does the work: {reason}"
                        );
                        state.no_xdp = Some(reason.clone());
                        self.no_xdp.insert(device.index, reason);
                    }
                    Ok(()) => {
                        self.problems.remove(&key);
                        state.programs.push(program);
                    }
                    Err(error) if gone(&error, device.index) => {
                        debug!(
                            device = device.name,
                            "{program}: the device is gone already"
                        );
                    }
                    Err(error) if hook == Hook::Xdp && self.xdp == XdpMode::Auto => {
                        info!(
                            device = device.name,
                            "no native XDP here, tc does the work: {error}"
                        );
                        state.no_xdp = Some(error.to_string());
                        self.no_xdp.insert(device.index, error.to_string());
                    }
                    Err(error) => {
                        let error = AttachError::Attach {
                            program,
                            target: device.name.clone(),
                            error,
                        }
                        .to_string();
                        if self.problems.insert(key, error.clone()).as_ref() != Some(&error) {
                            warn!("{error}");
                        }
                        state.problems.push(error);
                    }
                }
            }
            status.push(state);
        }

        // New ones first, then old ones: a device that changes its role is never without programs.
        links.retain(|key, held| {
            let keep = wanted.contains(key);
            if !keep && let Err(error) = link::detach(held.fd.as_fd()) {
                warn!("detach {}: {error}", held.pin.display());
            }
            keep
        });
        let pins: BTreeSet<&Path> = links.values().map(|held| held.pin.as_path()).collect();
        let swept = self.sweep(&pins, devices);
        self.links = Some(links);
        swept?;
        Ok(status)
    }

    /// The programs for a device.
    fn wanted(&mut self, device: &Device, role: Role, xdp: bool) -> Vec<(&'static str, Hook)> {
        let layer3 = device.header == LinkHeader::None;
        let mut wanted = match (role, layer3) {
            (Role::Node, false) => NODE_PROGRAMS.to_vec(),
            (Role::Pod, false) => POD_PROGRAMS.to_vec(),
            (Role::Node, true) => LAYER3_NODE_PROGRAMS.to_vec(),
            (Role::Pod, true) => LAYER3_POD_PROGRAMS.to_vec(),
            (Role::Loopback, _) => LOOPBACK_PROGRAMS.to_vec(),
        };
        if layer3 && !self.programs.contains_key(LAYER3_NODE_PROGRAMS[0].0) {
            match self.layer3.load() {
                Ok(programs) => self.programs.extend(programs),
                // Attaching says that there is none, for each device.
                Err(error) => warn!("programs for devices without a link-layer header: {error}"),
            }
        }
        if role == Role::Node && xdp {
            wanted.push((XDP_PROGRAM, Hook::Xdp));
        }
        wanted
    }

    /// Whether the device takes frames from XDP, now that it has a program: with many drivers that
    /// makes the difference.
    fn sends(&self, device: &Device, facts: &mut Facts) -> bool {
        if self.xdp == XdpMode::Generic || facts.features.is_none() || facts.takes_frames(device) {
            return true;
        }
        *facts = Facts {
            features: xdp::features().ok(),
            ..facts.clone()
        };
        facts.features.is_none() || facts.takes_frames(device)
    }

    /// The links that an agent before this one pinned; stale pins are removed.
    fn read_pins(&self) -> Result<BTreeMap<(u32, &'static str), AttachedLink>, AttachError> {
        let mut links = BTreeMap::new();
        for pin in list(&self.paths.links())? {
            let Some((target, program)) = parse_pin(&pin) else {
                continue;
            };
            if target == "cgroup" && CGROUP_PROGRAMS.iter().any(|(name, _)| *name == program) {
                continue;
            }
            let known = device_programs().find(|(name, _)| *name == program);
            match (OpenLink::open(&pin), known) {
                (Ok(OpenLink { fd, info }), Some((program, hook))) => {
                    let Target::Device { index } = info.target else {
                        continue;
                    };
                    // The index alone may be that of a device in another namespace, where this one
                    // moved to.
                    let here = hook == Hook::Xdp
                        || link::query(index, hook).is_ok_and(|ids| ids.contains(&info.id));
                    if index != 0 && here {
                        links.insert(
                            (index, program),
                            AttachedLink {
                                fd,
                                pin,
                                current: false,
                            },
                        );
                    } else {
                        debug!("{}: its device is gone", pin.display());
                    }
                }
                (Err(error), _) => warn!("{}: {error}: removing it", pin.display()),
                (Ok(_), None) => debug!("{}: no program of this version", pin.display()),
            }
        }
        Ok(links)
    }

    /// One program on one device by a pinned link.
    fn attach_link(
        &self,
        device: &Device,
        program: &'static str,
        hook: Hook,
        links: &mut BTreeMap<(u32, &'static str), AttachedLink>,
    ) -> io::Result<()> {
        let Some(fd) = self.programs.get(program) else {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the program is not loaded",
            ));
        };
        let key = (device.index, program);
        let pin = self.paths.device_link(&device.name, program);
        if let Some(held) = links.get_mut(&key) {
            let usable = hook != Hook::Xdp || held.current || self.same_xdp(device, held);
            if usable && (held.current || run_by(held.fd.as_fd(), fd)) {
                held.current = true;
                if held.pin != pin {
                    // Renamed. The old pin is swept later; the other device that may have had this
                    // name is held open.
                    bpf::pin_over(held.fd.as_fd(), &pin)?;
                    held.pin = pin;
                }
                return Ok(());
            }
            // XDP in another mode than wanted, or a link that somebody detached.
            link::detach(held.fd.as_fd())?;
            links.remove(&key);
        }
        let flags = match (hook, self.xdp) {
            (Hook::Xdp, XdpMode::Generic) => XDP_FLAGS_SKB_MODE,
            (Hook::Xdp, _) => XDP_FLAGS_DRV_MODE,
            _ => 0,
        };
        let link = link::create(fd.as_fd(), device.index, hook, flags)?;
        bpf::pin_over(link.as_fd(), &pin)?;
        links.insert(
            key,
            AttachedLink {
                fd: link,
                pin,
                current: true,
            },
        );
        Ok(())
    }

    /// Whether a link from before is what runs on the device, in the mode that is wanted now:
    /// updates keep the mode.
    fn same_xdp(&self, device: &Device, held: &AttachedLink) -> bool {
        let program = link::info(held.fd.as_fd()).map(|info| info.program).ok();
        let mode_fits = match device.xdp {
            Some(XdpState { generic, .. }) => generic == (self.xdp == XdpMode::Generic),
            None => false,
        };
        mode_fits && device.xdp.map(|x| x.program) == program
    }

    /// One program on one device by a clsact filter.
    fn attach_filter(
        &mut self,
        device: &Device,
        program: &'static str,
        hook: Hook,
    ) -> io::Result<()> {
        let key = (device.index, program);
        if self.filters.get(&key) == Some(&device.name) {
            return Ok(());
        }
        clsact::ensure_qdisc(&self.paths, &device.name, device.index)?;
        clsact::attach(&device.name, hook, &self.paths.program(program))?;
        // Both roles' programs of one direction stand in one place.
        let same_place = |name: &str| tc_programs().any(|(other, h)| other == name && h == hook);
        self.filters
            .retain(|(index, name), _| *index != device.index || !same_place(name));
        self.filters.insert(key, device.name.clone());
        Ok(())
    }

    /// Removes pins and filters that are nobody's any more.
    fn sweep(&self, pins: &BTreeSet<&Path>, devices: &[(Device, Role)]) -> Result<(), AttachError> {
        for path in list(&self.paths.links())? {
            let cgroup = CGROUP_PROGRAMS
                .iter()
                .any(|(name, _)| path == self.paths.cgroup_link(name));
            if !cgroup && !pins.contains(path.as_path()) {
                debug!("removing {}", path.display());
                remove_pin(&path)?;
            }
        }
        let note_error = |error| AttachError::Pin {
            path: self.paths.clsact(),
            error,
        };
        for note in clsact::notes(&self.paths).map_err(note_error)? {
            let device = devices
                .iter()
                .find(|(d, _)| d.index == note.index)
                .map(|(d, _)| d);
            match device {
                Some(_) if self.tc == TcMode::Clsact => {}
                device => {
                    let name = device.map_or(&note.device, |d| &d.name);
                    let now = clsact::Note {
                        device: name.clone(),
                        ..note.clone()
                    };
                    clsact::detach(&now).map_err(note_error)?;
                    note.remove(&self.paths).map_err(note_error)?;
                }
            }
        }
        Ok(())
    }
}

/// Makes a link that is attached run `program`; false when it does not take it. A program that was
/// taken over is there already, and the link is left alone.
fn run_by(link: BorrowedFd<'_>, program: &OwnedFd) -> bool {
    let runs = || Ok::<_, io::Error>(link::info(link)?.program == program::id(program)?);
    runs().unwrap_or(false) || link::update(link, program.as_fd()).is_ok()
}

/// Whether the reason for `error` is that the device is not there any more. XDP says no more than
/// `EINVAL` then.
fn gone(error: &io::Error, index: u32) -> bool {
    match error.raw_os_error() {
        Some(libc::ENODEV | libc::ENXIO | libc::ENOLINK) => true,
        Some(libc::EINVAL) => rtnl::device_name(index).is_ok_and(|name| name.is_none()),
        _ => false,
    }
}
