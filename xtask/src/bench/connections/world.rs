//! Clusters of namespaces that differ in one thing: how a Service's traffic finds its backend.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use anyhow::{Context, Result, bail};
use shunt_lab::{Agent, AgentOptions, Lab, PodSpec, Sockets};

use super::{
    kube_proxy::{Mode, Service},
    peer::Peer,
};

/// The port that servers listen on.
const APP: u16 = 8080;
/// The Service whose backend is on the node that clients come to.
const NEAR: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 10), 30_080);
/// The Service whose backend is on the other node.
const FAR: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 11), 30_081);
/// The port of all Services.
const PORT: u16 = 80;

/// How Services are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Means {
    /// Not at all: clients dial pods.
    Direct,
    /// By the floor program at tc, on the client's device and the node's.
    Floor,
    /// By the same on every pod's device as well: any pod may be a client, which nobody knows
    /// beforehand.
    FloorOnPods,
    /// By shunt with the settings that it has without being asked.
    Shunt,
    /// By shunt with `--fast-path on`.
    FastPath,
    /// By the rules that kube-proxy writes.
    KubeProxy(Mode),
}

/// From where clients come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Seat {
    /// A pod whose sockets the node's hooks see.
    HookedPod,
    /// One outside of the node's cgroup, as a VM or a sandboxed pod. Not the same pod: Linux gives
    /// the time stamps of a TCP connection an offset by address dialled, so a backend that still
    /// has one in TIME_WAIT may not take the other.
    Pod,
    /// A neighbour of the nodes on their network.
    Lan,
}

/// What clients dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Dialled {
    /// The ClusterIP; the backend is on the client's node.
    ClusterIp,
    /// The node's port; the backend is on that node.
    NodePortNear,
    /// The node's port; the backend is on another node.
    NodePortFar,
}

/// One cluster. Fields are dropped in their order: the lab last.
pub(super) struct World {
    clients: BTreeMap<Seat, Peer>,
    _servers: Vec<Peer>,
    floor: Option<Child>,
    _agent: Option<Agent>,
    means: Means,
    pods: [IpAddr; 2],
    node: IpAddr,
    _folder: Option<Folder>,
    _lab: Lab,
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(floor) = &mut self.floor {
            let _ = floor.kill();
            let _ = floor.wait();
        }
    }
}

/// Programs that are needed.
pub(super) struct Tools {
    /// The agent.
    pub(super) shunt: PathBuf,
    /// `shunt-bench`, which has the floor program.
    pub(super) bench: PathBuf,
}

impl World {
    /// Makes a cluster with so many Services.
    ///
    /// # Errors
    ///
    /// When something of it cannot be made.
    pub(super) fn make(means: Means, count: usize, tools: &Tools) -> Result<Self> {
        // Offloads as veths have them.
        let lab = Lab::builder().checksum_offload().build()?;
        for (pod, node) in [
            ("front", "node-a"),
            ("hooked", "node-a"),
            ("near", "node-a"),
            ("far", "node-b"),
        ] {
            lab.add_pod(&PodSpec::new(pod, node, &[]))?;
        }
        let node = lab.node_ips("node-a")?[0];
        let pod = |name: &str| -> Result<IpAddr> {
            lab.ips(name)?
                .into_iter()
                .find(|ip| ip.is_ipv4())
                .context("no IPv4 address")
        };
        let pods = [pod("near")?, pod("far")?];
        let servers = vec![
            Peer::server(&lab, "near", APP)?,
            Peer::server(&lab, "far", APP)?,
        ];
        let (mut agent, mut floor, mut folder) = (None, None, None);
        match means {
            Means::Direct => {
                // By way of the node that the node port is on.
                lab.route(&format!("{}/32", pods[1]), "node-a")?;
            }
            Means::Floor => floor = Some(start_floor(&lab, tools, pods[0], node, &["front"])?),
            Means::FloorOnPods => {
                floor = Some(start_floor(
                    &lab,
                    tools,
                    pods[0],
                    node,
                    &["front", "hooked", "near"],
                )?);
            }
            Means::Shunt | Means::FastPath => {
                let manifests = Folder::make()?;
                fs::write(
                    manifests.0.join("services.yaml"),
                    yaml(&services(count, pods)?),
                )?;
                let mut options = AgentOptions::manifests(&manifests.0)
                    .xdp("auto")
                    .shunt(&tools.shunt);
                if count > 20_000 {
                    // More than fit by default.
                    options =
                        options.args(&["--max-frontends", "262144", "--max-backends", "262144"]);
                }
                if means == Means::FastPath {
                    options = options.args(&["--fast-path", "on"]);
                }
                agent = Some(lab.start_agent("node-a", &options)?);
                folder = Some(manifests);
            }
            Means::KubeProxy(mode) => mode.load(&lab, "node-a", &services(count, pods)?)?,
        }
        let mut clients = BTreeMap::new();
        for (seat, place, sockets) in [
            (Seat::HookedPod, "hooked", Sockets::Hooked),
            (Seat::Pod, "front", Sockets::Unhooked),
            (Seat::Lan, "fabric", Sockets::Unhooked),
        ] {
            clients.insert(seat, Peer::client(&lab, place, sockets)?);
        }
        Ok(Self {
            clients,
            _servers: servers,
            floor,
            _agent: agent,
            means,
            pods,
            node,
            _folder: folder,
            _lab: lab,
        })
    }

