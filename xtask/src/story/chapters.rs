//! The chapters, in the order of the books.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use shunt_lab::{Many, Proto, Sockets};

use super::{
    cast::{Cast, NGINX, OUTSIDE, PATIENCE, SHELL},
    telling::Story,
};

/// The pods of `kubia.yaml`; the fourth one, of `story.yaml`, is not ready until somebody makes a
/// file.
const KUBIA: [&str; 3] = ["kubia-5rvfq", "kubia-8cgnm", "kubia-8kv8d"];
/// The pod whose readiness is a file.
const LATE: &str = "kubia-2xk54";
/// Cluster IPs in `kubia.yaml`: with affinity, and without.
const KUBIA_IP: &str = "10.111.88.195";
const KUBIA_NODEPORT_IP: &str = "10.103.7.50";
/// An answer within a second, or none.
const CURL: &str = "curl -s -m 2";

pub(super) fn play(story: &mut Story) {
    environment(story);
    ping(story);
    balance(story);
    endpoints_by_hand(story);
    external_name(story);
    node_port(story);
    load_balancer(story);
    ingress(story);
    readiness(story);
    headless(story);
}

/// The one who answered, by the first word of what it said.
fn answered_by<'t>(text: &'t str, pods: &[&str]) -> Result<&'t str> {
    let name = text.split_whitespace().next().context("nobody answered")?;
    ensure!(
        pods.contains(&name),
        "{name} answered, not one of {}",
        pods.join(", ")
    );
    Ok(name)
}

fn environment(story: &mut Story) {
    story.chapter(
        "Discovery by environment",
        "A kubelet tells each container of the Services of its namespace. `shunt env` prints just that.",
    );
    story.step("what a container of kubia-8cgnm is told", |cast| {
        let line = format!(
            "shunt env -n default --pod kubia-8cgnm --manifests {}",
            cast.manifests().display()
        );
        let text = cast.sh("node-a", &format!("{line} | grep ^KUBIA_[SP]"))?;
        for variable in [
            "KUBIA_SERVICE_HOST=10.111.88.195",
            "KUBIA_SERVICE_PORT=80",
            "KUBIA_PORT_443_TCP_PROTO=tcp",
        ] {
            ensure!(
                text.lines().any(|line| line == variable),
                "{variable} is missing"
            );
        }
        Ok(format!("{} variables of kubia", text.lines().count()))
    });
    story.step("a client that knows nothing else dials it", |cast| {
        let line = format!(
            "eval \"$(shunt env -o export --manifests {})\"; {CURL} http://$KUBIA_SERVICE_HOST:$KUBIA_SERVICE_PORT/",
            cast.manifests().display()
        );
        let text = cast.sh(SHELL, &line)?;
        Ok(format!("{} answered", answered_by(&text, &KUBIA)?))
    });
}

fn ping(story: &mut Story) {
    story.chapter(
        "Ping",
        "With kube-proxy nobody answers pings of a cluster IP: the address is on no device. Here the node's programs do.",
    );
    story.step("ping kubia", |cast| {
        cast.sh(
            SHELL,
            &format!("ping -c 1 -W 2 {KUBIA_IP} | grep 'bytes from'"),
        )?;
        Ok("answered in the kernel".to_owned())
    });
}

fn balance(story: &mut Story) {
    story.chapter(
        "One address, several pods",
        "Two Services over the same pods: kubia-nodeport spreads connections, kubia has sessionAffinity: ClientIP.",
    );
    story.step("twenty connections to kubia-nodeport", |cast| {
        let line = format!("{CURL} http://{KUBIA_NODEPORT_IP}/");
        let answers = cast.sh_times(SHELL, &line, 20)?;
        ensure!(answers.len() > 1, "only one pod answered");
        cast.cli("node-a", &["backends", "kubia-nodeport"], "kubia")?;
        Ok(format!("{} pods answered", answers.len()))
    });
    story.step(
        "ten connections to kubia, which keeps a client at its pod",
        |cast| {
            let answers = cast.sh_times(SHELL, &format!("{CURL} http://{KUBIA_IP}/"), 10)?;
            ensure!(answers.len() == 1, "{} pods answered", answers.len());
            Ok(format!(
                "{} answered all",
                answers.keys().next().map_or("", String::as_str)
            ))
        },
    );
}

