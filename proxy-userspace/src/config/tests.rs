use std::time::Duration;

use clap::{CommandFactory, Parser};
use ipnet::IpNet;

use super::{conntrack::Conntrack, dns::Dns, flags::RunArgs, values::Listen, *};
use crate::datapath::{Capacities, load::SocketLb, netfilter::Netfilter, xdp::XdpMode};

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: RunArgs,
}

fn with_flags(flags: &[&str]) -> Settings {
    let line = ["run"].iter().chain(flags);
    Cli::try_parse_from(line)
        .unwrap()
        .args
        .settings()
        .unwrap()
        .0
}

/// What `--help` says of defaults, given as flags, changes nothing; it says nothing of a flag that
/// has none.
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
    assert_eq!(told.len(), 30, "{told:?}");
    for (flag, other) in [
        ("xdp", "off"),
        ("datapath-log", "warn"),
        ("snat-ports", "1-2"),
        ("max-flows", "7"),
        ("bpf-root", "/x"),
    ] {
        assert!(told.contains(&flag));
        assert_ne!(
            with_flags(&[&format!("--{flag}={other}")]),
            Settings::default()
        );
    }
}

#[test]
fn servers_listen_where_they_are_told_or_nowhere() {
    let address = |text: &str| {
        text.parse::<Listen<10256>>()
            .map(|listen| listen.0.map(|address| address.to_string()))
    };
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
    assert_eq!(
        with_flags(&["--healthz-bind-address="]).healthz_bind_address,
        None
    );
    assert_eq!(
        with_flags(&["--metrics-bind-address", "::1"]).metrics_bind_address,
        Some("[::1]:10249".parse().unwrap())
    );
}

const KUBEADM: &str = include_str!("../../tests/fixtures/config/kubeadm.yaml");
const EVERY_FIELD: &str = include_str!("../../tests/fixtures/config/every-field.yaml");
const THEIRS: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
const OURS: &str = "apiVersion: shunt.dev/v1alpha1\nkind: ShuntConfiguration\n";

/// What a file comes to, and its warnings.
fn parse(text: &str) -> Result<(Settings, Vec<String>), String> {
    let mut settings = Settings::default();
    let warnings =
        file::parse(text, &mut settings, "c.yaml", false).map_err(|error| format!("{error:#}"))?;
    Ok((settings, warnings))
}

fn warnings(text: &str) -> Vec<String> {
    parse(text).unwrap().1
}

#[test]
fn kubeadms_configuration_is_taken_as_it_is_and_without_a_word() {
    let expected = Settings {
        kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        netfilter: Some(Netfilter {
            // `udpTimeout: 0s` and no `tcpEstablishedTimeout`.
            udp: None,
            ..Netfilter::default()
        }),
        ..Settings::default()
    };
    assert_eq!(parse(KUBEADM), Ok((expected, Vec::new())));
}

#[test]
fn defaults_in_kube_proxys_own_words_are_no_news() {
    let text = format!(
        "{THEIRS}
mode: iptables
configSyncPeriod: 15m0s
conntrack: {{maxPerCore: 32768, min: 131072, tcpCloseWaitTimeout: 1h0m0s, tcpEstablishedTimeout: 24h0m0s}}
clientConnection: {{burst: 10, contentType: application/vnd.kubernetes.protobuf, qps: 5}}
iptables: {{localhostNodePorts: true, masqueradeBit: 14, minSyncPeriod: 1s, syncPeriod: 30s}}
ipvs: null
detectLocalMode: ClusterCIDR
healthzBindAddress: 0.0.0.0:10256
metricsBindAddress: 127.0.0.1:10249
logging: {{format: text, flushFrequency: 5s}}
featureGates: {{}}
oomScoreAdj: -999
"
    );
    let expected = Settings {
        netfilter: Some(Netfilter::default()),
        ..Settings::default()
    };
    assert_eq!(parse(&text), Ok((expected, Vec::new())));
}

#[test]
fn udp_streams_last_as_long_as_other_udp_at_least() {
    let udp = |conntrack: &str| {
        let conntrack = parse(&format!("{THEIRS}conntrack: {conntrack}\n"))
            .unwrap()
            .0
            .conntrack;
        (conntrack.udp.as_secs(), conntrack.udp_stream.as_secs())
    };
    assert_eq!(udp("{udpTimeout: 250s}"), (250, 250));
    assert_eq!(udp("{udpTimeout: 1m, udpStreamTimeout: 0s}"), (60, 120));
    assert_eq!(udp("{udpStreamTimeout: 5m}"), (30, 300));
}

