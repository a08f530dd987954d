//! The same of SQLite and, where there is a server for tests, of PostgreSQL.

use std::{collections::BTreeMap, time::Duration};

use dnd_mesh::Fault;
use dnd_proto::v1::{
    DissectRequest, JobAccepted, JobEvent, JobState, LayerUnits, ProbedUnit, Rating, SkippedPicture, Stage, Study, StudyUnit, UnitResult, UnitState, Usage,
    job_event::Event,
};
use futures::TryStreamExt as _;
use tempfile::TempDir;
use tokio::runtime::Handle;
use tonic::Code;

use super::{studies::Rated, *};
use crate::{database::Database, watch::watch};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);

/// An empty database of each kind, and what they lie in.
async fn databases() -> Vec<(Database, TempDir)> {
    let folder = tempfile::tempdir().unwrap();
    let mut databases = vec![(Database::in_folder(folder.path()).await.unwrap(), folder)];
    if let Some(database) = Database::of_a_test().await {
        databases.push((database, tempfile::tempdir().unwrap()));
    }
    databases
}

fn new_job(request_id: &str, units: u32) -> NewJob {
    let id = uuid::Uuid::now_v7().to_string();
    let accepted = JobAccepted { job_id: id.clone(), layers: vec![LayerUnits { layer: "layer".into(), units: (0..units).collect() }], ..Default::default() };
    NewJob { id, request: DissectRequest { request_id: request_id.into(), ..Default::default() }, accepted }
}

/// A job whose units can be taken; gives its id.
async fn probed_job(store: &Store, units: u32) -> String {
    let new = new_job("", units);
    assert!(store.create(&new).await.unwrap());
    let Some(Claim::Pass(pass)) = store.claim(|job| job == new.id).await.unwrap() else { panic!("no pass") };
    let found: Vec<_> = (1..).zip((0..units).map(|unit| ProbedUnit { layer: "layer".into(), unit, ..Default::default() })).collect();
    store.probed(&pass, &found).await.unwrap();
    let skipped = vec![SkippedPicture { path: "broken.png".into(), reason: "not a picture".into() }];
    store.passed(&pass, Passed { skipped, pictures: 7, warnings: vec!["few".into()] }, BTreeMap::new()).await.unwrap();
    new.id
}

async fn take(store: &Store) -> Option<Lease> {
    match store.claim(|_| true).await.unwrap()? {
        Claim::Unit(lease, probed) => {
            assert_eq!(i64::from(probed.unit) + 1, lease.place);
            Some(lease)
        }
        Claim::Pass(lease) => panic!("a pass of {lease:?}"),
    }
}

fn result(lease: &Lease, state: UnitState) -> UnitResult {
    let labels = if state == UnitState::Labelled { vec![format!("Red {}% circles", lease.place), "Ärger_1".into()] } else { Vec::new() };
    UnitResult { layer: "layer".into(), unit: lease.place as u32 - 1, state: state.into(), labels, reason: "odd".into(), ..Default::default() }
}

fn lost<T: std::fmt::Debug>(outcome: super::Result<T>) {
    assert!(matches!(outcome, Err(StoreError::Lost)), "{outcome:?}");
}

fn why(by_itself: bool) -> Pause {
    Pause { fault: Fault::new(Code::Unavailable, "SERVICE_AWAY", "the captioner service: gone"), by_itself }
}

/// What happened, without the evidence.
async fn happened(store: &Store, job: &str) -> Vec<String> {
    let mut told = Vec::new();
    let mut after = 0;
    loop {
        let events = store.events(job, after).await.unwrap();
        let Some(JobEvent { number, .. }) = events.last() else { return told };
        after = *number;
        told.extend(events.into_iter().map(|event| match event.event.unwrap() {
            Event::Accepted(_) => "accepted".to_owned(),
            Event::Skipped(skipped) => format!("skipped {}", skipped.path),
            Event::Unit(unit) => format!("unit {} {:?}", unit.unit, unit.state()),
            Event::Paused(paused) => format!("paused {}", paused.reason),
            Event::Resumed(resumed) => format!("resumed {}", resumed.retried),
            Event::Done(done) => format!("done {} {} {} {}", done.labelled, done.dead, done.failed, done.cancelled),
            Event::Progress(_) => panic!("progress has no number"),
        }));
    }
}

