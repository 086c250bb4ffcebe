//! The image, imported into a containerd of its own and run as the DaemonSet runs it: read-only,
//! with three capabilities, in a node of the lab, answering a real client.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use shunt_lab::{Lab, PodSpec, Port, Sockets};

use super::oci::NAME;
use crate::shell::{capture, is_root, run, say, target, which};

/// Debian's packages of containerd; unpacked, not installed: installing them would start a service
/// on this machine.
const PACKAGES: [&str; 2] = ["containerd", "runc"];
/// What the agent's container has in `deploy/base/daemonset.yaml`.
const GRANTED: [&str; 3] = ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"];
/// What `ctr` grants every container unless told otherwise.
const DEFAULTS: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];
/// Where the container sees the node's cgroups, as in the DaemonSet.
const CGROUP: &str = "/run/shunt/cgroup";
const MANIFESTS: &str = "/manifests";
/// Longest wait for anything that takes a second.
const PATIENCE: Duration = Duration::from_secs(30);
const APP: u16 = 8080;

/// Imports the archive, starts the agent from it, opens connections through a Service, and removes
/// everything again.
///
/// # Errors
///
/// With what does not work.
pub(super) fn trial(archive: &Path) -> Result<()> {
    ensure!(
        is_root(),
        "--try makes namespaces and containers: run this as root"
    );
    let containerd = Containerd::start()?;
    capture(containerd.ctr().args(["images", "import"]).arg(archive))?;
    let images = capture(containerd.ctr().args(["images", "ls", "--quiet"]))?;
    ensure!(
        images.lines().any(|line| line == NAME),
        "containerd has {images:?} instead of {NAME}"
    );
    say(
        "imported",
        format_args!("{NAME} into a containerd of its own"),
    );

    let lab = Lab::builder().nodes(&["node-a"]).build()?;
    lab.add_pod(&PodSpec::new("web", "node-a", &[Port::tcp(APP)]))?;
    lab.add_pod(&PodSpec::new("client-pod", "node-a", &[]))?;
    let manifests = containerd.folder.join("manifests");
    fs::create_dir(&manifests)?;
    fs::write(manifests.join("web.yaml"), manifest(&lab.ips("web")?))?;
    let bpf_root = lab.bpf_root("node-a");
    let agent = Container {
        containerd: &containerd,
        lab: &lab,
        manifests: &manifests,
    };
    let result = agent.serve(&bpf_root);
    // Also after a failure: what the agent attached must not outlive its node.
    let cleaned = capture(&mut agent.command(
        "cleanup",
        &["cleanup", "--bpf-root", &bpf_root.to_string_lossy()],
    )?);
    shunt_lab::remove_pins(&bpf_root);
    result?;
    cleaned?;
    say(
        "tried",
        "the agent in the image loads, attaches, serves and cleans up with BPF, NET_ADMIN and PERFMON",
    );
    Ok(())
}

/// A Service and its pod.
fn manifest(ips: &[IpAddr]) -> String {
    let list: Vec<String> = ips.iter().map(|ip| format!("{{ ip: '{ip}' }}")).collect();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: web }}\nspec:\n  clusterIP: 10.96.0.1\n  \
         clusterIPs: [10.96.0.1, 'fd96::1']\n  ipFamilies: [IPv4, IPv6]\n  selector: {{ app: web }}\n  \
         ports: [{{ port: 80, targetPort: {APP} }}]\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{ name: web, labels: {{ app: web }} }}\n\
         spec: {{ nodeName: node-a, containers: [{{ name: app }}] }}\n\
         status: {{ podIPs: [{}], conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
        list.join(", ")
    )
}

/// Containers of the image on the lab's node.
struct Container<'a> {
    containerd: &'a Containerd,
    lab: &'a Lab,
    manifests: &'a Path,
}

