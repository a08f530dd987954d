//! Rectangles of values: activation maps, and the heat maps made of them.

/// Values of a [`Grid`] at most: 4,096 × 4,096.
pub const MOST_VALUES: usize = 1 << 24;

/// A rectangle of values, row by row from the top, each row from the left. It has 1 to [`MOST_VALUES`] values.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid<T> {
    width: usize,
    values: Vec<T>,
}

impl<T> Grid<T> {
    /// A grid of `height` rows and `width` columns. None if it would have no values or more than [`MOST_VALUES`], or if `values` holds
    /// another number of them.
    pub fn new(height: usize, width: usize, values: Vec<T>) -> Option<Self> {
        let fits = height.checked_mul(width) == Some(values.len()) && (1..=MOST_VALUES).contains(&values.len());
        fits.then_some(Self { width, values })
    }

    /// Rows and columns.
    pub fn size(&self) -> (usize, usize) {
        (self.values.len() / self.width, self.width)
    }

    /// All values, row by row.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    /// The rows from the top.
    pub fn rows(&self) -> impl Iterator<Item = &[T]> {
        self.values.chunks_exact(self.width)
    }

    /// A grid of whole rows, at least one, of `width` values, at least 1, that this crate has made.
    pub(crate) fn of_rows(width: usize, values: Vec<T>) -> Self {
        Self { width, values }
    }

    /// A grid of the same size.
    pub(crate) fn map<U>(&self, change: impl FnMut(&T) -> U) -> Grid<U> {
        Grid { width: self.width, values: self.values.iter().map(change).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_and_values_agree() {
        let grid = Grid::new(2, 3, vec![1, 2, 3, 4, 5, 6]).unwrap();
        assert_eq!(grid.size(), (2, 3));
        assert_eq!(grid.rows().collect::<Vec<_>>(), [&[1, 2, 3], &[4, 5, 6]]);
        assert_eq!(Grid::new(2, 3, vec![0; 5]), None);
        assert_eq!(Grid::<u8>::new(2, 0, vec![]), None);
        assert_eq!(Grid::<u8>::new(usize::MAX, usize::MAX, vec![]), None);
        assert_eq!(Grid::new(1, MOST_VALUES + 1, vec![0_u8; MOST_VALUES + 1]), None);
    }
}
