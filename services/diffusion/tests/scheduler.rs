//! The scheduler does what the diffusers library's does; `goldens/make.py` asked it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use dnd_diffusion::scheduler::{Scheduler, SchedulerConfig};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    name: String,
    config: SchedulerConfig,
    steps: usize,
    timesteps: Vec<f32>,
    start: Vec<f32>,
    end: Vec<f32>,
}

fn output(latents: &[f32], timestep: f64) -> Vec<f32> {
    latents.iter().enumerate().map(|(place, latent)| (0.4 * f64::from(*latent) + 0.5 * (place as f64 + timestep / 100.0).sin()) as f32).collect()
}

/// What stands for standard normal noise.
fn noise(place: usize, step: u32) -> f64 {
    (place as f64 * f64::from(step)).cos()
}

#[test]
fn every_schedule_visits_the_librarys_time_steps_and_ends_at_its_latents() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("goldens/scheduler.json")).unwrap();
    assert!(cases.len() >= 40);
    for case in cases {
        let schedule = Scheduler::new(case.config).unwrap().schedule(case.steps).unwrap();
        let timesteps: Vec<f32> = schedule.steps.iter().map(|step| step.timestep as f32).collect();
        assert_eq!(timesteps, case.timesteps, "{}", case.name);
        let mut latents: Vec<f32> = case.start.iter().map(|value| (f64::from(*value) * schedule.init_noise_sigma) as f32).collect();
        let mut estimate = Vec::new();
        for (number, step) in (1..).zip(&schedule.steps) {
            let seen: Vec<f32> = latents.iter().map(|value| (f64::from(*value) * step.input_scale) as f32).collect();
            step.advance(&mut latents, &output(&seen, step.timestep), &mut estimate);
            latents.iter_mut().enumerate().for_each(|(place, value)| *value += (step.noise * noise(place, number)) as f32);
        }
        let scale = case.end.iter().map(|v| v.abs()).fold(0.0, f32::max);
        for (ours, theirs) in latents.iter().zip(&case.end) {
            assert!((ours - theirs).abs() <= 2e-4 * scale, "{}: {latents:?} and {:?}", case.name, case.end);
        }
    }
}

#[test]
fn a_configuration_that_cannot_be_followed_is_refused_by_its_key() {
    for (class, json, key) in [
        ("DPMSolverMultistepScheduler", r#"{"beta_schedule": "sigmoid"}"#, "beta_schedule"),
        ("DPMSolverMultistepScheduler", r#"{"prediction_type": "flow"}"#, "prediction_type"),
        ("EulerAncestralDiscreteScheduler", r#"{"prediction_type": "sample"}"#, "prediction_type"),
        ("PNDMScheduler", r#"{"timestep_spacing": "random"}"#, "timestep_spacing"),
        ("DPMSolverMultistepScheduler", r#"{"use_karras_sigmas": true}"#, "use_karras_sigmas"),
        ("DDIMScheduler", r#"{"trained_betas": [0.1, 0.2]}"#, "trained_betas"),
        ("DDIMScheduler", r#"{"thresholding": true}"#, "thresholding"),
        ("DDIMScheduler", r#"{"rescale_betas_zero_snr": true}"#, "rescale_betas_zero_snr"),
        ("DPMSolverMultistepScheduler", r#"{"algorithm_type": "sde-dpmsolver++"}"#, "algorithm_type"),
        ("DPMSolverMultistepScheduler", r#"{"solver_order": 3}"#, "solver_order"),
        ("EulerDiscreteScheduler", r#"{"interpolation_type": "log_linear"}"#, "interpolation_type"),
        ("EulerDiscreteScheduler", r#"{"timestep_type": "continuous"}"#, "timestep_type"),
        ("LCMScheduler", r#"{"original_inference_steps": 0}"#, "original_inference_steps"),
        ("PNDMScheduler", r#"{"beta_start": 2.0}"#, "beta_start"),
        ("PNDMScheduler", r#"{"num_train_timesteps": 1}"#, "num_train_timesteps"),
    ] {
        let config = SchedulerConfig { class_name: class.to_owned(), ..serde_json::from_str(json).unwrap() };
        let problem = Scheduler::new(config).unwrap_err();
        assert!(problem.contains(key), "{problem}");
    }
}

#[test]
fn more_steps_than_there_are_different_ones_are_refused() {
    for (class, spacing) in [("PNDMScheduler", "linspace"), ("PNDMScheduler", "leading"), ("DDIMScheduler", "trailing"), ("EulerDiscreteScheduler", "leading")]
    {
        let config = serde_json::from_value(serde_json::json!({ "_class_name": class, "timestep_spacing": spacing })).unwrap();
        let scheduler = Scheduler::new(config).unwrap();
        assert!(scheduler.schedule(50).is_ok());
        let problem = scheduler.schedule(1001).unwrap_err();
        assert!(problem.contains("1000 steps that the model was trained with"), "{problem}");
    }
}

#[test]
fn a_latent_consistency_model_takes_no_more_steps_than_it_was_distilled_on() {
    let config = serde_json::from_value(serde_json::json!({ "_class_name": "LCMScheduler", "original_inference_steps": 40 })).unwrap();
    let scheduler = Scheduler::new(config).unwrap();
    assert_eq!(scheduler.schedule(40).unwrap().steps.len(), 40);
    assert!(scheduler.schedule(41).unwrap_err().contains("original_inference_steps"));
}

#[test]
fn a_class_that_is_not_known_is_refused_by_name_with_those_that_are() {
    for (json, name) in [(r#"{"_class_name": "UniPCMultistepScheduler"}"#, "UniPCMultistepScheduler"), ("{}", "_class_name")] {
        let problem = Scheduler::new(serde_json::from_str(json).unwrap()).unwrap_err();
        assert!(problem.contains(name) && problem.contains("DDIMScheduler") && problem.contains("LCMScheduler"), "{problem}");
    }
}
