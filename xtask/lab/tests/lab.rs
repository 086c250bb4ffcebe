//! The lab without an agent: it is a network in which everything reaches everything, and it leaves
//! nothing behind. Needs root.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use shunt_lab::{
    Cni, Dial, Lab, Owner, PodSpec, Port, Proto, Sockets, UniqueName, manifests::Manifests,
};

const WEB: Port = Port {
    proto: Proto::Tcp,
    number: 8080,
};
const DNS: Port = Port {
    proto: Proto::Udp,
    number: 53,
};

fn two_pods(lab: &Lab) {
    lab.add_pod(&PodSpec::new("web-a", "node-a", &[WEB, DNS]))
        .unwrap();
    lab.add_pod(&PodSpec::new("web-b", "node-b", &[WEB, DNS]))
        .unwrap();
}

/// Every pod, node and outside host reaches every pod, both families and protocols, with its own
/// address.
fn everything_reaches_every_pod(lab: &Lab) {
    for from in ["web-a", "web-b", "node-a", "node-b", "client"] {
        let own = lab.ips(from).unwrap();
        for sockets in [Sockets::Hooked, Sockets::Unhooked] {
            if from == "client" && sockets == Sockets::Hooked {
                continue;
            }
            let client = lab.client(from, sockets).unwrap();
            for server in ["web-a", "web-b"] {
                for ip in lab.ips(server).unwrap() {
                    let tcp = client.tcp(SocketAddr::new(ip, WEB.number)).unwrap();
                    assert_eq!((tcp.server.as_str(), tcp.peer.ip()), (server, ip));
                    let udp = client.udp(SocketAddr::new(ip, DNS.number)).unwrap();
                    assert_eq!(
                        (udp.server.as_str(), udp.peer),
                        (server, SocketAddr::new(ip, DNS.number))
                    );
                    let udp = client
                        .udp_connected(SocketAddr::new(ip, DNS.number))
                        .unwrap();
                    assert_eq!(udp.server, server);
                    assert_eq!(udp.seen_peer, udp.local);
                    // A node has other addresses beside that of its NIC.
                    if !from.starts_with("node") {
                        assert!(
                            own.contains(&tcp.seen_peer.ip()),
                            "{from} is seen as {}",
                            tcp.seen_peer
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn routed_pods_are_reached_from_everywhere() {
    let began = Instant::now();
    let lab = Lab::new().unwrap();
    two_pods(&lab);
    eprintln!("two nodes, two pods and a client in {:?}", began.elapsed());
    everything_reaches_every_pod(&lab);
}

#[test]
fn bridged_pods_are_reached_from_everywhere() {
    let lab = Lab::builder().cni(Cni::Bridge).build().unwrap();
    two_pods(&lab);
    everything_reaches_every_pod(&lab);
}

#[test]
fn strict_reverse_path_filters_and_checksum_offload_let_plain_traffic_pass() {
    let lab = Lab::builder()
        .strict_rp_filter()
        .checksum_offload()
        .build()
        .unwrap();
    two_pods(&lab);
    everything_reaches_every_pod(&lab);
}

#[test]
fn clients_see_refusals_and_silence_as_such() {
    let lab = Lab::new().unwrap();
    two_pods(&lab);
    let client = lab.client("web-a", Sockets::Unhooked).unwrap();
    let closed = SocketAddr::new(lab.ips("web-b").unwrap()[0], 81);
    assert!(client.tcp(closed).unwrap_err().is_refused());
    assert!(client.udp(closed).unwrap_err().is_refused());
    assert!(client.udp_connected(closed).unwrap_err().is_refused());
    // The node sends to an Ethernet address that nobody has.
    let node = lab.ns("node-a").unwrap();
    node.ip(&["route add 192.0.2.8 dev eth0".to_owned()])
        .unwrap();
    node.ip(&["neighbor add 192.0.2.8 lladdr 02:00:00:00:00:01 dev eth0".to_owned()])
        .unwrap();
    let silent = "192.0.2.8:80".parse().unwrap();
    let error = client
        .once(
            Proto::Tcp,
            silent,
            &Dial::within(Duration::from_millis(200)),
        )
        .unwrap_err();
    assert!(error.is_timeout(), "{error}");
    // Time-outs are rounded to whole milliseconds on their way into the kernel.
    assert!(
        error.after().unwrap() > Duration::from_millis(190),
        "{error}"
    );
}

#[test]
fn open_sockets_keep_their_server_and_large_requests_pass() {
    let lab = Lab::new().unwrap();
    two_pods(&lab);
    let client = lab.client("client", Sockets::Unhooked).unwrap();
    for ip in lab.ips("web-b").unwrap() {
        let tcp = client.open_tcp(SocketAddr::new(ip, WEB.number)).unwrap();
        let udp = client
            .open_udp(SocketAddr::new(ip, DNS.number), &Dial::default())
            .unwrap();
        for text in ["one", "two", "two words"] {
            assert_eq!(tcp.ask(text).unwrap().echo, text);
            assert_eq!(udp.ask(text).unwrap().echo, text);
        }
        // More than one packet and, for UDP, fragments.
        let long = "y".repeat(20_000);
        assert_eq!(tcp.ask(&long).unwrap().echo, long);
        assert_eq!(udp.ask(&long).unwrap().echo, long);
        let local = SocketAddr::new(tcp.local.ip(), 20_000);
        assert_eq!(
            client
                .once(
                    Proto::Tcp,
                    SocketAddr::new(ip, WEB.number),
                    &Dial::from(local)
                )
                .unwrap()
                .seen_peer,
            local
        );
    }
}

#[test]
fn more_connections_than_a_client_has_ports_are_counted() {
    let lab = Lab::new().unwrap();
    two_pods(&lab);
    let client = lab.client("web-a", Sockets::Hooked).unwrap();
    // A smaller range makes it quick.
    lab.ns("web-a")
        .unwrap()
        .sysctl(&[("ipv4.ip_local_port_range", "40000 40099")])
        .unwrap();
    let to = SocketAddr::new(lab.ips("web-b").unwrap()[0], WEB.number);
    let many = client.many(Proto::Tcp, to, 500, &Dial::default()).unwrap();
    assert_eq!(
        many.servers,
        [("web-b".to_owned(), 500)].into(),
        "{:?}",
        many.errors
    );
    assert!(many.quantile(0.5).unwrap() <= many.quantile(1.0).unwrap());
}

#[test]
fn service_addresses_reach_the_node_they_are_routed_to() {
    let lab = Lab::new().unwrap();
    let client = lab.client("client", Sockets::Unhooked).unwrap();
    for (address, node) in [
        ("198.51.100.80", "node-a"),
        ("2001:db8:198::80", "node-a"),
        ("10.96.0.10", "node-b"),
    ] {
        let prefix = if address.contains(':') { 128 } else { 32 };
        lab.route(&format!("{address}/{prefix}"), node).unwrap();
        lab.ns(node)
            .unwrap()
            // Usable at once: no search for a duplicate (RFC 4862), which IPv4 does not know.
            .ip(&[format!(
                "address add {address}/{prefix} dev lo{}",
                if prefix == 128 { " nodad" } else { "" }
            )])
            .unwrap();
        let server = lab.client(node, Sockets::Unhooked).unwrap();
        let to = SocketAddr::new(address.parse().unwrap(), 80);
        server.serve(node, &[(Proto::Tcp, to)]).unwrap();
        assert_eq!(client.tcp(to).unwrap().server, node);
    }
}

#[test]
fn outside_hosts_of_any_address_answer_and_pods_come_and_go() {
    let lab = Lab::new().unwrap();
    two_pods(&lab);
    let external: IpAddr = "192.0.2.42".parse().unwrap();
    lab.add_outside("external", &[external], &[Port::tcp(9376)])
        .unwrap();
    let client = lab.client("web-a", Sockets::Hooked).unwrap();
    assert_eq!(
        client.tcp(SocketAddr::new(external, 9376)).unwrap().server,
        "external"
    );

    let web_b = SocketAddr::new(lab.ips("web-b").unwrap()[0], WEB.number);
    lab.set_serving("web-b", &[]).unwrap();
    assert!(client.tcp(web_b).unwrap_err().is_refused());
    lab.set_serving("web-b", &[WEB]).unwrap();
    assert_eq!(client.tcp(web_b).unwrap().server, "web-b");
    lab.remove("web-b").unwrap();
    assert!(
        client
            .once(Proto::Tcp, web_b, &Dial::within(Duration::from_millis(200)))
            .is_err()
    );
    let again = PodSpec {
        ips: vec![web_b.ip()],
        ..PodSpec::new("web-b", "node-b", &[WEB])
    };
    lab.add_pod(&again).unwrap();
    assert_eq!(client.tcp(web_b).unwrap().server, "web-b");
    let twin = PodSpec {
        name: "twin".to_owned(),
        ..again
    };
    assert!(
        format!("{:#}", lab.add_pod(&twin).unwrap_err()).contains("web-b has the same address")
    );
}

#[test]
fn pods_follow_an_edited_manifest() {
    let lab = Lab::new().unwrap();
    let pod = |ip: &str, port| PodSpec {
        ips: vec![ip.parse().unwrap()],
        ..PodSpec::new("web", "node-a", &[Port::tcp(port)])
    };
    let manifests = |pods: &[PodSpec]| Manifests {
        pods: pods.to_vec(),
        ..Manifests::default()
    };
    let client = lab.client("node-b", Sockets::Hooked).unwrap();
    let dial = Dial::within(Duration::from_millis(300));
    let answers = |to: &str| client.once(Proto::Tcp, to.parse().unwrap(), &dial).is_ok();

    let first = manifests(&[pod("10.44.0.7", 80)]);
    first.make(&lab).unwrap();
    assert!(answers("10.44.0.7:80"));
    let second = manifests(&[pod("10.44.0.8", 81)]);
    second.follow(&first, &lab).unwrap();
    assert!(!answers("10.44.0.7:80") && answers("10.44.0.8:81"));
    manifests(&[]).follow(&second, &lab).unwrap();
    assert!(!answers("10.44.0.8:81") && !lab.has("web"));
}

#[test]
fn hooked_processes_are_in_their_nodes_cgroup_and_others_are_not() {
    let lab = Lab::new().unwrap();
    two_pods(&lab);
    let cgroup = lab.node_cgroup("node-a");
    let inside = |pid: u32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let of_process = line
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .unwrap()
            .to_owned();
        let root = shunt_lab::cgroup_mount_point().unwrap();
        Path::new(&format!("{}{of_process}", root.display())).starts_with(&cgroup)
    };
    assert!(inside(lab.client("web-a", Sockets::Hooked).unwrap().pid()));
    assert!(inside(lab.client("node-a", Sockets::Hooked).unwrap().pid()));
    assert!(!inside(
        lab.client("web-a", Sockets::Unhooked).unwrap().pid()
    ));
    assert!(!inside(lab.client("web-b", Sockets::Hooked).unwrap().pid()));
    assert!(lab.client("client", Sockets::Hooked).is_err());
}

/// A lab's namespaces and cgroup, by inode.
fn traces(prefix: &str) -> BTreeSet<u64> {
    let namespaces = fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("{prefix}-"))
        });
    let cgroup = shunt_lab::cgroup_mount_point().unwrap().join(prefix);
    let paths = namespaces.map(|entry| entry.path()).chain([cgroup]);
    paths
        .filter_map(|path| fs::metadata(path).ok())
        .map(|data| data.ino())
        .collect()
}

fn alive(pids: &[i32]) -> Vec<i32> {
    pids.iter()
        .copied()
        .filter(|pid| Path::new(&format!("/proc/{pid}")).exists())
        .collect()
}

#[test]
fn a_lab_dropped_by_a_panic_leaves_no_namespace_cgroup_or_process() {
    let lab = Lab::new().unwrap();
    two_pods(&lab);
    let client = lab.client("node-a", Sockets::Hooked).unwrap();
    let (prefix, pids) = (lab.prefix(), lab.processes());
    let made = traces(&prefix);
    // Fabric, two nodes, two pods, an outside host, and the cgroup; two servers and a client.
    assert_eq!((made.len(), alive(&pids).len()), (7, 3));
    let panicked = thread::spawn(move || {
        let (_lab, _client) = (lab, client);
        panic!("this test's lab is dropped while unwinding");
    })
    .join();
    assert!(panicked.is_err());
    assert!(
        traces(&prefix).is_disjoint(&made),
        "namespaces or cgroup of {prefix} are left"
    );
    assert_eq!(alive(&pids), Vec::<i32>::new());
}

/// Set for the process that plays the killed run.
const KILLED_RUN: &str = "SHUNT_LAB_TEST_KILLED_RUN";

#[test]
fn what_a_killed_run_leaves_is_swept_and_living_labs_are_not() {
    if std::env::var_os(KILLED_RUN).is_some() {
        let lab = Lab::new().unwrap();
        two_pods(&lab);
        println!("\nlab {}", lab.prefix());
        loop {
            thread::park();
        }
    }
    let mut child = Command::new("/proc/self/exe")
        .args([
            "--exact",
            "--nocapture",
            "what_a_killed_run_leaves_is_swept_and_living_labs_are_not",
        ])
        .env(KILLED_RUN, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let prefix = lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("lab ").map(str::to_owned))
        .unwrap();
    let made = traces(&prefix);
    assert_eq!(made.len(), 7);
    Lab::sweep_stale().unwrap();
    assert_eq!(traces(&prefix), made, "the other process lives");
    child.kill().unwrap();
    child.wait().unwrap();
    Lab::sweep_stale().unwrap();
    assert!(
        traces(&prefix).is_disjoint(&made),
        "namespaces or cgroup of {prefix} are left"
    );
}

/// Set for the processes that make and drop labs, and sweep.
const BUSY_RUN: &str = "SHUNT_LAB_TEST_BUSY_RUN";

/// Six processes make labs and sweep at once, and some of them are killed in the middle of it.
#[test]
fn labs_that_begin_and_end_at_once_take_nothing_from_each_other() {
    const NAME: &str = "labs_that_begin_and_end_at_once_take_nothing_from_each_other";
    if std::env::var_os(BUSY_RUN).is_some() {
        let cgroups = shunt_lab::cgroup_mount_point().unwrap();
        for n in 0..200 {
            let name = UniqueName::take().unwrap();
            let cgroup = cgroups.join(name.prefix());
            fs::create_dir(&cgroup).unwrap();
            if n % 10 == 0 {
                Lab::sweep_stale().unwrap();
            }
            assert!(cgroup.exists());
            drop(name);
        }
        for _ in 0..3 {
            let lab = Lab::builder().nodes(&["node-a"]).build().unwrap();
            println!("\nlab {}", lab.prefix());
            let held = lab.ns("node-a").unwrap();
            Lab::sweep_stale().unwrap();
            // Fabric, a node, an outside host; the node's cgroup.
            assert_eq!(traces(&lab.prefix()).len(), 4);
            held.output("ip", &["link", "show", "eth0"]).unwrap();
            drop(lab);
            // What is dropped late must not remove what another lab has made.
            drop(held);
        }
        return;
    }
    let start = || {
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["--exact", "--nocapture", NAME])
            .env(BUSY_RUN, "1");
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let busy: Vec<_> = (0..4).map(|_| start()).collect();
    let killed: Vec<_> = [30, 120]
        .into_iter()
        .map(|delay| {
            let mut child = start();
            thread::sleep(Duration::from_millis(delay));
            child.kill().unwrap();
            child
        })
        .collect();
    for child in busy {
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let killed: Vec<String> = killed
        .into_iter()
        .flat_map(|child| {
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let names = text.lines().filter_map(|line| line.strip_prefix("lab "));
            names.map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    Lab::sweep_stale().unwrap();
    for prefix in killed {
        assert!(traces(&prefix).is_empty(), "{prefix} is left");
    }
}

#[test]
fn a_name_tells_its_owner() {
    let name = UniqueName::take().unwrap();
    for whole in [name.prefix(), format!("{}-node-a", name.prefix())] {
        let Owner::Lab { alive, .. } = shunt_lab::owner(&whole) else {
            panic!("{whole} is a lab's");
        };
        assert!(alive, "{whole}");
    }
    let prefix = name.prefix();
    drop(name);
    // The process is all that the name tells then.
    assert_eq!(shunt_lab::owner(&prefix), Owner::Process { alive: true });
    assert_eq!(
        shunt_lab::owner("shunt-test-4000000000-1"),
        Owner::Process { alive: false }
    );
    assert_eq!(shunt_lab::owner("shunt"), Owner::Unknown);
}
