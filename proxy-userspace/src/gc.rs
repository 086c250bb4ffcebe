//! Flows that have ended or fallen silent leave the connection tables.
//!
//! A thread of its own walks `unconfirmed` and `flows` of both families every [`INTERVAL`], a batch
//! at a time with pauses in between, and never marks entries as used. It deletes by the flow's own
//! state and age, whoever opened it and whatever became of its Service. Nothing depends on its
//! speed: the tables are LRU maps, and programming does not wait for it.
//!
//! The same walk tells which backend ids flows still name, so that no other id is given to a new
//! backend too early. What unconnected UDP sockets remember (`udp_peers`) goes with them, and nobody
//! can list it: the socket hook itself looks whether an id is that backend's still. Entries of
//! connected sockets that are gone without a word go after each walk ([`Closed`]).

use std::{
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use shunt_common::layout::{Config, FLOW_HALF_OPEN, Flow, FlowKey, TICK_NS, Timeouts};
use tracing::{debug, warn};

use crate::{
    datapath::{
        closed::Closed,
        maps::{FlowMap, MapFamily, Maps, PerFamily, Result},
    },
    sync::ids::IdSet,
};

/// From one walk's beginning to the next one's.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// Pause after each batch of 2048 entries: a table of 524,288 is walked in about a second.
const PAUSE: Duration = Duration::from_millis(2);

/// Translated source ports looked at before each pause.
const PORTS: u32 = 16_384;

/// How long ago something was seen.
pub fn idle(last_seen: u32, now: u32) -> Duration {
    Duration::from_nanos(u64::from(now.saturating_sub(last_seen)) * TICK_NS)
}

/// `CLOCK_MONOTONIC` in [`TICK_NS`], as the programs write it: at least 1, because 0 means "never".
pub fn now() -> u32 {
    now_in(TICK_NS).max(1)
}

/// The same in another unit of so many nanoseconds.
pub fn now_in(unit: u64) -> u32 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let ns = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
    (ns / unit) as u32
}

/// What one complete walk found.
#[derive(Clone, Debug)]
pub struct Walk {
    /// When it began.
    pub started: Instant,
    /// Flows that are left, answered and not.
    pub flows: u64,
    /// Flows deleted.
    pub deleted: u64,
    /// Backend ids that flows, translated source ports or sockets name, those just deleted
    /// included.
    pub referenced: IdSet,
}

/// Walks all flows once, with the time-outs that the programs go by. `pause` is called after every
/// batch; it says whether to go on.
///
/// # Errors
/// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
/// memory for a batch. Nothing has changed: try again.
pub fn collect(maps: &Maps, pause: impl FnMut() -> bool) -> Result<Option<Walk>> {
    collect_by(maps, &now, pause)
}

/// The same by a clock that a test may set: a machine that has just booted has no long ago.
fn collect_by(
    maps: &Maps,
    now: &dyn Fn() -> u32,
    mut pause: impl FnMut() -> bool,
) -> Result<Option<Walk>> {
    let mut walk = Walk {
        started: Instant::now(),
        flows: 0,
        deleted: 0,
        referenced: IdSet::default(),
    };
    let mut config = maps.config()?;
    if config.timeouts.udp == 0 {
        // No agent of this layout has written its configuration yet.
        config.timeouts = Timeouts::default();
    }
    maps.sockets.for_each_batch(|_, peers| {
        peers
            .iter()
            .for_each(|peer| walk.referenced.insert(peer.backend()));
        Ok(())
    })?;
    let done = collect_family(maps, &maps.v4, &config, now, &mut walk, &mut pause)?
        && collect_family(maps, &maps.v6, &config, now, &mut walk, &mut pause)?;
    Ok(done.then_some(walk))
}

/// Deletes flows that are still over, and counts them. Since they were read a client may have taken
/// its port again, and without its entry the answer would not be translated: hence one by one, each
/// looked at just before.
fn delete_over<F: MapFamily>(
    map: &FlowMap<F>,
    over: &[FlowKey<F::Addr>],
    is_over: impl Fn(&FlowKey<F::Addr>, &Flow<F::Addr>) -> bool,
) -> Result<u64> {
    let mut deleted = 0;
    for key in over {
        if map.get(key)?.is_some_and(|flow| is_over(key, &flow)) && map.delete(key)? {
            deleted += 1;
        }
    }
    Ok(deleted)
}

