//! Names (SPEC D1, D2): the built-in DNS, asked over its own addresses and behind `kube-dns`, by
//! sockets as resolvers have them and by glibc's; and any DNS behind `kube-dns` whose pods come and
//! go.

mod peers;

use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::TXT},
};
use shunt_lab::{Agent, AgentOptions, Lab, NetNs, PodSpec, Port, Sockets};
use tempfile::TempDir;

const DNS: u16 = 53;
/// `kube-dns`.
const CLUSTER_IPS: [&str; 2] = ["10.96.0.10", "fd96::a"];
/// How long a lookup may take that is answered at once.
const SOON: Duration = Duration::from_secs(3);

fn question(id: u16, name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(size) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        message.set_edns(edns);
    }
    message.to_vec().unwrap()
}

/// A socket in a namespace that takes answers of this server alone.
fn connected(ns: &NetNs, server: SocketAddr, patience: Duration) -> io::Result<UdpSocket> {
    ns.run(|| {
        let any: IpAddr = if server.is_ipv4() {
            [0; 4].into()
        } else {
            [0; 16].into()
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(patience))?;
        socket.connect(server)?;
        Ok(socket)
    })
}

fn over_udp(ns: &NetNs, server: SocketAddr, name: &str, kind: RecordType) -> io::Result<Message> {
    let socket = connected(ns, server, SOON)?;
    socket.send(&question(7, name, kind, Some(1232)))?;
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer)?;
    Ok(Message::from_vec(&buffer[..length]).unwrap())
}

fn over_tcp(ns: &NetNs, server: SocketAddr, name: &str, kind: RecordType) -> io::Result<Message> {
    let mut stream = ns.run(|| TcpStream::connect_timeout(&server, SOON))?;
    stream.set_read_timeout(Some(SOON))?;
    let question = question(7, name, kind, None);
    stream.write_all(&u16::try_from(question.len()).unwrap().to_be_bytes())?;
    stream.write_all(&question)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut buffer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut buffer)?;
    Ok(Message::from_vec(&buffer).unwrap())
}

/// Code and data of an answer, sorted.
fn records(message: &Message) -> Vec<String> {
    let mut lines: Vec<String> = message
        .answers
        .iter()
        .map(|record| record.data.to_string())
        .collect();
    lines.sort();
    match message.metadata.response_code {
        ResponseCode::NoError => lines,
        code => vec![format!("{code:?}")],
    }
}

/// A DNS server of its own kind in a namespace: every name below `test` has one address that names
/// the server, `big.test` has many texts; all else is refused. Dropped, it is gone, as a process
/// that was killed is.
struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    asked: Arc<AtomicU32>,
}

