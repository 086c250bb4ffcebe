//! The connections that all HTTP servers of the agent share: how many there may be, of whom, and
//! which one makes room.
//!
//! Anybody who reaches a health check's port may open connections by the thousand and say nothing.
//! A new connection is therefore never refused: when there are too many of one source, or in all,
//! the one that has waited longest of those who hold most is closed. A probe, which asks at once
//! and is answered at once, is never that one.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::future::{AbortHandle, AbortRegistration};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::debug;

/// Connections of one source at once. A load balancer's prober or a scraper has a handful.
pub const MAX_PER_SOURCE: usize = 64;
/// Connections at once, of all sources to all servers.
pub const MAX_CONNECTIONS: usize = 1024;
/// Part of the files that this process may open which connections may take; the rest is for
/// listeners, maps and links.
const FILES_SHARE: u64 = 4;

/// Who holds a connection: an IPv4 address, or an IPv6 network of 64 bits, which is what one
/// subscriber has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Source(IpAddr);

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => Self(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into()),
            v4 => Self(v4),
        }
    }
}

/// A handle on the table of open connections; clones share it.
#[derive(Clone, Debug)]
pub struct Connections(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    most: usize,
    next: u64,
    open: HashMap<u64, Open>,
    sources: HashMap<Source, OfSource>,
    /// Every source, those first whose connection is to go first.
    ranks: BTreeSet<(Rank, Source)>,
    evicted: u64,
}

#[derive(Debug)]
struct Open {
    source: Source,
    abort: AbortHandle,
}

/// A source's connections, by number: smaller is older.
#[derive(Debug, Default)]
struct OfSource {
    /// Their requests are not there yet.
    unasked: BTreeSet<u64>,
    /// They wait for us.
    asked: BTreeSet<u64>,
}

/// Who makes room: who holds most; of those, who has a connection that asks for nothing; of those,
/// the one that has waited longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    open: Reverse<usize>,
    all_asked: bool,
    oldest: u64,
}

impl OfSource {
    fn len(&self) -> usize {
        self.unasked.len() + self.asked.len()
    }

    fn rank(&self) -> Option<Rank> {
        let oldest = self.unasked.first().or(self.asked.first())?;
        Some(Rank {
            open: Reverse(self.len()),
            all_asked: self.unasked.is_empty(),
            oldest: *oldest,
        })
    }
}

impl Default for Connections {
    fn default() -> Self {
        Self::new(MAX_CONNECTIONS)
    }
}

impl Connections {
    /// With room for so many connections.
    pub fn new(most: usize) -> Self {
        Self(Arc::new(Mutex::new(Table {
            most,
            ..Table::default()
        })))
    }

    /// With room for as many as the limit on open files allows (`RLIMIT_NOFILE`), which is raised
    /// as far as it may be.
    pub fn within_file_limit() -> Self {
        let files = raise_file_limit();
        let most = usize::try_from(files / FILES_SHARE).unwrap_or(usize::MAX);
        Self::new(most.clamp(1, MAX_CONNECTIONS))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a new connection its place and closes another, if there are too many. The registration
    /// is for what serves it, which is to end when that is aborted.
    pub fn admit(&self, peer: IpAddr) -> (Place, AbortRegistration) {
        let (abort, registration) = AbortHandle::new_pair();
        let id = self.lock().admit(peer.into(), abort);
        let place = Place {
            connections: self.clone(),
            id,
        };
        (place, registration)
    }

    /// Closes the connection that is to go first; says whether there was one.
    pub fn evict(&self) -> bool {
        self.lock().evict()
    }

    /// How many are open.
    pub fn open(&self) -> usize {
        self.lock().open.len()
    }

    /// How many have been closed to make room.
    pub fn evicted(&self) -> u64 {
        self.lock().evicted
    }
}

impl Table {
    fn admit(&mut self, source: Source, abort: AbortHandle) -> u64 {
        let own = self.sources.get(&source);
        if own.is_some_and(|of_source| of_source.len() >= MAX_PER_SOURCE) {
            let oldest = own.and_then(OfSource::rank).map(|rank| rank.oldest);
            oldest.map(|id| self.close(id));
        } else if self.open.len() >= self.most {
            self.evict();
        }
        let id = self.next;
        self.next += 1;
        self.open.insert(id, Open { source, abort });
        self.change(source, |of_source| of_source.unasked.insert(id));
        id
    }