fn collect_family<F: MapFamily>(
    all: &Maps,
    maps: &PerFamily<F>,
    config: &Config,
    clock: &dyn Fn() -> u32,
    walk: &mut Walk,
    pause: &mut impl FnMut() -> bool,
) -> Result<bool> {
    let mut go_on = true;
    let mut half_open = 0;
    for map in maps.flow_maps() {
        map.for_each_batch(|keys, flows| {
            let now = clock();
            // A program may have written a later tick than `now`.
            let is_over = |key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>| {
                now.saturating_sub(flow.last_seen) > config.timeouts.of(key.proto, flow.state)
            };
            let mut over = Vec::new();
            for (key, flow) in keys.iter().zip(flows) {
                walk.referenced.insert(flow.backend_id);
                if is_over(key, flow) {
                    over.push(*key);
                } else if flow.state & FLOW_HALF_OPEN != 0 {
                    half_open += 1;
                }
            }
            let deleted = delete_over::<F>(map, &over, is_over)?;
            walk.deleted += deleted;
            walk.flows += (keys.len() as u64).saturating_sub(deleted);
            go_on = go_on && pause();
            Ok(())
        })?;
        if !go_on {
            return Ok(false);
        }
    }
    // The programs' own count runs off when an entry is evicted or collected.
    all.half_open.set(&(F::INDEX as u32), &half_open)?;
    // A port outlasts its flow for as long as the backend may keep it in TIME_WAIT.
    let mut now = clock();
    for index in 0..maps.snat.capacity() {
        if index % PORTS == PORTS - 1 {
            if !pause() {
                return Ok(false);
            }
            now = clock();
        }
        let Some(slot) = maps.snat.get(index).filter(|slot| slot.last_seen != 0) else {
            continue;
        };
        walk.referenced.insert(slot.backend_id);
        if now.saturating_sub(slot.last_seen) > config.timeouts.of_port(slot.proto, slot.state) {
            maps.snat.release(index, slot.last_seen);
        }
    }
    Ok(true)
}

/// The thread that collects. It ends when this is dropped.
#[derive(Debug)]
pub struct Collector {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Collector {
    /// Starts the thread; `report` is called on it after every complete walk.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn spawn(
        maps: Arc<Maps>,
        interval: Duration,
        mut report: impl FnMut(Walk) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = mpsc::channel::<()>();
        let goes_on = move |time| stopped.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
        let thread = thread::Builder::new()
            .name("flow-collector".into())
            .spawn(move || {
                let mut failed = false;
                let mut closed = Closed::default();
                let mut unlisted = false;
                while goes_on(interval) {
                    match collect(&maps, || goes_on(PAUSE)) {
                        Ok(Some(walk)) => {
                            failed = false;
                            debug!(
                                "flows: {} left, {} collected, took {:?}",
                                walk.flows,
                                walk.deleted,
                                walk.started.elapsed()
                            );
                            report(walk);
                            match closed.look(&maps) {
                                Ok(0) => unlisted = false,
                                Ok(gone) => debug!("{gone} sockets of the node are gone"),
                                Err(error) if !std::mem::replace(&mut unlisted, true) => {
                                    warn!("entries of sockets that are gone stay: {error}")
                                }
                                Err(_) => {}
                            }
                        }
                        Ok(None) => return,
                        // Said once, not every ten seconds.
                        Err(error) if !std::mem::replace(&mut failed, true) => {
                            warn!("collecting flows: {error}")
                        }
                        Err(_) => {}
                    }
                }
            })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that collects flows has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use shunt_common::{
        family::{Family, V4, V6},
        layout::{
            FLOW_BACKEND_FIN, FLOW_CLIENT_FIN, FLOW_CONFIRMED, FLOW_RESET, FLOW_SEEN_REPLY,
            FLOW_SNAT, Flow, FlowKey, SnatSlot, TCP,
        },
    };

    use super::*;
    use crate::datapath::maps::testing::{Capacities, Root};

    /// The clock of these tests, in ticks: whatever a test calls old was seen after boot.
    const NOW: u32 = 10_000;

    /// One whole walk.
    fn collect(maps: &Maps) -> Walk {
        collect_by(maps, &|| NOW, || true)
            .unwrap()
            .expect("a whole walk")
    }