/// kind's and k3d's nodes: what must not be touched in a container is zero.
#[test]
fn zeros_of_conntrack_leave_it_alone() {
    let text = format!(
        "{THEIRS}conntrack: {{maxPerCore: 0, tcpCloseWaitTimeout: 0s, tcpEstablishedTimeout: 0s}}\n"
    );
    let expected = Settings {
        netfilter: Some(Netfilter {
            tcp_established: None,
            tcp_close_wait: None,
            max_per_core: 0,
            ..Netfilter::default()
        }),
        ..Settings::default()
    };
    assert_eq!(parse(&text), Ok((expected.clone(), Vec::new())));
    let left_alone = Settings {
        netfilter: None,
        ..expected
    };
    assert_eq!(
        parse(&format!("{text}---\n{OURS}netfilterConntrack: false\n")),
        Ok((left_alone, Vec::new()))
    );
}

#[test]
fn every_field_arrives_and_ours_stands_over_theirs() {
    let (settings, warnings) = parse(EVERY_FIELD).unwrap();
    let networks = |texts: &[&str]| {
        texts
            .iter()
            .map(|text| text.parse().unwrap())
            .collect::<Vec<IpNet>>()
    };
    let expected = Settings {
        kubeconfig: Some("/etc/kube-proxy.conf".into()),
        manifests: Vec::new(),
        service_proxy_name: Some("shunt".into()),
        node_name: Some("node-a".into()),
        node_ips: vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()],
        bind_address: Some("192.0.2.1".parse().unwrap()),
        devices: vec!["eth*".into(), "bond0".into()],
        pod_devices: vec!["veth*".into()],
        cgroup_root: Some("/run/cgroup".into()),
        bpf_root: "/sys/fs/bpf/other".into(),
        xdp: XdpMode::Off,
        socket_lb: SocketLb::Off,
        socket_lb_labels: true,
        fast_path: true,
        count_traffic: true,
        datapath_log: DatapathLog::Info,
        service_cidrs: networks(&["10.96.0.0/12", "fd00:10:96::/112"]),
        answer_ping: false,
        load_balancer_cidrs: networks(&["198.51.100.0/24"]),
        service_node_port_range: PortRange(31_000..=31_999),
        cluster_cidrs: networks(&["10.244.0.0/16", "fd00:10:244::/56"]),
        nodeport_addresses: vec!["192.0.2.0/24".into(), "localhost".into()],
        localhost_node_ports: false,
        external_ips: false,
        masquerade_all: true,
        retry_silence: Duration::from_secs(7),
        snat_ports: PortRange(20_000..=20_999),
        conntrack: Conntrack {
            tcp_established: Duration::from_secs(7200),
            tcp_close_wait: Duration::from_secs(1800),
            udp: Duration::from_secs(10),
            udp_stream: Duration::from_secs(90),
        },
        capacities: Capacities {
            affinity: 1,
            backends: 2,
            flows: 3,
            frontends: 4,
            new_flows: 5,
            slots: 6,
            snat: 7,
            sockets: 8,
        },
        healthz_bind_address: None,
        metrics_bind_address: Some("[2001:db8::1]:9000".parse().unwrap()),
        metrics_services: 50,
        dns: Dns {
            addresses: vec![
                "192.0.2.7:53".parse().unwrap(),
                "[2001:db8::7]:5353".parse().unwrap(),
            ],
            zone: "example.internal".into(),
            upstreams: vec!["192.0.2.53:53".parse().unwrap()],
            namespace: Some(String::new()),
        },
        bind_address_hard_fail: true,
        netfilter: Some(Netfilter {
            tcp_established: Some(Duration::from_secs(7200)),
            tcp_close_wait: Some(Duration::from_secs(1800)),
            udp: Some(Duration::from_secs(10)),
            udp_stream: Some(Duration::from_secs(90)),
            max_per_core: 1000,
            min: 2000,
            be_liberal: true,
        }),
        logging: Logging {
            json: true,
            verbosity: 4,
        },
    };
    assert_eq!(settings, expected);
    let unused = "c.yaml: KubeProxyConfiguration: shunt has no use for detectLocal.interfaceNamePrefix: ignored";
    assert_eq!(warnings, [unused]);
}

/// kubeadm's lies in kube-proxy's ConfigMap, which goes when kube-proxy goes.
#[test]
fn in_a_pod_the_service_account_stands_in_for_a_kubeconfig_that_is_not_there() {
    let kubeconfig = |path: &str, in_pod| {
        let mut settings = Settings::default();
        let text = format!("{THEIRS}clientConnection: {{kubeconfig: {path}}}\n");
        let warnings = file::parse(&text, &mut settings, "c.yaml", in_pod).unwrap();
        (
            settings.kubeconfig.map(|path| path.display().to_string()),
            warnings.join("\n"),
        )
    };
    let said = "c.yaml: KubeProxyConfiguration: clientConnection.kubeconfig: there is no /nonexistent/k: using this pod's \
                service account";
    assert_eq!(kubeconfig("/nonexistent/k", true), (None, said.into()));
    assert_eq!(
        kubeconfig("/nonexistent/k", false),
        (Some("/nonexistent/k".into()), String::new())
    );
    assert_eq!(
        kubeconfig("/dev/null", true),
        (Some("/dev/null".into()), String::new())
    );
}

