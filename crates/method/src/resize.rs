//! From an activation map to a heat map on the canvas (A.1.1, before its step 1).

use crate::{canvas::Canvas, grid::Grid};

/// `A_k(x)`: a unit's activation map on an image.
pub type Map = Grid<f32>;

/// An activation map on the canvas: 0 where the unit responds least, 255 where it responds most.
pub type HeatMap = Grid<u8>;

/// The activation map, stretched to 0..255 by its minimum and maximum, resized to the canvas, as bytes. None if the map is constant or
/// holds a value that is NaN or infinite: no region stands out.
///
/// The stretch is computed in `f64` and rounded to `f32`. Resizing is bicubic as OpenCV's `INTER_CUBIC` on `f32` (a = −0.75, pixel
/// centres at halves, edges repeated, nothing smoothed when shrinking): columns first, then rows. Positions and weights are computed in
/// `f64` and rounded to `f32`, sums are in `f32`. (OpenCV itself has code that does so and code that is all in `f32`, with results up to
/// 0.0005 apart.) The result is clipped to 0..255 and rounded, halves to the even byte. (The authors multiply the map by 255, let it wrap
/// around, and resize the bytes.)
pub fn heat_map(map: &Map, canvas: &Canvas) -> Option<HeatMap> {
    let (height, width) = canvas.size();
    let resized = bicubic(&stretch(map)?, height as usize, width as usize);
    Some(resized.map(|value| value.clamp(0.0, 255.0).round_ties_even() as u8))
}

fn stretch(map: &Map) -> Option<Map> {
    if map.values().iter().any(|value| !value.is_finite()) {
        return None;
    }
    let lowest = f64::from(map.values().iter().copied().fold(f32::INFINITY, f32::min));
    let highest = f64::from(map.values().iter().copied().fold(f32::NEG_INFINITY, f32::max));
    (lowest < highest).then(|| map.map(|&value| ((f64::from(value) - lowest) / (highest - lowest) * 255.0) as f32))
}

/// What one pixel of the result is made of along one axis: four neighbours, and how much of each.
struct Tap {
    from: [usize; 4],
    weights: [f32; 4],
}

impl Tap {
    fn blend(&self, value: impl Fn(usize) -> f32) -> f32 {
        let ([a, b, c, d], [wa, wb, wc, wd]) = (self.from.map(value), self.weights);
        a * wa + b * wb + c * wc + d * wd
    }
}

fn bicubic(map: &Map, height: usize, width: usize) -> Map {
    let (rows, columns) = map.size();
    let across = taps(columns, width);
    let widened: Vec<Vec<f32>> = map.rows().map(|row| across.iter().map(|tap| tap.blend(|i| row[i])).collect()).collect();
    let down = taps(rows, height);
    let values = down.iter().flat_map(|tap| {
        let widened = &widened;
        (0..width).map(move |x| tap.blend(|i| widened[i][x]))
    });
    Grid::of_rows(width, values.collect())
}

/// The taps of `to` pixels out of `from`; all their neighbours are below `from`.
fn taps(from: usize, to: usize) -> Vec<Tap> {
    let scale = from as f64 / to as f64;
    let last = from as i64 - 1;
    (0..to)
        .map(|i| {
            let at = (i as f64 + 0.5) * scale - 0.5;
            let before = at.floor();
            let neighbours = [-1, 0, 1, 2].map(|step| (before as i64 + step).clamp(0, last) as usize);
            Tap { from: neighbours, weights: cubic(at - before).map(|weight| weight as f32) }
        })
        .collect()
}

/// Weights of the neighbours at −1, 0, 1 and 2 for a point at `x`, 0 ≤ x < 1.
fn cubic(x: f64) -> [f64; 4] {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let (first, second, third) = (far(x + 1.0), near(x), near(1.0 - x));
    [first, second, third, 1.0 - first - second - third]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canvas::Seen;

    fn heat(values: &[f32], height: u32, width: u32) -> Option<Vec<u8>> {
        let map = Map::new(1, values.len(), values.to_vec()).unwrap();
        let canvas = Canvas::new(&Seen::new(0.0, 0.0, width.into(), height.into()).unwrap(), 4096);
        heat_map(&map, &canvas).map(|heat| heat.values().to_vec())
    }

    #[test]
    fn at_its_own_size_a_map_is_only_stretched() {
        // 63.75, 127.5 (to the even 128), 255, 95.625, 47.8125.
        assert_eq!(heat(&[-1.0, 0.0, 1.0, 3.0, 0.5, -0.25], 1, 6).unwrap(), [0, 64, 128, 255, 96, 48]);
    }

    #[test]
    fn halves_go_to_the_even_byte() {
        assert_eq!(heat(&[0.0, 510.0, 1.0, 3.0, 5.0], 1, 5).unwrap(), [0, 255, 0, 2, 2]);
    }

    #[test]
    fn overshoot_is_clipped() {
        let bytes = heat(&[0.0, 0.0, 1.0, 1.0], 3, 40).unwrap();
        assert_eq!(bytes.len(), 120);
        assert!(bytes[..40].is_sorted(), "undershoot would wrap around: {bytes:?}");
    }

    #[test]
    fn maps_that_say_nothing_give_no_heat() {
        for values in [[2.0; 4], [1.0, f32::NAN, 2.0, 3.0], [1.0, f32::INFINITY, 2.0, 3.0]] {
            assert_eq!(heat(&values, 8, 8), None);
        }
    }

    #[test]
    fn the_range_of_f32_is_no_limit() {
        assert_eq!(heat(&[f32::MIN, 0.0, f32::MAX], 1, 3).unwrap(), [0, 128, 255]);
        assert_eq!(heat(&[0.0, f32::from_bits(1)], 1, 2).unwrap(), [0, 255]);
    }
}
