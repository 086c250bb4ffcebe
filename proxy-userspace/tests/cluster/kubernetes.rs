//! Two agents as two nodes that follow a Kubernetes API server, with real traffic (SPEC S1, L5).
//! Needs root.
//!
//! The server is the one of `xtask/apiserver`, which misbehaves on demand. When `KUBECONFIG` is
//! set, it is the server that this file names instead (`KUBECONFIG=… cargo test -p shunt --test
//! cluster kubernetes::`), and what needs misbehaviour is skipped. It should be a cluster to play
//! with: Nodes `node-a` and `node-b` and a Service `default/shunt-test-web` are made there, and
//! deleted at the end. A cluster that is just there with nothing in it is `cargo run -p
//! shunt-apiserver`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use shunt_apiserver::{ApiServer, Gone, Kind, Refusal, Relay, Streaming};
use shunt_lab::{Agent, AgentOptions, Client, Dial, Lab, PodSpec, Port, Proto, Sockets};

const APP: u16 = 8080;
const NODE_PORT: u16 = 30080;
const WEB: &str = "shunt-test-web";
/// The fabric, as seen from the nodes.
const SERVER: &str = "192.168.50.1:6443";
/// Longest wait for something that should come at once, or after some attempts.
const PATIENCE: Duration = Duration::from_secs(45);
/// What an endpoint gets between being taken out and going away, as a preStop hook or a slow end
/// gives it.
const LEAVE: Duration = Duration::from_millis(700);
/// Between dials: the agents and the server need some of the machine too.
const PACE: Duration = Duration::from_millis(3);
/// How long the server is away for the long test; longer than the longest pause between two
/// attempts.
const MINUTE: Duration = Duration::from_secs(60);

/// One at a time: they share the machine's two cores, and a real server.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The API server: ours, or a real one.
enum Api {
    Ours(ApiServer),
    Real {
        relay: Relay,
        runtime: tokio::runtime::Runtime,
        client: kube::Client,
    },
}

impl Api {
    fn start(lab: &Lab) -> Self {
        let address: SocketAddr = SERVER.parse().unwrap();
        let fabric = lab.ns("fabric").unwrap();
        let bind = move || fabric.run(|| TcpListener::bind(address));
        let Some(kubeconfig) = std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty())
        else {
            return Self::Ours(ApiServer::start_with(address, bind).unwrap());
        };
        let kubeconfig = PathBuf::from(kubeconfig);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let client = runtime.block_on(async {
            let config = kube::config::Kubeconfig::read_from(&kubeconfig).unwrap();
            let current = kube::config::KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(config, &current)
                .await
                .unwrap();
            kube::Client::try_from(config).unwrap()
        });
        Self::Real {
            relay: Relay::start(&kubeconfig, bind().unwrap()).unwrap(),
            runtime,
            client,
        }
    }

    /// Ours, for what a real server does not do when asked.
    fn ours(&self) -> Option<&ApiServer> {
        match self {
            Self::Ours(server) => Some(server),
            Self::Real { .. } => None,
        }
    }

    fn kubeconfig(&self) -> PathBuf {
        match self {
            Self::Ours(server) => server.kubeconfig(),
            Self::Real { relay, .. } => relay.kubeconfig(),
        }
    }

    fn away(&self, away: bool) {
        match (self, away) {
            (Self::Ours(server), true) => server.close().unwrap(),
            (Self::Ours(server), false) => server.open().unwrap(),
            (Self::Real { relay, .. }, true) => relay.close(),
            (Self::Real { relay, .. }, false) => relay.open(),
        }
    }

    fn path(object: &Value) -> String {
        let kind = Kind::of(object).unwrap();
        let (api, plural) = match kind.api_version() {
            "v1" => ("api/v1".to_owned(), kind.plural()),
            group => (format!("apis/{group}"), kind.plural()),
        };
        let name = object["metadata"]["name"].as_str().unwrap();
        match kind {
            Kind::Nodes => format!("/{api}/{plural}/{name}"),
            _ => format!("/{api}/namespaces/default/{plural}/{name}"),
        }
    }

    fn request(&self, method: &str, path: &str, body: &Value) -> Value {
        let Self::Real {
            runtime, client, ..
        } = self
        else {
            unreachable!("ours is changed directly")
        };
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", "application/apply-patch+yaml")
            .body(if body.is_null() {
                Vec::new()
            } else {
                body.to_string().into()
            })
            .unwrap();
        runtime
            .block_on(client.request(request))
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    fn apply(&self, object: Value) {
        match self {
            Self::Ours(server) => server.apply(object),
            Self::Real { .. } => {
                let path = Self::path(&object);
                let query = "fieldManager=shunt-test&force=true";
                self.request("PATCH", &format!("{path}?{query}"), &object);
                if !object["status"].is_null() {
                    self.request("PATCH", &format!("{path}/status?{query}"), &object);
                }
            }
        }
    }

    fn get(&self, object: &Value) -> Value {
        match self {
            Self::Ours(server) => {
                let namespace = if object["kind"] == "Node" {
                    ""
                } else {
                    "default"
                };
                let name = object["metadata"]["name"].as_str().unwrap();
                server
                    .get(Kind::of(object).unwrap(), namespace, name)
                    .unwrap()
            }
            Self::Real { .. } => self.request("GET", &Self::path(object), &Value::Null),
        }
    }
}

