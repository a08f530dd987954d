//! The steps from noise to latents, as the diffusers library's schedulers take them, from `scheduler_config.json`.
//!
//! | class | sampler |
//! |---|---|
//! | `DPMSolverMultistepScheduler`, and `PNDMScheduler`, which Stable Diffusion 1's files name | DPM-Solver++ of order 2 (multistep), as the paper samples |
//! | `DDIMScheduler` | DDIM without noise (η = 0) |
//! | `EulerDiscreteScheduler` (SD-Turbo's) | Euler's method |
//! | `EulerAncestralDiscreteScheduler` | Euler's method with fresh noise after each step |
//! | `LCMScheduler` | latent consistency sampling |
//!
//! A [`Schedule`] is made once for a number of steps; [`Step::advance`] then takes latents from one noise level to the next. Every sampler's step is a sum of
//! what is there, weighted: the coefficients are worked out in f64 and applied to f32 latents.

mod ddim;
mod dpm_solver;
mod euler;
mod lcm;

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// Keys that would change the schedule if they are set, and are not known here.
const CHANGES_THE_SCHEDULE: [&str; 7] =
    ["trained_betas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas", "thresholding"];

/// `scheduler_config.json`: the keys that matter here. What the file leaves out is the default of its class.
///
/// `clip_sample` is not among them: the library's pipelines for latents switch it off whatever the file says.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// The library's class.
    #[serde(rename = "_class_name")]
    pub class_name: String,
    /// Steps that the model was trained with.
    pub num_train_timesteps: usize,
    /// First beta.
    pub beta_start: Option<f64>,
    /// Last beta.
    pub beta_end: Option<f64>,
    /// `linear`, `scaled_linear` or `squaredcos_cap_v2`.
    pub beta_schedule: Option<String>,
    /// `epsilon`, `v_prediction` or `sample`.
    pub prediction_type: String,
    /// `linspace`, `leading` or `trailing`.
    pub timestep_spacing: Option<String>,
    /// Added to the time steps of the `leading` spacing.
    pub steps_offset: usize,
    /// Whether the betas are rescaled so that the last step is pure noise.
    pub rescale_betas_zero_snr: bool,
    /// DPM-Solver++ and Euler: `zero` or `sigma_min`.
    pub final_sigmas_type: String,
    /// DPM-Solver++: `midpoint` or `heun`.
    pub solver_type: String,
    /// DPM-Solver++: whether the last step is of order 1 when there are fewer than 15.
    pub lower_order_final: bool,
    /// DPM-Solver++: whether the last step is of order 1 always.
    pub euler_at_final: bool,
    /// DPM-Solver++: log signal-to-noise ratio below which the schedule does not start.
    pub lambda_min_clipped: Option<f64>,
    /// DDIM: whether the last step ends without noise, or else at the level of the first training step.
    pub set_alpha_to_one: bool,
    /// LCM: steps of the schedule that the model was distilled on.
    pub original_inference_steps: usize,
    /// LCM: what time steps are multiplied by in the boundary condition.
    pub timestep_scaling: f64,
    /// All else that the file holds; most of it is about other samplers.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            class_name: String::new(),
            num_train_timesteps: 1000,
            beta_start: None,
            beta_end: None,
            beta_schedule: None,
            prediction_type: "epsilon".to_owned(),
            timestep_spacing: None,
            steps_offset: 0,
            rescale_betas_zero_snr: false,
            final_sigmas_type: "zero".to_owned(),
            solver_type: "midpoint".to_owned(),
            lower_order_final: true,
            euler_at_final: false,
            lambda_min_clipped: None,
            set_alpha_to_one: true,
            original_inference_steps: 50,
            timestep_scaling: 10.0,
            other: BTreeMap::new(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sampler {
    DpmSolver,
    Ddim,
    Euler,
    EulerAncestral,
    Lcm,
}

/// The library's classes, and what they are sampled with.
const CLASSES: [(&str, Sampler); 6] = [
    ("DPMSolverMultistepScheduler", Sampler::DpmSolver),
    ("PNDMScheduler", Sampler::DpmSolver),
    ("DDIMScheduler", Sampler::Ddim),
    ("EulerDiscreteScheduler", Sampler::Euler),
    ("EulerAncestralDiscreteScheduler", Sampler::EulerAncestral),
    ("LCMScheduler", Sampler::Lcm),
];

/// What the UNet's output means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prediction {
    Epsilon,
    Velocity,
    Sample,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spacing {
    Linspace,
    Leading,
    Trailing,
}

/// A checked configuration, with the noise level of each training step.
#[derive(Debug, Clone)]
pub struct Scheduler {
    config: SchedulerConfig,
    sampler: Sampler,
    prediction: Prediction,
    spacing: Spacing,
    /// Share of the signal in the variance at each training step, never 0 where it is divided by.
    alphas_cumprod: Vec<f64>,
}

/// The steps of a sampling run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// What standard normal noise is multiplied by to start from.
    pub init_noise_sigma: f64,
    /// The steps in order.
    pub steps: Vec<Step>,
}

