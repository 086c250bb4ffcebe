//! The agent as a process: a network namespace and cgroup of its own, manifests, real connections
//! from both families, the command line beside it, and what becomes of all that when it is stopped,
//! killed and started again.
//!
//! Needs root, a bpf file system at /sys/fs/bpf, cgroup2 and `ip`, `nsenter` and `bash`.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, TcpListener},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use shunt_lab::UniqueName;

pub(super) const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
/// Longest wait for an agent's programs to be verified, which takes seconds on a machine with
/// nothing else to do.
const READY: Duration = Duration::from_secs(90);
/// Longest wait for anything that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// A namespace with the addresses of a node and its pods, a cgroup, a bpf root and a folder of
/// manifests.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) cgroup: PathBuf,
    pub(super) bpf_root: PathBuf,
    pub(super) manifests: tempfile::TempDir,
    /// Last: whatever has its name goes with it.
    _unique: UniqueName,
}

fn sh(script: &str) {
    let output = Command::new("bash")
        .args(["-ec", script])
        .output()
        .expect("bash");
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Node {
    pub(super) fn new() -> Self {
        let unique = UniqueName::take().unwrap();
        let name = unique.prefix();
        let cgroup2 = shunt::datapath::cgroup::default_root();
        let node = Self {
            cgroup: cgroup2.join(&name),
            bpf_root: Path::new("/sys/fs/bpf").join(&name),
            manifests: tempfile::tempdir().unwrap(),
            name,
            _unique: unique,
        };
        fs::create_dir(&node.cgroup).expect("root and cgroup2");
        sh(&format!(
            "ip netns add {0}
             in_node() {{ nsenter --net=/run/netns/{0} ip \"$@\"; }}
             in_node link set lo up
             in_node link add eth0 type veth peer name peer0
             in_node link set eth0 up; in_node link set peer0 up
             in_node addr add 192.0.2.1/24 dev eth0
             in_node addr add 2001:db8::1/64 dev eth0 nodad
             in_node route add default via 192.0.2.254
             for pod in 10.244.0.1/32 10.244.0.2/32; do in_node addr add $pod dev lo; done
             for pod in fd00:244::1/128 fd00:244::2/128; do in_node addr add $pod dev lo nodad; done",
            node.name
        ));
        for n in 1..=2 {
            node.serve(&format!("10.244.0.{n}"), &format!("pod{n}"));
            node.serve(&format!("fd00:244::{n}"), &format!("pod{n}"));
        }
        node
    }

    /// A server in the namespace that tells everybody its name. Its thread ends with the test
    /// process.
    fn serve(&self, address: &str, answer: &str) {
        let (ready, wait) = std::sync::mpsc::channel();
        let namespace = fs::File::open(Path::new("/run/netns").join(&self.name)).unwrap();
        let address: IpAddr = address.parse().unwrap();
        let answer = format!("{answer}\n");
        thread::spawn(move || {
            // SAFETY: moves this thread alone, by a descriptor that is open.
            let moved = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(moved, 0, "setns: {}", std::io::Error::last_os_error());
            let listener = TcpListener::bind((address, 8080)).unwrap();
            ready.send(()).unwrap();
            for stream in listener.incoming().flatten() {
                let _ = (&stream).write_all(answer.as_bytes());
            }
        });
        wait.recv_timeout(PATIENCE).expect("a server");
    }

    pub(super) fn manifest(&self, name: &str, text: &str) {
        // As editors do: written beside it, then moved into place.
        let new = self.manifests.path().join(format!(".{name}.new"));
        fs::write(&new, text).unwrap();
        fs::rename(new, self.manifests.path().join(name)).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .arg(SHUNT);
        command
    }

    pub(super) fn start(&self, more: &[&str]) -> Agent {
        let [manifests, bpf_root, cgroup] = [self.manifests.path(), &self.bpf_root, &self.cgroup]
            .map(|path| path.display().to_string());
        let source = ["--node-name", "node-a", "--manifests", &manifests];
        let places = ["--bpf-root", &bpf_root, "--cgroup-root", &cgroup];
        let small = [
            "--max-flows",
            "1024",
            "--max-new-flows",
            "1024",
            "--max-snat",
            "20000",
        ];
        self.start_with(&[&source[..], &places, &small, more].concat())
    }

    fn start_with(&self, args: &[&str]) -> Agent {
        Agent::spawn(self.command().arg("run").args(args))
    }

    fn shunt(&self, args: &[&str]) -> Output {
        self.command()
            .args(args)
            .arg("--bpf-root")
            .arg(&self.bpf_root)
            .output()
            .expect("shunt")
    }

    pub(super) fn json(&self, args: &[&str]) -> Value {
        let output = self.shunt(&[args, &["-o", "json"]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "shunt {args:?}: {stderr}");
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("shunt {args:?}: {error}"))
    }

    /// Asserts that one pod answers at all of [`FRONTENDS`].
    fn is_answered_by(&self, pod: &str) {
        for (address, port) in FRONTENDS {
            assert_eq!(
                self.dial(address, port).as_deref(),
                Some(pod),
                "{address} port {port}"
            );
        }
    }

    /// Who answers a process in the node's cgroup that connects; `None` when it is refused.
    pub(super) fn dial(&self, address: &str, port: u16) -> Option<String> {
        let script = format!(
            "echo $$ > {}/cgroup.procs; exec nsenter --net=/run/netns/{} timeout 5 bash -c 'exec 3<>/dev/tcp/{address}/{port} || exit 1; cat <&3'",
            self.cgroup.display(),
            self.name
        );
        let output = Command::new("bash")
            .args(["-c", &script])
            .output()
            .expect("bash");
        let stderr = String::from_utf8_lossy(&output.stderr);
        match output.status.success() {
            true => Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false if stderr.contains("refused") => None,
            false => panic!("{address} port {port}: {stderr}"),
        }
    }

    /// Waits until `condition` holds.
    fn until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.shunt(&["cleanup"]);
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
        // Processes that have ended leave the cgroup with a delay.
        for _ in 0..50 {
            if fs::remove_dir(&self.cgroup).is_ok() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

pub(super) struct Agent {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
    log: std::sync::Arc<std::sync::Mutex<String>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Agent {
    pub(super) fn spawn(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("nsenter");
        let (lines_tx, lines) = std::sync::mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            stdout
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| lines_tx.send(line))
        });
        let log = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log_of_thread = log.clone();
        let reader = thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                *log_of_thread.lock().unwrap() += &(line + "\n");
            }
        });
        Self {
            child,
            lines,
            log,
            reader: Some(reader),
        }
    }

    /// The line on stdout.
    pub(super) fn ready(&self) -> String {
        match self.lines.recv_timeout(READY) {
            Ok(line) => line,
            Err(_) => panic!("not ready: {}", self.log()),
        }
    }

    pub(super) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Sends a signal; returns the exit code, which a signal's death has not, and all that was
    /// logged.
    pub(super) fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
        self.wait()
    }

    fn wait(&mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        self.reader.take().unwrap().join().unwrap();
        (code, self.log())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  ipFamilyPolicy: PreferDualStack
  clusterIPs: [10.96.0.10, 'fd00:10:96::10']
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
";

pub(super) fn pod(n: u8) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: web-{n}, namespace: shop, labels: {{app: web}}}}
spec: {{nodeName: node-a, containers: [{{name: web, image: web}}]}}
status:
  phase: Running
  podIP: 10.244.0.{n}
  podIPs: [{{ip: 10.244.0.{n}}}, {{ip: 'fd00:244::{n}'}}]
  conditions: [{{type: Ready, status: 'True'}}]
