//! Pictures to tensors: decoding with limits, resizing as Pillow does, normalising.

use std::{
    io::{self, Cursor},
    panic::catch_unwind,
    path::{Path, PathBuf},
};

use dnd_mesh::MAX_PICTURE_BYTES;
use dnd_proto::v1::{Preprocessing, Resampling, ResizeMode};
use image::{DynamicImage, ImageDecoder as _, ImageFormat, ImageReader, RgbImage};
use serde::Deserialize;
use walkdir::WalkDir;

use crate::{
    Error,
    resize::{Filter, resize},
};

/// Bytes of a decoded picture and what its decoder holds beside it, metadata too, at most: of 64 million pixels with four channels of 16 bits.
const MOST_DECODED: u64 = 512 << 20;
/// Scans of a JPEG at most: each is a pass over the whole picture. Progressive ones have about ten.
const MOST_SCANS: usize = 64;

/// What a picture may hold before it is decoded.
#[derive(Debug, Clone, Copy)]
pub struct PictureLimits {
    /// Encoded bytes.
    pub bytes: usize,
    /// Width times height.
    pub pixels: u64,
}

impl Default for PictureLimits {
    fn default() -> Self {
        Self { bytes: MAX_PICTURE_BYTES, pixels: 64_000_000 }
    }
}

/// Files with these endings are taken for pictures; others in a folder are not looked at.
pub const ENDINGS: [&str; 11] = ["bmp", "gif", "jpeg", "jpg", "pbm", "pgm", "png", "ppm", "tif", "tiff", "webp"];

/// Whether a file is taken for a picture, by its name: one of [`ENDINGS`], and not hidden.
pub fn is_picture(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase());
    !hidden && ending.is_some_and(|ending| ENDINGS.contains(&ending.as_str()))
}

/// What a folder holds.
#[derive(Debug, Default)]
pub struct Listing {
    /// Each picture's name, relative to the folder with `/` between parts, and its file, in the order of the names' bytes.
    pub pictures: Vec<(String, PathBuf)>,
    /// What could not be listed, and why.
    pub unreadable: Vec<(String, String)>,
}

/// The pictures in a folder and its subfolders, links followed.
pub fn in_folder(root: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let name = |path: &Path| path.strip_prefix(root).unwrap_or(path).iter().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/");
    for entry in WalkDir::new(root).follow_links(true) {
        match entry {
            Ok(entry) if entry.file_type().is_file() && is_picture(entry.path()) => listing.pictures.push((name(entry.path()), entry.into_path())),
            Ok(_) => {}
            Err(error) if error.depth() > 0 => {
                let path = error.path().map(name).unwrap_or_default();
                let reason = if error.loop_ancestor().is_some() {
                    "a link that leads in a circle".to_owned()
                } else {
                    error.io_error().map(ToString::to_string).unwrap_or_default()
                };
                listing.unreadable.push((path, reason));
            }
            Err(error) => return Err(error.into()),
        }
    }
    listing.pictures.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
    Ok(listing)
}

/// Decodes a picture (of an animation the first frame) upright, by its EXIF orientation, and as RGB; transparency is dropped. One that ends too early is
/// refused. A panic of a decoder is the picture's fault.
pub fn decode(bytes: &[u8], limits: PictureLimits) -> Result<RgbImage, Error> {
    catch_unwind(|| decode_whole(bytes, limits)).unwrap_or_else(|_| Err(Error::Picture("not a picture that can be read: its decoder broke on it".to_owned())))
}

