//! Finds or installs what the build and the tests need, and writes `target/tools/env` for
//! `proxy-userspace/build.rs`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::shell::{as_root, capture, cargo, is_root, root, say, target, which};

/// The version that is built into `target/tools`.
const BPF_LINKER_VERSION: &str = "0.13.0";
/// LLVM versions that this bpf-linker builds against, oldest first.
const BPF_LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// The first rustc that builds the workspace, `rust-version` in `Cargo.toml`.
const MIN_RUSTC: (u32, u32) = (1, 95);
/// What rustup adds to a toolchain: the source of `core`, which BPF programs are built with, and
/// what checks need.
const COMPONENTS: [&str; 3] = ["rust-src", "clippy", "rustfmt"];
/// Debian's stand-in for a toolchain with rust-src.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

/// Programs that tests and the demo call, and the Debian package of each. The agent itself calls
/// none.
const PROGRAMS: [(&str, &str); 7] = [
    ("ip", "iproute2"),
    ("ethtool", "ethtool"),
    ("bpftool", "bpftool"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("sysctl", "procps"),
    ("nsenter", "util-linux"),
];

/// Programs that the story calls besides, nginx apart.
const STORY_PROGRAMS: [(&str, &str); 3] = [
    ("curl", "curl"),
    ("ping", "iputils-ping"),
    ("dpkg-deb", "dpkg"),
];

/// Programs that `cargo xtask vm` calls besides, which nothing else needs.
const VM_PROGRAMS: [(&str, &str); 6] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("dpkg-deb", "dpkg"),
    ("modprobe", "kmod"),
    ("xz", "xz-utils"),
];

/// A compiler that can build for BPF: one with the source of `core`.
struct Toolchain {
    rustc: PathBuf,
    /// The toolchain's own cargo; `None`: the one that runs this.
    cargo: Option<PathBuf>,
    /// Major version of the LLVM that its bitcode is of.
    llvm: u32,
    what: String,
}

/// Arguments of `setup`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Lists what is there, what is missing and what would be installed, and changes nothing.
    #[arg(long)]
    check: bool,
}

/// `cargo xtask setup`.
///
/// # Errors
///
/// As [`setup`]; with `--check`, when something is missing.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.check { check() } else { setup() }
}

/// Installs one more package, for a program.
///
/// # Errors
///
/// With what to do, when it cannot be installed.
pub(crate) fn package(program: &str, package: &'static str) -> Result<()> {
    programs(
        &[(program, package)],
        "for tests beside other programs",
        &mut Apt::default(),
    )
}

/// Makes the machine fit to build and test; quick when it is.
///
/// # Errors
///
/// With what to do, when something is missing and cannot be installed.
pub(crate) fn setup() -> Result<()> {
    let tools = target().join("tools");
    fs::create_dir_all(&tools).with_context(|| format!("{}", tools.display()))?;
    let mut apt = Apt::default();
    let toolchain = toolchain(&mut apt)?;
    add_clippy(&toolchain);
    let linker = bpf_linker(&tools, &toolchain, &mut apt)?;
    programs(&PROGRAMS, "for tests and the demo", &mut apt)?;

    let mut text =
        String::from("# Written by `cargo xtask setup`, read by proxy-userspace/build.rs.\n");
    let mut set = |key: &str, value: &str| text.push_str(&format!("{key}={value}\n"));
    set("RUSTC", &toolchain.rustc.to_string_lossy());
    if let Some(cargo) = &toolchain.cargo {
        set("CARGO", &cargo.to_string_lossy());
    }
    // `-Z build-std` with a stable compiler.
    set("RUSTC_BOOTSTRAP", "1");
    set("BPF_LINKER", &linker.to_string_lossy());
    let file = tools.join("env");
    // Written only when it changes: the BPF build starts anew when it does.
    if fs::read_to_string(&file).ok().as_deref() != Some(&text) {
        fs::write(&file, &text).with_context(|| format!("{}", file.display()))?;
        say(
            "setup",
            format_args!("BPF programs are built by {}", toolchain.what),
        );
    }
    Ok(())
}

/// What a check of the machine found of one thing.
enum Found {
    There(String),
    /// With what would be done.
    Missing(String),
}