impl Server {
    fn start(ns: &NetNs, ips: &[IpAddr], number: u8) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let asked = Arc::<AtomicU32>::default();
        let mut threads = Vec::new();
        for ip in ips.iter().copied() {
            let (udp, tcp) = ns.run(|| {
                (
                    UdpSocket::bind((ip, DNS)).unwrap(),
                    TcpListener::bind((ip, DNS)).unwrap(),
                )
            });
            udp.set_read_timeout(Some(Duration::from_millis(20)))
                .unwrap();
            tcp.set_nonblocking(true).unwrap();
            let (stopped, counter) = (stop.clone(), asked.clone());
            threads.push(thread::spawn(move || {
                let mut buffer = [0; 4096];
                while !stopped.load(Ordering::Relaxed) {
                    let Ok((length, peer)) = udp.recv_from(&mut buffer) else {
                        continue;
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                    let reply = Self::answer(&buffer[..length], number, true);
                    let _ = udp.send_to(&reply, peer);
                }
            }));
            let stopped = stop.clone();
            threads.push(thread::spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    let Ok((mut stream, _)) = tcp.accept() else {
                        thread::sleep(Duration::from_millis(5));
                        continue;
                    };
                    let _ = stream.set_nonblocking(false);
                    let _ = stream.set_read_timeout(Some(Duration::from_millis(500)));
                    let mut length = [0; 2];
                    if stream.read_exact(&mut length).is_err() {
                        continue;
                    }
                    let mut buffer = vec![0; usize::from(u16::from_be_bytes(length))];
                    if stream.read_exact(&mut buffer).is_ok() {
                        let reply = Self::answer(&buffer, number, false);
                        let _ = stream.write_all(
                            &[
                                &u16::try_from(reply.len()).unwrap().to_be_bytes()[..],
                                &reply,
                            ]
                            .concat(),
                        );
                    }
                }
            }));
        }
        Self {
            stop,
            threads,
            asked,
        }
    }

    fn answer(bytes: &[u8], number: u8, udp: bool) -> Vec<u8> {
        let mut message = Message::from_vec(bytes).unwrap().into_response();
        let query = message.queries[0].clone();
        let name = query.name().to_ascii().to_lowercase();
        let record = |data: RData| Record::from_rdata(query.name().clone(), 60, data);
        match query.query_type() {
            _ if !name.ends_with(".test.") && !name.ends_with("example.com.") => {
                message.metadata.response_code = ResponseCode::Refused;
            }
            RecordType::A => {
                let address = std::net::Ipv4Addr::new(192, 0, 2, number);
                message.add_answer(record(RData::A(address.into())));
            }
            RecordType::TXT => {
                for n in 0..20 {
                    let text = TXT::new(vec![format!(
                        "{n:03} of twenty lines of text, each with 50 bytes.."
                    )]);
                    message.add_answer(record(RData::TXT(text)));
                }
            }
            _ => {}
        }
        let limit = message.edns.as_ref().map_or(512, Edns::max_payload);
        while udp && message.to_vec().unwrap().len() > usize::from(limit) {
            message.answers.pop();
            message.metadata.truncation = true;
        }
        message.to_vec().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// `kube-dns` with these endpoints.
fn kube_dns(endpoints: &[IpAddr]) -> String {
    let mut text = format!(
        "kind: Service\nmetadata: {{ name: kube-dns, namespace: kube-system }}\n\
         spec:\n  clusterIPs: [{}, '{}']\n  ports:\n    - {{ name: dns, port: 53, protocol: UDP }}\n    \
         - {{ name: dns-tcp, port: 53, protocol: TCP }}\n",
        CLUSTER_IPS[0], CLUSTER_IPS[1]
    );
    for (family, is_v6) in [("IPv4", false), ("IPv6", true)] {
        let list: Vec<String> = endpoints
            .iter()
            .filter(|ip| ip.is_ipv6() == is_v6)
            .map(|ip| format!("{{ addresses: ['{ip}'] }}"))
            .collect();
        text += &format!(
            "---\nkind: EndpointSlice\napiVersion: discovery.k8s.io/v1\n\
             metadata: {{ name: kube-dns-{}, namespace: kube-system, labels: {{ kubernetes.io/service-name: kube-dns }} }}\n\
             addressType: {family}\nports: [{{ name: dns, port: 53, protocol: UDP }}, {{ name: dns-tcp, port: 53, protocol: TCP }}]\n\
             endpoints: [{}]\n",
            family.to_lowercase(),
            list.join(", ")
        );
    }
    text
}

fn write(folder: &TempDir, file: &str, text: &str) {
    let path = folder.path().join(file);
    let hidden = path.with_extension("new");
    fs::write(&hidden, text).unwrap();
    fs::rename(hidden, path).unwrap();
}

/// A program whose resolver has this `resolv.conf`, with its sockets hooked.
fn resolving(lab: &Lab, pod: &str, resolv_conf: &std::path::Path, script: &str) -> Command {
    let mut command = lab.command(pod, Sockets::Hooked, "unshare").unwrap();
    let script = format!(
        "mount --bind {} /etc/resolv.conf && {script}",
        resolv_conf.display()
    );
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    command
}

fn output(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => text(&output.stdout),
        false => format!("{}: {}", output.status, text(&output.stderr)),
    }
}

/// What the agent's metrics say.
fn metric(lab: &Lab, agent: &Agent, name: &str) -> Option<String> {
    let mut stream = lab
        .ns(agent.node())
        .unwrap()
        .run(|| TcpStream::connect("127.0.0.1:10249"))
        .unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.rsplit(' ').next()?.to_owned())
}

