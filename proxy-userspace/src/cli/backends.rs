//! `shunt backends`: what clients reach, and how often each hook sent a flow there.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
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
    sync::table::FamilyIndex,
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
    /// The frontends that lead here: address and port.
    pub frontends: BTreeSet<SocketAddr>,
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

/// All backends in the maps, sorted.
///
/// # Errors
/// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
/// memory for a batch. Nothing has changed: try again.
pub fn list(maps: &Maps) -> Result<Vec<BackendRow>, MapError> {
    let names = service_names(maps)?;
    // All at once: one call of the kernel for each would take longer than the rest.
    let states: HashMap<u32, BackendState> = maps.backends.entries()?.into_iter().collect();
    let now = gc::now_in(AFFINITY_TICK_NS);
    let mut rows: HashMap<u32, BackendRow> = HashMap::with_capacity(states.len());
    let mut services: HashMap<u32, u32> = HashMap::with_capacity(states.len());
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
                if let Some(row) = rows.get_mut(&backend.id) {
                    row.frontends.insert(frontend);
                    continue;
                }
                let (namespace, service) = service_name(&names, entry.service);
                let state = states.get(&backend.id).copied().unwrap_or_default();
                let row = BackendRow {
                    namespace,
                    service,
                    address: backend.address,
                    port: backend.port,
                    protocol: id.protocol.to_string(),
                    local: backend.local,
                    quarantine: Quarantine::of(&state, now),
                    flows: FlowCounts {
                        socket: state.socket_flows,
                        tc: state.tc_flows,
                        xdp: state.xdp_flows,
                    },
                    frontends: [frontend].into(),
                    id: backend.id,
                };
                rows.insert(backend.id, row);
                services.insert(backend.id, entry.service);
            }
        }
    }
    // By name, which is compared once for a Service and not for each of its backends.
    let mut order: Vec<(&u32, &(String, String))> = names.iter().collect();
    order.sort_unstable_by_key(|&(_, name)| name);
    let ranks = order
        .iter()
        .enumerate()
        .map(|(rank, &(&number, _))| (number, rank));
    let ranks: HashMap<u32, usize> = ranks.collect();
    let mut rows: Vec<BackendRow> = rows.into_values().collect();
    rows.sort_by_cached_key(|row| {
        let service = services.get(&row.id).copied().unwrap_or_default();
        let rank = ranks.get(&service).copied().unwrap_or(usize::MAX);
        // Those of a Service that has no name by its number.
        (
            rank,
            service,
            row.address,
            row.port,
            row.protocol.clone(),
            row.id,
        )
    });
    Ok(rows)
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
    type State = (bool, Option<u16>, BTreeSet<SocketAddr>);

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
        false => print_rows(args.common.output, &read(args)?, COLUMNS),
    }
}
