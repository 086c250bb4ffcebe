//! What this node does with a packet, and why: the decision of [`shunt_common::balance`], run over
//! copies of what the pinned maps hold, at the hooks that the packet meets, in their order.
//!
//! It writes nothing. What the maps do not know is asked of the kernel: programs on devices,
//! routes, filters of return paths, neighbours.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use anyhow::Context;
use serde::Serialize;
use shunt_common::{
    address::{self, Unmatched},
    balance::{self, Maps as _},
    event::Event,
    family::{V4, V6},
    layout::*,
    packet::SYN,
    verdict::{Arrival, Origin, Translation, Verdict},
};

mod copied;
mod node;
mod overlay;
mod socket;
mod text;

pub use self::{
    copied::{Copied, CopiedFamily, Pinned, Seen},
    node::{Tuple, tuple, words},
};
use crate::{
    datapath::{
        CGROUP_PROGRAMS, Paths, XDP_PROGRAM,
        attach::{PinnedLink, TcMode, pinned_links},
        bpf::probe,
        maps::name_str,
        netns, rtnl, xdp,
    },
    gc,
    object::Protocol,
    sync::table::{FamilyIndex, kind_name},
};

/// Who sends the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sender {
    /// A pod of this node.
    Pod,
    /// A process in the node's own network namespace.
    Node,
    /// Anybody else: the packet comes in from the network.
    Outside,
}

/// A packet that opens a connection, or the call that would send it.
#[derive(Clone, Debug)]
pub struct Question {
    /// Its protocol.
    pub protocol: Protocol,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Whom it is for.
    pub destination: SocketAddr,
    /// Who sends it; `None`: whoever has the source address.
    pub sender: Option<Sender>,
    /// Name of the device by which it comes in; `None`: the one that leads back to the source.
    pub device: Option<String>,
}

/// Addresses and ports of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Ends {
    /// Who sends it.
    pub source: SocketAddr,
    /// Who gets it.
    pub destination: SocketAddr,
}

impl From<Tuple> for Ends {
    fn from(tuple: Tuple) -> Self {
        Self {
            source: tuple.src,
            destination: tuple.dst,
        }
    }
}

/// What becomes of it at one hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HookStep {
    /// The program's name.
    pub program: String,
    /// The device that it is on; `None` for sockets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// `pass`, `translate`, `refuse`, `drop` or `reset`.
    pub verdict: &'static str,
    /// What the packet carries from here on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<Ends>,
    /// In words.
    pub why: String,
}