/// D2: its own addresses and `kube-dns`; both families, UDP and TCP, pods on its node and on
/// another, glibc with a search list; other names; a change; what is in the metrics.
#[test]
fn the_built_in_dns_answers_pods() {
    let lab = Lab::new().unwrap();
    let ports = [Port::tcp(8080)];
    for (pod, node) in [("web-a", "node-a"), ("shell", "node-a"), ("far", "node-b")] {
        lab.add_pod(&PodSpec::new(
            pod,
            node,
            if pod == "web-a" { &ports } else { &[] },
        ))
        .unwrap();
    }
    let upstream_ip: IpAddr = "192.0.2.200".parse().unwrap();
    lab.add_outside("upstream", &[upstream_ip], &[]).unwrap();
    let upstream = Server::start(&lab.ns("upstream").unwrap(), &[upstream_ip], 1);
    let node_ips = lab.node_ips("node-a").unwrap();
    let folder = TempDir::new().unwrap();
    write(&folder, "kube-dns.yaml", &kube_dns(&node_ips));
    let web = lab.ips("web-a").unwrap();
    let pods = |ready: bool| {
        format!(
            "kind: Service\nmetadata: {{ name: web }}\n\
             spec: {{ clusterIPs: [10.96.0.80, 'fd96::50'], selector: {{ app: web }}, ports: [{{ port: 80, targetPort: 8080 }}] }}\n\
             ---\nkind: Service\nmetadata: {{ name: pods, namespace: team }}\n\
             spec: {{ clusterIP: None, selector: {{ app: web }}, ports: [{{ port: 8080 }}] }}\n\
             ---\nkind: Service\nmetadata: {{ name: outside, namespace: team }}\n\
             spec: {{ type: ExternalName, externalName: www.example.com }}\n\
             ---\nkind: Pod\nmetadata: {{ name: web-a, namespace: team, labels: {{ app: web }} }}\nspec: {{ containers: [] }}\n\
             status: {{ podIPs: [{{ ip: '{}' }}, {{ ip: '{}' }}], conditions: [{{ type: Ready, status: '{}' }}] }}\n",
            web[0],
            web[1],
            if ready { "True" } else { "False" }
        )
    };
    write(&folder, "web.yaml", &pods(true));
    let options = AgentOptions::manifests(folder.path())
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps()
        .args(&[
            "--dns",
            "0.0.0.0",
            "--dns-upstream",
            &upstream_ip.to_string(),
        ]);
    let agent = lab.start_agent("node-a", &options).unwrap();
    let far_options = AgentOptions::manifests(folder.path())
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps();
    let _far_agent = lab.start_agent("node-b", &far_options).unwrap();
    agent.wait_for("answering for cluster.local", SOON).unwrap();

    let own = node_ips.map(|ip| SocketAddr::new(ip, DNS));
    let behind = CLUSTER_IPS.map(|ip| SocketAddr::new(ip.parse().unwrap(), DNS));
    for (pod, servers) in [("shell", [own, behind]), ("far", [own, behind])] {
        let ns = lab.ns(pod).unwrap();
        for server in servers.concat() {
            for ask in [over_udp, over_tcp] {
                let answer = |name: &str, kind| {
                    records(
                        &ask(&ns, server, name, kind)
                            .unwrap_or_else(|error| panic!("{pod} {server} {name}: {error}")),
                    )
                };
                assert_eq!(
                    answer("web.default.svc.cluster.local.", RecordType::A),
                    ["10.96.0.80"],
                    "{pod} {server}"
                );
                assert_eq!(
                    answer("web.default.svc.cluster.local.", RecordType::AAAA),
                    ["fd96::50"]
                );
                assert_eq!(
                    answer("pods.team.svc.cluster.local.", RecordType::A),
                    [web[0].to_string()]
                );
                assert_eq!(
                    answer("pods.team.svc.cluster.local.", RecordType::AAAA),
                    [web[1].to_string()]
                );
                assert_eq!(
                    answer("nobody.team.svc.cluster.local.", RecordType::A),
                    ["NXDomain"]
                );
                assert_eq!(
                    answer("www.example.com.", RecordType::A),
                    ["192.0.2.1"],
                    "of others"
                );
                assert_eq!(
                    answer("outside.team.svc.cluster.local.", RecordType::A),
                    ["192.0.2.1", "www.example.com."],
                    "SPEC F6"
                );
            }
        }
    }
    // One question, however often it came.
    let asked = upstream.asked.load(Ordering::Relaxed);
    assert!(
        (2..6).contains(&asked),
        "{asked}: one is to find a loop, now and then"
    );

    // glibc, as a pod has it.
    let conf = folder.path().join("resolv.conf");
    let search = "search team.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 timeout:2 attempts:2\n";
    fs::write(&conf, format!("nameserver {}\n{search}", CLUSTER_IPS[0])).unwrap();
    for (name, expected) in [
        ("pods", &[web[0].to_string(), web[1].to_string()][..]),
        (
            "web.default",
            &["10.96.0.80".to_owned(), "fd96::50".to_owned()],
        ),
        (
            "web.default.svc.cluster.local.",
            &["10.96.0.80".to_owned(), "fd96::50".to_owned()],
        ),
        ("www.example.com", &["192.0.2.1".to_owned()]),
        ("outside", &["192.0.2.1".to_owned()]),
    ] {
        let text = output(resolving(
            &lab,
            "shell",
            &conf,
            &format!("getent ahosts {name}"),
        ));
        let found: std::collections::BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        assert_eq!(
            found,
            expected.iter().map(String::as_str).collect(),
            "{name}: {text}"
        );
    }
    let reverse = output(resolving(&lab, "shell", &conf, "getent hosts 10.96.0.80"));
    assert!(
        reverse.ends_with("web.default.svc.cluster.local"),
        "{reverse}"
    );

    // A pod that is no longer ready is in no answer from the change on.
    write(&folder, "web.yaml", &pods(false));
    let ns = lab.ns("shell").unwrap();
    let begin = Instant::now();
    while records(&over_udp(&ns, own[0], "pods.team.svc.cluster.local.", RecordType::A).unwrap())
        != ["NXDomain"]
    {
        assert!(begin.elapsed() < SOON, "the change is not in the answers");
    }

    // Nobody to ask: said at once, and what the cluster knows goes on.
    drop(upstream);
    let begin = Instant::now();
    let failed = over_udp(&ns, behind[0], "other.example.com.", RecordType::A).unwrap();
    assert_eq!(records(&failed), ["ServFail"]);
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(
        records(&over_udp(&ns, behind[0], "www.example.com.", RecordType::A).unwrap()),
        ["192.0.2.1"],
        "kept"
    );
    assert_eq!(
        metric(&lab, &agent, "shunt_dns_services").as_deref(),
        Some("4")
    );
    let status = agent.json(&["status"]).unwrap();
    assert_eq!(status["dns"], serde_json::json!(["0.0.0.0:53", "[::]:53"]));
    assert_eq!(
        metric(&lab, &agent, "shunt_dns_loops").as_deref(),
        Some("0")
    );
    let errors = metric(&lab, &agent, "shunt_dns_upstream_errors_total").unwrap();
    assert!(errors.parse::<f64>().unwrap() >= 1.0, "{errors}");
}

