//! The highest activating images of a unit (3.1, 3.2), found in one pass with bounded memory, and dead units.

use std::cmp::Ordering;

/// An image of `D_probe ∪ D_cropped`. The order is that of equal activations: originals in their own order, then crops by their parent,
/// then by their place among its crops (the larger region first).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A picture of `D_probe`, by its place in the order of the probing set.
    Original(u64),
    /// An attention crop: the place of the picture that it was cut out of, and its own among that picture's crops.
    Crop(u64, u32),
}

/// An image that is among the highest.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry<At, T> {
    /// `g(A_k(x))`; finite.
    pub activation: f32,
    /// Which image `x` is: a [`Source`], or its place in the probing set where there are no crops.
    pub at: At,
    /// What the caller keeps with it: the activation map, say.
    pub with: T,
}

/// The highest activating images of a unit among all that it was offered, and what its activations were like.
///
/// Larger activation first, equal ones in the order of `At`. Activations that are NaN or infinite are counted and never kept. The
/// outcome does not depend on the order in which images come, nor on how they are shared out over several `Top`s that are merged in the
/// end. No image is offered twice.
#[derive(Debug, Clone, PartialEq)]
pub struct Top<At, T> {
    size: usize,
    entries: Vec<Entry<At, T>>,
    range: Option<(f32, f32)>,
    not_finite: u64,
}

impl<At: Ord + Copy, T> Top<At, T> {
    /// For at most `size` images: `probe_images` for those to crop, `top_images` (`K`) for the set `I`.
    pub fn new(size: usize) -> Self {
        Self { size, entries: Vec::new(), range: None, not_finite: 0 }
    }

    /// What an earlier pass found: its highest images, at most `size` of them, and what all its activations were like.
    pub fn found(size: usize, entries: Vec<Entry<At, T>>, range: Option<(f32, f32)>, not_finite: u64) -> Self {
        let none = Self { range, not_finite, ..Self::new(size) };
        entries.into_iter().fold(none, |mut top, Entry { activation, at, with }| {
            top.keep(activation, at, || with);
            top
        })
    }

    /// Takes in an image. `with` is called only if it is among the highest so far. Gives the image that had to make room for it, if any.
    pub fn offer(&mut self, activation: f32, at: At, with: impl FnOnce() -> T) -> Option<Entry<At, T>> {
        if !activation.is_finite() {
            self.not_finite += 1;
            return None;
        }
        self.widen(activation, activation);
        self.keep(activation, at, with)
    }

    /// Whether an image would be kept if it were offered now. What would not be will not be later either.
    pub fn would_keep(&self, activation: f32, at: At) -> bool {
        activation.is_finite() && self.place(activation, at) < self.size
    }

    /// Takes in all that another `Top` of the same size was offered.
    ///
    /// Its entries are enough for that: an image that is not among the `size` highest of a part is outdone by `size` images of that part, and so is not among
    /// the `size` highest of the whole.
    pub fn merge(&mut self, other: Self) {
        if let Some((lowest, highest)) = other.range {
            self.widen(lowest, highest);
        }
        self.not_finite += other.not_finite;
        for Entry { activation, at, with } in other.entries {
            self.keep(activation, at, || with);
        }
    }

    /// The highest images in order.
    pub fn entries(&self) -> &[Entry<At, T>] {
        &self.entries
    }

    /// The highest images in order.
    pub fn into_entries(self) -> Vec<Entry<At, T>> {
        self.entries
    }

    /// Smallest and largest finite activation of all images; none if there was no finite one.
    pub fn range(&self) -> Option<(f32, f32)> {
        self.range
    }

    /// Images whose activation was NaN or infinite.
    pub fn not_finite(&self) -> u64 {
        self.not_finite
    }

    /// Whether all finite activations were equal, or there were none: the unit tells no image from another, and gets no label.
    pub fn is_dead(&self) -> bool {
        self.range.is_none_or(|(lowest, highest)| lowest == highest)
    }

    fn widen(&mut self, lowest: f32, highest: f32) {
        let (low, high) = self.range.unwrap_or((lowest, highest));
        // −0 counts as 0, so that the range does not depend on which of them came first.
        self.range = Some((low.min(lowest) + 0.0, high.max(highest) + 0.0));
    }

    fn place(&self, activation: f32, at: At) -> usize {
        self.entries.partition_point(|kept| order((kept.activation, kept.at), (activation, at)).is_lt())
    }

    fn keep(&mut self, activation: f32, at: At, with: impl FnOnce() -> T) -> Option<Entry<At, T>> {
        let place = self.place(activation, at);
        if place >= self.size {
            return None;
        }
        let dropped = if self.entries.len() == self.size { self.entries.pop() } else { None };
        self.entries.insert(place, Entry { activation, at, with: with() });
        dropped
    }
}

/// Finite activations, largest first; −0 and 0 are equal.
fn order<At: Ord>(a: (f32, At), b: (f32, At)) -> Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use Source::{Crop, Original};

    #[test]
    fn equal_activations_are_in_the_order_of_images() {
        let mut top = Top::new(5);
        for (activation, at) in [(0.0, Crop(1, 0)), (-0.0, Crop(0, 1)), (0.0, Original(7)), (1.0, Crop(9, 9)), (0.0, Original(2)), (0.0, Crop(0, 0))] {
            top.offer(activation, at, || ());
        }
        let order: Vec<Source> = top.into_entries().into_iter().map(|entry| entry.at).collect();
        assert_eq!(order, [Crop(9, 9), Original(2), Original(7), Crop(0, 0), Crop(0, 1)]);
    }

    #[test]
    fn only_what_is_kept_is_asked_for_and_what_makes_room_is_given_back() {
        let mut top = Top::new(1);
        assert_eq!(top.offer(1.0, 0, || "first"), None);
        assert_eq!(top.offer(1.0, 1, || panic!("an equal activation that comes later is not kept")), None);
        assert_eq!(top.offer(2.0, 2, || "third"), Some(Entry { activation: 1.0, at: 0, with: "first" }));
        let mut none = Top::new(0);
        assert_eq!(none.offer(1.0, 0, || panic!("there is no room")), None);
    }

    #[test]
    fn units_that_tell_nothing_apart_are_dead() {
        let with = |activations: &[f32]| {
            let mut top = Top::new(3);
            for (at, &activation) in activations.iter().enumerate() {
                top.offer(activation, at, || ());
            }
            top
        };
        assert!(with(&[0.5, 0.5, 0.5, 0.5, f32::NAN]).is_dead());
        assert!(with(&[0.0, -0.0]).is_dead());
        assert!(with(&[f32::INFINITY]).is_dead());
        assert!(!with(&[0.5, 0.5, 0.5, 0.5, 0.25]).is_dead(), "also told by what was not kept");
        assert_eq!(with(&[0.5, f32::NAN, -1.0, f32::INFINITY, f32::NEG_INFINITY]).range(), Some((-1.0, 0.5)));
        assert_eq!(with(&[0.5, f32::NAN, -1.0, f32::INFINITY, f32::NEG_INFINITY]).not_finite(), 3);
    }
}
