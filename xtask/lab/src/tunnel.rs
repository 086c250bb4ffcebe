//! Tunnels without link-layer header: two TUN devices, and threads that carry packets between them.
//!
//! They stand for what small kernels lack (WireGuard, IPIP) and for pods whose device has no
//! Ethernet header.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};

use crate::netns::NetNs;

/// Longest packet: the MTU of a TUN device is at most this.
const MAX_PACKET: usize = 65_535;
/// How soon the threads notice that the tunnel is dropped, in milliseconds.
const POLL: libc::c_int = 100;

/// A pair of TUN devices; it goes with this value.
#[derive(Debug)]
pub(crate) struct Tunnel {
    stop: Arc<AtomicBool>,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Tunnel {
    /// Makes a device in each of two namespaces, up, and carries packets between them.
    pub(crate) fn new(ends: [(&NetNs, &str); 2]) -> Result<Self> {
        let [one, other] = ends.map(|(ns, name)| {
            let device = ns.run(|| open(name)).with_context(|| {
                format!("namespace {}: cannot make TUN device {name}", ns.name())
            })?;
            ns.ip(&[format!("link set {name} up")])?;
            Ok::<_, anyhow::Error>(Arc::new(device))
        });
        let (one, other) = (one?, other?);
        let stop = Arc::new(AtomicBool::new(false));
        for (from, to) in [(Arc::clone(&one), Arc::clone(&other)), (other, one)] {
            let stop = Arc::clone(&stop);
            thread::spawn(move || carry(&from, &to, &stop));
        }
        Ok(Self { stop })
    }
}

fn open(name: &str) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all of an `ifreq` may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the request takes an `ifreq`, which outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn carry(from: &File, to: &File, stop: &AtomicBool) {
    let mut packet = vec![0; MAX_PACKET];
    while !stop.load(Ordering::Relaxed) {
        let mut fd = libc::pollfd {
            fd: from.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one descriptor, which `from` keeps open.
        unsafe { libc::poll(&raw mut fd, 1, POLL) };
        loop {
            match (&*from).read(&mut packet) {
                // A device that is down or full loses packets, as a network does.
                Ok(length) => drop((&*to).write(&packet[..length])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The device is gone.
                Err(_) => return,
            }
        }
    }
}
