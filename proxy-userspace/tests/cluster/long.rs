//! Two minutes of everything at once (SPEC L1–L4): clients, churn of endpoints, agents that are
//! killed, a SYN flood. Needs root, and is asked for: `cargo xtask test --long`.

use std::{
    collections::BTreeMap,
    env, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::forged::Forger;
use crate::web::{self, APP, CLUSTER_IPS, NODE_PORT};
use etherparse::PacketBuilderStep;
use shunt_lab::{Agent, AgentOptions, Client, Conn, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

const PODS: [(&str, &str); 4] = [
    ("web-a", "node-a"),
    ("web-b", "node-a"),
    ("web-c", "node-b"),
    ("web-d", "node-b"),
];
/// A Service of the flood's own: behind [`CLUSTER_IPS`] it would use up the listeners' queues,
/// which is the servers' affair.
const FLOODED: [&str; 2] = ["10.96.0.2", "fd96::2"];
/// Between two connections of a client: agents and the flood need some of the machine too.
const PACE: Duration = Duration::from_millis(3);
/// Between two rounds over the connections that stay open.
const ASK: Duration = Duration::from_millis(500);

/// Random enough, and to be had again with `SHUNT_LONG_SEED`.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn between(&mut self, from: Duration, to: Duration) -> Duration {
        from + Duration::from_millis(self.below((to - from).as_millis() as u64))
    }
}

/// What is counted while it goes on.
#[derive(Default)]
struct Counts {
    done: AtomicBool,
    flood: AtomicU64,
    churns: AtomicU64,
    restarts: AtomicU64,
    asked: AtomicU64,
    answered: Mutex<BTreeMap<String, u64>>,
    /// With the time since the start.
    failures: Mutex<Vec<String>>,
}

impl Counts {
    fn goes_on(&self) -> bool {
        !self.done.load(Ordering::Relaxed)
    }

    fn fail(&self, begun: Instant, what: &str) {
        let text = format!("{:.1?}: {what}", begun.elapsed());
        eprintln!("{text}");
        self.failures.lock().unwrap().push(text);
    }
}

struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    manifests: TempDir,
}

impl Cluster {
    fn start() -> Self {
        let lab = Lab::new().unwrap();
        for (pod, node) in PODS {
            lab.add_pod(&PodSpec::new(pod, node, &[Port::tcp(APP), Port::udp(APP)]))
                .unwrap();
        }
        for pod in ["hooked", "packets", "flood"] {
            lab.add_pod(&PodSpec::new(pod, "node-a", &[])).unwrap();
        }
        lab.add_pod(&PodSpec::new("sink", "node-b", &[])).unwrap();
        // What it would say finds no way out.
        let nowhere = ["0.0.0.0/0", "::/0"].map(|net| format!("route replace blackhole {net}"));
        lab.ns("sink").unwrap().ip(&nowhere).unwrap();
        let mut cluster = Self {
            agents: Vec::new(),
            lab,
            manifests: TempDir::new().unwrap(),
        };
        cluster.write("service.yaml", &web::service());
        cluster.write("flooded.yaml", &flooded(&cluster.lab));
        cluster.serve(&[0, 1, 2, 3]);
        let options = AgentOptions::manifests(cluster.manifests.path())
            .xdp("native")
            .shunt(env!("CARGO_BIN_EXE_shunt"));
        for node in ["node-a", "node-b"] {
            let agent = cluster.lab.start_agent(node, &options).unwrap();
            cluster.agents.push(agent);
        }
        cluster
    }

    fn write(&self, file: &str, text: &str) {
        web::write(self.manifests.path(), file, text);
    }

    /// Puts these of [`PODS`] behind the Service.
    fn serve(&self, pods: &[usize]) {
        self.write("endpoints.yaml", &endpoints(&self.lab, pods));
    }