    fn flow<F: Family>(
        n: u16,
        state: u32,
        age: u32,
        backend_id: u32,
    ) -> (FlowKey<F::Addr>, Flow<F::Addr>) {
        let none = F::bytes(F::UNSPECIFIED);
        let key = FlowKey {
            client: none,
            frontend: none,
            client_port: n,
            frontend_port: 0,
            proto: TCP,
            reserved: 0,
            reserved2: 0,
        };
        let flow = Flow {
            frontend: none,
            backend: none,
            snat: none,
            frontend_port: 80,
            backend_port: 8080,
            snat_port: 0,
            state,
            backend_id,
            last_seen: NOW - age,
            epoch: 0,
            unanswered_since: 0,
            reserved: 0,
            tried: 0,
            reserved2: 0,
        };
        (key, flow)
    }

    fn check_family<F: MapFamily>(root: &Root, family: impl Fn(&Maps) -> &PerFamily<F>) {
        let maps = root.maps();
        let maps_of = family(&maps);
        let both = FLOW_SEEN_REPLY | FLOW_CLIENT_FIN | FLOW_BACKEND_FIN;
        let insert = |table: usize, n, state, age, id| {
            let (key, flow) = flow::<F>(n, state, age, id);
            maps_of.flow_maps()[table].set(&key, &flow).unwrap();
        };
        insert(0, 1, 0, 5, 11);
        insert(0, 2, 0, 100, 12);
        insert(1, 3, FLOW_SEEN_REPLY, 3000, 13);
        insert(1, 4, both, 5, 14);
        insert(1, 5, both, 15, 15);
        insert(1, 6, FLOW_SEEN_REPLY | FLOW_RESET, 15, 16);
        insert(1, 7, FLOW_SEEN_REPLY | FLOW_CLIENT_FIN, 15, 17);

        let walk = collect(&maps);
        let left = |table: usize| {
            let entries = maps_of.flow_maps()[table].entries().unwrap();
            let mut left: Vec<u16> = entries.iter().map(|(key, _)| key.client_port).collect();
            left.sort();
            left
        };
        assert_eq!(left(0), [1]);
        assert_eq!(left(1), [3, 4, 7]);
        assert_eq!((walk.flows, walk.deleted), (4, 3));
        assert!((11..=17).all(|id| walk.referenced.contains(id)));

        // The count of those that wait for an answer is put right.
        insert(1, 8, FLOW_HALF_OPEN, 5, 18);
        insert(1, 9, FLOW_HALF_OPEN, 100, 19);
        maps.half_open.set(&(F::INDEX as u32), &1000).unwrap();
        collect(&maps);
        assert_eq!(maps.half_open.get(&(F::INDEX as u32)).unwrap(), Some(1));
        assert!(!walk.referenced.contains(18));
        let walk = collect(&maps);
        assert!(!walk.referenced.contains(12), "no flow names it any more");
    }

    #[test]
    fn closed_and_idle_flows_go_and_open_ones_stay() {
        check_family::<V4>(&Root::new(Capacities::default()), |maps| &maps.v4);
        check_family::<V6>(&Root::new(Capacities::default()), |maps| &maps.v6);
    }

    /// L2: a client that takes its port again while the walk is under way keeps its entry.
    #[test]
    fn a_flow_that_goes_on_meanwhile_stays() {
        let root = Root::new(Capacities::default());
        let maps = root.maps();
        let is_over = |_: &FlowKey<_>, flow: &Flow<_>| NOW.saturating_sub(flow.last_seen) > 60;
        let entries = [1, 2].map(|n| flow::<V4>(n, FLOW_SEEN_REPLY, 100, 1));
        for table in maps.v4.flow_maps() {
            for (key, flow) in &entries {
                table.set(key, flow).unwrap();
            }
            let over = entries.map(|(key, _)| key);
            let (key, again) = flow::<V4>(2, FLOW_SEEN_REPLY, 0, 1);
            table.set(&key, &again).unwrap();
            assert_eq!(delete_over::<V4>(table, &over, is_over).unwrap(), 1);
            assert_eq!(table.entries().unwrap().len(), 1);
            assert!(table.get(&key).unwrap().is_some());
        }
    }

