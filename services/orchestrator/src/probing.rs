//! The probing pass (3.1, 3.2): every picture of the probing set through the target, which gives each unit's highest activating ones.

use dnd_proto::v1::{ProbeProgress, ProbeResponse, ProbeTotal, ProbedUnit, Stage, probe_response::Event};
use tonic::{Status, Streaming};

use crate::{calls::Calls, steps::looked_at, store::Passed};

/// A pass that is under way.
pub(crate) struct Probing<'c> {
    calls: &'c Calls,
    messages: Streaming<ProbeResponse>,
    passed: Passed,
}

/// What comes of a pass as it goes on.
pub(crate) enum Probed {
    Progress(ProbeProgress),
    Unit(ProbedUnit),
}

impl<'c> Probing<'c> {
    /// Begins the pass of a job.
    pub(crate) async fn begin(calls: &'c Calls) -> Result<Self, Status> {
        Ok(Self { calls, messages: calls.probe().await?, passed: Passed::default() })
    }

    /// What comes next; none at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Probed>, Status> {
        loop {
            let Some(message) = self.messages.message().await? else { return Ok(None) };
            match message.event {
                Some(Event::Unit(unit)) => return Ok(Some(Probed::Unit(unit))),
                Some(Event::Progress(progress)) => return Ok(Some(Probed::Progress(progress))),
                Some(Event::Skipped(skipped)) => self.passed.skipped.push(skipped),
                Some(Event::Total(total)) => self.total(total),
                None => {}
            }
        }
    }

    /// What the pass says beside its units.
    pub(crate) fn end(self) -> Passed {
        self.passed
    }

    fn total(&mut self, total: ProbeTotal) {
        self.calls.progress().calls(Stage::Probe, total.pictures + total.rerun, 0);
        self.passed.pictures = total.pictures;
        let wanted = u64::from(looked_at(self.calls.parameters()));
        if total.pictures < wanted {
            self.passed
                .warnings
                .push(format!("the probing set has {} good pictures, fewer than the {wanted} that are looked at for each unit: all are used", total.pictures));
        }
        if total.duplicates > 0 {
            self.passed.warnings.push(format!("{} pictures were left out because a byte-equal one comes before them", total.duplicates));
        }
    }
}
