//! What a program is told: by flags, else by variables of the environment, else by a file, else by its defaults.
//!
//! An option is defined once, in the arguments of its program. The file's keys are the long names of the flags; what it says is put among the flags that were
//! given, where neither a flag nor a variable says otherwise, so that it is checked as they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgAction, ArgMatches, Command, Parser,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
    value_parser,
};
use serde::Serialize;
use toml::{Table, Value};

const CONFIG: &str = "config";
const PRINT: &str = "print-config";
/// What can be printed.
const VALUES: &str = "values";
const OPTIONS: &str = "options";
/// How alike a name must be to be taken for a misspelt one.
const ALIKE: f64 = 0.7;

/// The options of this process. As [`Parser::parse`], it ends the process where there is something to print, or something is wrong.
pub fn parse<P: Parser>() -> P {
    match read(std::env::args_os().collect()) {
        Ok(Told::Options(options)) => options,
        Ok(Told::Printed(text)) => {
            // Whoever reads it may have had enough.
            let _ = std::io::stdout().write_all(text.as_bytes());
            std::process::exit(0)
        }
        Ok(Told::Incomplete(text, error)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            error.exit()
        }
        Err(error) => error.exit(),
    }
}

#[derive(Debug)]
enum Told<P> {
    Options(P),
    Printed(String),
    /// What there is to print, and why it is not all that there has to be.
    Incomplete(String, clap::Error),
}

fn command<P: Parser>() -> Command {
    let config = Arg::new(CONFIG).long(CONFIG).env("DND_CONFIG").value_name("FILE.toml").value_parser(value_parser!(PathBuf));
    let print =
        Arg::new(PRINT).long(PRINT).value_name("WHAT").num_args(0..=1).require_equals(true).default_missing_value(VALUES).value_parser([VALUES, OPTIONS]);
    P::command()
        .next_help_heading(None::<&'static str>)
        .arg(config.global(true).help("File of options, by the long names of their flags, such as `log = \"debug\"`; flags and variables win over it"))
        .arg(print.global(true).help("Print what each option is set to, and by what, then end; or which options there are"))
}

fn read<P: Parser>(mut args: Vec<OsString>) -> Result<Told<P>, clap::Error> {
    let mut command = command::<P>();
    // A first look, whatever is wrong or missing: the file may have it.
    let lenient = command.clone().ignore_errors(true);
    let first = lenient.clone().try_get_matches_from(&args)?;
    command.build();
    let (asked, told) = innermost(&command, &first);
    if told.get_one::<String>(PRINT).is_some_and(|what| what == OPTIONS) {
        return Ok(Told::Printed(list(&command)));
    }
    let file = match told.get_one::<PathBuf>(CONFIG) {
        Some(path) => File::read(path, &command).and_then(|file| Ok((file.flags(asked, told)?, file))),
        None => Ok(Default::default()),
    };
    let (flags, file) = file.map_err(|problem| command.clone().error(ErrorKind::InvalidValue, problem))?;
    // What comes after a bare `--` is no flag.
    let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
    args.splice(end..end, flags.values().flatten().cloned());
    let from_file = flags.keys().map(String::as_str).collect();
    let matches = match command.try_get_matches_from_mut(&args) {
        Err(error) if error.kind() == ErrorKind::MissingRequiredArgument && told.contains_id(PRINT) => {
            let there = lenient.try_get_matches_from(&args)?;
            let (asked, told) = innermost(&command, &there);
            return Ok(Told::Incomplete(values(asked, told, &file, &from_file, &missing(&error)), error));
        }
        matches => matches.map_err(|error| file.blame(error, &flags, &mut command))?,
    };
    let (asked, told) = innermost(&command, &matches);
    if told.contains_id(PRINT) {
        return Ok(Told::Printed(values(asked, told, &file, &from_file, &[])));
    }
    P::from_arg_matches(&matches).map(Told::Options).map_err(|error| error.format(&mut command))
}

/// What an error says is missing, by name.
fn missing(error: &clap::Error) -> Vec<&str> {
    let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg) else { return Vec::new() };
    missing.iter().filter_map(|arg| arg.trim_start_matches('-').split(' ').next()).collect()
}

