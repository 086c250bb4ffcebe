//! `cargo xtask`: everything that a developer does with shunt, from a machine with nothing but a
//! Rust toolchain.

mod bench;
mod build;
mod demo;
mod image;
mod run;
mod setup;
mod shell;
mod story;
mod test;
mod vm;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

/// Set-up, build, demo and tests of shunt.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Finds or installs what building and testing need: a toolchain for BPF, bpf-linker, and
    /// tools.
    Setup(setup::Args),
    /// Builds `target/release/shunt`.
    Build,
    /// Makes the container image from nothing but the static agent: an OCI archive in
    /// `target/image`.
    Image(image::Args),
    /// Runs a cluster in network namespaces with live traffic; with arguments of `shunt run`, the
    /// agent on this machine.
    Run(run::Args),
    /// Measures shunt beside what a user would otherwise run; writes `BENCHMARKS.md` and
    /// `target/bench/`. Needs root or sudo.
    Bench(bench::Args),
    /// One end of a measured connection.
    #[command(hide = true)]
    BenchPeer(bench::peer::Args),
    /// Formatting, lints, documentation and all tests: host, kernel and cluster. Needs root or
    /// sudo.
    Test(test::Args),
    /// What runs of tests may leave on this machine, as JSON.
    #[command(hide = true)]
    Traces(test::traces::Args),
    /// Runs tests in another kernel, one of Debian's, under QEMU: packets through all programs, and
    /// SCTP sockets.
    Vm(vm::Args),
}

/// Both `VERB --flag` and `VERB -- --flag` are what people type: the first `--` after the verb says
/// nothing.
fn without_dashes(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<OsString> = words.collect();
    if let Some(place) = words.iter().skip(2).position(|word| word == "--") {
        words.remove(place + 2);
    }
    words
}

fn main() -> ExitCode {
    shell::add_sbin_to_path();
    let result = match Cli::parse_from(without_dashes(std::env::args_os())).verb {
        Verb::Setup(args) => setup::run(&args),
        Verb::Build => build::build().map(drop),
        Verb::Image(args) => image::image(&args),
        Verb::Run(args) => run::run(&args),
        Verb::Bench(args) => bench::bench(&args),
        Verb::BenchPeer(args) => bench::peer::run(&args),
        Verb::Test(args) => test::test(&args),
        Verb::Traces(args) => test::traces::print(&args),
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

#[cfg(test)]
mod unit {
    use super::*;

    fn parse(line: &str) -> Result<String, clap::Error> {
        let words = ["cargo xtask"].into_iter().chain(line.split_whitespace());
        let cli = Cli::try_parse_from(without_dashes(words.map(OsString::from)))?;
        Ok(format!("{:?}", cli.verb))
    }

    #[test]
    fn every_verb_takes_its_flags_with_and_without_dashes() {
        for (verb, flags, field) in [
            ("setup", "--check", "check: true"),
            ("build", "", "Build"),
            ("image", "--try", "trial: true"),
            ("run", "--once", "once: true"),
            (
                "run",
                "--manifests DIR",
                "agent: [\"--manifests\", \"DIR\"]",
            ),
            ("bench", "--quick", "quick: true"),
            ("bench", "datapath --quick", "quick: true"),
            ("test", "--long", "long: true"),
            ("test", "--peers", "peers: true"),
            ("test", "one two --nocapture", "names: [\"one\", \"two\"]"),
            ("vm", "--kernel 6.1", "kernel: \"6.1\""),
            ("vm", "--kernel 6.1 test sctp", "[\"test\", \"sctp\"]"),
        ] {
            let short = parse(&format!("{verb} {flags}")).unwrap();
            assert!(short.contains(field), "{verb} {flags}: {short}");
            assert_eq!(
                parse(&format!("{verb} -- {flags}")).unwrap(),
                short,
                "{verb} -- {flags}"
            );
        }
        assert_eq!(
            parse("vm --kernel 6.1 -- test a").unwrap(),
            parse("vm --kernel 6.1 test a").unwrap()
        );
    }

    #[test]
    fn every_verb_says_what_it_does_not_know() {
        for verb in ["setup", "build", "image", "bench", "test"] {
            let error = parse(&format!("{verb} --nonsense"))
                .unwrap_err()
                .to_string();
            assert!(error.contains("--nonsense"), "{verb}: {error}");
        }
    }
}
