//! The canvas: where activation maps and pictures meet (A.1.1).
//!
//! An activation map covers what the network saw of a picture, which is less than the picture where the network's pre-processing crops
//! its centre. The canvas is that part in its own aspect, small enough to threshold; boxes found on it are mapped back to the picture.
//! (The authors squash every picture to 375 × 375 and spread the map over the whole of it, whatever the network saw.)

use crate::boxes::BoundingBox;

/// Longest side that a canvas may have.
pub const LONGEST_SIDE: u32 = 4096;

/// What is computed in floating point may miss the whole number that is meant by this much, in pixels.
const SLACK: f64 = 1e-9;

/// What of a picture the network saw, in pixels of the picture after its EXIF orientation is applied; edges may cut through pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

impl Seen {
    /// None if it is no part of a picture: edges are at least 0, sides above 0, and nothing lies beyond 2³¹ pixels.
    pub fn new(left: f64, top: f64, width: f64, height: f64) -> Option<Self> {
        let inside = |from: f64, length: f64| from >= 0.0 && length > 0.0 && from + length <= f64::from(1_u32 << 31);
        (inside(left, width) && inside(top, height)).then_some(Self { left, top, width, height })
    }
}

/// The size in pixels of what activation maps are brought to; both sides are 1 to [`LONGEST_SIDE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Canvas {
    width: u32,
    height: u32,
}

impl Canvas {
    /// The canvas of what was seen: as large, or shrunk until its longer side is `canvas_side` (taken as 1 to [`LONGEST_SIDE`]). Sides
    /// are rounded half up, and at least 1.
    pub fn new(seen: &Seen, canvas_side: u32) -> Self {
        let most = f64::from(canvas_side.clamp(1, LONGEST_SIDE));
        let longer = seen.width.max(seen.height).max(most);
        let side = |length: f64| (length * most / longer + 0.5 + SLACK).floor().max(1.0) as u32;
        Self { width: side(seen.width), height: side(seen.height) }
    }

    /// Rows and columns.
    pub fn size(&self) -> (u32, u32) {
        (self.height, self.width)
    }

    /// All of it.
    pub fn bounds(&self) -> BoundingBox {
        BoundingBox { left: 0, top: 0, right: self.width, bottom: self.height }
    }

    /// A box on the canvas as a box of whole pixels of the picture: left and top floored, right and bottom raised, nothing beyond the
    /// pixels that the network saw some of.
    pub fn in_picture(&self, on_canvas: &BoundingBox, seen: &Seen) -> BoundingBox {
        let (left, right) = stretch(on_canvas.left, on_canvas.right, self.width, seen.left, seen.width);
        let (top, bottom) = stretch(on_canvas.top, on_canvas.bottom, self.height, seen.top, seen.height);
        BoundingBox { left, top, right, bottom }
    }
}

/// `from..to` of `side` canvas pixels, in pixels of a picture that was seen for `length` from `start`.
fn stretch(from: u32, to: u32, side: u32, start: f64, length: f64) -> (u32, u32) {
    let edge = |at: u32| start + f64::from(at.min(side)) * length / f64::from(side);
    let first = (edge(from) + SLACK).floor();
    // At least one pixel, however little was seen of it.
    let last = (edge(to) - SLACK).ceil().max(first + 1.0);
    (first as u32, last as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(width: f64, height: f64, side: u32) -> (u32, u32) {
        let Canvas { width, height } = Canvas::new(&Seen::new(0.0, 0.0, width, height).unwrap(), side);
        (width, height)
    }

    #[test]
    fn the_longer_side_is_bounded_and_the_aspect_kept() {
        assert_eq!(size(500.0, 333.0, 375), (375, 250), "249.75 is rounded up");
        assert_eq!(size(333.0, 500.0, 375), (250, 375));
        assert_eq!(size(750.0, 375.0, 375), (375, 188), "187.5 is rounded up");
        assert_eq!(size(224.0, 224.0, 375), (224, 224), "nothing is enlarged");
        assert_eq!(size(10_000.0, 1.0, 375), (375, 1), "no side is 0");
        assert_eq!(size(437.5, 437.5, 375), (375, 375));
        assert_eq!(size(20.4, 20.5, 375), (20, 21));
        assert_eq!(size(9000.0, 9000.0, u32::MAX), (4096, 4096));
    }

    #[test]
    fn boxes_are_mapped_outwards() {
        // Pixels of the canvas are 437.5 / 375 = 1.1666... wide and 333 / 285 = 1.168... high.
        let seen = Seen::new(31.25, 0.0, 437.5, 333.0).unwrap();
        let canvas = Canvas::new(&seen, 375);
        assert_eq!(canvas.size(), (285, 375));
        let found = canvas.in_picture(&BoundingBox { left: 3, top: 1, right: 6, bottom: 284 }, &seen);
        assert_eq!(found, BoundingBox { left: 34, top: 1, right: 39, bottom: 332 });
        assert_eq!(canvas.in_picture(&canvas.bounds(), &seen), BoundingBox { left: 31, top: 0, right: 469, bottom: 333 });
    }

    #[test]
    fn whole_pixels_stay_whole_despite_floating_point() {
        // Pictures of 168 and 122 pixels shrunk to 370 and 286, of which the network saw the 224 in the middle: the middle of the canvas
        // is the middle of the picture.
        let (left, width) = (73.0 * (168.0 / 370.0), 224.0 * (168.0 / 370.0));
        assert!(left + 51.0 * width / 102.0 > 84.0, "the case that this is about");
        assert_eq!(stretch(50, 51, 102, left, width), (83, 84));
        let (left, width) = (31.0 * (122.0 / 286.0), 224.0 * (122.0 / 286.0));
        assert!(left + 48.0 * width / 96.0 < 61.0, "the case that this is about");
        assert_eq!(stretch(48, 49, 96, left, width), (61, 62));
    }

    #[test]
    fn a_box_has_a_pixel_however_little_was_seen() {
        assert_eq!(stretch(0, 1, 1, 3.0, 1e-10), (3, 4));
        assert_eq!(stretch(0, 1, 1, 3.0 - 5e-11, 1e-10), (3, 4));
    }

    #[test]
    fn nothing_outside_a_picture_was_seen() {
        for (left, top, width, height) in [(-1.0, 0.0, 5.0, 5.0), (0.0, 0.0, 0.0, 5.0), (0.0, f64::NAN, 5.0, 5.0), (0.0, 0.0, 5.0, f64::INFINITY)] {
            assert_eq!(Seen::new(left, top, width, height), None);
        }
    }
}
