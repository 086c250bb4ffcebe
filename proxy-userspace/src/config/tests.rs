use clap::{CommandFactory, Parser};

use super::{flags::RunArgs, *};

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: RunArgs,
}

fn with_flags(flags: &[&str]) -> Settings {
    let line = ["run"].iter().chain(flags);
    Cli::try_parse_from(line).unwrap().args.settings().unwrap()
}

/// What `--help` says of defaults, given as flags, changes nothing; it says nothing of a flag that has none.
#[test]
fn the_help_tells_the_defaults() {
    let command = Cli::command();
    let mut told = Vec::new();
    for arg in command.get_arguments() {
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let Some((_, default)) = help.split_once("[default: ") else {
            continue;
        };
        let flag = arg.get_long().unwrap();
        let value = default.split(']').next().unwrap();
        let words = value.contains(' ') || value == "all";
        if !words {
            assert_eq!(
                with_flags(&[&format!("--{flag}={value}")]),
                Settings::default(),
                "--{flag} {value}"
            );
            told.push(flag);
        }
    }
    assert_eq!(told.len(), 21, "{told:?}");
    for (flag, other) in [
        ("xdp", "off"),
        ("snat-ports", "1-2"),
        ("max-flows", "7"),
        ("bpf-root", "/x"),
    ] {
        assert!(told.contains(&flag));
        assert_ne!(with_flags(&[&format!("--{flag}={other}")]), Settings::default());
    }
}

#[test]
fn servers_listen_where_they_are_told_or_nowhere() {
    let address = |text| bind_address(text, 10256).map(|address| address.map(|address| address.to_string()));
    assert_eq!(address(""), Ok(None));
    for (text, expected) in [
        ("192.0.2.1:80", "192.0.2.1:80"),
        ("192.0.2.1", "192.0.2.1:10256"),
        ("[2001:db8::1]:80", "[2001:db8::1]:80"),
        ("[::]", "[::]:10256"),
        ("::", "[::]:10256"),
    ] {
        assert_eq!(address(text), Ok(Some(expected.to_owned())), "{text}");
    }
    for text in [
        "localhost:80",
        "192.0.2.1:",
        ":80",
        "192.0.2.1:70000",
        "80",
        "[192.0.2.1",
    ] {
        assert!(address(text).is_err(), "{text}");
    }
    assert_eq!(with_flags(&["--healthz-bind-address="]).healthz_bind_address, None);
    assert_eq!(
        with_flags(&["--metrics-bind-address", "::1"]).metrics_bind_address,
        Some("[::1]:10249".parse().unwrap())
    );
}
