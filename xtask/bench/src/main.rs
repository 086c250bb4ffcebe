//! Measures shunt's programs beside floor programs, and prints a line of JSON for each: `cargo
//! xtask bench` runs it.
//!
//! It is apart from `xtask` because it links the agent's library: it loads the programs, fills
//! their maps through the same code as the agent, and then runs them in a namespace of its own.

mod connect;
mod datapath;
mod nat;
mod replay;
mod report;
mod sync;
mod world;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measurements for `cargo xtask bench`.
#[derive(Parser)]
#[command(name = "shunt-bench")]
struct Cli {
    #[command(subcommand)]
    what: What,
    /// Fewer rounds, and one Service only.
    #[arg(long, global = true)]
    quick: bool,
    /// Only figures whose name contains this.
    #[arg(long, global = true, default_value = "")]
    only: String,
}

#[derive(Subcommand)]
enum What {
    /// ns per packet of two builds' programs.
    Compare {
        /// The older one's object.
        old: std::path::PathBuf,
        /// The newer one's object.
        new: std::path::PathBuf,
    },
    /// ns per packet of the XDP and tc programs, and per call of the socket programs.
    Datapath,
    /// A DNAT at tc that does only the unavoidable, for `bench connections`.
    Nat(nat::Args),
    /// Time, CPU and memory from objects to maps.
    Sync,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.what {
        What::Compare { old, new } => datapath::compare(&old, &new, cli.quick, &cli.only),
        What::Datapath => datapath::measure(cli.quick, &cli.only),
        What::Nat(args) => nat::run(&args),
        What::Sync => sync::measure(cli.quick, &cli.only),
    }
}
