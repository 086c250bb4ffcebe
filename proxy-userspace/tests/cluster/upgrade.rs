//! From one agent to the next while clients are served (SPEC L4, A13): of another map layout, of
//! the same build, with other settings, over pins that somebody has damaged. Needs root.

use std::{
    collections::BTreeMap,
    env, fs,
    net::SocketAddr,
    os::fd::AsFd,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use crate::web::{self, APP, NODE_PORT};
use shunt::datapath::bpf;
use shunt_common::layout::LAYOUT_VERSION;
use shunt_lab::{Agent, AgentOptions, Client, Conn, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

/// Maps that have another name in version 5: it and the present one.
const RENAMED: [(&str, &str); 11] = [
    ("new_flows4", "unconfirmed4"),
    ("new_flows6", "unconfirmed6"),
    ("waiting", "half_open"),
    ("collided", "shared_ports"),
    ("pod_ways4", "pod_routes4"),
    ("pod_ways6", "pod_routes6"),
    ("members4", "set_members4"),
    ("members6", "set_members6"),
    ("addresses4", "service_addrs4"),
    ("addresses6", "service_addrs6"),
    ("senders", "udp_peers"),
];

fn write(lab: &Lab, manifests: &Path) {
    let endpoints = web::slices(lab, &[("web-a", "node-a", ""), ("web-b", "node-b", "")]);
    web::write(
        manifests,
        "web.yaml",
        &[web::service(), endpoints].join("---\n"),
    );
}

/// What the node's programs are attached to.
fn links(agent: &Agent) -> Vec<(String, String)> {
    let status = agent.json(&["status"]).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let links = status["links"].as_array().unwrap();
    let mut links: Vec<_> = links
        .iter()
        .map(|link| {
            assert_eq!(link["attached"], true, "{link}");
            (text(&link["target"]), text(&link["program"]))
        })
        .collect();
    links.sort();
    links
}

/// Makes of pins of the present layout what an agent of another version would have left that has
/// the same maps.
fn as_version(root: &Path, version: u32) {
    let folder = |version: u32| root.join(format!("v{version}"));
    fs::rename(folder(LAYOUT_VERSION), folder(version)).unwrap();
}

/// First port and places a port of version 5, as its default is with the maps of these tests.
const SNAT_FIRST: u16 = 10_240;
const SNAT_WAYS: u32 = 2;

/// Writes a configuration that says so.
fn old_range(maps: &Path) {
    let path = maps.join("config");
    let from = bpf::open(&path).unwrap();
    let info = bpf::map::map_info(from.as_fd()).unwrap();
    let mut cursor = bpf::map::Cursor::default();
    let batch = bpf::map::lookup_batch_raw(from.as_fd(), &info, &mut cursor, 1).unwrap();
    let mut value = batch.values;
    value[8..10].copy_from_slice(&SNAT_FIRST.to_le_bytes());
    value[12..16].copy_from_slice(&SNAT_WAYS.to_le_bytes());
    let to = bpf::map::create(info.map_type, 4, value.len(), 1, info.map_flags).unwrap();
    bpf::map::update_raw(to.as_fd(), &info, &0u32.to_le_bytes(), &value, 0).unwrap();
    bpf::pin_over(to.as_fd(), &path).unwrap();
}

/// Makes of them what an agent of version 5 would have left: under other names, and with flows and
/// source ports whose state has 16 bits. These are copies, which the programs that run do not write
/// to.
fn as_version_5(root: &Path) {
    as_version(root, 5);
    let maps = root.join("v5/maps");
    for (old, new) in RENAMED {
        fs::rename(maps.join(new), maps.join(old)).unwrap();
    }
    old_range(&maps);
    // Its present parts, in their old order.
    let flow: &[(usize, usize)] = &[(0, 6), (8, 2), (12, 8), (6, 2), (20, 2), (24, 4)];
    // The last two are protocol and zero.
    let slot: &[(usize, usize)] = &[(0, 6), (16, 2), (8, 4), (20, 4), (26, 2), (24, 2), (12, 4)];
    for (name, addresses, parts) in [
        ("flows", 3, flow),
        ("new_flows", 3, flow),
        ("snat", 4, slot),
    ] {
        for (family, size) in [("4", 4), ("6", 16)] {
            let path = maps.join(format!("{name}{family}"));
            let from = bpf::open(&path).unwrap();
            let info = bpf::map::map_info(from.as_fd()).unwrap();
            let old = bpf::map::MapInfo {
                value_size: info.value_size - 8,
                ..info
            };
            let to = bpf::map::create(
                old.map_type,
                old.key_size as usize,
                old.value_size as usize,
                old.max_entries,
                old.map_flags,
            )
            .unwrap();
            let mut cursor = bpf::map::Cursor::default();
            let mut at_end = false;
            let mut way = BTreeMap::new();
            while !at_end {
                let batch =
                    bpf::map::lookup_batch_raw(from.as_fd(), &info, &mut cursor, 65_536).unwrap();
                let keys = batch.keys.chunks_exact(info.key_size as usize);
                for (key, value) in keys.zip(batch.values.chunks_exact(info.value_size as usize)) {
                    let (head, tail) = value.split_at(addresses * size);
                    let mut bytes = head.to_vec();
                    for &(at, length) in parts {
                        bytes.extend(&tail[at..at + length]);
                    }
                    let mut key = key.to_vec();
                    if name == "snat" {
                        // Where the port says.
                        let port = u16::from_le_bytes([tail[6], tail[7]]);
                        if port == 0 {
                            continue;
                        }
                        let place = u32::from(port - SNAT_FIRST) * SNAT_WAYS;
                        let other = way.entry(place).or_insert(place);
                        assert!(*other < place + SNAT_WAYS, "too many flows of one port");
                        key = other.to_le_bytes().to_vec();
                        *other += 1;
                    }
                    bpf::map::update_raw(to.as_fd(), &old, &key, &bytes, 0).unwrap();
                }
                at_end = batch.at_end;
            }
            bpf::pin_over(to.as_fd(), &path).unwrap();
        }
    }
}

/// Sets the flag when it goes out of scope, also by a panic.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Open {
    conn: Conn,
    server: String,
    what: String,
}

fn open(client: &Client, to: SocketAddr) -> Vec<Open> {
    let connected = Dial {
        connected: true,
        ..Dial::default()
    };
    [Proto::Tcp, Proto::Udp]
        .into_iter()
        .cycle()
        .take(8)
        .map(|proto| {
            let conn = client.open(proto, to, &connected).unwrap();
            conn.ask("first").unwrap();
            Open {
                server: conn.ask("second").unwrap().server,
                what: format!("{proto} {to} from {}", client.name()),
                conn,
            }
        })
        .collect()
}

/// Nodes with the Service `web` and clients.
struct Cluster {
    lab: Lab,
    options: AgentOptions,
    /// Nobody dials while it is set.
    pause: AtomicBool,
    _manifests: TempDir,
}

impl Cluster {
    fn new(xdp: &str) -> Self {
        let lab = Lab::new().unwrap();
        for (pod, node) in [("web-a", "node-a"), ("web-b", "node-b")] {
            lab.add_pod(&PodSpec::new(pod, node, &[Port::tcp(APP), Port::udp(APP)]))
                .unwrap();
        }
        for pod in ["hooked", "packets"] {
            lab.add_pod(&PodSpec::new(pod, "node-a", &[])).unwrap();
        }
        let manifests = TempDir::new().unwrap();
        write(&lab, manifests.path());
        let options = AgentOptions::manifests(manifests.path())
            .xdp(xdp)
            .args(&["--max-flows", "16384", "--max-snat", "40000"])
            .args(&["--snat-ports", "10240-29999"])
            .shunt(env!("CARGO_BIN_EXE_shunt"));
        Self {
            lab,
            options,
            pause: AtomicBool::new(false),
            _manifests: manifests,
        }
    }

    fn start(&self, node: &str) -> Agent {
        self.lab.start_agent(node, &self.options).unwrap()
    }

    /// Who dials what: through the socket hook, by packets of a pod, and from outside through a
    /// node port, in both families.
    fn ways(&self) -> Vec<(Client, SocketAddr)> {
        let mut ways = Vec::new();
        for (i, cluster_ip) in web::CLUSTER_IPS.into_iter().enumerate() {
            let to = SocketAddr::new(cluster_ip.parse().unwrap(), 80);
            let node = self.lab.node_ips("node-a").unwrap()[i];
            let client = |name, sockets| self.lab.client(name, sockets).unwrap();
            ways.push((client("hooked", Sockets::Hooked), to));
            ways.push((client("packets", Sockets::Unhooked), to));
            ways.push((
                client("client", Sockets::Unhooked),
                SocketAddr::new(node, NODE_PORT),
            ));
        }
        ways
    }

    /// Runs `restarts` while clients with open flows go on asking, and others dial all the time;
    /// `restarts` calls what it is given after each, which looks whether every open flow still has
    /// its backend.
    fn under_load(&self, restarts: impl FnOnce(&dyn Fn(&str))) {
        let ways = self.ways();
        let flows: Vec<Open> = ways
            .iter()
            .flat_map(|(client, to)| open(client, *to))
            .collect();
        let done = AtomicBool::new(false);
        let answered = AtomicU64::new(0);
        thread::scope(|scope| {
            for (client, to) in self.ways() {
                let (done, answered, pause) = (&done, &answered, &self.pause);
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        if pause.load(Ordering::Relaxed) {
                            thread::sleep(Duration::from_millis(3));
                            continue;
                        }
                        client
                            .tcp(to)
                            .unwrap_or_else(|error| panic!("{to} from {}: {error}", client.name()));
                        answered.fetch_add(1, Ordering::Relaxed);
                        // The agents need some of the machine too.
                        thread::sleep(Duration::from_millis(3));
                    }
                });
            }
            // A test that fails lets them go too.
            let _stop = Stop(&done);
            restarts(&|after| {
                for _ in 0..2 {
                    for Open { conn, server, what } in &flows {
                        let answer = conn.ask("again");
                        let answer =
                            answer.unwrap_or_else(|error| panic!("{what}, after {after}: {error}"));
                        assert_eq!(answer.server, *server, "{what}, after {after}");
                    }
                }
            });
            thread::sleep(Duration::from_secs(1));
        });
        let answered = answered.into_inner();
        assert!(answered > 500, "{answered} new connections were answered");
    }
}