"
    )
}

/// Everything that a process on the node can dial.
pub(super) const FRONTENDS: [(&str, u16); 6] = [
    ("10.96.0.10", 80),
    ("fd00:10:96::10", 80),
    ("192.0.2.1", 30080),
    ("2001:db8::1", 30080),
    ("127.0.0.1", 30080),
    ("::1", 30080),
];

#[test]
fn manifests_become_connections_and_the_command_line_shows_them() {
    let node = Node::new();
    node.manifest("web.yaml", SERVICE);
    node.manifest("pod1.yaml", &pod(1));
    let agent = node.start(&[]);
    let ready = agent.ready();
    assert!(
        ready.starts_with("ready: 1 services, 2 backends, took "),
        "{ready}"
    );

    node.is_answered_by("pod1");
    let services = node.json(&["services", "-n", "shop"]);
    assert_eq!(
        services.as_array().unwrap().len(),
        4,
        "two cluster IPs, a node port in two families: {services}"
    );
    assert!(
        services
            .as_array()
            .unwrap()
            .iter()
            .all(|row| row["internal"]["backends"] == 1),
        "{services}"
    );
    let backends = node.json(&["backends", "web"]);
    let flows: u64 = backends
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|row| row["flows"]["socket"].as_u64())
        .sum();
    assert_eq!(flows, 6, "{backends}");
    assert!(
        backends
            .as_array()
            .unwrap()
            .iter()
            .all(|row| row["local"] == true),
        "{backends}"
    );
    let status = node.json(&["status"]);
    assert_eq!(status["events"]["socket_flow"], 6);
    assert!(status["agentPid"].is_u64(), "{status}");
    let links = status["links"].as_array().unwrap();
    let attached = |target: &str, program: &str| {
        links.iter().any(|link| {
            link["target"] == target && link["program"] == program && link["attached"] == true
        })
    };
    assert!(
        attached("cgroup", "sock_connect6") && attached("eth0", "tc_node_in"),
        "{status}"
    );
    assert!(node.json(&["conntrack"]).is_array());

    // A second pod joins, then the first leaves, then all leave: refused at once.
    node.manifest("pod2.yaml", &pod(2));
    node.until("both pods answer", || {
        let answers: Vec<_> = (0..8).filter_map(|_| node.dial("10.96.0.10", 80)).collect();
        answers.contains(&"pod1".into()) && answers.contains(&"pod2".into())
    });
    fs::remove_file(node.manifests.path().join("pod1.yaml")).unwrap();
    node.until("pod2 alone answers", || {
        (0..8).all(|_| node.dial("fd00:10:96::10", 80).as_deref() == Some("pod2"))
    });
    fs::remove_file(node.manifests.path().join("pod2.yaml")).unwrap();
    node.until("connections are refused", || {
        node.dial("10.96.0.10", 80).is_none()
    });

    // A mistake is told, and what else is there goes on.
    node.manifest("pod1.yaml", &pod(1));
    node.manifest(
        "broken.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {ports: [{port: 70000}]}\n",
    );
    node.until("the mistake is told", || {
        agent.log().contains("spec.ports[0].port")
    });
    node.until("pod1 answers", || {
        node.dial("127.0.0.1", 30080).as_deref() == Some("pod1")
    });

    let (code, log) = agent.end(Signal::TERM);
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn the_datapath_goes_on_without_the_agent_and_a_restart_changes_nothing() {
    let node = Node::new();
    node.manifest("web.yaml", SERVICE);
    node.manifest("pod1.yaml", &pod(1));
    let first = node.start(&[]);
    first.ready();
    let link_ids = || {
        let status = node.json(&["status"]);
        let mut ids: Vec<_> = status["links"]
            .as_array()
            .unwrap()
            .iter()
            .map(|link| link["link"].as_u64())
            .collect();
        ids.sort();
        ids
    };
    let (ids, services) = (link_ids(), node.json(&["services"]));

    // One agent per --bpf-root.
    let mut second = node.start(&[]);
    let (code, log) = second.wait();
    assert_eq!(code, Some(1));
    assert!(
        log.contains("another shunt") && log.contains(&node.bpf_root.display().to_string()),
        "{log}"
    );
    assert_eq!(log.trim().lines().count(), 1, "{log}");

    first.end(Signal::KILL);
    assert_eq!(node.json(&["status"])["agentPid"], Value::Null);
    for (address, port) in FRONTENDS {
        assert_eq!(
            node.dial(address, port).as_deref(),
            Some("pod1"),
            "{address} port {port} without an agent"
        );
    }
    assert_eq!(node.json(&["services"]), services);
    let flows = |node: &Node| node.json(&["backends", "shop/web"])[0]["flows"]["socket"].clone();
    let before = flows(&node);
    assert_ne!(before, 0);

    // While no agent runs a Service is deleted and another one made.
    fs::remove_file(node.manifests.path().join("web.yaml")).unwrap();
    node.manifest(
        "web.yaml",
        &SERVICE.replace("'fd00:10:96::10'", "'fd00:10:96::11'"),
    );
    node.manifest(
        "other.yaml",
        &SERVICE
            .replace("web, ", "other, ")
            .replace("::10'", "::12'")
            .replace("0.10,", "0.12,")
            .replace("30080", "30081"),
    );
    let second = node.start(&[]);
    let ready = second.ready();
    assert!(ready.starts_with("ready: 2 services"), "{ready}");
    assert_eq!(link_ids(), ids, "links are kept, not made anew");
    assert_eq!(node.dial("10.96.0.10", 80).as_deref(), Some("pod1"));
    assert_eq!(node.dial("fd00:10:96::11", 80).as_deref(), Some("pod1"));
    assert_eq!(node.dial("10.96.0.12", 80).as_deref(), Some("pod1"));
    let addresses: Vec<_> = node
        .json(&["services"])
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["address"].clone())
        .collect();
    assert!(
        !addresses.contains(&"fd00:10:96::10".into()),
        "{addresses:?}"
    );
    assert!(flows(&node).as_u64() >= before.as_u64(), "counters go on");

    let (code, log) = second.end(Signal::INT);
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(node.dial("10.96.0.10", 80).as_deref(), Some("pod1"));
}

