//! What the agents' command line says about frontends, backends and counters.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
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

/// A row of `shunt backends -o json`.
#[derive(Deserialize)]
struct Row {
    namespace: String,
    service: String,
    kind: String,
    address: IpAddr,
    port: u16,
    protocol: String,
    backends: Vec<Backend>,
}

#[derive(Deserialize)]
struct Backend {
    address: IpAddr,
    connections: Hooks,
}

impl View {
    pub(super) fn read(agents: &[Agent]) -> Result<Self> {
        let mut view = Self::default();
        for agent in agents {
            let rows = agent.json(&["backends"])?;
            let rows = Vec::<Row>::deserialize(rows).with_context(|| format!("{}: shunt backends", agent.node()))?;
            for row in rows {
                view.add(row);
            }
        }
        Ok(view)
    }

    fn add(&mut self, row: Row) {
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
        let service = format!("{}/{}", row.namespace, row.service);
        let frontend = Frontend {
            service,
            kind: row.kind,
            port: row.port,
            proto,
            address,
        };
        let hooks = self.hooks.entry(frontend.clone()).or_default();
        let backends = self.frontends.entry(frontend).or_default();
        for backend in row.backends {
            backends.insert(backend.address);
            *hooks += backend.connections;
        }
    }

    /// What all nodes counted for a frontend's backends.
    pub(super) fn hooks(&self, frontend: &Frontend) -> Hooks {
        self.hooks.get(frontend).copied().unwrap_or_default()
    }
}