/// Agents of this layout take over from ones of another: open flows keep their backends, new ones
/// are answered all the while, and nothing of the other layout is left. One node's is version 5, of
/// whose maps the programs that run know nothing, so nobody dials while these are replaced; the
/// other's shares all maps.
fn another_layout_is_taken_over_under_load(xdp: &str) {
    let cluster = Cluster::new(xdp);
    let mut agents = ["node-a", "node-b"].map(|node| cluster.start(node));
    cluster.under_load(|flows_go_on| {
        for (agent, version) in agents.iter_mut().zip([5, LAYOUT_VERSION + 1]) {
            thread::sleep(Duration::from_secs(1));
            let before = links(agent);
            let replaces = version == 5;
            cluster.pause.store(replaces, Ordering::Relaxed);
            if replaces {
                thread::sleep(Duration::from_millis(300));
            }
            agent.kill().unwrap();
            let root = agent.bpf_root().to_owned();
            if replaces {
                as_version_5(&root);
            } else {
                as_version(&root, version);
            }
            let folder = |version: u32| root.join(format!("v{version}"));
            let (ours, other) = (folder(LAYOUT_VERSION), folder(version));
            let told = agent.cli(&["services"]).unwrap();
            let told = String::from_utf8_lossy(&told.stderr).into_owned();
            let expected = format!(
                "have layout version {version} and this shunt reads version {LAYOUT_VERSION}"
            );
            assert!(
                told.contains(&expected) && told.lines().count() == 1,
                "{told}"
            );
            agent.restart().unwrap();
            let printed = agent.output();
            assert!(!printed.contains("cannot be read"), "{printed}");
            flows_go_on("the upgrade");
            cluster.pause.store(false, Ordering::Relaxed);
            assert!(ours.join("maps/flows4").exists() && !other.exists());
            assert_eq!(links(agent), before);
        }
    });
}

