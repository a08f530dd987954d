//! `report.html`: one file that opens anywhere. Each picture is in it once, as a thumbnail, and put in place when it is scrolled to. It is made a unit
//! after the other, of which no more is kept than where the pictures are in it.

use std::{collections::BTreeMap, io::Cursor};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use dnd_onnx::pictures::{PictureLimits, decode};
use dnd_proto::v1::{Box as Area, Provenance, RankedConcept, UnitResult, UnitState, Usage};
use image::{DynamicImage, ImageFormat, RgbaImage};
use minijinja::{Environment, value::Serde, value::Value};
use serde::Serialize;

use crate::table::{name, state};

const HEAD: &str = include_str!("report/head.html");
const UNIT: &str = include_str!("report/unit.html");
const END: &str = include_str!("report/end.html");
/// Longer side of a thumbnail.
const THUMBNAIL: u32 = 112;
/// Side of the frame that a picture is shown in, as the page's style has it.
const FRAME: f64 = 104.0;
/// A picture of at most this many bytes is taken as it is.
const SMALL: usize = 2048;
/// Candidates that are shown with their pictures, and pictures of each.
const CANDIDATES: usize = 5;
const DRAWN: usize = 10;

/// A report in the making.
#[derive(Debug, Default)]
pub struct Report {
    album: Album,
}

/// What a report says beside its units.
#[derive(Debug, Default)]
pub struct About<'r> {
    /// What the results depend on.
    pub provenance: Option<&'r Provenance>,
    /// What the person who reads it should know.
    pub warnings: &'r [String],
    /// Pictures of the probing set that could not be used, as far as that is known.
    pub skipped: usize,
    /// What a language model behind an HTTP endpoint was asked.
    pub usage: Option<&'r Usage>,
}

/// The head as its template sees it.
#[derive(Serialize)]
struct Head<'r> {
    version: &'static str,
    notices: Vec<&'r str>,
    warnings: &'r [String],
    skipped: usize,
    asked: Option<String>,
    models: Vec<(&'static str, String)>,
    parameters: String,
    units: usize,
    labelled: usize,
    dead: usize,
    failed: usize,
    layers: Vec<&'r str>,
}

/// A unit, and the thumbnails that are not in the page before it, as data URIs. Each has the number of those before it as its key.
#[derive(Serialize)]
struct Article<'r> {
    unit: Unit<'r>,
    pictures: String,
}

#[derive(Serialize)]
struct Unit<'r> {
    layer: &'r str,
    unit: u32,
    state: &'static str,
    label: &'r str,
    others: Vec<&'r str>,
    message: &'r str,
    why: String,
    probed: Vec<Probed>,
    images: Vec<Image<'r>>,
    concepts: Vec<Concept<'r>>,
    warnings: &'r [String],
    range: String,
}

/// A whole picture with the activation map and the crops laid over it.
#[derive(Serialize)]
struct Probed {
    picture: usize,
    size: String,
    map: Option<(usize, String)>,
    crops: Vec<String>,
    title: String,
}

#[derive(Serialize)]
struct Image<'r> {
    picture: usize,
    crop: bool,
    caption: &'r str,
    simplified: &'r str,
    title: String,
}

#[derive(Serialize)]
struct Concept<'r> {
    concept: &'r str,
    score: String,
    scores: Vec<(&'static str, String)>,
    drawn: Vec<Drawn>,
    unusable: usize,
}

#[derive(Serialize)]
struct Drawn {
    picture: usize,
    rank: u32,
    title: String,
}

impl Report {
    /// Begins a report of units of these layers and states; gives its first part, too.
    ///
    /// # Errors
    ///
    /// What is wrong with a template, here and below: that would be a defect.
    pub fn begin<'r>(about: &About<'r>, units: impl Iterator<Item = (&'r str, UnitState)>) -> Result<(Self, String), String> {
        let About { provenance, warnings, skipped, usage } = *about;
        let (mut layers, mut states) = (Vec::new(), BTreeMap::<&str, usize>::new());
        for (layer, state) in units {
            if layers.last() != Some(&layer) {
                layers.push(layer);
            }
            *states.entry(name(state)).or_default() += 1;
        }
        let count = |state: &str| states.get(state).copied().unwrap_or_default();
        let head = Head {
            version: env!("CARGO_PKG_VERSION"),
            notices: notices(provenance),
            warnings,
            skipped,
            asked: usage.map(spent),
            models: models(provenance),
            parameters: provenance.and_then(|p| p.parameters.as_ref()).and_then(|p| serde_json::to_string_pretty(p).ok()).unwrap_or_default(),
            units: states.values().sum(),
            labelled: count("labelled"),
            dead: count("dead"),
            failed: count("failed"),
            layers,
        };
        Ok((Self::default(), fill("head.html", HEAD, &head)?))
    }

    /// The part of a unit, whose pictures `picture` has by their digests. Takes as long as to decode them all.
    ///
    /// # Errors
    ///
    /// As [`Self::begin`].
    pub fn unit(&mut self, unit: &UnitResult, picture: &dyn Fn(&str) -> Option<Bytes>) -> Result<String, String> {
        let unit = show(unit, &mut Pictures { album: &mut self.album, find: picture });
        let pictures = serde_json::to_string(&std::mem::take(&mut self.album.thumbnails)).map_err(|error| error.to_string())?;
        fill("unit.html", UNIT, &Article { unit, pictures })
    }

