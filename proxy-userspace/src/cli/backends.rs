//! `shunt backends`: what clients reach, and how often each hook sent a flow there.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use shunt_common::layout::{AFFINITY_TICK_NS, BackendState};

use super::{
    Common, open,
    rows::{self, Column, Watched, print_rows},
    service_name, service_names, services,
};
use crate::{
    datapath::maps::{MapError, Maps},
    gc,
    object::Protocol,
    sync::table::{Choice, FamilyIndex},
};

/// `shunt backends`.
#[derive(Debug, Args)]
pub struct BackendsArgs {
    #[command(flatten)]
    common: Common,
    /// Only this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Go on, and print what comes, changes or goes.
    #[arg(short, long)]
    watch: bool,
    /// Only this Service: NAME or NAMESPACE/NAME.
    service: Option<String>,
}

/// One backend of one Service port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendRow {
    /// `metadata.namespace` of the Service.
    pub namespace: String,
    /// `metadata.name` of the Service.
    pub service: String,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Whether it runs on this node.
    pub local: bool,
    /// It left connections unanswered, or refused them, and has not answered since.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quarantine: Option<Quarantine>,
    /// Flows that were sent here.
    pub flows: FlowCounts,
    /// The frontends that lead here, sorted: address and port.
    pub frontends: Vec<SocketAddr>,
    /// Its number in the maps.
    pub id: u32,
}

/// A backend that does not answer (see [`shunt_common::failover`]).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Quarantine {
    /// How often in a row, twice as long each time.
    pub failures: u16,
    /// Until it is tried again; 0: the next connection tries it.
    pub remaining_ms: u64,
}

impl Quarantine {
    /// Whether a backend is in it, `now` in [`AFFINITY_TICK_NS`].
    pub(super) fn of(state: &BackendState, now: u32) -> Option<Self> {
        let remaining = state
            .quarantined_until
            .wrapping_sub(now)
            .cast_signed()
            .max(0);
        (state.failures != 0).then_some(Self {
            failures: state.failures,
            remaining_ms: u64::from(remaining.cast_unsigned()) * AFFINITY_TICK_NS / 1_000_000,
        })
    }
}

/// New flows by the hook that chose the backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct FlowCounts {
    /// `connect` and `sendmsg`.
    pub socket: u64,
    /// Packets at tc.
    pub tc: u64,
    /// Packets at XDP.
    pub xdp: u64,
}

/// Calls `visit` with every frontend, its protocol, the number of its Service and each backend of its
/// slots; with those of a Maglev table as often as they stand there.
///
/// # Errors
/// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
/// memory for a batch. Nothing has changed: try again.
pub(super) fn for_each_choice(
    maps: &Maps,
    mut visit: impl FnMut(SocketAddr, Protocol, u32, &Choice),
) -> Result<(), MapError> {
    for family in FamilyIndex::ALL {
        let table = maps.table(family);
        // Clients inside and outside mostly share the slots of a frontend.
        let mut done = HashSet::new();
        for (id, entry) in table.entries()? {
            let frontend = SocketAddr::new(services::address(&id), id.port);
            let range = (entry.slot_base, entry.slot_count);
            if !done.insert((range, frontend, id.protocol as u8)) {
                continue;
            }
            let end = entry.slot_base.saturating_add(entry.slot_count);
            for backend in (entry.slot_base..end).map_while(|index| table.slot(index)) {
                visit(frontend, id.protocol, entry.service, &backend);
            }
        }
    }
    Ok(())
}

/// All backends in the maps, sorted.
///
/// # Errors
/// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
/// memory for a batch. Nothing has changed: try again.
pub fn list(maps: &Maps) -> Result<Vec<BackendRow>, MapError> {
    let names = service_names(maps)?;
    let mut order: Vec<(&(String, String), u32)> =
        names.iter().map(|(&number, name)| (name, number)).collect();
    order.sort_unstable();
    let ranks = order
        .iter()
        .zip(0..)
        .map(|(&(_, number), rank)| (number, rank));
    let ranks: HashMap<u32, u32> = ranks.collect();
    let states = maps.backend_states();
    let mut found = found(maps, states.ids())?;
    // By name, which is compared once for a Service and not for each of its backends; those of a
    // Service that has no name by its number.
    for it in &mut found {
        it.rank = ranks.get(&it.service).copied().unwrap_or(u32::MAX);
    }
    found.sort_unstable_by_key(Found::order);
    let now = gc::now_in(AFFINITY_TICK_NS);
    found
        .into_iter()
        .map(|it| Ok(it.row(&names, &states.get(it.backend.id)?, now)))
        .collect()
}

/// A backend as frontends lead to it. Few bytes, for there may be a hundred thousand to sort.
struct Found {
    rank: u32,
    service: u32,
    protocol: Protocol,
    backend: Choice,
    frontends: Vec<SocketAddr>,
}

impl Found {
    fn order(&self) -> (u32, u32, IpAddr, u16, u8, u32) {
        let Choice {
            address, port, id, ..
        } = self.backend;
        // As by name.
        let protocol = match self.protocol {
            Protocol::Sctp => 0,
            Protocol::Tcp => 1,
            Protocol::Udp => 2,
        };
        (self.rank, self.service, address, port, protocol, id)
    }

