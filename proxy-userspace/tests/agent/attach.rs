//! Loading, attaching and cleaning up with real kernel objects: every test in a network namespace,
//! a cgroup and a `--bpf-root` of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData, ProgramArray};
use shunt::{
    cli::{
        check,
        cleanup::{CleanupError, cleanup},
    },
    datapath::{
        Capacities, Paths,
        attach::{Attacher, PinnedLink, TcMode, pinned_links},
        bpf,
        device_watcher::DeviceWatcher,
        devices::{Device, DevicePatterns, Glob, LinkHeader, Role},
        load::{Datapath, LoadConfig, LoadError, SocketLb, load},
        lock::LockError,
        netns::{self, NodePortAddresses},
        xdp::{self, XdpMode},
    },
};
use shunt_common::layout::{Frontend, FrontendKey, SCOPE_INTERNAL, TAIL_CALLS, TCP, names};
use shunt_lab::UniqueName;

/// A bpf-root and a cgroup that nobody else has, removed with everything in them when the test ends
/// in whatever way.
struct Place {
    bpf_root: PathBuf,
    cgroup: PathBuf,
    _unique: UniqueName,
}

impl Place {
    fn new() -> Self {
        let unique = UniqueName::take().unwrap();
        let name = unique.prefix();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let cgroup_root =
            mounts
                .lines()
                .find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
                    [_, path, "cgroup2", ..] => Some(PathBuf::from(path)),
                    _ => None,
                });
        let cgroup = cgroup_root.expect("cgroup2 is mounted").join(&name);
        fs::create_dir(&cgroup).unwrap();
        Self {
            bpf_root: Path::new("/sys/fs/bpf").join(name),
            cgroup,
            _unique: unique,
        }
    }

    fn paths(&self) -> Paths {
        Paths::new(&self.bpf_root)
    }

    fn load(&self) -> Result<Datapath, LoadError> {
        self.load_sized(small())
    }

    fn load_sized(&self, capacities: Capacities) -> Result<Datapath, LoadError> {
        load(&LoadConfig {
            capacities,
            ..self.config(false)
        })
    }

    /// Everything, over small maps.
    fn config(&self, count_traffic: bool) -> LoadConfig {
        LoadConfig {
            bpf_root: self.bpf_root.clone(),
            capacities: small(),
            socket_lb: SocketLb::On,
            xdp: true,
            fast_path: false,
            count_traffic,
        }
    }

    /// The links but for the loopback device's, which every namespace has.
    fn links(&self) -> Vec<PinnedLink> {
        let mut links = pinned_links(&self.paths()).unwrap();
        links.retain(|link| link.target != "lo");
        links
    }

    /// Link and program ids by pin.
    fn ids(&self) -> BTreeMap<String, (u32, u32)> {
        self.links()
            .into_iter()
            .map(|l| {
                (
                    format!("{}-{}", l.target, l.program),
                    (l.link, l.program_id),
                )
            })
            .collect()
    }

    fn pins(&self) -> BTreeSet<String> {
        self.ids().into_keys().collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Pins hold links and maps: without the pins the kernel frees them.
        let _ = fs::remove_dir_all(&self.bpf_root);
        let _ = fs::remove_dir(&self.cgroup);
    }
}

fn small() -> Capacities {
    Capacities {
        frontends: 128,
        slots: 128,
        backends: 64,
        flows: 128,
        new_flows: 128,
        snat: 128,
        affinity: 1024,
        sockets: 1024,
    }
}

/// Runs `test` in a thread with a network namespace of its own, which ends with it.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        // SAFETY: this thread begins here and shares nothing that depends on its namespace.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        test();
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("iproute2 is installed");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Sets whether the other end of a pair, both of which are up, takes frames from XDP.
fn takes_frames(other_end: &str, on: bool) {
    let gro = if on { "on" } else { "off" };
    let status = Command::new("ethtool")
        .args(["-K", other_end, "gro", gro])
        .status();
    assert!(
        status.unwrap().success(),
        "ethtool -K {other_end} gro {gro}"
    );
}

