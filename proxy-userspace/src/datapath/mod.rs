//! The kernel's half: loading, pinning and attaching the BPF programs, and the devices and
//! addresses of this node.
//!
//! In the order of a start: [`lock`] makes this agent the only one on its `--bpf-root`, [`load`]
//! brings programs and maps in (maps that are pinned there are used again), then whoever fills the
//! maps does so, and only then [`attach`] puts the programs in the packets' way, on the devices
//! that [`devices`] finds. [`netns`] knows the node's own addresses.
//!
//! Everything is pinned, so it goes on without the agent, and `bpftool` sees it:
//!
//! ```text
//! <bpf-root>/v3/maps/frontends4         every map under its name
//!               progs/tc_node_in        every program under its name
//!               progs/build             what they were loaded from: see [`takeover`]
//!               progs/start             how long the agent's last start took: see [`start`]
//!               links/cgroup-sock_connect4
//!               links/eth0-tc_node_in   every link: <device>-<program>
//!               clsact/eth0-2-made      (kernels before 6.6) folders, as notes which clsact qdisc is shunt's own
//! ```
//!
//! A bpffs takes no dots in names: `eth0.100` is pinned as `eth0%2e100`.

use std::path::{Path, PathBuf};

use shunt_common::layout::{LAYOUT_VERSION, names};

pub mod attach;
pub mod bpf;
pub mod capability;
pub mod cgroup;
pub mod closed;
pub(crate) mod clsact;
pub mod conntrack;
pub mod device_watcher;
pub mod devices;
pub(crate) mod layer3;
pub(crate) mod left_out;
pub mod load;
pub mod local_ports;
pub mod lock;
pub mod maps;
pub mod netfilter;
pub(crate) mod netlink;
pub mod netns;
pub mod nftables;
pub mod object;
pub(crate) mod pods;
pub(crate) mod rtnl;
pub mod sockets;
pub mod start;
mod tail_calls;
pub(crate) mod takeover;
pub mod trace;
pub mod upgrade;
pub mod xdp;

use bpf::link::Hook;

/// All programs on devices.
pub(crate) fn device_programs() -> impl Iterator<Item = (&'static str, Hook)> {
    tc_programs().chain([(XDP_PROGRAM, Hook::Xdp)])
}

/// All tc programs.
pub(crate) fn tc_programs() -> impl Iterator<Item = (&'static str, Hook)> {
    [
        NODE_PROGRAMS,
        POD_PROGRAMS,
        LAYER3_NODE_PROGRAMS,
        LAYER3_POD_PROGRAMS,
    ]
    .into_iter()
    .flatten()
}