/// The command that was asked for: `dnd`'s have commands of their own.
fn innermost<'c, 'm>(mut command: &'c Command, mut matches: &'m ArgMatches) -> (&'c Command, &'m ArgMatches) {
    while let Some((name, inner)) = matches.subcommand()
        && let Some(asked) = command.find_subcommand(name)
    {
        (command, matches) = (asked, inner);
    }
    (command, matches)
}

/// The options of a command that can be set, by name.
fn options(command: &Command) -> impl Iterator<Item = (&str, &Arg)> {
    let fixed = [CONFIG, PRINT, "help", "version"];
    command.get_arguments().filter(|arg| !arg.is_hide_set()).filter_map(|arg| Some((arg.get_long()?, arg))).filter(move |(name, _)| !fixed.contains(name))
}

/// A command and all commands under it.
fn all(command: &Command) -> Vec<&Command> {
    std::iter::once(command).chain(command.get_subcommands().filter(|inner| inner.get_name() != "help").flat_map(all)).collect()
}

/// Whether a flag or a variable says it.
fn is_said(told: &ArgMatches, arg: &Arg) -> bool {
    matches!(told.value_source(arg.get_id().as_str()), Some(ValueSource::CommandLine | ValueSource::EnvVariable))
}

/// What a file says: options by name, each with its values.
#[derive(Debug, Default)]
struct File {
    path: PathBuf,
    options: BTreeMap<String, Vec<String>>,
}

impl File {
    /// Reads a file, whose keys must be options of the command or of one under it.
    fn read(path: &Path, command: &Command) -> Result<Self, String> {
        let at = path.display();
        let text = fs::read_to_string(path).map_err(|error| format!("{at}: {error}"))?;
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            // Not the line itself, which may have a password.
            let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            format!("{at}: line {line}: {}", error.message())
        })?;
        let known: BTreeSet<&str> = all(command).into_iter().flat_map(options).map(|(name, _)| name).collect();
        let mut options = BTreeMap::new();
        for (key, value) in table {
            let name = key.replace('_', "-");
            if !known.contains(name.as_str()) {
                let alike = |known: &&str| (strsim::jaro_winkler(&name, known) * 1e6) as u64;
                let nearest = known.iter().copied().max_by_key(alike).filter(|known| strsim::jaro_winkler(&name, known) > ALIKE);
                let nearest = nearest.map(|known| format!("; is {known} meant?")).unwrap_or_default();
                return Err(format!("{at}: {key}: {} has no such option{nearest}", command.get_name()));
            }
            let values = match value {
                Value::Array(values) => values.into_iter().map(text_of).collect(),
                value => text_of(value).map(|text| vec![text]),
            };
            let values = values.ok_or_else(|| format!("{at}: {key}: a value is a text, a number, true or false, or a list of these"))?;
            if options.insert(name, values).is_some() {
                return Err(format!("{at}: {key}: it is said twice"));
            }
        }
        Ok(Self { path: path.to_owned(), options })
    }

    /// What it says as flags, by the option's name, where nothing that was told says otherwise.
    fn flags(&self, asked: &Command, told: &ArgMatches) -> Result<BTreeMap<String, Vec<OsString>>, String> {
        let mut flags = BTreeMap::new();
        for (name, values) in &self.options {
            // An option of another command is that one's.
            let Some((_, arg)) = options(asked).find(|(known, _)| known == name) else { continue };
            if is_said(told, arg) || asked.get_arg_conflicts_with(arg).into_iter().any(|other| is_said(told, other)) {
                continue;
            }
            let wrong = |must: &str| Err(format!("{}: {name}: {must}", self.path.display()));
            let said: Vec<OsString> = match (arg.get_action(), arg.get_value_delimiter(), values.as_slice()) {
                (ArgAction::SetTrue, _, [value]) if value == "true" => vec![format!("--{name}").into()],
                (ArgAction::SetTrue, _, [value]) if value == "false" => vec![],
                (ArgAction::SetTrue, ..) => return wrong("it is true or false"),
                (_, Some(delimiter), values) => vec![format!("--{name}={}", values.join(&delimiter.to_string())).into()],
                (ArgAction::Append, _, values) => values.iter().map(|value| format!("--{name}={value}").into()).collect(),
                (_, _, [value]) => vec![format!("--{name}={value}").into()],
                _ => return wrong("it has one value"),
            };
            flags.insert(name.clone(), said);
        }
        Ok(flags)
    }

    /// An error that names the file, if it is about what that says.
    fn blame(&self, error: clap::Error, flags: &BTreeMap<String, Vec<OsString>>, command: &mut Command) -> clap::Error {
        let Some(ContextValue::String(about)) = error.get(ContextKind::InvalidArg) else { return error };
        let name = about.trim_start_matches('-').split([' ', '=']).next().unwrap_or_default();
        if !flags.contains_key(name) {
            return error;
        }
        let said = error.to_string();
        let said = said.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
        command.error(error.kind(), format!("{}: {said}", self.path.display()))
    }
}

