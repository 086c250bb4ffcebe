//! The agent with exactly the capabilities that the DaemonSet gives its container: all of it works,
//! and with one fewer it says what is missing. Needs root.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use k8s_openapi::api::apps::v1::DaemonSet;
use shunt_lab::{
    Agent, AgentOptions, Client, Conn, Dial, DialError, Lab, PodSpec, Port, Proto, Sockets,
};
use tempfile::TempDir;

const APP: u16 = 8080;
const NODE_PORT: u16 = 30080;

/// `securityContext.capabilities.add` of the agent's container.
fn granted() -> Vec<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/base/daemonset.yaml");
    let daemonset: DaemonSet = serde_saphyr::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let pod = daemonset.spec.unwrap().template.spec.unwrap();
    let security = pod.containers[0].security_context.clone().unwrap();
    assert_ne!(security.privileged, Some(true));
    assert_eq!(
        security.allow_privilege_escalation,
        Some(false),
        "what no_new_privs is for here"
    );
    let capabilities = security.capabilities.unwrap();
    assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
    capabilities.add.unwrap()
}

fn options(manifests: &Path, capabilities: &[String]) -> AgentOptions {
    let names: Vec<&str> = capabilities.iter().map(String::as_str).collect();
    AgentOptions::manifests(manifests)
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .args(&[
            "--max-flows",
            "8192",
            "--max-new-flows",
            "4096",
            "--max-snat",
            "32768",
            "--datapath-log",
            "debug",
        ])
        .capabilities(&names)
}

/// A Service with a node port, behind it the pods that stand in the file.
fn write(lab: &Lab, manifests: &Path, pods: &[&str]) {
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: web }}\nspec:\n  type: NodePort\n  selector: {{ app: web }}\n  \
         clusterIPs: [10.96.0.1, 'fd96::1']\n  clusterIP: 10.96.0.1\n  ipFamilies: [IPv4, IPv6]\n  \
         ports: [{{ port: 80, targetPort: {APP}, nodePort: {NODE_PORT} }}]\n"
    );
    for pod in pods {
        let ips: Vec<String> = lab
            .ips(pod)
            .unwrap()
            .iter()
            .map(|ip| format!("{{ ip: '{ip}' }}"))
            .collect();
        text += &format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {pod}, labels: {{ app: web }} }}\n\
             spec: {{ nodeName: node-b, containers: [{{ name: app }}] }}\n\
             status: {{ podIPs: [{}], conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
            ips.join(", ")
        );
    }
    let hidden = manifests.join(".new");
    fs::write(&hidden, text).unwrap();
    fs::rename(hidden, manifests.join("web.yaml")).unwrap();
}

fn answer(client: &Client, ip: IpAddr, port: u16) -> String {
    client
        .tcp(SocketAddr::new(ip, port))
        .unwrap_or_else(|error| panic!("{ip} port {port}: {error}"))
        .server
}

fn effective(agent: &Agent) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid().unwrap())).unwrap();
    let hex = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .unwrap();
    u64::from_str_radix(hex.trim(), 16).unwrap()
}

/// SPEC F1 and F2 with the container's capabilities: start, load, attach (cgroup, tc, XDP), serve,
/// change, restart, look inside, clean up.
#[test]
fn the_daemonsets_capabilities_are_enough() {
    let capabilities = granted();
    let lab = Lab::new().unwrap();
    for (pod, node) in [("web-1", "node-b"), ("web-2", "node-b")] {
        lab.add_pod(&PodSpec::new(pod, node, &[Port::tcp(APP)]))
            .unwrap();
    }
    for pod in ["hooked", "packets"] {
        lab.add_pod(&PodSpec::new(pod, "node-a", &[])).unwrap();
    }
    let manifests = TempDir::new().unwrap();
    write(&lab, manifests.path(), &["web-1"]);
    let mut agents: Vec<Agent> = ["node-a", "node-b"]
        .map(|node| {
            lab.start_agent(node, &options(manifests.path(), &capabilities))
                .unwrap()
        })
        .into();
    for agent in &agents {
        assert_eq!(effective(agent).count_ones() as usize, capabilities.len());
    }
    let hooked = lab.client("hooked", Sockets::Hooked).unwrap();
    let packets = lab.client("packets", Sockets::Unhooked).unwrap();
    let outside = lab.client("client", Sockets::Unhooked).unwrap();
    let serves = |pod: &str| {
        for ip in ["10.96.0.1", "fd96::1"] {
            for client in [&hooked, &packets] {
                assert_eq!(answer(client, ip.parse().unwrap(), 80), pod);
            }
        }
        for ip in lab.node_ips("node-a").unwrap() {
            assert_eq!(answer(&outside, ip, NODE_PORT), pod);
        }
    };
    serves("web-1");

    write(&lab, manifests.path(), &["web-2"]);
    let began = Instant::now();
    while answer(&hooked, "10.96.0.1".parse().unwrap(), 80) != "web-2" {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "the change does not come"
        );
    }
    agents[0].restart().unwrap();
    serves("web-2");

    // The agent serves before it listens to what the programs say.
    let told = "DEBUG shunt::programs: socket_flow: TCP 10.96.0.1:80 default/web > ";
    let began = Instant::now();
    while !agents[0].output().contains(told) {
        let output = agents[0].output();
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "the programs say nothing: {output}"
        );
        answer(&hooked, "10.96.0.1".parse().unwrap(), 80);
    }
    // `kubectl exec` runs the other verbs with the same rights.
    let status = agents[0].json(&["status"]).unwrap();
    let links = status["links"].as_array().unwrap();
    for program in ["sock_connect4", "tc_node_in", "tc_pod_in", "xdp_node"] {
        assert!(
            links
                .iter()
                .any(|link| link["program"] == program && link["attached"] == true),
            "{program} is not attached: {status}"
        );
    }
    agents[0].stop().unwrap();
    let output = agents[0].cli(&["cleanup"]).unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(!agents[0].bpf_root().join("v3").exists());
}