fn endpoints_by_hand(story: &mut Story) {
    story.chapter(
        "Endpoints by hand",
        "external-service has no selector: somebody has written its endpoints down. They are hosts outside of the cluster.",
    );
    story.step("both hosts answer", |cast| {
        let answers = cast.sh_times(SHELL, &format!("{CURL} http://10.97.153.150/"), 16)?;
        let hosts = [
            "external-service-192-0-2-42",
            "external-service-198-51-100-22",
        ];
        ensure!(
            hosts.iter().all(|host| answers.contains_key(*host)),
            "only {answers:?}"
        );
        cast.cli("node-a", &["backends", "external-service"], "")?;
        Ok("192.0.2.42 and 198.51.100.22 answered".to_owned())
    });
}

fn external_name(story: &mut Story) {
    story.chapter(
        "ExternalName",
        "prod/database is a name for db.example.com. It has no address, so no packet is ever its own.",
    );
    story.step(
        "there is nothing to dial, and nothing in the environment",
        |cast| {
            let text = cast.cli("node-a", &["services", "-n", "prod"], "")?;
            ensure!(text.lines().count() == 1, "it has a frontend");
            let line = format!(
                "shunt env -n prod --manifests {}",
                cast.manifests().display()
            );
            let text = cast.sh("node-a", &line)?;
            ensure!(!text.contains("DATABASE"), "it has variables");
            Ok("no frontend, no variables".to_owned())
        },
    );
}

fn node_port(story: &mut Story) {
    story.chapter(
        "Node port",
        "kubia-nodeport answers on port 30123 of every node, wherever its pods are.",
    );
    for (place, address, what) in [
        (OUTSIDE, "192.168.50.11", "from outside, on node-a"),
        (OUTSIDE, "192.168.50.12", "from outside, on node-b"),
        (SHELL, "192.168.50.12", "from a pod, on the other node"),
        (
            "node-a",
            "127.0.0.1",
            "on the node itself, by its loopback address",
        ),
    ] {
        story.step(what, |cast| {
            let text = cast.sh(place, &format!("{CURL} http://{address}:30123/"))?;
            Ok(format!("{} answered", answered_by(&text, &KUBIA)?))
        });
    }
    story.step("what the node has of it", |cast| {
        let text = cast.cli("node-a", &["services", "-n", "default"], "kubia-nodeport")?;
        ensure!(text.contains("30123"), "no such port");
        Ok("one entry for all its addresses".to_owned())
    });
}

fn load_balancer(story: &mut Story) {
    story.chapter(
        "Load balancer",
        "kubia-loadbalancer has no address yet (<pending>); its node port serves all the same. Then the cloud gives it one.",
    );
    story.step("pending: the node port answers", |cast| {
        let text = cast.sh(OUTSIDE, &format!("{CURL} http://192.168.50.11:30994/"))?;
        Ok(format!("{} answered", answered_by(&text, &KUBIA)?))
    });
    story.step("an address appears in its status", |cast| {
        let ports = "  ports: [{ port: 80, targetPort: 8080, nodePort: 30994 }]\n";
        let status = "status: { loadBalancer: { ingress: [{ ip: 198.51.100.100 }] } }\n";
        cast.edit("kubia.yaml", ports, &format!("{ports}{status}"))?;
        let outside = cast.lab.client(OUTSIDE, Sockets::Unhooked)?;
        let to = "198.51.100.100:80".parse()?;
        let took = cast.until("the address answers", || Ok(outside.tcp(to).is_ok()))?;
        let text = cast.sh(OUTSIDE, &format!("{CURL} http://198.51.100.100/"))?;
        let name = answered_by(&text, &KUBIA)?;
        cast.cli("node-a", &["services", "-n", "default"], "198.51.100.100")?;
        Ok(format!(
            "{name} answered {} ms after the edit",
            took.as_millis()
        ))
    });
}

