//! A running agent whose `--config` file changes as a mounted ConfigMap does.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use shunt::datapath::maps::Maps;
use shunt_common::layout::CONFIG_ANSWER_PING;
use shunt_lab::{Agent, AgentOptions, Lab, PodSpec, Port, Sockets};

/// Longest wait for what takes milliseconds, or five seconds where the kernel does not tell.
const PATIENCE: Duration = Duration::from_secs(20);

const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: { name: web, namespace: shop }
spec:
  type: NodePort
  clusterIP: 10.96.0.80
  selector: { app: web }
  ports: [{ port: 80, targetPort: 8080, nodePort: 30080 }]
---
apiVersion: v1
kind: Pod
metadata: { name: web-1, namespace: shop, labels: { app: web } }
spec: { nodeName: node-a, containers: [{ name: web }] }
status: { podIPs: [{ ip: 10.44.0.11 }], conditions: [{ type: Ready, status: "True" }] }
"#;

/// A folder as the kubelet mounts a ConfigMap: `config.yaml` → `..data/config.yaml`, `..data` → a
/// folder of its own for each version (`AtomicWriter` of Kubernetes' volume utilities).
struct ConfigMap(tempfile::TempDir);

impl ConfigMap {
    fn new(text: &str) -> Self {
        let map = Self(tempfile::tempdir().unwrap());
        map.swap(text);
        symlink("..data/config.yaml", map.file()).unwrap();
        map
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("config.yaml")
    }

    /// The next version, put in place by one rename.
    fn swap(&self, text: &str) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("..2026_11_27.{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = self.0.path();
        let old = fs::read_link(folder.join("..data")).ok();
        fs::create_dir(folder.join(&name)).unwrap();
        fs::write(folder.join(&name).join("config.yaml"), text).unwrap();
        symlink(&name, folder.join("..data_tmp")).unwrap();
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
        if let Some(old) = old {
            fs::remove_dir_all(folder.join(old)).unwrap();
        }
    }
}

/// The configuration with these lines in kube-proxy's document, and these in ours.
fn config(theirs: &str, ours: &str) -> String {
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{theirs}\n---\n\
         apiVersion: shunt.dev/v1alpha1\nkind: ShuntConfiguration\n{ours}\n"
    )
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn metric(lab: &Lab, name: &str) -> f64 {
    let ask =
        "exec 3<>/dev/tcp/127.0.0.1/10249; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3";
    let text = lab
        .ns("node-a")
        .unwrap()
        .output("bash", &["-ec", ask])
        .unwrap();
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no {name}: {text}"))
        .parse()
        .unwrap()
}

fn answers_ping(agent: &Agent) -> bool {
    let config = Maps::open(agent.bpf_root()).unwrap().config().unwrap();
    config.flags & CONFIG_ANSWER_PING != 0
}

fn start(lab: &Lab, manifests: &Path, config: &ConfigMap) -> Agent {
    fs::write(manifests.join("web.yaml"), SERVICE).unwrap();
    let pod = PodSpec {
        ips: vec![[10, 44, 0, 11].into()],
        ..PodSpec::new("web-1", "node-a", &[Port::tcp(8080)])
    };
    lab.add_pod(&pod).unwrap();
    lab.add_pod(&PodSpec::new("shell", "node-a", &[])).unwrap();
    let file = config.file();
    let options = AgentOptions::manifests(manifests)
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps()
        .args(&["--config", &file.to_string_lossy()]);
    lab.start_agent("node-a", &options).unwrap()
}