    #[test]
    fn a_source_port_goes_by_its_own_age_and_counts_as_a_reference() {
        let root = Root::new(Capacities::default());
        let maps = root.maps();
        let closed = FLOW_SEEN_REPLY | FLOW_CLIENT_FIN | FLOW_BACKEND_FIN;
        let place = |index: u16, state, age| {
            let (key, flow) = flow::<V4>(index, state | FLOW_SNAT, age, u32::from(index));
            let slot = SnatSlot {
                client: key.client,
                frontend: flow.frontend,
                backend: flow.backend,
                snat: flow.snat,
                client_port: key.client_port,
                frontend_port: 80,
                backend_port: 8080,
                snat_port: index,
                last_seen: flow.last_seen,
                owner: 0,
                state,
                backend_id: u32::from(index),
                epoch: 0,
                proto: TCP,
                reserved: 0,
                reserved2: 0,
            };
            maps.v4.snat.set(index.into(), slot);
            maps.v4.flows.set(&key, &flow).unwrap();
        };
        place(1, FLOW_SEEN_REPLY | FLOW_CONFIRMED, 3000);
        place(2, closed, 50);
        place(3, closed, 60);
        place(4, FLOW_SEEN_REPLY | FLOW_RESET, 20);
        let walk = collect(&maps);
        assert_eq!(walk.deleted, 3);
        let in_use = |index: u32| maps.v4.snat.get(index).unwrap().last_seen != 0;
        assert_eq!([1, 2, 3, 4].map(in_use), [true, true, false, false]);
        let walk = collect(&maps);
        assert_eq!(
            [1, 2, 3, 4].map(|id| walk.referenced.contains(id)),
            [true, true, false, false]
        );
    }

    /// Ticks since boot are fewer than most time-outs, and a program may be a tick ahead of the
    /// walk.
    #[test]
    fn nothing_is_over_just_after_boot() {
        let root = Root::new(Capacities::default());
        let maps = root.maps();
        let closed = FLOW_SEEN_REPLY | FLOW_CLIENT_FIN | FLOW_BACKEND_FIN;
        for (n, (state, last_seen)) in [(0, 1), (FLOW_SEEN_REPLY, 1), (closed, 1), (closed, 3)]
            .into_iter()
            .enumerate()
        {
            let (key, flow) = flow::<V4>(n as u16, state, 0, 1);
            let flow = Flow { last_seen, ..flow };
            maps.v4.flows.set(&key, &flow).unwrap();
        }
        for now in [0, 1, 2] {
            let walk = collect_by(&maps, &|| now, || true)
                .unwrap()
                .expect("a whole walk");
            assert_eq!((walk.flows, walk.deleted), (4, 0), "tick {now}");
        }
        assert!(now() >= 1, "0 is for what was never seen");
    }

    #[test]
    fn the_time_outs_are_those_of_the_programs() {
        let root = Root::new(Capacities::default());
        let maps = root.maps();
        let (key, flow) = flow::<V4>(1, FLOW_SEEN_REPLY, 100, 1);
        maps.v4.flows.set(&key, &flow).unwrap();
        let deleted = || collect(&maps).deleted;
        assert_eq!(deleted(), 0);
        let mut config = Config::default();
        config.timeouts.tcp_established = 99;
        maps.set_config(&config).unwrap();
        assert_eq!(deleted(), 1);
    }

    /// Walking must not save old entries from eviction: after thirty walks, new flows evict what
    /// the programs used last longest ago, as if nobody had walked.
    #[test]
    fn a_walk_does_not_mark_entries_as_used() {
        let survivors = |walks: usize| {
            let root = Root::new(Capacities {
                flows: 4096,
                ..Default::default()
            });
            let maps = root.maps();
            for n in 0..3000 {
                let (key, flow) = flow::<V4>(n, FLOW_SEEN_REPLY, 0, 1);
                maps.v4.flows.set(&key, &flow).unwrap();
            }
            for _ in 0..walks {
                collect(&maps);
            }
            for n in 10_000..16_000 {
                let (key, flow) = flow::<V4>(n, FLOW_SEEN_REPLY, 0, 1);
                maps.v4.flows.set(&key, &flow).unwrap();
            }
            let entries = maps.v4.flows.entries().unwrap();
            entries
                .iter()
                .filter(|(key, _)| key.client_port < 3000)
                .count()
        };
        let (without, with) = (survivors(0), survivors(30));
        assert!(
            with <= without + 100,
            "{with} old flows survive with walks, {without} without"
        );
    }

    #[test]
    fn the_thread_reports_and_stops_in_the_middle_of_an_interval() {
        let root = Root::new(Capacities::default());
        let (tx, rx) = mpsc::channel();
        let report = move |walk: Walk| tx.send(walk.flows).unwrap_or_default();
        let maps = Arc::new(root.maps());
        let collector = Collector::spawn(maps.clone(), Duration::from_millis(10), report).unwrap();
        assert_eq!(rx.recv_timeout(Duration::from_secs(5)), Ok(0));
        drop(collector);
        let begin = Instant::now();
        drop(Collector::spawn(maps, Duration::from_secs(3600), |_| ()).unwrap());
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}
