//! Embeddings kept by the scripts of `tests/parity`, and how near the project's are.
#![allow(dead_code)] // each test takes a part of it

use std::{fs, path::Path};

/// The smallest cosine between an embedding and the library's, both less their sets' means.
pub(crate) const LIMIT: f64 = 0.9999;

pub(crate) fn floats(file: &Path, width: usize) -> Vec<Vec<f32>> {
    let values: Vec<f32> = fs::read(file).unwrap().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    values.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

/// Embeddings brought to unit length, less their mean.
fn centred(embeddings: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let unit: Vec<Vec<f64>> = embeddings
        .iter()
        .map(|row| {
            let length = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            row.iter().map(|v| f64::from(*v) / length).collect()
        })
        .collect();
    let mean: Vec<f64> = (0..unit[0].len()).map(|i| unit.iter().map(|row| row[i]).sum::<f64>() / unit.len() as f64).collect();
    unit.iter().map(|row| row.iter().zip(&mean).map(|(v, m)| v - m).collect()).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The cosine of each embedding with the library's.
pub(crate) fn cosines(ours: &[Vec<f32>], theirs: &[Vec<f32>]) -> Vec<f64> {
    centred(ours).iter().zip(centred(theirs)).map(|(a, b)| cosine(a, &b)).collect()
}

pub(crate) fn smallest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}