fn decode_whole(bytes: &[u8], limits: PictureLimits) -> Result<RgbImage, Error> {
    if bytes.is_empty() {
        return Err(Error::Picture("the file is empty".to_owned()));
    }
    if bytes.len() > limits.bytes {
        return Err(Error::Picture(format!("{} bytes; at most {} are read", bytes.len(), limits.bytes)));
    }
    let unreadable = |e: image::ImageError| Error::Picture(format!("not a picture that can be read: {e}"));
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| Error::Picture(e.to_string()))?;
    let mut held = image::Limits::no_limits();
    held.max_alloc = Some(MOST_DECODED);
    reader.limits(held);
    if reader.format().is_none() {
        return Err(Error::Picture("not a picture: the contents are in no known format (PNG, JPEG, WebP, GIF, BMP, TIFF, PNM)".to_owned()));
    }
    // The decoder fills what is missing of a JPEG with grey, and says nothing.
    if reader.format() == Some(ImageFormat::Jpeg) {
        match scans(bytes) {
            None => return Err(Error::Picture("not a picture that can be read: the JPEG ends too early".to_owned())),
            Some(scans) if scans > MOST_SCANS => return Err(Error::Picture(format!("a JPEG of {scans} scans; at most {MOST_SCANS} are decoded"))),
            Some(_) => {}
        }
    }
    let mut decoder = reader.into_decoder().map_err(unreadable)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.pixels {
        return Err(Error::Picture(format!("{width} x {height} is {pixels} pixels; at most {} are decoded", limits.pixels)));
    }
    if pixels == 0 {
        return Err(Error::Picture(format!("{width} x {height}: no pixels")));
    }
    if decoder.total_bytes() > MOST_DECODED {
        return Err(Error::Picture(format!("it would take {} bytes; at most {MOST_DECODED} are decoded", decoder.total_bytes())));
    }
    let orientation = decoder.orientation().map_err(unreadable)?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(unreadable)?;
    picture.apply_orientation(orientation);
    Ok(picture.into_rgb8())
}

/// The scans of a JPEG that goes on until its end marker; what comes after that, such as a phone's film, is none of its own.
fn scans(jpeg: &[u8]) -> Option<usize> {
    let mut rest = jpeg;
    let mut scans = 0;
    loop {
        // To the next marker: over what a scan holds (in which a byte of 255 is followed by 0 or a restart), fill bytes, and stray ones.
        let at = rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0x01 | 0xD0..=0xD8 | 0xFF))?;
        let (marker, after) = (rest[at + 1], &rest[at + 2..]);
        match marker {
            0xD9 => return Some(scans),
            0xDA => scans += 1,
            _ => {}
        }
        let &[high, low] = after.first_chunk()?;
        rest = after.get(usize::from(u16::from_be_bytes([high, low]))..)?;
    }
}

/// Encodes a picture as PNG.
pub fn encode_png(picture: &RgbImage) -> Result<Vec<u8>, Error> {
    let mut png = Vec::new();
    picture.write_to(&mut Cursor::new(&mut png), ImageFormat::Png).map_err(|e| Error::Picture(format!("can't be written as PNG: {e}")))?;
    Ok(png)
}

/// What of a picture a network sees after its pre-processing, in pixels of the upright picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// Left edge.
    pub left: f64,
    /// Top edge.
    pub top: f64,
    /// Width.
    pub width: f64,
    /// Height.
    pub height: f64,
}

/// Pixels of a network's input at most.
const MOST_INPUT: u32 = 1 << 24;
/// Pixels of a resized picture at most.
const MOST_RESIZED: u64 = 1 << 26;

/// The pre-processing of a network, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessor {
    resize: Resize,
    width: u32,
    height: u32,
    filter: Filter,
    mean: [f32; 3],
    std: [f32; 3],
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Resize {
    Squash,
    ShortestEdge(u32),
}

/// ImageNet's mean and deviation, which published networks are trained with.
const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// What is used for a network of that input size that says nothing: the shorter side to 256/224 of it, the centre, bilinear, ImageNet's mean and deviation.
pub fn default_preprocessing(height: u32, width: u32) -> Preprocessing {
    let shorter = f64::from(height.max(width)) * 256.0 / 224.0;
    Preprocessing {
        resize_mode: ResizeMode::ShortestEdge.into(),
        height,
        width,
        shortest_edge: shorter.round() as u32,
        resampling: Resampling::Bilinear.into(),
        mean: IMAGENET_MEAN.to_vec(),
        std: IMAGENET_STD.to_vec(),
    }
}

