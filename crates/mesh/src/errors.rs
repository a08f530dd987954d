//! Every stable reason of an error, for `docs/errors.md` and for those who add one.

use tonic::Code;

/// A reason that google.rpc.ErrorInfo names.
#[derive(Debug, Clone, Copy)]
pub struct Reason {
    /// As it is sent.
    pub name: &'static str,
    /// The codes that come with it; none where it is the code of what went wrong further away.
    pub codes: &'static [Code],
    /// What it means.
    pub means: &'static str,
    /// What its reader can do.
    pub todo: &'static str,
}

const fn reason(name: &'static str, codes: &'static [Code], means: &'static str, todo: &'static str) -> Reason {
    Reason { name, codes, means, todo }
}

/// All reasons, in the order of their names.
#[rustfmt::skip]
pub const REASONS: &[Reason] = &[
    reason("AMBIGUOUS_LAYER", &[Code::InvalidArgument], "A layer's name fits several layers.", "Say more of the name; the message lists what it could be."),
    reason("CALLER_GONE", &[Code::Cancelled], "The caller left before it was answered.", "Nothing."),
    reason("CANCELLED", &[Code::Cancelled], "The job was cancelled.", "Nothing."),
    reason("CLIENT_CERTIFICATE", &[Code::Unauthenticated], "The server does not take the client's certificate: it has expired, or is not of the server's CA.", "Give the client a certificate that the server's `--tls-ca` has issued."),
    reason("CLIENT_NOT_ALLOWED", &[Code::PermissionDenied], "The server's allow-list has no name of the client's certificate for this method.", "Add the name to the file that `--allow` names; it is read again by itself."),
    reason("CREDENTIALS", &[Code::FailedPrecondition], "A file of a certificate, key or token can't be used.", "The message names the file and what is wrong with it."),
    reason("CROP_TOO_LARGE", &[Code::OutOfRange], "A crop is larger than a message may be.", "Leave the picture out, or make it smaller."),
    reason("DEADLINE", &[Code::DeadlineExceeded], "The call took longer than its caller waits; the message says in which stage.", "Allow more time, or ask for less at once."),
    reason("DIGEST_MISMATCH", &[Code::DataLoss], "An upload is not what its digest says.", "Upload it again; what had arrived is thrown away."),
    reason("EXECUTION_PROVIDER", &[Code::Internal], "The provider that `--provider` names can't be used.", "The message says what is missing; `dnd doctor` lists what is there."),
    reason("EXTERNAL_DATA", &[Code::InvalidArgument], "An uploaded network keeps weights in other files.", "Save it as one file, or name it by a URI that the service can read."),
    reason("INSECURE", &[Code::InvalidArgument], "An endpoint on another machine would be spoken to in the clear.", "Use `https` with `--tls-ca`, or say `--insecure`."),
    reason("INTERNAL", &[Code::Internal], "A defect of the service.", "Report it with what the service's log says."),
    reason("INVALID_BODY", &[Code::InvalidArgument], "The request's body did not arrive whole.", "Send it again."),
    reason("INVALID_ENDPOINT", &[Code::InvalidArgument], "An endpoint is no URL that can be called.", "Write it as `http://localhost:50051`, or with `https`."),
    reason("INVALID_FIELD", &[Code::InvalidArgument], "A field of the request can't be right; google.rpc.BadRequest names it.", "Change the field as the message says."),
    reason("INVALID_JSON", &[Code::InvalidArgument], "The request's body is no JSON of the message that the method takes.", "The message says where it goes wrong."),
    reason("INVALID_MESSAGE", &[Code::InvalidArgument], "What was sent is no message of the method: it breaks off, or a text in it is not UTF-8.", "Send what the API's definitions say; the client may be of another version."),
    reason("INVALID_PATH", &[Code::InvalidArgument], "The URL's path can't be right.", "See the gateway's API page."),
    reason("INVALID_QUERY", &[Code::InvalidArgument], "The URL's query can't be right.", "See the gateway's API page."),
    reason("LLM_ANSWER", &[Code::Internal], "The language model's endpoint answered something that is no answer.", "Check `--llm-url`; the message has the beginning of what came."),
    reason("LLM_BUDGET", &[Code::ResourceExhausted], "The budget of tokens or costs is reached.", "Raise `--llm-budget` or `--llm-budget-cost` and run the same command: what was answered is not asked again."),
    reason("LLM_CLIENT", &[Code::Internal], "The HTTP client can't be set up.", "The message says why."),
    reason("LLM_FORBIDDEN", &[Code::PermissionDenied], "The key may not use the language model.", "Use another key or model."),
    reason("LLM_KEY", &[Code::FailedPrecondition, Code::Unauthenticated], "The key of the language model is missing or wrong.", "Set DND_LLM_KEY, or `--llm-key-file`."),
    reason("LLM_NOT_FOUND", &[Code::NotFound], "The endpoint knows no such model or path.", "Check `--llm-url` and `--llm-model`."),
    reason("LLM_QUOTA", &[Code::ResourceExhausted], "The account has nothing left.", "See the provider's billing page."),
    reason("LLM_REQUEST", &[Code::InvalidArgument], "The endpoint does not take the request.", "The message has what it says of it."),
    reason("LLM_UNAVAILABLE", &[Code::Unavailable], "The endpoint did not answer, also when asked again.", "Try again later."),
    reason("MESSAGE_TOO_LARGE", &[Code::OutOfRange], "A message is larger than services take.", "The message says how much they take; ask for less at once, or upload it in pieces."),
    reason("MISSING_SCOPE", &[Code::PermissionDenied], "The token is good for less than the method needs.", "Use a token with the scope that the message names (`dnd tokens new NAME --scope SCOPE`)."),
    reason("MODEL_CHANGED", &[Code::FailedPrecondition], "A model service has another model than when the job began.", "Start a new job, or bring the model back."),
    reason("MODEL_FAILED", &[Code::Internal], "ONNX Runtime failed on an input.", "The message is its own; see the service's log."),
    reason("MODEL_FILE", &[Code::FailedPrecondition], "A file of a model is missing or can't be right.", "`dnd models check DIR` says what is wrong with a folder."),
    reason("MODEL_LOADING", &[Code::Unavailable], "The service has just started.", "Try again in a moment."),
    reason("NOBODY_THERE", &[Code::Unavailable], "Nobody answers at an endpoint.", "Check the address, and whether the service runs."),
    reason("NOT_JSON", &[Code::InvalidArgument], "The request's body is not declared as JSON.", "Send it with `content-type: application/json`."),
    reason("NOT_UPLOADED", &[Code::FailedPrecondition], "Something that is named by its digest was not uploaded.", "Upload it (`UploadService`), then ask again."),
    reason("NO_CLIENT_CERTIFICATE", &[Code::Unauthenticated], "The server asks for a certificate, and the client has none.", "Name one with `--tls-cert` and `--tls-key`."),
    reason("NO_GOOD_PICTURES", &[Code::InvalidArgument], "No picture of the probing set can be used.", "The skipped pictures' reasons say why."),
    reason("NO_PICTURES", &[Code::InvalidArgument], "The probing set is empty.", "Name a folder or tar file that has pictures."),
    reason("NO_ROOM", &[Code::ResourceExhausted], "The pictures of jobs take more than may be kept.", "Delete jobs that are not needed any more, or raise `--keep-bytes`; a job that is paused for it goes on by itself."),
    reason("NO_SUCH_JOB", &[Code::NotFound], "There is no job of that id.", "`ListJobs` names those that there are."),
    reason("NO_SUCH_METHOD", &[Code::Unimplemented], "The path takes other HTTP methods.", "See the gateway's API page."),
    reason("NO_SUCH_PAGE", &[Code::NotFound], "The gateway has nothing at this path.", "See the gateway's API page."),
    reason("NO_SUCH_PICTURE", &[Code::NotFound], "No picture of that digest is kept.", "Ask only for digests that results name."),
    reason("NO_SUCH_STUDY", &[Code::NotFound], "There is no study of that id.", "`ListStudies` names those that there are."),
    reason("NO_SUCH_UNIT", &[Code::NotFound], "The job has no such unit, or has not come to it.", "`ListUnits` names those that are finished."),
    reason("NO_TOKEN", &[Code::Unauthenticated], "The service wants a token.", "Send `authorization: Bearer TOKEN`."),
    reason("OTHER_SITE", &[Code::PermissionDenied], "A page of another site called the gateway from a browser.", "Call it from its own pages, or with a token from a program."),
    reason("PICTURE_CHANGED", &[Code::FailedPrecondition], "A picture is another than when it was probed.", "Leave probing sets as they are while a job runs; start it again."),
    reason("PICTURE_GONE", &[Code::NotFound], "A picture of the probing set can't be read any more.", "Put it back, or start the job again."),
    reason("PROBING_SET_CHANGED", &[Code::FailedPrecondition], "The probing set is another than when the job began.", "Leave probing sets as they are while a job runs; start it again."),
    reason("PROMPT_LENGTH", &[Code::InvalidArgument], "A prompt is longer than the language model takes.", "Use fewer captions (`top_images`), or a model with a longer context."),
    reason("QUEUE_FULL", &[Code::ResourceExhausted], "More waits at the service than it can take.", "Ask again after the time that google.rpc.RetryInfo says."),
    reason("REQUEST_ID_TAKEN", &[Code::AlreadyExists], "Another request had that `request_id`.", "Use an id of its own for each request."),
    reason("RUNTIME_LIBRARY", &[Code::Internal], "ONNX Runtime's library is missing or too old.", "Run `make setup`, or name it with ORT_DYLIB_PATH."),
    reason("SERVER_CERTIFICATE", &[Code::Unauthenticated], "The client does not trust the server's certificate: it has expired, is for another name, or is not of the client's CA.", "Name the right CA with `--tls-ca`, and call the server by a name that its certificate has."),
    reason("SERVICE_AWAY", &[Code::Unavailable], "A model service is not there, also after the call has waited for it.", "Start it: a job that is paused for it goes on by itself."),
    reason("SERVICE_FAILED", &[], "A model service failed; the code is its own.", "The message names the service and its reason."),
    reason("SHUTTING_DOWN", &[Code::Unavailable], "The service is ending.", "Ask again; another replica, or the service once it is back, answers."),
    reason("SILENT", &[Code::DeadlineExceeded], "A model service took a call and said nothing of it for as long as `--stage-timeout` allows.", "Look whether its model hangs; where its batches take that long, allow more."),
    reason("STORAGE", &[Code::Internal], "The service's disk does not work, or is full.", "The message has the system's own."),
    reason("STORE", &[Code::Unavailable], "The database that keeps jobs and results does not answer.", "Ask again; the orchestrator's log has the details."),
    reason("TARGET_DIED", &[Code::Aborted], "The process that runs the target was killed, or ended by itself, and again when it was started anew.", "Look whether the service's machine has run out of memory; else the network breaks ONNX Runtime: export it anew."),
    reason("TARGET_MEMORY", &[Code::FailedPrecondition], "The target takes more memory than one may.", "Raise `--target-memory` of the activation service, lower its `--batch`, or ask for fewer layers."),
    reason("TARGET_REFUSED", &[Code::FailedPrecondition], "Processes of the target have died so often lately that it is not run for a while.", "See the reasons that it had before; ask again after the time that google.rpc.RetryInfo says."),
    reason("TARGET_TIMEOUT", &[Code::FailedPrecondition], "The target took longer to load, or for a batch, than one may.", "Raise `--target-timeout` of the activation service, or lower its `--batch`; or the network does not end."),
    reason("TLS_HANDSHAKE", &[Code::Unauthenticated], "No TLS connection came about.", "Check that both ends speak TLS: `https` to a service with `--tls-cert`."),
    reason("TOO_LARGE", &[Code::OutOfRange], "What was sent to the gateway is larger than it takes.", "The message says how much it takes; upload it in pieces."),
    reason("TOO_MANY_CALLS", &[Code::ResourceExhausted], "The service answers as many calls as it takes at a time.", "Ask again after the time that google.rpc.RetryInfo says."),
    reason("UNIT_OUT_OF_RANGE", &[Code::InvalidArgument], "A layer has fewer units.", "The message says which units there are."),
    reason("UNKNOWN", &[], "Something that is no service of the mesh answered.", "Check the address, and what stands between."),
    reason("UNKNOWN_LAYER", &[Code::InvalidArgument], "The network has no such layer.", "The message has the nearest names; `dnd layers` lists all."),
    reason("UNKNOWN_TOKEN", &[Code::Unauthenticated], "The service does not know the token.", "Use one whose line is in the file that `--tokens` names."),
    reason("UNREADABLE_FILE", &[Code::FailedPrecondition], "A file that is to be uploaded can't be read.", "The message has the system's own."),
    reason("UNREADABLE_SOURCE", &[Code::InvalidArgument], "A folder or file of the request can't be read by the service.", "The message names it."),
    reason("UNUSABLE_NETWORK", &[Code::InvalidArgument], "The target is no network that can be dissected.", "The message says why, and what would do."),
    reason("UNUSABLE_PICTURE", &[Code::InvalidArgument], "A picture can't be read, or is larger than the limits.", "The message says why; the other pictures go on."),
    reason("UPLOAD_OFFSET", &[Code::FailedPrecondition], "A piece of an upload does not follow what has arrived.", "`CheckUploads` says where to go on."),
];

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::fault::DOMAIN;

    /// The page that is made of the table.
    fn page() -> String {
        let mut page = format!(
            "# Errors\n\nEvery error is a gRPC status whose details hold a google.rpc.ErrorInfo with the domain `{DOMAIN}` and one of these reasons; a wrong field is named by a \
             google.rpc.BadRequest, and what is worth another try says when by a google.rpc.RetryInfo. Items of a stream have the same in their own status. \
             Messages may change, reasons don't. Services count what they refuse at their door in `dnd_refused_total`, by reason.\n\n\
             This page is made of the table in `crates/mesh/src/errors.rs`.\n\n| reason | code | what it means | what to do |\n|---|---|---|---|\n"
        );
        for Reason { name, codes, means, todo } in REASONS {
            let codes: Vec<String> = codes.iter().map(|code| format!("{code:?}")).collect();
            let codes = if codes.is_empty() { "any".to_owned() } else { codes.join(", ") };
            page += &format!("| `{name}` | {codes} | {means} | {todo} |\n");
        }
        page
    }

    #[test]
    fn the_page_of_errors_says_what_the_table_does() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/errors.md");
        if std::env::var_os("DND_WRITE_ERRORS").is_some() {
            fs::write(&file, page()).unwrap();
        }
        let written = fs::read_to_string(&file).unwrap_or_default();
        assert!(written == page(), "docs/errors.md is not what the table says: run `DND_WRITE_ERRORS=1 cargo test -p dnd-mesh errors`");
    }

    /// The codes and reasons that a source file names, as in `Code::NotFound, "NO_SUCH_PICTURE"`.
    fn named(source: &str) -> Vec<(&str, &str)> {
        let mut found = Vec::new();
        // HTTP has codes of its own.
        let parts = source.match_indices("Code::").filter(|(at, _)| !source[..*at].ends_with("Status"));
        for part in parts.map(|(at, code)| &source[at + code.len()..]) {
            let end = part.find(|c: char| !c.is_alphanumeric()).unwrap_or(part.len());
            let Some(literal) = part[end..].strip_prefix(',').and_then(|rest| rest.trim_start().strip_prefix('"')) else { continue };
            let Some(reason) = literal.split('"').next() else { continue };
            if reason.len() > 2 && reason.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_') {
                found.push((&part[..end], reason));
            }
        }
        found
    }

    #[test]
    fn every_reason_of_the_workspace_is_in_the_table_with_its_code() {
        assert!(REASONS.is_sorted_by_key(|reason| reason.name));
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut count = 0;
        let mut folders: Vec<_> = ["crates", "services", "cli", "gateway"].iter().map(|name| root.join(name)).filter(|folder| folder.is_dir()).collect();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|ending| ending == "rs") {
                    let source = fs::read_to_string(&path).unwrap();
                    for (code, reason) in named(&source) {
                        count += 1;
                        let known = REASONS.iter().find(|known| known.name == reason);
                        let known = known.unwrap_or_else(|| panic!("{}: {reason} is not in the table of crates/mesh/src/errors.rs", path.display()));
                        let codes: Vec<String> = known.codes.iter().map(|code| format!("{code:?}")).collect();
                        assert!(codes.is_empty() || codes.iter().any(|known| known == code), "{}: {reason} with {code}", path.display());
                    }
                }
            }
        }
        assert!(count > 40, "only {count} reasons were found: do sources still name them as Code::X, \"REASON\"?");
    }
}