/// Lists what [`setup`] looks for, and changes nothing.
fn check() -> Result<()> {
    let mut missing = 0;
    for (what, found) in inventory() {
        match found {
            Found::There(text) => println!("there    {what}: {text}"),
            Found::Missing(text) => {
                missing += 1;
                println!("missing  {what}: {text}");
            }
        }
    }
    if missing > 0 {
        bail!("{missing} missing: `cargo xtask setup` does what stands beside each");
    }
    Ok(())
}

fn inventory() -> Vec<(String, Found)> {
    let mut list = Vec::new();
    let apt = |packages: &str| {
        if which("apt-get").is_some() {
            format!("apt-get install {packages}")
        } else {
            format!("install Debian's {packages} or its like by hand: there is no apt-get")
        }
    };
    let (components, debian) = (COMPONENTS.join(" "), DEBIAN_PACKAGES.join(" "));
    let toolchain = candidates().find(|toolchain| fits(toolchain).is_ok());
    let add = if which("rustup").is_some() {
        format!("rustup component add {components}, or {}", apt(&debian))
    } else {
        apt(&debian)
    };
    list.push((
        "toolchain for BPF, with rust-src".to_owned(),
        match &toolchain {
            Some(toolchain) => Found::There(toolchain.what.clone()),
            None => Found::Missing(add),
        },
    ));
    let add = if which("rustup").is_some() {
        format!("rustup component add {components}")
    } else {
        "only rustup adds it: without, the lints of the BPF programs are skipped".to_owned()
    };
    let clippy = toolchain.as_ref().and_then(clippy_of);
    list.push((
        "its clippy".to_owned(),
        clippy.map_or(Found::Missing(add), |path| {
            Found::There(path.display().to_string())
        }),
    ));
    let llvm = toolchain
        .as_ref()
        .map_or(*BPF_LINKER_LLVM.start(), |toolchain| toolchain.llvm);
    let tools = target().join("tools");
    if built_linker(&tools, llvm) {
        list.push((
            format!("bpf-linker {BPF_LINKER_VERSION}"),
            Found::There(tools.join("bin/bpf-linker").display().to_string()),
        ));
    } else {
        list.push((
            format!("bpf-linker {BPF_LINKER_VERSION}"),
            Found::Missing(format!("cargo install into {}", tools.display())),
        ));
        let oldest = llvm.max(*BPF_LINKER_LLVM.start());
        let found = (oldest..=*BPF_LINKER_LLVM.end()).find(has_llvm);
        list.push((
            "LLVM for development, for bpf-linker".to_owned(),
            found.map_or_else(
                || Found::Missing(apt(&format!("llvm-{oldest}-dev"))),
                |llvm| Found::There(format!("/usr/lib/llvm-{llvm}")),
            ),
        ));
        for (there, package) in linker_needs() {
            let found = if there {
                Found::There("for bpf-linker".to_owned())
            } else {
                Found::Missing(apt(package))
            };
            list.push((package.to_owned(), found));
        }
    }
    for (program, package) in PROGRAMS {
        let found = which(program).map_or_else(
            || Found::Missing(apt(package)),
            |path| Found::There(path.display().to_string()),
        );
        list.push((program.to_owned(), found));
    }
    list
}

/// Installs what `cargo xtask vm` needs besides [`setup`].
///
/// # Errors
///
/// With what to do, when something is missing and cannot be installed.
pub(crate) fn vm() -> Result<()> {
    programs(
        &VM_PROGRAMS,
        "for tests in another kernel",
        &mut Apt::default(),
    )
}

/// Toolchains with the source of `core`, the best first.
fn candidates() -> impl Iterator<Item = Toolchain> {
    rustup_toolchains()
        .into_iter()
        .chain([debian_toolchain()])
        .flatten()
}

/// The clippy of a toolchain.
fn clippy_of(toolchain: &Toolchain) -> Option<PathBuf> {
    let bin = toolchain.cargo.as_ref()?.parent()?;
    Some(bin.join("cargo-clippy")).filter(|path| path.is_file())
}

/// Adds clippy to a toolchain without, if rustup can: the lints of the BPF programs say so if not.
fn add_clippy(toolchain: &Toolchain) {
    if clippy_of(toolchain).is_none() && which("rustup").is_some() {
        say("setup", "adding clippy to the active rustup toolchain");
        if let Err(error) = rustup_add() {
            say("setup", format_args!("{error:#}"));
        }
    }
}

