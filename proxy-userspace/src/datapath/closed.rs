//! Entries of `sockets` whose socket is gone, though nobody has told.
//!
//! The hook that removes them is not called for sockets that the kernel itself opens (NFS, iSCSI, the
//! subflows of MPTCP), nor for those that close while it is not attached. Of the node's own network
//! namespace, where the kernel's are, the sockets can be listed; those of pods are listed to their own
//! namespaces only.

use std::{collections::HashSet, io};

use shunt_common::layout::SOCKET_OF_NODE;

use super::{
    maps::{MapError, Maps},
    sockets::sockets,
};

/// The node's sockets are listed at one look in so many.
const LOOKS: u32 = 3;
/// A socket that is in none of so many lists is gone.
const LISTS: u32 = 2;

/// Looks for such entries, at intervals. The sockets are only listed if there are entries that were
/// there when it looked last, and listing them is all that it costs.
#[derive(Debug, Default)]
pub struct Closed {
    looks: u32,
    /// What was there when the sockets were listed last.
    before: HashSet<u64>,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum ClosedError {
    /// The sockets cannot be listed.
    #[error("cannot list this node's sockets: {0}")]
    List(#[from] io::Error),
    /// The map.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl Closed {
    /// Deletes what was there before, and is of no socket that is connected, or about to be. Says how
    /// much that was.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN` or `CAP_BPF`: the entries stay until the next look.
    pub fn look(&mut self, maps: &Maps) -> Result<usize, ClosedError> {
        self.looks += 1;
        if !self.looks.is_multiple_of(LOOKS) {
            return Ok(0);
        }
        let mut now = HashSet::new();
        maps.sockets.for_each_batch(|cookies, peers| {
            let of_node = cookies
                .iter()
                .zip(peers)
                .filter(|(_, peer)| peer.backend_id & SOCKET_OF_NODE != 0);
            now.extend(of_node.map(|(&cookie, _)| cookie));
            Ok(())
        })?;
        // The hook is called before a socket is in the kernel's list.
        let mut old = &now & &self.before;
        self.before = now;
        if old.is_empty() {
            return Ok(0);
        }
        // One list may leave an open socket out: the kernel goes on in a bucket of its table by
        // counting, and a neighbour there may have closed meanwhile.
        for _ in 0..LISTS {
            for socket in sockets(true)? {
                old.remove(&socket.cookie());
            }
            if old.is_empty() {
                break;
            }
        }
        for cookie in &old {
            maps.sockets.delete(cookie)?;
        }
        Ok(old.len())
    }
}
