//! The agent of one node, as a process in the node's namespace.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read},
    net::{IpAddr, SocketAddr},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    capabilities,
    lab::{POD_CIDRS, SERVICE_CIDRS},
    mounts::mount_at,
    netns::NetNs,
    registry,
};

/// How long an agent may take until its datapath is live; on an emulated machine the verifier takes
/// most of it.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// Seconds to take instead of [`READY_TIMEOUT`], where the kernel's verifier runs in an emulated
/// machine.
const READY_ENV: &str = "SHUNT_LAB_READY_SECONDS";
/// Sizes of an agent's maps in a lab: an eighth of the defaults, and more than a test fills.
const SMALL_MAPS: [(&str, &str); 8] = [
    ("--max-frontends", "8192"),
    ("--max-slots", "65536"),
    ("--max-backends", "16384"),
    ("--max-flows", "65536"),
    ("--max-new-flows", "8192"),
    ("--max-snat", "40000"),
    ("--max-affinity", "8192"),
    ("--max-sockets", "16384"),
];
/// How long an agent may take to end at SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// The node that an agent runs on.
#[derive(Debug)]
pub(crate) struct AgentPlace {
    /// `--node-name`.
    pub(crate) node: String,
    pub(crate) ns: NetNs,
    /// `--node-ip`.
    pub(crate) addresses: [IpAddr; 2],
    /// `--cgroup-root`.
    pub(crate) cgroup: PathBuf,
    /// `--bpf-root`.
    pub(crate) bpf_root: PathBuf,
}

/// Settings of an agent.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// File or folder of manifests; `None` leaves the source to `extra`.
    pub manifests: Option<PathBuf>,
    /// `--xdp`.
    pub xdp: String,
    /// Further arguments of `run`.
    pub extra: Vec<String>,
    /// The binary; `None`: what [`find_shunt`] finds.
    pub shunt: Option<PathBuf>,
    /// Names of the only capabilities that the agent is to have; `None`: all that this process has.
    pub capabilities: Option<Vec<String>>,
    /// Whether the agent has to find out the node's addresses itself; else it gets them as
    /// `--node-ip`.
    pub finds_addresses: bool,
    /// Whether the agent has to find out which devices there are; else it gets `--devices eth0
    /// --pod-devices veth*`.
    pub finds_devices: bool,
    /// Whether its maps are small where `extra` does not size them.
    pub small_maps: bool,
    /// What a kubelet gives to a pod for the API server: its address in the environment, and what
    /// the agent is to see as `/run`, with the service account in
    /// `secrets/kubernetes.io/serviceaccount`.
    pub pod: Option<(SocketAddr, PathBuf)>,
}

impl AgentOptions {
    /// Follows an API server, the Node's addresses included, and attaches XDP natively.
    #[must_use]
    pub fn kubeconfig(path: &Path) -> Self {
        Self {
            manifests: None,
            xdp: "native".to_owned(),
            extra: vec![
                "--kubeconfig".to_owned(),
                path.to_string_lossy().into_owned(),
            ],
            shunt: None,
            capabilities: None,
            finds_addresses: true,
            finds_devices: false,
            small_maps: false,
            pod: None,
        }
    }

    /// The same in a pod with a service account ([`Self::pod`]).
    #[must_use]
    pub fn in_pod(server: SocketAddr, run: &Path) -> Self {
        Self {
            extra: Vec::new(),
            pod: Some((server, run.to_owned())),
            ..Self::kubeconfig(run)
        }
    }

    /// Reads manifests and attaches XDP natively.
    #[must_use]
    pub fn manifests(path: impl Into<PathBuf>) -> Self {
        Self {
            manifests: Some(path.into()),
            xdp: "native".to_owned(),
            extra: Vec::new(),
            shunt: None,
            capabilities: None,
            finds_addresses: false,
            finds_devices: false,
            small_maps: false,
            pod: None,
        }
    }

    /// Without `--devices` and `--pod-devices`.
    #[must_use]
    pub fn finds_devices(mut self) -> Self {
        self.finds_devices = true;
        self
    }