    fn evict(&mut self) -> bool {
        let first = self.ranks.first().map(|(rank, _)| rank.oldest);
        first.is_some_and(|id| self.close(id))
    }

    fn close(&mut self, id: u64) -> bool {
        let Some(open) = self.remove(id) else {
            return false;
        };
        open.abort.abort();
        self.evicted += 1;
        true
    }

    fn asked(&mut self, id: u64) {
        if let Some(source) = self.open.get(&id).map(|open| open.source) {
            self.change(source, |of_source| {
                of_source.unasked.remove(&id) && of_source.asked.insert(id)
            });
        }
    }

    fn remove(&mut self, id: u64) -> Option<Open> {
        let open = self.open.remove(&id)?;
        self.change(open.source, |of_source| {
            of_source.unasked.remove(&id) || of_source.asked.remove(&id)
        });
        Some(open)
    }

    /// Changes what a source holds, and its rank with that.
    fn change(&mut self, source: Source, change: impl FnOnce(&mut OfSource) -> bool) {
        let held = self.sources.entry(source).or_default();
        if let Some(rank) = held.rank() {
            self.ranks.remove(&(rank, source));
        }
        change(held);
        match held.rank() {
            Some(rank) => drop(self.ranks.insert((rank, source))),
            None => drop(self.sources.remove(&source)),
        }
    }
}

/// A connection's place in the table, free again when this is dropped.
#[derive(Debug)]
pub struct Place {
    connections: Connections,
    id: u64,
}

impl Place {
    /// The connection's request is there: others make room before it does.
    pub fn asked(&self) {
        self.connections.lock().asked(self.id);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.lock().remove(self.id);
    }
}

/// Raises the soft limit on open files to the hard one, as Go programs do; returns what holds now.
fn raise_file_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        debug!("RLIMIT_NOFILE stays at {:?}: {error}", limit.current);
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// H3: whoever holds most makes room, and of those who hold as many the one who has waited
    /// longest.
    #[test]
    fn the_greedy_make_room() {
        let connections = Connections::new(4);
        let mut greedy: Vec<_> = (0..3)
            .map(|_| connections.admit(address("192.0.2.1")))
            .collect();
        let honest = connections.admit(address("192.0.2.2"));
        let probe = connections.admit(address("192.0.2.3"));
        assert!(greedy[0].0.is_gone() && !greedy[1].0.is_gone());
        assert!(!honest.0.is_gone() && !probe.0.is_gone());
        // One each but for the greedy one's two.
        greedy.push(connections.admit(address("192.0.2.4")));
        assert!(greedy[1].0.is_gone());
        // One each.
        let last = connections.admit(address("192.0.2.5"));
        assert!(
            greedy[2].0.is_gone() && !honest.0.is_gone() && !probe.0.is_gone() && !last.0.is_gone()
        );
        assert_eq!((connections.open(), connections.evicted()), (4, 3));
    }

    #[test]
    fn who_has_asked_goes_last() {
        let connections = Connections::new(2);
        let scrape = connections.admit(address("192.0.2.1"));
        scrape.0.asked();
        let idle = connections.admit(address("192.0.2.2"));
        let newest = connections.admit(address("192.0.2.3"));
        assert!(!scrape.0.is_gone() && idle.0.is_gone() && !newest.0.is_gone());
        newest.0.asked();
        let after = connections.admit(address("192.0.2.4"));
        assert!(scrape.0.is_gone() && !newest.0.is_gone() && !after.0.is_gone());
    }

    #[test]
    fn a_source_has_a_share() {
        let connections = Connections::new(1000);
        let one = |n: u32| address(&format!("2001:db8:0:1::{n:x}"));
        let held: Vec<_> = (0..70).map(|n| connections.admit(one(n)).0).collect();
        assert_eq!(connections.open(), MAX_PER_SOURCE);
        assert_eq!(held.iter().filter(|place| place.is_gone()).count(), 6);
        assert!(held[..6].iter().all(Place::is_gone));
        let mapped = connections.admit(address("::ffff:192.0.2.1")).0;
        assert_eq!(connections.open(), MAX_PER_SOURCE + 1);
        drop(held);
        assert_eq!(connections.open(), 1);
        drop(mapped);
        assert!(!connections.evict());
        assert_eq!(connections.lock().ranks.len(), 0);
    }

    impl Place {
        fn is_gone(&self) -> bool {
            !self.connections.lock().open.contains_key(&self.id)
        }
    }
}
