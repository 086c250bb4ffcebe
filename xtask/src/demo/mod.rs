//! The demo: a cluster in network namespaces, an agent per node, traffic through every frontend,
//! and a live table.

mod names;
mod stop;
mod table;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use shunt_lab::{
    Agent, AgentOptions, Client, Dial, Lab, Network, Overlay, PodSpec, Sockets,
    manifests::Manifests,
};

use crate::shell::{root, say, target};

use table::{Row, Vantage};
use view::{Address, Frontend, Hooks, View};

/// Flows per client and address in the one round that must meet every backend: with 6 clients and 3
/// backends the chance to miss one is below 10⁻¹⁵.
const FLOWS_ONCE: u32 = 16;
/// Flows per client and address in each round of the live table.
const FLOWS_LIVE: u32 = 2;
/// Pause between rounds of the live table.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a client waits for an answer: the lab answers within a millisecond.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Traffic through every frontend once; prints the table.
///
/// # Errors
///
/// When the cluster cannot be made, or a frontend was not answered by every one of its backends.
pub(crate) fn one_round(network: Network) -> Result<()> {
    let mut demo = Demo::start(network)?;
    demo.round(FLOWS_ONCE)?;
    println!("{}", demo.table());
    let missing = demo.missing();
    if !missing.is_empty() {
        bail!("not every backend answered: {}", missing.join("; "));
    }
    println!("every frontend was answered by every one of its backends");
    println!("{}", names::look_up(&demo.lab)?);
    Ok(())
}

/// Traffic and the table until Ctrl-C.
///
/// # Errors
///
/// When the cluster cannot be made.
pub(crate) fn live(network: Network) -> Result<()> {
    stop::on_signals();
    let mut demo = Demo::start(network)?;
    let hints = demo.hints()?;
    let mut screen = table::Screen::new();
    while !stop::requested() {
        demo.follow_manifests();
        if let Err(error) = demo.round(FLOWS_LIVE) {
            demo.notes.push(format!("{error:#}"));
        }
        let mut notes: Vec<_> = std::mem::take(&mut demo.notes);
        notes.extend(demo.said());
        screen.show(&format!("{}\n{}\n{hints}", demo.table(), notes.join("\n")));
        let until = Instant::now() + PAUSE;
        while !stop::requested() && Instant::now() < until {
            thread::sleep(Duration::from_millis(20));
        }
    }
    say("stop", "removing agents, namespaces and pins");
    Ok(())
}

struct Demo {
    // Dropped in this order: clients, agents, then the namespaces they are in.
    clients: Vec<(Vantage, Client)>,
    agents: Vec<Agent>,
    lab: Lab,
    /// Where the manifests are, and what they said last.
    folder: PathBuf,
    manifests: Manifests,
    rows: BTreeMap<Frontend, Row>,
    notes: Vec<String>,
}

impl Demo {
    fn start(network: Network) -> Result<Self> {
        let stale = Lab::sweep_stale()?;
        if stale > 0 {
            say(
                "demo",
                format_args!("removed what {stale} killed run(s) had left"),
            );
        }
        let folder = root().join("deploy/dev");
        // Where the network between the nodes does not know pods, their CNI hides them from the
        // outside.
        let network = Network {
            masquerade: network.masquerade || network.overlay != Overlay::None,
            ..network
        };
        let lab = Lab::builder().network(network).build()?;
        let manifests = Manifests::read(&folder)?;
        manifests.make(&lab)?;
        let mut clients = Vec::new();
        for node in lab.nodes() {
            // Pods of their own: a backend in TIME_WAIT may take a direct connection for one that
            // came through a frontend, if one pod makes both kinds.
            for (vantage, sockets, name) in [
                (Vantage::Pod, Sockets::Hooked, "shell"),
                (Vantage::Packets, Sockets::Unhooked, "packets"),
            ] {
                let pod = format!("{name}-{}", node.trim_start_matches("node-"));
                lab.add_pod(&PodSpec::new(&pod, node, &[]))?;
                clients.push((vantage, lab.client(&pod, sockets)?));
            }
        }
        clients.push((Vantage::Node, lab.client(&lab.nodes()[0], Sockets::Hooked)?));
        clients.push((Vantage::Outside, lab.client("client", Sockets::Unhooked)?));
        let options = AgentOptions::manifests(&folder)
            .finds_devices()
            .shunt(shunt())
            .args(&["--dns", "0.0.0.0", "--datapath-log", "info"]);
        let mut agents = Vec::new();
        for node in lab.nodes() {
            let agent = lab.start_agent(node, &options)?;
            say("demo", format_args!("{node}: {}", agent.ready_line()));
            agents.push(agent);
        }
        Ok(Self {
            clients,
            agents,
            lab,
            folder,
            manifests,
            rows: BTreeMap::new(),
            notes: Vec::new(),
        })
    }