#[test]
fn another_layout_is_taken_over_under_load_with_xdp() {
    another_layout_is_taken_over_under_load("native");
}

#[test]
fn another_layout_is_taken_over_under_load_without_xdp() {
    another_layout_is_taken_over_under_load("off");
}

/// The real one: agents of the release before, whose binary `SHUNT_PREVIOUS` names.
#[test]
#[ignore = "long"]
fn the_release_before_is_taken_over_under_load() {
    let Ok(previous) = env::var("SHUNT_PREVIOUS") else {
        shunt_lab::skip!("SHUNT_PREVIOUS names no binary of the release before");
    };
    for xdp in ["off", "native"] {
        let mut cluster = Cluster::new(xdp);
        cluster.options = cluster.options.shunt(&previous);
        let mut agents = ["node-a", "node-b"].map(|node| cluster.start(node));
        cluster.under_load(|flows_go_on| {
            for agent in &mut agents {
                thread::sleep(Duration::from_secs(1));
                let before = links(agent);
                agent.kill().unwrap();
                agent.set_shunt(env!("CARGO_BIN_EXE_shunt"));
                agent.restart().unwrap();
                flows_go_on("the upgrade");
                assert_eq!(links(agent), before);
            }
        });
    }
}

/// An agent that is killed and started again takes its programs over where nothing has changed, and
/// loads them where something has. Whichever it does, no open flow and no new one notices.
#[test]
fn programs_are_taken_over_or_replaced_under_load() {
    let cluster = Cluster::new("native");
    // No traffic of its own: its device may be without programs for a while.
    cluster
        .lab
        .add_pod(&PodSpec::new("idle", "node-a", &[]))
        .unwrap();
    let _other = cluster.start("node-b");
    let mut agent = cluster.start("node-a");
    assert_eq!(taken_over(&agent), Some(false));
    let pins = agent.bpf_root().join(format!("v{LAYOUT_VERSION}"));
    let idle = format!("links/{}-tc_pod_in", cluster.lab.device("idle").unwrap());
    let remove = |pin: &str| fs::remove_file(pins.join(pin)).unwrap();
    type Meddle<'m> = &'m dyn Fn(&mut Agent);
    let steps: [(&str, Meddle<'_>, bool); 7] = [
        ("nothing has changed", &|_| (), true),
        (
            "another setting",
            &|agent| agent.set_option("--count-traffic", "on"),
            false,
        ),
        ("nothing has changed again", &|_| (), true),
        (
            "a program is not pinned",
            &|_| remove("progs/tc_pod_out"),
            false,
        ),
        (
            "another map for a fingerprint",
            &|_| fs::rename(pins.join("progs/start"), pins.join("progs/build")).unwrap(),
            false,
        ),
        ("a device's link is gone", &|_| remove(&idle), true),
        (
            "a cgroup's link is gone",
            &|_| remove("links/cgroup-sock_getpeer6"),
            true,
        ),
    ];
    cluster.under_load(|flows_go_on| {
        for (what, meddle, expected) in steps {
            thread::sleep(Duration::from_millis(300));
            let before = links(&agent);
            agent.kill().unwrap();
            meddle(&mut agent);
            agent.restart().unwrap();
            assert_eq!(taken_over(&agent), Some(expected), "{what}");
            let how = if expected { "taken over" } else { "loaded" };
            let ready = agent.ready_line();
            assert!(
                ready.ends_with(&format!("programs {how}")),
                "{what}: {ready}"
            );
            flows_go_on(what);
            assert_eq!(links(&agent), before, "{what}");
        }
    });
}

/// What `status` says of the last start.
fn taken_over(agent: &Agent) -> Option<bool> {
    let status = agent.json(&["status"]).unwrap();
    let start = &status["start"];
    let parts = [
        "settings", "maps", "programs", "readBack", "source", "services", "attach",
    ];
    let sum: f64 = parts
        .iter()
        .map(|part| start[*part].as_f64().unwrap())
        .sum();
    let took = start["took"].as_f64().unwrap();
    assert!(sum > 0.0 && sum <= took, "{start}");
    start["takenOver"].as_bool()
}

/// The first packet after the `ready:` line is answered, with no other sent before: by a connection
/// through the socket hook, by packets of a pod, and from outside through a node port.
#[test]
fn the_first_packet_after_ready_is_answered() {
    let cluster = Cluster::new("native");
    let ways = cluster.ways();
    let _other = cluster.start("node-b");
    let _agent = cluster.start("node-a");
    for (client, to) in &ways {
        // One datagram and no other, which nobody sends again.
        client
            .udp(*to)
            .unwrap_or_else(|error| panic!("UDP {to} from {}: {error}", client.name()));
        client
            .tcp(*to)
            .unwrap_or_else(|error| panic!("TCP {to} from {}: {error}", client.name()));
    }
}
