//! A file of `--config` that changes while the agent runs, as one from a ConfigMap does when the
//! kubelet swaps its folder.
//!
//! What can change live does, what cannot waits for the next start and is named, and a file that is
//! broken changes nothing: the last good one goes on.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::sync::mpsc;
use tracing::{info, warn};

use super::reconcile::Agent;
use crate::{
    config::{Settings, flags::RunArgs},
    metrics::Reload,
    object::{ObjectName, Problem},
    source::files,
    sync,
};

/// A file is read when it has not changed for so long: editors write in several steps.
const QUIET: Duration = Duration::from_millis(100);

/// What the file says now, flags over it: settings and warnings, or what is wrong.
pub(super) type Read = Result<(Settings, Vec<String>), String>;

/// Sends what the file of `--config` comes to whenever that is something else than before; nothing
/// without such a file. Ends with the receiver.
pub(super) fn follow(args: RunArgs, settings: Settings) -> mpsc::Receiver<Read> {
    let (tx, rx) = mpsc::channel(1);
    if let Some(path) = args.config_file().map(Path::to_owned) {
        tokio::spawn(follow_file(path, args, settings, tx));
    }
    rx
}

async fn follow_file(path: PathBuf, args: RunArgs, settings: Settings, tx: mpsc::Sender<Read>) {
    let paths = [path];
    let (wake, mut woken) = mpsc::channel(1);
    let mut watcher = files::watch(&paths, &wake);
    let mut seen = files::signature(&paths);
    let mut known: Result<Settings, String> = Ok(settings);
    loop {
        let read = read(&args, &paths[0]).await;
        let is = read
            .as_ref()
            .map(|(settings, _)| settings.clone())
            .map_err(Clone::clone);
        if is != known {
            known = is;
            if tx.send(read).await.is_err() {
                return;
            }
        }
        loop {
            let poll = match watcher {
                Some(_) => files::POLL,
                None => files::POLL_ALONE,
            };
            let signalled = tokio::select! {
                signalled = woken.recv() => signalled.is_some(),
                () = tokio::time::sleep(poll) => false,
                () = tx.closed() => return,
            };
            while signalled && tokio::time::timeout(QUIET, woken.recv()).await.is_ok() {}
            let now = files::signature(&paths);
            let changed = now != seen;
            seen = now;
            if changed && !signalled {
                // What the watcher did not tell: a folder was replaced, or links lead elsewhere.
                watcher = files::watch(&paths, &wake);
            }
            if signalled || changed {
                break;
            }
        }
    }
}

async fn read(args: &RunArgs, path: &Path) -> Read {
    let (args, path) = (args.clone(), path.to_owned());
    let read = tokio::task::spawn_blocking(move || {
        // A file without a word would be all defaults; it is one that is being written, or a
        // mistake.
        if std::fs::read_to_string(&path).is_ok_and(|text| text.trim().is_empty()) {
            return Err(format!("--config {}: is empty", path.display()));
        }
        args.settings().map_err(|error| format!("{error:#}"))
    });
    read.await.unwrap_or_else(|error| Err(error.to_string()))
}

impl Agent {
    /// Takes over what a changed file says, as far as it can be taken over.
    ///
    /// # Errors
    /// The kernel's, when neither the new settings nor those before can be brought into the
    /// datapath.
    pub(super) async fn reload(&mut self, node_name: &str, read: Read) -> anyhow::Result<()> {
        let (new, warnings) = match read {
            Ok(read) => read,
            Err(error) => {
                self.refuse(node_name, &error);
                return Ok(());
            }
        };
        for warning in warnings {
            warn!("{warning}");
        }
        let next = self.settings.with_live(&new);
        let entries = self.syncer.maps().v4.snat.capacity();
        if let Err(error) = sync::node::config(&super::node::settings(&next, &[]), entries) {
            self.refuse(node_name, &error.to_string());
            return Ok(());
        }
        let changes = self.settings.changes(&new);
        if !changes.live.is_empty() {
            let before = std::mem::replace(&mut self.settings, next);
            if let Err(error) = self.apply_settings(&before).await {
                self.settings = before;
                self.refuse(node_name, &format!("{error:#}"));
                self.follow_node(true).await?;
                return Ok(());
            }
            info!(
                "--config has changed: {} taken over",
                changes.live.join(", ")
            );
        }
        self.metrics.reloaded(Reload::Applied);
        self.metrics.set_waits_for_restart(changes.at_restart.len());
        if !changes.at_restart.is_empty() {
            self.report_config(
                node_name,
                &format!(
                    "has changed: {} take effect when the agent starts again (kubectl rollout restart); until then what was there before goes on",
                    changes.at_restart.join(", ")
                ),
            );
        }
        Ok(())
    }

    /// Brings [`Agent::settings`] into the datapath, where `before` differs.
    async fn apply_settings(&mut self, before: &Settings) -> anyhow::Result<()> {
        if before.netfilter != self.settings.netfilter {
            self.tune_netfilter();
        }
        let Some(live) = &self.live else {
            return Ok(());
        };
        let now = &self.settings;
        let devices_stay = (
            &before.devices,
            &before.pod_devices,
            &before.nodeport_addresses,
            before.bind_address,
        ) == (
            &now.devices,
            &now.pod_devices,
            &now.nodeport_addresses,
            now.bind_address,
        );
        if devices_stay {
            let addresses = live.addresses.clone();
            self.write_config(&addresses)?;
            return Ok(());
        }
        self.follow_node(true).await
    }

    fn refuse(&self, node_name: &str, error: &str) {
        self.metrics.reloaded(Reload::Refused);
        self.report_config(
            node_name,
            &format!("is not taken over, the last good one goes on: {error}"),
        );
    }

    /// A word about the configuration, which belongs to no object but to this node.
    fn report_config(&self, node_name: &str, message: &str) {
        let node = ObjectName::new("", node_name);
        self.reports
            .report_here(Problem::new("Node", &node, "--config", message));
    }
}
