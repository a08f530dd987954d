//! DDIM with η = 0, which adds no noise (Song et al. 2020, formula 12).

use super::{Level, Schedule, Scheduler, Step};

pub(super) fn schedule(scheduler: &Scheduler, count: usize) -> Schedule {
    let stride = scheduler.config.num_train_timesteps / count.max(1);
    let end = if scheduler.config.set_alpha_to_one { Level::of_cumprod(1.0) } else { scheduler.level(0) };
    let step = |timestep: f64| {
        let timestep = timestep.round_ties_even() as usize;
        let from = scheduler.level(timestep);
        // One stride further down, which with `linspace` is not always the next time step: so it is in the library.
        let to = timestep.checked_sub(stride).map_or(end, |next| scheduler.level(next));
        let (x0_sample, x0_output) = scheduler.estimate(from);
        // The noise in the sample, (sample - alpha x0) / sigma, is carried over to the next level.
        let keep = to.sigma / from.sigma;
        let now = to.alpha - from.alpha * keep;
        Step { timestep: timestep as f64, input_scale: 1.0, noise: 0.0, x0_sample, x0_output, keep, now, before: 0.0 }
    };
    Schedule { init_noise_sigma: 1.0, steps: scheduler.timesteps(count).into_iter().map(step).collect() }
}
