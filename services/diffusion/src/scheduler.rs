//! DPM-Solver++ of order 2 (multistep), as the diffusers library's DPMSolverMultistepScheduler does it, from `scheduler_config.json`.
//!
//! A schedule is made once for a number of steps; [`Step::advance`] then takes latents from one noise level to the next. Coefficients
//! are worked out in f64 and applied to f32 latents.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// Keys that would change the schedule if they are set, and are not known here.
const CHANGES_THE_SCHEDULE: [&str; 7] =
    ["trained_betas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas", "thresholding"];

/// `scheduler_config.json`: the keys that matter here, with the library's defaults. A config of another sampler of the same kind of
/// model (Stable Diffusion 1's is of PNDM) gives the same betas, and is sampled with DPM-Solver++ all the same.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// Steps that the model was trained with.
    pub num_train_timesteps: usize,
    /// First beta.
    pub beta_start: f64,
    /// Last beta.
    pub beta_end: f64,
    /// `linear`, `scaled_linear` or `squaredcos_cap_v2`.
    pub beta_schedule: String,
    /// `epsilon`, `v_prediction` or `sample`.
    pub prediction_type: String,
    /// `linspace`, `leading` or `trailing`.
    pub timestep_spacing: String,
    /// Added to the time steps of the `leading` spacing.
    pub steps_offset: usize,
    /// `midpoint` or `heun`.
    pub solver_type: String,
    /// Whether the last step is of order 1 when there are fewer than 15.
    pub lower_order_final: bool,
    /// Whether the last step is of order 1 always.
    pub euler_at_final: bool,
    /// `zero` or `sigma_min`.
    pub final_sigmas_type: String,
    /// Log signal-to-noise ratio below which the schedule does not start.
    pub lambda_min_clipped: Option<f64>,
    /// Whether the betas are rescaled so that the last step is pure noise.
    pub rescale_betas_zero_snr: bool,
    /// All else that the file holds; most of it is about other samplers.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: "linear".to_owned(),
            prediction_type: "epsilon".to_owned(),
            timestep_spacing: "linspace".to_owned(),
            steps_offset: 0,
            solver_type: "midpoint".to_owned(),
            lower_order_final: true,
            euler_at_final: false,
            final_sigmas_type: "zero".to_owned(),
            lambda_min_clipped: None,
            rescale_betas_zero_snr: false,
            other: BTreeMap::new(),
        }
    }
}

/// What the UNet's output means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prediction {
    Epsilon,
    Velocity,
    Sample,
}

/// A checked configuration, with the noise level of each training step.
#[derive(Debug, Clone)]
pub struct Scheduler {
    config: SchedulerConfig,
    prediction: Prediction,
    alphas_cumprod: Vec<f64>,
}

/// The steps of a sampling run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// The steps in order.
    pub steps: Vec<Step>,
}

/// One step: from one noise level to the next lower one.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// What the UNet is told.
    pub timestep: f64,
    /// Latents to the denoised estimate: `x0 = sample * x0_sample + output * x0_output`.
    x0_sample: f64,
    x0_output: f64,
    /// The next latents: `sample * keep + x0 * now + x0_before * before`.
    keep: f64,
    now: f64,
    before: f64,
}

