//! Sockets that the socket hook connected to a backend that has gone since: their packets bear its
//! address, and pass by all other programs (SPEC B7).
//!
//! Only sockets in `sockets` are ours: one that dialled the pod itself is not touched. A pod that was
//! only taken from behind its Service, or ends in good order, keeps its connections. Those that nobody
//! answers any more are closed, so that the application sees an error at once and dials anew.
//! Datagrams find another backend.
//!
//! For pods the programs see to both ([`shunt_common::balance::Maps::hooked`]). They have the packets
//! come to them by bits that this thread [lends](super::maps::Filter::lend) as long as there are such
//! sockets. The node's own TCP sockets are destroyed (`SOCK_DESTROY`) when the kernel retransmits in
//! vain. Its connected UDP sockets go by packets from the start; one that a release before has
//! connected, or that is bound to a device, is destroyed when its backend does not serve any more.
//!
//! Programming never waits for this thread, which goes by what the maps say when it looks.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use netlink_packet_sock_diag::{
    SockDiagDestroy, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags, Timer},
};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_SOCK_DIAG,
};
use shunt_common::{
    family::{Family, V4, V6},
    filter,
    layout::{BACKEND_GONE, BACKEND_SERVING, SocketPeer, TCP, UDP},
};
use tracing::{debug, warn};

use super::{maps::Maps, rtnl};

/// Least time between two looks.
const SHORTEST: Duration = Duration::from_millis(200);
/// Most time between two looks while connections to backends that are gone are open, and for which
/// bits are lent that nobody needs.
const LONGEST: Duration = Duration::from_secs(30);
/// How often a socket is looked for that is not in the node's namespace.
const ATTEMPTS: u8 = 3;

/// The thread that looks after stale sockets. It ends when this is dropped, once it has looked.
#[derive(Debug)]
pub struct StaleSockets(SyncSender<()>);

impl StaleSockets {
    /// Starts the thread, which looks at once.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn spawn(maps: Arc<Maps>) -> io::Result<Self> {
        // One that waits is enough: whoever looks sees the newest state.
        let (wake, woken) = mpsc::sync_channel::<()>(1);
        let mut search = Search::default();
        thread::Builder::new()
            .name("stale-sockets".into())
            .spawn(move || {
                let mut seen = None;
                let mut pause = SHORTEST;
                loop {
                    thread::sleep(SHORTEST);
                    // Backends that stay as they are leave no socket behind.
                    let written = maps.backends.writes();
                    if seen.replace(written) != Some(written) {
                        pause = SHORTEST;
                    }
                    let waits = search.look(&maps).unwrap_or_else(|error| {
                        warn!("sockets connected to endpoints that are gone: {error:#}");
                        false
                    });
                    let end = Instant::now() + pause;
                    loop {
                        let waited = if waits {
                            woken.recv_timeout(end.saturating_duration_since(Instant::now()))
                        } else {
                            woken.recv().map_err(|_| RecvTimeoutError::Disconnected)
                        };
                        match waited {
                            Ok(()) if seen == Some(maps.backends.writes()) => {}
                            Ok(()) => break,
                            Err(RecvTimeoutError::Timeout) => {
                                pause = (pause * 2).min(LONGEST);
                                break;
                            }
                            Err(RecvTimeoutError::Disconnected) => return,
                        }
                    }
                }
            })?;
        Ok(Self(wake))
    }

    /// Has the thread look soon, for backends may have changed.
    pub fn look(&self) {
        // Full: it will look anyway.
        let _ = self.0.try_send(());
    }
}

/// Sockets that were looked for.
#[derive(Default)]
struct Search {
    /// How often a socket was not found, by cookie, for those that are still stale.
    missed: HashMap<u64, u8>,
}

