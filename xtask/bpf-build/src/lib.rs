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
    Endian, Endianness,
    build::{
        Bytes,
        elf::{Builder, SectionData},
    },
    elf::SHT_STRTAB,
};

/// With it, the object keeps the lines of its sources, for the verifier's log and `bpftool prog dump`.
const LINES: &str = "SHUNT_BPF_LINES";
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
    println!("cargo::rerun-if-env-changed={LINES}");
    let object = without_debug_info(&object, env::var_os(LINES).is_some())
        .map_err(|e| format!("{}: {e}", built.display()))?;
    fs::write(&out, object).map_err(|e| format!("{}: {e}", out.display()))
}

/// The object without DWARF, which the linker has made BTF of: nobody else reads it, and it is four
/// fifths of the object and nine tenths of the time that it takes to parse it. And, unless `lines`
/// are wanted, without those of its sources.
fn without_debug_info(object: &[u8], lines: bool) -> object::build::Result<Vec<u8>> {
    let mut elf = Builder::read(object)?;
    let endian = elf.endian;
    for section in &mut elf.sections {
        let name = section.name.to_string();
        section.delete = name.starts_with(".debug_") || name.starts_with(".rel.debug_");
        if lines {
            continue;
        }
        // Where each line belongs; loaders do not read it.
        section.delete |= name == ".rel.BTF.ext";
        if name == ".BTF.ext"
            && let SectionData::Data(ext) = &section.data
            && let Some(short) = without_lines(ext.as_slice(), endian)
        {
            section.data = SectionData::Data(Bytes::from(short));
        }
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

/// `.BTF.ext` without lines; `None` when it is not as the kernel's documentation of BTF has it
/// (docs.kernel.org/bpf/btf.html, `btf_ext_header`). aya gives each function a copy of the lines
/// of its whole section: 150 MB, and 0.14 s, each time that it parses our object.
fn without_lines(ext: &[u8], endian: Endianness) -> Option<Vec<u8>> {
    let place = |field: usize| 4 * field..4 * field + 4;
    let read = |field| Some(endian.read_u32(ext.get(place(field))?.try_into().ok()?));
    // magic and version, hdr_len, func_info_off and _len, line_info_off and _len, core_relo_off.
    let (header, offset, length) = (read(1)?, read(4)?, read(5)?);
    let begin = header as usize + offset as usize;
    let end = begin + length as usize;
    let mut short = [ext.get(..begin)?, ext.get(end..)?].concat();
    short[place(5)].fill(0);
    if header as usize > place(6).start && read(6)? > offset {
        let moved = endian.write_u32(read(6)?.checked_sub(length)?);
        short[place(6)].copy_from_slice(&moved);
    }
    Some(short)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts of these lengths behind a header: functions, lines, relocations.
    fn ext([functions, lines, relocations]: [usize; 3]) -> Vec<u8> {
        let word = |length: usize| length as u32;
        let header = [
            0x0001_eb9f,
            32,
            0,
            word(functions),
            word(functions),
            word(lines),
            word(functions + lines),
            word(relocations),
        ];
        let parts = [(functions, b'f'), (lines, b'l'), (relocations, b'r')];
        let parts = parts.map(|(length, byte)| vec![byte; length]).concat();
        [header.map(u32::to_le_bytes).as_flattened().to_vec(), parts].concat()
    }

    #[test]
    fn lines_go_and_the_rest_stays() {
        for [functions, relocations] in [[8, 12], [8, 0], [0, 0]] {
            assert_eq!(
                without_lines(&ext([functions, 20, relocations]), Endianness::Little),
                Some(ext([functions, 0, relocations]))
            );
        }
        assert_eq!(without_lines(&[0; 12], Endianness::Little), None);
        let mut cut = ext([8, 20, 0]);
        cut.truncate(40);
        assert_eq!(without_lines(&cut, Endianness::Little), None);
    }
}
