//! The programs on the devices, kept there while devices come and go.

use std::{collections::BTreeSet, io, os::fd::OwnedFd, time::Duration};

use futures::{FutureExt, StreamExt};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{MulticastGroup, new_multicast_connection, packet_core::NetlinkPayload};
use tokio::{io::unix::AsyncFd, sync::watch, task::JoinHandle, time::MissedTickBehavior};
use tracing::{debug, info, warn};

use super::{
    attach::{AttachError, Attacher, DeviceStatus},
    devices::{DevicePatterns, LeftOut, Role, host_route_device, is_default, list},
    xdp,
};

/// Devices are read again this often even when the kernel reports no change.
const RESYNC: Duration = Duration::from_secs(30);
/// Least time between two passes, so that a node that starts a hundred pods at once does not read
/// all links each time.
const PASS_GAP: Duration = Duration::from_millis(20);
/// Keeps the programs on the devices while they come and go.
#[derive(Debug)]
pub struct DeviceWatcher {
    /// The devices with programs, after each pass.
    pub status: watch::Receiver<Vec<DeviceStatus>>,
    /// Ends when it is aborted; the programs stay attached.
    pub task: JoinHandle<()>,
}

impl DeviceWatcher {
    /// Attaches programs to all devices that are there now, then follows changes in a task.
    ///
    /// Works on the network namespace of the calling thread, which all threads of the runtime must
    /// share.
    ///
    /// # Errors
    /// When the first pass cannot read devices or pins; what goes wrong on one device is in its
    /// status and the log.
    pub fn spawn(mut attacher: Attacher, patterns: DevicePatterns) -> Result<Self, WatchError> {
        // Subscribed before the first pass, so that no device falls between.
        let (connection, _handle, mut messages) = new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])?;
        let mut unmatched = BTreeSet::new();
        let first = pass(&mut attacher, &patterns, &mut unmatched)?;
        if !first.iter().any(|d| d.role == Role::Node) {
            warn!(
                "no device leads out of this node: traffic from outside is not translated until one appears"
            );
        }
        let (sender, status) = watch::channel(first);
        let task = tokio::spawn(async move {
            let mut connection = std::pin::pin!(connection.fuse());
            let mut resync = tokio::time::interval_at(tokio::time::Instant::now() + RESYNC, RESYNC);
            resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut connected = true;
            // Which devices take frames from XDP changes with their other ends' settings, of which
            // rtnetlink says nothing.
            let features = xdp::changes().and_then(|socket| {
                // SAFETY: the descriptor is the socket's own, and stays open as long as it.
                unsafe { AsyncFd::register(socket) }.ok()
            });
            loop {
                let changed = tokio::select! {
                    () = &mut connection, if connected => {
                        warn!("the subscription to device changes ended; polling every {RESYNC:?}");
                        connected = false;
                        true
                    }
                    message = messages.next(), if connected => match message {
                        Some((message, _)) => concerns(&message.payload),
                        None => {
                            connected = false;
                            true
                        }
                    },
                    () = features_changed(features.as_ref()) => true,
                    _ = resync.tick() => true,
                };
                if !changed {
                    continue;
                }
                // Whatever else came at the same time is in the same pass.
                while let Some(Some(_)) = messages.next().now_or_never() {}
                match pass(&mut attacher, &patterns, &mut unmatched) {
                    Ok(now) => {
                        sender.send_if_modified(|old| {
                            let changed = *old != now;
                            if changed {
                                say(old, &now);
                                *old = now;
                            }
                            changed
                        });
                    }
                    Err(error) => warn!("devices: {error}; trying again within {RESYNC:?}"),
                }
                tokio::time::sleep(PASS_GAP).await;
            }
        });
        Ok(Self { status, task })
    }
}

/// Waits until the kernel tells of another XDP feature of a device.
async fn features_changed(socket: Option<&AsyncFd<OwnedFd>>) {
    let Some(socket) = socket else {
        return std::future::pending().await;
    };
    let Ok(mut ready) = socket.readable().await else {
        return std::future::pending().await;
    };
    // What they say is read anew. An overrun (ENOBUFS) means that some were lost.
    let mut message = [0; 4096];
    while rustix::net::recv(socket, &mut message[..], rustix::net::RecvFlags::empty()).is_ok() {}
    ready.clear_ready();
}

/// Why a pass over the devices failed.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The kernel does not list devices.
    #[error("rtnetlink: {0}")]
    Netlink(#[from] io::Error),
    /// Pins do not work.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

fn pass(
    attacher: &mut Attacher,
    patterns: &DevicePatterns,
    unmatched: &mut BTreeSet<(&'static str, String)>,
) -> Result<Vec<DeviceStatus>, WatchError> {
    let devices = list()?;
    let now = patterns.unmatched(&devices);
    for (setting, glob) in now.difference(unmatched) {
        warn!("{setting} {glob}: no device of this name; it gets programs when it appears");
    }
    *unmatched = now;
    let (taken, left_out) = patterns.select(devices);
    for LeftOut { name, reason } in &left_out {
        debug!(device = name, "no programs: {reason}");
    }
    Ok(attacher.reconcile(&taken)?)
}

fn concerns(payload: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
    match payload {
        // Routes come and go by the thousand where BGP runs; only the default route, and those to
        // single pods, tell of devices.
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewRoute(r) | RouteNetlinkMessage::DelRoute(r),
        ) => is_default(r) || host_route_device(r).is_some(),
        // NetlinkPayload::Overrun (ENOBUFS) is here too: messages were lost.
        _ => true,
    }
}

fn say(old: &[DeviceStatus], now: &[DeviceStatus]) {
    for device in now {
        match old.iter().find(|o| o.index == device.index) {
            None => info!(
                device = device.name,
                "{} device: {}",
                device.role,
                device.programs.join(", ")
            ),
            Some(before) if before.name != device.name => {
                info!(device = device.name, "was {}", before.name)
            }
            Some(before) if before != device => {
                debug!(
                    device = device.name,
                    "{} device: {}",
                    device.role,
                    device.programs.join(", ")
                );
            }
            Some(_) => {}
        }
    }
    for device in old
        .iter()
        .filter(|o| !now.iter().any(|n| n.index == o.index))
    {
        info!(device = device.name, "gone");
    }
}