/// A server that passes questions back is found, told of, and not asked; a port that is taken is
/// told of, and the rest serves.
#[test]
fn loops_and_taken_ports_are_told() {
    let lab = Lab::new().unwrap();
    lab.add_pod(&PodSpec::new("shell", "node-a", &[])).unwrap();
    let node_ips = lab.node_ips("node-a").unwrap();
    let folder = TempDir::new().unwrap();
    write(&folder, "kube-dns.yaml", &kube_dns(&node_ips));
    let taken = lab
        .ns("node-a")
        .unwrap()
        .run(|| UdpSocket::bind((node_ips[0], DNS)).unwrap());
    let itself = node_ips[0].to_string();
    let options = AgentOptions::manifests(folder.path())
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps()
        .args(&["--dns", "0.0.0.0", "--dns-upstream", &itself]);
    let agent = lab.start_agent("node-a", &options).unwrap();
    agent
        .wait_for(
            "cannot listen on 0.0.0.0:53: Address already in use (os error 98); another server has the port",
            SOON,
        )
        .unwrap();
    drop(taken);
    agent
        .wait_for(
            "answering for cluster.local on 0.0.0.0:53 and [::]:53",
            SOON,
        )
        .unwrap();
    agent
        .wait_for(
            &format!("the server {itself}:53 passes queries back to this one"),
            2 * SOON,
        )
        .unwrap();
    let ns = lab.ns("shell").unwrap();
    let server = SocketAddr::new(node_ips[0], DNS);
    let begin = Instant::now();
    assert_eq!(
        records(&over_udp(&ns, server, "www.example.com.", RecordType::A).unwrap()),
        ["ServFail"]
    );
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(
        records(
            &over_udp(
                &ns,
                server,
                "kube-dns.kube-system.svc.cluster.local.",
                RecordType::A
            )
            .unwrap()
        ),
        [CLUSTER_IPS[0]]
    );
    assert_eq!(
        metric(&lab, &agent, "shunt_dns_loops").as_deref(),
        Some("1")
    );
}