/// The socket programs, attached to the cgroup root.
pub const CGROUP_PROGRAMS: [(&str, Hook); 9] = [
    // First: what another one remembers of a socket, this one must forget.
    ("sock_release", Hook::SockRelease),
    ("sock_connect4", Hook::Connect4),
    ("sock_connect6", Hook::Connect6),
    ("sock_sendmsg4", Hook::Sendmsg4),
    ("sock_sendmsg6", Hook::Sendmsg6),
    ("sock_recvmsg4", Hook::Recvmsg4),
    ("sock_recvmsg6", Hook::Recvmsg6),
    ("sock_getpeer4", Hook::Getpeername4),
    ("sock_getpeer6", Hook::Getpeername6),
];
/// Of them, those that only show a socket's peer under the name that it was dialled by, or forget it.
pub(crate) const NAMING_PROGRAMS: [&str; 5] = [
    "sock_release",
    "sock_recvmsg4",
    "sock_recvmsg6",
    "sock_getpeer4",
    "sock_getpeer6",
];
/// The tc programs of node devices.
pub const NODE_PROGRAMS: [(&str, Hook); 2] = [
    ("tc_node_in", Hook::TcxIngress),
    ("tc_node_out", Hook::TcxEgress),
];
/// The tc programs of pod devices: ingress is what the pod sends, egress is what it gets.
pub const POD_PROGRAMS: [(&str, Hook); 2] = [
    ("tc_pod_in", Hook::TcxIngress),
    ("tc_pod_out", Hook::TcxEgress),
];
/// [`NODE_PROGRAMS`] for devices without a link-layer header: the same, loaded for these.
pub const LAYER3_NODE_PROGRAMS: [(&str, Hook); 2] = [
    ("tc_node_in_l3", Hook::TcxIngress),
    ("tc_node_out_l3", Hook::TcxEgress),
];
/// [`POD_PROGRAMS`] for devices without a link-layer header.
pub const LAYER3_POD_PROGRAMS: [(&str, Hook); 2] = [
    ("tc_pod_in_l3", Hook::TcxIngress),
    ("tc_pod_out_l3", Hook::TcxEgress),
];
/// The tc programs of the loopback device: what processes of the node send to its own addresses.
pub const LOOPBACK_PROGRAMS: [(&str, Hook); 1] = [("tc_node_out", Hook::TcxEgress)];
/// The tc programs that those on devices hand packets over to: what no open flow accounts for.
pub const TAIL_CALLED_PROGRAMS: [&str; 2] = ["tc_undecided", "tc_slow_path"];
/// [`TAIL_CALLED_PROGRAMS`] for devices without a link-layer header.
pub(crate) const LAYER3_TAIL_CALLED_PROGRAMS: [&str; 2] = ["tc_undecided_l3", "tc_slow_path_l3"];
/// The XDP program of node devices.
pub const XDP_PROGRAM: &str = "xdp_node";

/// Maps that hold nothing from one packet to the next. They are not pinned: another build may want
/// more of this memory, and none needs what is in it.
pub(crate) const RUN_MEMORY: [&str; 3] =
    [names::SCRATCH[0], names::SCRATCH[1], names::HOST_ROUTING];

/// The folders under a `--bpf-root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// The folders under `bpf_root`, whether they exist or not.
    pub fn new(bpf_root: &Path) -> Self {
        Self {
            root: bpf_root.to_owned(),
        }
    }

    /// The `--bpf-root` itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of this map layout.
    pub fn version(&self) -> PathBuf {
        self.root.join(format!("v{LAYOUT_VERSION}"))
    }

    /// The folder of maps.
    pub fn maps(&self) -> PathBuf {
        self.version().join("maps")
    }

    /// The folder of programs.
    pub fn programs(&self) -> PathBuf {
        self.version().join("progs")
    }

    /// The folder of links.
    pub fn links(&self) -> PathBuf {
        self.version().join("links")
    }

    /// The folder of notes about clsact qdiscs.
    pub fn clsact(&self) -> PathBuf {
        self.version().join("clsact")
    }

    /// Where a map is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Where a program is pinned.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    /// Where the map is pinned that says what the programs were loaded from.
    pub fn build(&self) -> PathBuf {
        self.programs().join("build")
    }

    /// Where the map is pinned that says how the agent's last start went.
    pub fn start(&self) -> PathBuf {
        self.programs().join("start")
    }

    /// Where the link of a program on a device is pinned.
    pub fn device_link(&self, device: &str, program: &str) -> PathBuf {
        self.links().join(format!("{}-{program}", escape(device)))
    }

    /// Where the link of a program on the cgroup root is pinned.
    ///
    /// A device with the name `cgroup` does not meet it: programs on devices have other names.
    pub fn cgroup_link(&self, program: &str) -> PathBuf {
        self.links().join(format!("cgroup-{program}"))
    }
}

/// A device's name as the name of a file on a bpffs, which keeps dots to itself.
pub(crate) fn escape(device: &str) -> String {
    device.replace('%', "%25").replace('.', "%2e")
}

/// The device's name of [`escape`].
pub(crate) fn unescape(name: &str) -> String {
    name.replace("%2e", ".").replace("%25", "%")
}

