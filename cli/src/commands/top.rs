//! `dnd top`: what the programs of a running mesh do, in the terminal, by the metrics of their admin ports.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use dnd_mesh::metrics::{
    BATCH_ITEMS, BATCH_SECONDS, BUILD, CALLS, CALLS_OPEN, QUEUE_SECONDS, QUEUE_UNITS, RECEIVED, RESULTS, SENT, SESSIONS, STAGE_SECONDS, STARTED, UNITS,
    UNITS_OPEN, WORK,
};
use dnd_mesh::program::ExitCode;
use reqwest::Client;
use tokio::net::lookup_host;

use crate::{
    out::printable,
    problem::{Problem, unless_interrupted},
};

/// How long a program has for its answer, and how much that may be.
const PATIENCE: Duration = Duration::from_secs(3);
const MOST: usize = 16 << 20;
/// The stages of a unit, in their order.
const STAGES: [&str; 6] = ["probe", "crop", "caption", "summarize", "generate", "score"];
/// Codes of calls that a service has failed at; the others are its callers' mistakes.
const FAILED: [&str; 5] = ["internal", "unavailable", "unknown", "data_loss", "deadline_exceeded"];

/// Shows what the programs of a running mesh do: calls, queues, sessions, and which stage the others wait for.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Their admin ports, such as localhost:9090. All addresses of a name are looked at, so that the name of a headless service shows all its replicas
    #[arg(value_name = "HOST:PORT", required = true)]
    at: Vec<String>,
    /// Seconds between two looks; rates are of the time between them
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    every: u64,
    /// Look once, and show the rates of all the time since the programs began
    #[arg(long)]
    once: bool,
}

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    unless_interrupted(async {
        // The client wants one, though it speaks plain HTTP here.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().timeout(PATIENCE).no_proxy().build().map_err(|e| Problem::failure(format!("no client for HTTP: {e}")))?;
        let mut before: BTreeMap<SocketAddr, Look> = BTreeMap::new();
        loop {
            let mut now = BTreeMap::new();
            for at in &args.at {
                now.extend(look(&client, at).await?);
            }
            let shown = show(&now, &before);
            // On a terminal, from the top of an empty screen.
            let clear = if !args.once && std::io::stdout().is_terminal() { "\x1b[2J\x1b[H" } else { "" };
            if write!(std::io::stdout(), "{clear}{shown}").and_then(|()| std::io::stdout().flush()).is_err() {
                // Nobody reads it any more.
                return Ok(ExitCode::SUCCESS);
            }
            if args.once {
                let none = now.values().all(|look| look.metrics.is_err());
                return if none { Err(Problem::failure("no program of the mesh answers there")) } else { Ok(ExitCode::SUCCESS) };
            }
            before = now;
            tokio::time::sleep(Duration::from_secs(args.every)).await;
        }
    })
    .await
}

/// What a program's admin port said.
struct Look {
    at: Instant,
    metrics: Result<Metrics, String>,
}

/// Looks at all addresses of a name.
async fn look(client: &Client, at: &str) -> Result<BTreeMap<SocketAddr, Look>, Problem> {
    let wrong = |why: String| Problem::input(format!("{at}: {why}; an admin port looks like localhost:9090"));
    let addresses = lookup_host(at).await.map_err(|error| wrong(error.to_string()))?;
    let mut looks = BTreeMap::new();
    for address in addresses {
        let metrics = metrics(client, address).await;
        looks.insert(address, Look { at: Instant::now(), metrics });
    }
    // A machine has two addresses for itself, and a program listens on one of them as a rule.
    if looks.values().any(|look| look.metrics.is_ok()) {
        looks.retain(|address, look| look.metrics.is_ok() || !address.ip().is_loopback());
    }
    Ok(looks)
}

async fn metrics(client: &Client, address: SocketAddr) -> Result<Metrics, String> {
    let away = |error: reqwest::Error| if error.is_connect() { "nobody answers".to_owned() } else { error.without_url().to_string() };
    let answer = client.get(format!("http://{address}/metrics")).send().await.and_then(reqwest::Response::error_for_status).map_err(away)?;
    let mut text = Vec::new();
    let mut answer = answer;
    while let Some(part) = answer.chunk().await.map_err(away)? {
        text.extend_from_slice(&part);
        if text.len() > MOST {
            return Err("more was said than a program of the mesh says".to_owned());
        }
    }
    let metrics = Metrics::read(&String::from_utf8_lossy(&text));
    if metrics.total(BUILD.name, &[]) > 0.0 { Ok(metrics) } else { Err("no program of the mesh".to_owned()) }
}

