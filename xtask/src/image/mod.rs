//! `cargo xtask image`: an OCI archive with nothing but the static agent and CA roots.
//!
//! The archive is an OCI image layout in a tar file, as `ctr images import`, `kind load
//! image-archive`, `podman load`, `docker load` (25 and later) and `skopeo copy oci-archive:` take
//! it. The same sources give the same bytes: nothing in it has a time or a user.

mod arch;
mod binary;
mod oci;
mod trial;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, bail};

use arch::Arch;
use oci::NAME;

use crate::{
    setup,
    shell::{say, target},
};

/// Arguments of `image`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Architectures of the image [default: those that a target of the Rust toolchain is installed
    /// for].
    #[arg(long, value_enum, value_delimiter = ',')]
    arch: Vec<Arch>,
    /// Where the archive goes [default: target/image/shunt-VERSION.tar].
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// Import it into a containerd of its own and run the agent from it. Needs root.
    #[arg(long = "try")]
    trial: bool,
}

/// Builds the agent for every architecture, writes the archive, and says how to load it.
///
/// # Errors
///
/// When there is nothing to build with, the build fails, or the image does not run.
pub(crate) fn image(args: &Args) -> Result<()> {
    setup::setup()?;
    binary::setup();
    let archs: Vec<Arch> = match &args.arch[..] {
        [] => Arch::ALL
            .into_iter()
            .filter(|arch| binary::can_build(*arch))
            .collect(),
        given => given.to_vec(),
    };
    if archs.is_empty() {
        let here = std::env::consts::ARCH;
        bail!(
            "no target of the Rust toolchain can be built statically: rustup target add {here}-unknown-linux-musl"
        );
    }
    let roots = oci::ca_roots();
    let mut images = Vec::new();
    for arch in archs {
        let path = binary::build(arch)?;
        let agent = fs::read(&path).with_context(|| format!("{}", path.display()))?;
        binary::check(&agent).with_context(|| format!("{}", path.display()))?;
        images.push((arch, oci::layer(&agent, &roots)?));
    }
    let archive = oci::archive(NAME, &images)?;
    let file = args
        .to
        .clone()
        .unwrap_or_else(|| target().join(format!("image/shunt-{}.tar", env!("CARGO_PKG_VERSION"))));
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
    }
    fs::write(&file, &archive).with_context(|| format!("{}", file.display()))?;
    let list: Vec<String> = images
        .iter()
        .map(|(arch, _)| format!("{arch:?}").to_lowercase())
        .collect();
    let size = archive.len() as f64 / f64::from(1 << 20);
    say(
        "image",
        format_args!(
            "{NAME} for {} in {} ({size:.1} MiB)",
            list.join(", "),
            file.display()
        ),
    );
    say(
        "load",
        format_args!("ctr -n k8s.io images import {}", file.display()),
    );
    say(
        "or",
        format_args!("kind load image-archive {}", file.display()),
    );
    if args.trial {
        trial::trial(&file)?;
    }
    Ok(())
}