impl Preprocessor {
    /// Checks a pre-processing; the error names the field.
    pub fn new(said: &Preprocessing) -> Result<Self, Error> {
        let wrong = |field: &str, problem: String| Error::Graph(format!("preprocessing.{field}: {problem}"));
        let (width, height) = (said.width, said.height);
        if !(1..=16_384).contains(&width) || !(1..=16_384).contains(&height) {
            return Err(wrong("height, width", format!("{height} x {width}; each is 1 to 16384")));
        }
        if height * width > MOST_INPUT {
            return Err(wrong("height, width", format!("{height} x {width}; together at most {MOST_INPUT} pixels")));
        }
        let resize = match said.resize_mode() {
            ResizeMode::Unspecified | ResizeMode::Squash => Resize::Squash,
            ResizeMode::ShortestEdge if said.shortest_edge < height.max(width) || said.shortest_edge > 16_384 => {
                return Err(wrong("shortest_edge", format!("{}; it is at least the larger of height and width, and at most 16384", said.shortest_edge)));
            }
            ResizeMode::ShortestEdge => Resize::ShortestEdge(said.shortest_edge),
        };
        let three = |field: &str, values: &[f32], low: f32| match values {
            [r, g, b] if values.iter().all(|v| v.is_finite() && *v > low) => Ok([*r, *g, *b]),
            _ => Err(wrong(field, format!("{values:?}; three finite numbers, one a channel{}", if low == 0.0 { ", above 0" } else { "" }))),
        };
        let filter = match said.resampling() {
            Resampling::Unspecified | Resampling::Bilinear => Filter::Bilinear,
            Resampling::Bicubic => Filter::Bicubic,
            Resampling::Lanczos => Filter::Lanczos,
            Resampling::Nearest => Filter::Nearest,
        };
        Ok(Self { resize, width, height, filter, mean: three("mean", &said.mean, f32::MIN)?, std: three("std", &said.std, 0.0)? })
    }

    /// Height and width of the network's input.
    pub fn size(&self) -> (usize, usize) {
        (self.height as usize, self.width as usize)
    }

    /// Values of one input: 3 x height x width.
    pub fn values(&self) -> usize {
        3 * self.height as usize * self.width as usize
    }

    /// The sides that a picture is resized to, before its centre is cropped.
    fn resized(&self, picture: (u32, u32)) -> (u32, u32) {
        match self.resize {
            Resize::Squash => (self.width, self.height),
            Resize::ShortestEdge(edge) => {
                let (width, height) = picture;
                let long = |long: u32, short: u32| (u64::from(edge) * u64::from(long) / u64::from(short.max(1))).min(1 << 20) as u32;
                if width <= height { (edge, long(height, width)) } else { (long(width, height), edge) }
            }
        }
    }

    /// What of a picture of that width and height the network sees.
    pub fn seen(&self, picture: (u32, u32)) -> Seen {
        let (width, height) = self.resized(picture);
        let (left, top) = ((width - self.width.min(width)) / 2, (height - self.height.min(height)) / 2);
        let (x, y) = (f64::from(picture.0) / f64::from(width), f64::from(picture.1) / f64::from(height));
        Seen { left: f64::from(left) * x, top: f64::from(top) * y, width: f64::from(self.width) * x, height: f64::from(self.height) * y }
    }

    /// Appends a picture's input to `tensor`: channels, rows, columns.
    pub fn append(&self, picture: &RgbImage, tensor: &mut Vec<f32>) -> Result<(), Error> {
        let (width, height) = self.resized(picture.dimensions());
        // A picture that is much longer than it is wide, brought to the network's size by its shorter side.
        if u64::from(width) * u64::from(height) > MOST_RESIZED {
            let (from_width, from_height) = picture.dimensions();
            return Err(Error::Picture(format!(
                "{from_width} x {from_height} is too thin: it would be resized to {width} x {height} before its centre is cropped"
            )));
        }
        let resized = resize(picture, width, height, self.filter);
        let (left, top) = ((width - self.width) / 2, (height - self.height) / 2);
        for channel in 0..3 {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            for row in top..top + self.height {
                for column in left..left + self.width {
                    let value = f32::from(resized.get_pixel(column, row).0[channel]) / 255.0;
                    tensor.push((value - mean) / std);
                }
            }
        }
        Ok(())
    }
}

