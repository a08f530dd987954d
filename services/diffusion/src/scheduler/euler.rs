//! Euler's method on the ratio of noise to signal, and the ancestral variant, which steps further down and adds noise (Karras et al. 2022).
//!
//! Latents are not of unit variance here but signal plus `sigma` of noise: they start larger, and are scaled for the UNet.

use super::{Prediction, Sampler, Schedule, Scheduler, Spacing, Step};

pub(super) fn schedule(scheduler: &Scheduler, count: usize) -> Schedule {
    // The library keeps time steps in single precision.
    let timesteps: Vec<f64> = scheduler.timesteps(count).into_iter().map(|t| f64::from(t as f32)).collect();
    let mut sigmas: Vec<f64> = timesteps.iter().map(|&t| sigma_at(scheduler, t)).collect();
    let ancestral = scheduler.sampler == Sampler::EulerAncestral;
    sigmas.push(if scheduler.config.final_sigmas_type == "sigma_min" && !ancestral { scheduler.level(0).ratio() } else { 0.0 });
    let largest = sigmas[0];
    let init_noise_sigma = if scheduler.spacing == Spacing::Leading { (largest * largest + 1.0).sqrt() } else { largest };
    let steps =
        timesteps.into_iter().zip(sigmas.windows(2)).map(|(timestep, pair)| step(scheduler.prediction, timestep, pair[0], pair[1], ancestral)).collect();
    Schedule { init_noise_sigma, steps }
}

fn step(prediction: Prediction, timestep: f64, from: f64, to: f64, ancestral: bool) -> Step {
    let scale = 1.0 / (from * from + 1.0).sqrt();
    let (x0_sample, x0_output) = match prediction {
        Prediction::Epsilon => (1.0, -from),
        Prediction::Velocity => (scale * scale, -from * scale),
        Prediction::Sample => (0.0, 1.0),
    };
    // Noise up to the level that is aimed at: what was there below it, and fresh noise for the rest.
    let up = if ancestral { (to * to * (from * from - to * to) / (from * from)).sqrt() } else { 0.0 };
    let down = (to * to - up * up).sqrt();
    Step { timestep, input_scale: scale, noise: up, x0_sample, x0_output, keep: down / from, now: 1.0 - down / from, before: 0.0 }
}

/// The ratio of noise to signal, interpolated between two training steps.
fn sigma_at(scheduler: &Scheduler, timestep: f64) -> f64 {
    let ratio = |t: usize| scheduler.level(t).ratio();
    let (below, above) = (timestep.floor(), timestep.ceil());
    let low = ratio(below as usize);
    low + (timestep - below) * (ratio(above as usize) - low)
}