    /// Makes pods that were added to the manifests and removes those that were taken out.
    fn follow_manifests(&mut self) {
        let followed = Manifests::read(&self.folder).and_then(|manifests| {
            if manifests != self.manifests {
                manifests.follow(&self.manifests, &self.lab)?;
                self.manifests = manifests;
            }
            Ok(())
        });
        // The same file is the agents' to report; here it says why no pod was made.
        if let Err(error) = followed {
            self.notes.push(format!("{error:#}"));
        }
    }

    /// Dials every frontend from every client `flows` times.
    fn round(&mut self, flows: u32) -> Result<()> {
        let mut view = View::read(&self.agents)?;
        let frontends: BTreeSet<Frontend> = view.frontends.keys().cloned().collect();
        self.rows.retain(|frontend, _| frontends.contains(frontend));
        for frontend in frontends {
            if stop::requested() {
                break;
            }
            let mut row = self.rows.remove(&frontend).unwrap_or_default();
            row.backends = view
                .frontends
                .get(&frontend)
                .into_iter()
                .flatten()
                .map(|&ip| self.name_of(ip))
                .collect();
            for (vantage, client) in &self.clients {
                for to in self.targets(&frontend, *vantage)? {
                    dial(client, *vantage, &frontend, to, flows, &mut row)?;
                }
            }
            let after = View::read(&self.agents)?;
            row.hooks += after.hooks(&frontend).since(view.hooks(&frontend));
            view = after;
            self.rows.insert(frontend, row);
        }
        Ok(())
    }

    /// The addresses that a client dials for a frontend: a node port is reached on every node, and
    /// on the node itself.
    fn targets(&self, frontend: &Frontend, vantage: Vantage) -> Result<Vec<SocketAddr>> {
        let ips: Vec<IpAddr> = match frontend.address {
            Address::Ip(ip) => vec![ip],
            Address::NodePort { ipv6: false } if vantage == Vantage::Node => {
                vec![Ipv4Addr::LOCALHOST.into()]
            }
            Address::NodePort { ipv6 } => {
                let ips = self
                    .lab
                    .nodes()
                    .iter()
                    .map(|node| Ok(self.lab.node_ips(node)?[usize::from(ipv6)]));
                ips.collect::<Result<_>>()?
            }
        };
        Ok(ips
            .into_iter()
            .map(|ip| SocketAddr::new(ip, frontend.port))
            .collect())
    }

    /// The name that the server at an address answers with.
    fn name_of(&self, ip: IpAddr) -> String {
        self.lab.name_of(ip).unwrap_or_else(|| ip.to_string())
    }

    fn table(&self) -> String {
        table::render(&self.rows)
    }

    /// What the datapath of each node said last (`--datapath-log`).
    fn said(&self) -> Vec<String> {
        let last = |agent: &Agent| {
            let output = agent.output();
            let line = output
                .lines()
                .rfind(|line| line.contains("shunt::programs"))?;
            Some(line.to_owned())
        };
        self.agents.iter().filter_map(last).collect()
    }