#[test]
fn half_a_file_is_no_reason_to_fall_over() {
    for (end, _) in EVERY_FIELD.char_indices() {
        if let Err(error) = parse(&EVERY_FIELD[..end]) {
            assert!(
                error.starts_with("c.yaml:") && error.lines().count() == 1,
                "{end}: {error}"
            );
        }
    }
}

#[test]
fn what_is_dumped_comes_to_the_same() {
    let manifests = format!(
        "{OURS}manifests: [/etc/shunt, 'a b']\nmetricsBindAddress: ''\nnodeIPs: [192.0.2.1]\n"
    );
    let primary =
        format!("{THEIRS}mode: nftables\nbindAddress: 2001:db8::1\nlogging: {{format: json}}\n");
    for text in [KUBEADM, EVERY_FIELD, &manifests, &primary] {
        let settings = parse(text).unwrap().0;
        let dumped = settings.dump().unwrap();
        assert_eq!(
            parse(&dumped),
            Ok((settings.clone(), Vec::new())),
            "{dumped}"
        );
        assert_eq!(parse(&dumped).unwrap().0.dump().unwrap(), dumped);
    }
}

#[test]
fn flags_stand_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.yaml");
    std::fs::write(&path, EVERY_FIELD).unwrap();
    let config = format!("--config={}", path.display());
    let (file, _) = parse(EVERY_FIELD).unwrap();
    assert_eq!(with_flags(&[&config]), file);
    for (word, mode) in [
        ("on", SocketLb::On),
        ("true", SocketLb::On),
        ("host", SocketLb::Host),
        ("'off'", SocketLb::Off),
        ("false", SocketLb::Off),
    ] {
        let (settings, _) = parse(&format!("{OURS}socketLB: {word}\n")).unwrap();
        assert_eq!(settings.socket_lb, mode, "{word}");
    }

    let flags = with_flags(&[
        &config,
        "--xdp=native",
        "--socket-lb=on",
        "--cluster-cidr=10.0.0.0/8",
        "--node-name=b",
        "--max-snat=9",
        "--healthz-bind-address=127.0.0.1",
        "--metrics-bind-address=",
    ]);
    let expected = Settings {
        xdp: XdpMode::Native,
        socket_lb: SocketLb::On,
        cluster_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
        node_name: Some("b".into()),
        capacities: Capacities {
            snat: 9,
            ..file.capacities
        },
        healthz_bind_address: Some("127.0.0.1:10256".parse().unwrap()),
        metrics_bind_address: None,
        ..file.clone()
    };
    assert_eq!(flags, expected);

    // A source takes the other's place.
    let manifests = with_flags(&[&config, "--manifests", "/m"]);
    let sources = |settings: &Settings| {
        (
            settings.manifests.len(),
            settings.kubeconfig.is_some(),
            settings.service_proxy_name.is_some(),
        )
    };
    assert_eq!(
        (sources(&file), sources(&manifests)),
        ((0, true, true), (1, false, false))
    );
    std::fs::write(&path, format!("{OURS}manifests: [/m]\n")).unwrap();
    assert_eq!(
        sources(&with_flags(&[&config, "--kubeconfig=/k"])),
        (0, true, false)
    );
}

#[test]
fn an_ipv6_node_has_ipv6_servers() {
    let (settings, _) = parse(&format!("{THEIRS}bindAddress: '::'\n")).unwrap();
    let addresses = [settings.healthz_bind_address, settings.metrics_bind_address];
    assert_eq!(
        addresses.map(|address| address.unwrap().to_string()),
        ["[::]:10256", "[::1]:10249"]
    );
    assert_eq!(settings.bind_address, None);
}

#[test]
fn pods_are_told_by_their_devices_or_networks() {
    let with = |fields: &str| {
        let (settings, warnings) =
            parse(&format!("{THEIRS}clusterCIDR: 10.244.0.0/16\n{fields}")).unwrap();
        (
            settings.cluster_cidrs.len(),
            settings.pod_devices,
            warnings.join("\n"),
        )
    };
    let unused = |fields: &str| {
        format!("c.yaml: KubeProxyConfiguration: shunt has no use for {fields}: ignored")
    };
    assert_eq!(with(""), (1, vec![], String::new()));
    assert_eq!(
        with("detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: cali}"),
        (0, vec!["cali*".into()], unused("clusterCIDR"))
    );
    assert_eq!(
        with("detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cbr0}"),
        (0, vec![], unused("clusterCIDR")),
        "a bridge's ports are found"
    );
    assert_eq!(
        with("detectLocalMode: NodeCIDR"),
        (0, vec![], unused("clusterCIDR"))
    );
    assert_eq!(
        with("detectLocal: {interfaceNamePrefix: cali}"),
        (1, vec![], unused("detectLocal.interfaceNamePrefix"))
    );
}

