//! Latent consistency sampling: every step goes all the way, and noise leads back to the next level (Luo et al. 2023).

use super::{Schedule, Scheduler, Step};

/// Deviation of the data in the boundary condition, fixed in the library.
const SIGMA_DATA: f64 = 0.5;

pub(super) fn schedule(scheduler: &Scheduler, count: usize) -> Result<Schedule, String> {
    let original = scheduler.config.original_inference_steps;
    if count > original {
        return Err(format!("{count}; the model was distilled on {original} steps (original_inference_steps): ask for no more"));
    }
    // Of the steps that the model was distilled on, evenly spread ones.
    let stride = scheduler.config.num_train_timesteps / original;
    let spread = original as f64 / count as f64;
    let timesteps: Vec<usize> = (0..count).map(|i| (original - (i as f64 * spread).floor() as usize) * stride - 1).collect();
    let step = |(i, &timestep): (usize, &usize)| {
        let (x0_sample, x0_output) = scheduler.estimate(scheduler.level(timestep));
        let scaled = timestep as f64 * scheduler.config.timestep_scaling;
        let data = SIGMA_DATA * SIGMA_DATA;
        let (skip, out) = (data / (scaled * scaled + data), scaled / (scaled * scaled + data).sqrt());
        let (alpha, noise) = timesteps.get(i + 1).map_or((1.0, 0.0), |&next| (scheduler.level(next).alpha, scheduler.level(next).sigma));
        Step { timestep: timestep as f64, input_scale: 1.0, noise, x0_sample, x0_output, keep: alpha * skip, now: alpha * out, before: 0.0 }
    };
    Ok(Schedule { init_noise_sigma: 1.0, steps: timesteps.iter().enumerate().map(step).collect() })
}
