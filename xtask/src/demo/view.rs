//! What the agents' command line says about frontends, backends and counters.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context, Result};
use serde::Deserialize;
use shunt_lab::{Agent, Proto};

/// Where a frontend listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Address {
    /// On an address of its own.
    Ip(IpAddr),
    /// On the nodes' addresses of one family.
    NodePort { ipv6: bool },
}

/// A frontend, whichever scope.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Frontend {
    /// `namespace/name`.
    pub(super) service: String,
    pub(super) kind: String,
    pub(super) port: u16,
    pub(super) proto: Proto,
    pub(super) address: Address,
}

impl Frontend {
    /// Protocol, address and port.
    pub(super) fn dialled(&self) -> String {
        let Self { port, proto, .. } = self;
        match self.address {
            Address::Ip(IpAddr::V4(ip)) => format!("{proto} {ip}:{port}"),
            Address::Ip(IpAddr::V6(ip)) => format!("{proto} [{ip}]:{port}"),
            Address::NodePort { ipv6: false } => format!("{proto} node:{port}"),
            Address::NodePort { ipv6: true } => format!("{proto} [node]:{port}"),
        }
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.service, self.kind, self.dialled())
    }
}

/// New flows by the hook that translated them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Hooks {
    pub(super) socket: u64,
    pub(super) tc: u64,
    pub(super) xdp: u64,
}

/// One reading of all agents.
#[derive(Default)]
pub(super) struct View {
    /// Frontends and the addresses of their backends.
    pub(super) frontends: BTreeMap<Frontend, BTreeSet<IpAddr>>,
    hooks: BTreeMap<Frontend, Hooks>,
}

/// A row of `shunt services -o json`.
#[derive(Deserialize)]
struct FrontendRow {
    namespace: String,
    service: String,
    kind: String,
    address: IpAddr,
    port: u16,
    protocol: String,
}

/// A row of `shunt backends -o json`.
#[derive(Deserialize)]
struct BackendRow {
    address: IpAddr,
    protocol: String,
    flows: Hooks,
    frontends: Vec<SocketAddr>,
}

impl View {
    pub(super) fn read(agents: &[Agent]) -> Result<Self> {
        let mut view = Self::default();
        for agent in agents {
            let frontends = Vec::<FrontendRow>::deserialize(agent.json(&["services"])?)
                .with_context(|| format!("{}: shunt services", agent.node()))?;
            let backends = Vec::<BackendRow>::deserialize(agent.json(&["backends"])?)
                .with_context(|| format!("{}: shunt backends", agent.node()))?;
            for frontend in frontends {
                view.add(frontend, &backends);
            }
        }
        Ok(view)
    }

    fn add(&mut self, row: FrontendRow, backends: &[BackendRow]) {
        let proto = match row.protocol.as_str() {
            "TCP" => Proto::Tcp,
            "UDP" => Proto::Udp,
            // The lab has no SCTP clients.
            _ => return,
        };
        let address = if row.address.is_unspecified() {
            Address::NodePort {
                ipv6: row.address.is_ipv6(),
            }
        } else {
            Address::Ip(row.address)
        };
        let socket = SocketAddr::new(row.address, row.port);
        let frontend = Frontend {
            service: format!("{}/{}", row.namespace, row.service),
            kind: row.kind,
            port: row.port,
            proto,
            address,
        };
        let hooks = self.hooks.entry(frontend.clone()).or_default();
        let addresses = self.frontends.entry(frontend).or_default();
        let its_own = |backend: &&BackendRow| {
            backend.protocol == row.protocol && backend.frontends.contains(&socket)
        };
        for backend in backends.iter().filter(its_own) {
            addresses.insert(backend.address);
            *hooks += backend.flows;
        }
    }

    /// What all nodes counted for a frontend's backends.
    pub(super) fn hooks(&self, frontend: &Frontend) -> Hooks {
        self.hooks.get(frontend).copied().unwrap_or_default()
    }
}