fn ingress(story: &mut Story) {
    story.chapter(
        "Ingress",
        "nginx in a pod, behind node port and load balancer of ingress-nginx, which has externalTrafficPolicy: Local. What it does
         with hosts and paths a small piece of this demo writes from the Ingress and its Secret; a cluster has a controller for that.",
    );
    story.step(
        "a certificate for kubia.example.com goes into the Secret, and nginx starts",
        |cast| {
            let made = rcgen::generate_simple_self_signed(vec!["kubia.example.com".to_owned()])?;
            let base64 = |text: String| BASE64_STANDARD.encode(text);
            let (certificate, key) = (
                base64(made.cert.pem()),
                base64(made.signing_key.serialize_pem()),
            );
            fs::write(cast.nginx_folder().join("ca.crt"), made.cert.pem())?;
            let empty = "data: { tls.crt: \"\", tls.key: \"\" }";
            cast.edit(
                "story.yaml",
                empty,
                &format!("data: {{ tls.crt: \"{certificate}\", tls.key: \"{key}\" }}"),
            )?;
            let rendered = cast.configure_nginx()?;
            ensure!(
                rendered.refused.is_empty(),
                "{}",
                rendered.refused.join("; ")
            );
            for line in rendered
                .config
                .lines()
                .filter(|line| line.contains("server_name") || line.contains("proxy_pass"))
            {
                println!("      {}", line.trim());
            }
            let took = cast.until("nginx is a backend", || {
                Ok(cast.kubelet.is_ready(NGINX) == Some(true)
                    && cast
                        .backends("node-a", "ingress-nginx")?
                        .contains(&NGINX.to_owned()))
            })?;
            Ok(format!(
                "its probe opened port 80, and it was a backend, after {} ms",
                took.as_millis()
            ))
        },
    );
    for (url, pods) in [
        ("http://kubia.example.com/", &KUBIA[..]),
        ("http://kubia.example.com/kubia", &KUBIA),
        ("http://kubia.example.com/foo", &["bar-1"]),
        ("http://kubia.example.com/foobar", &KUBIA),
        ("http://bar.example.com/", &["bar-1"]),
        ("https://kubia.example.com/foo", &["bar-1"]),
    ] {
        story.step(&format!("{url} by the load balancer"), |cast| {
            let text = cast.sh(OUTSIDE, &request(cast, url, "198.51.100.80", [80, 443]))?;
            Ok(format!("{} answered", answered_by(&text, pods)?))
        });
    }
    story.step("a host that no Ingress names", |cast| {
        let line =
            format!("{CURL} -o /dev/null -w '%{{http_code}}' -H 'Host: nobody.example.com' http://198.51.100.80/");
        let text = cast.sh(OUTSIDE, &line)?;
        ensure!(text.trim() == "404", "{text}");
        Ok("404".to_owned())
    });
    story.step("https by the node port of nginx's node", |cast| {
        let text = cast.sh(
            OUTSIDE,
            &request(
                cast,
                "https://kubia.example.com:30443/",
                "192.168.50.11",
                [30080, 30443],
            ),
        )?;
        Ok(format!("{} answered", answered_by(&text, &KUBIA)?))
    });
    story.step(
        "the other node has no pod of it: policy Local drops, and its health check says so",
        |cast| {
            let refused = cast
                .sh(OUTSIDE, "curl -s -m 1 http://192.168.50.12:30080/")
                .is_err();
            ensure!(refused, "node-b answered");
            let code = "curl -s -m 2 -o /dev/null -w '%{http_code}\\n'";
            let line =
                format!("{code} http://192.168.50.11:32765/; {code} http://192.168.50.12:32765/");
            let text = cast.sh(OUTSIDE, &line)?;
            ensure!(text.split_whitespace().eq(["200", "503"]), "{text}");
            Ok("node-a 200, node-b 503".to_owned())
        },
    );
    story.step("nginx's access log has the client's own address", |cast| {
        let log = cast.access_log();
        let answered: Vec<&String> = log.iter().filter(|line| line.contains(" 200 ")).collect();
        answered
            .iter()
            .rev()
            .take(3)
            .for_each(|line| println!("      {line}"));
        ensure!(answered.len() >= 7, "only {} lines", answered.len());
        let own = cast.lab.ips(OUTSIDE)?[0].to_string();
        let foreign = answered
            .iter()
            .find(|line| !line.starts_with(&format!("{own} ")));
        ensure!(foreign.is_none(), "{}", foreign.map_or("", |line| line));
        Ok(format!("{own} in all {} lines", answered.len()))
    });
    story.step(
        "an Ingress that names an unknown Service, and a Secret without key, cost only themselves",
        |cast| {
            let path = "- { path: /foo, pathType: Prefix, backend: { service: { name: bar, ";
            cast.edit("story.yaml", path, &path.replace("name: bar", "name: baz"))?;
            cast.edit("story.yaml", "tls.key: \"", "no.key: \"")?;
            let rendered = cast.configure_nginx()?;
            rendered
                .refused
                .iter()
                .for_each(|line| println!("      {line}"));
            for words in [
                "there is no Service default/baz",
                "Secret default/kubia-tls: data[tls.key] is missing",
            ] {
                ensure!(
                    rendered.refused.iter().any(|line| line.contains(words)),
                    "nothing about: {words}"
                );
            }
            let line = request(cast, "http://bar.example.com/", "198.51.100.80", [80, 443]);
            answered_by(&cast.sh(OUTSIDE, &line)?, &["bar-1"])?;
            cast.edit("story.yaml", "name: baz", "name: bar")?;
            cast.edit("story.yaml", "no.key: \"", "tls.key: \"")?;
            let rendered = cast.configure_nginx()?;
            ensure!(
                rendered.refused.is_empty(),
                "{}",
                rendered.refused.join("; ")
            );
            Ok("both refused by name, the rest served".to_owned())
        },
    );
}

