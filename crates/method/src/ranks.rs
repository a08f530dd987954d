//! `Rank(x; G_n)`: the place of an image among all generated images by activation (3.3, steps 2 and 3).

/// For each activation 1 + the number of strictly larger ones, so that equals share a rank and the largest has rank 1. The paper ranks
/// values, and so it does here. (Its authors' code counts from 0 and gives equals different ranks.) No activation is NaN.
pub fn ranks(activations: &[f32]) -> Vec<u32> {
    let mut descending = activations.to_vec();
    descending.sort_by(|a, b| b.total_cmp(a));
    activations.iter().map(|activation| descending.partition_point(|other| other > activation) as u32 + 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_share_a_rank_and_the_next_rank_counts_them_all() {
        assert_eq!(ranks(&[0.5, 2.0, 0.5, -1.0, 3.0]), [3, 2, 3, 5, 1]);
        assert_eq!(ranks(&[0.0, -0.0, 1.0]), [2, 2, 1], "zeros are equal whatever their sign");
        assert!(ranks(&[]).is_empty());
    }
}