/// Labels of a series, by name.
type Labels = BTreeMap<String, String>;

/// Values of series, by the metric's name and their labels.
#[derive(Debug, Clone, Default)]
struct Metrics(BTreeMap<String, Vec<(Labels, f64)>>);

impl Metrics {
    /// Reads Prometheus' text format; lines that are something else are left out.
    fn read(text: &str) -> Self {
        let mut metrics = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some((name, labels, value)) = series(line) {
                metrics.0.entry(name.to_owned()).or_default().push((labels, value));
            }
        }
        metrics
    }

    /// The sum of a metric's series that have these labels.
    fn total(&self, name: &str, with: &[(&str, &str)]) -> f64 {
        let has = |labels: &Labels| with.iter().all(|(label, value)| labels.get(*label).is_some_and(|is| is == value));
        self.0.get(name).into_iter().flatten().filter(|(labels, _)| has(labels)).map(|(_, value)| value).sum::<f64>() + 0.0
    }

    /// The values that a label of a metric has.
    fn values(&self, name: &str, label: &str) -> Vec<&str> {
        let mut values: Vec<&str> = self.0.get(name).into_iter().flatten().filter_map(|(labels, _)| labels.get(label)).map(String::as_str).collect();
        values.sort_unstable();
        values.dedup();
        values
    }

    /// What was added since then to what only grows; the rest as it is.
    fn since(&self, before: &Self) -> Self {
        let grows = |name: &str| ["_total", "_sum", "_count"].iter().any(|ending| name.ends_with(ending));
        let added = |name: &str, labels: &Labels, value: f64| {
            let was = before.0.get(name).into_iter().flatten().find(|(other, _)| other == labels).map_or(0.0, |(_, value)| *value);
            if grows(name) { (value - was).max(0.0) } else { value }
        };
        Self(
            self.0
                .iter()
                .map(|(name, all)| (name.clone(), all.iter().map(|(labels, value)| (labels.clone(), added(name, labels, *value))).collect()))
                .collect(),
        )
    }
}

/// A line such as `name{label="value"} 3`.
fn series(line: &str) -> Option<(&str, Labels, f64)> {
    let (series, value) = line.trim_end().rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let Some((name, mut rest)) = series.split_once('{') else { return Some((series, Labels::new(), value)) };
    let mut labels = Labels::new();
    while let Some((label, quoted)) = rest.split_once("=\"") {
        let mut text = String::new();
        let mut chars = quoted.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => text.push(match chars.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => text.push(other),
            }
        };
        labels.insert(label.trim_start_matches(',').to_owned(), text);
        rest = &quoted[end + 1..];
    }
    Some((name, labels, value))
}

/// A program that answers: what it did in so many seconds.
struct Seen {
    metrics: Metrics,
    seconds: f64,
}

impl Seen {
    /// What it did since it was looked at before; if it was not, or was started since, since it began.
    fn new(now: &Look, before: Option<&Look>) -> Option<Self> {
        let metrics = now.metrics.as_ref().ok()?;
        let started = metrics.total(STARTED.name, &[]);
        if let Some(Look { at, metrics: Ok(before) }) = before
            && before.total(STARTED.name, &[]) == started
        {
            return Some(Self { metrics: metrics.since(before), seconds: now.at.duration_since(*at).as_secs_f64().max(0.001) });
        }
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Some(Self { metrics: metrics.clone(), seconds: (clock - started).max(0.001) })
    }

    fn rate(&self, name: &str, with: &[(&str, &str)]) -> f64 {
        self.metrics.total(name, with) / self.seconds
    }
}

/// The sum of something over programs.
fn sum(seen: &[Seen], of: impl Fn(&Seen) -> f64) -> f64 {
    // An empty sum is -0.
    seen.iter().map(of).sum::<f64>() + 0.0
}

