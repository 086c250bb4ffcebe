//! Readiness probes are really run: against processes in namespaces. Needs root.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use shunt_lab::{Kubelet, Lab, Port};

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: { name: by-file, namespace: shop, labels: { app: web } }
spec:
  nodeName: node-a
  containers:
    - name: web
      ports: [{ name: http, containerPort: 8080 }]
      readinessProbe: { exec: { command: [ls, /var/ready] }, periodSeconds: 1, failureThreshold: 2 }
---
apiVersion: v1
kind: Pod
metadata: { name: other-file }
spec:
  nodeName: node-b
  containers: [{ name: web, readinessProbe: { exec: { command: [ls, /var/ready] }, periodSeconds: 1 } }]
---
apiVersion: v1
kind: Pod
metadata: { name: by-http }
spec:
  nodeName: node-b
  containers:
    - name: web
      ports: [{ name: http, containerPort: 8080 }]
      readinessProbe: { httpGet: { path: /healthz, port: http }, periodSeconds: 1, failureThreshold: 2 }
---
apiVersion: v1
kind: Pod
metadata: { name: by-tcp }
spec:
  nodeName: node-a
  containers:
    - { name: web, ports: [{ containerPort: 8080 }], readinessProbe: { tcpSocket: { port: 8080 }, periodSeconds: 1, successThreshold: 3 } }
---
apiVersion: v1
kind: Pod
metadata: { name: at-once }
spec: { nodeName: node-a, containers: [{ name: web, ports: [{ containerPort: 8080 }] }] }
---
apiVersion: v1
kind: Pod
metadata: { name: has-a-status }
spec: { nodeName: node-a, containers: [{ name: web }] }
status: { podIP: 10.44.0.9 }
"#;
const WEB: Port = Port {
    proto: shunt_lab::Proto::Tcp,
    number: 8080,
};

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "waited in vain: {what}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

fn status(folder: &Path, name: &str) -> Value {
    let text = fs::read(folder.join(format!("{name}.json"))).unwrap();
    serde_json::from_slice::<Value>(&text).unwrap()["status"].take()
}

#[test]
fn pods_are_ready_when_their_probes_say_so() {
    let lab = Lab::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (manifests, statuses) = (
        folder.path().join("manifests"),
        folder.path().join("statuses"),
    );
    fs::create_dir(&manifests).unwrap();
    fs::write(manifests.join("pods.yaml"), PODS).unwrap();
    let mut kubelet = Kubelet::new(&statuses).unwrap().pace(20);
    kubelet.follow(&lab, &manifests).unwrap();
    let ready = |kubelet: &Kubelet, pod: &str| kubelet.is_ready(pod).unwrap();

    assert!(
        ready(&kubelet, "at-once"),
        "no probe: ready as soon as it runs"
    );
    assert_eq!(kubelet.is_ready("has-a-status"), None, "somebody else's");
    until("http", || ready(&kubelet, "by-http"));
    until("tcp", || ready(&kubelet, "by-tcp"));
    assert!(!ready(&kubelet, "by-file"));
    let of = status(&statuses, "default.by-http");
    assert_eq!(of["conditions"][0]["status"], "True");
    let ips: Vec<String> = lab
        .ips("by-http")
        .unwrap()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        (
            of["podIP"].as_str().unwrap(),
            of["podIPs"].as_array().unwrap().len()
        ),
        (&*ips[0], 2)
    );
    assert_eq!(
        status(&statuses, "shop.by-file")["conditions"][0]["status"],
        "False"
    );

    // `touch /var/ready`, in this pod and in no other, and not on the machine.
    assert!(
        kubelet
            .exec("by-file", "touch", &["/var/ready"])
            .unwrap()
            .status
            .success()
    );
    until("the file", || ready(&kubelet, "by-file"));
    assert!(!ready(&kubelet, "other-file") && !Path::new("/var/ready").exists());
    assert_eq!(
        status(&statuses, "shop.by-file")["conditions"][0]["status"],
        "True"
    );
    kubelet.exec("by-file", "rm", &["/var/ready"]).unwrap();
    until("no file", || !ready(&kubelet, "by-file"));

    // Servers that go, and one that comes back.
    lab.set_serving("by-http", &[]).unwrap();
    lab.set_serving("by-tcp", &[]).unwrap();
    until("no server", || {
        !ready(&kubelet, "by-http") && !ready(&kubelet, "by-tcp")
    });
    lab.set_serving("by-http", &[WEB]).unwrap();
    until("a server", || ready(&kubelet, "by-http"));

    // A pod that is taken out of the manifests is gone, with its status; the others are not
    // touched.
    let (first, rest) = PODS.split_once("---\n").unwrap();
    assert!(first.contains("by-file"));
    fs::write(manifests.join("pods.yaml"), rest).unwrap();
    kubelet.follow(&lab, &manifests).unwrap();
    assert!(!lab.has("by-file") && !statuses.join("shop.by-file.json").exists());
    assert!(ready(&kubelet, "by-http"));

    // What is wrong is named, and the others run.
    let bad = rest
        .replace("port: http }", "port: web }")
        .replace("name: by-http", "name: renamed");
    fs::write(manifests.join("pods.yaml"), bad).unwrap();
    let error = format!("{:#}", kubelet.follow(&lab, &manifests).unwrap_err());
    let expected = "Pod renamed: spec.containers[0].readinessProbe: httpGet.port: no port of the container has the name \"web\"";
    assert_eq!(error, expected);
    assert!(ready(&kubelet, "at-once"));
}
