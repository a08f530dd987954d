//! A storm of kills: services, orchestrators and the database die in the middle of jobs, and what comes of the jobs is what an undisturbed run gives.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use dnd_proto::v1::{GetJobRequest, JobState, dissect_service_client::DissectServiceClient};
use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{
    Service, dnd, models, orchestrator,
    recorder::{Death, Recorder, STAGES},
};
use serde_json::Value;
use tokio::runtime::Runtime;

/// How long nothing may come of a job.
const PATIENCE: Duration = Duration::from_secs(300);
const SEED: u64 = 7;
/// Seconds after which the work of an orchestrator that died is taken over.
const LEASE: u64 = 5;
/// Pictures of a job, and sets of so many that have none in common.
const PICTURES: usize = 160;
const SETS: usize = 12;

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

const COMPONENTS: [&str; 8] = ["activation", "captioner", "summarizer", "diffusion", "clip", "orchestrator", "other orchestrator", "database"];

/// Jobs over models that a recorder stands before, and where they are kept.
struct Storm {
    orchestrators: Vec<Service>,
    recorder: Recorder,
    models: [Service; 5],
    postgres: Option<Postgres>,
    /// Where the jobs are, as arguments of `dnd jobs`.
    store: Vec<String>,
    /// What is dissected, as arguments of `dnd`.
    what: &'static [&'static str],
    runtime: Runtime,
    folder: tempfile::TempDir,
}

