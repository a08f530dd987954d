//! A storm of kills: services, orchestrators and the database die at random moments of jobs, and what comes of the jobs is what an undisturbed run gives.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Mesh, Service, dnd};
use serde_json::Value;

/// How long a job may take to end once nothing is killed any more.
const PATIENCE: Duration = Duration::from_secs(300);
const SEED: u64 = 7;
/// How long nothing is killed at most while nothing comes of a job.
const CALM: Duration = Duration::from_secs(5);

/// A PostgreSQL server of its own.
struct Postgres(PathBuf);

impl Postgres {
    fn run(&self, what: &str) -> Option<String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/postgres.sh");
        let output = Command::new(script).arg(&self.0).arg(what).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }

    fn kill(&self) {
        let file = self.0.join("data/postmaster.pid");
        let pid = fs::read_to_string(&file).unwrap();
        assert!(Command::new("kill").args(["-KILL", pid.lines().next().unwrap()]).status().unwrap().success());
        // Where nobody waits for the dead, its id would be taken for a server's that still runs.
        fs::remove_file(file).unwrap();
    }

    /// Starts it; the processes that a killed one leaves behind may take a moment to end.
    fn start(&self) -> String {
        let since = Instant::now();
        loop {
            match self.run("start") {
                Some(url) => return url,
                None => assert!(since.elapsed() < Duration::from_secs(30), "PostgreSQL does not start"),
            }
            thread::sleep(Duration::from_millis(300));
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = self.run("stop");
    }
}

/// Random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

const COMPONENTS: [&str; 8] = ["activation", "captioner", "summarizer", "diffusion", "clip", "orchestrator", "other orchestrator", "database"];

struct Storm {
    folder: tempfile::TempDir,
    mesh: Mesh,
    orchestrators: [Service; 2],
    postgres: Option<Postgres>,
    /// Where the jobs are, as arguments of `dnd jobs`.
    store: Vec<String>,
    layers: &'static str,
}

impl Storm {
    fn begin(layers: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_pictures(&folder.path().join("pictures"), &pictures(80, 4));
        let mut store = vec!["--data".to_owned(), folder.path().join("data").to_str().unwrap().to_owned()];
        // Where there is no server for tests, the jobs are in a SQLite file.
        let postgres = std::env::var_os("DND_TEST_POSTGRES").map(|_| Postgres(std::env::temp_dir().join(format!("dnd-faults-{}", std::process::id()))));
        if let Some(postgres) = &postgres {
            store.extend(["--store".to_owned(), postgres.start()]);
        }
        let mesh = Mesh::start(&sketch(""));
        let start = || {
            let store: Vec<&str> = store.iter().map(String::as_str).collect();
            mesh.another_orchestrator(&[&store[..], &["--lease", "2", "--units-in-flight", "3"]].concat())
        };
        let orchestrators = [start(), start()];
        Self { folder, mesh, orchestrators, postgres, store, layers }
    }

    fn components(&self) -> u64 {
        if self.postgres.is_some() { 8 } else { 7 }
    }

    fn what(&self, seed: u64) -> Vec<String> {
        let (target, images) = (sketch("targets/planted/planted.onnx"), self.folder.path().join("pictures"));
        let fixed = ["--num-inference-steps", "2", "--images-per-concept", "2", "--candidates", "2", "--layer", self.layers];
        let paths = ["--target", target.to_str().unwrap(), "--images", images.to_str().unwrap(), "--seed", &seed.to_string()];
        fixed.iter().chain(&paths).map(|arg| (*arg).to_owned()).collect()
    }

    fn run(&self, args: &[&str], more: &[String]) -> Option<String> {
        let args: Vec<&str> = args.iter().copied().chain(more.iter().map(String::as_str)).collect();
        let ran = dnd(self.folder.path(), &args);
        (ran.code == 0).then_some(ran.out)
    }

    /// Creates a job at whichever orchestrator takes it; gives its id.
    fn create(&self, seed: u64) -> String {
        let since = Instant::now();
        loop {
            for orchestrator in &self.orchestrators {
                if let Some(id) = self.run(&["jobs", "create", "--endpoint", &orchestrator.url()], &self.what(seed)) {
                    return id.trim().to_owned();
                }
            }
            assert!(since.elapsed() < PATIENCE, "no orchestrator takes a job: {}", self.orchestrators[0].log());
        }
    }

    /// A job as the store has it; none while the database is down.
    fn job(&self, id: &str) -> Option<Value> {
        self.run(&["jobs", "show", id, "--json"], &self.store).map(|job| serde_json::from_str(&job).unwrap())
    }