/// Two nodes with an agent each, pods that come and go, and the Service before them.
struct Cluster {
    agents: Vec<Agent>,
    api: Api,
    /// Name, node and condition of each endpoint of the Service.
    endpoints: Mutex<BTreeMap<String, (&'static str, Condition)>>,
    cluster_ips: Vec<IpAddr>,
    lab: Lab,
    _alone: MutexGuard<'static, ()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Ready,
    Leaving,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if matches!(self.api, Api::Real { .. }) {
            let nodes = ["node-a", "node-b"].map(node_named);
            for object in nodes.into_iter().chain([web()]).chain(self.slices()) {
                let path = Api::path(&object);
                // One that was never made.
                let delete = || self.api.request("DELETE", &path, &Value::Null);
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(delete));
            }
        }
    }
}

fn node_named(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } })
}

fn node(name: &str, addresses: &[IpAddr]) -> Value {
    let addresses: Vec<Value> = addresses
        .iter()
        .map(|address| json!({ "type": "InternalIP", "address": address }))
        .collect();
    let mut node = node_named(name);
    node["status"]["addresses"] = addresses.into();
    node
}

/// Without a selector, so that nobody else writes slices for it.
fn web() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": WEB },
        "spec": {
            "type": "NodePort", "ipFamilyPolicy": "PreferDualStack",
            "ports": [
                { "name": "t", "protocol": "TCP", "port": 80, "targetPort": APP, "nodePort": NODE_PORT },
                { "name": "u", "protocol": "UDP", "port": 80, "targetPort": APP, "nodePort": NODE_PORT },
            ],
        },
    })
}

impl Cluster {
    fn start(extra: &[&str]) -> Self {
        let alone = alone();
        let lab = Lab::new().unwrap();
        for (pod, node) in [("hooked", "node-a"), ("packets", "node-b")] {
            lab.add_pod(&PodSpec::new(pod, node, &[])).unwrap();
        }
        let api = Api::start(&lab);
        let mut cluster = Self {
            agents: Vec::new(),
            api,
            endpoints: Mutex::default(),
            cluster_ips: Vec::new(),
            lab,
            _alone: alone,
        };
        for name in ["node-a", "node-b"] {
            cluster
                .api
                .apply(node(name, &cluster.lab.node_ips(name).unwrap()));
        }
        cluster.api.apply(web());
        let service = cluster.api.get(&web());
        let ips = service["spec"]["clusterIPs"].as_array().unwrap().iter();
        cluster.cluster_ips = ips
            .map(|ip| ip.as_str().unwrap().parse().unwrap())
            .collect();
        cluster.add("web-1", "node-a");
        cluster.add("web-2", "node-b");
        for node in ["node-a", "node-b"] {
            let agent = cluster
                .lab
                .start_agent(node, &cluster.options(extra))
                .unwrap();
            cluster.agents.push(agent);
        }
        cluster.wait_for_backends(2);
        cluster
    }

