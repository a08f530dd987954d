//! The asynchronous part of a program.

use std::{future::Future, io, time::Duration};

/// How long the end of a program waits for work that blocks a thread, such as a model that is being loaded.
pub(crate) const AT_THE_END: Duration = Duration::from_secs(2);

/// The name of this program, as its file has it.
pub(crate) fn name() -> String {
    std::env::current_exe().ok().and_then(|exe| Some(exe.file_stem()?.to_str()?.to_owned())).unwrap_or_else(|| "dnd".to_owned())
}

/// Runs a program to its end on all the machine's threads.
///
/// # Errors
///
/// If the threads can't be started.
pub fn run<T>(program: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(program);
    runtime.shutdown_timeout(AT_THE_END);
    Ok(outcome)
}
