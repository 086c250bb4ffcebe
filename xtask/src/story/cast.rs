//! The stage: two nodes with an agent each, the pods of the manifests, a kubelet's readiness
//! probes, and somebody outside.

use std::{
    collections::BTreeMap,
    env, fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use shunt_lab::{Agent, AgentOptions, Kubelet, Lab, PodSpec, Sockets, manifests::Manifests};

use super::ingress::{self, Rendered, ServicePort, Services};
use crate::{
    setup,
    shell::{root, say, target},
};

/// The pod that clients inside are.
pub(super) const SHELL: &str = "shell";
/// The pod that nginx runs in.
pub(super) const NGINX: &str = "ingress-nginx-0";
/// The host outside of the cluster.
pub(super) const OUTSIDE: &str = "client";
/// How long anything may take that takes seconds at most.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// The manifest that stands for an ingress controller's Deployment: a pod of the Service in
/// `dns-and-edge.yaml`.
const NGINX_POD: &str =
    "# Written by the story: what an ingress controller's Deployment would make.
apiVersion: v1
kind: Pod
metadata: { name: ingress-nginx-0, namespace: ingress-nginx, labels: { app: ingress-nginx } }
spec:
  nodeName: node-a
  containers:
    - name: nginx
      ports: [{ name: http, containerPort: 80 }, { name: https, containerPort: 443 }]
      readinessProbe: { tcpSocket: { port: http }, periodSeconds: 1 }
";

/// New flows to a backend that a hook translated: node, hook, backend.
pub(super) type Flows = BTreeMap<(String, &'static str, SocketAddr), u64>;

pub(super) struct Cast {
    // Dropped in this order: programs, agents, probes, then the namespaces that they are in.
    nginx: Option<Child>,
    pub(super) agents: Vec<Agent>,
    pub(super) kubelet: Kubelet,
    pub(super) lab: Lab,
    shunt: PathBuf,
    /// Copies of the manifests, which the story edits; statuses of pods below.
    folder: tempfile::TempDir,
}

impl Drop for Cast {
    fn drop(&mut self) {
        if let Some(mut nginx) = self.nginx.take() {
            let _ = nginx.kill();
            let _ = nginx.wait();
        }
    }
}

/// A row of `shunt backends -o json`.
#[derive(Deserialize)]
struct BackendRow {
    address: IpAddr,
    port: u16,
    flows: HookFlows,
}

#[derive(Deserialize)]
struct HookFlows {
    socket: u64,
    tc: u64,
    xdp: u64,
}

/// A row of `shunt services -o json`.
#[derive(Deserialize)]
struct ServiceRow {
    namespace: String,
    service: String,
    kind: String,
    address: IpAddr,
    port: u16,
}

impl Cast {
    /// `pace`: how many times faster than their manifests say readiness probes are.
    pub(super) fn assemble(pace: u32) -> Result<Self> {
        let stale = Lab::sweep_stale()?;
        if stale > 0 {
            say(
                "story",
                format_args!("removed what {stale} killed run(s) had left"),
            );
        }
        let folder = tempfile::tempdir().context("cannot make a folder")?;
        for entry in fs::read_dir(root().join("deploy/story"))? {
            let from = entry?.path();
            let name = from.file_name().context("a file without a name")?;
            fs::copy(&from, folder.path().join(name))?;
        }
        fs::write(folder.path().join("ingress-controller.yaml"), NGINX_POD)?;
        fs::create_dir(folder.path().join(".nginx"))?;
        let lab = Lab::new()?;
        // nginx listens for itself: its pod has no server of the lab's.
        lab.add_pod(&PodSpec::new(NGINX, "node-a", &[]))?;
        Manifests::read(folder.path())?.make(&lab)?;
        lab.add_pod(&PodSpec::new(SHELL, "node-a", &[]))?;
        let mut kubelet = Kubelet::new(&folder.path().join("status"))?.pace(pace);
        kubelet.follow(&lab, folder.path())?;
        let shunt =
            env::var_os("SHUNT_BIN").map_or_else(|| target().join("release/shunt"), PathBuf::from);
        let options = AgentOptions::manifests(folder.path()).shunt(&shunt);
        let mut agents = Vec::new();
        for node in lab.nodes() {
            let agent = lab.start_agent(node, &options)?;
            say("story", format_args!("{node}: {}", agent.ready_line()));
            agents.push(agent);
        }
        Ok(Self {
            nginx: None,
            agents,
            kubelet,
            lab,
            shunt,
            folder,
        })
    }

    pub(super) fn manifests(&self) -> &Path {
        self.folder.path()
    }

    /// A line of shell on a node, in a pod or outside; prints both it and what it says.
    ///
    /// # Errors
    ///
    /// When it fails, with what it said.
    pub(super) fn sh(&self, place: &str, line: &str) -> Result<String> {
        println!("    {place}$ {line}");
        let sockets = match place {
            OUTSIDE => Sockets::Unhooked,
            _ => Sockets::Hooked,
        };
        let mut command = self.lab.command(place, sockets, "sh")?;
        command.args(["-c", line]).stdin(Stdio::null());
        // `shunt` is the one that the agents are.
        let path = env::var("PATH").unwrap_or_default();
        let folder = self.shunt.parent().unwrap_or(Path::new("."));
        command.env("PATH", format!("{}:{path}", folder.display()));
        let output = command.output().context("cannot run sh")?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        stdout.lines().for_each(|line| println!("      {line}"));
        if !output.status.success() {
            bail!(
                "{} {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(stdout)
    }

    /// The same some times, printed once; who answered how often.
    pub(super) fn sh_times(
        &self,
        place: &str,
        line: &str,
        times: usize,
    ) -> Result<BTreeMap<String, usize>> {
        let text = self.sh(
            place,
            &format!("for i in $(seq {times}); do {line}; done | sort | cut -d' ' -f1 | uniq -c"),
        )?;
        let parse = |line: &str| {
            let (count, name) = line.trim().split_once(' ')?;
            Some((name.to_owned(), count.parse().ok()?))
        };
        let answers: BTreeMap<String, usize> = text.lines().filter_map(parse).collect();
        let sum: usize = answers.values().sum();
        ensure!(sum == times, "{sum} of {times} were answered");
        Ok(answers)
    }

    /// A verb of the command line on a node; prints its table, or the lines of it that name `only`.
    pub(super) fn cli(&self, node: &str, args: &[&str], only: &str) -> Result<String> {
        let agent = self.agent(node)?;
        println!("    {node}$ shunt {}", args.join(" "));
        let output = agent.cli(args)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        for (i, line) in text.lines().enumerate() {
            if i == 0 || line.contains(only) {
                println!("      {line}");
            }
        }
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(text)
    }

    fn agent(&self, node: &str) -> Result<&Agent> {
        let found = self.agents.iter().find(|agent| agent.node() == node);
        found.with_context(|| format!("no agent on {node}"))
    }

    /// New flows so far, by node, hook and backend.
    pub(super) fn flows(&self) -> Result<Flows> {
        let mut flows = Flows::new();
        for agent in &self.agents {
            for row in Vec::<BackendRow>::deserialize(agent.json(&["backends"])?)? {
                let backend = SocketAddr::new(row.address, row.port);
                for (hook, count) in [
                    ("socket", row.flows.socket),
                    ("tc", row.flows.tc),
                    ("XDP", row.flows.xdp),
                ] {
                    *flows
                        .entry((agent.node().to_owned(), hook, backend))
                        .or_default() += count;
                }
            }
        }
        Ok(flows)
    }

    /// The pod or host that has an address.
    pub(super) fn name_of(&self, ip: IpAddr) -> String {
        self.lab.name_of(ip).unwrap_or_else(|| "?".to_owned())
    }

    /// Waits until something holds; says how long that took.
    pub(super) fn until(
        &self,
        what: &str,
        mut holds: impl FnMut() -> Result<bool>,
    ) -> Result<Duration> {
        let began = Instant::now();
        while !holds()? {
            ensure!(
                began.elapsed() < PATIENCE,
                "not within {PATIENCE:?}: {what}"
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(began.elapsed())
    }

    /// Names of the pods behind a Service, as a node's maps have them.
    pub(super) fn backends(&self, node: &str, service: &str) -> Result<Vec<String>> {
        let rows = Vec::<BackendRow>::deserialize(self.agent(node)?.json(&["backends", service])?)?;
        let mut names: Vec<String> = rows.iter().map(|row| self.name_of(row.address)).collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Changes a manifest's text, as somebody with an editor would.
    pub(super) fn edit(&self, file: &str, from: &str, to: &str) -> Result<()> {
        let path = self.manifests().join(file);
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains(from), "{file} has no {from:?}");
        let new = self.manifests().join(format!(".{file}.new"));
        fs::write(&new, text.replacen(from, to, 1))?;
        fs::rename(new, path)?;
        Ok(())
    }

    /// All objects of the manifests.
    fn objects(&self) -> Result<Vec<Value>> {
        let mut objects = Vec::new();
        for entry in fs::read_dir(self.manifests())? {
            let path = entry?.path();
            let hidden = path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if !hidden
                && path
                    .extension()
                    .is_some_and(|extension| extension == "yaml")
            {
                objects.extend(serde_saphyr::from_multiple::<Value>(&fs::read_to_string(
                    &path,
                )?)?);
            }
        }
        Ok(objects)
    }

    /// Cluster IPs of all Services, as node-a serves them, and the names of their ports, as they
    /// are written.
    fn services(&self, objects: &[Value]) -> Result<Services> {
        let mut services = Services::new();
        for row in Vec::<ServiceRow>::deserialize(self.agent("node-a")?.json(&["services"])?)? {
            if row.kind != "ClusterIP" || row.address.is_ipv6() {
                continue;
            }
            let of = |object: &&Value| {
                object["kind"] == "Service"
                    && object["metadata"]["name"] == *row.service
                    && object["metadata"]["namespace"] == *row.namespace
            };
            let ports = objects
                .iter()
                .find(of)
                .and_then(|object| object["spec"]["ports"].as_array());
            let port = ports
                .into_iter()
                .flatten()
                .find(|port| port["port"] == row.port);
            let name = port
                .and_then(|port| port["name"].as_str())
                .unwrap_or_default();
            services
                .entry(format!("{}/{}", row.namespace, row.service))
                .or_default()
                .push(ServicePort {
                    name: name.to_owned(),
                    number: row.port,
                    cluster_ip: SocketAddr::new(row.address, row.port),
                });
        }
        Ok(services)
    }

    /// Configures nginx from the Ingresses and Secrets as they are now, and starts it or lets it
    /// read that.
    ///
    /// # Errors
    ///
    /// With nginx's words; the one that runs goes on with what it had.
    pub(super) fn configure_nginx(&mut self) -> Result<Rendered> {
        let folder = self.nginx_folder();
        let objects = self.objects()?;
        let rendered = ingress::render(&objects, &self.services(&objects)?, &folder)?;
        let file = folder.join("nginx.conf");
        fs::write(&file, &rendered.config)?;
        let program = setup::nginx()?;
        let checked = Command::new(&program)
            .arg("-t")
            .arg("-c")
            .arg(&file)
            .args(["-p"])
            .arg(&folder)
            .output()?;
        ensure!(
            checked.status.success(),
            "{}",
            String::from_utf8_lossy(&checked.stderr).trim()
        );
        match &self.nginx {
            None => {
                let mut command = self.lab.command(NGINX, Sockets::Hooked, &program)?;
                command
                    .arg("-c")
                    .arg(&file)
                    .arg("-p")
                    .arg(&folder)
                    .stdin(Stdio::null());
                self.nginx = Some(command.spawn().context("cannot run nginx")?);
            }
            Some(nginx) => {
                let pid = rustix::process::Pid::from_child(nginx);
                rustix::process::kill_process(pid, rustix::process::Signal::HUP)?;
            }
        }
        Ok(rendered)
    }

    pub(super) fn nginx_folder(&self) -> PathBuf {
        self.manifests().join(".nginx")
    }

    /// Lines of nginx's access log.
    pub(super) fn access_log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.nginx_folder().join("access.log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}
