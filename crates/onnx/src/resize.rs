//! Pictures to other sizes, bit for bit as Pillow makes them, because published networks were trained and measured on pictures that Pillow resized.
//!
//! Rows are resized first, then columns, with bytes in between. A filter is widened by the factor of shrinking, its weights are normalised in `f64`
//! and kept with 22 binary places; sums are rounded half up and cut to a byte.

use image::RgbImage;

/// How pixels are weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The nearest pixel alone.
    Nearest,
    /// A tent, one pixel to each side.
    Bilinear,
    /// Keys' cubic with a = -0.5, two pixels to each side.
    Bicubic,
    /// A windowed sinc, three pixels to each side.
    Lanczos,
}

impl Filter {
    /// Pixels to each side that count where nothing shrinks.
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, distance: f64) -> f64 {
        let x = distance.abs();
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        match self {
            Self::Nearest => 1.0,
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            Self::Lanczos if x < 3.0 => sinc(x) * sinc(x / 3.0),
            Self::Bicubic | Self::Lanczos => 0.0,
        }
    }
}

const PLACES: u32 = 22;
const CHANNELS: usize = 3;

/// What of a line makes one of its new pixels: the weights of those from `first` on.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// The taps of each pixel of a line that goes from one length to another; neither is 0.
fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    if filter == Filter::Nearest {
        // Added up and not multiplied: that decides where a centre falls on an edge.
        let centres = std::iter::successors(Some(0.5 * scale), |centre| Some(centre + scale)).take(to);
        return centres.map(|centre| Taps { first: (centre as usize).min(from - 1), weights: vec![1 << PLACES] }).collect();
    }
    let one = |at: usize| {
        let centre = (at as f64 + 0.5) * scale;
        let wide = scale.max(1.0);
        let reach = filter.support() * wide;
        let first = (centre - reach + 0.5).max(0.0) as usize;
        let last = ((centre + reach + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..last).map(|i| filter.weight((i as f64 - centre + 0.5) / wide)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: &f64| (weight / sum * f64::from(1 << PLACES)).round() as i32;
        Taps { first, weights: weights.iter().map(fixed).collect() }
    };
    (0..to).map(one).collect()
}

fn byte(sum: i32) -> u8 {
    (sum >> PLACES).clamp(0, 255) as u8
}

/// The picture in another size; no side may be 0.
pub fn resize(picture: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let half = 1_i32 << (PLACES - 1);
    let mut picture = picture.clone();
    if width != picture.width() {
        let taps = taps(picture.width() as usize, width as usize, filter);
        let mut bytes = Vec::with_capacity(width as usize * picture.height() as usize * CHANNELS);
        for row in picture.chunks_exact(picture.width() as usize * CHANNELS) {
            for Taps { first, weights } in &taps {
                let mut sums = [half; CHANNELS];
                for (pixel, weight) in row[first * CHANNELS..].chunks_exact(CHANNELS).zip(weights) {
                    for (sum, value) in sums.iter_mut().zip(pixel) {
                        *sum += i32::from(*value) * weight;
                    }
                }
                bytes.extend(sums.map(byte));
            }
        }
        picture = RgbImage::from_raw(width, picture.height(), bytes).unwrap_or_default();
    }
    if height != picture.height() {
        let line = width as usize * CHANNELS;
        let mut bytes = Vec::with_capacity(height as usize * line);
        let mut sums = vec![half; line];
        for Taps { first, weights } in taps(picture.height() as usize, height as usize, filter) {
            sums.fill(half);
            for (row, weight) in picture.as_raw()[first * line..].chunks_exact(line).zip(weights) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += i32::from(*value) * weight;
                }
            }
            bytes.extend(sums.iter().copied().map(byte));
        }
        picture = RgbImage::from_raw(width, height, bytes).unwrap_or_default();
    }
    picture
}
