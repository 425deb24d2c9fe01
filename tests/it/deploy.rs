//! The files that people deploy: `deploy/compose`, `deploy/kubernetes`, `systemd`, `docs/bare-metal.md`.
//!
//! In: the files as they lie in the repository, the real binary, Debian's yamllint and haproxy. Out: that they parse, that
//! waypost takes the configuration they give it, and that what stands in two of them is the same.
//! Never: needs a container, a cluster, or the network; for schemas and more see `script/lint-deploy`.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use waypost::config::units;

use crate::support::{Server, clean};

/// Of Postgres as Debian and its image configure it.
const POSTGRES_CONNECTIONS: u64 = 100;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The documents of a YAML file. Debian's Python, because yamllint brings the parser to that one.
fn documents(name: &str) -> Vec<Value> {
    const PRINT: &str = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(sys.stdin)), default=str))";
    let file = std::fs::File::open(path(name)).unwrap();
    serde_json::from_str(&ran(Command::new("/usr/bin/python3").args(["-c", PRINT]).stdin(file))).unwrap()
}

/// The one document of a kind and a name.
fn object<'a>(documents: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let is = |document: &&Value| document["kind"] == kind && document["metadata"]["name"] == name;
    documents.iter().find(is).unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// What a program prints that must not fail.
#[track_caller]
fn ran(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; see script/setup"));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{command:?}: {printed}{}", String::from_utf8_lossy(&output.stderr));
    printed
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().unwrap_or_else(|| panic!("no list: {value}")).iter()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

fn span(value: &Value) -> Duration {
    units::duration(text(value)).unwrap()
}

/// The configuration that waypost makes of a file and of its environment; what it does not know fails.
#[track_caller]
fn configuration(file: &Path, environment: &[(String, String)]) -> Value {
    let waypost = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
        clean(&mut command);
        ran(command.args(arguments).arg("--config").arg(file).envs(environment.iter().cloned()))
    };
    waypost(&["config", "check"]);
    serde_json::from_str(&waypost(&["config", "print", "--json"])).unwrap()
}

/// How long an orderly stop may take: beside what is configured, for workers and look-ups that end, what is remembered and the
/// farewell to the store (`src/app/mod.rs`).
fn stop(configuration: &Value) -> Duration {
    const MORE: Duration = Duration::from_secs(8);
    ["drain", "grace", "flush"].iter().map(|key| span(&configuration["shutdown"][key])).sum::<Duration>() + MORE
}

/// Connections of an instance to Postgres: beside the pool, one that listens and one for visits.
fn connections(configuration: &Value) -> u64 {
    configuration["postgres"]["pool"].as_u64().unwrap() + 2
}

fn size(configuration: &Value, key: &str) -> u64 {
    units::size(text(&configuration["spool"][key])).unwrap()
}

fn compose() -> Value {
    documents("deploy/compose/compose.yaml").remove(0)
}

/// The services that serve redirects, by name.
fn instances(compose: &Value) -> impl Iterator<Item = (&String, &Value)> {
    compose["services"].as_object().unwrap().iter().filter(|(name, _)| name.starts_with("waypost-"))
}

/// Text with `${NAME}` in it, as .env would fill it in: by its default, or by 24 letters. Notes the names.
fn filled(text: &str, names: &mut BTreeSet<String>) -> String {
    let mut parts = text.split("${");
    let mut filled = parts.next().unwrap().to_owned();
    for part in parts {
        let (variable, rest) = part.split_once('}').unwrap();
        let name: String = variable.chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect();
        filled += variable[name.len()..].strip_prefix(":-").unwrap_or("abcdefghijklmnopqrstuvwx");
        filled += rest;
        names.insert(name);
    }
    filled
}

/// The configuration of a service of compose.yaml that runs waypost.
fn composed(service: &Value) -> Value {
    let environment = service["environment"].as_object().unwrap().iter();
    let environment = environment.map(|(name, value)| (name.clone(), filled(text(value), &mut BTreeSet::new())));
    // Where the container has it.
    let environment: Vec<_> = environment.filter(|(name, _)| name != "WAYPOST_CONFIG").collect();
    configuration(&path("deploy/compose/waypost.toml"), &environment)
}

/// The container of a workload's pods.
fn pod(workload: &Value) -> (&Value, &Value) {
    let pod = &workload["spec"]["template"]["spec"];
    (pod, &pod["containers"][0])
}

