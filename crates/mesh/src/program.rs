//! The asynchronous part of a program, and its end.

use std::{
    fmt,
    future::Future,
    io::{self, Write as _},
    time::Duration,
};

/// How long the end of a program waits for work that blocks a thread, such as a model that is being loaded.
pub(crate) const AT_THE_END: Duration = Duration::from_secs(2);

/// The name of this program, as its file has it.
pub(crate) fn name() -> String {
    std::env::current_exe().ok().and_then(|exe| Some(exe.file_stem()?.to_str()?.to_owned())).unwrap_or_else(|| "dnd".to_owned())
}

/// What a process ends with. (That of the standard library can't be read.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitCode(u8);

impl ExitCode {
    /// All is well.
    pub const SUCCESS: Self = Self(0);
    /// Something is not.
    pub const FAILURE: Self = Self(1);
}

impl From<u8> for ExitCode {
    fn from(code: u8) -> Self {
        Self(code)
    }
}

/// Runs a program to its end on all the machine's threads, says what went wrong, if something did, and ends the process.
pub fn run<E: fmt::Debug>(program: impl Future<Output = Result<(), E>>) -> ! {
    let problem = match block_on(program) {
        Ok(Ok(())) => end(ExitCode::SUCCESS),
        Ok(Err(error)) => format!("{error:?}"),
        Err(error) => format!("the program's threads can't be started: {error}"),
    };
    eprintln!("Error: {problem}");
    end(ExitCode::FAILURE)
}

/// Runs a program's future on all the machine's threads.
///
/// # Errors
///
/// If the threads can't be started.
pub fn block_on<T>(program: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(program);
    runtime.shutdown_timeout(AT_THE_END);
    Ok(outcome)
}

/// Ends the process at once. An ordinary exit would let ONNX Runtime take down what a thread still uses that loads or runs a model, and the process would die of
/// that.
pub fn end(ExitCode(code): ExitCode) -> ! {
    // Whoever reads it may have had enough.
    let _ = io::stdout().flush();
    signal_hook::low_level::exit(code.into())
}
