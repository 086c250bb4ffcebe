//! What a kubelet does for a pod that it has started: an address, a status, and a readiness probe
//! that is really run.
//!
//! A Pod whose manifest has no `status` gets one here, written as a manifest of its own into a
//! folder that the agents read besides. Probes by `exec` run in the pod's network namespace and
//! cgroup with a `/var` of the pod's own; those by `httpGet` and `tcpSocket` come from the node, as
//! a kubelet's do.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    client::join_cgroup,
    lab::{Lab, PodSpec, Port, Sockets},
    manifests::{documents, files, known_port},
    mounts::mount_at,
    netns::NetNs,
    probe::{self, Action, Probe, Readiness},
};

/// How soon a pod's thread sees that it is to end.
const STOP: Duration = Duration::from_millis(20);

/// All pods that it has started; they stay when it ends, and nobody probes them any more.
#[derive(Debug)]
pub struct Kubelet {
    folder: PathBuf,
    pace: u32,
    pods: BTreeMap<String, Running>,
}

#[derive(Debug)]
struct Running {
    manifest: Value,
    container: Container,
    status: PathBuf,
    ready: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
        // Gone already with the folder, or it goes with it.
        let _ = fs::remove_file(&self.status);
    }
}

/// Where a pod's programs run.
#[derive(Clone, Debug)]
struct Container {
    ns: NetNs,
    cgroup: PathBuf,
    var: PathBuf,
}

impl Container {
    fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        join_cgroup(&mut command, &self.cgroup)?;
        self.ns.enter(&mut command)?;
        mount_at(&mut command, &self.var, c"/var")?;
        Ok(command)
    }
}

#[derive(Deserialize)]
struct Pod {
    metadata: Metadata,
    spec: Spec,
    status: Option<Value>,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    namespace: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    node_name: String,
    #[serde(default)]
    containers: Vec<ContainerSpec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerSpec {
    #[serde(default)]
    ports: Vec<ContainerPort>,
    readiness_probe: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    container_port: u16,
    protocol: Option<String>,
}

impl Kubelet {
    /// Writes statuses into `folder`, which is made if it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
        Ok(Self {
            folder: folder.to_owned(),
            pace: 1,
            pods: BTreeMap::new(),
        })
    }

    /// Probes so many times as often as their manifests say: for those who have no minute to wait.
    #[must_use]
    pub fn pace(mut self, times: u32) -> Self {
        self.pace = times.max(1);
        self
    }

    /// Brings the lab to what the manifests in a folder say of Pods without a status: new ones are
    /// started, in the lab too if they are not there, and those that are gone or have changed are
    /// ended.
    ///
    /// # Errors
    ///
    /// Names the Pod and the field that cannot be; the others run.
    pub fn follow(&mut self, lab: &Lab, manifests: &Path) -> Result<()> {
        let mut wanted = BTreeMap::new();
        for file in files(manifests)? {
            for document in documents(&file)? {
                if document["kind"] == "Pod" && document.get("status").is_none() {
                    let name = document["metadata"]["name"]
                        .as_str()
                        .unwrap_or_default()
                        .to_owned();
                    wanted.insert(name, document);
                }
            }
        }
        let gone: Vec<String> = self
            .pods
            .iter()
            .filter(|(name, running)| wanted.get(*name) != Some(&running.manifest))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.pods.remove(&name);
            if lab.has(&name) {
                lab.remove(&name)?;
            }
        }
        let mut first_error = Ok(());
        for (name, manifest) in wanted {
            if self.pods.contains_key(&name) {
                continue;
            }
            match self
                .start(lab, manifest)
                .with_context(|| format!("Pod {name}"))
            {
                Ok(running) => drop(self.pods.insert(name, running)),
                Err(error) if first_error.is_ok() => first_error = Err(error),
                Err(_) => {}
            }
        }
        first_error
    }

    fn start(&self, lab: &Lab, manifest: Value) -> Result<Running> {
        let pod = Pod::deserialize(&manifest)?;
        debug_assert!(pod.status.is_none());
        let mut probes = Vec::new();
        for (i, container) in pod.spec.containers.iter().enumerate() {
            let named = |port: &ContainerPort| Some((port.name.clone()?, port.container_port));
            let ports: Vec<(String, u16)> = container.ports.iter().filter_map(named).collect();
            let parse = |probe| Probe::parse(probe, &ports);
            let parsed = container.readiness_probe.as_ref().map(parse).transpose();
            probes.push(parsed.with_context(|| format!("spec.containers[{i}].readinessProbe"))?);
        }
        let name = &pod.metadata.name;
        if !lab.has(name) {
            let ports = pod
                .spec
                .containers
                .iter()
                .flat_map(|container| &container.ports);
            let ports: Vec<Port> = ports
                .filter_map(|port| known_port(Some(port.container_port), port.protocol.as_deref()))
                .collect();
            lab.add_pod(&PodSpec::new(name, &pod.spec.node_name, &ports))?;
        }
        let full_name = format!(
            "{}.{name}",
            pod.metadata.namespace.as_deref().unwrap_or("default")
        );
        // Hidden: agents that read the folder pass it over.
        let var = self.folder.join(".roots").join(&full_name).join("var");
        fs::create_dir_all(&var).with_context(|| format!("{}", var.display()))?;
        let container = Container {
            ns: lab.ns(name)?,
            cgroup: lab.cgroup_of(name, Sockets::Hooked)?,
            var,
        };
        let (ready, stop) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let worker = Worker {
            manifest: manifest.clone(),
            ips: lab.ips(name)?,
            node: lab.ns(&pod.spec.node_name)?,
            container: container.clone(),
            status: self.folder.join(format!("{full_name}.json")),
            pace: self.pace,
            ready: ready.clone(),
            stop: stop.clone(),
        };
        let status = worker.status.clone();
        // Before it returns: agents that start next find the pod.
        let readiness: Vec<Readiness> = probes
            .iter()
            .map(|probe| Readiness::of(probe.as_ref()))
            .collect();
        worker.report(readiness.iter().all(|readiness| readiness.ready))?;
        let thread = thread::Builder::new()
            .name(format!("kubelet-{name}"))
            .spawn(move || worker.run(&probes, readiness))
            .context("cannot start a thread")?;
        Ok(Running {
            manifest,
            container,
            status,
            ready,
            stop,
            thread: Some(thread),
        })
    }

    /// Whether a pod is ready; `None`: it is none of those started here.
    #[must_use]
    pub fn is_ready(&self, pod: &str) -> Option<bool> {
        self.pods
            .get(pod)
            .map(|running| running.ready.load(Ordering::Relaxed))
    }

    /// A program in a pod, as `kubectl exec` runs it: in its namespaces, with its `/var`.
    ///
    /// # Errors
    ///
    /// When there is no such pod, or no such program.
    pub fn exec(&self, pod: &str, program: &str, args: &[&str]) -> Result<Output> {
        let running = self
            .pods
            .get(pod)
            .with_context(|| format!("the kubelet runs no pod {pod}"))?;
        let mut command = running.container.command(program)?;
        command
            .args(args)
            .output()
            .with_context(|| format!("pod {pod}: cannot run {program}"))
    }
}