/// The configuration of a pod: its environment, with the files of its secret where they can be read.
fn in_pod(workload: &Value, file: &Path) -> Value {
    let (pod, container) = pod(workload);
    let volume = list(&pod["volumes"]).find(|volume| volume["name"] == "secret").unwrap();
    let secrets = documents("deploy/kubernetes/secret.sample.yaml");
    let secret = object(&secrets, "Secret", text(&volume["secret"]["secretName"]));
    let folder = TempDir::new().unwrap();
    for (name, value) in secret["stringData"].as_object().unwrap() {
        std::fs::write(folder.path().join(name), text(value)).unwrap();
    }
    let here = folder.path().to_str().unwrap();
    let value = |variable: &Value| text(&variable["value"]).replace("/run/secrets/waypost", here);
    let environment: Vec<_> =
        list(&container["env"]).map(|variable| (text(&variable["name"]).to_owned(), value(variable))).collect();
    configuration(file, &environment)
}

/// The file that a page has between `<<'EOF'` and `EOF`.
fn in_page<'a>(page: &'a str, file: &str) -> &'a str {
    let (_, rest) = page.split_once(&format!("cat >{file} <<'EOF'\n")).unwrap_or_else(|| panic!("no {file}"));
    rest.split_once("\nEOF").unwrap().0
}

#[test]
fn the_yaml_is_clean() {
    ran(Command::new("yamllint")
        .args(["--strict", "--config-file", "deploy/.yamllint", "deploy"])
        .current_dir(path("")));
}

#[test]
fn the_scripts_parse() {
    for script in ["postgres/fence.sh", "postgres/primary.sh", "postgres/standby.sh", "pgbouncer/start.sh"] {
        ran(Command::new("sh").arg("-n").arg(path("deploy/compose").join(script)));
    }
    // The image's entry point runs it; one that is not executable it would source, `set -eu` and all.
    let mode = std::fs::metadata(path("deploy/compose/postgres/primary.sh")).unwrap().permissions().mode();
    assert_eq!(mode & 0o111, 0o111, "{mode:o}");
}

/// After a failover by hand the first primary comes back read-only, and PgBouncer leads to the other one.
#[test]
fn the_old_primary_is_fenced() {
    let folder = TempDir::new().unwrap();
    let shown = folder.path().join("docker-entrypoint.sh");
    std::fs::write(&shown, "#!/bin/sh\necho \"$@\"\n").unwrap();
    std::fs::set_permissions(&shown, std::fs::Permissions::from_mode(0o755)).unwrap();
    let search = format!("{}:/usr/bin:/bin", folder.path().display());
    let begun = |primary: &str| {
        let mut command = Command::new("sh");
        command.arg(path("deploy/compose/postgres/fence.sh")).args(["postgres", "-cmax_connections=100"]);
        ran(command.env("PATH", &search).env("PRIMARY", primary))
    };
    assert_eq!(begun("postgres"), "postgres -cmax_connections=100\n");
    assert_eq!(begun("standby"), "postgres -cmax_connections=100 -cdefault_transaction_read_only=on\n");

    let services = &compose()["services"];
    assert_eq!(services["postgres"]["environment"]["PRIMARY"], services["pgbouncer"]["environment"]["PRIMARY"]);
    assert_eq!(text(&services["postgres"]["entrypoint"][1]), "/fence.sh");
}

#[test]
fn images_are_pinned() {
    let own = ["image: waypost:", "image: registry.example/waypost:"];
    let mut tags = BTreeMap::new();
    let mut seen = 0;
    for file in [
        "compose/Dockerfile",
        "compose/pgbouncer/Dockerfile",
        "compose/compose.yaml",
        "kubernetes/statefulset.yaml",
        "kubernetes/migrate.yaml",
        "kubernetes/replay.yaml",
    ] {
        let content = read(&format!("deploy/{file}"));
        for line in
            content.lines().map(str::trim).filter(|line| line.starts_with("FROM ") || line.starts_with("image: "))
        {
            seen += 1;
            let image = line.split(' ').nth(1).unwrap();
            let (name, tag) = image.rsplit_once(':').unwrap_or_else(|| panic!("{file}: {line} has no tag"));
            let elsewhere = tags.insert(name.to_owned(), tag.to_owned());
            assert!(elsewhere.as_deref().is_none_or(|elsewhere| elsewhere == tag), "{file}: {line}, and {elsewhere:?}");
            // 16.9-bookworm, and neither `latest` nor 16.
            let parts: Vec<_> = tag.split(['.', '-']).take_while(|part| part.parse::<u32>().is_ok()).collect();
            assert!(parts.len() >= 2, "{file}: {line}");
            if own.iter().any(|own| line.starts_with(own)) {
                assert_eq!(tag, env!("CARGO_PKG_VERSION"), "{file}: {line}");
            }
        }
    }
    assert!(seen >= 10, "{seen} images");
    let compiler = &tags["docker.io/library/rust"];
    assert!(compiler.starts_with(concat!(env!("CARGO_PKG_RUST_VERSION"), ".")), "rust:{compiler}");
}