    /// Frontends, with those of their backends that did not answer, and dials that failed.
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.rows.is_empty() {
            missing.push("there are no frontends".to_owned());
        }
        for (frontend, row) in &self.rows {
            let silent: Vec<&str> = row
                .backends
                .iter()
                .filter(|name| !row.servers.contains_key(*name))
                .map(String::as_str)
                .collect();
            if !silent.is_empty() {
                missing.push(format!("{frontend}: nothing from {}", silent.join(", ")));
            }
            if row.backends.is_empty() {
                missing.push(format!("{frontend}: it has no backends"));
            }
            missing.extend(
                row.errors
                    .iter()
                    .map(|(error, count)| format!("{frontend}: {error} ({count} times)")),
            );
        }
        missing
    }

    /// Commands to try from another shell.
    fn hints(&self) -> Result<String> {
        let client = self.lab.ns("client")?;
        let agent = self.agents.first().context("no agent")?;
        let in_pod = names::script(&self.lab)?;
        let in_pod = in_pod.display();
        let shunt = shunt();
        let (client, shunt, root) = (
            client.path().display(),
            shunt.display(),
            agent.bpf_root().display(),
        );
        let web = self
            .rows
            .keys()
            .chain(&[])
            .find_map(|frontend| match frontend.address {
                Address::Ip(ip @ IpAddr::V4(_)) if frontend.kind == "LoadBalancer" => {
                    Some(SocketAddr::new(ip, frontend.port))
                }
                _ => None,
            });
        let web = web.map_or_else(|| "198.51.100.80:80".to_owned(), |web| web.to_string());
        Ok(format!(
            "Try from another shell (as root):\n  \
             nsenter --net={client} curl -s http://{web}/\n  \
             {in_pod} curl -s http://web.default.svc.cluster.local/\n  \
             {shunt} backends --bpf-root {root}\n  \
             bpftool map dump pinned {root}/v5/maps/frontends4\n  \
             edit {}/web.yaml and watch\n\
             Ctrl-C ends it.",
            self.folder.display()
        ))
    }
}

/// Dials one address some times and adds what came of it to the row.
fn dial(
    client: &Client,
    vantage: Vantage,
    frontend: &Frontend,
    to: SocketAddr,
    flows: u32,
    row: &mut Row,
) -> Result<()> {
    let dial = Dial::within(TIMEOUT);
    // The first alone: where nothing answers, one time-out says it as well as many.
    for count in [1, flows.saturating_sub(1)] {
        let many = client.many(frontend.proto, to, count, &dial)?;
        for (server, count) in many.servers {
            *row.servers.entry(server).or_default() += count;
        }
        row.latencies
            .entry(vantage)
            .or_default()
            .extend(many.latencies);
        let failed = !many.errors.is_empty();
        for (error, count) in many.errors {
            *row.errors
                .entry(format!(
                    "{to} from {} ({vantage:?}): {error}",
                    client.name()
                ))
                .or_default() += count;
        }
        if failed {
            break;
        }
    }
    Ok(())
}

impl Hooks {
    /// What was counted since an earlier reading.
    fn since(self, before: Self) -> Self {
        Self {
            socket: self.socket.saturating_sub(before.socket),
            tc: self.tc.saturating_sub(before.tc),
            xdp: self.xdp.saturating_sub(before.xdp),
        }
    }
}

impl std::ops::AddAssign for Hooks {
    fn add_assign(&mut self, other: Self) {
        self.socket += other.socket;
        self.tc += other.tc;
        self.xdp += other.xdp;
    }
}

/// The agent of the demo: the release build, or what `SHUNT_BIN` names.
fn shunt() -> PathBuf {
    std::env::var_os("SHUNT_BIN").map_or_else(|| target().join("release/shunt"), PathBuf::from)
}
