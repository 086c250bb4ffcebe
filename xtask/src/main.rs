//! `cargo xtask`: everything that a developer does with shunt, from a machine with nothing but a Rust toolchain.

mod bench;
mod build;
mod demo;
mod image;
mod run;
mod setup;
mod shell;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set-up, build, demo and tests of shunt.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Finds or installs what building and testing need: a toolchain for BPF, bpf-linker, and tools.
    Setup,
    /// Builds `target/release/shunt`.
    Build,
    /// Makes the container image from nothing but the static agent: an OCI archive in `target/image`.
    Image(image::Args),
    /// Runs a cluster in network namespaces with live traffic; with arguments after `--`, the agent on this machine.
    Run(run::Args),
    /// Measures shunt beside what a user would otherwise run; writes `BENCHMARKS.md` and `target/bench/`. Needs root or sudo.
    Bench(bench::Args),
    /// One end of a measured connection.
    #[command(hide = true)]
    BenchPeer(bench::peer::Args),
    /// Formatting, lints and all tests: host, kernel and cluster. Needs root or sudo.
    Test(test::Args),
    /// Runs tests in another kernel, one of Debian's, under QEMU: packets through all programs, and SCTP sockets.
    Vm(vm::Args),
}

fn main() -> ExitCode {
    shell::add_sbin_to_path();
    let result = match Cli::parse().verb {
        Verb::Setup => setup::setup().map(drop),
        Verb::Build => build::build().map(drop),
        Verb::Image(args) => image::image(&args),
        Verb::Run(args) => run::run(&args),
        Verb::Bench(args) => bench::bench(&args),
        Verb::BenchPeer(args) => bench::peer::run(&args),
        Verb::Test(args) => test::test(&args),
        Verb::Vm(args) => vm::vm(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