/// A request by name, which stands for an address as in `/etc/hosts`, that trusts the certificate
/// made here.
fn request(cast: &Cast, url: &str, address: &str, ports: [u16; 2]) -> String {
    let host = url
        .split("//")
        .nth(1)
        .and_then(|rest| rest.split([':', '/']).next())
        .unwrap_or_default();
    let resolve: String = ports
        .iter()
        .map(|port| format!(" --resolve {host}:{port}:{address}"))
        .collect();
    let trust = match url.starts_with("https") {
        true => format!(" --cacert {}", cast.nginx_folder().join("ca.crt").display()),
        false => String::new(),
    };
    format!("{CURL}{trust}{resolve} {url}")
}

/// Dials a Service all the while that something happens.
fn meanwhile<T>(cast: &mut Cast, act: impl FnOnce(&mut Cast) -> Result<T>) -> Result<(T, Many)> {
    let client = cast.lab.client(SHELL, Sockets::Hooked)?;
    let packets = cast.lab.client(SHELL, Sockets::Unhooked)?;
    let to = format!("{KUBIA_NODEPORT_IP}:80").parse()?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let dial = |client: shunt_lab::Client| {
            let stop = &stop;
            scope.spawn(move || {
                let mut all = Many::default();
                while !stop.load(Ordering::Relaxed) {
                    let many = client.many(Proto::Tcp, to, 10, &shunt_lab::Dial::default())?;
                    many.servers
                        .into_iter()
                        .for_each(|(name, count)| *all.servers.entry(name).or_default() += count);
                    many.errors
                        .into_iter()
                        .for_each(|(error, count)| *all.errors.entry(error).or_default() += count);
                }
                anyhow::Ok(all)
            })
        };
        let threads = [dial(client), dial(packets)];
        let done = act(cast);
        stop.store(true, Ordering::Relaxed);
        let mut all = Many::default();
        for thread in threads {
            let many = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            many.servers
                .into_iter()
                .for_each(|(name, count)| *all.servers.entry(name).or_default() += count);
            many.errors
                .into_iter()
                .for_each(|(error, count)| *all.errors.entry(error).or_default() += count);
        }
        Ok((done?, all))
    })
}

/// Runs a program in the pod and waits until the pod is a backend, or none, on both nodes.
fn turn(cast: &Cast, program: &str, is_backend: bool) -> Result<String> {
    println!("    {LATE}$ {program} /var/ready");
    let output = cast.kubelet.exec(LATE, program, &["/var/ready"])?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let took = cast.until("the pod is in or out", || {
        let on = |node: &String| {
            Ok(cast
                .backends(node, "kubia-nodeport")?
                .contains(&LATE.to_owned()))
        };
        let is: Vec<bool> = cast.lab.nodes().iter().map(on).collect::<Result<_>>()?;
        Ok(is.iter().all(|is| *is == is_backend))
    })?;
    Ok(format!("{} ms", took.as_millis()))
}

