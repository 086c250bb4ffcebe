//! Answers of others, for as long as they say, and no more than fit.

use std::{
    num::NonZeroUsize,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType},
};
use lru::LruCache;

/// Answers at most; the one that was not asked for longest makes room.
const ENTRIES: NonZeroUsize = NonZeroUsize::new(8192).unwrap();
/// Bytes of an answer at most, so that all of them have 16 MiB.
const MAX_LEN: usize = 2048;
/// An answer is kept so long at most, whatever it says.
const MAX_AGE: Duration = Duration::from_secs(3600);
/// The same when it says that there is nothing ([RFC 2308,
/// 5](https://www.rfc-editor.org/rfc/rfc2308#section-5)).
const MAX_NEGATIVE_AGE: Duration = Duration::from_secs(1800);

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// In lower case.
    pub name: Name,
    /// The type.
    pub kind: RecordType,
    /// The client wants DNSSEC's records.
    pub dnssec_ok: bool,
    /// The client checks signatures itself.
    pub checking_disabled: bool,
}

#[derive(Debug)]
struct Entry {
    bytes: Box<[u8]>,
    since: Instant,
    lifetime: Duration,
}

/// The cache.
#[derive(Debug)]
pub struct Cache(LruCache<Key, Entry>);

impl Default for Cache {
    fn default() -> Self {
        Self(LruCache::new(ENTRIES))
    }
}

impl Cache {
    /// An answer that still holds, with what is left of its time.
    pub fn get(&mut self, key: &Key, now: Instant) -> Option<Message> {
        let entry = self.0.get(key)?;
        let age = now.saturating_duration_since(entry.since);
        if age >= entry.lifetime {
            self.0.pop(key);
            return None;
        }
        let mut message = Message::from_vec(&entry.bytes).ok()?;
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        for record in message.answers.iter_mut().chain(&mut message.authorities) {
            record.decrement_ttl(age);
        }
        Some(message)
    }

    /// Keeps an answer, if it says that it may be kept.
    pub fn insert(&mut self, key: Key, message: &Message, now: Instant) {
        let lifetime = lifetime(message);
        if lifetime.is_zero() || message.metadata.truncation {
            return;
        }
        if let Ok(bytes) = message.to_vec()
            && bytes.len() <= MAX_LEN
        {
            let entry = Entry {
                bytes: bytes.into(),
                since: now,
                lifetime,
            };
            self.0.push(key, entry);
        }
    }

    /// Answers in it.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How long an answer holds: as its shortest record; without an answer, as its SOA says.
fn lifetime(message: &Message) -> Duration {
    let is_positive = |record: &&Record| record.record_type() != RecordType::CNAME;
    let shortest = |records: &[Record]| records.iter().map(|record| record.ttl).min();
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    let has_answer = message.answers.iter().any(|record| is_positive(&record)) || is_alias(message);
    match message.metadata.response_code {
        ResponseCode::NoError if has_answer => {
            seconds(shortest(&message.answers).unwrap_or(0)).min(MAX_AGE)
        }
        ResponseCode::NoError | ResponseCode::NXDomain => {
            let soa = message
                .authorities
                .iter()
                .find_map(|record| match &record.data {
                    RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
                    _ => None,
                });
            let chain = shortest(&message.answers).unwrap_or(u32::MAX);
            seconds(soa.unwrap_or(0).min(chain)).min(MAX_NEGATIVE_AGE)
        }
        _ => Duration::ZERO,
    }
}

/// Whether a CNAME is what was asked for.
fn is_alias(message: &Message) -> bool {
    let asked = message.queries.first().map(|query| query.query_type());
    !message.answers.is_empty() && matches!(asked, Some(RecordType::CNAME | RecordType::ANY))
}