    /// The last part.
    pub fn end(self) -> String {
        END.to_owned()
    }
}

fn fill(name: &str, template: &str, with: &impl Serialize) -> Result<String, String> {
    Environment::new().render_named_str(name, template, Value::from(Serde(with))).map_err(|error| format!("the report: {error:#}"))
}

/// What the authors of the models want their users to be told.
pub fn notices(provenance: Option<&Provenance>) -> Vec<&str> {
    let models = provenance.map(|p| [&p.captioner, &p.summarizer, &p.diffusion, &p.clip]);
    let mut notices: Vec<&str> = models.into_iter().flatten().flatten().map(|model| model.notice.as_str()).filter(|notice| !notice.is_empty()).collect();
    notices.dedup();
    notices
}

/// What a language model was asked, in a few words.
pub fn spent(usage: &Usage) -> String {
    let Usage { calls, prompt_tokens, answer_tokens, cost } = usage;
    let cost = cost.map(|cost| format!(", cost {cost:.4}")).unwrap_or_default();
    format!("{calls} answers, {prompt_tokens} tokens of prompts, {answer_tokens} of answers{cost}")
}

/// Every picture that a result refers to.
pub fn digests(unit: &UnitResult) -> impl Iterator<Item = &str> {
    let images = unit.images.iter().map(|image| &image.digest);
    let probed = unit.probed.iter().flat_map(|picture| [&picture.digest, &picture.map_digest]);
    let crops = unit.crops.iter().map(|crop| &crop.digest);
    let drawn = unit.concepts.iter().flat_map(|concept| &concept.pictures).map(|picture| &picture.digest);
    images.chain(probed).chain(crops).chain(drawn).map(String::as_str).filter(|digest| !digest.is_empty())
}

fn models(provenance: Option<&Provenance>) -> Vec<(&'static str, String)> {
    let Some(p) = provenance else { return Vec::new() };
    let short = |digest: &str| digest.chars().take(12).collect::<String>();
    let mut models = vec![("target", short(&p.target_digest))];
    for (name, model) in [("captioner", &p.captioner), ("summarizer", &p.summarizer), ("diffusion", &p.diffusion), ("clip", &p.clip)] {
        if let Some(model) = model {
            models.push((name, format!("{} ({}), {}, {}", model.name, model.layout, short(&model.digest), model.engine)));
        }
    }
    models
}