/// `preprocessor_config.json` as the transformers library writes it.
#[derive(Debug, Deserialize)]
pub struct PreprocessorConfig {
    #[serde(default = "yes")]
    do_resize: bool,
    size: Option<Size>,
    #[serde(default)]
    do_center_crop: bool,
    crop_size: Option<Size>,
    #[serde(default = "bicubic")]
    resample: u8,
    #[serde(default = "yes")]
    do_rescale: bool,
    rescale_factor: Option<f64>,
    #[serde(default = "yes")]
    do_normalize: bool,
    image_mean: Option<Vec<f32>>,
    image_std: Option<Vec<f32>>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Size {
    Square(u32),
    Sides { height: u32, width: u32 },
    Shortest { shortest_edge: u32 },
}

fn yes() -> bool {
    true
}

/// Pillow's number for its bicubic filter, the library's default.
fn bicubic() -> u8 {
    3
}

impl PreprocessorConfig {
    /// The pre-processing that the file describes; the error says what it asks for that can't be done.
    pub fn preprocessing(&self) -> Result<Preprocessing, String> {
        let sides = |size: Size| match size {
            Size::Square(side) => (side, side),
            Size::Sides { height, width } => (height, width),
            Size::Shortest { shortest_edge } => (shortest_edge, shortest_edge),
        };
        let size = self.size.filter(|_| self.do_resize).ok_or("no size: pictures must be resized to the network's input")?;
        let crop = self.crop_size.filter(|_| self.do_center_crop).map(sides);
        let (resize_mode, shortest_edge, (height, width)) = match (size, crop) {
            (Size::Shortest { shortest_edge } | Size::Square(shortest_edge), Some(crop)) => (ResizeMode::ShortestEdge, shortest_edge, crop),
            (Size::Shortest { .. }, None) => return Err("size.shortest_edge without a centre crop gives inputs of different sizes".to_owned()),
            (size, crop) if crop.is_none_or(|crop| crop == sides(size)) => (ResizeMode::Squash, 0, sides(size)),
            (_, Some(_)) => return Err("size with height and width, then another crop_size: not supported".to_owned()),
            (_, None) => return Err("no size".to_owned()),
        };
        let resampling = match self.resample {
            0 => Resampling::Nearest,
            1 => Resampling::Lanczos,
            2 => Resampling::Bilinear,
            3 => Resampling::Bicubic,
            other => return Err(format!("resample {other}: 0 (nearest), 1 (Lanczos), 2 (bilinear) and 3 (bicubic) are known")),
        };
        let factor = if self.do_rescale { self.rescale_factor.unwrap_or(1.0 / 255.0) } else { 1.0 };
        // (v * factor - mean) / std with v in 0..255 is (v / 255 - m) / s with m and s over 255 * factor.
        let scale = (255.0 * factor) as f32;
        let (mean, std) = match (self.do_normalize, &self.image_mean, &self.image_std) {
            (false, _, _) => (vec![0.0; 3], vec![1.0; 3]),
            (true, Some(mean), Some(std)) => (mean.clone(), std.clone()),
            (true, _, _) => return Err("do_normalize without image_mean and image_std".to_owned()),
        };
        let scaled = |values: Vec<f32>| values.into_iter().map(|v| if (scale - 1.0).abs() < 1e-6 { v } else { v / scale }).collect();
        Ok(Preprocessing { resize_mode: resize_mode.into(), height, width, shortest_edge, resampling: resampling.into(), mean: scaled(mean), std: scaled(std) })
    }
}

#[cfg(test)]
mod tests {
    use image::codecs::jpeg::JpegEncoder;

    use super::*;