#[test]
fn whoever_stops_an_instance_waits_long_enough() {
    let compose = compose();
    for (name, service) in instances(&compose) {
        let (takes, limit) = (stop(&composed(service)), span(&service["stop_grace_period"]));
        assert!(limit > takes, "{name}: stop_grace_period {limit:?}, and a stop takes {takes:?}");
    }

    let workloads = documents("deploy/kubernetes/statefulset.yaml");
    let instances = object(&workloads, "StatefulSet", "waypost");
    let takes = stop(&in_pod(instances, &path("deploy/kubernetes/waypost.toml")));
    let limit = Duration::from_secs(pod(instances).0["terminationGracePeriodSeconds"].as_u64().unwrap());
    assert!(limit > takes, "terminationGracePeriodSeconds {limit:?}, and a stop takes {takes:?}");

    let unit = read("systemd/waypost.service");
    let limit = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")).unwrap();
    let limit = units::duration(limit).unwrap();
    let folder = TempDir::new().unwrap();
    let by_hand = folder.path().join("waypost.toml");
    std::fs::write(&by_hand, in_page(&read("docs/bare-metal.md"), "/etc/waypost/waypost.toml")).unwrap();
    for file in [by_hand, path("deploy/haproxy/waypost.toml"), path("deploy/nginx/waypost.toml")] {
        let takes = stop(&configuration(&file, &[]));
        assert!(limit > takes, "{file:?}: TimeoutStopSec {limit:?}, and a stop takes {takes:?}");
    }
}

#[test]
fn compose_agrees_with_itself_and_with_haproxy() {
    let compose = compose();
    let services = &compose["services"];

    // What .env.sample names is what is asked for, and nothing else.
    let mut asked = BTreeSet::new();
    let file = read("deploy/compose/compose.yaml");
    file.lines().filter(|line| !line.trim().starts_with('#')).for_each(|line| drop(filled(line, &mut asked)));
    let sample = read("deploy/compose/.env.sample");
    let named = sample.lines().filter_map(|line| Some(line.split_once('=')?.0)).filter(|name| !name.starts_with('#'));
    let named: BTreeSet<_> = named.filter(|name| *name != "COMPOSE_PROJECT_NAME").map(str::to_owned).collect();
    assert_eq!(named, asked);

    // Every file that is mounted or built from is there, every volume declared.
    let here = path("deploy/compose");
    for (name, service) in services.as_object().unwrap() {
        for volume in service["volumes"].as_array().into_iter().flatten().map(text) {
            let source = volume.split(':').next().unwrap();
            let known = match source.chars().next() {
                Some('.') => here.join(source).is_file(),
                Some('/') => Path::new(source).is_dir(),
                _ => compose["volumes"].as_object().unwrap().contains_key(source),
            };
            assert!(known, "{name}: {volume}");
        }
        if let Some(build) = service["build"].as_object() {
            let context = here.join(text(&build["context"]));
            assert!(context.join(text(&build["dockerfile"])).is_file(), "{name}: {build:?}");
        }
        if let Some(folder) = service["build"].as_str() {
            assert!(here.join(folder).join("Dockerfile").is_file(), "{name}: {folder}");
        }
    }

    // HAProxy's file is used as it is: the instances have the addresses that stand in it, and believe its own.
    let balancer = &services["haproxy"];
    let haproxy = read("deploy/haproxy/haproxy.cfg");
    let mut all = 0;
    for (name, service) in instances(&compose) {
        let configuration = composed(service);
        let address = text(&service["networks"]["default"]["ipv4_address"]);
        let port = text(&configuration["listen"][0]["address"]).rsplit_once(':').unwrap().1;
        let server = format!("{address}:{port}");
        let of = |line: &&str| line.trim().starts_with("server ") && line.split_whitespace().any(|word| word == server);
        assert_eq!(haproxy.lines().filter(of).count(), 3, "{name}: {server} in haproxy.cfg");
        let trusted = &configuration["proxies"]["trusted"];
        assert_eq!(trusted[0], balancer["networks"]["default"]["ipv4_address"], "{name}");
        // The rings lie on what outlives the container.
        let ring = format!("/dev/shm:{}", text(&configuration["spool"]["ring"]));
        assert!(list(&service["volumes"]).any(|volume| *volume == ring.as_str()), "{name}: no {ring}");
        assert_eq!(configuration["postgres"]["statements"], "unnamed", "{name} is behind PgBouncer");
        all += connections(&configuration);
    }
    let pooler = read("deploy/compose/pgbouncer/pgbouncer.ini");
    let figure = |key: &str| pooler.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = ")).unwrap();
    assert!(figure("max_client_conn").parse::<u64>().unwrap() > 2 * all);
    assert_eq!(figure("pool_mode"), "transaction");
    let published = text(&balancer["ports"][0]).rsplit_once(':').unwrap().1.to_owned();
    assert!(haproxy.lines().any(|line| line.trim() == format!("bind :{published}")), "{published} in haproxy.cfg");
    composed(&services["migrate"]);

    let mut check = Command::new("haproxy");
    check.args(["-c", "-f", "haproxy/haproxy.cfg", "-f", "compose/haproxy-log.cfg"]).current_dir(path("deploy"));
    ran(&mut check);
}

