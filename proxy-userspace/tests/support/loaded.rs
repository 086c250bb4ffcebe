//! The programs loaded over maps of a test's own, and run by `BPF_PROG_TEST_RUN`.

use std::{
    cell::RefCell,
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use shunt::{
    datapath::{
        Capacities,
        load::{Datapath, LoadConfig, SocketLb, load},
        maps::Maps,
    },
    object::{ObjectName, Protocol},
    plan::{
        Backend, Frontend, FrontendAddress, FrontendId, FrontendKind, Scope, ServicePlan, Table,
    },
    sync::{
        Syncer,
        node::{self, NodeSettings},
    },
};
use shunt_common::layout::FRONTEND_AFFINITY;
use shunt_lab::UniqueName;

/// A client outside of the cluster.
pub(crate) const CLIENT: [&str; 2] = ["203.0.113.10", "2001:db8:113::10"];
/// This node, which translated packets come from.
pub(crate) const NODE: [&str; 2] = ["192.168.50.11", "fd50::11"];
/// A Service with one backend on this node.
pub(crate) const WEB: [&str; 2] = ["10.96.0.1", "fd96::1"];
/// A Service with one backend on another node.
pub(crate) const FAR: [&str; 2] = ["10.96.0.2", "fd96::2"];
/// A Service with session affinity, see [`Loaded::serve_kept`].
pub(crate) const KEPT: [&str; 2] = ["10.96.0.3", "fd96::3"];
/// A Service with nobody behind it.
pub(crate) const EMPTY: [&str; 2] = ["10.96.0.9", "fd96::9"];
/// The backend of [`WEB`].
pub(crate) const BACKEND: [&str; 2] = ["10.44.0.7", "fd44::7"];
/// The backend of [`FAR`].
pub(crate) const REMOTE: [&str; 2] = ["10.44.1.7", "fd44:0:0:b::7"];

/// Index of the loopback device.
pub(crate) const LOOPBACK: u32 = 1;
/// Words of `struct __sk_buff` that the tests say something in, and where.
const SK_BUFF: usize = 11;
const INGRESS_IFINDEX: usize = 9;
const IFINDEX: usize = 10;

const TC_ACT_SHOT: u32 = 2;
const TC_ACT_REDIRECT: u32 = 7;

/// The programs in a folder of this test's own.
pub(crate) struct Loaded {
    /// There but while another load replaces it, which needs its lock.
    datapath: Option<Datapath>,
    config: LoadConfig,
    syncer: RefCell<Syncer>,
    /// Where everything is pinned.
    pub(crate) root: PathBuf,
    /// Index of a device that leads out.
    device: u32,
    /// Last: its pins go with it.
    _unique: UniqueName,
}

impl Loaded {
    pub(crate) fn new(name: &str) -> Self {
        Self::with(name, |_| ())
    }

    /// The same with other settings.
    pub(crate) fn with(name: &str, set: impl FnOnce(&mut LoadConfig)) -> Self {
        // In a namespace without routes, for programs ask those of the calling thread's.
        // SAFETY: nothing else runs in this thread that a new network namespace could surprise.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let unique = UniqueName::take().unwrap();
        let root = unique.bpf_root(name);
        let capacities = Capacities {
            flows: 1024,
            new_flows: 1024,
            snat: 20_000,
            affinity: 1024,
            ..Capacities::default()
        };
        let mut config = LoadConfig {
            bpf_root: root.clone(),
            capacities,
            socket_lb: SocketLb::Off,
            xdp: true,
            fast_path: false,
            count_traffic: false,
        };
        set(&mut config);
        let datapath = load(&config).unwrap();
        let maps = Arc::new(Maps::open(&root).unwrap());
        let settings = NodeSettings {
            addresses: NODE.map(|address| address.parse().unwrap()).into(),
            cluster_cidrs: Vec::new(),
            service_cidrs: ["10.96.0.0/16", "fd96::/112"]
                .map(|net| net.parse().unwrap())
                .into(),
            answer_ping: true,
            retry_silence: std::time::Duration::ZERO,
            snat_ports: 10_240..=29_999,
            local_ports: 32_768..=60_999,
            timeouts: Default::default(),
            loopback: [false; 2],
            host_netns: 0,
            sockets_of_node: false,
            pods_left_out: false,
        };
        maps.set_config(&node::config(&settings, 20_000).unwrap())
            .unwrap();
        let loaded = Self {
            datapath: Some(datapath),
            config,
            syncer: RefCell::new(Syncer::new(maps).unwrap()),
            root,
            device: add_device(),
            _unique: unique,
        };
        loaded.serve(true);
        loaded.serve_kept(1);
        loaded
    }

    /// The loaded programs by name.
    pub(crate) fn programs(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        self.datapath().programs()
    }

    fn datapath(&self) -> &Datapath {
        self.datapath.as_ref().unwrap()
    }

    /// Loads the programs anew with other settings, over the same maps; one of those that there were.
    pub(crate) fn load_again(
        &mut self,
        program: &str,
        set: impl FnOnce(&mut LoadConfig),
    ) -> OwnedFd {
        let before = self.datapath().program(program).unwrap();
        let before = before.try_clone_to_owned().unwrap();
        set(&mut self.config);
        drop(self.datapath.take());
        let datapath = load(&self.config).unwrap();
        assert!(!datapath.taken_over());
        self.datapath = Some(datapath);
        before
    }

    /// Puts [`BACKEND`] behind [`WEB`], or [`REMOTE`] in its place.
    pub(crate) fn serve(&self, local: bool) {
        let mut frontends = Vec::new();
        for v6 in [0, 1] {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                for scope in [Scope::Internal, Scope::External] {
                    let web = if local { BACKEND } else { REMOTE };
                    frontends.push(frontend(WEB[v6], protocol, scope, Some((web[v6], local))));
                    frontends.push(frontend(
                        FAR[v6],
                        protocol,
                        scope,
                        Some((REMOTE[v6], false)),
                    ));
                    frontends.push(frontend(EMPTY[v6], protocol, scope, None));
                }
            }
        }
        frontends.sort_by_key(|frontend| frontend.id);
        let plan = ServicePlan {
            frontends,
            ..ServicePlan::empty(ObjectName::new("default", "web"))
        };
        self.syncer.borrow_mut().apply(&plan).unwrap();
    }

    /// Brings a Service of a test's own in.
    pub(crate) fn apply(&self, plan: &ServicePlan) {
        self.syncer.borrow_mut().apply(plan).unwrap();
    }

    /// Puts so many backends behind [`KEPT`], at [`kept_backend`].
    pub(crate) fn serve_kept(&self, backends: u8) {
        let mut frontends = Vec::new();
        for v6 in [0, 1] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                for scope in [Scope::Internal, Scope::External] {
                    let backend = |n| Backend {
                        address: kept_backend(v6 == 1, n).parse().unwrap(),
                        port: 8080,
                        local: true,
                    };
                    frontends.push(Frontend {
                        backends: (1..=backends).map(backend).collect::<Vec<_>>().into(),
                        flags: FRONTEND_AFFINITY,
                        affinity_secs: 10_800,
                        ..frontend(KEPT[v6], protocol, scope, None)
                    });
                }
            }
        }
        frontends.sort_by_key(|frontend| frontend.id);
        let plan = ServicePlan {
            frontends,
            ..ServicePlan::empty(ObjectName::new("default", "kept"))
        };
        self.syncer.borrow_mut().apply(&plan).unwrap();
    }

    /// Runs a program once: its verdict, and the packet as it is then.
    pub(crate) fn run(&self, program: &str, packet: &[u8]) -> (u32, Vec<u8>) {
        // Without a device that it came in by, a process of this node would have sent it.
        self.run_from(LOOPBACK, program, packet)
    }

    /// The same of a packet that a process of this node sends.
    pub(crate) fn run_sent(&self, program: &str, packet: &[u8]) -> (u32, Vec<u8>) {
        self.run_from(0, program, packet)
    }

    fn run_from(&self, came_in: u32, program: &str, packet: &[u8]) -> (u32, Vec<u8>) {
        let fd = self.datapath().program(program).unwrap();
        self.run_program(fd, came_in, program, packet)
    }

    /// Runs the program `fd` as the one of this name, on a packet that the device `came_in` has got.
    pub(crate) fn run_program(
        &self,
        fd: BorrowedFd<'_>,
        came_in: u32,
        program: &str,
        packet: &[u8],
    ) -> (u32, Vec<u8>) {
        let device = if program.ends_with("_out") {
            self.device
        } else {
            LOOPBACK
        };
        let mut context = [0; SK_BUFF];
        context[INGRESS_IFINDEX] = came_in;
        context[IFINDEX] = device;
        let context = if program.starts_with("tc_") {
            &context[..]
        } else {
            &[]
        };
        if program.starts_with("tc_") {
            match test_run(fd, packet, true, context) {
                Ok(result) => return result,
                // What is sent back, or dropped: nobody looks at its sum any more.
                Err(error) if error.raw_os_error() == Some(libc::EBADMSG) => {
                    let result = test_run(fd, packet, false, context).unwrap();
                    assert!(
                        [TC_ACT_REDIRECT, TC_ACT_SHOT].contains(&result.0),
                        "{program}: {error}: {packet:02x?}"
                    );
                    return result;
                }
                // Kernels that cannot do it.
                Err(error) => assert_eq!(
                    error.raw_os_error(),
                    Some(libc::EINVAL),
                    "{program}: {error}"
                ),
            }
        }
        test_run(fd, packet, false, context).unwrap()
    }
}