    fn jpeg(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        let picture = RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8]));
        JpegEncoder::new(&mut bytes).encode_image(&picture).unwrap();
        bytes
    }

    #[test]
    fn a_jpeg_that_ends_too_early_is_refused_and_one_with_something_after_its_end_is_not() {
        let whole = jpeg(64, 48);
        assert_eq!(decode(&whole, PictureLimits::default()).unwrap().dimensions(), (64, 48));
        for part in [whole.len() / 2, whole.len() - 2] {
            let error = decode(&whole[..part], PictureLimits::default()).unwrap_err().to_string();
            assert!(error.contains("ends too early"), "{error}");
        }
        // A phone's film may hold bytes that look like a scan's beginning.
        for after in [&b"made by a camera"[..], b"film \xFF\xDA and \xFF\xC0 film"] {
            assert!(decode(&[&whole[..], after].concat(), PictureLimits::default()).is_ok());
        }
    }

    #[test]
    fn a_picture_is_turned_upright() {
        // An EXIF segment that says: turned by 90 degrees.
        let exif = b"\xFF\xE1\x00\x22Exif\0\0MM\0\x2A\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
        let plain = jpeg(64, 48);
        let turned = [&plain[..2], exif, &plain[2..]].concat();
        let (plain, turned) = (decode(&plain, PictureLimits::default()).unwrap(), decode(&turned, PictureLimits::default()).unwrap());
        assert_eq!(turned.dimensions(), (48, 64));
        assert_eq!(turned.get_pixel(47, 0), plain.get_pixel(0, 0));
    }

    #[test]
    fn pixels_are_counted_before_they_are_decoded() {
        let error = decode(&jpeg(64, 48), PictureLimits { pixels: 3000, ..PictureLimits::default() }).unwrap_err().to_string();
        assert!(error.contains("3072 pixels") && error.contains("3000"), "{error}");
    }

    fn shortest_edge(edge: u32, side: u32) -> Preprocessor {
        let said = Preprocessing { shortest_edge: edge, ..default_preprocessing(side, side) };
        Preprocessor::new(&said).unwrap()
    }

    #[test]
    fn the_network_sees_the_centre_and_says_what_of_the_picture_that_is() {
        let seen = shortest_edge(256, 224).seen((512, 256));
        assert_eq!(seen, Seen { left: 144.0, top: 16.0, width: 224.0, height: 224.0 });
        let squashed = Preprocessor::new(&Preprocessing { resize_mode: ResizeMode::Squash.into(), ..default_preprocessing(224, 224) }).unwrap();
        assert_eq!(squashed.seen((500, 300)), Seen { left: 0.0, top: 0.0, width: 500.0, height: 300.0 });
    }

    #[test]
    fn a_thin_picture_is_refused_and_takes_no_memory() {
        let error = shortest_edge(256, 224).append(&RgbImage::new(1, 5000), &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("1 x 5000") && error.contains("too thin"), "{error}");
    }

    #[test]
    fn values_are_scaled_and_normalised_channel_by_channel() {
        let said = Preprocessing { resize_mode: ResizeMode::Squash.into(), mean: vec![0.0, 0.5, 1.0], std: vec![1.0, 0.5, 2.0], ..default_preprocessing(1, 2) };
        let mut tensor = Vec::new();
        let picture = RgbImage::from_raw(2, 1, vec![255, 255, 255, 0, 0, 0]).unwrap();
        Preprocessor::new(&said).unwrap().append(&picture, &mut tensor).unwrap();
        assert_eq!(tensor, [1.0, 0.0, 1.0, -1.0, 0.0, -0.5]);
    }

    #[test]
    fn a_pre_processing_that_cannot_be_done_is_refused_by_its_field() {
        for (said, field) in [
            (Preprocessing { height: 0, ..default_preprocessing(224, 224) }, "height"),
            (Preprocessing { shortest_edge: 100, ..default_preprocessing(224, 224) }, "shortest_edge"),
            (Preprocessing { mean: vec![0.5], ..default_preprocessing(224, 224) }, "mean"),
            (Preprocessing { std: vec![1.0, 0.0, 1.0], ..default_preprocessing(224, 224) }, "std"),
        ] {
            let error = Preprocessor::new(&said).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