fn text_of(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => Some(value.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

/// A value as a file would have it.
fn value_of(text: &str) -> Value {
    let number = || text.parse().ok().map(Value::Integer).filter(|number| number.to_string() == text);
    let fraction = || text.parse().ok().map(Value::Float).filter(|number| number.to_string() == text);
    let switch = || text.parse().ok().map(Value::Boolean);
    number().or_else(fraction).or_else(switch).unwrap_or_else(|| Value::String(text.to_owned()))
}

/// What each option of a command is set to, and by what, as a file that says the same. What may hold a password is not shown.
fn values(asked: &Command, told: &ArgMatches, file: &File, from_file: &BTreeSet<&str>, missing: &[&str]) -> String {
    let (mut set, mut unset) = (Vec::new(), Vec::new());
    for (name, arg) in options(asked) {
        let id = arg.get_id().as_str();
        let Some(source) = told.value_source(id) else {
            unset.extend((!missing.contains(&name)).then_some(name));
            continue;
        };
        let by = match source {
            ValueSource::CommandLine if from_file.contains(name) => format!("file {}", file.path.display()),
            ValueSource::CommandLine => "flag".to_owned(),
            ValueSource::EnvVariable => format!("env {}", arg.get_env().unwrap_or_default().display()),
            _ if file.options.contains_key(name) => format!("file {}", file.path.display()),
            _ => "default".to_owned(),
        };
        let texts = || told.get_raw(id).into_iter().flatten().map(|value| value.to_string_lossy());
        let line = if arg.is_hide_env_values_set() || texts().any(|text| text.split_once("://").is_some_and(|(_, rest)| rest.contains('@'))) {
            format!("# {name} is set, and not shown")
        } else if !arg.get_action().takes_values() {
            format!("{name} = {}", told.get_flag(id))
        } else if matches!(arg.get_action(), ArgAction::Append) {
            format!("{name} = {}", Value::Array(texts().map(|text| value_of(&text)).collect()))
        } else {
            format!("{name} = {}", value_of(&texts().next().unwrap_or_default()))
        };
        set.push((line, by));
    }
    let width = set.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0).min(60);
    let mut text = String::new();
    for (line, by) in set {
        let _ = writeln!(text, "{line:width$}  # {by}");
    }
    for (what, names) in [("Missing", missing), ("Not set", &unset)] {
        if !names.is_empty() {
            let _ = writeln!(text, "# {what}: {}", names.join(", "));
        }
    }
    text
}

/// An option as the reference page has it.
#[derive(Debug, Serialize)]
struct Described<'c> {
    command: &'c str,
    key: &'c str,
    #[serde(skip_serializing_if = "Option::is_none")]
    variable: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    default: Option<String>,
    /// What it may be, if that is one of a few words.
    values: Vec<String>,
    help: String,
}

