//! The agent as its DaemonSet runs it: a pod with a service account, few capabilities and the
//! DaemonSet's settings (SPEC S1, A1). Needs root.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use shunt_apiserver::{ApiServer, CLUSTER_IP};
use shunt_lab::{Agent, AgentOptions, Lab, PodSpec, Port, Sockets};
use tempfile::TempDir;

/// The fabric, as seen from the node.
const SERVER: &str = "192.168.50.1:6443";
const NODE: &str = "node-a";
const APP: u16 = 8080;
/// Longest wait for something that may take some attempts.
const PATIENCE: Duration = Duration::from_secs(45);
/// What an agent says whose server has an address that it serves itself.
const WAITS_FOR_ITSELF: &str =
    "is the cluster IP of Service default/kubernetes, which this agent serves itself";

/// A node, and an API server that has it, the Service `kubernetes` and a Service `web`, whose
/// endpoints are pods of the node.
struct World {
    api: ApiServer,
    folder: TempDir,
    lab: Lab,
}

fn object(kind: &str, name: &str, rest: Value) -> Value {
    let version = if kind == "EndpointSlice" {
        "discovery.k8s.io/v1"
    } else {
        "v1"
    };
    let mut object = json!({ "apiVersion": version, "kind": kind, "metadata": { "name": name } });
    if kind != "Node" {
        object["metadata"]["namespace"] = "default".into();
    }
    for (field, value) in rest.as_object().unwrap() {
        object[field] = value.clone();
    }
    object
}

impl World {
    fn new() -> Self {
        let lab = Lab::builder().nodes(&[NODE]).build().unwrap();
        for pod in ["web-1", "web-2"] {
            lab.add_pod(&PodSpec::new(pod, NODE, &[Port::tcp(APP)]))
                .unwrap();
        }
        lab.add_pod(&PodSpec::new("client-1", NODE, &[])).unwrap();
        let fabric = lab.ns("fabric").unwrap();
        let server: SocketAddr = SERVER.parse().unwrap();
        let api = ApiServer::start_with(server, move || fabric.run(|| TcpListener::bind(server)))
            .unwrap();
        let addresses = lab.node_ips(NODE).unwrap();
        let addresses =
            addresses.map(|address| json!({ "type": "InternalIP", "address": address }));
        api.apply(object(
            "Node",
            NODE,
            json!({ "status": { "addresses": addresses } }),
        ));
        let world = Self {
            api,
            folder: TempDir::new().unwrap(),
            lab,
        };
        world.serve(
            "kubernetes",
            CLUSTER_IP,
            443,
            (&server.ip().to_string(), server.port()),
        );
        world.set_web("web-1");
        world
    }

    /// A Service with one endpoint.
    fn serve(&self, name: &str, cluster_ip: &str, port: u16, (address, target): (&str, u16)) {
        let spec = json!({ "clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ports": [{ "port": port, "targetPort": target }] });
        self.api
            .apply(object("Service", name, json!({ "spec": spec })));
        let mut slice = json!({
            "addressType": "IPv4", "ports": [{ "protocol": "TCP", "port": target }], "endpoints": [{ "addresses": [address] }],
        });
        slice["metadata"] = json!({
            "name": name, "namespace": "default", "labels": { "kubernetes.io/service-name": name },
        });
        self.api.apply(object("EndpointSlice", name, slice));
    }

    fn set_web(&self, pod: &str) {
        let ip = self.lab.ips(pod).unwrap()[0];
        self.serve("web", "10.96.0.10", 80, (&ip.to_string(), APP));
    }

    /// Waits until the Service leads to this pod.
    fn wait_for_web(&self, pod: &str) {
        let client = self.lab.client("client-1", Sockets::Hooked).unwrap();
        let began = Instant::now();
        while !client
            .tcp("10.96.0.10:80".parse().unwrap())
            .is_ok_and(|answer| answer.server == pod)
        {
            assert!(began.elapsed() < PATIENCE, "{pod} does not answer");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn config(&self, text: &str) -> PathBuf {
        let file = self.folder.path().join("config.yaml");
        fs::write(&file, text).unwrap();
        file
    }

    /// An agent in a pod whose environment has this address for the API server, and whose settings
    /// are these.
    fn agent(&self, server: &str, config: &str) -> Agent {
        let config = self.config(config);
        let options = AgentOptions::in_pod(server.parse().unwrap(), &self.api.run_folder())
            .capabilities(&["BPF", "NET_ADMIN", "PERFMON"])
            .args(&["--config", &config.to_string_lossy()])
            .shunt(env!("CARGO_BIN_EXE_shunt"));
        let mut agent = self.lab.agent(NODE, &options).unwrap();
        agent.spawn().unwrap();
        agent
    }
}

/// kubeadm's configuration names a kubeconfig that is not there any more; the service account is,
/// and its token is replaced before the old one expires.
#[test]
fn a_pod_goes_by_its_service_account() {
    let world = World::new();
    let kubeadm = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/config/kubeadm.yaml"
    );
    let mut agent = world.agent(SERVER, &fs::read_to_string(kubeadm).unwrap());
    agent.wait_ready().unwrap();
    world.wait_for_web("web-1");
    let says = "there is no /var/lib/kube-proxy/kubeconfig.conf: using this pod's service account";
    assert_eq!(
        agent.output().matches(says).count(),
        1,
        "{}",
        agent.output()
    );
    assert!(
        !agent.output().contains(WAITS_FOR_ITSELF),
        "{}",
        agent.output()
    );

    world.api.set_token("rotated");
    world.api.drop_watches();
    world.set_web("web-2");
    agent.wait_for("Unauthorized (401)", PATIENCE).unwrap();
    world.wait_for_web("web-1");
    world.api.write_token("rotated").unwrap();
    world.wait_for_web("web-2");
}

/// The usual address of an API server, seen from a pod, is a cluster IP: as long as the datapath is
/// there it works, and after a reboot it does not. Both are said, and a real address in the
/// configuration stands over it.
#[test]
fn an_agent_that_depends_on_itself_says_so() {
    let world = World::new();
    let itself = format!("{CLUSTER_IP}:443");
    let mut first = world.agent(SERVER, "");
    first.wait_ready().unwrap();
    world.wait_for_web("web-1");
    first.stop().unwrap();

    let mut second = world.agent(&itself, "");
    second.wait_ready().unwrap();
    assert_eq!(
        second.output().matches(WAITS_FOR_ITSELF).count(),
        1,
        "{}",
        second.output()
    );
    world.set_web("web-2");
    world.wait_for_web("web-2");
    second.stop().unwrap();

    // As after a reboot.
    assert!(second.cli(&["cleanup"]).unwrap().status.success());
    second.spawn().unwrap();
    second
        .wait_for(
            "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT lead to it without a service proxy",
            PATIENCE,
        )
        .unwrap();
    assert!(second.ready_line().is_empty());
    second.stop().unwrap();

    let kubeconfig = world.api.kubeconfig();
    let text = format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nclientConnection: {{kubeconfig: {}}}\n",
        kubeconfig.display()
    );
    let mut third = world.agent(&itself, &text);
    third.wait_ready().unwrap();
    world.wait_for_web("web-2");
    assert!(
        !third.output().contains(WAITS_FOR_ITSELF),
        "{}",
        third.output()
    );
}