#[test]
fn a_swapped_config_map_is_taken_over_as_far_as_it_can_be() {
    let lab = Lab::builder().nodes(&["node-a"]).build().unwrap();
    let manifests = tempfile::tempdir().unwrap();
    let good = config("nodePortAddresses: [192.168.50.0/24]", "");
    let map = ConfigMap::new(&good);
    let agent = start(&lab, manifests.path(), &map);
    let outside = lab.client("client", Sockets::Unhooked).unwrap();
    let pod = lab.client("shell", Sockets::Unhooked).unwrap();
    let node_port = "192.168.50.11:30080".parse().unwrap();
    let cluster_ip = "10.96.0.80:80".parse().unwrap();
    assert_eq!(outside.tcp(node_port).unwrap().server, "web-1");
    assert_eq!(metric(&lab, "shunt_config_last_reload_successful"), 1.0);

    // Somebody who dials all the while, and an open connection: neither notices.
    let open = outside.open_tcp(node_port).unwrap();
    open.ask("before").unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let dialling = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                pod.tcp_many(cluster_ip, 20).unwrap();
                count += 20;
            }
            count
        });
        let changes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // What can change live: node ports elsewhere, and no answers to pings.
            map.swap(&config(
                "nodePortAddresses: [172.16.0.0/12]",
                "answerPing: false",
            ));
            until("node ports are closed", || outside.tcp(node_port).is_err());
            assert!(!answers_ping(&agent));
            agent
                .wait_for("answerPing, nodePortAddresses taken over", PATIENCE)
                .unwrap();
            assert_eq!(open.ask("after").unwrap().server, "web-1");

            // What is broken changes nothing and says where.
            for (broken, names) in [
                (
                    config("nodePortAddresses: [172.16.0.0/12]", "xdp: sideways"),
                    "xdp",
                ),
                (
                    config("nodePortAddresses: [everywhere]", ""),
                    "nodePortAddresses",
                ),
                ("kind: [".to_owned(), "config.yaml:1"),
                (String::new(), "is empty"),
                (
                    "apiVersion: v1\nkind: ConfigMap\n".to_owned(),
                    "no configuration",
                ),
            ] {
                let before = metric(&lab, "shunt_config_reloads_total{outcome=\"refused\"}");
                map.swap(&broken);
                until(names, || {
                    metric(&lab, "shunt_config_reloads_total{outcome=\"refused\"}") > before
                });
                assert_eq!(metric(&lab, "shunt_config_last_reload_successful"), 0.0);
                let log = agent.output();
                let line = log
                    .lines()
                    .rfind(|line| line.contains("is not taken over"))
                    .unwrap();
                assert!(
                    line.contains("Node node-a: --config: ") && line.contains(names),
                    "{names}: {line}"
                );
                assert!(!answers_ping(&agent) && outside.tcp(node_port).is_err());
            }

            // What cannot change live is named, and the rest of the file holds.
            map.swap(&config(
                "nodePortAddresses: [192.168.50.0/24]",
                "snatPorts: 20000-21000\nanswerPing: false",
            ));
            until("node ports are open", || outside.tcp(node_port).is_ok());
            agent
                .wait_for(
                    "has changed: snatPorts take effect when the agent starts again",
                    PATIENCE,
                )
                .unwrap();
            assert_eq!(metric(&lab, "shunt_config_waits_for_restart"), 1.0);
            assert_eq!(metric(&lab, "shunt_config_last_reload_successful"), 1.0);

            map.swap(&good);
            until("nothing waits", || {
                metric(&lab, "shunt_config_waits_for_restart") == 0.0
            });
            assert!(answers_ping(&agent));
            assert_eq!(outside.tcp(node_port).unwrap().server, "web-1");
            assert_eq!(open.ask("at the end").unwrap().server, "web-1");
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = changes {
            std::panic::resume_unwind(panic);
        }
        assert!(dialling.join().unwrap() > 100, "it dialled hardly at all");
    });
}

/// A file that an editor writes in place, or that is away for a moment.
#[test]
fn a_plain_file_is_followed_too() {
    let lab = Lab::builder().nodes(&["node-a"]).build().unwrap();
    let manifests = tempfile::tempdir().unwrap();
    let map = ConfigMap::new("");
    fs::remove_file(map.file()).unwrap();
    fs::write(map.file(), config("", "answerPing: true")).unwrap();
    let agent = start(&lab, manifests.path(), &map);
    assert!(answers_ping(&agent));
    fs::write(map.file(), config("", "answerPing: false")).unwrap();
    until("pings are not answered", || !answers_ping(&agent));
    fs::remove_file(map.file()).unwrap();
    agent.wait_for("is not taken over", PATIENCE).unwrap();
    assert!(!answers_ping(&agent));
    fs::write(map.file(), config("", "answerPing: true")).unwrap();
    until("pings are answered", || answers_ping(&agent));
}