#[test]
fn a_full_map_is_told_by_its_setting_and_the_rest_serves() {
    let node = Node::new();
    node.manifest("web.yaml", SERVICE);
    node.manifest("pod1.yaml", &pod(1));
    let agent = node.start(&["--max-frontends", "6"]);
    agent.ready();
    node.manifest(
        "other.yaml",
        &SERVICE
            .replace("web, ", "other, ")
            .replace("::10'", "::12'")
            .replace("0.10,", "0.12,")
            .replace("30080", "30081"),
    );
    node.until("the full map is told", || {
        agent.log().contains("--max-frontends")
    });
    let line = agent
        .log()
        .lines()
        .find(|line| line.contains("--max-frontends"))
        .unwrap()
        .to_owned();
    assert!(line.contains("Service shop/other: map frontends"), "{line}");
    node.is_answered_by("pod1");
    // Room appears: what did not fit is brought in without being asked for.
    fs::remove_file(node.manifests.path().join("web.yaml")).unwrap();
    node.until("the other Service is served", || {
        node.dial("10.96.0.12", 80).as_deref() == Some("pod1")
    });
}

#[test]
fn settings_that_cannot_be_end_the_agent_with_one_line() {
    let node = Node::new();
    for (more, wanted) in [
        (&["--max-snat", "100"][..], "--max-snat"),
        (
            &["--nodeport-addresses", "everywhere"],
            "--nodeport-addresses everywhere",
        ),
        (&["--cgroup-root", "/proc"], "/proc"),
    ] {
        // The last of two equal flags would be an error of its own: leave out those that are given.
        let mut command = node.command();
        command
            .args(["run", "--manifests"])
            .arg(node.manifests.path())
            .arg("--bpf-root")
            .arg(&node.bpf_root);
        if more[0] != "--cgroup-root" {
            command.arg("--cgroup-root").arg(&node.cgroup);
        }
        let output = command.args(more).output().expect("shunt");
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.trim().lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(1), "{more:?}: {stderr}");
        assert!(
            last.starts_with("shunt: ") && last.contains(wanted),
            "{more:?}: {stderr}"
        );
        assert!(output.stdout.is_empty(), "{more:?}");
    }
}

