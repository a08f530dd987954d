//! Salient regions and their bounding boxes (A.1.1, step 2).

use crate::{boxes::BoundingBox, resize::HeatMap};

/// A region of the foreground that is seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Column and row of its first pixel in raster order.
    pub first: (u32, u32),
    /// The smallest box that holds it.
    pub bounds: BoundingBox,
}

/// The external regions of what lies above the threshold, in raster order of their first pixels.
///
/// Pixels that touch at a side or a corner are of one region. A region inside a hole of another is not external, however deep; each
/// region here is one contour of OpenCV's `findContours` with `RETR_EXTERNAL`.
pub fn external_regions(heat: &HeatMap, threshold: u8) -> Vec<Region> {
    // A frame of background all around: its corner lies outside every region, and no neighbour of a pixel lies beyond it.
    let (height, width) = heat.size();
    let stride = width + 2;
    let mut cells = vec![Cell::Background; stride * (height + 2)];
    for (line, row) in cells.chunks_exact_mut(stride).skip(1).zip(heat.rows()) {
        for (cell, &value) in line.iter_mut().skip(1).zip(row) {
            if value > threshold {
                *cell = Cell::Foreground;
            }
        }
    }
    let row = stride as isize;
    let sides = [-row, -1, 1, row];
    let sides_and_corners = [-row - 1, -row, -row + 1, -1, 1, row - 1, row, row + 1];

    // Background joins at sides only, or it would leak through an outline that is joined at corners.
    flood(&mut cells, 0, Cell::Background, Cell::Outside, &sides, |_| ());
    let mut regions = Vec::new();
    for start in stride + 1..cells.len() {
        if cells[start] != Cell::Foreground {
            continue;
        }
        // What is left of a region's first pixel surrounds the region.
        let external = cells[start - 1] == Cell::Outside;
        let place = |cell: usize| ((cell % stride - 1) as u32, (cell / stride - 1) as u32);
        let first = place(start);
        let mut bounds = BoundingBox { left: first.0, top: first.1, right: first.0 + 1, bottom: first.1 + 1 };
        flood(&mut cells, start, Cell::Foreground, Cell::Taken, &sides_and_corners, |cell| {
            let (x, y) = place(cell);
            bounds.left = bounds.left.min(x);
            bounds.right = bounds.right.max(x + 1);
            bounds.bottom = bounds.bottom.max(y + 1);
        });
        if external {
            regions.push(Region { first, bounds });
        }
    }
    regions
}

#[derive(Clone, Copy, PartialEq)]
enum Cell {
    Background,
    Outside,
    Foreground,
    Taken,
}

/// Turns the cell at `start`, which is `from`, into `to`, and all `from` that the steps lead to from there; tells of each cell once.
fn flood(cells: &mut [Cell], start: usize, from: Cell, to: Cell, steps: &[isize], mut tell: impl FnMut(usize)) {
    cells[start] = to;
    let mut waiting = vec![start];
    while let Some(at) = waiting.pop() {
        tell(at);
        for next in steps.iter().filter_map(|&step| at.checked_add_signed(step)) {
            if cells.get(next) == Some(&from) {
                cells[next] = to;
                waiting.push(next);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Regions of a drawing in which `#` is foreground: first pixel, and left, top, right, bottom.
    fn of(drawing: &[&str]) -> Vec<((u32, u32), [u32; 4])> {
        let values = drawing.concat().bytes().map(|c| if c == b'#' { 6 } else { 5 }).collect();
        let heat = HeatMap::new(drawing.len(), drawing[0].len(), values).unwrap();
        external_regions(&heat, 5).into_iter().map(|Region { first, bounds: b }| (first, [b.left, b.top, b.right, b.bottom])).collect()
    }

    #[test]
    fn corners_join_regions() {
        assert_eq!(of(&["#..", ".#.", "#.#"]), [((0, 0), [0, 0, 3, 3])]);
        assert_eq!(of(&["#.#", "...", "#.#"]).len(), 4);
    }

    #[test]
    fn first_pixels_are_first_in_raster_order() {
        assert_eq!(of(&["..#", "##."]), [((2, 0), [0, 0, 3, 2])]);
        assert_eq!(of(&["..#.", "#..#", "#..."]), [((2, 0), [2, 0, 4, 2]), ((0, 1), [0, 1, 1, 3])]);
    }

    #[test]
    fn regions_in_holes_are_not_external() {
        assert_eq!(of(&["#####", "#...#", "#.#.#", "#...#", "#####"]).len(), 1);
        let nested = ["#######", "#.....#", "#.###.#", "#.#.#.#", "#.###.#", "#.....#", "#######"];
        assert_eq!(of(&nested), [((0, 0), [0, 0, 7, 7])]);
    }

    #[test]
    fn a_hole_is_closed_by_corners_and_opened_by_a_side() {
        assert_eq!(of(&[".###.", "#...#", "#.#.#", "#...#", ".###."]).len(), 1);
        assert_eq!(of(&["##.##", "#...#", "#.#.#", "#...#", "#####"]).len(), 2);
    }

    #[test]
    fn no_foreground_no_region() {
        assert_eq!(of(&["...", "..."]), []);
        assert_eq!(of(&["#"]), [((0, 0), [0, 0, 1, 1])]);
    }
}