impl Container<'_> {
    /// `ctr run` of the image with these arguments of shunt.
    fn command(&self, id: &str, args: &[&str]) -> Result<Command> {
        let mut command = self.containerd.ctr();
        command.args(["run", "--rm", "--read-only"]);
        for capability in DEFAULTS {
            command.args(["--cap-drop", capability]);
        }
        for capability in GRANTED {
            command.args(["--cap-add", capability]);
        }
        let network = self.lab.ns("node-a")?;
        command.args([
            "--with-ns",
            &format!("network:{}", network.path().display()),
        ]);
        let cgroup = self.lab.node_cgroup("node-a");
        for (from, to, options) in [
            (Path::new("/sys/fs/bpf"), "/sys/fs/bpf", "rbind:rw"),
            (&cgroup, CGROUP, "rbind:ro"),
            (self.manifests, MANIFESTS, "rbind:ro"),
        ] {
            let mount = format!(
                "type=bind,src={},dst={to},options={options}",
                from.display()
            );
            command.args(["--mount", &mount]);
        }
        command.args([NAME, id, "/usr/bin/shunt"]).args(args);
        Ok(command)
    }

    fn serve(&self, bpf_root: &Path) -> Result<()> {
        shunt_lab::mount_bpffs()?;
        let bpf_root = bpf_root.to_string_lossy();
        let version = capture(&mut self.command("version", &["--version"])?)?;
        ensure!(
            version.trim() == concat!("shunt ", env!("CARGO_PKG_VERSION")),
            "the image has {version:?}"
        );
        let node_ips = self
            .lab
            .node_ips("node-a")?
            .map(|ip| ip.to_string())
            .join(",");
        let mut command = self.command(
            "agent",
            &[
                "run",
                "--node-name=node-a",
                "--devices=eth0",
                "--pod-devices=veth*",
                "--xdp=generic",
                "--max-flows=8192",
                "--max-new-flows=4096",
                "--max-snat=32768",
                &format!("--manifests={MANIFESTS}"),
                &format!("--cgroup-root={CGROUP}"),
                &format!("--node-ip={node_ips}"),
                &format!("--bpf-root={bpf_root}"),
            ],
        )?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = Started(command.spawn().context("cannot run ctr")?);
        let ready = first_line(&mut child.0, "ready: ")?;
        say("running", ready);
        for name in ["client-pod", "client"] {
            let client = self.lab.client(
                name,
                if name == "client" {
                    Sockets::Unhooked
                } else {
                    Sockets::Hooked
                },
            )?;
            for ip in ["10.96.0.1", "fd96::1"] {
                let to = SocketAddr::new(ip.parse()?, 80);
                let answer = client
                    .tcp(to)
                    .map_err(|error| anyhow::anyhow!("{name} to {to}: {error}"))?;
                ensure!(
                    answer.server == "web",
                    "{name} to {to}: answered by {}",
                    answer.server
                );
            }
        }
        capture(
            self.containerd
                .ctr()
                .args(["task", "kill", "--signal", "SIGTERM", "agent"]),
        )?;
        let status = child.0.wait().context("ctr run")?;
        ensure!(status.success(), "the agent ended with {status} at SIGTERM");
        Ok(())
    }
}

/// The first line of a process's output that begins so.
fn first_line(child: &mut Child, begin: &'static str) -> Result<String> {
    let (tx, rx) = mpsc::channel();
    let stdout = child.stdout.take().context("no stdout")?;
    let stderr = child.stderr.take().context("no stderr")?;
    let forward = |lines: &mut dyn Iterator<Item = String>, tx: mpsc::Sender<String>| {
        for line in lines {
            // Goes on reading when nobody listens any more, so that the agent never blocks.
            let _ = tx.send(line);
        }
    };
    let other = tx.clone();
    thread::spawn(move || {
        forward(
            &mut BufReader::new(stdout).lines().map_while(Result::ok),
            tx,
        )
    });
    thread::spawn(move || {
        forward(
            &mut BufReader::new(stderr).lines().map_while(Result::ok),
            other,
        )
    });
    let mut all = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match rx.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) if line.starts_with(begin) => return Ok(line),
            Ok(line) => all.push(line),
            Err(_) => bail!("the agent did not get ready: {}", all.join("\n")),
        }
    }
}