fn tc(arguments: &str) -> String {
    let output = Command::new("tc")
        .args(arguments.split(' '))
        .output()
        .expect("iproute2 is installed");
    assert!(
        output.status.success(),
        "tc {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A runtime whose tasks all run in this thread, and so in its namespace.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < end, "still not: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn patterns() -> DevicePatterns {
    DevicePatterns {
        devices: vec![Glob::new("node*")],
        pod_devices: vec![Glob::new("pod*")],
        ..Default::default()
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&n| n.to_owned()).collect()
}

const CGROUP: [&str; 9] = [
    "cgroup-sock_release",
    "cgroup-sock_connect4",
    "cgroup-sock_connect6",
    "cgroup-sock_sendmsg4",
    "cgroup-sock_sendmsg6",
    "cgroup-sock_recvmsg4",
    "cgroup-sock_recvmsg6",
    "cgroup-sock_getpeer4",
    "cgroup-sock_getpeer6",
];

fn frontend_key() -> FrontendKey<[u8; 4]> {
    FrontendKey {
        addr: [10, 96, 0, 1],
        port: 80,
        proto: TCP,
        scope: SCOPE_INTERNAL,
        reserved: 0,
    }
}

fn frontends(datapath: &Datapath) -> HashMap<MapData, FrontendKey<[u8; 4]>, Frontend> {
    HashMap::try_from(Map::HashMap(datapath.map("frontends4").unwrap())).unwrap()
}

#[test]
fn a_restart_keeps_links_and_maps() {
    let place = Place::new();
    in_namespace(move || {
        ip("link add node0 type veth peer name pod0");
        takes_frames("pod0", true);
        ip("link set node0 up");
        ip("link set pod0 up");
        let run = |count_traffic| {
            let datapath = load(&place.config(count_traffic)).unwrap();
            let mut attacher = Attacher::new(&datapath, XdpMode::Native).unwrap();
            attacher.attach_cgroup(&place.cgroup).unwrap();
            runtime().block_on(async {
                let watcher = DeviceWatcher::spawn(attacher, patterns()).unwrap();
                for device in watcher.status.borrow().iter() {
                    assert_eq!(device.problems, Vec::<String>::new());
                }
            });
            datapath
        };
        let first = run(false);
        frontends(&first)
            .insert(
                frontend_key(),
                Frontend {
                    slot_count: 7,
                    ..Default::default()
                },
                0,
            )
            .unwrap();
        let before = place.ids();
        let devices = [
            "node0-tc_node_in",
            "node0-tc_node_out",
            "node0-xdp_node",
            "pod0-tc_pod_in",
            "pod0-tc_pod_out",
        ];
        assert_eq!(place.pins(), set(&[&CGROUP[..], &devices].concat()));
        drop(first);

        // The agent is away: everything stays where it is.
        assert_eq!(place.ids(), before);

        let second = run(false);
        assert!(second.taken_over());
        assert_eq!(place.ids(), before, "the same links run the same programs");
        drop(second);

        let second = run(true);
        assert!(!second.taken_over());
        let after = place.ids();
        for (pin, (link, program)) in &before {
            let (link_now, program_now) = after[pin];
            assert_eq!(link_now, *link, "{pin}: the same link, so there was no gap");
            assert_ne!(
                program_now, *program,
                "{pin}: runs the program of the new agent"
            );
        }
        assert_eq!(after.len(), before.len());
        assert_eq!(
            frontends(&second)
                .get(&frontend_key(), 0)
                .unwrap()
                .slot_count,
            7,
            "maps are used again"
        );
        drop(second);

        let removed = cleanup(&place.bpf_root).unwrap();
        // And the loopback device's.
        assert_eq!(removed.links.len(), before.len() + 1);
        assert!(!place.bpf_root.exists());
    });
}

/// Ids of the loaded programs by name.
fn program_ids(datapath: &Datapath) -> BTreeMap<&'static str, u32> {
    let ids = datapath
        .programs()
        .map(|(name, fd)| (name, bpf::program::id(fd).unwrap()));
    ids.collect()
}

#[test]
fn programs_are_taken_over_and_where_one_is_missing_all_are_loaded() {
    let place = Place::new();
    in_namespace(move || {
        let start = |xdp| {
            load(&LoadConfig {
                socket_lb: SocketLb::Off,
                xdp,
                ..place.config(false)
            })
            .unwrap()
        };
        let first = start(true);
        assert!(!first.taken_over(), "nothing is pinned");
        let before = program_ids(&first);
        drop(first);
        let second = start(true);
        assert!(second.taken_over());
        assert_eq!(program_ids(&second), before);
        drop(second);
        // A hook less is a program less; when it comes back, a program is missing.
        assert!(start(false).taken_over());
        assert!(!place.paths().program("xdp_node").exists());
        let third = start(true);
        assert!(!third.taken_over());
        let after = program_ids(&third);
        assert!(
            before.iter().all(|(name, id)| after[name] != *id),
            "{before:?} {after:?}"
        );
        drop(third);
        // Programs that do not find those that they hand packets over to would open no flow.
        assert!(start(true).taken_over());
        let pin = place.paths().map(names::TAIL_CALLS);
        let tail_calls = Map::ProgramArray(MapData::from_pin(pin).unwrap());
        let mut tail_calls = ProgramArray::try_from(tail_calls).unwrap();
        for entry in 0..TAIL_CALLS as u32 {
            // Most were empty.
            let _ = tail_calls.clear_index(&entry);
        }
        assert!(!start(true).taken_over());
        assert!(start(true).taken_over());
    });
}

#[test]
fn programs_follow_devices() {
    let place = Place::new();
    in_namespace(move || {
        let datapath = place.load().unwrap();
        let attacher = Attacher::new(&datapath, XdpMode::Off).unwrap();
        runtime().block_on(async {
            let _watcher = DeviceWatcher::spawn(attacher, patterns()).unwrap();
            assert_eq!(place.pins(), set(&[]));
            let links = pinned_links(&place.paths()).unwrap();
            assert!(
                matches!(&links[..], [lo] if lo.target == "lo" && lo.program == "tc_node_out"),
                "{links:?}"
            );

            ip("link add pod1 type veth peer name other1");
            until("a device that appears", || {
                place.pins() == set(&["pod1-tc_pod_in", "pod1-tc_pod_out"])
            })
            .await;
            let ids: Vec<(u32, u32)> = place.ids().into_values().collect();

            ip("link set pod1 name pod2.5");
            until("a device that is renamed", || {
                place.pins() == set(&["pod2.5-tc_pod_in", "pod2.5-tc_pod_out"])
            })
            .await;
            assert_eq!(
                place.ids().into_values().collect::<Vec<_>>(),
                ids,
                "the links are the same ones"
            );

            // Out of the patterns' sight, though the device is still there.
            ip("link set pod2.5 name away");
            until("a device that is shunt's no more", || {
                place.pins().is_empty()
            })
            .await;
            ip("link set away name node7");
            until("a device of another role", || {
                place.pins() == set(&["node7-tc_node_in", "node7-tc_node_out"])
            })
            .await;

            ip("link del node7");
            until("a device that vanishes", || place.pins().is_empty()).await;
        });
    });
}

#[test]
fn a_device_that_vanished_before_it_got_its_programs_is_no_problem() {
    let place = Place::new();
    in_namespace(move || {
        let datapath = place.load().unwrap();
        for mode in [TcMode::Tcx, TcMode::Clsact] {
            let mut attacher = Attacher::with_tc(&datapath, XdpMode::Native, mode).unwrap();
            let ghost = |index, name: &str| Device {
                index,
                name: name.to_owned(),
                ..Device::default()
            };
            let status = attacher
                .reconcile(&[
                    (ghost(4711, "node0"), Role::Node),
                    (ghost(4712, "pod0"), Role::Pod),
                ])
                .unwrap();
            for device in status {
                assert!(
                    device.problems.is_empty() && device.programs.is_empty(),
                    "{mode:?} {device:?}"
                );
            }
            assert_eq!(place.pins(), set(&[]));
        }
    });
}

#[test]
fn two_devices_that_swap_names_keep_their_links() {
    let place = Place::new();
    in_namespace(move || {
        ip("link add pod1 type veth peer name pod2");
        let ids = || -> BTreeMap<u32, Vec<(String, u32)>> {
            let mut by_device = BTreeMap::<u32, Vec<(String, u32)>>::new();
            for link in place.links() {
                by_device
                    .entry(link.index.unwrap())
                    .or_default()
                    .push((link.program, link.link));
            }
            by_device
        };
        let run = || {
            let datapath = place.load().unwrap();
            let attacher = Attacher::new(&datapath, XdpMode::Off).unwrap();
            runtime().block_on(async {
                let _watcher = DeviceWatcher::spawn(attacher, patterns()).unwrap();
            });
        };
        run();
        let before = ids();
        assert_eq!(before.len(), 2);
        // While no agent runs.
        ip("link set pod1 name x");
        ip("link set pod2 name pod1");
        ip("link set x name pod2");
        run();
        assert_eq!(ids(), before);
        let by_name: BTreeMap<String, u32> = place
            .links()
            .into_iter()
            .map(|l| (l.target, l.index.unwrap()))
            .collect();
        let listed = shunt::datapath::devices::list().unwrap();
        for device in listed.iter().filter(|d| d.name.starts_with("pod")) {
            assert_eq!(
                by_name[&device.name], device.index,
                "the pin bears the device's present name"
            );
        }
    });
}

#[test]
fn stale_pins_are_removed_and_a_device_of_the_same_name_gets_new_links() {
    let place = Place::new();
    in_namespace(move || {
        let run = || {
            let datapath = place.load().unwrap();
            let attacher = Attacher::new(&datapath, XdpMode::Native).unwrap();
            runtime().block_on(async {
                let _watcher = DeviceWatcher::spawn(attacher, patterns()).unwrap();
            });
        };
        ip("link add node1 type veth peer name other1");
        takes_frames("other1", true);
        ip("link set node1 up");
        ip("link set other1 up");
        run();
        let before = place.ids();
        assert_eq!(before.len(), 3);
        ip("link del node1");
        assert!(
            place.links().iter().all(|l| l.index == Some(0)),
            "the kernel says that the device is gone"
        );
        ip("link add node1 type veth peer name other1");
        takes_frames("other1", true);
        ip("link set node1 up");
        ip("link set other1 up");
        run();
        let after = place.ids();
        assert_eq!(
            after.keys().collect::<Vec<_>>(),
            before.keys().collect::<Vec<_>>()
        );
        assert!(before.iter().all(|(pin, (link, _))| after[pin].0 != *link));
        ip("link del node1");
        run();
        assert_eq!(place.pins(), set(&[]));
    });
}

#[test]
fn xdp_changes_its_mode_and_auto_leaves_veths_alone() {
    let place = Place::new();
    in_namespace(move || {
        ip("link add node0 type veth peer name other0");
        takes_frames("other0", true);
        ip("link set node0 up");
        ip("link set other0 up");
        let run = |mode| {
            let datapath = place.load().unwrap();
            let attacher = Attacher::new(&datapath, mode).unwrap();
            runtime().block_on(async {
                let _watcher = DeviceWatcher::spawn(attacher, patterns()).unwrap();
            });
            let devices = shunt::datapath::devices::list().unwrap();
            devices
                .into_iter()
                .find(|d| d.name == "node0")
                .unwrap()
                .xdp
                .map(|x| x.generic)
        };
        assert_eq!(run(XdpMode::Native), Some(false));
        assert_eq!(run(XdpMode::Generic), Some(true));
        assert_eq!(run(XdpMode::Generic), Some(true));
        assert_eq!(run(XdpMode::Auto), None);
        assert_eq!(run(XdpMode::Native), Some(false));
        assert_eq!(run(XdpMode::Off), None);
    });
}

#[test]
fn clsact_filters_are_replaced_not_stacked_and_cleaned_up() {
    let place = Place::new();
    in_namespace(move || {
        ip("link add node0 type veth peer name pod0");
        takes_frames("pod0", true);
        ip("link set node0 up");
        ip("link set pod0 up");
        // Somebody else's qdisc and filter stay.
        tc("qdisc add dev pod0 clsact");
        let datapath = place.load().unwrap();
        let any = place.paths().program("tc_node_in");
        tc(&format!(
            "filter add dev pod0 ingress protocol all prio 7 handle 9 bpf da pinned {}",
            any.display()
        ));
        drop(datapath);
        let program = || {
            let filters = tc("filter show dev node0 ingress");
            assert_eq!(filters.matches("direct-action").count(), 1, "{filters}");
            let (_, id) = filters.split_once(" id ").unwrap();
            id.split_whitespace().next().unwrap().to_owned()
        };
        let run_with = |mode, count_traffic| {
            let datapath = load(&place.config(count_traffic)).unwrap();
            let attacher = Attacher::with_tc(&datapath, XdpMode::Off, mode).unwrap();
            runtime().block_on(async {
                let watcher = DeviceWatcher::spawn(attacher, patterns()).unwrap();
                for device in watcher.status.borrow().iter() {
                    assert_eq!(device.problems, Vec::<String>::new());
                    let programs = if device.role == Role::Loopback { 1 } else { 2 };
                    assert_eq!(device.programs.len(), programs);
                }
            });
        };
        let run = |mode| run_with(mode, false);
        run(TcMode::Clsact);
        let first = program();
        assert!(tc("filter show dev pod0 egress").contains("tc_pod_out"));
        assert_eq!(place.pins(), set(&[]));
        run(TcMode::Clsact);
        assert_eq!(
            program(),
            first,
            "the filter runs the program that was taken over"
        );
        run_with(TcMode::Clsact, true);
        assert_ne!(program(), first, "the filter runs the new program");

        let removed = cleanup(&place.bpf_root).unwrap();
        let filters: BTreeSet<&str> = removed.filters.iter().map(String::as_str).collect();
        assert_eq!(filters, BTreeSet::from(["lo", "node0", "pod0"]));
        assert!(!tc("qdisc show dev lo").contains("clsact"));
        assert!(!tc("qdisc show dev node0").contains("clsact"));
        assert!(tc("qdisc show dev pod0").contains("clsact"));
        let left = tc("filter show dev pod0 ingress");
        assert!(
            left.contains("handle 0x9") && !left.contains("tc_pod_in"),
            "{left}"
        );

        // A kernel with TCX takes over from one without.
        run(TcMode::Clsact);
        run(TcMode::Tcx);
        assert!(!tc("qdisc show dev node0").contains("clsact"));
        assert_eq!(place.pins().len(), 4);
    });
}

#[test]
fn a_second_agent_and_cleanup_beside_one_are_refused() {
    let place = Place::new();
    in_namespace(move || {
        let first = place.load().unwrap();
        let pid = std::process::id();
        match place.load().unwrap_err() {
            LoadError::Lock(
                error @ LockError::Held {
                    pid: Some(holder), ..
                },
            ) if holder == pid => {
                assert!(error.to_string().contains("--bpf-root"), "{error}");
            }
            other => panic!("{other}"),
        }
        assert!(matches!(
            cleanup(&place.bpf_root),
            Err(CleanupError::Running(_))
        ));
        drop(first);
        assert!(!cleanup(&place.bpf_root).unwrap().maps.is_empty());
        assert!(!place.bpf_root.exists());
        let again = cleanup(&place.bpf_root).unwrap();
        assert!(
            again.maps.is_empty() && again.folders.is_empty(),
            "{again:?}"
        );
    });
}

#[test]
fn cleanup_leaves_what_is_not_shunts() {
    let place = Place::new();
    in_namespace(move || {
        drop(place.load().unwrap());
        let folder = place.bpf_root.join("mine");
        fs::create_dir(&folder).unwrap();
        let inside = place.paths().maps().join("mine");
        fs::create_dir(&inside).unwrap();
        let removed = cleanup(&place.bpf_root).unwrap();
        assert!(folder.exists() && inside.exists());
        assert!(removed.foreign.contains(&inside), "{removed:?}");
        assert!(!place.paths().programs().exists());
    });
}

#[test]
fn sizes_change_only_while_nothing_is_attached() {
    let place = Place::new();
    in_namespace(move || {
        let entries = |datapath: &Datapath| {
            datapath
                .map("flows4")
                .unwrap()
                .info()
                .unwrap()
                .max_entries()
        };
        let larger = Capacities {
            flows: 256,
            ..small()
        };
        let first = place.load().unwrap();
        assert_eq!(entries(&first), 128);
        frontends(&first)
            .insert(frontend_key(), Frontend::default(), 0)
            .unwrap();
        drop(first);

        let second = place.load_sized(larger).unwrap();
        assert_eq!(entries(&second), 256);
        assert_eq!(second.capacities(), larger);
        assert!(
            frontends(&second).get(&frontend_key(), 0).is_err(),
            "all maps begin anew together"
        );
        frontends(&second)
            .insert(frontend_key(), Frontend::default(), 0)
            .unwrap();
        Attacher::new(&second, XdpMode::Off)
            .unwrap()
            .attach_cgroup(&place.cgroup)
            .unwrap();
        drop(second);

        let third = place.load().unwrap();
        assert_eq!(entries(&third), 256);
        assert_eq!(
            third.capacities(),
            larger,
            "the result says what the maps really have"
        );
        frontends(&third).get(&frontend_key(), 0).unwrap();
    });
}

#[test]
fn a_map_too_large_names_its_setting_and_leaves_nothing() {
    let place = Place::new();
    in_namespace(move || {
        let error = place
            .load_sized(Capacities {
                flows: u32::MAX,
                ..small()
            })
            .unwrap_err();
        assert!(error.to_string().contains("--max-flows"), "{error}");
        assert_eq!(fs::read_dir(place.paths().maps()).unwrap().count(), 0);
        assert_eq!(fs::read_dir(place.paths().programs()).unwrap().count(), 0);
        place.load().unwrap();
    });
}

#[test]
fn hooks_that_are_off_leave_nothing_behind() {
    let place = Place::new();
    in_namespace(move || {
        ip("link add node0 type veth peer name other0");
        takes_frames("other0", true);
        ip("link set node0 up");
        ip("link set other0 up");
        let run = |socket_lb, xdp: XdpMode| {
            let datapath = load(&LoadConfig {
                bpf_root: place.bpf_root.clone(),
                capacities: small(),
                socket_lb,
                xdp: xdp != XdpMode::Off,
                fast_path: false,
                count_traffic: false,
            })
            .unwrap();
            let mut attacher = Attacher::new(&datapath, xdp).unwrap();
            attacher.attach_cgroup(&place.cgroup).unwrap();
            runtime().block_on(async {
                let _watcher = DeviceWatcher::spawn(attacher, patterns()).unwrap();
            });
        };
        run(SocketLb::On, XdpMode::Generic);
        assert_eq!(place.pins().len(), CGROUP.len() + 3);
        run(SocketLb::Off, XdpMode::Off);
        assert_eq!(
            place.pins(),
            set(&["node0-tc_node_in", "node0-tc_node_out"])
        );
        let programs = fs::read_dir(place.paths().programs()).unwrap();
        let programs: BTreeSet<String> = programs
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        let left = [
            "build",
            "tc_node_in",
            "tc_node_out",
            "tc_pod_in",
            "tc_pod_out",
            "tc_slow_path",
            "tc_undecided",
        ];
        assert_eq!(programs, set(&left));
    });
}

#[test]
fn a_cgroup_root_that_is_none_is_named() {
    let place = Place::new();
    in_namespace(move || {
        let datapath = place.load().unwrap();
        let mut attacher = Attacher::new(&datapath, XdpMode::Off).unwrap();
        let error = attacher
            .attach_cgroup(Path::new("/proc"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("--cgroup-root /proc") && error.contains("cgroup2"),
            "{error}"
        );
        assert_eq!(place.pins(), set(&[]));

        // From one cgroup to another.
        attacher.attach_cgroup(&place.cgroup).unwrap();
        let before = place.ids();
        let inner = place.cgroup.join("inner");
        fs::create_dir(&inner).unwrap();
        attacher.attach_cgroup(&inner).unwrap();
        let after = place.ids();
        assert!(before.iter().all(|(pin, (link, _))| after[pin].0 != *link));
        drop(datapath);
        cleanup(&place.bpf_root).unwrap();
        fs::remove_dir(inner).unwrap();
    });
}

#[test]
fn a_bpf_root_of_its_own_is_mounted_and_unmounted() {
    in_namespace(|| {
        let folder = tempfile::tempdir().unwrap();
        let bpf_root = folder.path().join("bpf");
        let config = LoadConfig {
            bpf_root: bpf_root.clone(),
            capacities: small(),
            socket_lb: SocketLb::Off,
            xdp: false,
            fast_path: false,
            count_traffic: false,
        };
        let datapath = load(&config);
        struct Unmount(PathBuf);
        impl Drop for Unmount {
            fn drop(&mut self) {
                let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
            }
        }
        let _guard = Unmount(bpf_root.clone());
        drop(datapath.unwrap());
        assert!(Paths::new(&bpf_root).map("config").exists());
        let removed = cleanup(&bpf_root).unwrap();
        assert!(removed.foreign.is_empty(), "{removed:?}");
        assert!(!bpf_root.exists());
    });
}

#[test]
fn devices_are_found_without_patterns() {
    in_namespace(|| {
        ip("link set lo up");
        ip("link add br0 type bridge");
        ip("link add eth0 type veth peer name wan");
        ip("link add eth1 type veth peer name wan1");
        ip("link add eth2 type veth peer name wan2");
        ip("link add link eth2 name mac0 type macvlan");
        ip("link add vx0 type vxlan id 1 dstport 8472");
        ip("tuntap add mode tun name tun0");
        ip("link set wan1 master br0");
        ip("link add veth1 type veth peer name in1");
        ip("addr add 192.0.2.1/24 dev eth0");
        ip("addr add 198.51.100.1/24 dev eth1");
        ip("link set eth0 up");
        ip("link set wan up");
        ip("route add default via 192.0.2.254");
        // A pod: a thread in another namespace that holds the other end until the test is over.
        let (tid_sender, tid) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let pod = std::thread::spawn(move || {
            // SAFETY: as in `in_namespace`.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .unwrap();
            tid_sender.send(rustix::thread::gettid()).unwrap();
            let _ = ended.recv();
        });
        ip(&format!(
            "link set in1 netns {}",
            tid.recv().unwrap().as_raw_pid()
        ));
        let patterns = DevicePatterns {
            node_ips: ["198.51.100.1".parse().unwrap()].into(),
            ..DevicePatterns::default()
        };
        let (taken, left_out) = patterns.select(shunt::datapath::devices::list().unwrap());
        drop(end);
        pod.join().unwrap();
        let roles: BTreeMap<&str, Role> = taken
            .iter()
            .map(|(d, role)| (d.name.as_str(), *role))
            .collect();
        let node = [
            "eth0", "eth1", "eth2", "wan", "wan1", "wan2", "mac0", "vx0", "tun0",
        ];
        let expected = node
            .map(|name| (name, Role::Node))
            .into_iter()
            .chain([("veth1", Role::Pod), ("lo", Role::Loopback)]);
        assert_eq!(roles, expected.collect());
        let left_out: Vec<&str> = left_out.iter().map(|device| device.name.as_str()).collect();
        assert_eq!(left_out, ["br0"]);
        let tun = taken
            .iter()
            .find(|(device, _)| device.name == "tun0")
            .unwrap();
        assert_eq!(tun.0.header, LinkHeader::None);
    });
}

/// N8: a device that loses its frames gets none from XDP, and gets its program when that changes.
#[test]
fn xdp_is_only_where_frames_are_taken() {
    let place = Place::new();
    in_namespace(move || {
        ip("link add node0 type veth peer name other0");
        takes_frames("other0", false);
        ip("link set node0 up");
        ip("link set other0 up");
        let datapath = place.load().unwrap();
        let attacher = Attacher::new(&datapath, XdpMode::Native).unwrap();
        runtime().block_on(async {
            let watcher = DeviceWatcher::spawn(attacher, patterns()).unwrap();
            let has_xdp = || place.pins().contains("node0-xdp_node");
            let why = watcher
                .status
                .borrow()
                .iter()
                .find_map(|device| device.no_xdp.clone())
                .unwrap();
            assert!(why.contains("takes no frames from XDP"), "{why}");
            assert!(!has_xdp() && place.pins().contains("node0-tc_node_in"));
            takes_frames("other0", true);
            until("XDP where frames are taken", has_xdp).await;
            takes_frames("other0", false);
            until("no XDP where they are not", || !has_xdp()).await;
        });
    });
}

/// N9: what XDP would pass by.
#[test]
fn rules_in_forward_are_found() {
    in_namespace(|| {
        let nft = |rules: &str| {
            let status = Command::new("nft").arg(rules).status().unwrap();
            assert!(status.success(), "nft {rules}");
        };
        nft(
            "table inet fw {\nchain onward {\ntype filter hook forward priority 0;\n}\nchain arriving {\ntype filter hook input priority 0;\ntcp dport 1 drop\n}\n}\n",
        );
        assert_eq!(
            xdp::forward_rules(),
            None,
            "a chain without rules, and one elsewhere"
        );
        nft("add rule inet fw onward tcp dport 80 drop");
        assert_eq!(
            xdp::forward_rules().unwrap(),
            "chain onward of table inet fw (nftables)"
        );
        nft("flush chain inet fw onward");
        assert_eq!(xdp::forward_rules(), None);
        nft("add chain inet fw onward { policy drop; }");
        assert!(xdp::forward_rules().is_some(), "it drops by default");
    });
}

/// A pattern of `--devices` that matches nothing yet is looked at again.
#[test]
fn a_pattern_waits_for_its_device() {
    let place = Place::new();
    in_namespace(move || {
        let datapath = place.load().unwrap();
        let attacher = Attacher::new(&datapath, XdpMode::Off).unwrap();
        runtime().block_on(async {
            let _watcher = DeviceWatcher::spawn(attacher, patterns()).unwrap();
            assert!(place.pins().iter().all(|pin| !pin.starts_with("node")));
            ip("tuntap add mode tun name node7");
            until(
                "a device without a link-layer header, with programs for such",
                || {
                    place
                        .pins()
                        .is_superset(&set(&["node7-tc_node_in_l3", "node7-tc_node_out_l3"]))
                },
            )
            .await;
        });
    });
}

#[test]
fn node_addresses_are_followed() {
    in_namespace(|| {
        ip("link set lo up");
        ip("link add eth0 type veth peer name wan");
        ip("link set eth0 up");
        ip("addr add 192.0.2.1/24 dev eth0");
        runtime().block_on(async {
            let (addresses, _task) = netns::watch_addresses(NodePortAddresses::default()).unwrap();
            let expect = |texts: &[&str]| -> BTreeSet<IpAddr> {
                texts.iter().map(|t| t.parse().unwrap()).collect()
            };
            assert_eq!(*addresses.borrow(), expect(&["192.0.2.1"]));
            ip("addr add 2001:db8::1/64 dev eth0 nodad");
            until("a new address", || {
                *addresses.borrow() == expect(&["192.0.2.1", "2001:db8::1"])
            })
            .await;
            ip("addr del 192.0.2.1/24 dev eth0");
            until("an address less", || {
                *addresses.borrow() == expect(&["2001:db8::1"])
            })
            .await;
        });
        let here = netns::cookie();
        assert_ne!(here, 0);
        let elsewhere = std::thread::spawn(|| {
            // SAFETY: as in `in_namespace`.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .unwrap();
            netns::cookie()
        });
        assert_ne!(elsewhere.join().unwrap(), here);
    });
}

#[test]
fn check_finds_what_the_other_tests_use() {
    let place = Place::new();
    in_namespace(move || {
        let report = check::check(&place.bpf_root, &place.cgroup);
        assert!(report.ok(), "{report:#?}");
        for what in [
            "links to cgroups",
            "links to XDP",
            "cgroup2 root",
            "batch operations on maps",
        ] {
            let row = report.rows.iter().find(|r| r.what == what).unwrap();
            assert!(row.ok, "{row:?}");
        }
        let tcx = report
            .rows
            .iter()
            .find(|r| r.what == "links to tc (TCX)")
            .unwrap();
        assert_eq!(tcx.ok, TcMode::probe() == TcMode::Tcx);
        let _taken = std::net::TcpListener::bind("0.0.0.0:10256").unwrap();
        let report = check::check(&place.bpf_root, Path::new("/proc"));
        let bad: Vec<&str> = report
            .rows
            .iter()
            .filter(|r| !r.ok)
            .map(|r| r.what.as_str())
            .collect();
        assert!(
            bad.contains(&"cgroup2 root") && bad.contains(&"nobody at kube-proxy's healthz port"),
            "{bad:?}"
        );
        assert!(
            report
                .rows
                .iter()
                .filter(|r| !r.ok)
                .all(|r| !r.advice.is_empty())
        );
        assert!(report.ok(), "both are optional");
    });
}
