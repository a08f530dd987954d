//! How far a job is, on the terminal: a bar a stage with counts and an estimate, or plain lines where there is no terminal.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use dnd_proto::v1::{Stage, StageProgress};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::out::printable;

/// Between two plain lines.
const LINES: Duration = Duration::from_secs(5);

/// Shows a job's progress.
pub(crate) enum Watch {
    Bars { all: MultiProgress, bars: BTreeMap<i32, ProgressBar> },
    Lines { since: Instant, said: Option<Instant>, stages: BTreeMap<i32, StageProgress> },
}

impl Watch {
    pub(crate) fn new() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Bars { all: MultiProgress::new(), bars: BTreeMap::new() }
        } else {
            Self::Lines { since: Instant::now(), said: None, stages: BTreeMap::new() }
        }
    }

    /// A stage went on.
    pub(crate) fn progress(&mut self, progress: &StageProgress) {
        match self {
            Self::Bars { all, bars } => {
                let bar = bars.entry(progress.stage).or_insert_with(|| {
                    let style = ProgressStyle::with_template("{msg:<9} {wide_bar} {pos:>6}/{len:<6} {eta:>5}").unwrap_or_else(|_| ProgressStyle::default_bar());
                    all.add(ProgressBar::new(progress.total).with_style(style).with_message(name(progress.stage())))
                });
                bar.set_length(progress.total);
                bar.set_position(progress.done);
            }
            Self::Lines { since, said, stages } => {
                let before = stages.insert(progress.stage, *progress);
                let ended = progress.done == progress.total && before.is_none_or(|before| before.done < progress.done);
                if ended || said.is_none_or(|said| said.elapsed() >= LINES) {
                    *said = Some(Instant::now());
                    let counts: Vec<String> = stages.values().map(|s| format!("{} {}/{}", name(s.stage()), s.done, s.total)).collect();
                    eprintln!("{:>5} s  {}", since.elapsed().as_secs(), counts.join("  "));
                }
            }
        }
    }

    /// Says a line without disturbing the bars.
    pub(crate) fn say(&self, line: &str) {
        let line = printable(line);
        match self {
            Self::Bars { all, .. } => drop(all.println(line)),
            Self::Lines { .. } => eprintln!("{line}"),
        }
    }

    /// Takes the bars away.
    pub(crate) fn end(&self) {
        if let Self::Bars { all, .. } = self {
            let _ = all.clear();
        }
    }
}

/// What a stage is called.
pub(crate) fn name(stage: Stage) -> &'static str {
    match stage {
        Stage::Unspecified => "?",
        Stage::Probe => "probe",
        Stage::Crop => "crop",
        Stage::Caption => "caption",
        Stage::Summarize => "summarize",
        Stage::Generate => "generate",
        Stage::Score => "score",
    }
}