impl Search {
    /// Looks for stale sockets. Says whether there are some that have to go later.
    fn look(&mut self, maps: &Maps) -> anyhow::Result<bool> {
        let mut stale = stale(maps)?;
        maps.filter
            .lend(&stale.values().flat_map(Stale::bits).collect());
        // Bits are taken back when the last one has closed.
        let waits = !stale.is_empty();
        self.missed.retain(|cookie, _| stale.contains_key(cookie));
        stale.retain(|cookie, _| {
            self.missed
                .get(cookie)
                .is_none_or(|&missed| missed < ATTEMPTS)
        });
        if stale.is_empty() {
            return Ok(waits);
        }
        for found in sockets(stale.values().any(Stale::is_gone))? {
            let Some(socket) = stale.remove(&found.cookie()) else {
                continue;
            };
            if found.proto == TCP && !(socket.is_gone() && found.is_unanswered()) {
                continue;
            }
            // Before the socket can be connected anew.
            maps.sockets.delete(&found.cookie())?;
            match found.destroy() {
                Ok(()) => debug!("destroyed a socket connected to {}", found.peer()),
                // It was closed meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Those of pods.
        for &cookie in stale.keys() {
            *self.missed.entry(cookie).or_default() += 1;
        }
        Ok(waits)
    }
}

/// A connected socket whose backend does not serve.
struct Stale {
    peer: SocketPeer,
    /// The backend's `BACKEND_*` bits.
    flags: u16,
}

impl Stale {
    /// Whether there is no such endpoint any more.
    fn is_gone(&self) -> bool {
        self.flags & BACKEND_GONE != 0
    }

    /// The bits by which the programs see its packets: a datagram when the backend does not serve, a
    /// connection's when it is gone.
    fn bits(&self) -> impl Iterator<Item = u32> {
        fn bits<F: Family>(addr: F::Words, port: u16) -> [u32; 3] {
            [
                filter::service::<F>(addr),
                filter::stale::<F>(addr, port, UDP),
                filter::stale::<F>(addr, port, TCP),
            ]
        }
        let port = self.peer.backend_port;
        let bits = match Ipv6Addr::from(self.peer.backend).to_canonical() {
            IpAddr::V4(ip) => bits::<V4>(V4::words(ip.octets()), port),
            IpAddr::V6(ip) => bits::<V6>(V6::words(ip.octets()), port),
        };
        bits.into_iter().take(if self.is_gone() { 3 } else { 2 })
    }
}

/// Connected sockets whose backend does not serve, by cookie.
fn stale(maps: &Maps) -> anyhow::Result<HashMap<u64, Stale>> {
    let mut flags = HashMap::new();
    let mut stale = HashMap::new();
    maps.sockets.for_each_batch(|cookies, peers| {
        for (&cookie, &peer) in cookies.iter().zip(peers) {
            let flags = match flags.get(&peer.backend()) {
                Some(&flags) => flags,
                None => {
                    let read = maps
                        .backends
                        .get(&peer.backend())?
                        .unwrap_or_default()
                        .flags;
                    flags.insert(peer.backend(), read);
                    read
                }
            };
            if flags & BACKEND_SERVING == 0 {
                stale.insert(cookie, Stale { peer, flags });
            }
        }
        Ok(())
    })?;
    Ok(stale)
}

/// A connected socket in this thread's namespace.
pub(super) struct Connected {
    proto: u8,
    header: InetResponseHeader,
}

/// The connected sockets in this thread's namespace.
pub(super) fn sockets(with_tcp: bool) -> io::Result<Vec<Connected>> {
    let mut sockets = Vec::new();
    let protocols = [UDP].into_iter().chain(with_tcp.then_some(TCP));
    for proto in protocols {
        let closed = StateFlags::CLOSE | StateFlags::LISTEN | StateFlags::TIME_WAIT;
        for (family, socket_id) in [
            (libc::AF_INET, SocketId::new_v4()),
            (libc::AF_INET6, SocketId::new_v6()),
        ] {
            let request = SockDiagMessage::InetRequest(InetRequest {
                family: family as u8,
                protocol: proto,
                extensions: ExtensionFlags::empty(),
                states: StateFlags::all() - closed.clone(),
                socket_id,
            });
            let (answers, _) =
                rtnl::exchange(NETLINK_SOCK_DIAG, request, NLM_F_REQUEST | NLM_F_DUMP)?;
            sockets.extend(answers.into_iter().filter_map(|answer| match answer {
                SockDiagMessage::InetResponse(response) => Some(Connected {
                    proto,
                    header: response.header,
                }),
                _ => None,
            }));
        }
    }
    Ok(sockets)
}

impl Connected {
    /// What `SO_COOKIE` tells.
    pub(super) fn cookie(&self) -> u64 {
        u64::from_ne_bytes(self.header.socket_id.cookie)
    }

    fn peer(&self) -> IpAddr {
        self.header.socket_id.destination_address
    }

    /// Whether the kernel has sent something again for lack of an answer.
    fn is_unanswered(&self) -> bool {
        matches!(self.header.timer, Some(Timer::Retransmit(_, sent_again)) if sent_again > 0)
    }

    /// Closes it under its owner, who gets `ECONNABORTED`.
    fn destroy(&self) -> io::Result<()> {
        let request = SockDiagDestroy::new(SockDiagMessage::InetRequest(InetRequest {
            family: self.header.family,
            protocol: self.proto,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::empty(),
            socket_id: self.header.socket_id.clone(),
        }));
        rtnl::exchange(NETLINK_SOCK_DIAG, request, NLM_F_REQUEST | NLM_F_ACK).map(drop)
    }
}