/// The mean of a histogram over programs; none without values.
fn mean(seen: &[Seen], name: &str, with: &[(&str, &str)]) -> Option<f64> {
    let of = |part: &str| sum(seen, |one| one.metrics.total(&format!("{name}_{part}"), with));
    let count = of("count");
    (count > 0.0).then(|| of("sum") / count)
}

fn show(now: &BTreeMap<SocketAddr, Look>, before: &BTreeMap<SocketAddr, Look>) -> String {
    let seen: Vec<Seen> = now.iter().filter_map(|(address, look)| Seen::new(look, before.get(address))).collect();
    let mut text = String::new();
    programs(&mut text, &seen);
    models(&mut text, &seen);
    stages(&mut text, &seen);
    for (address, look) in now {
        if let Err(why) = &look.metrics {
            let _ = writeln!(text, "{address}: {}", printable(why));
        }
    }
    text
}

/// A row a program: its replicas, and the calls that they answer.
fn programs(text: &mut String, seen: &[Seen]) {
    let mut rows = vec![["program", "replicas", "open calls", "calls/s", "failing/s", "in MB/s", "out MB/s"].map(str::to_owned)];
    let mut names: Vec<&str> = seen.iter().flat_map(|one| one.metrics.values(BUILD.name, "program")).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let of = |value: fn(&Seen) -> f64| {
            let own = seen.iter().filter(|one| one.metrics.total(BUILD.name, &[("program", name)]) > 0.0);
            own.map(value).sum::<f64>() + 0.0
        };
        rows.push([
            name.to_owned(),
            format!("{:.0}", of(|_| 1.0)),
            format!("{:.0}", of(|one| one.metrics.total(CALLS_OPEN.name, &[]))),
            number(of(|one| one.rate(CALLS.name, &[]))),
            number(of(|one| FAILED.iter().map(|code| one.rate(CALLS.name, &[("code", code)])).sum())),
            number(of(|one| one.rate(RECEIVED.name, &[]) / 1e6)),
            number(of(|one| one.rate(SENT.name, &[]) / 1e6)),
        ]);
    }
    table(text, &rows);
}

/// A row a model: what waits for it, and what it does.
fn models(text: &mut String, seen: &[Seen]) {
    let mut rows = vec![["model", "sessions", "busy", "waiting", "wait s", "a batch", "work", "work/s"].map(str::to_owned)];
    let mut names: Vec<&str> = seen.iter().flat_map(|one| one.metrics.values(SESSIONS.name, "model")).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let with = [("model", name)];
        let sessions = sum(seen, |one| one.metrics.total(SESSIONS.name, &with));
        let busy = sum(seen, |one| one.rate(&format!("{}_sum", BATCH_SECONDS.name), &with)) / sessions.max(1.0);
        rows.push([
            name.to_owned(),
            format!("{sessions:.0}"),
            format!("{:.0} %", 100.0 * busy),
            format!("{:.0}", sum(seen, |one| one.metrics.total(QUEUE_UNITS.name, &with)).max(0.0)),
            mean(seen, QUEUE_SECONDS.name, &with).map_or_else(|| "-".to_owned(), number),
            mean(seen, BATCH_ITEMS.name, &with).map_or_else(|| "-".to_owned(), number),
            format!("{:.0}", sum(seen, |one| one.metrics.total(WORK.name, &with))),
            number(sum(seen, |one| one.rate(WORK.name, &with))),
        ]);
    }
    if rows.len() > 1 {
        table(text, &rows);
    }
}