/// All options of a command and those under it, as TOML.
fn list(command: &Command) -> String {
    let describe = |command: &'_ Command| -> Vec<Value> {
        let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
        let described = options(command).filter_map(|(key, arg)| {
            let joined = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect::<Vec<_>>().join(",");
            let switch = !arg.get_action().takes_values();
            let described = Described {
                command: &name,
                key,
                variable: arg.get_env().map(|variable| variable.to_string_lossy().into_owned()),
                default: (!joined.is_empty() && !switch).then_some(joined),
                values: if switch { vec![] } else { arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect() },
                help: arg.get_help().map(ToString::to_string).unwrap_or_default(),
            };
            Value::try_from(described).ok()
        });
        described.collect()
    };
    let described = all(command).into_iter().flat_map(describe).collect();
    Table::from_iter([("option".to_owned(), Value::Array(described))]).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program.
    #[derive(Debug, Parser, PartialEq)]
    #[command(name = "dnd-some")]
    struct Some {
        #[arg(long, default_value = "info")]
        log: String,
        #[arg(long)]
        model: PathBuf,
        #[arg(long, requires = "key")]
        cert: Option<PathBuf>,
        #[arg(long)]
        key: Option<PathBuf>,
        #[arg(long, default_value_t = 8)]
        batch_size: u32,
        #[arg(long)]
        insecure: bool,
        #[arg(long, conflicts_with = "edge")]
        squash: bool,
        #[arg(long)]
        edge: Option<u32>,
        #[arg(long)]
        images: Vec<PathBuf>,
        #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
        mean: Option<Vec<f32>>,
        #[arg(long, hide_env_values = true)]
        store: Option<String>,
        #[arg(long)]
        endpoint: Option<String>,
        rest: Vec<String>,
    }

    fn told(file: &str, args: &[&str]) -> Result<Told<Some>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dnd.toml");
        fs::write(&path, file).unwrap();
        let args = ["dnd-some", "--config", path.to_str().unwrap()].into_iter().chain(args.iter().copied());
        read(args.map(OsString::from).collect()).map_err(|error| error.to_string())
    }

    fn options_of(file: &str, args: &[&str]) -> Some {
        match told(file, args) {
            Ok(Told::Options(options)) => options,
            other => panic!("{other:?}"),
        }
    }

    fn printed(file: &str, args: &[&str]) -> String {
        match told(file, args) {
            Ok(Told::Printed(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_says_what_flags_do_not_in_every_form_that_they_have() {
        let file =
            "model = \"m\"\nbatch_size = 3\ninsecure = true\nsquash = false\nimages = [\"a\", \"b c\"]\nmean = [-0.5, 1, 2]\ncert = \"c\"\nkey = \"k\"\n";
        let options = options_of(file, &["--log", "warn", "--", "--rest"]);
        assert_eq!((options.log.as_str(), options.model.to_str(), options.batch_size), ("warn", std::option::Option::Some("m"), 3));
        assert_eq!((options.insecure, options.squash, options.images), (true, false, vec!["a".into(), "b c".into()]));
        assert_eq!((options.mean, options.rest), (Option::Some(vec![-0.5, 1.0, 2.0]), vec!["--rest".to_owned()]));
    }

    #[test]
    fn a_flag_wins_over_the_file_also_over_what_it_conflicts_with_and_needs() {
        let file = "model = \"m\"\nimages = [\"a\", \"b\"]\nsquash = true\nkey = \"k\"\n";
        let options = options_of(file, &["--images", "c", "--edge", "5", "--cert", "c"]);
        assert_eq!((options.images, options.squash, options.edge), (vec!["c".into()], false, Option::Some(5)));
        assert_eq!(options.key.as_deref().and_then(Path::to_str), Option::Some("k"));
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named_with_the_file_and_what_would_be_right() {
        for (file, said) in [
            ("modell = \"m\"", &["dnd.toml: modell", "is model meant?"][..]),
            ("model = \"m\"\nconfig = \"x\"", &["dnd.toml: config", "no such option"]),
            ("model = \"m\"\nbatch-size = \"many\"", &["dnd.toml: ", "'many'", "--batch-size"]),
            ("model = \"m\"\nbatch-size = [1, 2]", &["dnd.toml: batch-size: it has one value"]),
            ("model = \"m\"\nbatch-size = 1\nbatch_size = 1", &["dnd.toml: batch_size: it is said twice"]),
            ("model = \"m\"\ninsecure = \"yes\"", &["dnd.toml: insecure: it is true or false"]),
            ("[model]\na = 1", &["dnd.toml: model: a value is"]),
            ("log = \"x\"\nstore = postgres://u:secret@h\n", &["dnd.toml: line 2: "]),
            ("log = \"x\"", &["--model"]),
            ("model = \"m\"\ncert = \"c\"", &["--key"]),
        ] {
            let problem = told(file, &[]).unwrap_err();
            assert!(said.iter().all(|said| problem.contains(said)) && !problem.contains("secret"), "{file}: {problem}");
        }
        let problem = read::<Some>(["dnd-some", "--config", "nowhere.toml"].map(OsString::from).to_vec()).unwrap_err().to_string();
        assert!(problem.contains("nowhere.toml: No such file"), "{problem}");
    }

    #[test]
    fn what_is_printed_has_its_sources_hides_secrets_and_is_a_file_that_says_the_same() {
        let file = "model = \"m\"\nstore = \"postgres://dnd:secret@host/dnd\"\nendpoint = \"http://u:secret@host\"\nimages = [\"a\"]\nsquash = false\n";
        let text = printed(file, &["--edge", "5", "--print-config"]);
        for (line, by) in [("log = \"info\"", "default"), ("edge = 5", "flag"), ("batch-size = 8", "default"), ("# store is set, and not shown", "file ")] {
            assert!(text.lines().any(|said| said.starts_with(line) && said.contains(&format!("  # {by}"))), "{line}: {text}");
        }
        assert!(text.contains("# endpoint is set, and not shown") && !text.contains("secret") && text.contains("# Not set: cert, key, mean"), "{text}");
        let by_flags = options_of("model = \"m\"\nimages = [\"a\"]", &["--edge", "5"]);
        assert_eq!(options_of(&text, &[]), by_flags);
    }

    #[test]
    fn what_is_missing_is_named_beside_what_there_is() {
        for (file, missing) in
            [("log = \"x\"\nbatch-size = 3", "# Missing: model\n"), ("log = \"x\"\nbatch-size = 3\nmodel = \"m\"\ncert = \"c\"", "# Missing: key\n")]
        {
            let Ok(Told::Incomplete(text, error)) = told(file, &["--edge", "5", "--print-config"]) else { panic!("{file}") };
            for (line, by) in [("log = \"x\"", "file "), ("batch-size = 3", "file "), ("edge = 5", "flag"), ("insecure = false", "default")] {
                assert!(text.lines().any(|said| said.starts_with(line) && said.contains(&format!("  # {by}"))), "{line}: {text}");
            }
            assert!(text.contains(missing) && text.contains("# Not set: ") && !text.contains("model,"), "{text}");
            assert_eq!(error.exit_code(), 2, "{error}");
        }
    }

    #[test]
    fn options_are_listed_whatever_else_is_missing() {
        let text = match read::<Some>(["dnd-some", "--print-config=options"].map(OsString::from).to_vec()) {
            Ok(Told::Printed(text)) => text,
            other => panic!("{other:?}"),
        };
        let table: Table = text.parse().unwrap();
        let keys: Vec<&str> = table["option"].as_array().unwrap().iter().map(|option| option["key"].as_str().unwrap()).collect();
        assert_eq!(keys, ["log", "model", "cert", "key", "batch-size", "insecure", "squash", "edge", "images", "mean", "store", "endpoint"]);
    }
}