impl Storm {
    fn begin(name: &str, what: &'static [&'static str], orchestrators: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut store = vec!["--data".to_owned(), folder.path().join("data").to_str().unwrap().to_owned()];
        // Where there is no server for tests, the jobs are in a SQLite file.
        let place = || std::env::temp_dir().join(format!("dnd-{name}-{}", std::process::id()));
        let postgres = std::env::var_os("DND_TEST_POSTGRES").map(|_| Postgres(place()));
        if let Some(postgres) = &postgres {
            store.extend(["--store".to_owned(), postgres.start()]);
        }
        let models = models(&sketch(""), &[]);
        let recorder = Recorder::before(&models.each_ref().map(|service| service.address().to_owned()), orchestrators);
        let mut storm = Self { folder, models, recorder, orchestrators: Vec::new(), postgres, store, what, runtime: Runtime::new().unwrap() };
        storm.orchestrators = (0..orchestrators).map(|caller| storm.orchestrator(caller)).collect();
        storm
    }

    fn orchestrator(&self, caller: usize) -> Service {
        let store: Vec<&str> = self.store.iter().map(String::as_str).collect();
        let lease = LEASE.to_string();
        let more = ["--lease", &lease, "--units-in-flight", "3", "--shard-pictures", "8"];
        orchestrator(self.recorder.urls(caller), &[&store[..], &more].concat())
    }

    /// The arguments of a job by its number: each has other pictures and another seed.
    fn arguments(&self, number: usize) -> Vec<String> {
        let set = number % SETS;
        let images = self.folder.path().join(format!("pictures{set}"));
        if !images.exists() {
            let all = pictures(PICTURES * SETS, 1);
            write_pictures(&images, &all.into_iter().skip(set).step_by(SETS).collect::<Vec<_>>());
        }
        let fixed = ["--num-inference-steps", "2", "--images-per-concept", "2", "--candidates", "2"];
        let more = ["--images".to_owned(), images.to_str().unwrap().to_owned(), "--seed".to_owned(), number.to_string()];
        let target = ["--target".to_owned(), sketch(self.what[0]).to_str().unwrap().to_owned()];
        fixed.iter().chain(&self.what[1..]).map(|arg| (*arg).to_owned()).chain(target).chain(more).collect()
    }

    fn run(&self, args: &[&str], more: &[String]) -> Option<String> {
        let args: Vec<&str> = args.iter().copied().chain(more.iter().map(String::as_str)).collect();
        let ran = dnd(self.folder.path(), &args);
        (ran.code == 0).then_some(ran.out)
    }

    /// Creates a job at whichever orchestrator takes it; gives its id.
    fn create(&self, number: usize, more: &[&str]) -> String {
        let since = Instant::now();
        loop {
            for orchestrator in &self.orchestrators {
                if let Some(id) = self.run(&[&["jobs", "create", "--endpoint", &orchestrator.url()], more].concat(), &self.arguments(number)) {
                    return id.trim().to_owned();
                }
            }
            assert!(since.elapsed() < PATIENCE, "no orchestrator takes a job: {}", self.logs());
        }
    }

    /// Whether a job is done, as any orchestrator tells that can.
    fn is_done(&self, id: &str) -> bool {
        let state = |orchestrator: &Service| {
            self.runtime.block_on(async {
                let mut client = DissectServiceClient::connect(orchestrator.url()).await.ok()?;
                let job = client.get_job(GetJobRequest { job_id: id.to_owned() }).await.ok()?.into_inner().job?;
                assert_ne!(job.state(), JobState::Failed, "{}", job.message);
                Some(job.state())
            })
        };
        self.orchestrators.iter().find_map(state) == Some(JobState::Done)
    }

    fn wait_for(&self, id: &str) {
        let since = Instant::now();
        while !self.is_done(id) {
            assert!(since.elapsed() < PATIENCE, "{}", self.logs());
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// What may be lost by a kill is known to be over when who had it is known to be gone.
    fn kill_and_restart(&mut self, component: usize, away: Duration) -> Death {
        let from = Instant::now();
        match component {
            0..5 => self.models[component].kill(),
            5 | 6 => self.orchestrators[component - 5].kill(),
            _ => self.postgres.as_ref().unwrap().kill(),
        }
        let dead = Instant::now();
        thread::sleep(away);
        match component {
            // Orchestrators don't start without the database, which is back by then; services need nobody.
            0..5 => self.models[component].restart(),
            5 | 6 => self.orchestrators[component - 5].restart(),
            _ => {
                self.postgres.as_ref().unwrap().start();
                // Leases that could not be prolonged meanwhile are over: what was asked for under them is asked for by others.
                return Death { from, until: Instant::now() + Duration::from_secs(LEASE + 1) };
            }
        }
        Death { from, until: dead }
    }

    /// What a job gave, each of whose units ended once.
    fn exported(&self, number: usize, id: &str, units: usize) -> String {
        let told = self.run(&["jobs", "watch", id, "--json"], &self.store).unwrap();
        let events: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let ended: Vec<(&Value, &Value)> = events.iter().filter_map(|event| event.get("unit")).map(|unit| (&unit["layer"], &unit["unit"])).collect();
        let different: BTreeSet<String> = ended.iter().map(|(layer, unit)| format!("{layer} {unit}")).collect();
        assert_eq!((ended.len(), different.len()), (units, units), "no unit is missing, and none is told twice");
        let out = format!("exported{number}");
        self.run(&["jobs", "export", id, "--out", &out], &self.store).unwrap();
        self.results(&out)
    }

    /// What an undisturbed run gives, in one process.
    fn undisturbed(&self, number: usize) -> String {
        let (suite, out) = (sketch(""), format!("whole{number}"));
        self.run(&["dissect", "--models", suite.to_str().unwrap(), "--out", &out], &self.arguments(number)).unwrap();
        self.results(&out)
    }

    fn results(&self, out: &str) -> String {
        fs::read_to_string(self.folder.path().join(out).join("results.jsonl")).unwrap()
    }

    fn logs(&self) -> String {
        self.orchestrators.iter().map(Service::log).collect::<Vec<_>>().join("\n")
    }
}

fn storm(kills: usize, what: &'static [&'static str], units: usize) {
    let mut storm = Storm::begin("faults", what, 2);
    let mut random = fastrand::Rng::with_seed(SEED);
    // Each component in each stage, as often as any other, in an order drawn by chance.
    let components = if storm.postgres.is_some() { 8 } else { 7 };
    let mut planned: Vec<(usize, &str)> = (0..kills).map(|n| (n % components, STAGES[(n / components + n % components) % STAGES.len()])).collect();
    random.shuffle(&mut planned);
    let mut killed: BTreeMap<(usize, &str), usize> = BTreeMap::new();
    let mut deaths: Vec<Death> = Vec::new();
    let mut jobs: Vec<String> = Vec::new();
    let mut since = Instant::now();
    while !planned.is_empty() {
        let stages: Vec<&str> = planned.iter().map(|(_, stage)| *stage).collect();
        let then = Duration::from_millis(random.u64(..20));
        let caught = jobs.last().and_then(|_| storm.recorder.catch(&stages, then, Duration::from_secs(1)));
        let Some(stage) = caught else {
            if jobs.last().is_none_or(|id| storm.is_done(id)) {
                jobs.push(storm.create(jobs.len(), &[]));
                since = Instant::now();
            }
            assert!(since.elapsed() < PATIENCE, "nothing comes of a job: {}", storm.logs());
            continue;
        };
        let (component, _) = planned.remove(stages.iter().position(|planned| *planned == stage).unwrap());
        *killed.entry((component, stage)).or_default() += 1;
        deaths.push(storm.kill_and_restart(component, Duration::from_millis(random.u64(..400))));
        since = Instant::now();
    }
    for (number, id) in jobs.iter().enumerate() {
        storm.wait_for(id);
        assert_eq!(storm.exported(number, id, units), storm.undisturbed(number));
    }
    println!("{} jobs of {units} units, {kills} kills, by component and the stage that calls were in flight of:", jobs.len());
    println!("  {:<20}{}", "", STAGES.map(|stage| format!("{stage:>12}")).concat());
    for (component, name) in COMPONENTS.iter().enumerate().take(components) {
        let counts = STAGES.map(|stage| format!("{:>12}", killed.get(&(component, stage)).copied().unwrap_or_default()));
        println!("  {name:<20}{}", counts.concat());
    }
    let asked = storm.recorder.asked(&deaths);
    println!("{} calls of models, {} of them again, of {} that were in flight at the kills,", asked.calls, asked.repeated, asked.in_flight);
    println!("and {} that both orchestrators made at a time", asked.side_by_side);
    assert!(asked.calls > 0 && asked.unexplained.is_empty(), "made again though nobody died meanwhile:\n{}", asked.unexplained.join("\n"));

    // Another job over what the first worked on, of which other labels are wanted.
    let since = Instant::now();
    storm.wait_for(&storm.create(0, &["--labels", "1"]));
    println!("the first job's inputs once more: {:.1} s", since.elapsed().as_secs_f64());
    assert_eq!(storm.recorder.asked(&deaths).calls, asked.calls, "no model is called");
}

#[test]
fn jobs_survive_twenty_kills() {
    storm(20, &["targets/planted/planted.onnx", "--layer", "mixture"], 24);
}

#[test]
#[ignore = "takes some minutes: 200 kills"]
fn jobs_survive_two_hundred_kills() {
    storm(200, &["targets/resnet/resnet.onnx", "--layer", "layer3"], 64);
}

#[test]
#[ignore = "takes some minutes: the same job three times"]
fn one_two_and_four_orchestrators_give_the_same() {
    const UNITS: usize = 64;
    let results: Vec<String> = [1, 2, 4]
        .map(|orchestrators| {
            let storm = Storm::begin("orchestrators", &["targets/resnet/resnet.onnx", "--layer", "layer3"], orchestrators);
            let id = storm.create(0, &[]);
            let since = Instant::now();
            storm.wait_for(&id);
            println!("{orchestrators} orchestrators: {:.2} units a second", UNITS as f64 / since.elapsed().as_secs_f64());
            storm.exported(0, &id, UNITS)
        })
        .into();
    assert!(results.iter().all(|of| *of == results[0]));
}