    fn row(
        &self,
        names: &HashMap<u32, (String, String)>,
        state: &BackendState,
        now: u32,
    ) -> BackendRow {
        let (namespace, service) = service_name(names, self.service);
        let mut frontends = self.frontends.clone();
        frontends.sort_unstable();
        frontends.dedup();
        BackendRow {
            namespace,
            service,
            address: self.backend.address,
            port: self.backend.port,
            protocol: self.protocol.to_string(),
            local: self.backend.local,
            quarantine: Quarantine::of(state, now),
            flows: FlowCounts {
                socket: state.socket_flows,
                tc: state.tc_flows,
                xdp: state.xdp_flows,
            },
            frontends,
            id: self.backend.id,
        }
    }
}

/// Every backend once. Ids are below `ids`.
fn found(maps: &Maps, ids: u32) -> Result<Vec<Found>, MapError> {
    /// In place of a position: not found so far.
    const NONE: u32 = u32::MAX;
    let mut positions = vec![NONE; ids as usize];
    let mut found: Vec<Found> = Vec::new();
    for_each_choice(maps, |frontend, protocol, service, backend| {
        let Some(position) = positions.get_mut(backend.id as usize) else {
            return;
        };
        if let Some(known) = found.get_mut(*position as usize) {
            // A Maglev table has it often.
            if known.frontends.last() != Some(&frontend) {
                known.frontends.push(frontend);
            }
            return;
        }
        *position = found.len() as u32;
        found.push(Found {
            rank: 0,
            service,
            protocol,
            backend: *backend,
            frontends: vec![frontend],
        });
    })?;
    Ok(found)
}

/// Whether a row is of the Service that an argument names.
fn is_of(row: &BackendRow, service: &str) -> bool {
    match service.split_once('/') {
        Some((namespace, name)) => row.namespace == namespace && row.service == name,
        None => row.service == service,
    }
}

impl BackendRow {
    fn quarantine_cell(&self) -> String {
        match &self.quarantine {
            None => String::new(),
            Some(Quarantine {
                remaining_ms: 0, ..
            }) => "to be tried".into(),
            Some(quarantine) => format!("for {:.1}s", quarantine.remaining_ms as f64 / 1000.0),
        }
    }

    fn frontends_cell(&self) -> String {
        let frontends: Vec<String> = self.frontends.iter().map(ToString::to_string).collect();
        frontends.join(" ")
    }
}

impl Watched for BackendRow {
    type Key = (String, String, SocketAddr, String, u32);
    /// Where it is, whether and how often in a row it has failed, and what leads to it; not how many
    /// flows it has had.
    type State = (bool, Option<u16>, Vec<SocketAddr>);

    fn key(&self) -> Self::Key {
        let (namespace, service) = (self.namespace.clone(), self.service.clone());
        let socket = SocketAddr::new(self.address, self.port);
        (namespace, service, socket, self.protocol.clone(), self.id)
    }

    fn state(&self) -> Self::State {
        let failures = self.quarantine.as_ref().map(|it| it.failures);
        (self.local, failures, self.frontends.clone())
    }
}

const COLUMNS: &[Column<BackendRow>] = &[
    Column::new("NAMESPACE", |row| row.namespace.clone()),
    Column::new("SERVICE", |row| row.service.clone()),
    Column::new("BACKEND", |row| {
        SocketAddr::new(row.address, row.port).to_string()
    }),
    Column::new("PROTOCOL", |row| row.protocol.clone()),
    Column::new("WHERE", |row| {
        if row.local { "local" } else { "remote" }.into()
    }),
    Column::new("QUARANTINE", BackendRow::quarantine_cell),
    Column::new("FLOWS", |row| {
        (row.flows.socket + row.flows.tc + row.flows.xdp).to_string()
    }),
    Column::wide("SOCKET", |row| row.flows.socket.to_string()),
    Column::wide("TC", |row| row.flows.tc.to_string()),
    Column::wide("XDP", |row| row.flows.xdp.to_string()),
    Column::wide("FRONTENDS", BackendRow::frontends_cell),
];

fn read(args: &BackendsArgs) -> anyhow::Result<Vec<BackendRow>> {
    let maps = open(&args.common.bpf_root)?;
    let mut rows = list(&maps)?;
    if let Some(namespace) = &args.namespace {
        rows.retain(|row| row.namespace == *namespace);
    }
    if let Some(service) = &args.service {
        rows.retain(|row| is_of(row, service));
        let name = service.rsplit('/').next().unwrap_or(service);
        if rows.is_empty()
            && !args.watch
            && !service_names(&maps)?
                .values()
                .any(|(_, known)| known == name)
        {
            bail!("no Service {service} in the maps: `shunt services` lists all");
        }
    }
    Ok(rows)
}

/// Runs the verb.
///
/// # Errors
/// No maps, no such Service, or the kernel's.
pub fn run(args: &BackendsArgs) -> anyhow::Result<()> {
    match args.watch {
        true => rows::watch(args.common.output, COLUMNS, || read(args)),
        false => print_rows(args.common.output, read(args)?, COLUMNS),
    }
}