/// A backend of [`KEPT`], from 1 on.
pub(crate) fn kept_backend(v6: bool, n: u8) -> String {
    if v6 {
        format!("fd44::{n:x}00")
    } else {
        format!("10.44.0.{}", 100 + n)
    }
}

/// Port 80 of an address, with its backend and whether that is on this node.
pub(crate) fn frontend(
    address: &str,
    protocol: Protocol,
    scope: Scope,
    backend: Option<(&str, bool)>,
) -> Frontend {
    let backends: Vec<_> = backend
        .map(|(address, local)| Backend {
            address: address.parse().unwrap(),
            port: 8080,
            local,
        })
        .into_iter()
        .collect();
    Frontend {
        id: FrontendId {
            address: FrontendAddress::Ip(address.parse().unwrap()),
            port: 80,
            protocol,
            scope,
        },
        kind: FrontendKind::ClusterIp,
        port_name: "".into(),
        port_index: protocol as usize,
        backends: backends.into(),
        table: Table::Direct,
        flags: 0,
        affinity_secs: 0,
        set: 0,
    }
}

/// Makes a device in the calling thread's namespace; its index.
fn add_device() -> u32 {
    const SIOCBRADDBR: libc::Ioctl = 0x89a0;
    let name = c"out0";
    // SAFETY: the calls read a name that ends with zero.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        assert_eq!(
            libc::ioctl(socket, SIOCBRADDBR, name.as_ptr()),
            0,
            "{}",
            io::Error::last_os_error()
        );
        libc::close(socket);
        libc::if_nametoindex(name.as_ptr())
    }
}

