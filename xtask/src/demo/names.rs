//! Names in a pod of the demo: a script that runs a program there with the `resolv.conf` that a
//! kubelet would give the pod.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use shunt_lab::Lab;

use crate::shell::{capture, target};

/// The pod that the script is for.
const POD: &str = "shell-a";
/// Its node, whose agent answers.
const NODE: &str = "node-a";
/// A Service of the demo.
const SERVICE: &str = "web.default.svc.cluster.local";

/// Writes the script and returns its path: `in-pod PROGRAM ARGUMENT…`. The file is in no namespace,
/// so it is mounted over `/etc/resolv.conf` where only the program sees it.
///
/// # Errors
///
/// When a file cannot be written.
pub(super) fn script(lab: &Lab) -> Result<PathBuf> {
    let folder = target().join("demo");
    fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    let [server, _] = lab.node_ips(NODE)?;
    let conf = folder.join("resolv.conf");
    let text = format!(
        "nameserver {server}\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
    );
    fs::write(&conf, text).with_context(|| format!("{}", conf.display()))?;
    let script = folder.join("in-pod");
    let text = format!(
        "#!/bin/sh\n# Runs a program in pod {POD} of the demo, with its names.\nexec nsenter --net={} unshare --mount sh -c \\\n    \
         'mount --bind {} /etc/resolv.conf && exec \"$@\"' sh \"$@\"\n",
        lab.ns(POD)?.path().display(),
        conf.display()
    );
    fs::write(&script, text).with_context(|| format!("{}", script.display()))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script)
}

/// Looks a Service up in the pod, as any program there would; says what came of it.
///
/// # Errors
///
/// When its name does not resolve.
pub(super) fn look_up(lab: &Lab) -> Result<String> {
    let script = script(lab)?;
    let found = capture(Command::new(&script).args(["getent", "hosts", SERVICE]))?;
    let address = found.split_whitespace().next().unwrap_or_default();
    ensure!(!address.is_empty(), "{SERVICE} has no address in pod {POD}");
    Ok(format!(
        "in pod {POD} the name {SERVICE} leads to {address}"
    ))
}