    /// The address that stands for what is dialled, here.
    pub(super) fn address(&self, dialled: Dialled) -> SocketAddr {
        match (self.means, dialled) {
            (Means::Direct, Dialled::ClusterIp | Dialled::NodePortNear) => {
                SocketAddr::new(self.pods[0], APP)
            }
            (Means::Direct, Dialled::NodePortFar) => SocketAddr::new(self.pods[1], APP),
            (_, Dialled::ClusterIp) => SocketAddr::new(NEAR.0.into(), PORT),
            (_, Dialled::NodePortNear) => SocketAddr::new(self.node, NEAR.1),
            (_, Dialled::NodePortFar) => SocketAddr::new(self.node, FAR.1),
        }
    }

    /// A client.
    ///
    /// # Errors
    ///
    /// Never: every world has all of them.
    pub(super) fn client(&mut self, seat: Seat) -> Result<&mut Peer> {
        self.clients.get_mut(&seat).context("no client there")
    }
}

fn start_floor(
    lab: &Lab,
    tools: &Tools,
    backend: IpAddr,
    node: IpAddr,
    pods: &[&str],
) -> Result<Child> {
    let mut command = lab.command("node-a", Sockets::Unhooked, &tools.bench)?;
    command.args(["nat", "--device", "eth0"]);
    for pod in pods {
        command.args(["--device", &lab.device(pod)?]);
    }
    let frontends = [
        SocketAddr::new(NEAR.0.into(), PORT),
        SocketAddr::new(node, NEAR.1),
    ];
    for frontend in frontends {
        command.args(["--service", &format!("{frontend}={backend}:{APP}")]);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", tools.bench.display()))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    if line.trim_end() != "ready" {
        let _ = child.kill();
        let status = child.wait()?;
        bail!("the floor program does not start ({status})");
    }
    Ok(child)
}

/// The two Services that are dialled among so many, in the middle: rules that are gone through one
/// by one meet half of the others first.
fn services(count: usize, pods: [IpAddr; 2]) -> Result<Vec<Service>> {
    let [IpAddr::V4(near), IpAddr::V4(far)] = pods else {
        bail!("pods without IPv4 addresses");
    };
    let dialled =
        [("near", NEAR, near), ("far", FAR, far)].map(|(name, (ip, node_port), backend)| Service {
            name: name.to_owned(),
            ip,
            port: PORT,
            node_port: Some(node_port),
            backend,
            backend_port: APP,
        });
    let other = |number: usize| {
        // At most 17 bits.
        let number = number as u32;
        Service {
            name: format!("other-{number}"),
            ip: Ipv4Addr::from_bits(Ipv4Addr::new(10, 100, 0, 0).to_bits() + number),
            port: PORT,
            node_port: None,
            backend: Ipv4Addr::from_bits(Ipv4Addr::new(10, 46, 0, 0).to_bits() + number),
            backend_port: APP,
        }
    };
    let others = count.saturating_sub(1);
    let before = (0..others / 2).map(other);
    Ok(before
        .chain(dialled)
        .chain((others / 2..others).map(other))
        .collect())
}

/// The Services as manifests.
fn yaml(services: &[Service]) -> String {
    let mut text = String::new();
    for service in services {
        let Service {
            name,
            ip,
            port,
            backend,
            backend_port,
            ..
        } = service;
        let (kind, node_port) = match service.node_port {
            Some(port) => ("NodePort", format!(", nodePort: {port}")),
            None => ("ClusterIP", String::new()),
        };
        let node = if name == "near" { "node-a" } else { "node-b" };
        let _ = write!(
            text,
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec:\n  type: {kind}\n  clusterIP: {ip}\n  \
             clusterIPs: [{ip}]\n  ports: [{{ port: {port}, targetPort: {backend_port}{node_port} }}]\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-1\n  \
             labels: {{ kubernetes.io/service-name: {name} }}\naddressType: IPv4\nports: [{{ name: '', port: {backend_port}, \
             protocol: TCP }}]\nendpoints: [{{ addresses: [{backend}], nodeName: {node}, conditions: {{ ready: true }} }}]\n---\n"
        );
    }
    text
}

/// A temporary folder; removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn make() -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("shunt-bench-{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("{}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(Path::new(&self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dialled_services_stand_in_the_middle() {
        let pods = [IpAddr::from([10, 44, 0, 1]), IpAddr::from([10, 44, 1, 1])];
        let names = |count| {
            let services = services(count, pods).unwrap();
            services
                .into_iter()
                .map(|service| service.name)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(1), ["near", "far"]);
        let names = names(1001);
        assert_eq!(
            (names.len(), names[500].as_str(), names[501].as_str()),
            (1002, "near", "far")
        );
    }
}