/// `union bpf_attr` of `BPF_PROG_TEST_RUN`, as far as it is used here.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size: u64,
    ctx: [u64; 2],
    flags: u32,
    rest: [u32; 3],
}

/// A packet whose sum a device has computed (`CHECKSUM_COMPLETE`), at tc: the kernel says `EBADMSG`
/// when the sum is not the packet's any more afterwards.
fn test_run(
    program: BorrowedFd<'_>,
    packet: &[u8],
    summed: bool,
    context: &[u32],
) -> io::Result<(u32, Vec<u8>)> {
    const BPF_F_TEST_SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;
    const BPF_PROG_TEST_RUN: libc::c_int = 10;
    let mut out = vec![0; 4096];
    let mut attr = TestRun {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        ctx_size: size_of_val(context) as u64,
        ctx: [
            if context.is_empty() {
                0
            } else {
                context.as_ptr() as u64
            },
            0,
        ],
        flags: if summed {
            BPF_F_TEST_SKB_CHECKSUM_COMPLETE
        } else {
            0
        },
        ..TestRun::default()
    };
    // SAFETY: the attribute names buffers that live until the call returns, with their sizes.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_TEST_RUN,
            &raw mut attr,
            size_of::<TestRun>(),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    out.truncate(attr.data_size_out as usize);
    Ok((attr.retval, out))
}
