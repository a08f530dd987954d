//! Bounding boxes.

/// A box of whole pixels: columns `left..right`, rows `top..bottom`, from the upper left corner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BoundingBox {
    /// First column.
    pub left: u32,
    /// First row.
    pub top: u32,
    /// One past the last column.
    pub right: u32,
    /// One past the last row.
    pub bottom: u32,
}

impl BoundingBox {
    /// Pixels in it.
    pub fn area(&self) -> u64 {
        u64::from(self.right.saturating_sub(self.left)) * u64::from(self.bottom.saturating_sub(self.top))
    }

    /// Intersection over union, 0 to 1; 0 if both are empty. Rounded to `f32`, the type of the thresholds that it is held against.
    pub fn iou(&self, other: &Self) -> f32 {
        let both =
            Self { left: self.left.max(other.left), top: self.top.max(other.top), right: self.right.min(other.right), bottom: self.bottom.min(other.bottom) };
        let intersection = both.area() as f64;
        let union = self.area() as f64 + other.area() as f64 - intersection;
        if union > 0.0 { (intersection / union) as f32 } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn of(left: u32, top: u32, right: u32, bottom: u32) -> BoundingBox {
        BoundingBox { left, top, right, bottom }
    }

    #[test]
    fn intersection_over_union() {
        assert_eq!(of(0, 0, 4, 2).iou(&of(0, 0, 4, 2)), 1.0);
        assert_eq!(of(0, 0, 4, 2).iou(&of(2, 0, 6, 2)), 1.0 / 3.0);
        assert_eq!(of(0, 0, 4, 2).iou(&of(4, 0, 6, 2)), 0.0, "boxes that only touch");
        assert_eq!(of(0, 0, 10, 10).iou(&of(0, 0, 10, 8)), 0.8, "exactly the nearest f32 to 4/5");
        assert_eq!(of(3, 3, 3, 3).iou(&of(3, 3, 3, 3)), 0.0);
    }
}