    fn options(&self, extra: &[&str]) -> AgentOptions {
        AgentOptions::kubeconfig(&self.api.kubeconfig())
            .args(extra)
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps()
    }

    /// A pod that serves, behind the Service.
    fn add(&self, name: &str, node: &'static str) {
        let pod = PodSpec::new(name, node, &[Port::tcp(APP), Port::udp(APP)]);
        self.lab.add_pod(&pod).unwrap();
        self.set(name, Some((node, Condition::Ready)));
    }

    fn set(&self, name: &str, state: Option<(&'static str, Condition)>) {
        let mut endpoints = self.endpoints.lock().unwrap();
        match state {
            Some(state) => endpoints.insert(name.to_owned(), state),
            None => endpoints.remove(name),
        };
        drop(endpoints);
        for slice in self.slices() {
            self.api.apply(slice);
        }
    }

    /// One of each family.
    fn slices(&self) -> Vec<Value> {
        let endpoints = self.endpoints.lock().unwrap();
        let slice = |family: &str, is_v6: bool| {
            let endpoints: Vec<Value> = endpoints
                .iter()
                .map(|(name, (node, condition))| {
                    let ips = self.lab.ips(name).unwrap();
                    let ip = ips.iter().find(|ip| ip.is_ipv6() == is_v6).unwrap();
                    let ready = *condition == Condition::Ready;
                    json!({
                        "addresses": [ip], "nodeName": node,
                        "conditions": { "ready": ready, "serving": true, "terminating": !ready },
                    })
                })
                .collect();
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {
                    "name": format!("{WEB}-{}", family.to_lowercase()),
                    "labels": { "kubernetes.io/service-name": WEB, "endpointslice.kubernetes.io/managed-by": "shunt-test" },
                },
                "ports": [
                    { "name": "t", "protocol": "TCP", "port": APP },
                    { "name": "u", "protocol": "UDP", "port": APP },
                ],
                "endpoints": endpoints,
            })
        };
        vec![slice("IPv4", false), slice("IPv6", true)]
    }

    /// Replaces a pod as a Deployment does: the new one is ready before the old one leaves.
    fn roll(&self, old: &str, new: &str, node: &'static str) {
        self.add(new, node);
        self.wait_for_backends(3);
        let (home, _) = self.endpoints.lock().unwrap()[old];
        self.set(old, Some((home, Condition::Leaving)));
        self.wait_for_backends(2);
        thread::sleep(LEAVE);
        self.set(old, None);
        // A datagram from a port that was used before goes where the one before it went, while the
        // endpoint serves (SPEC B7).
        thread::sleep(LEAVE);
        self.lab.remove(old).unwrap();
    }

    /// What the maps of each agent have for the Service: address, port, protocol and backends of
    /// every frontend.
    fn frontends(&self) -> Vec<Vec<Value>> {
        let of = |agent: &Agent| {
            let rows = agent.json(&["services"]).unwrap();
            rows.as_array().unwrap().clone()
        };
        self.agents.iter().map(of).collect()
    }

    fn have_backends(&self, count: usize) -> bool {
        // Cluster IPs and node ports of two protocols.
        let frontends = (self.cluster_ips.len() + 2) * 2;
        self.frontends().iter().all(|rows| {
            rows.len() == frontends && rows.iter().all(|row| row["internal"]["backends"] == count)
        })
    }

    /// Waits until both agents' maps lead to so many backends for all frontends.
    fn wait_for_backends(&self, count: usize) {
        let began = Instant::now();
        while !self.have_backends(count) {
            assert!(
                began.elapsed() < PATIENCE,
                "not {count} backends: {:#?}, {}, {}",
                self.frontends(),
                self.agents[0].output(),
                self.agents[1].output()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The maps do not change for a while.
    fn stays(&self, backends: usize, time: Duration) {
        let began = Instant::now();
        while began.elapsed() < time {
            assert!(
                self.have_backends(backends),
                "a flap: {:#?}",
                self.frontends()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Clients that connect without a pause: by their sockets, by packets, and from outside; all
    /// frontends, both protocols.
    fn traffic(&self) -> Traffic {
        let inside: Vec<SocketAddr> = self
            .cluster_ips
            .iter()
            .map(|&ip| SocketAddr::new(ip, 80))
            .collect();
        let [a4, a6] = self.lab.node_ips("node-a").unwrap();
        let [b4, b6] = self.lab.node_ips("node-b").unwrap();
        let outside = [a4, b6].map(|ip| SocketAddr::new(ip, NODE_PORT));
        let node_ports = [b4, a6].map(|ip| SocketAddr::new(ip, NODE_PORT));
        let packets: Vec<SocketAddr> = inside.iter().copied().chain(node_ports).collect();
        Traffic::start([
            (self.lab.client("hooked", Sockets::Hooked).unwrap(), inside),
            (
                self.lab.client("packets", Sockets::Unhooked).unwrap(),
                packets,
            ),
            (
                self.lab.client("client", Sockets::Unhooked).unwrap(),
                outside.into(),
            ),
        ])
    }
}

/// Clients that connect until they are told to stop.
struct Traffic {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<(u64, Vec<String>)>>,
}

impl Traffic {
    fn start(clients: impl IntoIterator<Item = (Client, Vec<SocketAddr>)>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let began = Instant::now();
        let dials = move |client: &Client, to: &[SocketAddr], stop: &AtomicBool| {
            let (mut count, mut errors) = (0, Vec::new());
            while !stop.load(Ordering::Relaxed) {
                for proto in [Proto::Tcp, Proto::Udp] {
                    for &to in to {
                        thread::sleep(PACE);
                        let many = client.many(proto, to, 2, &Dial::default()).unwrap();
                        count += many.servers.values().sum::<u64>();
                        if !many.errors.is_empty() {
                            let (name, time) = (client.name(), began.elapsed());
                            errors.push(format!(
                                "{proto} {to} from {name} before {time:.1?}: {:?}",
                                many.errors
                            ));
                        }
                    }
                }
            }
            (count, errors)
        };
        let threads = clients
            .into_iter()
            .map(|(client, to)| {
                let stop = stop.clone();
                thread::spawn(move || dials(&client, &to, &stop))
            })
            .collect();
        Self { stop, threads }
    }

    /// How many were answered.
    ///
    /// # Panics
    /// When one was not.
    fn none_failed(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = 0;
        for thread in self.threads {
            let (count, errors) = thread.join().unwrap();
            assert!(errors.is_empty(), "{errors:#?}");
            assert!(count > 0, "no traffic");
            sum += count;
        }
        sum
    }
}

/// SPEC S1, L1, B3: pods are replaced one after the other while clients connect, and no connection
/// fails.
#[test]
fn pods_roll_without_a_failed_connection() {
    let cluster = Cluster::start(&[]);
    let traffic = cluster.traffic();
    cluster.roll("web-1", "web-3", "node-b");
    cluster.roll("web-2", "web-4", "node-a");
    cluster.roll("web-3", "web-5", "node-a");
    cluster.roll("web-4", "web-6", "node-b");
    let count = traffic.none_failed();
    eprintln!("{count} connections and datagrams");
}

/// SPEC L5: however the server misbehaves, what is known goes on serving, nothing is taken away for
/// a moment, and afterwards changes come through again.
#[test]
fn misbehaviour_is_not_felt() {
    let mut cluster = Cluster::start(&[]);
    let Some(server) = cluster.api.ours() else {
        shunt_lab::skip!("KUBECONFIG names a real server, which does not misbehave on demand");
    };
    let traffic = cluster.traffic();
    /// What happens to the server, while a change is made that agents cannot see yet (or can, where
    /// it does not matter).
    type Misbehave = fn(&ApiServer);
    let everyday: [(&str, Misbehave); 8] = [
        ("watches end", ApiServer::drop_watches),
        ("watches are cut in mid-object", ApiServer::cut_watches),
        ("connections break", |server| server.disconnect().unwrap()),
        ("only bookmarks come", |server| {
            server.faults(|faults| faults.bookmarks = Duration::from_millis(20));
            thread::sleep(Duration::from_millis(500));
            server.faults(|faults| faults.bookmarks = Duration::from_secs(60));
        }),
        ("410 as an event", |server| {
            server.expire();
            server.drop_watches();
        }),
        ("410 as a status, and lists in pages", |server| {
            server.faults(|faults| {
                faults.gone = Gone::Status;
                faults.streaming = Streaming::Refused;
                faults.page = 1;
            });
            server.expire();
            server.drop_watches();
        }),
        ("watches end at once", |server| {
            server.faults(|faults| faults.short_watches = true);
            server.drop_watches();
            thread::sleep(Duration::from_millis(1500));
            server.faults(|faults| faults.short_watches = false);
        }),
        ("old versions again", |server| {
            server.faults(|faults| faults.replay = 20);
            server.drop_watches();
        }),
    ];
    // Two that take turns, so that old versions are wrong ones.
    let (mut serving, mut number) = (["web-1".to_owned(), "web-2".to_owned()], 2);
    let mut roll = |cluster: &Cluster| {
        number += 1;
        let new = format!("web-{number}");
        let node = if number % 2 == 0 { "node-a" } else { "node-b" };
        cluster.roll(&serving[0], &new, node);
        serving.swap(0, 1);
        serving[1] = new;
    };
    for (what, misbehave) in everyday {
        let began = Instant::now();
        misbehave(server);
        cluster.stays(2, Duration::from_millis(300));
        roll(&cluster);
        eprintln!("{what}: rolled after {:?}", began.elapsed());
    }
    server.faults(|faults| *faults = shunt_apiserver::Faults::default());

    // Errors, and an absence in which everything is forgotten.
    for refusal in [
        Refusal::status(500),
        Refusal::status(429).retry_after(1),
        Refusal::status(403),
    ] {
        let began = Instant::now();
        server.faults(|faults| faults.refuse = Some(refusal.clone()));
        server.expire();
        server.drop_watches();
        cluster.stays(2, Duration::from_secs(1));
        server.faults(|faults| faults.refuse = None);
        roll(&cluster);
        eprintln!("{refusal:?}: rolled after {:?}", began.elapsed());
    }
    server.set_token("rotated");
    server.drop_watches();
    cluster.stays(2, Duration::from_secs(1));
    server.write_token("rotated").unwrap();
    roll(&cluster);

    server.faults(|faults| faults.frozen = true);
    cluster.stays(2, Duration::from_secs(1));
    server.faults(|faults| faults.frozen = false);
    roll(&cluster);

    server.close().unwrap();
    cluster.stays(2, Duration::from_secs(5));
    server.expire();
    server.open().unwrap();
    roll(&cluster);

    let count = traffic.none_failed();
    eprintln!("{count} connections and datagrams");
    for agent in &mut cluster.agents {
        assert!(agent.is_running());
        let output = agent.output();
        let advice = "allow list and watch on services (ClusterRole)";
        assert!(output.contains(advice), "{output}");
        assert!(output.contains("watching services works again"), "{output}");
    }
}

/// SPEC L4, L5: agents that start while the server is away leave the datapath as it is, and take up
/// what they missed when it is back.
#[test]
fn agents_restart_while_the_server_is_away() {
    let mut cluster = Cluster::start(&[]);
    let traffic = cluster.traffic();
    cluster.api.away(true);
    cluster.agents[0].kill().unwrap();
    cluster.agents[1].stop().unwrap();
    for agent in &mut cluster.agents {
        agent.spawn().unwrap();
    }
    for agent in &cluster.agents {
        let waits = "cannot be reached";
        agent.wait_for(waits, PATIENCE).unwrap();
    }
    cluster.stays(2, Duration::from_secs(2));
    assert!(
        cluster
            .agents
            .iter()
            .all(|agent| agent.ready_line().is_empty()),
        "nothing to be ready with"
    );
    if matches!(cluster.api, Api::Ours(_)) {
        // A real server could not be told of it.
        cluster.add("web-3", "node-a");
        cluster.stays(2, Duration::from_millis(300));
    }
    cluster.api.away(false);
    for agent in &mut cluster.agents {
        agent.wait_ready().unwrap();
    }
    if matches!(cluster.api, Api::Real { .. }) {
        cluster.add("web-3", "node-a");
    }
    cluster.wait_for_backends(3);
    traffic.none_failed();
}

/// SPEC L4, L5: for a minute nobody answers, longer than agents wait between two attempts; one of
/// them is killed meanwhile. What has changed by then is in the maps soon after, and nobody has
/// noticed anything. Asked for: `cargo xtask test --long`.
#[test]
#[ignore = "takes a minute and a half: cargo xtask test --long"]
fn the_server_is_away_for_a_minute() {
    let mut cluster = Cluster::start(&[]);
    let traffic = cluster.traffic();
    cluster.api.away(true);
    cluster.stays(2, MINUTE / 2);
    cluster.agents[0].kill().unwrap();
    cluster.agents[0].spawn().unwrap();
    if let Api::Ours(server) = &cluster.api {
        cluster.add("web-3", "node-a");
        server.expire();
    }
    cluster.stays(2, MINUTE / 2);
    cluster.api.away(false);
    let began = Instant::now();
    cluster.agents[0].wait_ready().unwrap();
    if matches!(cluster.api, Api::Real { .. }) {
        cluster.add("web-3", "node-a");
    }
    cluster.wait_for_backends(3);
    eprintln!(
        "both agents know what has changed after {:?}",
        began.elapsed()
    );
    let count = traffic.none_failed();
    eprintln!("{count} connections and datagrams");
    assert!(cluster.agents.iter_mut().all(Agent::is_running));
}

/// SPEC F2, S1: node ports answer on the addresses that the Node has at the moment, without a
/// restart.
#[test]
fn node_ports_follow_the_nodes_addresses() {
    let cluster = Cluster::start(&["--nodeport-addresses", "primary"]);
    let client = cluster.lab.client("client", Sockets::Unhooked).unwrap();
    let old = cluster.lab.node_ips("node-a").unwrap();
    let new: [IpAddr; 2] = [
        "192.168.50.111".parse().unwrap(),
        Ipv6Addr::new(0xfd50, 0, 0, 0, 0, 0, 0, 0x111).into(),
    ];
    cluster
        .lab
        .ns("node-a")
        .unwrap()
        .ip(&new.map(|ip| {
            let length = if ip.is_ipv4() { 24 } else { 64 };
            format!(
                "address add {ip}/{length} dev eth0{}",
                if ip.is_ipv6() { " nodad" } else { "" }
            )
        }))
        .unwrap();
    let dial = Dial {
        timeout: Duration::from_millis(300),
        ..Dial::default()
    };
    let answers = |ip: IpAddr, proto: Proto| {
        client
            .once(proto, SocketAddr::new(ip, NODE_PORT), &dial)
            .is_ok()
    };
    for proto in [Proto::Tcp, Proto::Udp] {
        assert!(
            old.iter().all(|&ip| answers(ip, proto)),
            "{proto} on the Node's addresses"
        );
        assert!(
            !new.iter().any(|&ip| answers(ip, proto)),
            "{proto}: not the Node's yet"
        );
    }
    let traffic = Traffic::start([(
        cluster.lab.client("hooked", Sockets::Hooked).unwrap(),
        cluster
            .cluster_ips
            .iter()
            .map(|&ip| SocketAddr::new(ip, 80))
            .collect(),
    )]);
    cluster.api.apply(node("node-a", &new));
    let began = Instant::now();
    while !new.iter().all(|&ip| answers(ip, Proto::Tcp))
        || old.iter().any(|&ip| answers(ip, Proto::Tcp))
    {
        assert!(began.elapsed() < PATIENCE, "{}", cluster.agents[0].output());
    }
    for ip in new {
        assert!(answers(ip, Proto::Udp));
    }
    for ip in old {
        assert!(!answers(ip, Proto::Udp));
    }
    traffic.none_failed();
    assert_eq!(cluster.agents[0].output().matches("ready: ").count(), 1);

    // A Node that is deleted leaves the machine, and its addresses, where they are.
    if let Some(server) = cluster.api.ours() {
        server.delete(Kind::Nodes, "", "node-a");
        thread::sleep(Duration::from_millis(300));
        assert!(new.iter().all(|&ip| answers(ip, Proto::Tcp)));
    }
}

/// What bad input gets: what cannot heal ends the agent, with one line; what can is one line in the
/// log, and waited for.
#[test]
fn bad_input_is_one_line_that_says_what_to_do() {
    let _alone = alone();
    let lab = Lab::builder().nodes(&["node-a"]).build().unwrap();
    let Api::Ours(server) = Api::start(&lab) else {
        return;
    };
    let kubeconfig = server.kubeconfig();
    let agent = |path: &std::path::Path| {
        let options = AgentOptions::kubeconfig(path)
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        let mut agent = lab.agent("node-a", &options).unwrap();
        agent.spawn().unwrap();
        agent
    };
    // Cannot heal.
    let mut missing = agent("/no/such/kubeconfig".as_ref());
    let error = missing.wait_ready().unwrap_err().to_string();
    assert!(error.contains("exit status: 1"), "{error}");
    let said = "--kubeconfig /no/such/kubeconfig: cannot be used";
    assert_eq!(
        missing.output().matches(said).count(),
        1,
        "{}",
        missing.output()
    );

    // Can.
    let heals = |what: &str, expected: &str| {
        let mut agent = agent(&kubeconfig);
        agent.wait_for(expected, PATIENCE).unwrap();
        thread::sleep(Duration::from_millis(1500));
        let output = agent.output();
        assert!(agent.is_running(), "{what}: {output}");
        let said = output
            .lines()
            .filter(|line| line.contains("watching services fails"))
            .count();
        assert_eq!(said, 1, "{what}, one line for many attempts: {output}");
        agent
    };
    server.close().unwrap();
    let mut unreachable = heals(
        "an unreachable server",
        "watching services fails: https://192.168.50.1:6443 cannot be reached: Connection refused",
    );
    server.open().unwrap();
    // There is no Node, which keeps nobody from being served.
    unreachable.wait_ready().unwrap();
    unreachable
        .wait_for("Node node-a is not in the cluster", PATIENCE)
        .unwrap();
    drop(unreachable);

    server.faults(|faults| faults.refuse = Some(Refusal::status(403)));
    let mut forbidden = heals(
        "missing RBAC",
        "(403); allow list and watch on services (ClusterRole); what is known goes on serving, trying again",
    );
    server.faults(|faults| faults.refuse = None);
    forbidden.wait_ready().unwrap();
    drop(forbidden);

    server.set_token("another");
    let mut unauthorized = heals(
        "a bad token",
        "watching services fails: Unauthorized (401); give a kubeconfig or service account whose token or certificate is still valid",
    );
    server.write_token("another").unwrap();
    unauthorized.wait_ready().unwrap();
}

/// S3: objects as API servers store them, for years and through releases: nulls, odd values and
/// long texts in fields that shunt has no use for take nothing away, in a list and in a watch.
#[test]
fn objects_are_served_as_they_are_stored() {
    const OTHER: u16 = 30_090;
    let mut cluster = Cluster::start(&[]);
    let Some(server) = cluster.api.ours() else {
        shunt_lab::skip!(
            "KUBECONFIG names a real server, where objects are checked before they are stored"
        );
    };
    let odd_meta = |object: &mut Value| {
        object["metadata"]["managedFields"] =
            json!([{ "time": null, "fieldsV1": { "f:x": "y".repeat(1 << 20) } }, null]);
        object["metadata"]["annotations"] = json!({ "note": "n".repeat(1 << 18) });
        object["metadata"]["ownerReferences"] = json!([{ "uid": null, "controller": "perhaps" }]);
        object["metadata"]["creationTimestamp"] = Value::Null;
    };
    let mut service = cluster.api.get(&web());
    odd_meta(&mut service);
    service["spec"]["ports"][0]["nodePort"] = OTHER.into();
    service["spec"]["ports"][0]["appProtocol"] = json!({ "of": "another release" });
    service["spec"]["ofTheFuture"] = json!([[null]]);
    service["status"] = json!({
        "conditions": [{ "type": "Balanced", "status": "Perhaps", "lastTransitionTime": null }],
        "loadBalancer": { "ingress": [{ "hostname": null, "ports": "none" }] },
    });
    let mut objects = vec![service];
    for mut slice in cluster.slices() {
        odd_meta(&mut slice);
        for endpoint in slice["endpoints"].as_array_mut().unwrap() {
            endpoint["targetRef"] = json!({ "kind": null, "uid": 5 });
            endpoint["zone"] = json!(7);
            endpoint["hints"] = Value::Null;
            endpoint["conditions"] = json!({ "ready": null, "serving": null });
        }
        objects.push(slice);
    }
    for name in ["node-a", "node-b"] {
        let mut node = node(name, &cluster.lab.node_ips(name).unwrap());
        odd_meta(&mut node);
        node["status"]["conditions"] = json!([{ "type": "Ready", "lastHeartbeatTime": null }]);
        node["spec"] = json!({ "taints": [{ "key": "k", "timeAdded": "then" }], "podCIDRs": null });
        objects.push(node);
    }
    for object in objects {
        server.apply(object);
    }
    let client = cluster.lab.client("client", Sockets::Unhooked).unwrap();
    let inside = cluster.lab.client("packets", Sockets::Unhooked).unwrap();
    every_node_answers(&cluster, &client, OTHER);
    for ip in &cluster.cluster_ips {
        inside.tcp(SocketAddr::new(*ip, 80)).unwrap();
        inside.udp(SocketAddr::new(*ip, 80)).unwrap();
    }
    // From nothing, as a list.
    for agent in &mut cluster.agents {
        agent.stop().unwrap();
        agent.cli(&["cleanup"]).unwrap();
        agent.spawn().unwrap();
        agent.wait_ready().unwrap();
    }
    every_node_answers(&cluster, &client, OTHER);
    for agent in &cluster.agents {
        let output = agent.output();
        assert!(!output.contains("cannot be read"), "{output}");
    }
}

/// Waits until each node's port answers over TCP, IPv4 and IPv6.
fn every_node_answers(cluster: &Cluster, client: &Client, port: u16) {
    let began = Instant::now();
    for node in ["node-a", "node-b"] {
        for ip in cluster.lab.node_ips(node).unwrap() {
            while let Err(error) = client.tcp(SocketAddr::new(ip, port)) {
                assert!(began.elapsed() < PATIENCE, "{ip}: {error}");
                thread::sleep(PACE);
            }
        }
    }
}