    /// Who dials what: a hooked pod, one whose packets are seen, a host outside, and a process on
    /// the node.
    fn ways(&self) -> Vec<(Client, SocketAddr)> {
        let mut ways = Vec::new();
        for (i, cluster_ip) in CLUSTER_IPS.iter().enumerate() {
            let cluster_ip = SocketAddr::new(cluster_ip.parse().unwrap(), 80);
            let node_port = |node| SocketAddr::new(self.lab.node_ips(node).unwrap()[i], NODE_PORT);
            for (name, sockets, to) in [
                ("hooked", Sockets::Hooked, cluster_ip),
                ("packets", Sockets::Unhooked, cluster_ip),
                ("client", Sockets::Unhooked, node_port("node-a")),
                ("node-a", Sockets::Hooked, node_port("node-b")),
            ] {
                ways.push((self.lab.client(name, sockets).unwrap(), to));
            }
        }
        ways
    }
}

fn endpoints(lab: &Lab, pods: &[usize]) -> String {
    let pods: Vec<_> = pods
        .iter()
        .map(|&pod| (PODS[pod].0, PODS[pod].1, ""))
        .collect();
    web::slices(lab, &pods)
}

/// A Service with an endpoint that answers nothing.
fn flooded(lab: &Lab) -> String {
    let mut documents = vec![format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: flooded }}\nspec:\n  clusterIP: {0}\n  clusterIPs: [{0}, '{1}']\n  \
         ipFamilyPolicy: RequireDualStack\n  ipFamilies: [IPv4, IPv6]\n  ports: [{{ port: 80, targetPort: {APP} }}]\n",
        FLOODED[0], FLOODED[1],
    )];
    for (family, ip) in ["IPv4", "IPv6"].iter().zip(lab.ips("sink").unwrap()) {
        documents.push(format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{ name: flooded-{}, labels: {{ \
             kubernetes.io/service-name: flooded }} }}\naddressType: {family}\nports: [{{ protocol: TCP, port: {APP} }}]\n\
             endpoints: [{{ addresses: ['{ip}'], nodeName: node-b }}]\n",
            family.to_lowercase(),
        ));
    }
    documents.join("---\n")
}