/// F13: `mode` says where node ports answer if nothing else does.
#[test]
fn node_ports_answer_where_the_mode_has_them() {
    let with = |fields: &str| {
        let (settings, warnings) = parse(&format!("{THEIRS}{fields}\n")).unwrap();
        (settings.nodeport_addresses.join(" "), warnings.len())
    };
    for (fields, expected, warnings) in [
        ("mode: ''", "", 0),
        ("mode: iptables", "", 0),
        ("mode: ipvs", "", 0),
        ("mode: nftables", "primary", 0),
        ("mode: nftables\nnodePortAddresses: []", "primary", 0),
        ("mode: nftables\nnodePortAddresses: [all]", "all", 0),
        (
            "mode: iptables\nnodePortAddresses: ['primary', localhost]",
            "primary localhost",
            0,
        ),
        (
            "nodePortAddresses: ['primary,localhost']",
            "primary localhost",
            0,
        ),
        (
            "nodePortAddresses: ['primary, 10.0.0.0/8', primary]",
            "primary 10.0.0.0/8 primary",
            1,
        ),
        ("mode: userspace", "", 1),
        (
            "nodePortAddresses: [010.000.0.0/08, all, all]",
            "10.0.0.0/8 all all",
            2,
        ),
    ] {
        assert_eq!(with(fields), (expected.to_owned(), warnings), "{fields}");
    }
    let flags = |flags: &[&str]| with_flags(flags).nodeport_addresses.join(" ");
    assert_eq!(flags(&["--proxy-mode=nftables"]), "primary");
    assert_eq!(flags(&["--proxy-mode=ipvs"]), "");
    assert_eq!(
        flags(&[
            "--proxy-mode=nftables",
            "--nodeport-addresses=primary,localhost"
        ]),
        "primary localhost"
    );
}