/// The frontend that it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendSeen {
    /// `metadata.namespace` of the Service.
    pub namespace: String,
    /// `metadata.name` of the Service.
    pub service: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalIP`.
    pub kind: &'static str,
    /// `internal` or `external`: as which client the sender counts.
    pub scope: &'static str,
    /// Seconds of client affinity; 0 without.
    pub affinity_seconds: u32,
    /// Policies that hold here, in words.
    pub policies: Vec<String>,
    /// `loadBalancerSourceRanges`, if the frontend has some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ranges: Vec<String>,
}

/// A backend of the frontend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendSeen {
    /// Address and port.
    pub address: SocketAddr,
    /// Whether it runs on this node.
    pub local: bool,
    /// Whether new connections of this sender may go there.
    pub eligible: bool,
    /// Whether this one does.
    pub chosen: bool,
    /// Its state and the reason, in words.
    pub state: String,
    /// Its number in the maps.
    pub id: u32,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// The packet.
    pub packet: Ends,
    /// Who sends it.
    pub sender: Sender,
    /// The device by which it comes in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The frontend that it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frontend: Option<FrontendSeen>,
    /// The frontend's backends.
    pub backends: Vec<BackendSeen>,
    /// The hooks in its way.
    pub hooks: Vec<HookStep>,
    /// The last hook's verdict.
    pub verdict: &'static str,
    /// The verdict in words.
    pub why: String,
    /// What to do about it, where something is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// What the backend gets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent: Option<Ends>,
    /// What the client gets in answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<Ends>,
    /// What stands in the way on this node, beside the maps.
    pub warnings: Vec<String>,
}

/// A device that packets pass, and what is attached to it.
#[derive(Clone, Debug, Default)]
struct DeviceSeen {
    index: u32,
    name: String,
    programs: Vec<String>,
}

impl DeviceSeen {
    fn of(index: u32, links: &[PinnedLink]) -> Self {
        let on_it = links.iter().filter(|link| link.index == Some(index));
        Self {
            index,
            name: rtnl::device_name(index)
                .ok()
                .flatten()
                .unwrap_or_else(|| format!("#{index}")),
            programs: on_it.map(|link| link.program.clone()).collect(),
        }
    }

    fn program(&self, prefix: &str) -> Option<&str> {
        self.programs
            .iter()
            .map(String::as_str)
            .find(|program| program.starts_with(prefix))
    }

    /// The tc program for packets that come in by it; without a list of them, the one of its role.
    fn incoming(&self) -> Option<&str> {
        self.program("tc_pod_in").or(self.program("tc_node_in"))
    }

    fn outgoing(&self) -> Option<&str> {
        self.program("tc_pod_out").or(self.program("tc_node_out"))
    }

    fn is_pod(&self) -> bool {
        self.program("tc_pod_").is_some()
    }
}

/// Explains what becomes of a packet.
///
/// # Errors
/// Addresses of two families, or what the kernel says when it is asked for maps, links and devices.
pub fn explain(pinned: &Pinned, question: &Question) -> anyhow::Result<Explanation> {
    anyhow::ensure!(
        question.source.is_ipv4() == question.destination.is_ipv4(),
        "{} and {} are of different address families",
        question.source.ip(),
        question.destination.ip()
    );
    match question.destination {
        SocketAddr::V4(_) => Walk::<V4>::new(pinned, question)?.explain(),
        SocketAddr::V6(_) => Walk::<V6>::new(pinned, question)?.explain(),
    }
}

/// A packet's walk along the hooks.
struct Walk<'m, F: CopiedFamily> {
    pinned: &'m Pinned,
    maps: Copied<'m, F>,
    links: Vec<PinnedLink>,
    /// Links of tc are not listed on kernels before 6.6.
    tc_is_listed: bool,
    own: BTreeSet<IpAddr>,
    /// The device that was asked about.
    device: Option<u32>,
    now: Tuple,
    told: Explanation,
}

impl<'m, F: CopiedFamily> Walk<'m, F> {
    fn new(pinned: &'m Pinned, question: &Question) -> anyhow::Result<Self> {
        let links = pinned_links(&Paths::new(pinned.maps.root()))?;
        let addresses = netns::addresses().context("cannot list this node's addresses")?;
        let own: BTreeSet<IpAddr> = addresses.into_iter().map(|(_, address)| address).collect();
        let source = question.source.ip();
        let device =
            match &question.device {
                None => None,
                Some(name) => {
                    let index = rtnl::device_index(name)?;
                    Some(index.with_context(|| {
                        format!("--device {name}: this node has none of that name")
                    })?)
                }
            };
        let sender = question.sender.unwrap_or_else(|| {
            if let Some(device) = device {
                let device = DeviceSeen::of(device, &links);
                return if device.is_pod() {
                    Sender::Pod
                } else {
                    Sender::Outside
                };
            }
            if own.contains(&source) || source.is_loopback() {
                return Sender::Node;
            }
            let device = node::route(source, None).map(|route| route.device);
            match device {
                Ok(device) if DeviceSeen::of(device, &links).is_pod() => Sender::Pod,
                _ => Sender::Outside,
            }
        });
        let now = Tuple {
            src: question.source,
            dst: question.destination,
            proto: question.protocol as u8,
        };
        Ok(Self {
            pinned,
            maps: Copied::new(pinned, probe::probe_fib_source().unwrap_or(false))?,
            links,
            tc_is_listed: TcMode::probe() == TcMode::Tcx,
            own,
            device,
            now,
            told: Explanation {
                protocol: question.protocol.to_string(),
                packet: now.into(),
                sender,
                device: None,
                frontend: None,
                backends: Vec::new(),
                hooks: Vec::new(),
                verdict: "pass",
                why: String::new(),
                advice: None,
                sent: None,
                answer: None,
                warnings: Vec::new(),
            },
        })
    }

    fn explain(mut self) -> anyhow::Result<Explanation> {
        let sender = self.told.sender;
        if sender != Sender::Outside && self.at_the_socket()? {
            return Ok(self.told);
        }
        let Some(device) = self.incoming_device() else {
            self.sent_by_the_node()?;
            return Ok(self.told);
        };
        self.told.device = Some(device.name.clone());
        self.arrive(&device)?;
        Ok(self.told)
    }

    /// The device by which the packet comes in; `None`: the node itself sends it.
    fn incoming_device(&mut self) -> Option<DeviceSeen> {
        if self.told.sender == Sender::Node {
            return None;
        }
        if let Some(device) = self.device {
            return Some(DeviceSeen::of(device, &self.links));
        }
        match node::route(self.now.src.ip(), None) {
            Ok(route) if !route.local => Some(DeviceSeen::of(route.device, &self.links)),
            Ok(_) => {
                self.told.warnings.push(format!(
                    "{} is this node's own address: what comes in with it is dropped by the kernel",
                    self.now.src.ip()
                ));
                Some(DeviceSeen::default())
            }
            Err(error) => {
                self.told.warnings.push(format!(
                    "no route leads back to {}: {}; an answer would not find its way",
                    self.now.src.ip(),
                    text::no_route(&error)
                ));
                Some(DeviceSeen::default())
            }
        }
    }

    fn step(&mut self, program: &str, device: Option<&str>, verdict: &'static str, why: String) {
        self.told.hooks.push(HookStep {
            program: program.to_owned(),
            device: device.map(str::to_owned),
            verdict,
            to: (verdict == "translate").then(|| self.now.into()),
            why: why.clone(),
        });
        self.told.verdict = verdict;
        self.told.why = why;
    }

    /// The socket hook; whether the matter ends there.
    fn at_the_socket(&mut self) -> anyhow::Result<bool> {
        let name = CGROUP_PROGRAMS
            .iter()
            .map(|(name, _)| *name)
            .find(|name| {
                name.starts_with("sock_connect")
                    && name.ends_with(if F::HEADER == 20 { '4' } else { '6' })
            })
            .unwrap_or("sock_connect4");
        if !self
            .links
            .iter()
            .any(|link| link.target == "cgroup" && link.program == name)
        {
            return Ok(false);
        }
        let from_node = self.told.sender == Sender::Node;
        let (dst, port) = (self.now.dst.ip(), self.now.dst.port());
        let Some(words) = words::<F>(&self.now) else {
            return Ok(false);
        };
        let config = self.pinned.maps.config()?;
        if config.flags & CONFIG_SOCKETS_OF_NODE != 0 && !from_node {
            let why = "--socket-lb host: packets of pods are translated";
            self.step(name, None, "pass", why.to_owned());
            return Ok(false);
        }
        let loopback = [CONFIG_NODEPORT_LOOPBACK4, CONFIG_NODEPORT_LOOPBACK6][F::INDEX];
        let means_node = || {
            if dst.is_loopback() {
                from_node && config.flags & loopback != 0
            } else {
                self.maps.is_node_addr(&words.dst)
            }
        };
        let found = balance::socket_frontend::<F, _>(
            &self.maps,
            words.dst,
            port,
            self.now.proto,
            means_node,
        );
        self.frontend()?;
        let Some(frontend) = found else {
            let refused = address::may_be_service::<F>(&config, words.dst)
                && (self.now.proto != UDP || from_node)
                && address::unknown_port(&self.maps, words.dst) == Unmatched::Refuse;
            self.maps.take_seen();
            if refused {
                self.step(
                    name,
                    None,
                    "refuse",
                    text::of_event(Event::UnknownPort).0.to_owned(),
                );
                self.told.advice = Some(text::of_event(Event::UnknownPort).1.to_owned());
                return Ok(true);
            }
            self.step(
                name,
                None,
                "pass",
                "no Service has this address and port".to_owned(),
            );
            return Ok(false);
        };
        let packets_only = FRONTEND_SOURCE_RANGES | FRONTEND_PACKETS_ONLY;
        if frontend.flags & packets_only != 0 && !from_node {
            let why = if frontend.flags & FRONTEND_SOURCE_RANGES != 0 {
                "a socket has no source address yet that source ranges could be compared with: its packets are translated"
            } else {
                "sockets of pods are left alone for this Service: their packets are translated"
            };
            self.step(name, None, "pass", why.to_owned());
            return Ok(false);
        }
        let eligible = self.told.backends.iter().filter(|backend| backend.eligible);
        let eligible: Vec<String> = eligible
            .map(|backend| backend.address.to_string())
            .collect();
        if eligible.is_empty() {
            let event = if frontend.flags & FRONTEND_DROP != 0 {
                Event::PolicyDrop
            } else {
                Event::NoBackend
            };
            let (why, advice) = text::of_event(event);
            self.step(
                name,
                None,
                "refuse",
                format!("{why}: connect fails with ECONNREFUSED"),
            );
            self.told.advice = Some(advice.to_owned());
            return Ok(true);
        }
        if self.now.proto == UDP && from_node {
            let why = "UDP sockets of the node are left alone: their packets are translated";
            self.step(name, None, "pass", why.to_owned());
            return Ok(false);
        }
        let kept = if frontend.flags & FRONTEND_AFFINITY != 0 {
            "; all sockets of its network namespace go to the same one (sessionAffinity)"
        } else {
            ""
        };
        let one = if eligible.len() == 1 { "" } else { "one of " };
        let why = format!(
            "connect goes to {one}{}: each socket is given its own{kept}; the process still sees {}",
            eligible.join(", "),
            self.now.dst
        );
        self.step(name, None, "connect", why);
        self.told.answer = Some(Ends {
            source: self.now.dst,
            destination: self.now.src,
        });
        Ok(true)
    }

    /// A packet that the node itself sends and that no hook has changed.
    /// A packet of the node itself, where it leaves.
    fn sent_by_the_node(&mut self) -> anyhow::Result<()> {
        let way = match node::route(self.now.dst.ip(), None) {
            Ok(route) => DeviceSeen::of(route.device, &self.links),
            Err(error) => {
                self.told.why = format!(
                    "no route leads to {}: {}",
                    self.now.dst.ip(),
                    text::no_route(&error)
                );
                return Ok(());
            }
        };
        if way.outgoing().is_none() && self.tc_is_listed {
            self.told.why = format!(
                "{} has no program: what the node sends there is not translated",
                way.name
            );
            self.told.advice = Some("`shunt status` says why it has none".to_owned());
            return Ok(());
        }
        self.frontend_of_packet(Origin::Process)?;
        self.maps.pass(way.index);
        let name = way.outgoing().unwrap_or("tc_node_out").to_owned();
        let (verdict, seen) = self.decide(Origin::Process, false);
        match verdict {
            Verdict::Translate(to) => {
                self.translated(&name, &way, &to, &seen);
                self.delivered(&DeviceSeen::default())?;
            }
            other => {
                self.ended(&name, &way, other, &seen);
            }
        }
        Ok(())
    }

    /// A packet that comes in by a device.
    fn arrive(&mut self, device: &DeviceSeen) -> anyhow::Result<()> {
        let origin = match self.told.sender {
            Sender::Pod => Origin::Pod,
            _ => Origin::Network,
        };
        self.frontend_of_packet(origin)?;
        self.maps.pass(device.index);
        if let Some(program) = device.program(XDP_PROGRAM).map(str::to_owned) {
            let before = self.now;
            let (verdict, seen) = self.decide(origin, true);
            match verdict {
                Verdict::Translate(to) if !to.local => {
                    let after = tuple::<F>(&to.tuple);
                    let sent = node::route(after.dst.ip(), Some((before.src.ip(), device.index)));
                    let on = matches!(&sent, Ok(route) if route.device == device.index);
                    if on {
                        self.translated(&program, device, &to, &seen);
                        self.told.sent = Some(self.now.into());
                        self.answered(device);
                        return Ok(());
                    }
                    self.step(
                        &program,
                        Some(&device.name),
                        "pass",
                        "it leaves by another device, or the way is not known yet: left to tc"
                            .to_owned(),
                    );
                }
                Verdict::Translate(to) => {
                    self.translated(&program, device, &to, &seen);
                    self.delivered(device)?;
                    return Ok(());
                }
                other => {
                    if self.ended(&program, device, other, &seen) {
                        return Ok(());
                    }
                }
            }
            self.now = before;
            self.maps = Copied::new(self.pinned, probe::probe_fib_source().unwrap_or(false))?;
            self.maps.pass(device.index);
        }
        if device.incoming().is_none() && self.tc_is_listed && device.index != 0 {
            self.told.why = format!(
                "{} has no program: what comes in there is not translated",
                device.name
            );
            self.told.warnings.push(self.told.why.clone());
            self.told.advice = Some("`shunt status` says why it has none".to_owned());
            return Ok(());
        }
        let name = match (device.incoming(), origin) {
            (Some(name), _) => name.to_owned(),
            (None, Origin::Pod) => "tc_pod_in".to_owned(),
            (None, Origin::Network) => "tc_node_in".to_owned(),
            (None, Origin::Process) => "tc_node_out".to_owned(),
        };
        let (verdict, seen) = self.decide(origin, false);
        match verdict {
            Verdict::Translate(to) => {
                self.translated(&name, device, &to, &seen);
                self.delivered(device)
            }
            other => {
                self.ended(&name, device, other, &seen);
                Ok(())
            }
        }
    }

    /// The decision for the packet as it is now.
    fn decide(&mut self, origin: Origin, sends_on: bool) -> (Verdict<Translation<F::Words>>, Seen) {
        let Some(tuple) = words::<F>(&self.now) else {
            return (Verdict::Pass, Seen::default());
        };
        self.maps.next_packet();
        let verdict = balance::arriving::<F, _>(
            &self.maps,
            &Arrival {
                tuple,
                tcp_flags: opening_flags(self.now.proto),
                origin,
                sends_on,
            },
        );
        (verdict, self.note())
    }

    /// What the decision has seen; what it could not read becomes a warning.
    fn note(&mut self) -> Seen {
        let seen = self.maps.take_seen();
        self.told.warnings.extend(seen.errors.iter().cloned());
        seen
    }

    fn translated(
        &mut self,
        program: &str,
        device: &DeviceSeen,
        to: &Translation<F::Words>,
        seen: &Seen,
    ) {
        self.now = tuple::<F>(&to.tuple);
        for backend in &mut self.told.backends {
            backend.chosen = backend.address == self.now.dst;
        }
        let why = if seen.chosen.is_empty() {
            "of a flow that is open: its backend stays".to_owned()
        } else if seen.events.contains(&Event::PortCollision) {
            "a new flow, whose client's port another flow uses: it gets another source port"
                .to_owned()
        } else {
            "a new flow".to_owned()
        };
        self.step(program, Some(&device.name), "translate", why);
    }

    /// A verdict that translates nothing; whether the packet ends with it.
    fn ended<T>(
        &mut self,
        program: &str,
        device: &DeviceSeen,
        verdict: Verdict<T>,
        seen: &Seen,
    ) -> bool {
        let name = match verdict {
            Verdict::Pass | Verdict::Translate(_) => {
                let why = match self.told.frontend {
                    Some(_) => "translated already, or of another flow: it goes on as it is",
                    None => "no Service has this address and port: it goes on as it is",
                };
                self.step(program, Some(&device.name), "pass", why.to_owned());
                return false;
            }
            Verdict::Refuse => "refuse",
            Verdict::Drop => "drop",
            Verdict::Reset => "reset",
        };
        let (why, advice) = match seen.events.last() {
            Some(&event) => text::of_event(event),
            None => ("the programs say so, and count nothing", ""),
        };
        self.step(program, Some(&device.name), name, why.to_owned());
        self.told.advice = (!advice.is_empty()).then(|| advice.to_owned());
        true
    }

    /// The way of a translated packet to its backend, and of the answer back.
    fn delivered(&mut self, from: &DeviceSeen) -> anyhow::Result<()> {
        let dst = self.now.dst.ip();
        // The kernel looks for the way of what came in with the client's address as source.
        let came = (from.index != 0).then_some((self.now.src.ip(), from.index));
        let route = node::route(dst, came);
        let route = match route {
            Ok(route) => route,
            Err(error) => {
                self.told
                    .warnings
                    .push(text::way(&error, dst, self.now.src.ip(), &from.name));
                match node::route(dst, None) {
                    Ok(route) => route,
                    Err(_) => return Ok(()),
                }
            }
        };
        if route.local || self.own.contains(&dst) {
            self.told.sent = Some(self.now.into());
            self.answered(from);
            return Ok(());
        }
        if !node::forwards(dst) {
            self.told.warnings.push(format!(
                "this node does not forward {} packets: sysctl net.{}",
                if dst.is_ipv4() { "IPv4" } else { "IPv6" },
                if dst.is_ipv4() {
                    "ipv4.ip_forward=1"
                } else {
                    "ipv6.conf.all.forwarding=1"
                },
            ));
        }
        if let (true, Some(chain)) = (from.index != 0, xdp::forward_rules()) {
            self.told.warnings.push(format!(
                "netfilter may drop it where tc sends it on (XDP and --fast-path on pass that by): {chain}"
            ));
        }
        let out = DeviceSeen::of(route.device, &self.links);
        let hop = route.gateway.unwrap_or(dst);
        if let Ok(Some(false)) = node::neighbour(hop, route.device) {
            self.told.warnings.push(format!(
                "{hop} does not answer on {}: nobody there has the address (neighbour FAILED)",
                out.name
            ));
        }
        let Some(words) = words::<F>(&self.now) else {
            return Ok(());
        };
        let name = out.outgoing().unwrap_or("tc_node_out").to_owned();
        if out.outgoing().is_none() && self.tc_is_listed {
            self.told.warnings.push(format!(
                "{} has no program: what leaves there keeps its source, and answers that come back there are not recognised; `shunt status` says why",
                out.name
            ));
        }
        self.maps.next_packet();
        let leaving = balance::leaving::<F, _>(&self.maps, &words, opening_flags(self.now.proto));
        self.note();
        if let Verdict::Translate(to) = leaving {
            self.now = tuple::<F>(&to.tuple);
            let why =
                "the backend is to answer this node, for the client is not here either".to_owned();
            self.step(&name, Some(&out.name), "translate", why);
        }
        self.told.sent = Some(self.now.into());
        self.answered(&out);
        Ok(())
    }

    /// The answer of the backend, back to the client.
    fn answered(&mut self, by: &DeviceSeen) {
        let answer = Tuple {
            src: self.now.dst,
            dst: self.now.src,
            proto: self.now.proto,
        };
        let flags = match answer.proto {
            UDP => 0,
            _ => SYN | shunt_common::packet::ACK,
        };
        let from = if by.is_pod() {
            Origin::Pod
        } else {
            Origin::Network
        };
        let sends_on = by.program(XDP_PROGRAM).is_some();
        let Some(mut tuple) = words::<F>(&answer) else {
            return;
        };
        self.maps.next_packet();
        let arriving = balance::arriving::<F, _>(
            &self.maps,
            &Arrival {
                tuple,
                tcp_flags: flags,
                origin: from,
                sends_on,
            },
        );
        if let Verdict::Translate(to) = arriving {
            tuple = to.tuple;
        }
        self.maps.next_packet();
        if let Verdict::Translate(to) = balance::leaving::<F, _>(&self.maps, &tuple, flags) {
            tuple = to.tuple;
        }
        self.note();
        let answer = node::tuple::<F>(&tuple);
        self.told.answer = Some(answer.into());
        if answer.src != self.told.packet.destination || answer.dst != self.told.packet.source {
            self.told.warnings.push(format!(
                "the answer would reach {} from {}: it is not undone here",
                answer.dst, answer.src
            ));
        }
    }

    /// The frontend that a socket's look-up has found.
    fn frontend(&mut self) -> anyhow::Result<()> {
        let seen = self.note();
        self.tell_frontend(&seen)
    }

    /// The frontend of a packet, whatever flows are open.
    fn frontend_of_packet(&mut self, origin: Origin) -> anyhow::Result<()> {
        let Some(tuple) = words::<F>(&self.now) else {
            return Ok(());
        };
        let maps = Copied::<F>::new(self.pinned, false)?.without_flows();
        let _verdict = balance::arriving::<F, _>(
            &maps,
            &Arrival {
                tuple,
                tcp_flags: opening_flags(self.now.proto),
                origin,
                sends_on: false,
            },
        );
        self.told.frontend = None;
        self.told.backends.clear();
        let seen = maps.take_seen();
        self.tell_frontend(&seen)
    }

    fn tell_frontend(&mut self, seen: &Seen) -> anyhow::Result<()> {
        let found = seen
            .frontends
            .iter()
            .find_map(|(key, found)| found.map(|found| (*key, found)));
        let Some((key, frontend)) = found else {
            return Ok(());
        };
        let maps = &self.pinned.maps;
        let name = maps.services.get(&frontend.service)?;
        let (namespace, service) = match name {
            Some(name) => (name_str(&name.namespace), name_str(&name.name)),
            None => ("?".to_owned(), format!("#{}", frontend.service)),
        };
        let family = FamilyIndex::ALL[F::INDEX];
        let mut source_ranges = Vec::new();
        if frontend.flags & FRONTEND_SOURCE_RANGES != 0 {
            for (service, range) in maps.table(family).source_ranges()? {
                if service == frontend.service {
                    source_ranges.push(range.to_string());
                }
            }
            source_ranges.sort();
        }
        self.told.frontend = Some(FrontendSeen {
            namespace,
            service,
            kind: kind_name(frontend.kind),
            scope: if key.scope == SCOPE_INTERNAL {
                "internal"
            } else {
                "external"
            },
            affinity_seconds: frontend.affinity_secs,
            policies: text::policies(&frontend, key.scope),
            source_ranges,
        });
        // Backends that clients of the other scope have, and this one not.
        let other = FrontendKey {
            addr: if key.any_address {
                F::bytes(F::UNSPECIFIED)
            } else {
                F::octets(self.now.dst.ip()).unwrap_or(F::bytes(F::UNSPECIFIED))
            },
            port: key.port,
            proto: self.now.proto,
            scope: key.scope ^ 1,
            reserved: 0,
        };
        let mut backends: BTreeMap<u32, BackendSeen> = BTreeMap::new();
        let now = gc::now_in(AFFINITY_TICK_NS);
        let of = F::of(maps);
        for (entry, eligible) in [(Some(frontend), true), (of.frontends.get(&other)?, false)] {
            let Some(entry) = entry else { continue };
            for index in entry.slot_base..entry.slot_base.saturating_add(entry.slot_count) {
                let Some(slot) = of.slots.get(index) else {
                    break;
                };
                if backends.contains_key(&slot.backend) {
                    continue;
                }
                let state = maps.backends.get(&slot.backend)?.unwrap_or_default();
                let local = slot.flags & BACKEND_LOCAL != 0;
                let backend = BackendSeen {
                    address: SocketAddr::new(F::address(slot.addr), slot.port),
                    local,
                    eligible,
                    chosen: false,
                    state: text::state(&state, now, eligible, local),
                    id: slot.backend,
                };
                backends.insert(slot.backend, backend);
            }
        }
        self.told.backends = backends.into_values().collect();
        self.told.backends.sort();
        Ok(())
    }
}

/// TCP flags of a packet that opens a connection, as the decision has them.
fn opening_flags(proto: u8) -> u8 {
    if proto == UDP { 0 } else { SYN }
}