    /// With `--xdp MODE`.
    #[must_use]
    pub fn xdp(mut self, mode: &str) -> Self {
        mode.clone_into(&mut self.xdp);
        self
    }

    /// With further arguments of `run`.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.extra.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// With this binary, as tests have it in `CARGO_BIN_EXE_shunt`.
    #[must_use]
    pub fn shunt(mut self, path: impl Into<PathBuf>) -> Self {
        self.shunt = Some(path.into());
        self
    }

    /// With maps for a lab: most of a node's memory is in them, and clearing it takes as long as the
    /// verifier does.
    #[must_use]
    pub fn small_maps(mut self) -> Self {
        self.small_maps = true;
        self
    }

    /// With no capabilities but these, named as in a container's `securityContext` (`NET_ADMIN`).
    #[must_use]
    pub fn capabilities(mut self, names: &[&str]) -> Self {
        self.capabilities = Some(names.iter().map(|&name| name.to_owned()).collect());
        self
    }
}

/// The agent's binary: `SHUNT_BIN`, or the one in the target folder that the running program is in.
///
/// # Errors
///
/// When there is none; says how to build it.
pub fn find_shunt() -> Result<PathBuf> {
    if let Some(path) = env::var_os("SHUNT_BIN") {
        return Ok(path.into());
    }
    let exe = env::current_exe().context("the running program's path")?;
    // target/<profile>/xtask or target/<profile>/deps/<test>
    exe.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("shunt"))
        .find(|path| path.is_file())
        .context("no shunt binary: run `cargo xtask build` and set SHUNT_BIN=target/release/shunt")
}

/// What a running agent has printed so far.
#[derive(Debug, Default)]
struct Printed {
    lines: Mutex<(String, Option<String>)>,
    changed: Condvar,
}

impl Printed {
    /// Collects a pipe until it ends; the first line with `ready: ` in it is kept apart.
    fn collect(self: &Arc<Self>, pipe: impl Read + Send + 'static) {
        let printed = Arc::clone(self);
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                let mut lines = printed.lines.lock().unwrap_or_else(PoisonError::into_inner);
                lines.0.push_str(&line);
                lines.0.push('\n');
                if let (None, Some(start)) = (&lines.1, line.find("ready: ")) {
                    lines.1 = Some(line[start..].to_owned());
                }
                printed.changed.notify_all();
            }
        });
    }
}

/// A running agent; dropped, it ends and its pins are removed.
#[derive(Debug)]
pub struct Agent {
    node: String,
    ns: NetNs,
    cgroup: PathBuf,
    bpf_root: PathBuf,
    shunt: PathBuf,
    capabilities: Option<Vec<String>>,
    pod: Option<(SocketAddr, PathBuf)>,
    args: Vec<String>,
    child: Option<Child>,
    printed: Arc<Printed>,
}

