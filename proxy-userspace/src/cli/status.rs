//! `shunt status`: whether an agent runs, how full the maps are, what is attached, what was
//! counted.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use shunt_common::{
    layout::{CONFIG_SOCKETS_OF_NODE, Config, LAYOUT_VERSION, names},
    snat,
};

use super::{Common, listening, open, print, table};
use crate::{
    datapath::{
        Paths, XDP_PROGRAM,
        attach::{TcMode, pinned_links},
        devices::{self, DevicePatterns, LeftOut, Role},
        load::SocketLb,
        lock::agent_pid,
        maps::{MapFamily, Maps, PerFamily, Usage},
        start::{self, Start},
        trace,
        xdp::{self, Facts, XdpMode},
    },
    sync::table::FamilyIndex,
};

/// Columns for the names of programs.
const PROGRAM_COLUMNS: usize = 70;
/// How often `--watch` looks.
const LOOK: Duration = Duration::from_secs(1);

/// `shunt status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    common: Common,
    /// Go on, and print the first line again when it changes (with -o json or yaml: all).
    #[arg(short, long)]
    watch: bool,
}

/// What `shunt status` prints.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// What is wrong on this node and what to do about it; none: it is fine.
    pub problems: Vec<Fault>,
    /// `--bpf-root`.
    pub bpf_root: PathBuf,
    /// [`LAYOUT_VERSION`] of the maps.
    pub layout: u32,
    /// Process id of the agent that works with this `--bpf-root`; `None`: none runs, and the
    /// datapath goes on alone.
    pub agent_pid: Option<u32>,
    /// The agent's last start, if it came to its end; `None` also when that agent was of another
    /// version.
    pub start: Option<Start>,
    /// Where that agent answers DNS queries; none: it does not.
    pub dns: Vec<SocketAddr>,
    /// Number of Services.
    pub services: u64,
    /// Number of frontend entries, two per frontend.
    pub frontend_entries: usize,
    /// Sources of translated packets, one per family.
    pub node_addresses: Vec<IpAddr>,
    /// Addresses that node ports answer on.
    pub node_port_addresses: Vec<IpAddr>,
    /// First and last port of the SNAT range.
    pub snat_ports: (u16, u16),
    /// How many of them the kernel gives to no socket: new flows have those first.
    pub snat_ports_of_their_own: u16,
    /// `--socket-lb`, as it has effect: whose new sockets the hook serves.
    pub socket_lb: SocketLb,
    /// How full the maps are.
    pub maps: Vec<Usage>,
    /// Links that hold programs to their hooks.
    pub links: Vec<Link>,
    /// Devices of this network namespace that lack a program, and why.
    pub without_programs: Vec<Without>,
    /// `shunt trace`s at work.
    pub tracers: usize,
    /// Counters by name.
    pub events: BTreeMap<&'static str, u64>,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// What.
    pub what: String,
    /// What to do about it.
    pub advice: String,
}

/// How full, in percent, a map may be that refuses what does not fit.
const MOST_FULL: u64 = 90;

/// Whether a full map makes room by itself.
fn makes_room(map: &str) -> bool {
    [
        names::FLOWS,
        names::UNCONFIRMED,
        names::AFFINITY,
        names::NEW_AFFINITY,
        names::SNAT,
        names::FRAGMENTS,
    ]
    .iter()
    .any(|pair| pair.contains(&map))
}

/// A pinned link.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Link {
    /// `cgroup`, or the device's name when it was attached.
    pub target: String,
    /// The program's name.
    pub program: String,
    /// The kernel's number of the link.
    pub link: u32,
    /// The kernel's number of the program.
    pub program_id: u32,
    /// False when its device is gone.
    pub attached: bool,
}

/// A device without a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Without {
    /// Its name.
    pub device: String,
    /// `tc` or `xdp`.
    pub what: &'static str,
    /// Why it has none.
    pub reason: String,
}

