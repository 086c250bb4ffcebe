//! What the programs have to say, in the agent's log (`--datapath-log`).
//!
//! The agent is a tracer like others ([`Tracer`]): the programs send it what its level lets through
//! while it lives, and nothing is sent, nor any packet the slower, where it is off. A kind of message
//! that comes too often is counted instead ([`Limiter`]), so that a flood is a line a second.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use shunt_common::{
    event::Event,
    layout::{TRACE_BACKEND_CLOSES, TRACE_CLIENT_CLOSES, TraceFilter, TraceRecord},
    trace::{DROPPED, IMPOSSIBLE, LACKING, REFUSED},
};
use tracing::{debug, error, info, warn};

use crate::{
    config::DatapathLog,
    datapath::{
        maps::Maps,
        trace::{LEASE, Tracer},
    },
    record::{Line, Names},
};

/// How often the ring buffer is looked at: nobody is woken for a record.
const LOOK: Duration = Duration::from_millis(100);
/// Records that are read at once; the rest waits, or is lost and counted.
const MOST_RECORDS: usize = 8192;
/// When a tracer's place is asked for again after all were taken.
const AGAIN: Duration = Duration::from_secs(10);
/// Messages of a kind that are written at once.
const BURST: u32 = 10;
/// Time until one more may be.
const EACH: Duration = Duration::from_secs(1);

/// Events of which the log tells at `info`.
const REFUSALS: u64 = DROPPED
    | REFUSED
    | Event::BackendGone.bit()
    | Event::Retry.bit()
    | Event::RefusalHeld.bit()
    | Event::PortCollision.bit();

/// What a level lets through.
fn filter(level: DatapathLog) -> TraceFilter<[u8; 16]> {
    let events = match level {
        DatapathLog::Off => 0,
        DatapathLog::Error => IMPOSSIBLE,
        DatapathLog::Warn => IMPOSSIBLE | LACKING,
        DatapathLog::Info => IMPOSSIBLE | LACKING | REFUSALS,
        DatapathLog::Debug => u64::MAX,
    };
    let closes = match level {
        DatapathLog::Debug => TRACE_CLIENT_CLOSES | TRACE_BACKEND_CLOSES,
        _ => 0,
    };
    TraceFilter {
        events,
        closes,
        ..TraceFilter::default()
    }
}

/// The level of a record of these events.
fn level(events: u64) -> DatapathLog {
    if events & IMPOSSIBLE != 0 {
        DatapathLog::Error
    } else if events & LACKING != 0 {
        DatapathLog::Warn
    } else if events & REFUSALS != 0 {
        DatapathLog::Info
    } else {
        DatapathLog::Debug
    }
}

/// The thread that writes it. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Writer {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts it, unless the log is off.
    ///
    /// # Errors
    /// When no thread can be made.
    pub(super) fn spawn(maps: Arc<Maps>, level: DatapathLog) -> io::Result<Option<Self>> {
        if level == DatapathLog::Off {
            return Ok(None);
        }
        let ends = Arc::new(AtomicBool::new(false));
        let told = ends.clone();
        let thread = thread::Builder::new()
            .name("datapath-log".into())
            .spawn(move || write(&maps, level, &told))?;
        Ok(Some(Self {
            ends,
            thread: Some(thread),
        }))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A tracer that ends in order leaves nothing in the kernel.
            let _ended = thread.join();
        }
    }
}

/// Writes until it is told to end.
fn write(maps: &Maps, level: DatapathLog, ends: &AtomicBool) {
    while !ends.load(Ordering::Relaxed) {
        match Tracer::start(maps.root(), filter(level)) {
            Ok(tracer) => {
                if let Err(error) = follow(maps, tracer, ends) {
                    warn!("--datapath-log: {error:#}; it goes on in {AGAIN:?}");
                }
            }
            Err(error) => warn!("--datapath-log: {error}; it is tried again in {AGAIN:?}"),
        }
        pause(AGAIN, ends);
    }
}

/// Sleeps, unless it is told to end.
fn pause(time: Duration, ends: &AtomicBool) {
    let end = Instant::now() + time;
    while !ends.load(Ordering::Relaxed) && Instant::now() < end {
        thread::park_timeout(end.saturating_duration_since(Instant::now()));
    }
}

