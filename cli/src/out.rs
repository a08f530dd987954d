//! What a run leaves in its folder: pictures by digest, results as lines, a table, a report, and how they came about.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io::{self, BufRead as _, BufReader, BufWriter, Seek as _, Write as _},
    ops::Range,
    os::{
        fd::AsFd as _,
        unix::fs::{FileExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    pin::pin,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use dnd_mesh::{balance::Balanced, blobs};
use dnd_proto::v1::{
    GetPicturesRequest, JobAccepted, JobDone, Provenance, SkippedPicture, UnitResult, UnitState, Usage, get_pictures_response::Result as Got,
    picture_service_client::PictureServiceClient,
};
use dnd_results::{
    report::{About, Report, digests},
    table::{COLUMNS, cell, row},
};
pub(crate) use dnd_results::{
    report::{notices, spent},
    table::state,
};
use futures::{Stream, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use crate::{problem::Problem, watch};

const RESULTS: &str = "results.jsonl";
const TABLE: &str = "results.csv";
const REPORT: &str = "report.html";
const SKIPPED: &str = "skipped.csv";
const RUN: &str = "run.json";
const PICTURES_FOLDER: &str = "pictures";
/// Hidden, so that nobody takes it for the results, and it can go as a whole.
const DATA: &str = ".dnd";
/// Digests of one call for pictures.
const PICTURES: usize = 256;

/// The folder of a run.
pub(crate) struct Folder {
    root: PathBuf,
    /// The results so far; none before there is a job.
    lines: Option<File>,
    /// Where in them a unit's line is.
    places: HashMap<(String, u32), Range<u64>>,
    /// The units so far, without most of their evidence: of that there may be more than memory.
    units: Vec<UnitResult>,
    skipped: Vec<SkippedPicture>,
    pictures: HashSet<String>,
    accepted: Option<JobAccepted>,
    warnings: Vec<String>,
    usage: Option<Usage>,
    started: SystemTime,
}

/// `run.json`.
#[derive(Serialize)]
struct Run<'r> {
    version: &'static str,
    /// Whether it was ended before all units were finished; so it stands here until it ends.
    interrupted: bool,
    started_unix_seconds: u64,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    provenance: Option<&'r Provenance>,
    notices: Vec<&'r str>,
    units: BTreeMap<&'static str, usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pictures: Option<u64>,
    skipped_pictures: usize,
    warnings: &'r [String],
    /// Only where the job came to its end.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    stages: BTreeMap<&'static str, StageRun>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageRun>,
}

/// What a language model behind an HTTP endpoint was asked.
#[derive(Serialize)]
struct UsageRun {
    calls: u64,
    prompt_tokens: u64,
    answer_tokens: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<f64>,
}

#[derive(Serialize)]
struct StageRun {
    /// Added up over the units that were worked on side by side.
    seconds: f64,
    calls: u64,
    reused: u64,
}

impl Folder {
    /// A folder for a run's results; nothing is written before its job is accepted. One that holds a run that was finished is left alone, unless it is to
    /// be replaced; one of which a run was broken off is begun again.
    pub(crate) fn new(root: &Path, replace: bool) -> Result<Self, Problem> {
        let there = [RESULTS, TABLE, REPORT, SKIPPED, RUN, PICTURES_FOLDER].into_iter().find(|name| root.join(name).exists());
        let broken_off = is_broken_off(root);
        if let (Some(name), false, false) = (there, replace, broken_off) {
            let message = "is there already; name another folder with --out, or replace what a run leaves in it with --fresh";
            return Err(Problem::input(format!("{}: {message}", root.join(name).display())));
        }
        if broken_off && !replace {
            eprintln!("{} holds a run that was broken off: it goes on", root.display());
        }
        Ok(Self {
            root: root.to_owned(),
            lines: None,
            places: HashMap::new(),
            units: Vec::new(),
            skipped: Vec::new(),
            pictures: HashSet::new(),
            accepted: None,
            warnings: Vec::new(),
            usage: None,
            started: SystemTime::now(),
        })
    }

    /// Where a run keeps what its models make, unless it is told of another place.
    pub(crate) fn data(root: &Path) -> PathBuf {
        root.join(DATA)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn units(&self) -> &[UnitResult] {
        &self.units
    }

    /// Whether there is a job whose results these are.
    pub(crate) fn has_begun(&self) -> bool {
        self.accepted.is_some()
    }

    /// The job is there: begins its results. Pictures that are there stay, until it is known which of them are the results'.
    pub(crate) fn accepted(&mut self, accepted: JobAccepted) -> Result<(), Problem> {
        let pictures = self.root.join(PICTURES_FOLDER);
        fs::create_dir_all(&pictures).map_err(|e| Problem::file(&pictures, &e))?;
        let path = self.root.join(RESULTS);
        self.lines = Some(File::create(&path).map_err(|e| Problem::file(&path, &e))?);
        self.warnings.extend(accepted.warnings.iter().cloned());
        self.accepted = Some(accepted);
        self.write_run(None)
    }

    pub(crate) fn skipped(&mut self, skipped: SkippedPicture) {
        self.skipped.push(skipped);
    }

    pub(crate) fn skipped_count(&self) -> usize {
        self.skipped.len()
    }

    /// Failed units are tried again: what was told of them is over.
    pub(crate) fn retried(&mut self) {
        self.units.retain(|unit| unit.state() != UnitState::Failed);
    }

    /// Something that the person who reads the results should know.
    pub(crate) fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    /// What a language model behind an HTTP endpoint was asked so far.
    pub(crate) fn used(&mut self, usage: Option<Usage>) {
        self.usage = usage.or(self.usage);
    }

    pub(crate) fn usage(&self) -> Option<&Usage> {
        self.usage.as_ref()
    }

    /// Keeps a finished unit: its pictures first, then its line.
    pub(crate) async fn unit(&mut self, unit: UnitResult, service: &mut PictureServiceClient<Balanced>) -> Result<(), Problem> {
        let named: HashSet<String> = digests(&unit).filter(|digest| !self.pictures.contains(*digest)).map(str::to_owned).collect();
        // What is there under its name is whole.
        let (there, missing): (Vec<String>, Vec<String>) = named.into_iter().partition(|digest| self.root.join(PICTURES_FOLDER).join(digest).is_file());
        self.pictures.extend(there);
        for some in missing.chunks(PICTURES) {
            let mut pictures = service.get_pictures(GetPicturesRequest { digests: some.to_vec() }).await?.into_inner();
            while let Some(got) = pictures.message().await? {
                match got.result {
                    // Only what was asked for, and is what its name says, is written.
                    Some(Got::Picture(bytes)) if some.contains(&got.digest) && blobs::digest(&bytes) == got.digest => {
                        write_whole(&self.root.join(PICTURES_FOLDER).join(&got.digest), |file| file.write_all(&bytes))?;
                        self.pictures.insert(got.digest);
                    }
                    Some(Got::Status(status)) => self.warnings.push(format!("a picture of {} unit {} is missing: {}", unit.layer, unit.unit, status.message)),
                    _ => self.warnings.push(format!("a picture of {} unit {} came otherwise than it was asked for, and was left out", unit.layer, unit.unit)),
                }
            }
        }
        let line = line(&unit)?;
        let path = self.root.join(RESULTS);
        if let Some(lines) = &mut self.lines {
            let written = lines.stream_position().and_then(|from| lines.write_all(line.as_bytes()).map(|()| from));
            let from = written.map_err(|e| Problem::file(&path, &e))?;
            self.places.insert((unit.layer.clone(), unit.unit), from..from + line.len() as u64);
        }
        self.units.push(in_short(unit));
        Ok(())
    }

    /// Writes everything that is written at the end: whole for a job that is done, and for what there is of one that was interrupted. Nothing if
    /// there never was a job. `done` is what the mesh said at its end, if it came to that.
    pub(crate) fn finish(&mut self, done: Option<&JobDone>) -> Result<(), Problem> {
        if self.accepted.is_none() {
            return Ok(());
        }
        self.sort();
        let pictures = self.root.join(PICTURES_FOLDER);
        remove_pictures(&pictures, &self.pictures).map_err(|e| Problem::file(&pictures, &e))?;
        self.write_lines()?;
        self.write_table()?;
        write_whole(&self.root.join(SKIPPED), |file| {
            let mut table = csv::Writer::from_writer(file);
            table.write_record(["path", "reason"])?;
            for skipped in &self.skipped {
                table.write_record([cell(&skipped.path), cell(&skipped.reason)])?;
            }
            table.flush()
        })?;
        self.write_run(done)?;
        self.write_report(done)
    }

    /// The results in their order, out of those that were written as they came.
    fn write_lines(&self) -> Result<(), Problem> {
        let path = self.root.join(RESULTS);
        let written = File::open(&path).map_err(|e| Problem::file(&path, &e))?;
        write_whole(&path, |file| {
            for unit in &self.units {
                let place = self.places.get(&(unit.layer.clone(), unit.unit)).cloned().unwrap_or_default();
                let mut line = vec![0; (place.end - place.start) as usize];
                written.read_exact_at(&mut line, place.start)?;
                file.write_all(&line)?;
            }
            Ok(())
        })
    }

    fn write_report(&self, done: Option<&JobDone>) -> Result<(), Problem> {
        let (path, pictures) = (self.root.join(RESULTS), self.root.join(PICTURES_FOLDER));
        let lines = File::open(&path).map_err(|e| Problem::file(&path, &e))?;
        let about = About { provenance: self.provenance(), warnings: &self.all_warnings(done), skipped: self.skipped.len(), usage: self.usage.as_ref() };
        write_whole(&self.root.join(REPORT), |file| {
            let units = self.units.iter().map(|unit| (unit.layer.as_str(), unit.state()));
            let (mut report, head) = Report::begin(&about, units).map_err(io::Error::other)?;
            file.write_all(head.as_bytes())?;
            for line in BufReader::new(lines).lines() {
                let part = report.unit(&serde_json::from_str(&line?)?, &|digest| fs::read(pictures.join(digest)).ok().map(Into::into));
                file.write_all(part.map_err(io::Error::other)?.as_bytes())?;
            }
            file.write_all(report.end().as_bytes())
        })
    }

    fn provenance(&self) -> Option<&Provenance> {
        self.accepted.as_ref()?.provenance.as_ref()
    }

    /// The mesh's, and those of what came from it.
    fn all_warnings(&self, done: Option<&JobDone>) -> Vec<String> {
        done.iter().flat_map(|done| &done.warnings).chain(&self.warnings).cloned().collect()
    }

    /// `run.json`: at the beginning, to say that there is a run, and at its end.
    fn write_run(&self, done: Option<&JobDone>) -> Result<(), Problem> {
        let warnings = self.all_warnings(done);
        let run = Run {
            version: env!("CARGO_PKG_VERSION"),
            interrupted: done.is_none_or(|done| done.cancelled),
            started_unix_seconds: self.started.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            seconds: self.started.elapsed().map_or(0.0, |since| since.as_secs_f64()),
            provenance: self.provenance(),
            notices: notices(self.provenance()),
            units: [("labelled", UnitState::Labelled), ("dead", UnitState::Dead), ("failed", UnitState::Failed)]
                .map(|(name, state)| (name, self.units.iter().filter(|unit| unit.state() == state).count()))
                .into(),
            pictures: done.map(|done| done.pictures),
            skipped_pictures: self.skipped.len(),
            warnings: &warnings,
            stages: done
                .iter()
                .flat_map(|done| &done.times)
                .map(|time| (watch::name(time.stage()), StageRun { seconds: time.seconds, calls: time.calls, reused: time.reused }))
                .collect(),
            usage: self.usage.map(|Usage { calls, prompt_tokens, answer_tokens, cost }| UsageRun { calls, prompt_tokens, answer_tokens, cost }),
        };
        write_whole(&self.root.join(RUN), |file| Ok(serde_json::to_writer_pretty(file, &run)?))
    }

    /// In the order that was asked for, whatever order they were finished in.
    fn sort(&mut self) {
        let layers: Vec<String> = self.accepted.iter().flat_map(|accepted| &accepted.layers).map(|layer| layer.layer.clone()).collect();
        let place = |unit: &UnitResult| (layers.iter().position(|layer| *layer == unit.layer), unit.unit);
        self.units.sort_by_key(place);
        self.skipped.sort_by(|a, b| a.path.cmp(&b.path));
    }

    fn write_table(&self) -> Result<(), Problem> {
        write_whole(&self.root.join(TABLE), |file| {
            let mut table = csv::Writer::from_writer(file);
            table.write_record(COLUMNS)?;
            for unit in &self.units {
                table.write_record(row(unit))?;
            }
            table.flush()
        })
    }
}

fn line(unit: &UnitResult) -> Result<String, Problem> {
    let line = serde_json::to_string(unit).map_err(|e| Problem::failure(format!("a result can't be written as JSON: {e}")))?;
    Ok(line + "\n")
}

/// What is told of a unit beside its evidence.
fn in_short(mut unit: UnitResult) -> UnitResult {
    unit.concepts.iter_mut().for_each(|concept| concept.pictures = Vec::new());
    unit.images.truncate(1);
    (unit.probed, unit.crops, unit.answers) = Default::default();
    unit
}

/// Text of models, files and other machines for a terminal: without what would move its cursor, change its colours, or turn the order of letters round.
pub(crate) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && !matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')).collect()
}

/// Takes away what is named by a digest and is not among these: pictures of a run whose results were replaced.
fn remove_pictures(folder: &Path, but: &HashSet<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.len() == 64 && name.bytes().all(|c| c.is_ascii_hexdigit()) && !but.contains(&*name) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a folder holds a run that came to no end.
fn is_broken_off(root: &Path) -> bool {
    #[derive(Deserialize)]
    struct Ended {
        interrupted: bool,
    }
    fs::read(root.join(RUN)).ok().and_then(|run| serde_json::from_slice(&run).ok()).is_some_and(|ended: Ended| ended.interrupted)
}

/// Writes a file beside its place and moves it there: it is whole, or as it was.
fn write_whole(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<(), Problem> {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let part = path.with_file_name(format!(".{name}.part"));
    let written = File::create(&part).and_then(|file| {
        let mut file = BufWriter::new(file);
        write(&mut file)?;
        file.flush()?;
        fs::rename(&part, path)
    });
    written.map_err(|e| Problem::file(path, &e))
}

/// Writes a file as its parts come; it is there when it is whole. A `replace`d one stays as it is until then.
pub(crate) async fn write_parts<E: Into<Problem>>(path: &Path, replace: bool, parts: impl Stream<Item = Result<Bytes, E>>) -> Result<(), Problem> {
    if path.is_dir() {
        return Err(Problem::input(format!("{}: a folder; --out names the file to write", path.display())));
    }
    if path.exists() && !replace {
        return Err(Problem::input(format!("{}: is there already; name another file with --out, or replace it with --fresh", path.display())));
    }
    let failed = |error: io::Error| Problem::file(path, &error);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // It goes if this is broken off, and has the mode that other files get.
    let part = tempfile::Builder::new().prefix(".dnd-").permissions(fs::Permissions::from_mode(0o666)).tempfile_in(folder).map_err(failed)?;
    pour(part.reopen().map(tokio::fs::File::from_std).map_err(failed)?, path, parts).await?;
    part.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// Writes parts to standard output as they come.
pub(crate) async fn print_parts<E: Into<Problem>>(parts: impl Stream<Item = Result<Bytes, E>>) -> Result<(), Problem> {
    let (path, stdout) = (Path::new("standard output"), io::stdout().as_fd().try_clone_to_owned());
    pour(tokio::fs::File::from_std(stdout.map_err(|error| Problem::file(path, &error))?.into()), path, parts).await
}

async fn pour<E: Into<Problem>>(mut to: impl AsyncWrite + Unpin, path: &Path, parts: impl Stream<Item = Result<Bytes, E>>) -> Result<(), Problem> {
    let mut parts = pin!(parts);
    while let Some(part) = parts.try_next().await.map_err(Into::into)? {
        to.write_all(&part).await.map_err(|error| Problem::file(path, &error))?;
    }
    to.flush().await.map_err(|error| Problem::file(path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_does_nothing_to_a_terminal() {
        assert_eq!(printable("\u{1b}]0;title\u{7}\u{1b}[31mred\u{9b}2J \u{202e}dogs\r\n"), "]0;title[31mred2J dogs");
        assert_eq!(printable("Ω 图, naïve"), "Ω 图, naïve");
    }

    #[test]
    fn results_are_not_written_over() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join(RESULTS), "precious").unwrap();
        let pictures = root.path().join(PICTURES_FOLDER);
        fs::create_dir(&pictures).unwrap();
        fs::write(pictures.join("a".repeat(64)), "of that run").unwrap();
        fs::write(pictures.join("mine.png"), "of someone else").unwrap();
        assert!(Folder::new(root.path(), false).is_err());
        let mut replacing = Folder::new(root.path(), true).unwrap();
        replacing.finish(None).unwrap();
        assert_eq!(fs::read_to_string(root.path().join(RESULTS)).unwrap(), "precious", "not before there is something to replace them with");
        replacing.accepted(JobAccepted::default()).unwrap();
        assert_eq!(fs::read_to_string(root.path().join(RESULTS)).unwrap(), "");
        replacing.finish(None).unwrap();
        let left: Vec<_> = fs::read_dir(&pictures).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["mine.png"]);
    }
}