/// Devices that lack programs, as the kernel lists devices now.
fn without_programs(
    paths: &Paths,
    links: &[Link],
    node_ips: &[IpAddr],
) -> anyhow::Result<Vec<Without>> {
    let has = |device: &str, part: &str| {
        links
            .iter()
            .any(|link| link.target == device && link.attached && link.program.starts_with(part))
    };
    let patterns = DevicePatterns {
        node_ips: node_ips.iter().copied().collect(),
        ..DevicePatterns::default()
    };
    let (taken, left_out) = patterns.select(devices::list().context("cannot list the devices")?);
    let mut without: Vec<Without> = left_out
        .into_iter()
        .filter(|device| !has(&device.name, "tc_"))
        .map(|LeftOut { name, reason }| Without {
            device: name,
            what: "tc",
            reason: reason.into_owned(),
        })
        .collect();
    let facts = Facts::read(XdpMode::Auto);
    for (device, role) in taken {
        let clsact = TcMode::probe() == TcMode::Clsact;
        if !has(&device.name, "tc_") && !clsact {
            without.push(Without {
                device: device.name,
                what: "tc",
                reason: "--devices or --pod-devices leave it out, or no agent has seen it"
                    .to_owned(),
            });
        } else if role == Role::Node && !has(&device.name, XDP_PROGRAM) {
            // What was asked for is not pinned: the reason that holds for more modes goes first.
            let reason = if paths.program(XDP_PROGRAM).exists() {
                xdp::refusal(XdpMode::Native, &device, &facts)
                    .or_else(|| xdp::refusal(XdpMode::Auto, &device, &facts))
                    .unwrap_or_else(|| {
                        "the driver refused it, or takes no frames from it".to_owned()
                    })
            } else {
                "--xdp off".to_owned()
            };
            without.push(Without {
                device: device.name,
                what: "xdp",
                reason,
            });
        }
    }
    Ok(without)
}

impl Status {
    /// Gathers it all.
    ///
    /// # Errors
    /// When a map or a link cannot be read: `EPERM` without `CAP_BPF`, or an agent is removing them
    /// at this moment. Nothing has changed: try again, as root.
    pub fn read(maps: &Maps) -> anyhow::Result<Self> {
        let paths = Paths::new(maps.root());
        let config = maps.config()?;
        let mut node_port_addresses = addresses(&maps.v4)?;
        node_port_addresses.extend(addresses(&maps.v6)?);
        let node_addresses = [IpAddr::from(config.v4.node), IpAddr::from(config.v6.node)];
        let mut frontend_entries = 0;
        for family in FamilyIndex::ALL {
            frontend_entries += maps.table(family).entries()?.len();
        }
        let links: Vec<Link> = pinned_links(&paths)?
            .into_iter()
            .map(|link| Link {
                attached: link.index != Some(0),
                target: link.target,
                program: link.program,
                link: link.link,
                program_id: link.program_id,
            })
            .collect();
        let agent_pid = agent_pid(maps.root());
        let mut status = Self {
            problems: Vec::new(),
            bpf_root: maps.root().into(),
            layout: LAYOUT_VERSION,
            agent_pid,
            dns: agent_pid.map(listening::udp).unwrap_or_default(),
            start: start::read(&paths)?,
            services: maps.services.count(|_| true)?,
            frontend_entries,
            node_addresses: node_addresses
                .into_iter()
                .filter(|a| !a.is_unspecified())
                .collect(),
            node_port_addresses,
            snat_ports: (
                config.snat_first,
                config
                    .snat_first
                    .saturating_add(config.snat_ports.saturating_sub(1)),
            ),
            snat_ports_of_their_own: snat::of_their_own(&config),
            socket_lb: socket_lb(&links, &config),
            maps: maps.usage()?,
            without_programs: without_programs(&paths, &links, &node_addresses)?,
            links,
            tracers: trace::active(maps.root())?,
            events: maps
                .events()?
                .into_iter()
                .map(|(event, n)| (event.name(), n))
                .collect(),
        };
        status.problems = status.find_problems();
        Ok(status)
    }