/// Writes what a tracer is told.
fn follow(maps: &Maps, mut tracer: Tracer, ends: &AtomicBool) -> anyhow::Result<()> {
    let mut names = Names::new(maps)?;
    let mut limiter = Limiter::default();
    let (mut renewed, mut lost) = (Instant::now(), 0);
    while !ends.load(Ordering::Relaxed) {
        for _ in 0..MOST_RECORDS {
            let Some(record) = tracer.receive() else {
                break;
            };
            if let Some(left_out) = limiter.take(kind(&record), Instant::now()) {
                say(level(record.events), &names.line(&record)?, left_out);
            }
        }
        let now_lost = tracer.lost();
        if now_lost != lost && limiter.take(0, Instant::now()).is_some() {
            warn!(
                target: "shunt::programs",
                "{} messages found no room in the ring buffer",
                now_lost - lost
            );
            lost = now_lost;
        }
        if renewed.elapsed() > LEASE / 6 {
            tracer.renew();
            renewed = Instant::now();
        }
        pause(LOOK, ends);
    }
    Ok(())
}

/// What is limited as one: records of the same events, and closes.
fn kind(record: &TraceRecord<[u8; 16]>) -> u64 {
    match record.events {
        0 => u64::MAX,
        events => events,
    }
}

/// Writes a line, whose target the log's filter lets through at any level.
fn say(level: DatapathLog, line: &Line, left_out: u64) {
    let text = text(line, left_out);
    match level {
        DatapathLog::Error => error!(target: "shunt::programs", "{text}"),
        DatapathLog::Warn => warn!(target: "shunt::programs", "{text}"),
        DatapathLog::Info => info!(target: "shunt::programs", "{text}"),
        _ => debug!(target: "shunt::programs", "{text}"),
    }
}

fn text(line: &Line, left_out: u64) -> String {
    let what = match line.events.is_empty() {
        true => line.kind.to_owned(),
        false => line.events.join(", "),
    };
    let mut text = format!("{what}:");
    let path = line.path();
    if !path.is_empty() {
        text += &format!(" {} {path},", line.protocol);
    }
    text += &format!(" at {}", line.place());
    if left_out > 0 {
        text += &format!(" ({left_out} more like it since the last line)");
    }
    text
}

/// How often each kind of message may be written.
#[derive(Debug, Default)]
struct Limiter(HashMap<u64, Bucket>);

#[derive(Debug)]
struct Bucket {
    free: u32,
    filled: Instant,
    left_out: u64,
}

impl Limiter {
    /// Whether a message may be written now, and then how many like it were not.
    fn take(&mut self, kind: u64, now: Instant) -> Option<u64> {
        let bucket = self.0.entry(kind).or_insert(Bucket {
            free: BURST,
            filled: now,
            left_out: 0,
        });
        let passed = now.saturating_duration_since(bucket.filled).as_secs() / EACH.as_secs();
        if passed > 0 {
            let more = u32::try_from(passed).unwrap_or(BURST);
            bucket.free = bucket.free.saturating_add(more).min(BURST);
            bucket.filled = now;
        }
        if bucket.free == 0 {
            bucket.left_out += 1;
            return None;
        }
        bucket.free -= 1;
        Some(std::mem::take(&mut bucket.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_line_a_second_with_what_was_left_out() {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let written = (0..1000).filter(|_| limiter.take(1, at(0)).is_some());
        assert_eq!(written.count(), BURST as usize);
        assert_eq!(limiter.take(2, at(0)), Some(0), "another kind");
        assert_eq!(limiter.take(1, at(999)), None);
        assert_eq!(limiter.take(1, at(1000)), Some(991));
        assert_eq!(limiter.take(1, at(1001)), None);
        let later = (0..1000).filter_map(|_| limiter.take(1, at(3_600_000)));
        assert_eq!(later.collect::<Vec<_>>().len(), BURST as usize);
    }

    #[test]
    fn every_event_has_the_level_that_lets_it_through() {
        use DatapathLog::{Debug, Error, Info, Off, Warn};
        for event in Event::ALL {
            let is_at = level(event.bit());
            for wanted in [Off, Error, Warn, Info, Debug] {
                let passes = filter(wanted).events & event.bit() != 0;
                assert_eq!(passes, is_at <= wanted, "{} at {wanted:?}", event.name());
            }
        }
        assert_eq!(level(Event::SocketsFull.bit()), Warn);
        assert_eq!(level(Event::ProgramMissing.bit()), Error);
        // What was counted beside it makes it no less.
        assert_eq!(
            level(Event::TcFlow.bit() | Event::ConntrackFull.bit()),
            Warn
        );
        assert_eq!(level(0), Debug, "a close");
    }
}
