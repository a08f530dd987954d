//! What ends a command: a sentence for the person who typed it, and an exit code for the program that ran it.

use std::{fmt, io, path::Path};

use dnd_mesh::{Fault, program::ExitCode, retry::is_away};
use tonic::{Code, Status};

use crate::out::printable;

/// Why a command ended without doing what it was asked to.
#[derive(Debug)]
pub(crate) struct Problem {
    message: String,
    kind: Kind,
    /// Whether the mesh was not there, or not to the end.
    away: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// What was asked for can't be right: exit code 2, as for a wrong flag.
    Input,
    /// It could be right, and failed: exit code 1.
    Failure,
    /// Ctrl-C ended it.
    Interrupted,
}

/// Exit code of a command that Ctrl-C ended.
pub(crate) const INTERRUPTED: u8 = 130;

impl Problem {
    /// Something that was asked for can't be right.
    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self { message: message.into(), kind: Kind::Input, away: false }
    }

    /// Ctrl-C ended the command before there was anything to show for it.
    pub(crate) fn interrupted() -> Self {
        Self { message: "interrupted".to_owned(), kind: Kind::Interrupted, away: false }
    }

    /// Something failed.
    pub(crate) fn failure(message: impl Into<String>) -> Self {
        Self { message: message.into(), kind: Kind::Failure, away: false }
    }

    /// A file that can't be read or written: the person's mistake if it is not there or may not be touched, a failure otherwise.
    pub(crate) fn file(path: &Path, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::input(format!("{}: no such file or folder", path.display())),
            io::ErrorKind::PermissionDenied | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => Self::input(format!("{}: {error}", path.display())),
            _ => Self::failure(format!("{}: {error}", path.display())),
        }
    }

    /// Whether the mesh was not there, or not to the end, and the same may go well once it is there again.
    pub(crate) fn is_away(&self) -> bool {
        self.away
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self.kind {
            Kind::Input => ExitCode::from(2),
            Kind::Failure => ExitCode::from(1),
            Kind::Interrupted => ExitCode::from(INTERRUPTED),
        }
    }
}

/// Does some work unless Ctrl-C is pressed first; then what the work holds, such as files of its own, is let go.
pub(crate) async fn unless_interrupted<T>(work: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => Err(Problem::interrupted()),
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Some messages have several lines.
        let lines: Vec<String> = self.message.lines().map(printable).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl From<Fault> for Problem {
    fn from(fault: Fault) -> Self {
        let kind = match fault.code() {
            Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound | Code::OutOfRange => Kind::Input,
            _ => Kind::Failure,
        };
        Self { message: fault.to_string(), kind, away: false }
    }
}

impl From<Status> for Problem {
    fn from(status: Status) -> Self {
        Self { away: is_away(&status), ..Fault::relayed(&status).into() }
    }
}

impl From<dnd_onnx::Error> for Problem {
    fn from(error: dnd_onnx::Error) -> Self {
        Fault::from(error).into()
    }
}