    /// What is wrong, the worst first.
    fn find_problems(&self) -> Vec<Fault> {
        let mut problems = Vec::new();
        let mut add = |what: String, advice: String| problems.push(Fault { what, advice });
        let attached = self.links.iter().any(|link| link.attached);
        match (self.agent_pid, attached) {
            (Some(_), true) => {}
            (None, true) => add(
                "no agent runs, and changes of Services are not followed".to_owned(),
                "start it (`shunt run`); what is known is served meanwhile".to_owned(),
            ),
            (None, false) => add(
                "no agent runs, and no program is attached".to_owned(),
                "start it (`shunt run`)".to_owned(),
            ),
            (Some(pid), false) => add(
                format!("the agent (pid {pid}) has attached no program"),
                "it is starting, or its log says what it waits for".to_owned(),
            ),
        }
        for usage in &self.maps {
            let percent = 100 * usage.entries / u64::from(usage.capacity.max(1));
            if percent >= MOST_FULL && !makes_room(usage.map) {
                add(
                    format!("map {} is {percent} % full", usage.map),
                    format!("give more with {}", usage.setting),
                );
            }
        }
        if self.node_addresses.is_empty() {
            add(
                "this node has no address to translate sources to".to_owned(),
                "name it with --node-ip, or let the Node object have one".to_owned(),
            );
        }
        problems
    }

    /// One line: fine, or what is wrong and what to do.
    pub fn headline(&self) -> String {
        let Some(first) = self.problems.first() else {
            let devices: BTreeSet<&str> = self
                .links
                .iter()
                .filter(|link| link.attached && link.target != "cgroup")
                .map(|link| link.target.as_str())
                .collect();
            return format!(
                "fine: {} Services, programs on {} devices",
                self.services,
                devices.len()
            );
        };
        let more = match self.problems.len() - 1 {
            0 => String::new(),
            n => format!(" (and {n} more below)"),
        };
        format!("not fine: {}: {}{more}", first.what, first.advice)
    }

    fn text(&self) -> String {
        let join = |addresses: &[IpAddr]| match addresses {
            [] => "none".to_owned(),
            all => all
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" "),
        };
        let agent = match self.agent_pid {
            Some(pid) => format!("running, pid {pid}"),
            None if self.links.iter().any(|link| link.attached) => {
                "not running; the datapath goes on without it".into()
            }
            None => "not running; nothing is attached".into(),
        };
        let dns = match self.dns.as_slice() {
            [] => "not answered here".to_owned(),
            all => all
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" "),
        };
        let served = match self.socket_lb {
            SocketLb::On => "of the node and of pods",
            SocketLb::Host => "of the node only",
            SocketLb::Off => "of nobody",
        };
        let facts = [
            ("agent", agent),
            ("DNS queries on", dns),
            (
                "last start",
                self.start.as_ref().map_or("unknown".to_owned(), start_text),
            ),
            (
                "seconds",
                self.start
                    .as_ref()
                    .map_or("unknown".to_owned(), start_parts),
            ),
            (
                "bpf root",
                format!("{} (layout {})", self.bpf_root.display(), self.layout),
            ),
            (
                "services",
                format!(
                    "{} with {} frontend entries",
                    self.services, self.frontend_entries
                ),
            ),
            ("sockets served", served.to_owned()),
            ("node addresses", join(&self.node_addresses)),
            ("node ports on", join(&self.node_port_addresses)),
            (
                "SNAT ports",
                format!(
                    "{}-{}, of which sockets are never given {}",
                    self.snat_ports.0, self.snat_ports.1, self.snat_ports_of_their_own
                ),
            ),
        ];
        let facts: Vec<String> = facts
            .iter()
            .map(|(what, is)| format!("{what}: {is}"))
            .collect();

        let maps = self.maps.iter().map(|usage| {
            let percent = 100.0 * usage.entries as f64 / f64::from(usage.capacity.max(1));
            [
                usage.map.to_owned(),
                usage.entries.to_string(),
                usage.capacity.to_string(),
                format!("{percent:.1} %"),
                usage.setting.to_owned(),
            ]
        });
        let mut programs: BTreeMap<(&str, bool), Vec<&str>> = BTreeMap::new();
        for link in &self.links {
            let place = (link.target.as_str(), link.attached);
            programs.entry(place).or_default().push(&link.program);
        }
        let attached = programs
            .into_iter()
            .flat_map(|((target, attached), programs)| {
                let note = if attached { "" } else { "device is gone" };
                let lines = folded(&programs).into_iter().enumerate();
                lines.map(move |(n, programs)| match n {
                    0 => [target.to_owned(), programs, note.to_owned()],
                    _ => [String::new(), programs, String::new()],
                })
            });
        let events = self
            .events
            .iter()
            .map(|(name, n)| [(*name).to_owned(), n.to_string()]);
        let without = self.without_programs.iter().map(|without| {
            [
                without.device.clone(),
                without.what.to_owned(),
                without.reason.clone(),
            ]
        });
        let more = self.problems.iter().skip(1);
        let mut head = vec![self.headline()];
        head.extend(more.map(|fault| format!("also: {}: {}", fault.what, fault.advice)));
        [
            head.join("\n"),
            facts.join("\n"),
            table(["MAP", "ENTRIES", "CAPACITY", "FULL", "SETTING"], maps),
            table(["ATTACHED TO", "PROGRAMS", ""], attached),
            table(["DEVICE", "WITHOUT", "WHY"], without),
            table(["EVENT", "COUNT"], events),
        ]
        .join("\n\n")
    }
}