fn show<'r>(unit: &'r UnitResult, album: &mut Pictures<'_>) -> Unit<'r> {
    let probed = unit.probed.iter().filter_map(|picture| {
        let (key, size) = album.picture(&picture.digest)?;
        let crops = unit.crops.iter().filter(|crop| crop.parent_digest == picture.digest).filter_map(|crop| Some(place(crop.r#box.as_ref()?, size))).collect();
        let map = album.map(&picture.map_digest).zip(picture.seen.as_ref().map(|seen| place(seen, size)));
        Some(Probed { picture: key, size: fit(size), map, crops, title: format!("{}: {}", picture.path, picture.activation) })
    });
    let probed = probed.collect();
    let images = unit.images.iter().filter_map(|image| {
        Some(Image {
            picture: album.picture(&image.digest)?.0,
            crop: image.r#box.is_some(),
            caption: &image.caption,
            simplified: &image.simplified,
            title: format!("{}{}: {}", if image.r#box.is_some() { "crop of " } else { "" }, image.path, image.activation),
        })
    });
    let images = images.collect();
    let concepts = unit.concepts.iter().take(CANDIDATES).map(|concept| show_concept(concept, album)).collect();
    Unit {
        layer: &unit.layer,
        unit: unit.unit,
        state: state(unit),
        label: &unit.label,
        others: unit.labels.iter().skip(1).map(String::as_str).collect(),
        message: &unit.message,
        why: why(unit),
        probed,
        images,
        concepts,
        warnings: &unit.warnings,
        range: format!("{} to {}", unit.lowest, unit.highest),
    }
}

fn show_concept<'r>(concept: &'r RankedConcept, album: &mut Pictures<'_>) -> Concept<'r> {
    let mut pictures: Vec<_> = concept.pictures.iter().filter(|picture| picture.activation.is_some()).collect();
    pictures.sort_by_key(|picture| (picture.rank, picture.index));
    let drawn = pictures.iter().take(DRAWN).filter_map(|picture| {
        let activation = picture.activation.unwrap_or_default();
        Some(Drawn { picture: album.picture(&picture.digest)?.0, rank: picture.rank, title: format!("rank {}, activation {activation}", picture.rank) })
    });
    let drawn = drawn.collect();
    let scores = concept.scores.as_ref().map_or_else(Vec::new, |scores| {
        vec![
            ("mean", format!("{:.2}", scores.mean)),
            ("topk_squared", format!("{:.1}", scores.topk_squared)),
            ("image_products", format!("{:.4}", scores.image_products)),
            ("topk_squared_image_products", format!("{:.4}", scores.topk_squared_image_products)),
        ]
    });
    Concept {
        concept: &concept.concept,
        score: concept.score.map(|score| format!("{score:.3}")).unwrap_or_default(),
        scores,
        drawn,
        unusable: concept.pictures.len() - pictures.len(),
    }
}

/// In a sentence, what decided.
fn why(unit: &UnitResult) -> String {
    let Some(best) = unit.concepts.first().filter(|_| !unit.label.is_empty()) else { return String::new() };
    let mut ranks: Vec<u32> = best.pictures.iter().map(|picture| picture.rank).filter(|rank| *rank > 0).collect();
    ranks.sort_unstable();
    let all: usize = unit.concepts.iter().flat_map(|concept| &concept.pictures).filter(|picture| picture.rank > 0).count();
    let ranks: Vec<String> = ranks.iter().take(5).map(u32::to_string).collect();
    let likeness = best.scores.as_ref().map(|scores| scores.image_products).unwrap_or_default();
    match unit.concepts.len() {
        1 => format!("The only candidate; likeness of its drawn pictures to the unit's own: {likeness:.2}."),
        n => format!(
            "Of {n} candidates its drawn pictures excite the unit most or look most like its own: best ranks {} of {all}, likeness {likeness:.2}.",
            ranks.join(", ")
        ),
    }
}

/// A picture's size in its frame, for a style.
fn fit((width, height): Size) -> String {
    let scale = FRAME / f64::from(width.max(height).max(1));
    format!("width:{:.1}px;height:{:.1}px", f64::from(width) * scale, f64::from(height) * scale)
}

/// A box as shares of a picture, for a style.
fn place(area: &Area, (width, height): Size) -> String {
    let share = |edge: u32, side: u32| 100.0 * f64::from(edge) / f64::from(side.max(1));
    let (left, top) = (share(area.left, width), share(area.top, height));
    format!("left:{left:.2}%;top:{top:.2}%;width:{:.2}%;height:{:.2}%", share(area.right, width) - left, share(area.bottom, height) - top)
}

/// A picture's key in the page, and its width and height.
type Placed = (usize, Size);

/// Width and height.
type Size = (u32, u32);

/// Thumbnails of pictures, each once.
#[derive(Debug, Default)]
struct Album {
    /// Those that are not in the page yet.
    thumbnails: Vec<String>,
    given: usize,
    known: BTreeMap<String, Option<Placed>>,
}

/// An album, and where its pictures come from.
struct Pictures<'a> {
    album: &'a mut Album,
    find: &'a dyn Fn(&str) -> Option<Bytes>,
}

impl Pictures<'_> {
    /// The key of a picture, and its width and height; none if it is not there or can't be read.
    fn picture(&mut self, digest: &str) -> Option<Placed> {
        if let Some(known) = self.album.known.get(digest) {
            return *known;
        }
        let made = self.thumbnail(digest);
        self.album.known.insert(digest.to_owned(), made);
        made
    }

    fn thumbnail(&mut self, digest: &str) -> Option<Placed> {
        if digest.is_empty() {
            return None;
        }
        let bytes = (self.find)(digest)?;
        let picture = decode(&bytes, PictureLimits::default()).ok()?;
        let size = picture.dimensions();
        let format = image::guess_format(&bytes).ok()?;
        let uri = if bytes.len() <= SMALL && format == ImageFormat::Png {
            data_uri("png", &bytes)
        } else {
            let mut jpeg = Vec::new();
            DynamicImage::ImageRgb8(picture).thumbnail(THUMBNAIL, THUMBNAIL).write_to(&mut Cursor::new(&mut jpeg), ImageFormat::Jpeg).ok()?;
            data_uri("jpeg", &jpeg)
        };
        Some((self.album.add(uri), size))
    }

    /// An activation map as a shade to lay over its picture: clear where the unit is excited, dark where it is not.
    fn map(&mut self, digest: &str) -> Option<usize> {
        if digest.is_empty() {
            return None;
        }
        let key = format!("map {digest}");
        if let Some(known) = self.album.known.get(&key) {
            return known.map(|(key, _)| key);
        }
        // It is grey: any of its colours will do.
        let grey = decode(&(self.find)(digest)?, PictureLimits::default()).ok()?;
        let shade =
            RgbaImage::from_fn(grey.width(), grey.height(), |x, y| image::Rgba([8, 12, 28, ((255 - u16::from(grey.get_pixel(x, y).0[0])) * 215 / 255) as u8]));
        let mut png = Vec::new();
        shade.write_to(&mut Cursor::new(&mut png), ImageFormat::Png).ok()?;
        let made = self.album.add(data_uri("png", &png));
        self.album.known.insert(key, Some((made, grey.dimensions())));
        Some(made)
    }
}

impl Album {
    fn add(&mut self, uri: String) -> usize {
        self.thumbnails.push(uri);
        self.given += 1;
        self.given - 1
    }
}

fn data_uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:image/{kind};base64,{}", STANDARD.encode(bytes))
}