/// One step: from one noise level to the next lower one.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// What the UNet is told; whole but for Euler's `linspace`.
    pub timestep: f64,
    /// What latents are multiplied by before the UNet sees them.
    pub input_scale: f64,
    /// Deviation of the standard normal noise that is added after the step; 0 for none.
    pub noise: f64,
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
        let class = config.class_name.as_str();
        let Some((_, sampler)) = CLASSES.into_iter().find(|(known, _)| *known == class) else {
            return Err(unknown("_class_name", class, &CLASSES.map(|(known, _)| known).join(", ")));
        };
        if let Some(key) =
            CHANGES_THE_SCHEDULE.into_iter().find(|key| config.other.get(*key).is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false))))
        {
            return Err(format!("{key} is not supported"));
        }
        for (sampler_of, key, supported) in [
            (Sampler::DpmSolver, "algorithm_type", Value::from("dpmsolver++")),
            (Sampler::DpmSolver, "solver_order", Value::from(2)),
            (Sampler::Euler, "interpolation_type", Value::from("linear")),
            (Sampler::Euler, "timestep_type", Value::from("discrete")),
        ] {
            if let Some(value) = config.other.get(key).filter(|value| sampler == sampler_of && **value != supported) {
                return Err(format!("{key} {value} is not supported: {supported} is"));
            }
        }
        let train = config.num_train_timesteps;
        if !(2..=100_000).contains(&train) {
            return Err(format!("num_train_timesteps {train}: it is 2 to 100000"));
        }
        if config.steps_offset > train {
            return Err(format!("steps_offset {}: it is 0 to num_train_timesteps, {train}", config.steps_offset));
        }
        let prediction = match config.prediction_type.as_str() {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::Velocity,
            "sample" if sampler != Sampler::EulerAncestral => Prediction::Sample,
            other => return Err(unknown("prediction_type", other, "epsilon, v_prediction and, but for EulerAncestralDiscreteScheduler, sample")),
        };
        let spacing = match (config.timestep_spacing.as_deref(), sampler) {
            (Some("leading"), _) | (None, Sampler::Ddim | Sampler::Lcm) => Spacing::Leading,
            (Some("linspace"), _) | (None, _) => Spacing::Linspace,
            (Some("trailing"), _) => Spacing::Trailing,
            (Some(other), _) => return Err(unknown("timestep_spacing", other, "linspace, leading and trailing")),
        };
        for (key, value, known) in
            [("solver_type", &config.solver_type, ["midpoint", "heun"]), ("final_sigmas_type", &config.final_sigmas_type, ["zero", "sigma_min"])]
        {
            if !known.contains(&value.as_str()) {
                return Err(unknown(key, value, &known.join(" and ")));
            }
        }
        if sampler == Sampler::Lcm && !(1..=train).contains(&config.original_inference_steps) {
            return Err(format!("original_inference_steps {}: it is 1 to num_train_timesteps, {train}", config.original_inference_steps));
        }
        let mut alphas_cumprod = alphas_cumprod(&config, sampler)?;
        if config.rescale_betas_zero_snr {
            rescale_to_zero_snr(&mut alphas_cumprod);
            match sampler {
                Sampler::Ddim | Sampler::Lcm if prediction == Prediction::Epsilon => {
                    return Err("rescale_betas_zero_snr with prediction_type \"epsilon\": pure noise says nothing of the picture; v_prediction does".to_owned());
                }
                Sampler::Ddim | Sampler::Lcm => {}
                // The others divide by it, and take a little more than zero.
                _ => alphas_cumprod[train - 1] = 2f64.powi(-24),
            }
        }
        Ok(Self { config, sampler, prediction, spacing, alphas_cumprod })
    }

    /// The steps of a run of `count` steps; the error says why there can't be so many.
    pub fn schedule(&self, count: usize) -> Result<Schedule, String> {
        let schedule = match self.sampler {
            Sampler::DpmSolver => dpm_solver::schedule(self, count),
            Sampler::Ddim => ddim::schedule(self, count),
            Sampler::Euler | Sampler::EulerAncestral => euler::schedule(self, count),
            Sampler::Lcm => lcm::schedule(self, count)?,
        };
        if schedule.steps.windows(2).any(|pair| pair[0].timestep == pair[1].timestep) {
            let train = self.config.num_train_timesteps;
            return Err(format!("{count}; of the {train} steps that the model was trained with, so many would be taken twice: ask for fewer"));
        }
        Ok(schedule)
    }

    /// The noise level of a training step.
    fn level(&self, timestep: usize) -> Level {
        Level::of_cumprod(self.alphas_cumprod.get(timestep).copied().unwrap_or(1.0))
    }

    /// `x0 = sample * x0_sample + output * x0_output` at a noise level.
    fn estimate(&self, level: Level) -> (f64, f64) {
        match self.prediction {
            Prediction::Epsilon => (1.0 / level.alpha, -level.sigma / level.alpha),
            Prediction::Velocity => (level.alpha, -level.sigma),
            Prediction::Sample => (0.0, 1.0),
        }
    }

    /// Time steps from the noisiest down; with `linspace` they may lie between two whole ones.
    fn timesteps(&self, count: usize) -> Vec<f64> {
        let train = self.config.num_train_timesteps;
        let last = (train - 1) as f64;
        let spaced: Vec<f64> = match self.spacing {
            // The spacing first, as NumPy has it: what lies between two whole numbers depends on it.
            Spacing::Linspace => {
                let ratio = if count > 1 { last / (count - 1) as f64 } else { 0.0 };
                (0..count).rev().map(|i| if i > 0 && i == count - 1 { last } else { i as f64 * ratio }).collect()
            }
            Spacing::Leading => (0..count).rev().map(|i| (i * (train / count) + self.config.steps_offset) as f64).collect(),
            Spacing::Trailing => {
                let ratio = train as f64 / count as f64;
                (0..count).map(|i| (train as f64 - i as f64 * ratio).round_ties_even() - 1.0).collect()
            }
        };
        spaced.into_iter().map(|t| t.clamp(0.0, last)).collect()
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

/// A noise level: `alpha` of signal and `sigma` of noise, of unit variance together.
#[derive(Debug, Clone, Copy)]
struct Level {
    alpha: f64,
    sigma: f64,
}

impl Level {
    /// From the share of the signal in the variance.
    fn of_cumprod(cumprod: f64) -> Self {
        Self { alpha: cumprod.sqrt(), sigma: (1.0 - cumprod).sqrt() }
    }

    /// Noise to signal.
    fn ratio(self) -> f64 {
        self.sigma / self.alpha
    }

    /// The log of signal to noise.
    fn lambda(self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }
}

fn alphas_cumprod(config: &SchedulerConfig, sampler: Sampler) -> Result<Vec<f64>, String> {
    let train = config.num_train_timesteps;
    // The defaults of the classes are those of pixels, but for LCM's, which are Stable Diffusion's.
    let (start, end, schedule) = if sampler == Sampler::Lcm { (0.00085, 0.012, "scaled_linear") } else { (0.0001, 0.02, "linear") };
    let (start, end) = (config.beta_start.unwrap_or(start), config.beta_end.unwrap_or(end));
    let linear = |from: f64, to: f64| (0..train).map(move |i| from + (to - from) * i as f64 / (train - 1) as f64);
    let betas: Vec<f64> = match config.beta_schedule.as_deref().unwrap_or(schedule) {
        "linear" => linear(start, end).collect(),
        "scaled_linear" => linear(start.sqrt(), end.sqrt()).map(|b| b * b).collect(),
        "squaredcos_cap_v2" => cosine_betas(train),
        other => return Err(format!("beta_schedule {other:?}: linear, scaled_linear and squaredcos_cap_v2 are known")),
    };
    if betas.iter().any(|beta| !(*beta > 0.0 && *beta < 1.0)) {
        return Err(format!("beta_start {start} and beta_end {end} give betas outside of 0 to 1"));
    }
    let products = betas.iter().scan(1.0, |product, beta| {
        *product *= 1.0 - beta;
        Some(*product)
    });
    Ok(products.collect())
}

fn cosine_betas(train: usize) -> Vec<f64> {
    let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    (0..train).map(|i| (1.0 - bar((i + 1) as f64 / train as f64) / bar(i as f64 / train as f64)).min(0.999)).collect()
}

/// Shifts and scales the square roots so that the last is zero and the first stays (Lin et al. 2023, algorithm 1).
fn rescale_to_zero_snr(alphas_cumprod: &mut [f64]) {
    let (Some(first), Some(last)) = (alphas_cumprod.first().map(|a| a.sqrt()), alphas_cumprod.last().map(|a| a.sqrt())) else { return };
    for cumprod in alphas_cumprod.iter_mut() {
        let root = (cumprod.sqrt() - last) * first / (first - last);
        *cumprod = root * root;
    }
}
