//! Otsu's threshold (A.1.1, step 1).

use std::cmp::Ordering;

use crate::resize::HeatMap;

/// `λ`: the threshold that maximises the variance between the classes, `W_b · W_f · (μ_b − μ_f)²`, over the histogram of the bytes; the
/// lowest of equals. The foreground is what lies above it: `> λ`. None if all bytes are equal: nothing can be told apart.
///
/// (The paper prints `(μ_b μ_f)²`; the minus sign is lost.) Thresholds are compared exactly, in whole numbers, so that no rounding
/// decides between equals.
pub fn threshold(heat: &HeatMap) -> Option<u8> {
    let mut histogram = [0_u64; 256];
    for &value in heat.values() {
        histogram[usize::from(value)] += 1;
    }
    let count = heat.values().len() as u64;
    let sum: u64 = (0..).zip(histogram).map(|(value, n)| value * n).sum();

    let mut best: Option<(Fraction, u8)> = None;
    let (mut below, mut sum_below) = (0, 0);
    for (value, n) in (0..=u8::MAX).zip(histogram) {
        below += n;
        sum_below += u64::from(value) * n;
        let above = count - below;
        if below == 0 || above == 0 {
            continue;
        }
        // count² times the variance. With at most 2²⁴ bytes the difference is below 2⁵⁶.
        let difference = u128::from((sum_below * count).abs_diff(sum * below));
        let variance = Fraction { over: difference * difference, under: u128::from(below) * u128::from(above) };
        if best.as_ref().is_none_or(|(most, _)| variance.order(most).is_gt()) {
            best = Some((variance, value));
        }
    }
    best.map(|(_, value)| value)
}

/// A number below 2¹¹² over one below 2⁴⁸.
struct Fraction {
    over: u128,
    under: u128,
}

impl Fraction {
    fn order(&self, other: &Self) -> Ordering {
        let parts = |f: &Self| (f.over / f.under, f.over % f.under);
        let ((whole, rest), (other_whole, other_rest)) = (parts(self), parts(other));
        whole.cmp(&other_whole).then((rest * other.under).cmp(&(other_rest * self.under)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[u8]) -> Option<u8> {
        threshold(&HeatMap::new(1, values.len(), values.to_vec()).unwrap())
    }

    #[test]
    fn the_lowest_of_equals() {
        assert_eq!(of(&[0, 255]), Some(0));
        assert_eq!(of(&[10, 10, 200, 201]), Some(10));
        assert_eq!(of(&[0, 1, 2]), Some(0), "1/3 and 2/3 below are equally good");
    }

    #[test]
    fn the_best_by_a_fraction() {
        // 25 times the variances: 169 / 4 at 0, 256 / 6 at 2, 144 / 4 at 3.
        assert_eq!(of(&[0, 2, 3, 3, 5]), Some(2));
    }

    #[test]
    fn one_value_has_no_threshold() {
        assert_eq!(of(&[7; 5]), None);
        assert_eq!(of(&[0]), None);
    }

    #[test]
    fn the_largest_heat_map_does_not_overflow() {
        let mut values = vec![0; 1 << 23];
        values.resize(1 << 24, 255);
        assert_eq!(of(&values), Some(0));
    }
}