/// A pod's thread.
struct Worker {
    manifest: Value,
    ips: Vec<IpAddr>,
    node: NetNs,
    container: Container,
    status: PathBuf,
    pace: u32,
    ready: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    fn run(&self, probes: &[Option<Probe>], mut readiness: Vec<Readiness>) {
        let began = Instant::now();
        let first = |probe: &Option<Probe>| {
            probe
                .as_ref()
                .map(|probe| began + probe.initial_delay / self.pace)
        };
        let mut next: Vec<Option<Instant>> = probes.iter().map(first).collect();
        while !self.stop.load(Ordering::Relaxed) {
            let Some(due) = next.iter().flatten().min().copied() else {
                return;
            };
            if let Some(wait) = due
                .checked_duration_since(Instant::now())
                .filter(|wait| !wait.is_zero())
            {
                thread::sleep(wait.min(STOP));
                continue;
            }
            for (i, probe) in probes.iter().enumerate() {
                let (Some(probe), Some(at)) = (probe, next[i]) else {
                    continue;
                };
                if at > Instant::now() {
                    continue;
                }
                next[i] = Some(at + probe.period / self.pace);
                readiness[i].observe(self.ask(probe), probe);
            }
            let ready = readiness.iter().all(|readiness| readiness.ready);
            if ready != self.ready.load(Ordering::Relaxed)
                && let Err(error) = self.report(ready)
            {
                eprintln!("kubelet: {error:#}");
            }
        }
    }

    fn ask(&self, probe: &Probe) -> bool {
        let at = |host: &Option<IpAddr>, port: u16| {
            let ip = host.or(self.ips.first().copied());
            ip.map(|ip| SocketAddr::new(ip, port))
        };
        match &probe.action {
            Action::Exec(command) => {
                let found = self.container.command(&command[0]);
                found.is_ok_and(|mut program| {
                    program.args(&command[1..]);
                    probe::exec(program, probe.timeout)
                })
            }
            Action::Http {
                host,
                port,
                path,
                headers,
            } => at(host, *port).is_some_and(|to| {
                self.node
                    .run(|| probe::http(to, path, headers, probe.timeout))
            }),
            Action::Tcp { host, port } => {
                at(host, *port).is_some_and(|to| self.node.run(|| probe::tcp(to, probe.timeout)))
            }
        }
    }

    /// Writes the Pod with its status: beside it, then in its place.
    fn report(&self, ready: bool) -> Result<()> {
        let mut pod = self.manifest.clone();
        let ips: Vec<Value> = self.ips.iter().map(|ip| json!({ "ip": ip })).collect();
        pod["status"] = json!({
            "phase": "Running",
            "podIP": self.ips.first(),
            "podIPs": ips,
            "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
        });
        let name = self
            .status
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let new = self.status.with_file_name(format!(".{name}.new"));
        let written =
            fs::write(&new, pod.to_string()).and_then(|()| fs::rename(&new, &self.status));
        written.with_context(|| format!("{}", self.status.display()))?;
        self.ready.store(ready, Ordering::Relaxed);
        Ok(())
    }
}