/// What kube-proxy accepts starts, and what it refuses is told; each in one warning that says what
/// became of it.
#[test]
fn an_odd_value_is_one_warning_that_says_what_became_of_it() {
    let unused = |value: &str, wanted: &str| {
        format!("`{value}`: kube-proxy refuses that: {wanted}; shunt has no use for it")
    };
    let taken = |value: &str, wanted: &str| {
        format!("`{value}`: kube-proxy refuses that: {wanted}; taken as it reads")
    };
    let positive = "wants a duration that is not negative, such as 30s";
    let cases: Vec<(&str, &str, String)> = vec![
        ("bindAddress: 010.0.0.01", "bindAddress", "`010.0.0.01`: leading zeros, read as decimal numbers: 10.0.0.1".into()),
        ("metricsBindAddress: 127.000.0.1:9000", "metricsBindAddress", "`127.000.0.1:9000`: leading zeros, read as decimal numbers: 127.0.0.1:9000".into()),
        ("clusterCIDR: 10.044.0.0/016", "clusterCIDR", "`10.044.0.0/016`: leading zeros, read as decimal numbers: 10.44.0.0/16".into()),
        ("nodePortAddresses: [all, 010.0.0.0/8]", "nodePortAddresses[1]", "`010.0.0.0/8`: leading zeros, read as decimal numbers: 10.0.0.0/8".into()),
        ("nodePortAddresses: [all, all]", "nodePortAddresses[1]", "`all`: kube-proxy refuses a word twice; it means no more than once".into()),
        ("healthzBindAddress: 0.0.0.0:0", "healthzBindAddress", "`0.0.0.0:0`: kube-proxy refuses port 0; listening on a port that the kernel chooses".into()),
        ("healthzBindAddress: '[::]:0'", "healthzBindAddress", "`[::]:0`: kube-proxy refuses port 0; listening on a port that the kernel chooses".into()),
        ("clusterCIDR: 10.0.0.0/16,10.1.0.0/16", "clusterCIDR", "kube-proxy refuses two of a family; all of them are taken".into()),
        ("clusterCIDR: '10.0.0.0/16, fd00::/48'", "clusterCIDR", "`10.0.0.0/16, fd00::/48`: kube-proxy refuses white space between networks; read without it".into()),
        ("detectLocalMode: InterfaceNamePrefix", "detectLocalMode", "`InterfaceNamePrefix`: kube-proxy refuses that without detectLocal.interfaceNamePrefix; pods are found by their devices".into()),
        ("detectLocalMode: BridgeInterface", "detectLocalMode", "`BridgeInterface`: kube-proxy refuses that without detectLocal.bridgeInterface; pods are found by their devices".into()),
        ("bindAddressHardFail: 'true'", "bindAddressHardFail", taken("true", "wants true or false")),
        ("iptables: {localhostNodePorts: 'false'}", "iptables.localhostNodePorts", taken("false", "wants true or false")),
        ("mode: userspace", "mode", taken("userspace", "wants iptables, ipvs, nftables")),
        ("logging: {format: xml}", "logging.format", taken("xml", "wants text, json")),
        ("oomScoreAdj: -1001", "oomScoreAdj", unused("-1001", "wants a number from -1000 to 1000")),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit", unused("32", "wants a number from 0 to 31")),
        ("nftables: {masqueradeBit: '1'}", "nftables.masqueradeBit", unused("1", "wants a number from 0 to 31")),
        ("conntrack: {maxPerCore: -1}", "conntrack.maxPerCore", taken("-1", "wants a number from 0 on")),
        ("conntrack: {min: -1}", "conntrack.min", taken("-1", "wants a number from 0 on")),
        ("clientConnection: {burst: -5}", "clientConnection.burst", unused("-5", "wants a number from 0 on")),
        ("configSyncPeriod: -1s", "configSyncPeriod", unused("-1s", positive)),
        ("iptables: {syncPeriod: 30}", "iptables.syncPeriod", unused("30", positive)),
        ("ipvs: {tcpTimeout: -1s}", "ipvs.tcpTimeout", unused("-1s", positive)),
        ("ipvs: {excludeCIDRs: [10.0.0.0/8, x]}", "ipvs.excludeCIDRs", unused_list()),
        ("showHiddenMetricsForVersion: latest", "showHiddenMetricsForVersion", unused("latest", "wants MAJOR.MINOR")),
        ("iptables: {minSyncPeriod: 1m}", "iptables.minSyncPeriod", "`60s`: kube-proxy refuses that: longer than syncPeriod; shunt has no use for it".into()),
        ("iptables: {masqueradeAll: true}", "", String::new()),
        ("mode: nftables\nnftables: {masqueradeAll: true}", "", String::new()),
        // The field of a mode that is not used.
        ("nftables: {masqueradeAll: true}", "", String::new()),
        ("mode: nftables\niptables: {masqueradeAll: true}", "", String::new()),
        ("hostnameOverride: a\nhostnameOverride: b", "hostnameOverride", "stands there twice, the last one holds".into()),
        ("healthzBindAddress: '::1'", "", String::new()),
        ("bindAddress: '::ffff:192.0.2.1'", "", String::new()),
        ("nodePortAddresses: [primary, localhost, all, 10.0.0.0/8, fd00::/8]", "", String::new()),
        ("featureGates: {AllowServiceExternalIPs: false}", "", String::new()),
        ("logging: {format: json, verbosity: 4, flushFrequency: 5s}", "", String::new()),
        ("conntrack: {tcpEstablishedTimeout: 1s, udpTimeout: 10000h, udpStreamTimeout: 1s}", "", String::new()),
    ];
    for (fields, field, said) in cases {
        let (_, warnings) = parse(&format!("{THEIRS}{fields}\n"))
            .unwrap_or_else(|error| panic!("{fields}: {error}"));
        if said.is_empty() {
            assert_eq!(warnings, Vec::<String>::new(), "{fields}");
            continue;
        }
        let [warning] = &warnings[..] else {
            panic!("{fields}: {warnings:#?}")
        };
        let line = fields.lines().count() + 2;
        let kind = if said.starts_with("stands") {
            ""
        } else {
            " KubeProxyConfiguration:"
        };
        assert_eq!(
            *warning,
            format!("c.yaml:{line}:{kind} {field}: {said}"),
            "{fields}"
        );
    }
}

fn unused_list() -> String {
    r#"`["10.0.0.0/8","x"]`: kube-proxy refuses that: `x` is no network; shunt has no use for it"#
        .to_owned()
}