impl Scheduler {
    /// Checks a configuration; the error names the key.
    pub fn new(config: SchedulerConfig) -> Result<Self, String> {
        let unknown = |key: &str, value: &str, known: &str| format!("{key} {value:?}: {known} are known");
        if let Some(key) =
            CHANGES_THE_SCHEDULE.into_iter().find(|key| config.other.get(*key).is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false))))
        {
            return Err(format!("{key} is not supported"));
        }
        let train = config.num_train_timesteps;
        if !(2..=100_000).contains(&train) {
            return Err(format!("num_train_timesteps {train}: it is 2 to 100000"));
        }
        let prediction = match config.prediction_type.as_str() {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::Velocity,
            "sample" => Prediction::Sample,
            other => return Err(unknown("prediction_type", other, "epsilon, v_prediction and sample")),
        };
        for (key, value, known) in [
            ("timestep_spacing", &config.timestep_spacing, &["linspace", "leading", "trailing"][..]),
            ("solver_type", &config.solver_type, &["midpoint", "heun"]),
            ("final_sigmas_type", &config.final_sigmas_type, &["zero", "sigma_min"]),
        ] {
            if !known.contains(&value.as_str()) {
                return Err(unknown(key, value, &known.join(", ")));
            }
        }
        let linear = |from: f64, to: f64| (0..train).map(move |i| from + (to - from) * i as f64 / (train - 1) as f64);
        let betas: Vec<f64> = match config.beta_schedule.as_str() {
            "linear" => linear(config.beta_start, config.beta_end).collect(),
            "scaled_linear" => linear(config.beta_start.sqrt(), config.beta_end.sqrt()).map(|b| b * b).collect(),
            "squaredcos_cap_v2" => cosine_betas(train),
            other => return Err(unknown("beta_schedule", other, "linear, scaled_linear and squaredcos_cap_v2")),
        };
        if betas.iter().any(|beta| !(*beta > 0.0 && *beta < 1.0)) {
            return Err(format!("beta_start {} and beta_end {} give betas outside of 0 to 1", config.beta_start, config.beta_end));
        }
        let mut alphas_cumprod: Vec<f64> = betas
            .iter()
            .scan(1.0, |product, beta| {
                *product *= 1.0 - beta;
                Some(*product)
            })
            .collect();
        if config.rescale_betas_zero_snr {
            rescale_to_zero_snr(&mut alphas_cumprod);
        }
        Ok(Self { config, prediction, alphas_cumprod })
    }

    /// The steps of a run of `count` steps; the error says why there can't be so many.
    pub fn schedule(&self, count: usize) -> Result<Schedule, String> {
        let timesteps = self.timesteps(count);
        if timesteps.windows(2).any(|pair| pair[0] == pair[1]) {
            let train = self.config.num_train_timesteps;
            return Err(format!("{count}; of the {train} steps that the model was trained with, so many would be taken twice: ask for fewer"));
        }
        let sigma = |cumprod: f64| ((1.0 - cumprod) / cumprod).sqrt();
        let mut sigmas: Vec<f64> = timesteps.iter().map(|&t| self.alphas_cumprod.get(t).copied().map_or(0.0, sigma)).collect();
        sigmas.push(match self.config.final_sigmas_type.as_str() {
            "sigma_min" => self.alphas_cumprod.first().copied().map_or(0.0, sigma),
            _ => 0.0,
        });
        let last = timesteps.len().saturating_sub(1);
        let lower_final = self.config.euler_at_final || (self.config.lower_order_final && timesteps.len() < 15) || self.config.final_sigmas_type == "zero";
        let levels: Vec<Level> = sigmas.iter().map(|&sigma| Level::of(sigma)).collect();
        let steps = timesteps
            .iter()
            .enumerate()
            .map(|(i, &timestep)| {
                let before = (i > 0 && !(i == last && lower_final)).then(|| levels[i - 1]);
                self.step(timestep as f64, before, levels[i], levels[i + 1])
            })
            .collect();
        Ok(Schedule { steps })
    }

    fn step(&self, timestep: f64, before: Option<Level>, from: Level, to: Level) -> Step {
        let (x0_sample, x0_output) = match self.prediction {
            Prediction::Epsilon => (1.0 / from.alpha, -from.sigma / from.alpha),
            Prediction::Velocity => (from.alpha, -from.sigma),
            Prediction::Sample => (0.0, 1.0),
        };
        let h = to.lambda - from.lambda;
        // e^-h - 1, negative; -1 where the next level has no noise.
        let shrink = (-h).exp_m1();
        let keep = to.sigma / from.sigma;
        let (now, earlier) = match before {
            None => (-to.alpha * shrink, 0.0),
            Some(before) => {
                let r0 = (from.lambda - before.lambda) / h;
                // D1 = (x0 - x0_before) / r0, weighted by the solver.
                let slope = match self.config.solver_type.as_str() {
                    "heun" => to.alpha * (shrink / h + 1.0),
                    _ => -0.5 * to.alpha * shrink,
                };
                (-to.alpha * shrink + slope / r0, -slope / r0)
            }
        };
        Step { timestep, x0_sample, x0_output, keep, now, before: earlier }
    }

    fn timesteps(&self, count: usize) -> Vec<usize> {
        let train = self.config.num_train_timesteps;
        let noisiest = match self.config.lambda_min_clipped {
            // Training steps whose log signal-to-noise ratio lies below the bound are not visited.
            Some(bound) => train - self.alphas_cumprod.iter().filter(|cumprod| Level::of_cumprod(**cumprod).lambda < bound).count(),
            None => train,
        };
        let last = noisiest as f64;
        let spaced: Vec<f64> = match self.config.timestep_spacing.as_str() {
            "leading" => {
                let ratio = (noisiest / (count + 1)) as f64;
                (1..=count).rev().map(|i| i as f64 * ratio + self.config.steps_offset as f64).collect()
            }
            "trailing" => {
                let ratio = train as f64 / count as f64;
                (0..count).map(|i| (last - i as f64 * ratio).round_ties_even() - 1.0).collect()
            }
            _ => {
                // The spacing first, as NumPy's linspace has it: what lies between two whole numbers depends on it.
                let ratio = (last - 1.0) / count as f64;
                (1..=count).rev().map(|i| (i as f64 * ratio).round_ties_even()).collect()
            }
        };
        spaced.into_iter().map(|t| t.clamp(0.0, (train - 1) as f64) as usize).collect()
    }
}