/// A process that ends with this value.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A containerd with its own folder and socket, and nothing of the machine's.
struct Containerd {
    /// Folder of its programs, for `PATH`.
    programs: Vec<PathBuf>,
    folder: PathBuf,
    process: Option<Started>,
}

impl Containerd {
    fn start() -> Result<Self> {
        let programs = find()?;
        // A socket's path has at most 107 bytes; a target folder may be deep.
        let folder = PathBuf::from(format!("/run/shunt-image-{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("{}", folder.display()))?;
        let mut it = Self {
            programs,
            folder,
            process: None,
        };
        let config = it.folder.join("config.toml");
        // Without the part for Kubernetes, which wants a network configuration.
        fs::write(
            &config,
            "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n",
        )?;
        let log = fs::File::create(it.folder.join("log"))?;
        let mut command = it.command("containerd");
        command.arg("--config").arg(config);
        command
            .arg("--root")
            .arg(it.folder.join("root"))
            .arg("--state")
            .arg(it.folder.join("state"));
        command.arg("--address").arg(it.socket());
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        it.process = Some(Started(command.spawn().context("cannot run containerd")?));
        let deadline = Instant::now() + PATIENCE;
        while capture(it.ctr().arg("version")).is_err() {
            if Instant::now() > deadline {
                let log = fs::read_to_string(it.folder.join("log")).unwrap_or_default();
                bail!(
                    "containerd does not answer: {}",
                    log.lines().last().unwrap_or("it says nothing")
                );
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(it)
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("socket")
    }

    fn command(&self, program: &str) -> Command {
        let folder = self
            .programs
            .iter()
            .find(|folder| folder.join(program).is_file());
        let mut command = Command::new(
            folder.map_or_else(|| PathBuf::from(program), |folder| folder.join(program)),
        );
        // containerd looks for its shim and runc there.
        let usual = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(
            self.programs
                .iter()
                .cloned()
                .chain(std::env::split_paths(&usual)),
        );
        command.env("PATH", path.unwrap_or(usual));
        command
    }

    fn ctr(&self) -> Command {
        let mut command = self.command("ctr");
        command.arg("--address").arg(self.socket());
        command
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Containers that a failure left behind hold the node's namespace.
        for verb in ["task", "container"] {
            let args: &[&str] = if verb == "task" {
                &["rm", "--force", "agent"]
            } else {
                &["rm", "agent"]
            };
            let _ = self.ctr().arg(verb).args(args).output();
        }
        self.process = None;
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Folders with containerd's programs: none when they are installed; else those of Debian's
/// packages, unpacked below the target folder.
fn find() -> Result<Vec<PathBuf>> {
    if ["containerd", "ctr", "runc"]
        .into_iter()
        .all(|program| which(program).is_some())
    {
        return Ok(Vec::new());
    }
    let folder = target().join("tools/containerd");
    let programs = vec![folder.join("usr/bin"), folder.join("usr/sbin")];
    if programs[0].join("containerd").is_file() && programs[1].join("runc").is_file() {
        return Ok(programs);
    }
    ensure!(
        which("apt-get").is_some() && which("dpkg").is_some(),
        "there is no containerd: install it, with ctr and runc"
    );
    say(
        "setup",
        format_args!(
            "unpacking Debian's {} in {}",
            PACKAGES.join(" and "),
            folder.display()
        ),
    );
    fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    capture(
        Command::new("apt-get")
            .args(["download", "--quiet"])
            .args(PACKAGES)
            .current_dir(&folder),
    )?;
    for entry in fs::read_dir(&folder)? {
        let package = entry?.path();
        if package
            .extension()
            .is_some_and(|extension| extension == "deb")
        {
            run(Command::new("dpkg").arg("-x").arg(&package).arg(&folder))?;
            fs::remove_file(&package)?;
        }
    }
    Ok(programs)
}
