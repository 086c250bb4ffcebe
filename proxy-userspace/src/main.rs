//! `shunt`: the node agent and its command line. Everything is in the library; see [`shunt::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    shunt::cli::main()
}