/// SYNs to [`FLOODED`] from everywhere, until it is over.
fn flood(counts: &Counts, mut random: Random) -> io::Result<()> {
    let forger = Forger::new()?;
    let to = FLOODED.map(|ip| SocketAddr::new(ip.parse().unwrap(), 80));
    while counts.goes_on() {
        // More would leave no room for clients and agents on two CPUs.
        for _ in 0..10 {
            let number = random.next();
            let (from, to) = if number & 1 == 0 {
                let from = Ipv4Addr::from(0xc612_0000 | (number >> 8) as u32 & 0x1_ffff);
                (IpAddr::V4(from), to[0])
            } else {
                let from = Ipv6Addr::from(0x2001_0db8_0018 << 80 | u128::from(number >> 8));
                (IpAddr::V6(from), to[1])
            };
            let from = SocketAddr::new(from, 1024 + (number >> 48) as u16 % 60_000);
            // A full queue is nothing to wait for.
            if forger
                .send(from, to, number as u32, PacketBuilderStep::syn)
                .is_ok()
            {
                counts.flood.fetch_add(1, Ordering::Relaxed);
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[test]
#[ignore = "two minutes: cargo xtask test --long"]
fn nothing_is_lost_in_two_minutes_of_everything() {
    let number = |name: &str| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seconds = number("SHUNT_LONG_SECONDS").unwrap_or(120);
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = number("SHUNT_LONG_SEED").unwrap_or(time.as_nanos() as u64) | 1;
    println!("{seconds} s, SHUNT_LONG_SEED={seed}");
    let mut cluster = Cluster::start();
    let mut agents = std::mem::take(&mut cluster.agents);
    let ways = cluster.ways();
    let counts = Counts::default();
    let begun = Instant::now();
    let (counts_of, lab, manifests) = (&counts, &cluster.lab, &cluster.manifests);
    thread::scope(|scope| {
        for (client, to) in &ways {
            // New connections and datagrams.
            scope.spawn(move || {
                let name = format!("{} to {to}", client.name());
                let mut answered = 0;
                while counts_of.goes_on() {
                    for proto in [Proto::Tcp, Proto::Udp] {
                        // A datagram may be lost on its way, where the queue of a veth with XDP is
                        // full; three in a row are not.
                        let result = match proto {
                            Proto::Udp => client
                                .udp(*to)
                                .or_else(|_| client.udp(*to))
                                .or_else(|_| client.udp(*to)),
                            _ => client.tcp(*to),
                        };
                        match result {
                            Ok(_) => answered += 1,
                            Err(error) => {
                                counts_of.fail(begun, &format!("{proto} {name}: {error}"))
                            }
                        }
                        thread::sleep(PACE);
                    }
                }
                counts_of.answered.lock().unwrap().insert(name, answered);
            });
            // Connections that stay open.
            scope.spawn(move || {
                let open: Vec<Conn> = (0..8).map(|_| client.open_tcp(*to).unwrap()).collect();
                let servers: Vec<String> = open
                    .iter()
                    .map(|conn| conn.ask("first").unwrap().server)
                    .collect();
                while counts_of.goes_on() {
                    for (conn, server) in open.iter().zip(&servers) {
                        match conn.ask("again") {
                            Ok(answer) if answer.server == *server => {
                                counts_of.asked.fetch_add(1, Ordering::Relaxed);
                            }
                            Ok(answer) => {
                                let text = format!(
                                    "open to {to}: {} answered for {server}",
                                    answer.server
                                );
                                counts_of.fail(begun, &text);
                            }
                            Err(error) => {
                                counts_of.fail(
                                    begun,
                                    &format!("open from {} to {to}: {error}", client.name()),
                                );
                                return;
                            }
                        }
                    }
                    thread::sleep(ASK);
                }
            });
        }
        for (i, agent) in agents.iter_mut().enumerate() {
            let mut random = Random(seed.wrapping_mul(3 + i as u64) | 1);
            scope.spawn(move || {
                while counts_of.goes_on() {
                    thread::sleep(random.between(Duration::from_secs(1), Duration::from_secs(8)));
                    agent.kill().unwrap();
                    thread::sleep(random.between(Duration::ZERO, Duration::from_secs(2)));
                    // Some take the pinned programs over, others load them with another setting.
                    if random.below(3) == 0 {
                        let count = ["on", "off"][random.below(2) as usize];
                        agent.set_option("--count-traffic", count);
                    }
                    agent.restart().unwrap();
                    counts_of.restarts.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut random = Random(seed.wrapping_mul(7) | 1);
        scope.spawn(move || {
            while counts_of.goes_on() {
                thread::sleep(random.between(Duration::from_millis(200), Duration::from_secs(2)));
                let set = 1 + random.below(15);
                let pods: Vec<usize> = (0..PODS.len()).filter(|pod| set & 1 << pod != 0).collect();
                web::write(manifests.path(), "endpoints.yaml", &endpoints(lab, &pods));
                counts_of.churns.fetch_add(1, Ordering::Relaxed);
            }
        });
        let random = Random(seed.wrapping_mul(11) | 1);
        scope.spawn(move || {
            let pod = lab.ns("flood").unwrap();
            pod.run(|| flood(counts_of, random)).unwrap();
        });
        thread::sleep(Duration::from_secs(seconds));
        counts.done.store(true, Ordering::Relaxed);
    });
    let answered = counts.answered.into_inner().unwrap();
    for (name, count) in &answered {
        println!("{count:>8} answers: {name}");
    }
    println!(
        "{:>8} answers over {} open connections\n{:>8} restarts of agents\n{:>8} changes of endpoints\n{:>8} SYNs of the flood",
        counts.asked.into_inner(),
        8 * ways.len(),
        counts.restarts.into_inner(),
        counts.churns.into_inner(),
        counts.flood.into_inner(),
    );
    let failures = counts.failures.into_inner().unwrap();
    assert!(
        failures.is_empty(),
        "{} failures:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(
        answered.values().all(|&count| count > 10 * seconds),
        "{answered:?}"
    );
}
