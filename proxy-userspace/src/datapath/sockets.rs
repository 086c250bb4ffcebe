//! Sockets that the socket hook connected to a backend that has gone since: they are destroyed, so
//! that the application sees an error at once and dials anew (SPEC B7). Their packets pass by all
//! other programs.
//!
//! Only sockets in `sockets` are ours: one that dialled the pod itself is not touched. Connected UDP
//! sockets go by packets, which find another backend; one that a release before has connected goes
//! when its backend does not serve any more. A TCP socket goes when there is no
//! such endpoint any more **and** the kernel retransmits to it in vain: a pod that was only taken
//! from behind its Service, or ends in good order, keeps its connections.
//!
//! `SOCK_DESTROY` works in one network namespace, so a thread of its own enters those of the pods.
//! That takes `CAP_SYS_ADMIN` and a sight of them: `/run/netns`, where CNI plugins have them, or
//! the host's `/proc`. Without, the node's own sockets are served, and it is said once what is
//! missing. Programming never waits for this thread, which goes by what the maps say when it looks.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    net::IpAddr,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
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
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use shunt_common::layout::{BACKEND_GONE, BACKEND_SERVING, TCP, UDP};
use tracing::{debug, warn};

use super::{maps::Maps, rtnl};

/// Least time between two looks.
const SHORTEST: Duration = Duration::from_millis(200);
/// Most time between two looks while connections to backends that are gone are open.
const LONGEST: Duration = Duration::from_secs(30);
/// How often a socket is looked for that is in no namespace.
const ATTEMPTS: u8 = 3;
/// Where container runtimes and `ip netns` keep network namespaces.
const FOLDERS: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// The thread that destroys stale sockets. It ends when this is dropped, once it has looked.
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

/// Sockets to destroy, by cookie.
#[derive(Default)]
struct Search {
    /// How often a socket was not found, for those that are still not.
    missed: HashMap<u64, u8>,
    /// What is missing to enter namespaces was said.
    warned: bool,
}

impl Search {
    /// Looks for stale sockets in all namespaces. Says whether there are some that may have to go
    /// later.
    fn look(&mut self, maps: &Maps) -> anyhow::Result<bool> {
        let mut stale = stale(maps)?;
        self.missed.retain(|cookie, _| stale.contains_key(cookie));
        stale.retain(|cookie, _| {
            self.missed
                .get(cookie)
                .is_none_or(|&missed| missed < ATTEMPTS)
        });
        if stale.is_empty() {
            return Ok(false);
        }
        let mut waits = false;
        let mut visit = |stale: &mut HashMap<u64, u16>| -> io::Result<()> {
            for found in sockets(stale.values().any(|flags| flags & BACKEND_GONE != 0))? {
                let Some(flags) = stale.remove(&found.cookie()) else {
                    continue;
                };
                if found.proto == TCP && (flags & BACKEND_GONE == 0 || !found.is_unanswered()) {
                    waits |= flags & BACKEND_GONE != 0;
                    continue;
                }
                // Before the socket can be connected anew.
                maps.sockets
                    .delete(&found.cookie())
                    .map_err(io::Error::other)?;
                match found.destroy() {
                    Ok(()) => debug!("destroyed a socket connected to {}", found.peer()),
                    // It was closed meanwhile.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        // The node's own namespace needs no more rights than the agent has.
        visit(&mut stale)?;
        let home = File::open("/proc/thread-self/ns/net")?;
        let mut visited = HashSet::from([identity(&home)?]);
        let mut left = false;
        let mut refused = None;
        let mut result = Ok(());
        for path in namespaces() {
            if stale.is_empty() {
                break;
            }
            match enter(&path, &mut visited) {
                Ok(true) => {
                    left = true;
                    result = result.and(visit(&mut stale));
                }
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    refused = Some((path, error));
                }
                // A process or pod that ended.
                Err(_) => {}
            }
        }
        if left {
            // A thread keeps the namespace that it is in alive.
            move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network))?;
        }
        result?;
        for &cookie in stale.keys() {
            let missed = self.missed.entry(cookie).or_default();
            *missed += 1;
            waits |= *missed < ATTEMPTS;
        }
        if let Some((path, error)) = refused
            && !stale.is_empty()
            && !std::mem::replace(&mut self.warned, true)
        {
            warn!(
                "{} sockets of pods stay connected to endpoints that are gone: cannot enter {}: {error}; to have them closed give \
                 the agent CAP_SYS_ADMIN and mount the node's /run/netns (deploy/components/close-stale-sockets)",
                stale.len(),
                path.display()
            );
        }
        Ok(waits)
    }
}

/// Connected sockets whose backend does not serve, with its flags.
fn stale(maps: &Maps) -> anyhow::Result<HashMap<u64, u16>> {
    let mut flags = HashMap::new();
    let mut stale = HashMap::new();
    maps.sockets.for_each_batch(|cookies, peers| {
        for (&cookie, peer) in cookies.iter().zip(peers) {
            let flags = match flags.get(&peer.backend_id) {
                Some(&flags) => flags,
                None => {
                    let read = maps
                        .backends
                        .get(&peer.backend_id)?
                        .unwrap_or_default()
                        .flags;
                    flags.insert(peer.backend_id, read);
                    read
                }
            };
            if flags & BACKEND_SERVING == 0 {
                stale.insert(cookie, flags);
            }
        }
        Ok(())
    })?;
    Ok(stale)
}

/// Files that may be network namespaces; those that hold them by name first.
fn namespaces() -> impl Iterator<Item = PathBuf> {
    let named = FOLDERS
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()));
    let of_processes = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let is_process = name.to_str()?.bytes().all(|byte| byte.is_ascii_digit());
            is_process.then(|| Path::new("/proc").join(name).join("ns/net"))
        });
    named.chain(of_processes)
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata()
        .map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Moves this thread into a namespace, unless it was there before.
fn enter(path: &Path, visited: &mut HashSet<(u64, u64)>) -> io::Result<bool> {
    let file = File::open(path)?;
    if !visited.insert(identity(&file)?) {
        return Ok(false);
    }
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(true)
}

/// A connected socket in this thread's namespace.
struct Connected {
    proto: u8,
    header: InetResponseHeader,
}

/// The connected sockets in this thread's namespace.
fn sockets(with_tcp: bool) -> io::Result<Vec<Connected>> {
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
    fn cookie(&self) -> u64 {
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