/// None of the DaemonSet's capabilities is there for nothing, and an agent that lacks one ends with
/// one line about it.
#[test]
fn each_of_the_daemonsets_capabilities_is_needed() {
    let capabilities = granted();
    let lab = Lab::builder().nodes(&["node-a"]).build().unwrap();
    let manifests = TempDir::new().unwrap();
    write(&lab, manifests.path(), &[]);
    for missing in &capabilities {
        let others: Vec<String> = capabilities
            .iter()
            .filter(|name| *name != missing)
            .cloned()
            .collect();
        let error = lab
            .start_agent("node-a", &options(manifests.path(), &others))
            .expect_err(&format!("the agent runs without {missing}"));
        let text = format!("{error:#}");
        assert!(
            text.contains("ended (exit status: 1)"),
            "without {missing}: {text}"
        );
        let line = text.lines().last().unwrap();
        assert!(
            line.contains("shunt: ") && line.contains(missing),
            "without {missing}: {text}"
        );
    }
}

/// A Service over TCP and UDP, behind it this pod.
fn write_dns(lab: &Lab, manifests: &Path, pod: &str) {
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: dns }}\nspec:\n  clusterIP: 10.96.0.2\n  \
         ports: [{{ name: u, protocol: UDP, port: 53 }}, {{ name: t, protocol: TCP, port: 53 }}]\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{ name: dns, labels: {{ kubernetes.io/service-name: dns }} }}\naddressType: IPv4\n\
         ports: [{{ name: u, protocol: UDP, port: {APP} }}, {{ name: t, protocol: TCP, port: {APP} }}]\n\
         endpoints: [{{ addresses: ['{}'] }}]\n",
        lab.ips(pod).unwrap()[0]
    );
    let hidden = manifests.join(".new");
    fs::write(&hidden, text).unwrap();
    fs::rename(hidden, manifests.join("dns.yaml")).unwrap();
}

/// B7, in pods and on the node: with the default rights connected UDP sockets go on with another
/// backend, and TCP ones to a pod that is gone without a word are reset or closed.
#[test]
fn with_the_default_rights_no_socket_stays_with_a_pod_that_is_gone() {
    // With GRO, packets are taken in as on a real node: with the offloads that veth pairs have.
    let lab = Lab::builder()
        .nodes(&["node-a"])
        .checksum_offload()
        .build()
        .unwrap();
    for pod in ["dns", "next"] {
        lab.add_pod(&PodSpec::new(
            pod,
            "node-a",
            &[Port::tcp(APP), Port::udp(APP)],
        ))
        .unwrap();
    }
    lab.add_pod(&PodSpec::new("hooked", "node-a", &[])).unwrap();
    let device = lab.device("hooked").unwrap();
    lab.ns("node-a")
        .unwrap()
        .output("ethtool", &["-K", &device, "gro", "on"])
        .unwrap();
    let manifests = TempDir::new().unwrap();
    write_dns(&lab, manifests.path(), "dns");
    let _agent = lab
        .start_agent("node-a", &options(manifests.path(), &granted()))
        .unwrap();
    let open = |proto| {
        ["node-a", "hooked"].map(|name| {
            let connected = Dial {
                connected: true,
                ..Dial::default()
            };
            let client = lab.client(name, Sockets::Hooked).unwrap();
            let conn = client
                .open(proto, "10.96.0.2:53".parse().unwrap(), &connected)
                .unwrap();
            assert_eq!(conn.ask("first").unwrap().server, "dns");
            conn
        })
    };
    let [node, pod] = open(Proto::Tcp);
    let datagrams = open(Proto::Udp);
    write_dns(&lab, manifests.path(), "next");
    for conn in &datagrams {
        let began = Instant::now();
        while !conn.ask("and now?").is_ok_and(|to| to.server == "next") {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "the socket stays"
            );
        }
    }
    let device = lab.device("dns").unwrap();
    lab.ns("node-a")
        .unwrap()
        .ip(&[format!("link set {device} down")])
        .unwrap();
    let ends = |conn: &Conn, with: i32| {
        let error = conn
            .ask_within("still there?", Duration::from_secs(60))
            .unwrap_err();
        assert!(
            matches!(error, DialError::Os { errno, .. } if errno == with),
            "{error}"
        );
    };
    std::thread::scope(|scope| {
        scope.spawn(|| ends(&pod, libc::ECONNRESET));
        ends(&node, libc::ECONNABORTED);
    });
}
