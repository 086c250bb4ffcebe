//! Where it is measured: a node in a namespace, shunt's programs loaded, Services in the maps and
//! flows open.

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use shunt::{
    datapath::{
        Capacities, bpf,
        load::{self, Datapath, LoadConfig, SocketLb},
        maps::Maps,
        object,
        start::Stopwatch,
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
use shunt_common::{
    family::{Family, V4, V6},
    filter,
    layout::{
        CLIENT_WORDS, Config, FLOW_BACKEND_FIN, FLOW_CLIENT_FIN, FLOW_LOCAL_BACKEND,
        FLOW_LOCAL_CLIENT, FLOW_SEEN_REPLY, FLOW_SNAT, Flow, FlowKey, Octets, SnatSlot, TCP,
        TICK_NS, names,
    },
    snat,
};
use shunt_lab::Lab;

/// Open flows that there are of each kind.
pub(crate) const FLOWS: u32 = 65_536;
/// Backends of the Service that is measured: as many as SNAT needs for so many flows.
const BACKENDS: u8 = 16;
/// Backends of every other Service.
const OTHER_BACKENDS: u8 = 10;
/// SNAT slots; with the default range 13 to a port.
const SNAT_SLOTS: u32 = 262_144;

/// Client port of flows through the node port to another node.
pub(crate) const TO_REMOTE: u16 = 40_000;
/// Client port of flows through the node port to a pod on this node.
pub(crate) const TO_LOCAL: u16 = 40_001;
/// Client port of flows to the ClusterIP.
pub(crate) const TO_CLUSTER_IP: u16 = 40_002;

/// The ClusterIP that is measured, port 80.
pub(crate) const CLUSTER_IP: [&str; 2] = ["10.96.0.1", "fd96::1"];
/// Node ports with backends on another node, and on this one.
pub(crate) const REMOTE_PORT: u16 = 30_080;
pub(crate) const LOCAL_PORT: u16 = 30_081;
/// First client, to whose last 32 bits the flow's number is added.
pub(crate) const CLIENT: [&str; 2] = ["198.18.0.0", "2001:db8:113::c612:0"];
pub(crate) const BACKEND_PORT: u16 = 8080;

/// Everything that is measured with; removed when dropped.
pub(crate) struct World {
    pub(crate) datapath: Datapath,
    syncer: Syncer,
    config: Config,
    pub(crate) node: [IpAddr; 2],
}

fn ip(text: &str) -> IpAddr {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Backend number `n` on this node (`local`) or another.
pub(crate) fn backend(v6: bool, local: bool, n: u8) -> IpAddr {
    let node = u8::from(!local);
    if v6 {
        ip(&format!("fd44:0:0:{:x}::{:x}", 0xa + node, 0x10 + n))
    } else {
        ip(&format!("10.44.{node}.{}", 0x10 + n))
    }
}

/// The settings of a node with these addresses, as they are by default.
pub(crate) fn node_settings(addresses: &[IpAddr]) -> NodeSettings {
    NodeSettings {
        addresses: addresses.to_vec(),
        cluster_cidrs: Vec::new(),
        service_cidrs: Vec::new(),
        answer_ping: true,
        retry_silence: Duration::from_secs(1),
        snat_ports: 1024..=65_535,
        local_ports: 32_768..=60_999,
        timeouts: Default::default(),
        loopback: [false; 2],
        host_netns: 0,
        sockets_of_node: false,
        pods_left_out: false,
    }
}

fn node_port(v6: bool) -> FrontendAddress {
    if v6 {
        FrontendAddress::NodePortV6
    } else {
        FrontendAddress::NodePortV4
    }
}

fn frontends(
    address: FrontendAddress,
    protocol: Protocol,
    port: u16,
    backends: Vec<Backend>,
) -> [Frontend; 2] {
    [Scope::Internal, Scope::External].map(|scope| Frontend {
        id: FrontendId {
            address,
            port,
            protocol,
            scope,
        },
        kind: FrontendKind::ClusterIp,
        port_name: "".into(),
        port_index: usize::from(protocol == Protocol::Udp),
        backends: backends.clone().into(),
        table: Table::Direct,
        flags: 0,
        affinity_secs: 0,
        set: 0,
    })
}

fn backends(v6: bool, local: bool, count: u8) -> Vec<Backend> {
    (0..count)
        .map(|n| Backend {
            address: backend(v6, local, n),
            port: BACKEND_PORT,
            local,
        })
        .collect()
}

fn plan(name: String, mut frontends: Vec<Frontend>) -> ServicePlan {
    frontends.sort_by_key(|frontend| frontend.id);
    ServicePlan {
        frontends,
        ..ServicePlan::empty(ObjectName::new("bench", &name))
    }
}

impl World {
    /// Loads the programs for `lab`'s first node with room for `services` Services. Runs in the
    /// node's namespace.
    pub(crate) fn new(lab: &Lab, services: u32) -> Result<Self> {
        Self::load(lab, &services.to_string(), services, object::object())
    }

    /// The same with the programs of another build, pinned under a name of their own.
    pub(crate) fn of_object(lab: &Lab, name: &str, object: &[u8]) -> Result<Self> {
        Self::load(lab, name, 1, object)
    }

    fn load(lab: &Lab, name: &str, services: u32, object: &[u8]) -> Result<Self> {
        let defaults = Capacities::default();
        let capacities = Capacities {
            frontends: defaults.frontends.max(services * 4),
            slots: defaults.slots.max(services * 32),
            backends: defaults.backends.max(services * 24),
            snat: SNAT_SLOTS,
            ..defaults
        };
        let bpf_root = lab.bpf_root(&format!("node-a-{name}"));
        let config = LoadConfig {
            bpf_root: bpf_root.clone(),
            capacities,
            socket_lb: SocketLb::On,
            xdp: true,
            fast_path: false,
            count_traffic: false,
        };
        let datapath = load::load_object(&config, object, &mut Stopwatch::start())?;
        let maps = Arc::new(Maps::open(&bpf_root)?);
        let node = lab.node_ips("node-a")?;
        let settings = node_settings(&node);
        let config = node::config(&settings, SNAT_SLOTS)?;
        maps.set_config(&config)?;
        node::set_addresses(&maps, &node.into_iter().collect())?;
        let mut syncer = Syncer::new(maps)?;
        let mut all = Vec::new();
        for v6 in [false, true] {
            all.extend(frontends(
                node_port(v6),
                Protocol::Tcp,
                REMOTE_PORT,
                backends(v6, false, BACKENDS),
            ));
            let cluster_ip = FrontendAddress::Ip(ip(CLUSTER_IP[usize::from(v6)]));
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                all.extend(frontends(
                    cluster_ip,
                    protocol,
                    80,
                    backends(v6, false, BACKENDS),
                ));
            }
        }
        syncer.apply(&plan("remote".to_owned(), all))?;
        let mut all = Vec::new();
        for v6 in [false, true] {
            all.extend(frontends(
                node_port(v6),
                Protocol::Tcp,
                LOCAL_PORT,
                backends(v6, true, BACKENDS),
            ));
        }
        syncer.apply(&plan("local".to_owned(), all))?;
        let mut world = Self {
            datapath,
            syncer,
            config,
            node,
        };
        world.grow(services)?;
        Ok(world)
    }

    /// Adds Services until there are `services`, with one ClusterIP and [`OTHER_BACKENDS`] backends
    /// in each family.
    fn grow(&mut self, services: u32) -> Result<()> {
        for n in 1..services {
            let [_, a, b, c] = n.to_be_bytes();
            let mut all = Vec::new();
            for v6 in [false, true] {
                let address = if v6 {
                    format!("fd97::{:x}:{:x}", n >> 16, n & 0xffff)
                } else {
                    format!("10.{}.{b}.{c}", 97 + a)
                };
                let backends = (0..OTHER_BACKENDS)
                    .map(|i| Backend {
                        address: if v6 {
                            ip(&format!("fd45::{:x}:{:x}:{i:x}", n >> 16, n & 0xffff))
                        } else {
                            ip(&format!("10.{}.{b}.{c}", 128 + a + 8 * i))
                        },
                        port: BACKEND_PORT,
                        local: false,
                    })
                    .collect();
                all.extend(frontends(
                    FrontendAddress::Ip(ip(&address)),
                    Protocol::Tcp,
                    80,
                    backends,
                ));
            }
            self.syncer.apply(&plan(format!("other-{n}"), all))?;
        }
        Ok(())
    }

    /// Opens [`FLOWS`] flows of each kind.
    pub(crate) fn open_flows(&self) -> Result<()> {
        let mut clients = vec![0u64; CLIENT_WORDS];
        self.open::<V4>(false, &mut clients)?;
        self.open::<V6>(true, &mut clients)?;
        let indices: Vec<u32> = (0..).take(CLIENT_WORDS).collect();
        let map = bpf::open(&self.datapath.paths().map(names::CLIENTS))?;
        bpf::map::update_batch(std::os::fd::AsFd::as_fd(&map), &indices, &clients)
            .map_err(|(error, _)| error)
            .context("clients")
    }

    /// Backend and source port of each flow through SNAT: no two in one slot.
    pub(crate) fn places<F: Maplike>(&self, v6: bool) -> Vec<(u8, u16)> {
        let each = FLOWS / u32::from(BACKENDS);
        let mut taken = std::collections::HashSet::new();
        (0..u32::from(BACKENDS))
            .flat_map(|which| {
                let backend = F::words(F::octets(backend(v6, false, which as u8)));
                let place =
                    |port| snat::places::<F>(&self.config, port, backend, BACKEND_PORT, TCP)[0];
                let ports: Vec<_> = (self.config.snat_first..=u16::MAX)
                    .filter(|&port| taken.insert(place(port)))
                    .take(each as usize)
                    .map(|port| (which as u8, port))
                    .collect();
                assert_eq!(ports.len(), each as usize, "too many backends share places");
                ports
            })
            .collect()
    }

    /// Source port of the first flow through SNAT.
    pub(crate) fn first_port(&self) -> u16 {
        self.config.snat_first
    }

    fn open<F: Maplike>(&self, v6: bool, clients: &mut [u64]) -> Result<()> {
        let now = now();
        let (mut keys, mut flows) = (Vec::new(), Vec::new());
        let (mut indices, mut slots) = (Vec::new(), Vec::new());
        let i = usize::from(v6);
        for (n, (which, snat_port)) in (0..FLOWS).zip(self.places::<F>(v6)) {
            let client = F::octets(plus(ip(CLIENT[i]), n));
            for (port, frontend, frontend_port, local) in [
                (TO_REMOTE, self.node[i], REMOTE_PORT, false),
                (TO_LOCAL, self.node[i], LOCAL_PORT, true),
                (TO_CLUSTER_IP, ip(CLUSTER_IP[i]), 80, false),
            ] {
                let snat = port == TO_REMOTE;
                // Replies of flows without SNAT differ in their client only.
                let backend = F::octets(backend(v6, local, if snat { which } else { 0 }));
                let mut state = FLOW_SEEN_REPLY;
                if snat {
                    state |= FLOW_SNAT;
                }
                if local {
                    state |= FLOW_LOCAL_BACKEND;
                }
                if port == TO_CLUSTER_IP {
                    state |= FLOW_LOCAL_CLIENT;
                }
                keys.push(FlowKey {
                    client,
                    frontend: F::bytes(F::UNSPECIFIED),
                    client_port: port,
                    frontend_port: 0,
                    proto: TCP,
                    reserved: 0,
                    reserved2: 0,
                });
                let flow = Flow {
                    frontend: F::octets(frontend),
                    backend,
                    snat: if snat {
                        F::octets(self.node[i])
                    } else {
                        client
                    },
                    frontend_port,
                    backend_port: BACKEND_PORT,
                    snat_port: if snat { snat_port } else { port },
                    state,
                    backend_id: 0,
                    last_seen: now,
                    epoch: 0,
                    unanswered_since: 0,
                    reserved: 0,
                    tried: 0,
                    reserved2: 0,
                };
                if snat {
                    let [place, _] = snat::places::<F>(
                        &self.config,
                        snat_port,
                        F::words(backend),
                        BACKEND_PORT,
                        TCP,
                    );
                    indices.push(place);
                    for addr in [client, flow.snat] {
                        let bit = filter::translated::<F>(F::words(addr));
                        let (word, mask) = filter::word_and_mask(bit);
                        clients[word as usize] |= mask;
                    }
                    slots.push(SnatSlot {
                        client,
                        frontend: flow.frontend,
                        backend,
                        snat: flow.snat,
                        client_port: port,
                        frontend_port,
                        backend_port: BACKEND_PORT,
                        snat_port,
                        last_seen: now,
                        owner: 0,
                        state,
                        backend_id: 0,
                        epoch: 0,
                        proto: TCP,
                        reserved: 0,
                        reserved2: 0,
                    });
                }
                flows.push(flow);
            }
        }
        for key in &keys {
            let (word, mask) = filter::word_and_mask(filter::client::<F>(F::words(key.client)));
            clients[word as usize] |= mask;
        }
        let paths = self.datapath.paths();
        let suffix = if v6 { "6" } else { "4" };
        let map = bpf::open(&paths.map(&format!("flows{suffix}")))?;
        bpf::map::update_batch(std::os::fd::AsFd::as_fd(&map), &keys, &flows)
            .map_err(|(error, _)| error)
            .context("flows")?;
        let map = bpf::open(&paths.map(&format!("snat{suffix}")))?;
        bpf::map::update_batch(std::os::fd::AsFd::as_fd(&map), &indices, &slots)
            .map_err(|(error, _)| error)
            .context("snat")
    }

    /// Makes every source port that is not of an open flow look used long ago, as on a node that
    /// has run for a day.
    pub(crate) fn age_snat<F: Maplike>(&self, v6: bool) -> Result<()> {
        let zero = F::bytes(F::UNSPECIFIED);
        let old = SnatSlot {
            client: zero,
            frontend: zero,
            backend: zero,
            snat: zero,
            client_port: 1,
            frontend_port: 1,
            backend_port: 1,
            snat_port: 1,
            last_seen: 1,
            owner: 0,
            state: FLOW_SEEN_REPLY | FLOW_CLIENT_FIN | FLOW_BACKEND_FIN,
            backend_id: 0,
            epoch: 0,
            proto: TCP,
            reserved: 0,
            reserved2: 0,
        };
        let map = bpf::open(
            &self
                .datapath
                .paths()
                .map(if v6 { "snat6" } else { "snat4" }),
        )?;
        let keys: Vec<u32> = (0..SNAT_SLOTS).collect();
        let values = vec![old; keys.len()];
        bpf::map::update_batch(std::os::fd::AsFd::as_fd(&map), &keys, &values)
            .map_err(|(error, _)| error)
            .context("snat")
    }
}

/// `CLOCK_MONOTONIC` in ticks.
fn now() -> u32 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    ((time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64) / TICK_NS) as u32
}

/// An address a number further on.
pub(crate) fn plus(address: IpAddr, n: u32) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4((u32::from(address) + n).into()),
        IpAddr::V6(address) => IpAddr::V6((u128::from(address) + u128::from(n)).into()),
    }
}

/// A family whose addresses come from [`IpAddr`].
pub(crate) trait Maplike: Family<Addr: Octets> {
    /// The bytes of an address of the family.
    fn octets(address: IpAddr) -> Self::Addr;
}

impl Maplike for V4 {
    fn octets(address: IpAddr) -> [u8; 4] {
        match address {
            IpAddr::V4(address) => address.octets(),
            IpAddr::V6(address) => panic!("{address} is not an IPv4 address"),
        }
    }
}

impl Maplike for V6 {
    fn octets(address: IpAddr) -> [u8; 16] {
        match address {
            IpAddr::V6(address) => address.octets(),
            IpAddr::V4(address) => panic!("{address} is not an IPv6 address"),
        }
    }
}