/// What a lookup came to: attempts that it took, or nothing. As musl does: both questions from one
/// socket that is not connected, and once more from the same one when a second has brought nothing.
fn lookup(ns: &NetNs, server: SocketAddr, n: u32) -> Option<u32> {
    let any = if server.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = ns.run(|| UdpSocket::bind(any)).ok()?;
    let name = format!("n{n}.test.");
    let mut seen = std::collections::BTreeSet::new();
    let mut buffer = [0; 4096];
    for attempt in 1..=5 {
        for (id, kind) in [(1, RecordType::A), (2, RecordType::AAAA)] {
            let _ = socket.send_to(&question(id, &name, kind, None), server);
        }
        let until = Instant::now() + Duration::from_secs(1);
        while seen.len() < 2 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            socket.set_read_timeout(Some(left)).ok()?;
            if let Ok((length, from)) = socket.recv_from(&mut buffer)
                && from == server
            {
                seen.insert(Message::from_vec(&buffer[..length]).unwrap().metadata.id);
            }
        }
        if seen.len() == 2 {
            return Some(attempt);
        }
    }
    None
}

/// D1: any DNS behind `kube-dns`: as resolvers ask, short and long answers, and a pod that dies
/// among a thousand lookups a second.
#[test]
fn any_dns_behind_kube_dns() {
    let lab = Lab::new().unwrap();
    for (pod, node) in [
        ("dns-a", "node-a"),
        ("dns-b", "node-b"),
        ("shell", "node-a"),
        ("glibc", "node-a"),
    ] {
        lab.add_pod(&PodSpec::new(pod, node, &[])).unwrap();
    }
    let folder = TempDir::new().unwrap();
    let [a, b] = ["dns-a", "dns-b"].map(|pod| lab.ips(pod).unwrap());
    write(&folder, "kube-dns.yaml", &kube_dns(&[&a[..], &b].concat()));
    let first = Server::start(&lab.ns("dns-a").unwrap(), &a, 1);
    let second = Server::start(&lab.ns("dns-b").unwrap(), &b, 2);
    let options = AgentOptions::manifests(folder.path())
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps();
    let _agents = ["node-a", "node-b"].map(|node| lab.start_agent(node, &options).unwrap());
    let ns = lab.ns("shell").unwrap();
    for server in CLUSTER_IPS.map(|ip| SocketAddr::new(ip.parse().unwrap(), DNS)) {
        // musl: one socket for both questions, not connected, and only what comes from the server
        // counts.
        let socket = ns
            .run(|| {
                UdpSocket::bind(if server.is_ipv4() {
                    "0.0.0.0:0"
                } else {
                    "[::]:0"
                })
            })
            .unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        for (id, kind) in [(1, RecordType::A), (2, RecordType::AAAA)] {
            socket
                .send_to(&question(id, "a.test.", kind, None), server)
                .unwrap();
        }
        let mut buffer = [0; 4096];
        let mut ids: Vec<u16> = (0..2)
            .map(|_| {
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!(from, server);
                Message::from_vec(&buffer[..length]).unwrap().metadata.id
            })
            .collect();
        ids.sort_unstable();
        assert_eq!(ids, [1, 2]);
        // 512 bytes, more with EDNS, all of it over TCP.
        let texts = |edns: Option<u16>| {
            let socket = connected(&ns, server, SOON).unwrap();
            socket
                .send(&question(3, "big.test.", RecordType::TXT, edns))
                .unwrap();
            let mut buffer = [0; 4096];
            let length = socket.recv(&mut buffer).unwrap();
            let message = Message::from_vec(&buffer[..length]).unwrap();
            (message.metadata.truncation, message.answers.len())
        };
        assert_eq!(texts(None), (true, 7), "{server}");
        assert_eq!(texts(Some(1232)), (true, 19), "{server}");
        assert_eq!(texts(Some(4096)), (false, 20), "{server}");
        let whole = over_tcp(&ns, server, "big.test.", RecordType::TXT).unwrap();
        assert_eq!(
            (whole.metadata.truncation, whole.answers.len()),
            (false, 20)
        );
        for _ in 0..20 {
            assert_eq!(lookup(&ns, server, 0), Some(1));
        }
    }
    assert!(
        first.asked.load(Ordering::Relaxed) > 0 && second.asked.load(Ordering::Relaxed) > 0,
        "both are asked"
    );

    // Four clients ask 1,000 a second; after two seconds the first server dies, and a second later
    // its endpoint goes. Pods of their own: where one makes both kinds, a port that a packet's flow
    // has may be a hooked socket's next.
    let conf = folder.path().join("resolv.conf");
    fs::write(
        &conf,
        format!(
            "nameserver {}\noptions timeout:1 attempts:4\n",
            CLUSTER_IPS[0]
        ),
    )
    .unwrap();
    // glibc is told of an address that nobody has (IP_RECVERR) and uses up its attempts at once, so
    // it is not asked in the second in which the dead server is still an endpoint.
    let glibc = || {
        let script = "for n in $(seq 60); do getent ahosts g$n.test >/dev/null && echo found || echo lost; done";
        let text = output(resolving(&lab, "glibc", &conf, script));
        assert_eq!(
            text.lines().filter(|line| *line == "found").count(),
            60,
            "{text}"
        );
    };
    glibc();
    let began = Instant::now();
    let clients: Vec<_> = (0..4_u32)
        .map(|client| {
            let ns = ns.clone();
            let server = SocketAddr::new(CLUSTER_IPS[client as usize % 2].parse().unwrap(), DNS);
            thread::spawn(move || {
                let mut attempts = Vec::new();
                let mut workers = Vec::new();
                for n in 0..1500_u32 {
                    // The next is due whether or not the last has its answer.
                    let due = began + Duration::from_micros(u64::from(n) * 4000);
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    let ns = ns.clone();
                    workers.push(thread::spawn(move || {
                        lookup(&ns, server, client * 10_000 + n)
                    }));
                    if workers.len() > 200 {
                        attempts.push(workers.remove(0).join().unwrap());
                    }
                }
                attempts.extend(workers.into_iter().map(|worker| worker.join().unwrap()));
                attempts
            })
        })
        .collect();
    thread::sleep(Duration::from_secs(2));
    lab.remove("dns-a").unwrap();
    drop(first);
    thread::sleep(Duration::from_secs(1));
    write(&folder, "kube-dns.yaml", &kube_dns(&b));
    let attempts: Vec<Option<u32>> = clients
        .into_iter()
        .flat_map(|client| client.join().unwrap())
        .collect();
    let again = attempts
        .iter()
        .flatten()
        .filter(|attempts| **attempts > 1)
        .count();
    eprintln!(
        "{} lookups within {:?}, {again} took more than one attempt",
        attempts.len(),
        began.elapsed()
    );
    assert_eq!(
        attempts
            .iter()
            .filter(|attempts| attempts.is_none())
            .count(),
        0,
        "lookups lost"
    );
    assert_eq!(attempts.len(), 6000);
    glibc();
}
