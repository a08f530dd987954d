//! `dnd select`: one's own candidate concepts compete for a unit.

use std::{
    collections::HashMap,
    fs::File,
    future::ready,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
};

use dnd_mesh::{blobs, parameters::to_message, program::ExitCode};
use dnd_proto::v1::{SelectConceptRequest, StoredImages, UnitResult, UnitState, select_concept_request::Images as From, select_concept_response::Event};

use crate::{
    args::{MeshArgs, Settings, TargetArgs},
    inputs::{Images, TargetFile},
    mesh::Mesh,
    out::{self, printable},
    problem::Problem,
    watch::Watch,
};

/// Lets your own candidate concepts compete for a unit: step 3 of the method alone.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// The layer of the unit
    #[arg(long, value_name = "NAME")]
    layer: String,
    /// The unit
    #[arg(long, value_name = "N")]
    unit: u32,
    /// A candidate concept; give at least one
    #[arg(long, value_name = "TEXT", required = true)]
    concept: Vec<String>,
    /// Folder of pictures, or a .tar file, to find the unit's highest activating images in
    #[arg(long, value_name = "DIR", required_unless_present = "from")]
    images: Vec<PathBuf>,
    /// Take the unit's highest activating images from the results of an earlier `dnd dissect` in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "images")]
    from: Option<PathBuf>,
    #[command(flatten)]
    mesh: MeshArgs,
    #[command(flatten)]
    settings: Settings,
}

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    let parameters = args.settings.parameters()?;
    let target = TargetFile::open(&args.target.target, &args.target.flags)?;
    let stored = args.from.as_deref().map(|folder| stored(folder, &args.layer, args.unit)).transpose()?;
    let images = if stored.is_none() { Some(Images::open(&args.images)?) } else { None };
    let mut mesh = Mesh::open(&args.mesh).await?;
    let from = match (stored, images) {
        (Some((folder, unit)), _) => {
            let files: HashMap<String, PathBuf> = unit.images.iter().map(|image| (image.digest.clone(), folder.join("pictures").join(&image.digest))).collect();
            blobs::upload(mesh.uploads.clone(), files.keys().cloned().collect(), |digest| ready(Ok(files.get(&digest).cloned()))).await?;
            From::Stored(StoredImages { images: unit.images })
        }
        (None, Some(images)) => {
            let (set, skipped) = images.give(&mesh).await?;
            skipped.iter().for_each(|skipped| eprintln!("skipped {}: {}", printable(&skipped.path), printable(&skipped.reason)));
            From::ProbingSet(set)
        }
        (None, None) => return Err(Problem::input("neither --images nor --from is given")),
    };
    let request = SelectConceptRequest {
        target: Some(target.give(&mesh).await?),
        layer: args.layer,
        unit: args.unit,
        concepts: args.concept,
        images: Some(from),
        parameters: Some(to_message(&parameters)),
    };
    let mut events = mesh.dissect.select_concept(request).await?.into_inner();
    let mut watch = Watch::new();
    let mut result = None;
    while let Some(response) = events.message().await? {
        match response.event {
            Some(Event::Accepted(accepted)) => {
                out::notices(accepted.provenance.as_ref()).iter().for_each(|notice| watch.say(&format!("note: {notice}")));
                accepted.warnings.iter().for_each(|warning| watch.say(&format!("warning: {warning}")));
            }
            Some(Event::Progress(progress)) => watch.progress(&progress),
            Some(Event::Skipped(skipped)) => watch.say(&format!("skipped {}: {}", skipped.path, skipped.reason)),
            Some(Event::Unit(unit)) => result = Some(unit),
            None => {}
        }
    }
    watch.end();
    let unit = result.ok_or_else(|| Problem::failure("the mesh ended the selection without a result"))?;
    for warning in &unit.warnings {
        eprintln!("warning: {}", printable(warning));
    }
    if unit.state() != UnitState::Labelled {
        return Err(Problem::failure(format!("{} unit {}: {}", unit.layer, unit.unit, unit.message)));
    }
    print(&unit);
    Ok(ExitCode::SUCCESS)
}

fn print(unit: &UnitResult) {
    let width = unit.concepts.iter().map(|concept| concept.concept.chars().count()).max().unwrap_or(7).max(7);
    println!("{} unit {}", printable(&unit.layer), unit.unit);
    println!("{:<width$}  {:>8}  {:>8}  {:>12}  {:>14}  best ranks", "concept", "score", "mean", "topk_squared", "image_products");
    for concept in &unit.concepts {
        let mut ranks: Vec<u32> = concept.pictures.iter().map(|picture| picture.rank).filter(|rank| *rank > 0).collect();
        ranks.sort_unstable();
        let ranks: Vec<String> = ranks.iter().take(5).map(u32::to_string).collect();
        match (concept.score, &concept.scores) {
            (Some(score), Some(scores)) => println!(
                "{:<width$}  {score:>8.3}  {:>8.2}  {:>12.1}  {:>14.4}  {}",
                printable(&concept.concept),
                scores.mean,
                scores.topk_squared,
                scores.image_products,
                ranks.join(" ")
            ),
            _ => println!("{:<width$}  none of its pictures can be used", printable(&concept.concept)),
        }
    }
}

/// The result of a unit in the folder of an earlier run.
fn stored(folder: &Path, layer: &str, unit: u32) -> Result<(PathBuf, UnitResult), Problem> {
    let path = folder.join("results.jsonl");
    let file = File::open(&path).map_err(|e| Problem::file(&path, &e))?;
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|e| Problem::file(&path, &e))?;
        let result: UnitResult = serde_json::from_str(&line).map_err(|e| Problem::input(format!("{}: not the results of a run: {e}", path.display())))?;
        if result.layer == layer && result.unit == unit {
            if result.images.is_empty() {
                return Err(Problem::input(format!("{}: {layer} unit {unit} has no images: it is {}", path.display(), out::state(&result))));
            }
            return Ok((folder.to_owned(), result));
        }
    }
    Err(Problem::input(format!("{}: no result of {layer} unit {unit}", path.display())))
}
