//! Floats at the edge of a graph: float32 here, and there what the graph takes.

use std::borrow::Cow;

use half::f16;
use ort::{
    session::Session,
    value::{DynValue, Shape, Tensor, TensorElementType},
};

use crate::Error;

/// The values of an output of float32, float16 or float64, with its shape.
pub fn floats(value: &DynValue) -> Result<(&Shape, Cow<'_, [f32]>), Error> {
    match value.dtype().tensor_type() {
        Some(TensorElementType::Float16) => {
            let (shape, values) = value.try_extract_tensor::<f16>()?;
            Ok((shape, values.iter().map(|value| value.to_f32()).collect()))
        }
        Some(TensorElementType::Float64) => {
            let (shape, values) = value.try_extract_tensor::<f64>()?;
            Ok((shape, values.iter().map(|value| *value as f32).collect()))
        }
        _ => {
            let (shape, values) = value.try_extract_tensor::<f32>()?;
            Ok((shape, values.into()))
        }
    }
}

/// A tensor of these values as the graph wants them: float32, float16 or float64.
pub fn float_tensor(kind: TensorElementType, shape: &[usize], values: Vec<f32>) -> Result<DynValue, Error> {
    match kind {
        TensorElementType::Float32 => Ok(Tensor::from_array((shape, values))?.into_dyn()),
        TensorElementType::Float16 => Ok(Tensor::from_array((shape, values.into_iter().map(f16::from_f32).collect::<Vec<_>>()))?.into_dyn()),
        TensorElementType::Float64 => Ok(Tensor::from_array((shape, values.into_iter().map(f64::from).collect::<Vec<_>>()))?.into_dyn()),
        other => Err(Error::Run(format!("numbers as {other}: float32, float16 and float64 are known"))),
    }
}

/// What a session takes under a name, and with how many axes; none where it takes no tensor of that name.
pub fn input_kind(session: &Session, name: &str) -> Option<(TensorElementType, Vec<i64>)> {
    let input = session.inputs().iter().find(|input| input.name() == name)?;
    Some((input.dtype().tensor_type()?, input.dtype().tensor_shape()?.to_vec()))
}