#[test]
fn time_outs_are_brought_to_what_can_be() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.yaml");
    std::fs::write(
        &path,
        format!("{THEIRS}conntrack: {{udpTimeout: 1ms, tcpCloseWaitTimeout: 9000h}}\n"),
    )
    .unwrap();
    let settings = |flags: &[&str]| {
        let config = format!("--config={}", path.display());
        let line = ["run", &config].into_iter().chain(flags.iter().copied());
        Cli::try_parse_from(line).unwrap().args.settings().unwrap()
    };
    let (found, warnings) = settings(&[]);
    assert_eq!(
        (found.conntrack.udp.as_secs(), warnings.len()),
        (5, 2),
        "{warnings:?}"
    );
    assert_eq!(found.conntrack.tcp_close_wait.as_secs(), 8784 * 3600);
    // Zero leaves alone what is there.
    let (found, warnings) = settings(&[
        "--conntrack-udp-timeout=0",
        "--conntrack-tcp-timeout-close-wait=2h",
    ]);
    assert_eq!(
        (found.conntrack.udp.as_secs(), warnings.len()),
        (5, 1),
        "{warnings:?}"
    );
    assert_eq!(found.conntrack.tcp_close_wait.as_secs(), 7200);
    assert!(Cli::try_parse_from(["run", "--conntrack-udp-timeout=-1s"]).is_err());
}

/// 18.13: kube-proxy's command line, as people have it.
#[test]
fn kube_proxys_flags_start_shunt() {
    let line = |text: &str| {
        let args = text.split(' ').map(std::ffi::OsString::from);
        let line = kube_proxy_flags::translate(args);
        let args: Vec<String> = line
            .args
            .into_iter()
            .map(|arg| arg.into_string().unwrap())
            .collect();
        (args.join(" "), line.unused)
    };
    for (given, expected, unused) in [
        ("shunt", "shunt", 0),
        ("shunt status -o json", "shunt status -o json", 0),
        ("shunt --help", "shunt --help", 0),
        (
            "/usr/bin/shunt --version=true",
            "/usr/bin/shunt --version",
            0,
        ),
        ("kube-proxy", "kube-proxy run", 0),
        (
            "/usr/local/bin/kube-proxy --v=2",
            "/usr/local/bin/kube-proxy run --v=2",
            0,
        ),
        (
            "shunt --config=/c --hostname-override=a",
            "shunt run --config=/c --hostname-override=a",
            0,
        ),
        (
            "shunt run --hostname_override a",
            "shunt run --hostname-override a",
            0,
        ),
        ("shunt -v 4", "shunt run -v 4", 0),
        (
            "shunt --cluster-cidr= --kubeconfig=/k",
            "shunt run --kubeconfig=/k",
            0,
        ),
        (
            "shunt --oom-score-adj -998 --masquerade-all",
            "shunt run --masquerade-all",
            1,
        ),
        (
            "shunt --profiling --logtostderr=true --ipvs-scheduler rr --xdp off",
            "shunt run --xdp off",
            3,
        ),
        (
            "shunt --healthz-bind-address=",
            "shunt run --healthz-bind-address=",
            0,
        ),
    ] {
        let (found, names) = line(given);
        assert_eq!(
            (found.as_str(), names.len()),
            (expected, unused),
            "{given}: {names:?}"
        );
    }
}