/// Words on lines of at most [`PROGRAM_COLUMNS`].
fn folded(words: &[&str]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= PROGRAM_COLUMNS => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push((*word).to_owned()),
        }
    }
    lines
}

fn start_text(start: &Start) -> String {
    let how = if start.taken_over {
        "taken over"
    } else {
        "loaded"
    };
    format!("took {:.2} s, programs {how}", start.took)
}

/// What took how many seconds of the start.
fn start_parts(start: &Start) -> String {
    let parts = [
        ("settings", start.settings),
        ("maps", start.maps),
        ("programs", start.programs),
        ("read back", start.read_back),
        ("source", start.source),
        ("services", start.services),
        ("attach", start.attach),
    ];
    parts
        .map(|(part, seconds)| format!("{part} {seconds:.2}"))
        .join(" ")
}

/// Whose new sockets the hook serves.
fn socket_lb(links: &[Link], config: &Config) -> SocketLb {
    let connects = |link: &Link| link.attached && link.program.starts_with("sock_connect");
    match links.iter().any(connects) {
        false => SocketLb::Off,
        true if config.flags & CONFIG_SOCKETS_OF_NODE != 0 => SocketLb::Host,
        true => SocketLb::On,
    }
}

fn addresses<F: MapFamily>(maps: &PerFamily<F>) -> anyhow::Result<Vec<IpAddr>> {
    let mut addresses: Vec<IpAddr> = maps
        .node_addrs
        .entries()?
        .iter()
        .map(|(a, _)| F::address(*a))
        .collect();
    addresses.sort();
    Ok(addresses)
}

/// Runs the verb.
///
/// # Errors
/// No maps, or the kernel's.
pub fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let (common, read) = (&args.common, || Status::read(&open(&args.common.bpf_root)?));
    let mut status = read()?;
    match common.output.structured(&status)? {
        Some(text) => print(&text)?,
        None => print(&status.text())?,
    }
    if !args.watch {
        return Ok(());
    }
    loop {
        thread::sleep(LOOK);
        let now = read()?;
        if now.headline() == status.headline() {
            continue;
        }
        match common.output.structured(&now)? {
            Some(text) => print(&text)?,
            None => print(&now.headline())?,
        }
        status = now;
    }
}