/// The words of a text that begin like this.
fn words<'a>(text: &'a str, prefix: &str) -> BTreeSet<&'a str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '_'));
    words.filter(|word| word.starts_with(prefix)).map(|word| word.trim_end_matches('.')).collect()
}

/// Whoever goes from one way of deploying to another one finds the same machines and the same roles.
#[test]
fn addresses_and_roles_are_the_same_everywhere() {
    let [page, haproxy, nginx] =
        ["docs/bare-metal.md", "deploy/haproxy/haproxy.cfg", "deploy/nginx/waypost.conf"].map(read);
    let servers = |text: &str| -> BTreeSet<String> {
        let of_servers = text.lines().filter(|line| line.trim().starts_with("server "));
        of_servers.flat_map(|line| words(line, "10.0.0.")).map(str::to_owned).collect()
    };
    let three: BTreeSet<String> = ["10.0.0.11", "10.0.0.12", "10.0.0.13"].map(str::to_owned).into();
    let compose = compose();
    let composed =
        instances(&compose).map(|(_, service)| text(&service["networks"]["default"]["ipv4_address"]).to_owned());
    assert_eq!((servers(&haproxy), servers(&nginx), composed.collect()), (three.clone(), three.clone(), three));
    let gateway = "10.0.0.1";
    for (name, text) in [("haproxy.cfg", &haproxy), ("waypost.conf", &nginx)] {
        assert!(words(text, gateway).contains(gateway), "{name} knows no gateway");
    }
    let subnet = text(&compose["networks"]["default"]["ipam"]["config"][0]["subnet"]);
    assert_eq!(subnet, "10.0.0.0/24");
    assert!(page.contains(&format!(
        "| lb | {} |",
        text(&compose["services"]["haproxy"]["networks"]["default"]["ipv4_address"])
    )));
    let edge = |text: &str| words(text, "192.0.2.").len();
    assert_eq!((edge(&haproxy), edge(&nginx)), (1, 1));

    let roles = |text: &str| -> BTreeSet<String> {
        let made = text.lines().filter_map(|line| line.strip_prefix("CREATE ROLE "));
        made.map(|line| line.split(" PASSWORD ").next().unwrap().to_owned()).collect()
    };
    let primary = read("deploy/compose/postgres/primary.sh");
    assert_eq!(roles(&primary), roles(&page));
    let named: BTreeSet<String> =
        roles(&primary).iter().map(|role| role.split(' ').next().unwrap().to_owned()).collect();
    let secrets = documents("deploy/kubernetes/secret.sample.yaml");
    for secret in ["waypost", "waypost-owner"] {
        let url = text(&object(&secrets, "Secret", secret)["stringData"]["postgres-url"]);
        let role = url.strip_prefix("postgres://").unwrap().split(':').next().unwrap();
        assert!(named.contains(role), "{secret}: {role}");
    }
}