/// Every flag of kube-proxy 1.37 on Linux, with a value that it accepts: none keeps shunt from
/// starting, and each either means something or is named.
#[test]
fn every_flag_of_kube_proxys_means_something_or_is_named() {
    let silent = [
        "--bind-address=192.0.2.1",
        "--bind-address-hard-fail",
        "--cleanup=false",
        "--cluster-cidr=10.0.0.0/8,fd00::/48",
        "--conntrack-max-per-core=0",
        "--conntrack-min=1000",
        "--conntrack-tcp-be-liberal",
        "--conntrack-tcp-timeout-close-wait=1h0m0s",
        "--conntrack-tcp-timeout-established=0s",
        "--conntrack-udp-timeout=30s",
        "--conntrack-udp-timeout-stream=0",
        "--detect-local-mode=ClusterCIDR",
        "--feature-gates=AllowServiceExternalIPs=false",
        "--healthz-bind-address=0.0.0.0:10256",
        "--healthz-port=0",
        "--hostname-override=node-a",
        "--init-only=false",
        "--iptables-localhost-nodeports=false",
        "--kubeconfig=/k",
        "--logging-format=json",
        "--masquerade-all=false",
        "--metrics-bind-address=[::1]:10249",
        "--metrics-port=0",
        "--nodeport-addresses=primary,localhost",
        "--proxy-mode=nftables",
        "--v=2",
        "--write-config-to=/w",
    ];
    let named = [
        "--boot-id-file=/b",
        "--config-sync-period=15m0s",
        "--iptables-masquerade-bit=14",
        "--iptables-min-sync-period=1s",
        "--iptables-sync-period=30s",
        "--ipvs-exclude-cidrs=10.0.0.0/8",
        "--ipvs-min-sync-period=0s",
        "--ipvs-scheduler=rr",
        "--ipvs-strict-arp",
        "--ipvs-sync-period=30s",
        "--ipvs-tcp-timeout=0s",
        "--ipvs-tcpfin-timeout=0s",
        "--ipvs-udp-timeout=0s",
        "--kube-api-burst=10",
        "--kube-api-content-type=application/json",
        "--kube-api-qps=5",
        "--log-flush-frequency=5s",
        "--log-json-info-buffer-size=0",
        "--log-json-split-stream",
        "--log-text-info-buffer-size=0",
        "--log-text-split-stream",
        "--machine-id-file=/m",
        "--master=https://192.0.2.1:6443",
        "--oom-score-adj=-999",
        "--pod-bridge-interface=cbr0",
        "--pod-interface-name-prefix=cali",
        "--profiling",
        "--show-hidden-metrics-for-version=1.36",
        "--vmodule=a=1",
    ];
    let settings = |flags: &[&str]| {
        let args = ["kube-proxy"]
            .iter()
            .chain(flags)
            .map(std::ffi::OsString::from);
        let line = kube_proxy_flags::translate(args);
        let mut args = Cli::try_parse_from(&line.args[1..])
            .unwrap_or_else(|error| panic!("{flags:?}: {error}"))
            .args;
        args.kube_proxy.unused = line.unused;
        args.kube_proxy.is_its_line = line.is_kube_proxys;
        args.settings().unwrap()
    };
    for flag in silent {
        assert_eq!(settings(&[flag]).1, Vec::<String>::new(), "{flag}");
    }
    for flag in named {
        let name = flag.split('=').next().unwrap();
        assert_eq!(
            settings(&[flag]).1,
            [format!("shunt has no use for {name}: ignored")],
            "{flag}"
        );
    }
    // All at once, and once more: the last one holds.
    let all: Vec<_> = silent
        .iter()
        .chain(&named)
        .chain(&["--hostname-override=node-b"])
        .copied()
        .collect();
    let (found, warnings) = settings(&all);
    assert_eq!(warnings.len(), 1);
    let expected = Settings {
        kubeconfig: Some("/k".into()),
        node_name: Some("node-b".into()),
        bind_address: Some("192.0.2.1".parse().unwrap()),
        bind_address_hard_fail: true,
        cluster_cidrs: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/48".parse().unwrap()],
        nodeport_addresses: vec!["primary".into(), "localhost".into()],
        localhost_node_ports: false,
        external_ips: false,
        healthz_bind_address: None,
        metrics_bind_address: None,
        netfilter: Some(Netfilter {
            tcp_established: None,
            tcp_close_wait: Some(Duration::from_secs(3600)),
            udp: Some(Duration::from_secs(30)),
            udp_stream: None,
            max_per_core: 0,
            min: 1000,
            be_liberal: true,
        }),
        logging: Logging {
            json: true,
            verbosity: 2,
        },
        ..Settings::default()
    };
    assert_eq!(found, expected);
    let (masquerades, warnings) = settings(&["--masquerade-all"]);
    assert_eq!((masquerades.masquerade_all, warnings), (true, Vec::new()));
    let (prefix, warnings) = settings(&[
        "--detect-local-mode=InterfaceNamePrefix",
        "--pod-interface-name-prefix=cali",
    ]);
    assert_eq!(
        (prefix.pod_devices, warnings),
        (vec!["cali*".to_owned()], Vec::new())
    );
}

#[test]
fn what_has_no_use_is_one_warning_and_what_nobody_knows_one_each() {
    let text = format!(
        "{THEIRS}mode: ipvs
clusterCidr: 10.0.0.0/8
ipvs:
  strictARP: true
  strictArp: true
conntrack: {{maxPerCore: 1000, bar: [x]}}
featureGates: {{A: true, B: false}}
logging: {{verbosity: 4, options: {{text: {{splitStream: true}}}}}}
showHiddenMetricsForVersion: '1.30'
---
{OURS}socketLb: on
capacities: {{maxFlows: 7}}
"
    );
    assert_eq!(
        warnings(&text),
        [
            "c.yaml:4: KubeProxyConfiguration: clusterCidr: no such field, ignored",
            "c.yaml:7: KubeProxyConfiguration: ipvs.strictArp: no such field, ignored",
            "c.yaml:8: KubeProxyConfiguration: conntrack.bar: no such field, ignored",
            "c.yaml:15: ShuntConfiguration: socketLb: no such field, ignored",
            "c.yaml:16: ShuntConfiguration: capacities.maxFlows: no such field, ignored",
            "c.yaml: KubeProxyConfiguration: shunt has no use for ipvs.strictARP, \
             logging.options.text.splitStream, showHiddenMetricsForVersion, featureGates.A, featureGates.B: ignored",
        ]
    );
}