/// A row a stage of units: how many get through, how long they take, and what is made for them; and which stage takes most of their time.
fn stages(text: &mut String, seen: &[Seen]) {
    let mut rows = vec![["stage", "units", "units/s", "seconds", "of time", "made", "reused"].map(str::to_owned)];
    let (spent_in, through) = (format!("{}_sum", STAGE_SECONDS.name), format!("{}_count", STAGE_SECONDS.name));
    let spent = |stage: &str| sum(seen, |one| one.metrics.total(&spent_in, &[("stage", stage)]));
    let all: f64 = STAGES.iter().map(|stage| spent(stage)).sum();
    for stage in STAGES {
        let with = [("stage", stage)];
        let results = |origin: &str| format!("{:.0}", sum(seen, |one| one.metrics.total(RESULTS.name, &[("stage", stage), ("origin", origin)])));
        rows.push([
            stage.to_owned(),
            format!("{:.0}", sum(seen, |one| one.metrics.total(&through, &with))),
            number(sum(seen, |one| one.rate(&through, &with))),
            mean(seen, STAGE_SECONDS.name, &with).map_or_else(|| "-".to_owned(), number),
            if all > 0.0 { format!("{:.0} %", 100.0 * spent(stage) / all) } else { "-".to_owned() },
            results("made"),
            results("reused"),
        ]);
    }
    table(text, &rows);
    let ended = |state: &str| sum(seen, |one| one.metrics.total(UNITS.name, &[("state", state)]));
    let open = sum(seen, |one| one.metrics.total(UNITS_OPEN.name, &[]));
    let _ = writeln!(text, "units: {:.0} in work; {:.0} labelled, {:.0} dead, {:.0} failed", open, ended("labelled"), ended("dead"), ended("failed"));
    if let Some(slowest) = STAGES.into_iter().filter(|_| all > 0.0).max_by(|a, b| spent(a).total_cmp(&spent(b))) {
        let _ = writeln!(text, "slowest stage: {slowest}, {:.0} % of the units' time", 100.0 * spent(slowest) / all);
    }
}

/// A number as short as it is clear.
fn number(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value.abs() >= 100.0 => format!("{value:.0}"),
        value if value.abs() >= 1.0 => format!("{value:.1}"),
        value => format!("{value:.3}"),
    }
}

/// Writes rows as columns, the first to the left and the others to the right.
fn table<const N: usize>(text: &mut String, rows: &[[String; N]]) {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let widths: Vec<usize> = (0..N).map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).enumerate().map(|(i, (cell, width))| if i == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }).collect();
        let _ = writeln!(text, "{}", cells.join("  "));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# TYPE dnd_build_info gauge\ndnd_build_info{program=\"dnd-clip\",version=\"1\"} 1\ndnd_start_time_seconds 1000\n\
        dnd_calls_total{service=\"a\",method=\"b\",code=\"ok\"} 6\ndnd_calls_total{service=\"a\",method=\"b\",code=\"internal\"} 2\n\
        dnd_queue_depth_units{model=\"x\\\"y\\\\\\n\u{1b}[31m\"} 7\nnonsense\ndnd_bad{a=\"b} 1\n";

    #[test]
    fn prometheus_text_is_read_with_all_that_is_escaped_in_it() {
        let metrics = Metrics::read(TEXT);
        assert_eq!((metrics.total(CALLS.name, &[]), metrics.total(CALLS.name, &[("code", "ok"), ("service", "a")])), (8.0, 6.0));
        assert_eq!(metrics.values(QUEUE_UNITS.name, "model"), ["x\"y\\\n\u{1b}[31m"]);
        assert_eq!(metrics.total("dnd_bad", &[]), 0.0);
    }

    #[test]
    fn rates_are_of_what_was_added_and_a_program_that_was_started_anew_begins_from_nothing() {
        let at = Instant::now();
        let look = |at: Instant, calls: u32, started: u32| {
            let text = TEXT.replace(" 6\n", &format!(" {calls}\n")).replace(" 1000\n", &format!(" {started}\n"));
            Look { at, metrics: Ok(Metrics::read(&text)) }
        };
        let later = at + Duration::from_secs(2);
        let seen = Seen::new(&look(later, 26, 1000), Some(&look(at, 6, 1000))).unwrap();
        assert_eq!((seen.rate(CALLS.name, &[("code", "ok")]), seen.metrics.total(QUEUE_UNITS.name, &[])), (10.0, 7.0));
        let anew = Seen::new(&look(later, 4, 1001), Some(&look(at, 6, 1000))).unwrap();
        assert_eq!(anew.metrics.total(CALLS.name, &[("code", "ok")]), 4.0);
    }

    #[test]
    fn what_a_program_says_can_not_steer_the_terminal() {
        let text = TEXT.replace("dnd-clip", "\u{1b}[2Jdnd-clip");
        let address = SocketAddr::from(([127, 0, 0, 1], 9090));
        let looks = BTreeMap::from([(address, Look { at: Instant::now(), metrics: Ok(Metrics::read(&text)) })]);
        let shown = show(&looks, &BTreeMap::new());
        assert!(shown.contains("dnd-clip") && !shown.contains('\u{1b}'), "{shown}");
    }
}
