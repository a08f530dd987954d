//! DPM-Solver++ of order 2, multistep (Lu et al. 2022).

use super::{Level, Schedule, Scheduler, Spacing, Step};

pub(super) fn schedule(scheduler: &Scheduler, count: usize) -> Schedule {
    let config = &scheduler.config;
    let timesteps = timesteps(scheduler, count);
    let mut levels: Vec<Level> = timesteps.iter().map(|&t| scheduler.level(t)).collect();
    levels.push(if config.final_sigmas_type == "sigma_min" { scheduler.level(0) } else { Level::of_cumprod(1.0) });
    let last = timesteps.len().saturating_sub(1);
    let lower_final = config.euler_at_final || (config.lower_order_final && timesteps.len() < 15) || config.final_sigmas_type == "zero";
    let steps = timesteps
        .iter()
        .enumerate()
        .map(|(i, &timestep)| {
            let before = (i > 0 && !(i == last && lower_final)).then(|| levels[i - 1]);
            step(scheduler, timestep as f64, before, levels[i], levels[i + 1])
        })
        .collect();
    Schedule { init_noise_sigma: 1.0, steps }
}

fn step(scheduler: &Scheduler, timestep: f64, before: Option<Level>, from: Level, to: Level) -> Step {
    let (x0_sample, x0_output) = scheduler.estimate(from);
    let h = to.lambda() - from.lambda();
    // e^-h - 1, negative; -1 where the next level has no noise.
    let shrink = (-h).exp_m1();
    let keep = to.sigma / from.sigma;
    let (now, before) = match before {
        None => (-to.alpha * shrink, 0.0),
        Some(before) => {
            let r0 = (from.lambda() - before.lambda()) / h;
            // D1 = (x0 - x0_before) / r0, weighted by the solver.
            let slope = match scheduler.config.solver_type.as_str() {
                "heun" => to.alpha * (shrink / h + 1.0),
                _ => -0.5 * to.alpha * shrink,
            };
            (-to.alpha * shrink + slope / r0, -slope / r0)
        }
    };
    Step { timestep, input_scale: 1.0, noise: 0.0, x0_sample, x0_output, keep, now, before }
}

/// One time step more than there are steps is spread out, and the least noisy left out.
fn timesteps(scheduler: &Scheduler, count: usize) -> Vec<usize> {
    let train = scheduler.config.num_train_timesteps;
    let noisiest = match scheduler.config.lambda_min_clipped {
        // Training steps whose log signal-to-noise ratio lies below the bound are not visited.
        Some(bound) => train - scheduler.alphas_cumprod.iter().filter(|cumprod| Level::of_cumprod(**cumprod).lambda() < bound).count(),
        None => train,
    };
    let last = noisiest as f64;
    let spaced: Vec<f64> = match scheduler.spacing {
        Spacing::Leading => {
            let ratio = (noisiest / (count + 1)) as f64;
            (1..=count).rev().map(|i| i as f64 * ratio + scheduler.config.steps_offset as f64).collect()
        }
        Spacing::Trailing => {
            let ratio = train as f64 / count as f64;
            (0..count).map(|i| (last - i as f64 * ratio).round_ties_even() - 1.0).collect()
        }
        Spacing::Linspace => {
            // The spacing first, as NumPy's linspace has it: what lies between two whole numbers depends on it.
            let ratio = (last - 1.0) / count as f64;
            (1..=count).rev().map(|i| (i as f64 * ratio).round_ties_even()).collect()
        }
    };
    spaced.into_iter().map(|t| t.clamp(0.0, (train - 1) as f64) as usize).collect()
}