fn rustup_add() -> Result<()> {
    let mut command = Command::new("rustup");
    command
        .args(["component", "add"])
        .args(COMPONENTS)
        .current_dir(root());
    capture(&mut command).map(drop)
}

/// Installs what the story needs besides [`setup`]: programs, and nginx, which is unpacked and not
/// installed, because Debian's package would start it on this machine.
///
/// # Errors
///
/// With what to do, when something is missing and cannot be had.
pub(crate) fn story() -> Result<()> {
    programs(&STORY_PROGRAMS, "for the story", &mut Apt::default())?;
    if nginx().is_ok() {
        return Ok(());
    }
    let folder = target().join("tools/nginx");
    fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    let mut apt = Apt::default();
    apt.update()?;
    // Its name in Debian 12, and in older releases and Ubuntu.
    for package in ["nginx", "nginx-core", "nginx-light"] {
        say(
            "setup",
            format_args!(
                "apt-get download {package}: for the story, unpacked into {}",
                folder.display()
            ),
        );
        let downloaded = capture(
            Command::new("apt-get")
                .args(["download", "-qq", package])
                .current_dir(&folder),
        );
        if let Err(error) = downloaded {
            say("setup", format_args!("{error:#}"));
            continue;
        }
        for entry in fs::read_dir(&folder)?.flatten() {
            let file = entry.path();
            if file.extension().is_some_and(|extension| extension == "deb") {
                capture(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&folder))?;
                fs::remove_file(&file)?;
            }
        }
        if nginx().is_ok() {
            return Ok(());
        }
    }
    nginx().map(drop)
}

/// nginx, installed or unpacked by [`story`], if it runs.
///
/// # Errors
///
/// When there is none.
pub(crate) fn nginx() -> Result<PathBuf> {
    let unpacked = target().join("tools/nginx/usr/sbin/nginx");
    let runs = |path: &PathBuf| {
        Command::new(path)
            .arg("-v")
            .output()
            .is_ok_and(|output| output.status.success())
    };
    [which("nginx"), Some(unpacked)]
        .into_iter()
        .flatten()
        .find(runs)
        .context(
            "there is no nginx that runs: cargo xtask run --story sets it up, or install nginx",
        )
}

/// Finds a toolchain with the source of `core`, or adds that to one.
fn toolchain(apt: &mut Apt) -> Result<Toolchain> {
    let mut reasons = Vec::new();
    for toolchain in candidates() {
        match fits(&toolchain) {
            Ok(()) => return Ok(toolchain),
            Err(reason) => reasons.push(format!("{}: {reason:#}", toolchain.what)),
        }
    }
    if which("rustup").is_some() {
        say(
            "setup",
            "adding rust-src and clippy to the active rustup toolchain",
        );
        match rustup_add() {
            Ok(()) => {
                if let Some(toolchain) = candidates().find(|toolchain| fits(toolchain).is_ok()) {
                    return Ok(toolchain);
                }
            }
            Err(error) => reasons.push(format!("{error:#}")),
        }
    }
    match apt.install(&DEBIAN_PACKAGES, "a Rust compiler with the source of core") {
        Ok(()) => {
            if let Some(toolchain) = debian_toolchain().filter(|toolchain| fits(toolchain).is_ok())
            {
                return Ok(toolchain);
            }
            reasons.push(format!("{DEBIAN_RUSTC} is still unfit"));
        }
        Err(error) => reasons.push(format!("{error:#}")),
    }
    bail!(
        "no Rust toolchain with rust-src: run `rustup component add rust-src` and try again ({})",
        reasons.join("; ")
    )
}

/// The active toolchain, then nightly, if they have the source.
fn rustup_toolchains() -> Vec<Option<Toolchain>> {
    let active = env::var_os("CARGO").map(PathBuf::from).and_then(|cargo| {
        let bin = cargo.parent()?.to_path_buf();
        Some((bin, "the active toolchain".to_owned()))
    });
    let home = env::var_os("RUSTUP_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".rustup")));
    let installed = home.into_iter().flat_map(|home| {
        let folders = fs::read_dir(home.join("toolchains"))
            .into_iter()
            .flatten()
            .flatten();
        let mut names: Vec<PathBuf> = folders.map(|entry| entry.path()).collect();
        names.retain(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("nightly-"))
        });
        names.sort();
        names.into_iter().map(|path| {
            let what = format!(
                "toolchain {}",
                path.file_name().unwrap_or_default().to_string_lossy()
            );
            (path.join("bin"), what)
        })
    });
    active
        .into_iter()
        .chain(installed)
        .map(|(bin, what)| {
            let sysroot = bin.parent()?.to_path_buf();
            has_source(&sysroot).then_some(())?;
            inspect(bin.join("rustc"), Some(bin.join("cargo")), what).ok()
        })
        .collect()
}