#[test]
fn kubernetes_agrees_with_itself() {
    let all = |names: &[&str]| -> Vec<Value> {
        names.iter().flat_map(|name| documents(&format!("deploy/kubernetes/{name}.yaml"))).collect()
    };
    let workloads = all(&["statefulset", "migrate", "replay"]);
    let kustomization = all(&["kustomization"]).remove(0);
    let file = path("deploy/kubernetes/waypost.toml");
    let instances = object(&workloads, "StatefulSet", "waypost");
    let (spec, container) = pod(instances);
    let configuration = in_pod(instances, &file);

    // Every resource is there; one image of one version everywhere.
    for resource in list(&kustomization["resources"]) {
        assert!(path("deploy/kubernetes").join(text(resource)).is_file(), "{resource}");
    }
    let image = &kustomization["images"][0];
    let image = format!("{}:{}", text(&image["name"]), text(&image["newTag"]));
    for workload in &workloads {
        let (spec, container) = pod(workload);
        let kind = text(&workload["metadata"]["name"]);
        assert_eq!(container["image"], image.as_str(), "{kind}");
        // What is mounted is declared.
        let volumes =
            list(&spec["volumes"]).chain(workload["spec"]["volumeClaimTemplates"].as_array().into_iter().flatten());
        let volumes: Vec<_> = volumes.map(|volume| volume.get("name").unwrap_or(&volume["metadata"]["name"])).collect();
        for mount in list(&container["volumeMounts"]) {
            assert!(volumes.contains(&&mount["name"]), "{kind}: {mount}");
        }
    }
    let empty = tempfile::NamedTempFile::new().unwrap();
    in_pod(object(&workloads, "Job", "waypost-migrate"), empty.path());
    // Visits are stored as the pods would, and what is refused of them outlives the Job.
    let replays = in_pod(object(&workloads, "Job", "waypost-replay"), &file);
    assert_eq!((&replays["data"], &replays["visits"]), (&"/gone".into(), &configuration["visits"]));

    // Ports: of the configuration, the container, the probes and the services.
    let port =
        |name: &str| list(&container["ports"]).find(|port| port["name"] == name).unwrap()["containerPort"].clone();
    let listens = |address: &Value| Value::from(text(address).rsplit_once(':').unwrap().1.parse::<u64>().unwrap());
    list(&configuration["listen"]).for_each(|listen| assert_eq!(listens(&listen["address"]), port("http")));
    assert_eq!(listens(&configuration["api"]["listen"]), port("api"));
    let annotations = &instances["spec"]["template"]["metadata"]["annotations"];
    assert_eq!(annotations["prometheus.io/port"], port("api").to_string());
    let server = Server::new("[api]\nlisten = \"127.0.0.1:0\"\n");
    let api = server.1.listener("(API)");
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let probe = &container[probe]["httpGet"];
        assert_eq!(probe["port"], "api");
        assert_eq!(crate::support::Client::connect(api).get(text(&probe["path"])).status, 200, "{probe}");
    }
    let services = all(&["services"]);
    for service in &services {
        let labels = &instances["spec"]["template"]["metadata"]["labels"];
        assert_eq!(&service["spec"]["selector"], labels, "{service}");
        for wanted in list(&service["spec"]["ports"]) {
            port(text(&wanted["targetPort"]));
        }
    }
    assert_eq!(object(&services, "Service", text(&instances["spec"]["serviceName"]))["spec"]["clusterIP"], "None");

    // Memory and disk: the rings lie in memory, and both volumes have room for what is configured.
    let mount = list(&container["volumeMounts"]).find(|mount| mount["name"] == "rings").unwrap();
    assert_eq!(mount["mountPath"], configuration["spool"]["ring"]);
    let rings = &list(&spec["volumes"]).find(|volume| volume["name"] == "rings").unwrap()["emptyDir"];
    assert_eq!(rings["medium"], "Memory");
    let bytes = |value: &Value| units::size(&format!("{}B", text(value))).unwrap();
    let workers = configuration["workers"]["count"].as_u64().unwrap();
    assert!(workers > 0 && bytes(&rings["sizeLimit"]) >= 4 * workers * size(&configuration, "ring_size"));
    let claim = &instances["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"];
    assert!(bytes(claim) > 5 * size(&configuration, "max_bytes"), "{claim}");

    // The autoscaler: what it scales, by figures that exist, to what Postgres has connections for.
    let autoscaler = all(&["autoscaler"]).remove(0);
    assert_eq!(autoscaler["spec"]["scaleTargetRef"]["name"], instances["metadata"]["name"]);
    assert!(instances["spec"]["replicas"].is_null(), "each apply would set back what the autoscaler did");
    assert!(autoscaler["spec"]["maxReplicas"].as_u64().unwrap() * connections(&configuration) < POSTGRES_CONNECTIONS);
    let scrape = crate::support::Client::connect(api).get("/metrics").text();
    let rule = &all(&["adapter-rules"])[0]["rules"]["custom"][0];
    let metric = &list(&autoscaler["spec"]["metrics"]).find(|metric| metric["type"] == "Pods").unwrap()["pods"];
    assert_eq!(metric["metric"]["name"], rule["name"]["as"]);
    for series in [text(&metric["metric"]["name"]), "waypost_degraded{reason=\"store\""] {
        assert!(scrape.lines().any(|line| line.starts_with(series)), "/metrics has no {series}");
        assert!(text(&rule["metricsQuery"]).contains(series), "the rule has no {series}");
    }
}