#[test]
fn mistakes_are_one_line_with_file_line_and_field() {
    let network = "give a network, such as 10.244.0.0/16 or fd00:10:244::/56";
    for (head, rest, expected) in [
        (THEIRS, "clusterCIDR: 10.244.0.0", format!("3: KubeProxyConfiguration: clusterCIDR: `10.244.0.0`: {network}")),
        (
            THEIRS,
            "mode: ''\nnodePortAddresses:\n- 10.0.0.0/8\n- none",
            "6: KubeProxyConfiguration: nodePortAddresses[1]: `none`: give networks, such as 10.0.0.0/8 or fd00::/8, or \
             `primary`, `localhost` or `all`"
                .into(),
        ),
        (
            THEIRS,
            "bindAddress: node-a",
            "3: KubeProxyConfiguration: bindAddress: `node-a`: give an IP address, such as 192.0.2.1 or 2001:db8::1".into(),
        ),
        (
            THEIRS,
            "healthzBindAddress: '*:80'",
            "3: KubeProxyConfiguration: healthzBindAddress: `*:80`: give IP:PORT ([IP]:PORT for IPv6) or an IP".into(),
        ),
        (THEIRS, "iptables: {localhostNodePorts: perhaps}", "3: KubeProxyConfiguration: iptables.localhostNodePorts: wants true or false".into()),
        (
            THEIRS,
            "clientConnection:\n  kubeconfig: {}",
            "4: KubeProxyConfiguration: clientConnection.kubeconfig: wants a string".into(),
        ),
        (
            THEIRS,
            "detectLocalMode: Guess",
            "3: KubeProxyConfiguration: detectLocalMode: `Guess`: give ClusterCIDR, NodeCIDR, BridgeInterface or \
             InterfaceNamePrefix"
                .into(),
        ),
        (OURS, "serviceCIDRs: [10.0.0.0/8,\n 10/9]", format!("4: ShuntConfiguration: serviceCIDRs[1]: `10/9`: {network}")),
        (OURS, "socketLB: hosts", "3: ShuntConfiguration: socketLB: `hosts`: give on, host or off".into()),
        (OURS, "snatPorts: 9", "3: ShuntConfiguration: snatPorts: `9`: give FIRST-LAST, both from 1 to 65535, FIRST not above LAST".into()),
        (
            THEIRS,
            "conntrack:\n  udpTimeout: -5s",
            "4: KubeProxyConfiguration: conntrack.udpTimeout: `-5s`: give a duration, as in 24h, 1h30m or 90s, or 0s to leave it alone".into(),
        ),
        (
            THEIRS,
            "conntrack: {tcpEstablishedTimeout: 1 day}",
            "3: KubeProxyConfiguration: conntrack.tcpEstablishedTimeout: `1 day`: give a duration, as in 24h, 1h30m or 90s, or 0s to leave it alone".into(),
        ),
        (
            OURS,
            "capacities:\n  flows: -5",
            "4: ShuntConfiguration: capacities.flows: wants a whole number from 0 on".into(),
        ),
        (OURS, "retrySilenceSeconds: 61", "3: ShuntConfiguration: retrySilenceSeconds: wants seconds from 0 to 60".into()),
        (OURS, "capacities:\n  snat: 0", "4: ShuntConfiguration: capacities.snat: wants a whole number from 1 on".into()),
        (
            OURS,
            "xdp: maybe",
            "3: ShuntConfiguration: xdp: unknown variant `maybe`, expected one of off, generic, native, auto".into(),
        ),
        (
            OURS,
            "dns: {zone: -x-}",
            "3: ShuntConfiguration: dns.zone: `-x-`: give a DNS name of at most 57 characters, such as cluster.local".into(),
        ),
        (
            OURS,
            "dns:\n  addresses: [eth0]",
            "4: ShuntConfiguration: dns.addresses[0]: `eth0`: give IP:PORT ([IP]:PORT for IPv6) or an IP".into(),
        ),
        (OURS, "devices: eth0", "3: ShuntConfiguration: devices: wants a list".into()),
        (OURS, &format!("---\n{OURS}"), "5: a second ShuntConfiguration: give one".into()),
        (
            "kind: ConfigMap\n",
            "apiVersion: v1",
            "1: `ConfigMap` of `v1` is no configuration: give KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1, \
             ShuntConfiguration of shunt.dev/v1alpha1, or both"
                .into(),
        ),
        ("", "a: [b", "1: no valid YAML: unclosed bracket '['".into()),
        ("", "- a", "1: wants a mapping".into()),
    ] {
        assert_eq!(parse(&format!("{head}{rest}\n")), Err(format!("c.yaml:{expected}")));
    }
    let nothing =
        "c.yaml: says nothing, which kube-proxy refuses: defaults and flags hold".to_owned();
    assert_eq!(
        parse("# nothing yet\n"),
        Ok((Settings::default(), vec![nothing]))
    );
}
