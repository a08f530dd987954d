//! Text decoders with a cache of keys and values, token by token.

use std::{borrow::Cow, path::Path};

use ort::{
    session::{Session, SessionInputValue},
    value::{DynValue, Tensor, TensorElementType},
};

use crate::{
    Error,
    runtime::{self, EngineArgs},
};

/// A text decoder: `input_ids` in, `logits` out, the cache of each layer as `past_key_values.N.key` and `.value` in and `present.N.*` out.
/// `attention_mask`, `position_ids` and `encoder_hidden_states` are fed where the graph declares them.
#[derive(Debug)]
pub struct Decoder {
    session: Session,
    ids: TensorElementType,
    mask: bool,
    positions: bool,
    encoder: bool,
    past: Vec<Past>,
}

#[derive(Debug)]
struct Past {
    input: String,
    output: String,
    heads: usize,
    width: usize,
}

/// Where a batch of sequences of equal length stands.
#[derive(Debug)]
pub struct Sequences {
    batch: usize,
    length: usize,
    past: Vec<DynValue>,
}

impl Sequences {
    /// Tokens of each sequence so far.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl Decoder {
    /// Reads a decoder; one without a cache is refused.
    pub fn load(file: &Path, args: &EngineArgs) -> Result<Self, Error> {
        let session = runtime::session(file, args)?;
        let has = |name: &str| session.inputs().iter().any(|input| input.name() == name);
        let ids = session
            .inputs()
            .iter()
            .find(|input| input.name() == "input_ids")
            .and_then(|input| input.dtype().tensor_type())
            .ok_or_else(|| Error::file(file, "not a text decoder: no input named input_ids"))?;
        if !session.outputs().iter().any(|output| output.name() == "logits") {
            return Err(Error::file(file, "not a text decoder: no output named logits"));
        }
        let past = session
            .inputs()
            .iter()
            .filter_map(|input| Some((input, input.name().strip_prefix("past_key_values.")?)))
            .map(|(input, rest)| {
                let output = format!("present.{rest}");
                if !session.outputs().iter().any(|o| o.name() == output) {
                    return Err(Error::file(file, format!("takes {} but does not give {output}", input.name())));
                }
                match input.dtype().tensor_shape().map(|shape| shape.to_vec()).as_deref() {
                    Some([_, heads, _, width]) if *heads > 0 && *width > 0 => {
                        Ok(Past { input: input.name().to_owned(), output, heads: *heads as usize, width: *width as usize })
                    }
                    shape => Err(Error::file(file, format!("{} has the shape {shape:?}; its heads and their width must be fixed", input.name()))),
                }
            })
            .collect::<Result<Vec<_>, _>>()?;
        if past.is_empty() {
            return Err(Error::file(file, "a decoder without a cache (no input past_key_values.0.key): export it with its past"));
        }
        let (mask, positions, encoder) = (has("attention_mask"), has("position_ids"), has("encoder_hidden_states"));
        Ok(Self { session, ids, mask, positions, encoder, past })
    }

    /// Sequences that have no tokens yet.
    pub fn begin(&self, batch: usize) -> Result<Sequences, Error> {
        let past = self
            .past
            .iter()
            .map(|past| Ok(Tensor::<f32>::from_array(([batch, past.heads, 0, past.width], Vec::new()))?.into_dyn()))
            .collect::<Result<_, Error>>()?;
        Ok(Sequences { batch, length: 0, past })
    }

    /// Appends tokens to each sequence, `batch` x `count` of them row by row, and gives the logits after the last: `batch` rows of one
    /// value a token of the vocabulary. `encoder` is what the text is about, `batch` x T x D, where the decoder attends to something.
    pub fn append(&mut self, sequences: &mut Sequences, tokens: &[u32], encoder: Option<&DynValue>) -> Result<Vec<Vec<f32>>, Error> {
        let batch = sequences.batch;
        let count = tokens.len() / batch.max(1);
        let total = sequences.length + count;
        let mut inputs: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = vec![("input_ids".into(), ids_tensor(self.ids, [batch, count], tokens)?)];
        if self.mask {
            inputs.push(("attention_mask".into(), Tensor::from_array(([batch, total], vec![1_i64; batch * total]))?.into()));
        }
        if self.positions {
            let positions: Vec<i64> = (0..batch).flat_map(|_| sequences.length as i64..total as i64).collect();
            inputs.push(("position_ids".into(), Tensor::from_array(([batch, count], positions))?.into()));
        }
        if self.encoder {
            let encoder = encoder.ok_or_else(|| Error::Run("the decoder attends to an encoder's output, and none was given".to_owned()))?;
            inputs.push(("encoder_hidden_states".into(), encoder.into()));
        }
        for (past, value) in self.past.iter().zip(sequences.past.drain(..)) {
            inputs.push((past.input.as_str().into(), value.into()));
        }
        let mut outputs = self.session.run(inputs)?;
        for past in &self.past {
            sequences.past.push(outputs.remove(&past.output).ok_or_else(|| Error::Run(format!("no output {}", past.output)))?);
        }
        sequences.length = total;
        let (shape, logits) = outputs.get("logits").ok_or_else(|| Error::Run("no output logits".to_owned()))?.try_extract_tensor::<f32>()?;
        let (rows, vocabulary) = match **shape {
            [b, l, v] if b as usize == batch && l > 0 && v > 0 => (l as usize, v as usize),
            ref other => return Err(Error::Run(format!("logits have the shape {other:?}, not [{batch}, tokens, vocabulary]"))),
        };
        Ok(logits.chunks_exact(rows * vocabulary).map(|sequence| sequence[(rows - 1) * vocabulary..].to_vec()).collect())
    }
}

/// Token ids as the graph wants them: int64 or int32.
pub fn ids_tensor(kind: TensorElementType, shape: [usize; 2], ids: &[u32]) -> Result<SessionInputValue<'static>, Error> {
    match kind {
        TensorElementType::Int64 => Ok(Tensor::from_array((shape, ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>()))?.into()),
        TensorElementType::Int32 => Ok(Tensor::from_array((shape, ids.iter().map(|&id| id as i32).collect::<Vec<_>>()))?.into()),
        other => Err(Error::Run(format!("token ids as {other}: int64 and int32 are known"))),
    }
}

/// The likeliest token; the lower id of equals. NaN is never the likeliest.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, value) in logits.iter().enumerate() {
        if *value > logits[best] || logits[best].is_nan() {
            best = id;
        }
    }
    best as u32
}