impl Step {
    /// Takes latents one step on. `output` is the UNet's, guidance applied; `estimate` is the denoised estimate of the step before (empty at
    /// the first), and becomes this step's.
    pub fn advance(&self, latents: &mut [f32], output: &[f32], estimate: &mut Vec<f32>) {
        estimate.resize(latents.len(), 0.0);
        for ((latent, output), estimate) in latents.iter_mut().zip(output).zip(estimate) {
            let sample = f64::from(*latent);
            let x0 = sample * self.x0_sample + f64::from(*output) * self.x0_output;
            *latent = (sample * self.keep + x0 * self.now + f64::from(*estimate) * self.before) as f32;
            *estimate = x0 as f32;
        }
    }
}

/// A noise level: `alpha` of signal and `sigma` of noise, of unit variance together, and the log of their ratio.
#[derive(Debug, Clone, Copy)]
struct Level {
    alpha: f64,
    sigma: f64,
    lambda: f64,
}

impl Level {
    /// From the ratio of noise to signal.
    fn of(ratio: f64) -> Self {
        let alpha = 1.0 / (ratio * ratio + 1.0).sqrt();
        Self { alpha, sigma: ratio * alpha, lambda: -ratio.ln() }
    }

    fn of_cumprod(cumprod: f64) -> Self {
        Self::of(((1.0 - cumprod) / cumprod).sqrt())
    }
}

fn cosine_betas(train: usize) -> Vec<f64> {
    let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    (0..train).map(|i| (1.0 - bar((i + 1) as f64 / train as f64) / bar(i as f64 / train as f64)).min(0.999)).collect()
}

/// Shifts and scales the square roots so that the last is (nearly) zero and the first stays (Lin et al. 2023, algorithm 1).
fn rescale_to_zero_snr(alphas_cumprod: &mut [f64]) {
    let (Some(first), Some(last)) = (alphas_cumprod.first().map(|a| a.sqrt()), alphas_cumprod.last().map(|a| a.sqrt())) else { return };
    for cumprod in alphas_cumprod.iter_mut() {
        let root = (cumprod.sqrt() - last) * first / (first - last);
        *cumprod = root * root;
    }
    // Not quite zero, which could not be divided by.
    if let Some(cumprod) = alphas_cumprod.last_mut() {
        *cumprod = 2f64.powi(-24);
    }
}