#[tokio::test]
async fn a_request_is_one_job_however_many_ask_at_once() {
    for (database, _folder) in databases().await {
        let stores = [Store::new(database.clone(), LONG), Store::new(database, LONG)];
        let asked = futures::future::join_all((0..8).map(|n| {
            let store = &stores[n % 2];
            async move { store.create(&new_job("the same", 3)).await.unwrap() }
        }));
        assert_eq!(asked.await.into_iter().filter(|created| *created).count(), 1);
        let (id, _) = stores[0].find("the same").await.unwrap().unwrap();
        assert_eq!(stores[1].jobs(None, 10).await.unwrap().into_iter().map(|job| job.job_id).collect::<Vec<_>>(), [id]);
    }
}

#[tokio::test]
async fn units_wait_for_the_pass_and_each_is_taken_once_by_whichever_process() {
    for (database, _folder) in databases().await {
        let (one, other) = (Store::new(database.clone(), LONG), Store::new(database, LONG));
        let new = new_job("", 40);
        one.create(&new).await.unwrap();
        assert!(matches!(other.claim(|_| true).await.unwrap(), Some(Claim::Pass(_))));
        assert!(one.claim(|_| true).await.unwrap().is_none(), "the pass is taken, and no unit is probed");
        let job = probed_job(&one, 40).await;
        let all = async |store: &Store| {
            let mut places = Vec::new();
            while let Some(lease) = take(store).await {
                assert_eq!(lease.job, job);
                places.push(lease.place);
            }
            places
        };
        let (a, b) = tokio::join!(all(&one), all(&other));
        let mut places = [a, b].concat();
        places.sort_unstable();
        assert_eq!(places, (1..=40).collect::<Vec<i64>>());
        assert!(one.claim(|_| false).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn a_process_that_was_stopped_past_its_lease_writes_nothing() {
    for (database, _folder) in databases().await {
        let (slow, quick) = (Store::new(database.clone(), SHORT), Store::new(database, LONG));
        let job = probed_job(&quick, 1).await;
        let stale = take(&slow).await.unwrap();
        slow.renew(&stale).await.unwrap();
        slow.through(&stale, Stage::Crop, BTreeMap::new()).await.unwrap();
        tokio::time::sleep(2 * SHORT).await;
        // Before another has it, and after.
        for taken in [None, Some(&quick)] {
            let lease = match taken {
                Some(store) => take(store).await,
                None => None,
            };
            let before = (happened(&quick, &job).await, quick.units(&job, &UnitFilter { most: 9, ..Default::default() }).await.unwrap());
            lost(slow.through(&stale, Stage::Caption, BTreeMap::new()).await);
            lost(slow.finish(&stale, &result(&stale, UnitState::Labelled), BTreeMap::new()).await);
            lost(slow.again(&stale, Duration::ZERO, BTreeMap::new()).await);
            lost(slow.pause(&stale, &why(true), BTreeMap::new()).await);
            lost(slow.fail(&stale, &Fault::internal("no")).await);
            lost(slow.passed(&stale, Passed::default(), BTreeMap::new()).await);
            lost(slow.probing(&stale, 1, 2).await);
            lost(slow.probed(&stale, &[]).await);
            lost(slow.renew(&stale).await);
            assert_eq!((happened(&quick, &job).await, quick.units(&job, &UnitFilter { most: 9, ..Default::default() }).await.unwrap()), before);
            if let Some(lease) = lease {
                quick.finish(&lease, &result(&lease, UnitState::Dead), BTreeMap::new()).await.unwrap();
            }
        }
        assert_eq!(happened(&quick, &job).await, ["accepted", "skipped broken.png", "unit 0 Dead", "done 0 1 0 false"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_taken_of_a_job_that_is_cancelled_while_its_work_is_looked_for() {
    for (database, _folder) in databases().await {
        let store = Store::new(database, LONG);
        let job = probed_job(&store, 1).await;
        let cancel = |_: &str| {
            tokio::task::block_in_place(|| Handle::current().block_on(store.cancel(&job))).unwrap();
            true
        };
        assert!(store.claim(cancel).await.unwrap().is_none());
        store.resume(&job, false).await.unwrap();
        assert!(take(&store).await.is_some(), "it is nobody's");
    }
}

#[tokio::test]
async fn a_large_job_does_not_hold_up_a_small_one() {
    for (database, _folder) in databases().await {
        let store = Store::new(database, LONG);
        let large = probed_job(&store, 300).await;
        let small = probed_job(&store, 10).await;
        // Side by side they have as much in work.
        let mut leases = Vec::new();
        for _ in 0..8 {
            leases.push(take(&store).await.unwrap());
        }
        assert_eq!(leases.iter().filter(|lease| lease.job == small).count(), 4);
        // One after the other they have turns by chance: 60 are enough for 6 as good as always.
        for _ in 0..60 {
            let lease = leases.pop().unwrap();
            store.finish(&lease, &result(&lease, UnitState::Labelled), BTreeMap::new()).await.unwrap();
            leases.insert(0, take(&store).await.unwrap());
        }
        for lease in leases {
            store.finish(&lease, &result(&lease, UnitState::Labelled), BTreeMap::new()).await.unwrap();
        }
        let state = async |id: &str| store.job(id).await.unwrap().unwrap().state();
        assert_eq!((state(&small).await, state(&large).await), (JobState::Done, JobState::Running));
    }
}

#[tokio::test]
async fn watchers_of_a_job_that_many_write_to_see_each_event_once_and_in_order() {
    for (database, _folder) in databases().await {
        let stores: Vec<Store> = (0..3).map(|_| Store::new(database.clone(), LONG)).collect();
        let job = probed_job(&stores[0], 90).await;
        let work = futures::future::join_all(stores.iter().map(|store| async move {
            while let Some(lease) = take(store).await {
                store.through(&lease, Stage::Caption, BTreeMap::new()).await.unwrap();
                store.finish(&lease, &result(&lease, UnitState::Labelled), BTreeMap::new()).await.unwrap();
            }
        }));
        // One from the beginning; one that is broken off after 20 events, and goes on at another process.
        let numbers = async |store: &Store, after: u64, most: usize| {
            let events = watch(store.clone(), job.clone(), after).try_filter(|event| std::future::ready(event.number > 0));
            futures::StreamExt::take(events, most).map_ok(|event| event.number).try_collect::<Vec<u64>>().await.unwrap()
        };
        let broken_off = async {
            let mut seen = numbers(&stores[1], 0, 20).await;
            seen.extend(numbers(&stores[2], 20, usize::MAX).await);
            seen
        };
        let (_, whole, parts) = tokio::join!(work, numbers(&stores[0], 0, usize::MAX), broken_off);
        // Accepted, skipped, 90 units, done.
        let all: Vec<u64> = (1..=93).collect();
        assert_eq!((whole, parts), (all.clone(), all));
        let mut units: Vec<String> = happened(&stores[0], &job).await.into_iter().filter(|event| event.starts_with("unit")).collect();
        units.dedup();
        assert_eq!(units.len(), 90);
    }
}

#[tokio::test]
async fn a_job_pauses_goes_on_is_cancelled_resumed_and_deleted() {
    for (database, _folder) in databases().await {
        let store = Store::new(database, LONG);
        let job = probed_job(&store, 3).await;
        let state = async || store.standing(&job).await.unwrap().unwrap();
        let [a, b] = [take(&store).await.unwrap(), take(&store).await.unwrap()];
        store.pause(&a, &why(false), BTreeMap::new()).await.unwrap();
        assert!(store.claim(|_| true).await.unwrap().is_none());
        assert_eq!(state().await.fault.unwrap().reason(), "SERVICE_AWAY");
        // What was in work goes on, and what meets the same says nothing new.
        store.pause(&b, &why(false), BTreeMap::new()).await.unwrap();
        assert!(store.due().await.unwrap().is_empty(), "it waits for someone");
        store.resume(&job, false).await.unwrap();
        let a = take(&store).await.unwrap();
        assert_eq!((a.place, a.attempts), (1, 0), "a pause is no attempt");
        store.pause(&a, &why(true), BTreeMap::new()).await.unwrap();
        assert!(store.due().await.unwrap().is_empty(), "not yet");
        tokio::time::sleep(Duration::from_millis(3100)).await;
        assert_eq!(store.due().await.unwrap(), std::slice::from_ref(&job));
        store.go_on(&job).await.unwrap();
        store.go_on(&job).await.unwrap();

        let [a, b] = [take(&store).await.unwrap(), take(&store).await.unwrap()];
        let usage = Usage { calls: 2, prompt_tokens: 30, answer_tokens: 4, cost: Some(0.5) };
        let tally = |usage| BTreeMap::from([(Stage::Summarize, Tally { time: Duration::from_secs(2), calls: 3, reused: 1, usage })]);
        store.finish(&a, &result(&a, UnitState::Failed), tally(Some(usage))).await.unwrap();
        store.cancel(&job).await.unwrap();
        lost(store.finish(&b, &result(&b, UnitState::Labelled), BTreeMap::new()).await);
        assert_eq!(state().await.state, JobState::Cancelled);
        store.resume(&job, true).await.unwrap();
        let mut states = vec![UnitState::Dead, UnitState::Failed, UnitState::Labelled];
        while let Some(lease) = take(&store).await {
            store.finish(&lease, &result(&lease, states.pop().unwrap()), tally(Some(usage))).await.unwrap();
        }
        let done = store.job(&job).await.unwrap().unwrap();
        let done = (done.state(), done.done.unwrap());
        assert_eq!((done.0, done.1.pictures, done.1.warnings.as_slice()), (JobState::Done, 7, ["few".to_owned()].as_slice()));
        assert_eq!((done.1.usage.unwrap().calls, done.1.usage.unwrap().cost, done.1.times[0].calls), (8, Some(2.0), 12));
        store.resume(&job, false).await.unwrap();
        store.resume(&job, true).await.unwrap();
        let again = take(&store).await.unwrap();
        store.finish(&again, &result(&again, UnitState::Labelled), BTreeMap::new()).await.unwrap();
        let told = [
            "accepted",
            "skipped broken.png",
            "paused SERVICE_AWAY",
            "resumed 0",
            "paused SERVICE_AWAY",
            "resumed 0",
            "unit 0 Failed",
            "done 0 0 1 true",
            "resumed 1",
            "unit 0 Labelled",
            "unit 1 Failed",
            "unit 2 Dead",
            "done 1 1 1 false",
            "resumed 1",
            "unit 1 Labelled",
            "done 2 1 0 false",
        ];
        assert_eq!(happened(&store, &job).await, told);

        assert!(store.delete(&job).await.unwrap() && !store.delete(&job).await.unwrap());
        assert!(store.job(&job).await.unwrap().is_none() && store.events(&job, 0).await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn units_are_listed_by_pages_layers_states_and_words() {
    for (database, _folder) in databases().await {
        let store = Store::new(database, LONG);
        let job = probed_job(&store, 25).await;
        for state in [UnitState::Labelled, UnitState::Dead, UnitState::Failed, UnitState::Labelled] {
            let lease = take(&store).await.unwrap();
            store.finish(&lease, &result(&lease, state), BTreeMap::new()).await.unwrap();
        }
        let list = async |filter: UnitFilter| -> Vec<u32> { store.units(&job, &filter).await.unwrap().into_iter().map(|(_, unit)| unit.unit).collect() };
        let most = 10;
        assert_eq!(list(UnitFilter { most, ..Default::default() }).await, (0..10).collect::<Vec<_>>());
        assert_eq!(list(UnitFilter { after: 20, most, ..Default::default() }).await, (20..25).collect::<Vec<_>>());
        assert_eq!(list(UnitFilter { most, state: UnitState::Failed, ..Default::default() }).await, [2]);
        assert!(list(UnitFilter { most, layer: "other".into(), ..Default::default() }).await.is_empty());
        let with = |text: &str| UnitFilter { most, text: text.into(), ..Default::default() };
        assert_eq!(list(with("RED")).await, [0, 3]);
        assert_eq!((list(with("4%")).await, list(with("4_")).await, list(with("äRGER_")).await), (vec![3], vec![], vec![0, 3]));
        let open = store.unit(&job, "layer", 20).await.unwrap().unwrap();
        assert_eq!((open.unit, open.state()), (20, UnitState::Unspecified));
        assert_eq!(store.unit(&job, "layer", 1).await.unwrap().unwrap().state(), UnitState::Dead);
        assert!(store.unit(&job, "layer", 25).await.unwrap().is_none());
        let progress = store.progress(&job).await.unwrap();
        assert!(progress.iter().all(|stage| (stage.done, stage.total) == (4, 25)), "{progress:?}");
        let lease = take(&store).await.unwrap();
        store.through(&lease, Stage::Caption, BTreeMap::new()).await.unwrap();
        let done: Vec<u64> = store.progress(&job).await.unwrap().iter().map(|stage| stage.done).collect();
        assert_eq!(done, [5, 5, 4, 4, 4], "through cropping and captions is one more");
    }
}

#[tokio::test]
async fn what_a_rater_says_of_a_unit_is_kept_once_and_the_later_counts() {
    for (database, _folder) in databases().await {
        let store = Store::new(database, LONG);
        let unit = |unit| StudyUnit { layer: "layer".into(), unit, labels: vec!["red".into(), "blue".into()], ..Default::default() };
        let study = |id: &str| Study { study_id: id.into(), name: "which?".into(), units: 2, shown: vec![unit(3), unit(7)], ..Default::default() };
        store.create_study(study("1")).await.unwrap();
        store.create_study(study("2")).await.unwrap();
        let rating = |rater: &str, best| Rating { rater: rater.into(), layer: "layer".into(), unit: 7, ratings: vec![1, 5], best, valid: true, rated_at: None };
        for (rater, best) in [("a", 0), ("b", 1), ("a", 1)] {
            assert!(store.rate("1", 1, &rating(rater, best)).await.unwrap());
        }
        assert!(!store.rate("3", 1, &rating("a", 1)).await.unwrap(), "there is no such study");
        let mut ratings = store.ratings("1").await.unwrap();
        assert!(ratings.iter_mut().all(|(_, rating)| rating.rated_at.take().is_some_and(|at| at.seconds > 1_700_000_000)));
        assert_eq!(ratings, [(1, rating("a", 1)), (1, rating("b", 1))]);
        assert_eq!(store.rated("1", "b").await.unwrap(), [(1, Rated { times: 2, by_rater: true })].into());
        assert_eq!(store.rated("1", "c").await.unwrap(), [(1, Rated { times: 2, by_rater: false })].into());

        let found = store.study("1").await.unwrap().unwrap();
        assert_eq!((found.shown.len(), found.responses), (2, 2));
        let listed: Vec<_> = store.studies(None, 9).await.unwrap().into_iter().map(|study| (study.study_id, study.shown.len(), study.responses)).collect();
        assert_eq!(listed, [("2".to_owned(), 0, 0), ("1".to_owned(), 0, 2)]);
        assert_eq!(store.studies(Some("2"), 9).await.unwrap().len(), 1);
        assert!(store.delete_study("1").await.unwrap() && !store.delete_study("1").await.unwrap());
        assert!(store.study("1").await.unwrap().is_none() && store.ratings("1").await.unwrap().is_empty());
    }
}