/// How many entries the maps take; per family where there is one map per family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// `--max-frontends`: entries of `frontends*`, `addresses*`, `services` and `source_ranges*`;
    /// every frontend has two, one per scope.
    pub frontends: u32,
    /// `--max-slots`: entries of `slots*`.
    pub slots: u32,
    /// `--max-backends`: entries of `backends` and `set_members*`.
    pub backends: u32,
    /// `--max-flows`: entries of `flows*`.
    pub flows: u32,
    /// `--max-new-flows`: entries of `unconfirmed*`.
    pub new_flows: u32,
    /// `--max-snat`: entries of `snat*`.
    pub snat: u32,
    /// `--max-affinity`: entries of `affinity*` and `new_affinity*`.
    pub affinity: u32,
    /// `--max-sockets`: entries of `sockets`.
    pub sockets: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            frontends: 65_536,
            slots: 524_288,
            backends: 131_072,
            flows: 524_288,
            new_flows: 65_536,
            snat: 262_144,
            affinity: 65_536,
            sockets: 131_072,
        }
    }
}

impl Capacities {
    /// The setting that sizes `map` and its value; `None` for maps of one size.
    pub fn of_map(&self, map: &str) -> Option<(&'static str, u32)> {
        let Self {
            frontends,
            slots,
            backends,
            flows,
            new_flows,
            snat,
            affinity,
            sockets,
        } = *self;
        [
            (&names::FRONTENDS[..], "--max-frontends", frontends),
            // An address and a Service have two frontends at least.
            (&names::SERVICE_ADDRS[..], "--max-frontends", frontends),
            (&[names::SERVICES][..], "--max-frontends", frontends),
            (&names::SLOTS[..], "--max-slots", slots),
            (
                &[names::BACKENDS, names::TRAFFIC][..],
                "--max-backends",
                backends,
            ),
            (&names::FLOWS[..], "--max-flows", flows),
            (&names::UNCONFIRMED[..], "--max-new-flows", new_flows),
            (&names::SNAT[..], "--max-snat", snat),
            (&names::AFFINITY[..], "--max-affinity", affinity),
            (&names::NEW_AFFINITY[..], "--max-affinity", affinity),
            (&[names::SOCKETS][..], "--max-sockets", sockets),
            // Entries exist for Services with affinity or source ranges only, and take no memory
            // before.
            (&names::SET_MEMBERS[..], "--max-backends", backends),
            (&names::SOURCE_RANGES[..], "--max-frontends", frontends),
        ]
        .into_iter()
        .find_map(|(maps, setting, value)| maps.contains(&map).then_some((setting, value)))
    }

    /// Takes over the size that `map` has; `services` and `source_ranges*` follow `frontends*`,
    /// `set_members*` follow `backends`, `new_affinity*` follow `affinity*`.
    fn set(&mut self, map: &str, entries: u32) {
        let fields = [
            (&names::FRONTENDS[..], &mut self.frontends),
            (&names::SLOTS[..], &mut self.slots),
            (&[names::BACKENDS][..], &mut self.backends),
            (&names::FLOWS[..], &mut self.flows),
            (&names::UNCONFIRMED[..], &mut self.new_flows),
            (&names::SNAT[..], &mut self.snat),
            (&names::AFFINITY[..], &mut self.affinity),
            (&[names::SOCKETS][..], &mut self.sockets),
        ];
        for (maps, field) in fields {
            if maps.contains(&map) {
                *field = entries;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_survive_the_bpffs() {
        for name in ["eth0", "eth0.100", "a%b", "x%2e.%25", "cali12-3"] {
            let file = escape(name);
            assert!(!file.contains('.'), "{file}");
            assert_eq!(unescape(&file), name);
        }
    }

    #[test]
    fn settings_name_their_maps() {
        let mut capacities = Capacities::default();
        assert_eq!(
            capacities.of_map("unconfirmed6"),
            Some(("--max-new-flows", 65_536))
        );
        assert_eq!(capacities.of_map("config"), None);
        capacities.set("unconfirmed6", 7);
        assert_eq!(capacities.new_flows, 7);
        assert_eq!(
            Capacities {
                new_flows: 65_536,
                ..capacities
            },
            Capacities::default()
        );
    }
}