const CONFIGURATION: &str = "\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 192.0.2.9
hostnameOverride: node-a
healthzBindAddress: 192.0.2.1:11256
ipvs: {scheduler: rr}
nodePortAddresses: [192.0.2.0/24, 2001:db8:9::/48]
---
apiVersion: shunt.dev/v1alpha1
kind: ShuntConfiguration
manifests: [MANIFESTS]
bpfRoot: BPF_ROOT
cgroupRoot: CGROUP
capacities: {flows: 1024, newFlows: 1024, snat: 20000}
xdp: off
";

#[test]
fn a_configuration_file_is_all_that_an_agent_needs() {
    let node = Node::new();
    node.manifest("web.yaml", SERVICE);
    node.manifest("pod1.yaml", &pod(1));
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.yaml");
    let text = CONFIGURATION
        .replace("MANIFESTS", &node.manifests.path().display().to_string())
        .replace("BPF_ROOT", &node.bpf_root.display().to_string())
        .replace("CGROUP", &node.cgroup.display().to_string());
    fs::write(&config, text).unwrap();

    let dump = |config: &Path| {
        let output = node
            .command()
            .args(["run", "--dump-config", "--config"])
            .arg(config)
            .output()
            .unwrap();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        (
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (dumped, warnings) = dump(&config);
    let unused = "KubeProxyConfiguration: shunt has no use for ipvs.scheduler: ignored";
    assert!(
        warnings.contains(unused) && warnings.trim().lines().count() == 1,
        "{warnings}"
    );
    let again = folder.path().join("again.yaml");
    fs::write(&again, &dumped).unwrap();
    assert_eq!(dump(&again), (dumped, String::new()));

    sh(&format!(
        "nsenter --net=/run/netns/{} ip addr add 192.0.2.9/24 dev eth0",
        node.name
    ));
    let agent = node.start_with(&["--config", &config.display().to_string()]);
    agent.ready();
    let addresses = "node addresses: [192.0.2.9, 192.0.2.1, 2001:db8::1]";
    assert!(
        agent.log().contains(addresses),
        "the source is as told: {}",
        agent.log()
    );
    assert!(agent.log().contains(unused), "{}", agent.log());
    assert_eq!(node.dial("10.96.0.10", 80).as_deref(), Some("pod1"));
    assert_eq!(node.dial("192.0.2.1", 30080).as_deref(), Some("pod1"));
    assert_eq!(
        node.dial("2001:db8::1", 30080),
        None,
        "nodePortAddresses has no such address"
    );
    let healthz = "exec 3<>/dev/tcp/192.0.2.1/11256; printf 'GET /healthz HTTP/1.0\\r\\n\\r\\n' >&3; grep -q '200 OK' <&3";
    sh(&format!(
        "nsenter --net=/run/netns/{} timeout 5 bash -ec \"{healthz}\"",
        node.name
    ));
    let status = node.json(&["status"]);
    let links = status["links"].as_array().unwrap();
    assert!(
        links.iter().all(|link| link["program"] != "xdp_node"),
        "{status}"
    );
}

/// What cannot be ends the agent with one line that names it; what can heal is told once and tried
/// again.
#[test]
fn a_configuration_that_cannot_be_is_told_in_one_line() {
    let node = Node::new();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.yaml");
    let file = config.display().to_string();
    let ours = "apiVersion: shunt.dev/v1alpha1\nkind: ShuntConfiguration\n";
    let theirs = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    for (text, wanted) in [
        (
            None,
            format!("--config {file}: cannot be read: No such file or directory"),
        ),
        (
            Some(format!("{theirs}clusterCIDR: 10.244.0.0\n")),
            format!("{file}:3: KubeProxyConfiguration: clusterCIDR: `10.244.0.0`"),
        ),
        (
            Some(format!("{ours}snatPorts: 0-1\n")),
            format!("{file}:3: ShuntConfiguration: snatPorts: `0-1`"),
        ),
        (
            Some(format!("{theirs}nodePortAddresses: [primary, none]\n")),
            format!(
                "{file}:3: KubeProxyConfiguration: nodePortAddresses[1]: `none`: give networks"
            ),
        ),
        (
            Some(format!("{theirs}conntrack: {{udpTimeout: -5m}}\n")),
            format!(
                "{file}:3: KubeProxyConfiguration: conntrack.udpTimeout: `-5m`: give a duration"
            ),
        ),
        (
            Some(format!("{ours}capacities: {{snat: 100}}\n")),
            "--max-snat".to_owned(),
        ),
        (
            Some(format!(
                "{theirs}clientConnection: {{kubeconfig: /nonexistent/kubeconfig}}\n"
            )),
            "/nonexistent/kubeconfig".to_owned(),
        ),
        (Some(ours.to_owned()), "give --kubeconfig FILE".to_owned()),
    ] {
        match text {
            Some(text) => fs::write(&config, text).unwrap(),
            None => assert!(!config.exists()),
        }
        let mut command = node.command();
        command.args(["run", "--config"]).arg(&config);
        command
            .arg("--bpf-root")
            .arg(&node.bpf_root)
            .arg("--cgroup-root")
            .arg(&node.cgroup);
        if wanted == "--max-snat" {
            command.arg("--manifests").arg(node.manifests.path());
        }
        let output = command.output().expect("shunt");
        let stderr = String::from_utf8_lossy(&output.stderr);
        let errors: Vec<_> = stderr
            .lines()
            .filter(|line| !line.contains(" INFO "))
            .collect();
        assert_eq!(output.status.code(), Some(1), "{wanted}: {stderr}");
        assert_eq!(errors.len(), 1, "{wanted}: {stderr}");
        assert!(
            errors[0].starts_with("shunt: ") && errors[0].contains(&wanted),
            "{wanted}: {stderr}"
        );
    }
}

/// `bindAddressHardFail`: whoever would rather have the agent restarted than without its health
/// check gets that.
#[test]
fn a_port_in_use_ends_an_agent_that_is_told_so() {
    let node = Node::new();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.yaml");
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nbindAddressHardFail: true\n";
    // A pod's server has the port.
    for setting in ["healthz", "metrics"] {
        fs::write(
            &config,
            format!("{head}{setting}BindAddress: 10.244.0.1:8080\n"),
        )
        .unwrap();
        let (code, log) = node
            .start(&["--config", &config.display().to_string()])
            .wait();
        let lines: Vec<_> = log
            .lines()
            .filter(|line| line.starts_with("shunt: "))
            .collect();
        assert_eq!((code, lines.len()), (Some(1), 1), "{log}");
        let told = format!(
            "shunt: --{setting}-bind-address: cannot listen on 10.244.0.1:8080: Address already in use"
        );
        assert!(lines[0].starts_with(&told), "{log}");
    }
}

#[test]
fn an_unknown_field_and_a_port_in_use_are_told_and_the_agent_serves() {
    let node = Node::new();
    node.manifest("web.yaml", SERVICE);
    node.manifest("pod1.yaml", &pod(1));
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.yaml");
    // A pod's server has the port.
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nhealthzBindAdress: ''\nhealthzBindAddress: 10.244.0.1:8080\niptables: {localhostNodePorts: false}\n";
    fs::write(&config, text).unwrap();
    let agent = node.start(&["--config", &config.display().to_string()]);
    agent.ready();
    assert_eq!(node.dial("10.96.0.10", 80).as_deref(), Some("pod1"));
    assert_eq!(node.dial("192.0.2.1", 30080).as_deref(), Some("pod1"));
    assert_eq!(
        (node.dial("127.0.0.1", 30080), node.dial("::1", 30080)),
        (None, None),
        "localhostNodePorts"
    );
    let told = |words: &str| {
        agent
            .log()
            .lines()
            .filter(|line| line.contains(words))
            .count()
    };
    assert_eq!(
        told(":3: KubeProxyConfiguration: healthzBindAdress: no such field"),
        1,
        "{}",
        agent.log()
    );
    node.until("the port is told", || {
        told("cannot listen on 10.244.0.1:8080") > 0
    });
    thread::sleep(Duration::from_secs(2));
    assert_eq!(
        told("cannot listen on 10.244.0.1:8080"),
        1,
        "{}",
        agent.log()
    );
}
