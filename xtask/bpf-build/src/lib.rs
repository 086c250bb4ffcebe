//! Builds a package of BPF programs for a build script and leaves the object in `OUT_DIR`.
//!
//! The toolchain for it is not the one that builds the caller (`-Z build-std` needs `rust-src` and
//! a linker for BPF), so `cargo xtask setup` looks for both once and writes what it found into
//! `target/tools/env`; this crate only reads it. It is the one place with the flags of the BPF
//! build.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

/// Flags of the BPF build.
const RUSTFLAGS: &[&str] = &[
    // Types of maps and programs for bpftool, and line numbers in the verifier's log.
    "-Cdebuginfo=2",
    "-Clink-arg=--btf",
    // Jumps on 32-bit halves and atomics that return the old value: kernel 5.12 and later.
    "-Ctarget-cpu=v3",
];

/// The body of a build script: builds the binary `object` of `package`, whose sources are in the
/// folder `sources` of the workspace at `workspace` (relative to the calling package), and copies
/// it to `OUT_DIR`.
pub fn main(workspace: &str, package: &str, sources: &str, object: &str) -> ExitCode {
    match build(workspace, package, sources, object) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build(workspace: &str, package: &str, sources: &str, object: &str) -> Result<(), String> {
    let workspace = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join(workspace);
    let workspace = workspace
        .canonicalize()
        .map_err(|e| format!("{}: {e}", workspace.display()))?;
    let out = PathBuf::from(variable("OUT_DIR")?).join(object);
    let env_file = workspace.join("target/tools/env");
    for path in [
        sources,
        "proxy-common",
        "Cargo.toml",
        "Cargo.lock",
        "target/tools/env",
    ] {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }

    let target = match variable("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    // Apart from the outer target folder, whose lock the outer cargo holds while this runs.
    let (built, stderr) = compile(
        &workspace,
        &workspace.join("target/bpf"),
        &env_file,
        target,
        sources,
        object,
    )?;
    for warning in warnings(&stderr) {
        println!("cargo::warning={package}: {warning}");
    }
    let object = fs::read(&built).map_err(|e| format!("{}: {e}", built.display()))?;
    let object = without_debug_info(&object).map_err(|e| format!("{}: {e}", built.display()))?;
    fs::write(&out, object).map_err(|e| format!("{}: {e}", out.display()))
}

/// The object without DWARF, which the linker has made BTF of: nobody else reads it, and it is four
/// fifths of the object and nine tenths of the time that it takes to parse it.
fn without_debug_info(object: &[u8]) -> object::build::Result<Vec<u8>> {
    let mut elf = Builder::read(object)?;
    for section in &mut elf.sections {
        let name = section.name.to_string();
        section.delete = name.starts_with(".debug_") || name.starts_with(".rel.debug_");
    }
    // LLVM keeps the names of sections with those of symbols, which the builder does not.
    let names = elf.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    elf.delete_orphans();
    let mut written = Vec::new();
    elf.write(&mut written)?;
    Ok(written)
}

/// Builds the binary `object` of the package in the folder `sources` of `workspace` for `target`
/// into `target_dir`, with the tools that `env_file` lists; its path, and what the compiler said.
///
/// # Errors
/// What is missing, or the compiler's messages.
pub fn compile(
    workspace: &Path,
    target_dir: &Path,
    env_file: &Path,
    target: &str,
    sources: &str,
    object: &str,
) -> Result<(PathBuf, String), String> {
    let mut tools = tools(env_file)?;
    let linker = tools.remove("BPF_LINKER").ok_or_else(|| {
        format!(
            "{}: no BPF_LINKER: run `cargo xtask setup`",
            env_file.display()
        )
    })?;
    let mut cargo = Command::new(
        tools
            .remove("CARGO")
            .map_or_else(|| variable("CARGO"), Ok)?,
    );
    cargo
        .current_dir(workspace)
        .args(["build", "--release", "-Zbuild-std=core", "--manifest-path"])
        .arg(Path::new(sources).join("Cargo.toml"))
        .args(["--bin", object, "--target", target, "--target-dir"])
        .arg(target_dir);
    // What the outer build says to its own compiler (clippy's wrapper, coverage flags, a cross
    // target) is not for this one.
    for name in [
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_BOOTSTRAP",
        "RUSTC_LINKER",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "CARGO_BUILD_RUSTC",
        "CARGO_BUILD_RUSTC_WRAPPER",
        "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_BUILD_TARGET_DIR",
        "CARGO_TARGET_DIR",
        "CLIPPY_ARGS",
    ] {
        cargo.env_remove(name);
    }
    for (name, _) in env::vars_os() {
        if name
            .to_str()
            .is_some_and(|n| n.starts_with("CARGO_PROFILE_") || n.starts_with("CARGO_UNSTABLE_"))
        {
            cargo.env_remove(name);
        }
    }
    let mut flags: Vec<String> = RUSTFLAGS.iter().map(|&f| f.to_owned()).collect();
    flags.push(format!("-Clinker={linker}"));
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // Full debug information also of the crates that the programs use: the types of keys and
        // values are theirs.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .envs(&tools);

    let output = cargo
        .output()
        .map_err(|e| format!("{:?} does not start: {e}", cargo.get_program()))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!(
            "{stderr}\n{sources} does not build ({}); see above",
            output.status
        ));
    }
    let built = target_dir.join(target).join("release").join(object);
    Ok((built, stderr.into_owned()))
}

/// The toolchain that `cargo xtask setup` wrote down: lines of `KEY=VALUE`, empty lines and `#`
/// comments.
fn tools(file: &Path) -> Result<BTreeMap<String, String>, String> {
    let text = fs::read_to_string(file).map_err(|e| {
        format!(
            "the BPF toolchain is not set up ({}: {e}): run `cargo xtask setup`",
            file.display()
        )
    })?;
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| match line.split_once('=') {
            Some((key, value)) => Ok((key.trim().to_owned(), value.trim().to_owned())),
            None => Err(format!(
                "{}: `{line}` is not KEY=VALUE: run `cargo xtask setup`",
                file.display()
            )),
        })
        .collect()
}

/// First lines of the compiler's warnings, with their places.
fn warnings(stderr: &str) -> impl Iterator<Item = String> + '_ {
    let lines: Vec<&str> = stderr.lines().collect();
    (0..lines.len()).filter_map(move |i| {
        let text = lines[i].strip_prefix("warning: ")?;
        let place = lines
            .get(i + 1)
            .and_then(|l| l.trim().strip_prefix("--> "))
            .unwrap_or_default();
        Some(format!("{text} {place}").trim().to_owned())
    })
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|e| format!("{name}: {e}: this script runs under cargo"))
}