    fn kill_and_restart(&mut self, component: usize, away: Duration) {
        match component {
            0..5 => self.mesh.models[component].kill(),
            5 | 6 => self.orchestrators[component - 5].kill(),
            _ => self.postgres.as_ref().unwrap().kill(),
        }
        thread::sleep(away);
        match component {
            // Orchestrators don't start without the database, which is back by then; services need nobody.
            0..5 => self.mesh.models[component].restart(),
            5 | 6 => self.orchestrators[component - 5].restart(),
            _ => drop(self.postgres.as_ref().unwrap().start()),
        }
    }
}

/// The stage that most of the job's open units are before.
fn stage(job: &Value) -> String {
    let count = |stage: &Value, name: &str| stage[name].as_str().unwrap().parse::<u64>().unwrap();
    let open = job["progress"].as_array().unwrap().iter().find(|stage| count(stage, "done") < count(stage, "total"));
    open.map_or("the end", |stage| stage["stage"].as_str().unwrap()).trim_start_matches("STAGE_").to_lowercase()
}

fn storm(kills: usize, layers: &'static str, units: usize) {
    let mut storm = Storm::begin(layers);
    let mut random = Random(SEED);
    let mut killed: BTreeMap<(&str, String), usize> = BTreeMap::new();
    let mut jobs: Vec<String> = Vec::new();
    let mut bag: Vec<usize> = Vec::new();
    let mut last = Value::Null;
    for _ in 0..kills {
        // Each component in turn, in an order drawn anew each time; a new job when the last has ended.
        if bag.is_empty() {
            bag = (0..storm.components() as usize).collect();
        }
        let component = bag.swap_remove(random.below(bag.len() as u64) as usize);
        let current = jobs.last().and_then(|id| storm.job(id)).filter(|job| job["state"] != "JOB_STATE_DONE");
        let job = current.unwrap_or_else(|| {
            jobs.push(storm.create(jobs.len() as u64));
            storm.job(jobs.last().unwrap()).unwrap()
        });
        // On a slow machine, too, something has come of the job since the last kill.
        let since = Instant::now();
        while since.elapsed() < CALM && storm.job(jobs.last().unwrap()).is_none_or(|now| now["progress"] == last) {
            thread::sleep(Duration::from_millis(50));
        }
        thread::sleep(Duration::from_millis(random.below(600)));
        last = job["progress"].clone();
        *killed.entry((COMPONENTS[component], stage(&job))).or_default() += 1;
        storm.kill_and_restart(component, Duration::from_millis(random.below(400)));
    }
    for (seed, id) in (0_u64..).zip(&jobs) {
        let since = Instant::now();
        loop {
            let job = storm.job(id).unwrap();
            if job["state"] == "JOB_STATE_DONE" {
                break;
            }
            assert!(since.elapsed() < PATIENCE, "{job}\n{}\n{}", storm.orchestrators[0].log(), storm.orchestrators[1].log());
            thread::sleep(Duration::from_millis(200));
        }
        let told = storm.run(&["jobs", "watch", id, "--json"], &storm.store).unwrap();
        let events: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let ended: Vec<(&Value, &Value)> = events.iter().filter_map(|event| event.get("unit")).map(|unit| (&unit["layer"], &unit["unit"])).collect();
        let different: BTreeSet<String> = ended.iter().map(|(layer, unit)| format!("{layer} {unit}")).collect();
        assert_eq!((ended.len(), different.len()), (units, units), "no unit is missing, and none is told twice");
        let (disturbed, whole) = (format!("disturbed{seed}"), format!("whole{seed}"));
        storm.run(&["jobs", "export", id, "--out", &disturbed], &storm.store).unwrap();
        let suite = sketch("");
        storm.run(&["dissect", "--models", suite.to_str().unwrap(), "--out", &whole], &storm.what(seed)).unwrap();
        let results = |out: &str| fs::read_to_string(storm.folder.path().join(out).join("results.jsonl")).unwrap();
        assert_eq!(results(&disturbed), results(&whole));
    }
    println!("{} jobs of {units} units, {kills} kills, by component and the stage that the job was in", jobs.len());
    for ((component, stage), count) in killed {
        println!("  {component:<20}  {stage:<10}  {count:>4}");
    }
}

#[test]
fn jobs_survive_twenty_kills() {
    storm(20, "mixture", 24);
}

#[test]
#[ignore = "takes some minutes: 200 kills"]
fn jobs_survive_two_hundred_kills() {
    storm(200, "colour,pattern,mixture", 48);
}