impl Agent {
    pub(crate) fn start(place: &AgentPlace, options: &AgentOptions) -> Result<Self> {
        let mut agent = Self::new(place, options)?;
        agent.spawn()?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// One that does not run yet.
    pub(crate) fn new(place: &AgentPlace, options: &AgentOptions) -> Result<Self> {
        mount_bpffs()?;
        let shunt = options.shunt.clone().map_or_else(find_shunt, Ok)?;
        let mut args = vec!["run".to_owned()];
        let mut set = |name: &str, value: &str| args.extend([name.to_owned(), value.to_owned()]);
        if let Some(manifests) = &options.manifests {
            set("--manifests", &manifests.to_string_lossy());
        }
        set("--node-name", &place.node);
        if !options.finds_addresses {
            for ip in place.addresses {
                set("--node-ip", &ip.to_string());
            }
        }
        if !options.finds_devices {
            set("--devices", "eth0");
            set("--pod-devices", "veth*");
        }
        set("--cgroup-root", &place.cgroup.to_string_lossy());
        set("--bpf-root", &place.bpf_root.to_string_lossy());
        for cidr in POD_CIDRS {
            set("--cluster-cidr", cidr);
        }
        for cidr in SERVICE_CIDRS {
            set("--service-cidr", cidr);
        }
        set("--xdp", &options.xdp);
        let is_sized = |name: &str| {
            let given = options
                .extra
                .iter()
                .filter_map(|arg| arg.strip_prefix(name));
            given
                .into_iter()
                .any(|rest| rest.is_empty() || rest.starts_with('='))
        };
        for (name, entries) in SMALL_MAPS {
            if options.small_maps && !is_sized(name) {
                set(name, entries);
            }
        }
        args.extend(options.extra.iter().cloned());
        Ok(Self {
            node: place.node.clone(),
            ns: place.ns.clone(),
            cgroup: place.cgroup.join("host"),
            bpf_root: place.bpf_root.clone(),
            shunt,
            capabilities: options.capabilities.clone(),
            pod: options.pod.clone(),
            args,
            child: None,
            printed: Arc::default(),
        })
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(&self.shunt);
        command.stdin(Stdio::null()).env("NO_COLOR", "1");
        // Ctrl-C is for the program that has the lab, which then ends its agents.
        command.process_group(0);
        crate::client::join_cgroup(&mut command, &self.cgroup)?;
        self.ns.enter(&mut command)?;
        if let Some((server, run)) = &self.pod {
            command.env("KUBERNETES_SERVICE_HOST", server.ip().to_string());
            command.env("KUBERNETES_SERVICE_PORT", server.port().to_string());
            mount_at(&mut command, run, c"/run")?;
        }
        if let Some(names) = &self.capabilities {
            capabilities::keep_only(&mut command, names)?;
        }
        Ok(command)
    }

    /// Starts its process and does not wait for anything.
    ///
    /// # Errors
    ///
    /// When the binary cannot be run.
    pub fn spawn(&mut self) -> Result<()> {
        let mut command = self.command()?;
        command
            .args(&self.args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", self.shunt.display()))?;
        self.printed = Arc::default();
        if let Some(stdout) = child.stdout.take() {
            self.printed.collect(stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            self.printed.collect(stderr);
        }
        self.child = Some(child);
        Ok(())
    }

    /// Waits until its datapath is live.
    ///
    /// # Errors
    ///
    /// With what the agent printed, when it ends or is not ready in time.
    pub fn wait_ready(&mut self) -> Result<()> {
        let timeout = env::var(READY_ENV)
            .ok()
            .and_then(|text| text.parse().ok())
            .map_or(READY_TIMEOUT, Duration::from_secs);
        let deadline = Instant::now() + timeout;
        let printed = Arc::clone(&self.printed);
        let mut lines = printed.lines.lock().unwrap_or_else(PoisonError::into_inner);
        while lines.1.is_none() {
            let ended = self
                .child
                .as_mut()
                .and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                drop(lines);
                // What it printed last may still be in the pipe.
                thread::sleep(Duration::from_millis(50));
                bail!(
                    "the agent of {} ended ({status}): {}",
                    self.node,
                    self.output().trim()
                );
            }
            if Instant::now() >= deadline {
                bail!(
                    "the agent of {} is not ready after {timeout:?}: {}",
                    self.node,
                    lines.0.trim()
                );
            }
            lines = printed
                .changed
                .wait_timeout(lines, Duration::from_millis(50))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Its `ready: …` line.
    #[must_use]
    pub fn ready_line(&self) -> String {
        self.printed
            .lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .1
            .clone()
            .unwrap_or_default()
    }

    /// What it printed since it was last started, stdout and stderr.
    #[must_use]
    pub fn output(&self) -> String {
        self.printed
            .lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .clone()
    }

    /// Waits until what it printed contains `text`.
    ///
    /// # Errors
    ///
    /// With what it printed instead.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut lines = self
            .printed
            .lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while !lines.0.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "the agent of {} did not print {text:?} within {timeout:?}: {}",
                    self.node,
                    lines.0.trim()
                );
            }
            lines = self
                .printed
                .changed
                .wait_timeout(lines, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Its node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Where its objects are pinned.
    #[must_use]
    pub fn bpf_root(&self) -> &Path {
        &self.bpf_root
    }

    /// Its process, if it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Asks it to end (SIGTERM) and waits for that; the datapath stays.
    ///
    /// # Errors
    ///
    /// When it does not run, or does not end in time.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        let child = self
            .child
            .as_mut()
            .with_context(|| format!("the agent of {} does not run", self.node))?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().context("agent")? {
                self.child = None;
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        bail!(
            "the agent of {} does not end at SIGTERM within {STOP_TIMEOUT:?}: {}",
            self.node,
            self.output().trim()
        )
    }

    /// Ends it at once (SIGKILL); the datapath stays.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn kill(&mut self) -> Result<()> {
        let mut child = self
            .child
            .take()
            .with_context(|| format!("the agent of {} does not run", self.node))?;
        child.kill().context("agent")?;
        child.wait().context("agent").map(drop)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self
            .child
            .as_ref()
            .and_then(|child| Pid::from_raw(child.id().cast_signed()));
        let pid = pid.with_context(|| format!("the agent of {} does not run", self.node))?;
        kill_process(pid, signal).with_context(|| format!("the agent of {}", self.node))
    }

    /// Starts it again with the same arguments and waits until it is ready; one that runs is
    /// stopped first.
    ///
    /// # Errors
    ///
    /// With what the agent printed, when it ends or is not ready in time.
    pub fn restart(&mut self) -> Result<()> {
        if self.is_running() {
            self.stop()?;
        }
        self.spawn()?;
        self.wait_ready()
    }

    /// Gives `run` this option from its next start on, in the place of what it had.
    pub fn set_option(&mut self, name: &str, value: &str) {
        if let Some(at) = self.args.iter().position(|arg| arg == name) {
            self.args.drain(at..(at + 2).min(self.args.len()));
        }
        self.args.extend([name.to_owned(), value.to_owned()]);
    }

    /// Runs another binary from the next start on, as an upgrade of the image does.
    pub fn set_shunt(&mut self, binary: impl Into<PathBuf>) {
        self.shunt = binary.into();
    }

    /// A verb of the command line on this node's maps, with `--bpf-root` set, that is not run yet.
    ///
    /// # Errors
    ///
    /// When its namespace or cgroup cannot be entered.
    pub fn verb(&self, args: &[&str]) -> Result<Command> {
        let mut command = self.command()?;
        command.args(args).arg("--bpf-root").arg(&self.bpf_root);
        Ok(command)
    }

    /// Runs a verb of the command line on this node's maps, with `--bpf-root` set.
    ///
    /// # Errors
    ///
    /// When the binary cannot be run; its own failure is in the output's status.
    pub fn cli(&self, args: &[&str]) -> Result<Output> {
        self.verb(args)?
            .output()
            .with_context(|| format!("cannot run {}", self.shunt.display()))
    }

    /// Runs a verb with `-o json` and parses what it prints.
    ///
    /// # Errors
    ///
    /// With its message when it fails.
    pub fn json(&self, args: &[&str]) -> Result<serde_json::Value> {
        let output = self.cli(&[args, &["-o", "json"]].concat())?;
        let verb = args.join(" ");
        if !output.status.success() {
            bail!(
                "shunt {verb}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        serde_json::from_slice(&output.stdout).with_context(|| format!("shunt {verb} -o json"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // Cleans the node's devices too; that matters only to a lab that goes on without this
        // agent.
        let _ = self.cli(&["cleanup"]);
        registry::remove_pins(&self.bpf_root);
    }
}

/// Mounts bpffs where it is usually mounted, unless it is.
///
/// # Errors
///
/// When it cannot be mounted.
pub fn mount_bpffs() -> Result<()> {
    // Two that find it missing at once would mount one over the other, and hide its pins.
    let _guard = registry::registry_lock()?;
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
    if mounts.lines().any(|line| {
        line.split(' ').nth(2) == Some("bpf") && line.split(' ').nth(1) == Some(registry::BPFFS)
    }) {
        return Ok(());
    }
    rustix::mount::mount(
        "bpf",
        registry::BPFFS,
        "bpf",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .with_context(|| {
        format!(
            "{}: cannot mount bpffs: mount -t bpf bpf {}",
            registry::BPFFS,
            registry::BPFFS
        )
    })
}