fn debian_toolchain() -> Option<Toolchain> {
    has_source(Path::new("/usr")).then_some(())?;
    inspect(
        DEBIAN_RUSTC.into(),
        None,
        format!("{DEBIAN_RUSTC} (Debian's rustc-web)"),
    )
    .ok()
}

fn has_source(sysroot: &Path) -> bool {
    sysroot
        .join("lib/rustlib/src/rust/library/core/Cargo.toml")
        .is_file()
}

fn inspect(rustc: PathBuf, cargo: Option<PathBuf>, what: String) -> Result<Toolchain> {
    let text = capture(Command::new(&rustc).arg("-vV"))?;
    let llvm = field(&text, "LLVM version: ").context("rustc -vV names no LLVM version")?;
    let release = field(&text, "release: ").context("rustc -vV names no release")?;
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < MIN_RUSTC {
        bail!(
            "rustc {release} is older than {}.{}",
            MIN_RUSTC.0,
            MIN_RUSTC.1
        );
    }
    let llvm = llvm
        .split('.')
        .next()
        .and_then(|major| major.parse().ok())
        .context("LLVM version")?;
    Ok(Toolchain {
        rustc,
        cargo,
        llvm,
        what: format!("{what} (rustc {release}, LLVM {llvm})"),
    })
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

/// Whether bpf-linker can read what the compiler writes: LLVM reads bitcode of its own version and
/// of older ones.
fn fits(toolchain: &Toolchain) -> Result<()> {
    if toolchain.llvm > *BPF_LINKER_LLVM.end() {
        let newest = BPF_LINKER_LLVM.end();
        bail!(
            "its LLVM {} is newer than {newest}, the newest that bpf-linker {BPF_LINKER_VERSION} knows",
            toolchain.llvm
        );
    }
    Ok(())
}

/// `target/tools/bin/bpf-linker`, built if it is not there or of another version.
fn bpf_linker(tools: &Path, toolchain: &Toolchain, apt: &mut Apt) -> Result<PathBuf> {
    let linker = tools.join("bin/bpf-linker");
    if built_linker(tools, toolchain.llvm) {
        return Ok(linker);
    }
    let llvm = llvm_dev(toolchain, apt)?;
    let needs = linker_needs();
    let missing: Vec<&str> = needs
        .iter()
        .filter(|(there, _)| !there)
        .map(|(_, package)| *package)
        .collect();
    apt.install(&missing, "to build bpf-linker")?;
    say(
        "setup",
        format_args!("building bpf-linker {BPF_LINKER_VERSION} with LLVM {llvm} (about a minute)"),
    );
    let build = tools.join("build");
    let prefix = format!("/usr/lib/llvm-{llvm}");
    let built = capture(
        cargo()
            .args([
                "install",
                "bpf-linker",
                "--locked",
                "--quiet",
                "--force",
                "--version",
                BPF_LINKER_VERSION,
            ])
            .args([
                "--no-default-features",
                "--features",
                &format!("llvm-{llvm}"),
                "--root",
            ])
            .arg(tools)
            .env("LLVM_PREFIX", &prefix)
            .env("CARGO_TARGET_DIR", &build)
            .env_remove("RUSTFLAGS"),
    );
    // Half a gigabyte that nobody needs again; what stays of it is in nobody's way.
    let _ = fs::remove_dir_all(&build);
    built.context("bpf-linker does not build")?;
    capture(Command::new(&linker).arg("--version")).context("bpf-linker does not run")?;
    let stamp = tools.join("bpf-linker.stamp");
    fs::write(&stamp, format!("{BPF_LINKER_VERSION} llvm-{llvm}\n"))
        .with_context(|| format!("{}", stamp.display()))?;
    Ok(linker)
}

/// Whether `target/tools` has a bpf-linker of our version that runs and reads bitcode of this LLVM.
fn built_linker(tools: &Path, llvm: u32) -> bool {
    let built = fs::read_to_string(tools.join("bpf-linker.stamp")).unwrap_or_default();
    built
        .trim()
        .split_once(" llvm-")
        .is_some_and(|(version, of)| {
            // Running it shows that the shared LLVM that it was linked to is still there.
            version == BPF_LINKER_VERSION
                && of.parse().unwrap_or(0) >= llvm
                && capture(Command::new(tools.join("bin/bpf-linker")).arg("--version")).is_ok()
        })
}

/// What building bpf-linker takes besides LLVM: whether it is there, and its package.
fn linker_needs() -> [(bool, &'static str); 4] {
    [
        (which("cc").is_some(), "gcc"),
        (which("c++").is_some(), "g++"),
        (Path::new("/usr/include/zlib.h").is_file(), "zlib1g-dev"),
        (Path::new("/usr/include/zstd.h").is_file(), "libzstd-dev"),
    ]
}

/// Whether an LLVM is installed for development.
fn has_llvm(llvm: &u32) -> bool {
    Path::new(&format!("/usr/lib/llvm-{llvm}/bin/llvm-config")).is_file()
        && Path::new(&format!("/usr/lib/llvm-{llvm}/include/llvm-c/Core.h")).exists()
}

/// The version of an installed LLVM for development that bpf-linker and the compiler go with.
fn llvm_dev(toolchain: &Toolchain, apt: &mut Apt) -> Result<u32> {
    let oldest = toolchain.llvm.max(*BPF_LINKER_LLVM.start());
    let fit = || oldest..=*BPF_LINKER_LLVM.end();
    if let Some(llvm) = fit().find(has_llvm) {
        return Ok(llvm);
    }
    let mut reason = None;
    for llvm in fit() {
        match apt.install(&[&format!("llvm-{llvm}-dev")], "for bpf-linker") {
            Ok(()) if has_llvm(&llvm) => return Ok(llvm),
            Ok(()) => {}
            Err(error) => reason = reason.or(Some(error)),
        }
    }
    let error = reason.unwrap_or_else(|| {
        anyhow::anyhow!("it was installed elsewhere than in /usr/lib/llvm-{oldest}")
    });
    Err(error.context(format!(
        "LLVM {oldest} for development is missing: add the repository of https://apt.llvm.org and install llvm-{oldest}-dev"
    )))
}

fn programs(needed: &[(&str, &'static str)], why: &str, apt: &mut Apt) -> Result<()> {
    let missing = || {
        needed
            .iter()
            .filter(|(program, _)| which(program).is_none())
    };
    let mut packages: Vec<&str> = missing().map(|(_, package)| *package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    if apt.install(&packages, why).is_err() {
        // Ubuntu has no package bpftool: it comes with the kernel's tools.
        for package in packages.iter_mut().filter(|package| **package == "bpftool") {
            *package = "linux-tools-generic";
        }
        apt.install(&packages, why)?;
    }
    let left: Vec<&str> = missing().map(|(program, _)| *program).collect();
    if !left.is_empty() {
        bail!(
            "{} still not found after {} was installed",
            left.join(", "),
            packages.join(", ")
        );
    }
    Ok(())
}

/// apt-get, whose package lists are fetched once at most.
#[derive(Default)]
struct Apt {
    updated: bool,
}

impl Apt {
    /// Fetches the package lists, once.
    fn update(&mut self) -> Result<()> {
        if !self.updated {
            let how = if is_root() { "" } else { " with sudo" };
            say("setup", format_args!("apt-get update{how}"));
            // An unreachable repository among several is no reason to stop: the package may be in
            // another.
            if let Err(error) = capture(as_root("apt-get")?.args(["update", "-qq"])) {
                say("setup", format_args!("{error:#}"));
            }
            self.updated = true;
        }
        Ok(())
    }

    fn install(&mut self, packages: &[&str], why: &str) -> Result<()> {
        if packages.is_empty() {
            return Ok(());
        }
        let list = packages.join(" ");
        if which("apt-get").is_none() {
            bail!("install {list} ({why}): this is neither Debian nor Ubuntu");
        }
        self.update()?;
        let how = if is_root() { "" } else { " with sudo" };
        say("setup", format_args!("apt-get install {list}{how}: {why}"));
        let mut command = as_root("apt-get")?;
        command
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(packages);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        capture(&mut command)
            .with_context(|| format!("cannot install {list}"))
            .map(drop)
    }
}