fn readiness(story: &mut Story) {
    story.chapter(
        "Readiness",
        "kubia-2xk54 is ready while the file /var/ready is there: its probe runs `ls /var/ready`. Nobody else is to notice.",
    );
    story.step("it runs, and is no backend", |cast| {
        let names = cast.backends("node-a", "kubia-nodeport")?;
        ensure!(names == KUBIA, "{names:?}");
        Ok(names.join(", "))
    });
    story.step(
        "touch /var/ready, while two clients dial: it is in",
        |cast| {
            let (took, many) = meanwhile(cast, |cast| {
                let took = turn(cast, "touch", true)?;
                // Until it has been met.
                let client = cast.lab.client(SHELL, Sockets::Hooked)?;
                let to = format!("{KUBIA_NODEPORT_IP}:80").parse()?;
                cast.until("it answers", || Ok(client.tcp(to)?.server == LATE))?;
                Ok(took)
            })?;
            ensure!(many.errors.is_empty(), "{:?}", many.errors);
            cast.cli("node-a", &["backends", "kubia-nodeport"], "kubia")?;
            let sum: u64 = many.servers.values().sum();
            Ok(format!("in after {took}; {sum} connections, none failed"))
        },
    );
    story.step(
        "rm /var/ready: it is out after three failures, and its open connection lives on",
        |cast| {
            let client = cast.lab.client(SHELL, Sockets::Unhooked)?;
            let to = format!("{KUBIA_NODEPORT_IP}:80").parse()?;
            // Open connections to all of them.
            let mut open = Vec::new();
            cast.until("a connection to it", || {
                let conn = client.open_tcp(to)?;
                let server = conn.ask("hello")?.server;
                open.push((server, conn));
                Ok(open.iter().any(|(server, _)| server == LATE))
            })?;
            let (took, many) = meanwhile(cast, |cast| turn(cast, "rm", false))?;
            ensure!(many.errors.is_empty(), "{:?}", many.errors);
            for (server, conn) in &open {
                let now = conn.ask_within("still there", PATIENCE)?.server;
                ensure!(now == *server, "{server} became {now}");
            }
            let sum: u64 = many.servers.values().sum();
            let after = cast.sh_times(SHELL, &format!("{CURL} http://{KUBIA_NODEPORT_IP}/"), 16)?;
            ensure!(!after.contains_key(LATE), "it got new connections");
            Ok(format!(
                "out after {took}; {sum} connections, none failed; {} open ones live",
                open.len()
            ))
        },
    );
    story.step(
        "bar-1 is asked by HTTP, and its process is the one that answers",
        |cast| {
            ensure!(
                cast.kubelet.is_ready("bar-1") == Some(true),
                "it is not ready"
            );
            ensure!(
                cast.backends("node-b", "bar")? == ["bar-1"],
                "it is no backend"
            );
            cast.lab.set_serving("bar-1", &[])?;
            let gone = || Ok(cast.backends("node-b", "bar")?.is_empty());
            let out = cast.until("it is out", gone)?;
            cast.lab
                .set_serving("bar-1", &[shunt_lab::Port::tcp(8080)])?;
            let back = || Ok(cast.backends("node-b", "bar")? == ["bar-1"]);
            let back = cast.until("it is back", back)?;
            Ok(format!(
                "out {} ms after its end, back {} ms after its start",
                out.as_millis(),
                back.as_millis()
            ))
        },
    );
}

fn headless(story: &mut Story) {
    story.chapter(
        "Headless",
        "kubia-headless has no address: clients get those of the pods. So it has no frontend, and no variables.",
    );
    story.step("nothing is in the way of who dials a pod itself", |cast| {
        let text = cast.cli("node-a", &["services", "-n", "default"], "kubia-headless")?;
        ensure!(!text.contains("kubia-headless"), "it has a frontend");
        let line = format!("shunt env --manifests {}", cast.manifests().display());
        let text = cast.sh(
            "node-a",
            &format!("{line} | grep -c ^KUBIA_HEADLESS_ || true"),
        )?;
        ensure!(text.trim() == "0", "it has variables");
        for (pod, address) in [
            ("kubia-8cgnm", "10.44.0.11"),
            ("kubia-8kv8d", "10.44.1.11"),
            ("kubia-5rvfq", "10.44.1.12"),
        ] {
            let text = cast.sh(SHELL, &format!("{CURL} http://{address}:8080/"))?;
            ensure!(text.starts_with(pod), "{text}");
        }
        Ok("three pods answered by their own addresses".to_owned())
    });
}
