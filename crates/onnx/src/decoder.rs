//! Text decoders with a cache of keys and values, token by token.

use std::{borrow::Cow, path::Path};

use half::f16;
use ort::{
    session::{Session, SessionInputValue},
    value::{DynValue, PrimitiveTensorElementType, Tensor, TensorElementType, ValueType},
};

use crate::{
    Error,
    runtime::{self, EngineArgs},
    tensors::{float_tensor, floats, input_kind},
};

/// Says which half of a merged decoder runs: without a cache, or with one.
const USE_CACHE_BRANCH: &str = "use_cache_branch";
/// How many tokens, from the last, logits are wanted of.
const NUM_LOGITS_TO_KEEP: &str = "num_logits_to_keep";

/// What a decoder's graph calls its inputs and outputs; `%d` stands for a layer's number. The defaults are Hugging Face's names, and
/// onnxruntime-genai's `genai_config.json` says its own in the same form.
///
/// Where a decoder attends to an encoder, its layers' numbers may carry `.decoder` and `.encoder`: `past_key_values.0.encoder.key`.
#[derive(Debug, Clone)]
pub struct Names {
    /// The tokens, batch x count.
    pub input_ids: String,
    /// The tokens' embeddings, batch x count x D, of a decoder that takes those in their place.
    pub inputs_embeds: String,
    /// 1 for every token so far, batch x total.
    pub attention_mask: String,
    /// Where the tokens stand, batch x count.
    pub position_ids: String,
    /// What the text is about, batch x T x D.
    pub encoder_hidden_states: String,
    /// Scores of the next token, batch x count x vocabulary.
    pub logits: String,
    /// A layer's keys so far, batch x heads x past x width.
    pub past_key: String,
    /// A layer's values so far.
    pub past_value: String,
    /// A layer's keys with those of the tokens.
    pub present_key: String,
    /// A layer's values with those of the tokens.
    pub present_value: String,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            input_ids: "input_ids".to_owned(),
            inputs_embeds: "inputs_embeds".to_owned(),
            attention_mask: "attention_mask".to_owned(),
            position_ids: "position_ids".to_owned(),
            encoder_hidden_states: "encoder_hidden_states".to_owned(),
            logits: "logits".to_owned(),
            past_key: "past_key_values.%d.key".to_owned(),
            past_value: "past_key_values.%d.value".to_owned(),
            present_key: "present.%d.key".to_owned(),
            present_value: "present.%d.value".to_owned(),
        }
    }
}

impl Names {
    /// The output that brings an input of the cache up to date, and whether it is about the encoder; none for other inputs.
    fn present(&self, input: &str) -> Option<(String, bool)> {
        [(&self.past_key, &self.present_key), (&self.past_value, &self.present_value)].into_iter().find_map(|(past, present)| {
            let (before, after) = past.split_once("%d")?;
            let layer = input.strip_prefix(before)?.strip_suffix(after)?;
            let number = layer.strip_suffix(".decoder").or_else(|| layer.strip_suffix(".encoder")).unwrap_or(layer);
            number.parse::<usize>().ok()?;
            Some((present.replace("%d", layer), layer.ends_with(".encoder")))
        })
    }
}

/// A text decoder: tokens in, logits out, and a cache of each layer that goes round. The attention mask, positions, encoder's output and
/// `num_logits_to_keep` are fed where the graph declares them; `use_cache_branch`, too, which merged decoders have. Floats are float32 or float16.
/// Tokens may have a graph of their own, which embeds them.
#[derive(Debug)]
pub struct Decoder {
    session: Session,
    names: Names,
    embeddings: Option<Embeddings>,
    /// Of the input: token ids, or their embeddings.
    kind: TensorElementType,
    mask: Option<TensorElementType>,
    positions: Option<TensorElementType>,
    encoder: Option<TensorElementType>,
    branch: bool,
    /// Its rank, where it is declared.
    logits_to_keep: Option<usize>,
    past: Vec<Past>,
}

/// The graph that embeds tokens: ids to batch x count x D.
#[derive(Debug)]
struct Embeddings {
    session: Session,
    kind: TensorElementType,
}

#[derive(Debug)]
struct Past {
    input: String,
    output: String,
    kind: TensorElementType,
    /// Heads, length (0 where it is free), width.
    shape: [usize; 3],
    /// About the encoder.
    cross: bool,
}

/// Where a batch of sequences of equal length stands.
#[derive(Debug)]
pub struct Sequences {
    length: usize,
    past: Vec<Cached>,
    /// Of the sequences that were begun, the one that each row goes back to.
    origins: Vec<usize>,
}

#[derive(Debug)]
struct Cached {
    value: DynValue,
    /// About the encoder: real after the first call, and the same from then on.
    cross: bool,
}

impl Sequences {
    /// Tokens of each sequence so far, and embeddings that were put in their place.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Goes on with these rows, in this order; a row may be left out, or taken several times. True if some row now goes back to another of the
    /// sequences that were begun than the row in its place did: what the rows attend to is then to be selected in the same way.
    pub fn select(&mut self, rows: &[usize]) -> Result<bool, Error> {
        let origins = rows.iter().map(|row| self.origins.get(*row).copied()).collect::<Option<Vec<_>>>();
        let origins = origins.ok_or_else(|| Error::Run(format!("rows {rows:?} of {} sequences", self.origins.len())))?;
        let others = origins != self.origins;
        if others || rows.iter().enumerate().any(|(at, row)| at != *row) {
            for past in self.past.iter_mut().filter(|past| others || !past.cross) {
                past.value = select_rows(&past.value, rows)?;
            }
        }
        self.origins = origins;
        Ok(others)
    }
}

impl Decoder {
    /// Reads a decoder, and the graph that embeds its tokens where it takes embeddings; one without a cache, or with an input that is not known, is refused.
    pub fn load(file: &Path, embeddings: Option<&Path>, names: &Names, args: &EngineArgs) -> Result<Self, Error> {
        const PAIR: &str =
            "of the pair decoder_model.onnx and decoder_with_past_model.onnx neither is enough alone: use decoder_model_merged.onnx, which is both";
        let session = runtime::session(file, args)?;
        let kind = |name: &str| session.inputs().iter().find(|input| input.name() == name).and_then(|input| input.dtype().tensor_type());
        let input = if embeddings.is_some() { &names.inputs_embeds } else { &names.input_ids };
        let tokens = kind(input).ok_or_else(|| Error::file(file, format!("not a text decoder: no input named {input}")))?;
        if !session.outputs().iter().any(|output| output.name() == names.logits) {
            return Err(Error::file(file, format!("not a text decoder: no output named {}", names.logits)));
        }
        let (mask, positions, encoder) = (kind(&names.attention_mask), kind(&names.position_ids), kind(&names.encoder_hidden_states));
        let branch = kind(USE_CACHE_BRANCH).is_some();
        let fed = [input, &names.attention_mask, &names.position_ids, &names.encoder_hidden_states];
        let (mut past, mut logits_to_keep) = (Vec::new(), None);
        for input in session.inputs() {
            let (name, shape) = (input.name(), input.dtype().tensor_shape().map(|shape| shape.to_vec()));
            if let Some((output, cross)) = names.present(name) {
                past.push(Past::new(name, output, cross, input.dtype(), &session).map_err(|problem| Error::file(file, problem))?);
            } else if name == NUM_LOGITS_TO_KEEP {
                logits_to_keep = Some(shape.unwrap_or_default().len());
            } else if name != USE_CACHE_BRANCH && !fed.iter().any(|known| *known == name) {
                return Err(Error::file(file, format!("takes an input {name}, and nothing is known that it could be fed with")));
            }
        }
        if past.is_empty() {
            let first = names.past_key.replace("%d", "0");
            return Err(Error::file(file, format!("a decoder without a cache (no input {first}): export it with its past; {PAIR}")));
        }
        if past.iter().any(|past| past.cross) && !branch {
            return Err(Error::file(file, format!("a decoder for all tokens but the first (no input {USE_CACHE_BRANCH}): {PAIR}")));
        }
        let embeddings = embeddings.map(|file| Embeddings::load(file, names, args)).transpose()?;
        Ok(Self { session, names: names.clone(), embeddings, kind: tokens, mask, positions, encoder, branch, logits_to_keep, past })
    }

    /// Sequences that have no tokens yet.
    pub fn begin(&self, batch: usize) -> Result<Sequences, Error> {
        let empty = |past: &Past| {
            let [heads, length, width] = past.shape;
            // The first branch of a merged decoder does not look at the past, whose length some graphs fix.
            let length = if self.branch { length } else { 0 };
            let value = float_tensor(past.kind, &[batch, heads, length, width], vec![0.0; batch * heads * length * width])?;
            Ok(Cached { value, cross: past.cross })
        };
        Ok(Sequences { length: 0, past: self.past.iter().map(empty).collect::<Result<_, Error>>()?, origins: (0..batch).collect() })
    }

    /// Whether it takes embeddings, which need not be those of tokens.
    pub fn takes_embeddings(&self) -> bool {
        self.embeddings.is_some()
    }

    /// Appends to each sequence what no tokens stand for, batch x T x D, such as a picture. The decoder must take embeddings.
    pub fn append_embeddings(&mut self, sequences: &mut Sequences, embeddings: &DynValue) -> Result<(), Error> {
        let count = match embeddings.dtype().tensor_shape().map(|shape| shape.to_vec()).as_deref() {
            Some([batch, count, _]) if *batch as usize == sequences.origins.len() => *count as usize,
            other => return Err(Error::Run(format!("embeddings of the shape {other:?} for {} sequences", sequences.origins.len()))),
        };
        self.run(sequences, count, cast(embeddings, self.kind)?, None).map(drop)
    }

    /// Appends tokens to each sequence, `batch` x `count` of them row by row, and gives the logits after the last: `batch` rows of one
    /// value a token of the vocabulary. `encoder` is what the text is about, `batch` x T x D, where the decoder attends to something.
    pub fn append(&mut self, sequences: &mut Sequences, tokens: &[u32], encoder: Option<&DynValue>) -> Result<Vec<Vec<f32>>, Error> {
        let batch = sequences.origins.len();
        let shape = [batch, tokens.len() / batch.max(1)];
        let Some(embeddings) = &mut self.embeddings else {
            return self.run(sequences, shape[1], ids_tensor(self.kind, shape, tokens)?, encoder);
        };
        let embedded = embeddings.of(&self.names, shape, tokens)?;
        self.run(sequences, shape[1], cast(&embedded, self.kind)?, encoder)
    }

    fn run(&mut self, sequences: &mut Sequences, count: usize, input: SessionInputValue<'_>, encoder: Option<&DynValue>) -> Result<Vec<Vec<f32>>, Error> {
        let batch = sequences.origins.len();
        let first = sequences.length == 0;
        let total = sequences.length + count;
        let mut inputs: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::with_capacity(self.past.len() + 6);
        let mut feed = |name: &'_ str, value| inputs.push((name.to_owned().into(), value));
        feed(if self.embeddings.is_some() { &self.names.inputs_embeds } else { &self.names.input_ids }, input);
        if let Some(kind) = self.mask {
            feed(&self.names.attention_mask, ids_tensor(kind, [batch, total], &vec![1; batch * total])?);
        }
        if let Some(kind) = self.positions {
            let positions: Vec<u32> = (0..batch).flat_map(|_| sequences.length as u32..total as u32).collect();
            feed(&self.names.position_ids, ids_tensor(kind, [batch, count], &positions)?);
        }
        if let Some(kind) = self.encoder {
            let encoder = encoder.ok_or_else(|| Error::Run("the decoder attends to an encoder's output, and none was given".to_owned()))?;
            feed(&self.names.encoder_hidden_states, cast(encoder, kind)?);
        }
        if self.branch {
            feed(USE_CACHE_BRANCH, Tensor::from_array(([1], vec![!first]))?.into());
        }
        if let Some(rank) = self.logits_to_keep {
            feed(NUM_LOGITS_TO_KEEP, Tensor::from_array((vec![1_usize; rank], vec![1_i64]))?.into());
        }
        for (past, cached) in self.past.iter().zip(&sequences.past) {
            feed(&past.input, (&cached.value).into());
        }
        let mut outputs = self.session.run(inputs)?;
        for (past, cached) in self.past.iter().zip(&mut sequences.past) {
            if first || !past.cross {
                cached.value = outputs.remove(&past.output).ok_or_else(|| Error::Run(format!("no output {}", past.output)))?;
            }
        }
        sequences.length = total;
        let logits = outputs.get(&self.names.logits).ok_or_else(|| Error::Run(format!("no output {}", self.names.logits)))?;
        let (shape, logits) = floats(logits)?;
        let (rows, vocabulary) = match **shape {
            [b, l, v] if b as usize == batch && l > 0 && v > 0 => (l as usize, v as usize),
            ref other => return Err(Error::Run(format!("{} has the shape {other:?}, not [{batch}, tokens, vocabulary]", self.names.logits))),
        };
        Ok(logits.chunks_exact(rows * vocabulary).map(|sequence| sequence[(rows - 1) * vocabulary..].to_vec()).collect())
    }
}

impl Embeddings {
    fn load(file: &Path, names: &Names, args: &EngineArgs) -> Result<Self, Error> {
        let session = runtime::session(file, args)?;
        let kind = input_kind(&session, &names.input_ids).map(|(kind, _)| kind);
        let kind = kind.ok_or_else(|| Error::file(file, format!("embeds no tokens: no input named {}", names.input_ids)))?;
        if !session.outputs().iter().any(|output| output.name() == names.inputs_embeds) {
            return Err(Error::file(file, format!("embeds no tokens: no output named {}", names.inputs_embeds)));
        }
        Ok(Self { session, kind })
    }

    fn of(&mut self, names: &Names, shape: [usize; 2], tokens: &[u32]) -> Result<DynValue, Error> {
        let mut outputs = self.session.run(vec![(names.input_ids.as_str(), ids_tensor(self.kind, shape, tokens)?)])?;
        outputs.remove(&names.inputs_embeds).ok_or_else(|| Error::Run(format!("no output {}", names.inputs_embeds)))
    }
}

impl Past {
    fn new(input: &str, output: String, cross: bool, dtype: &ValueType, session: &Session) -> Result<Self, String> {
        if !session.outputs().iter().any(|o| o.name() == output) {
            return Err(format!("takes {input} but does not give {output}"));
        }
        match (dtype.tensor_type(), dtype.tensor_shape().map(|shape| shape.to_vec()).as_deref()) {
            (Some(kind @ (TensorElementType::Float32 | TensorElementType::Float16)), Some([_, heads, length, width])) if *heads > 0 && *width > 0 => {
                let shape = [*heads as usize, usize::try_from(*length).unwrap_or(0), *width as usize];
                Ok(Self { input: input.to_owned(), output, kind, shape, cross })
            }
            _ => Err(format!("{input} is {dtype}; a past is float32 or float16, batch x heads x past x width, its heads and their width fixed")),
        }
    }
}

/// A tensor of floats, of the kind that a graph wants.
fn cast(value: &DynValue, kind: TensorElementType) -> Result<SessionInputValue<'_>, Error> {
    if value.dtype().tensor_type() == Some(kind) {
        return Ok(value.into());
    }
    let (shape, values) = floats(value)?;
    let shape: Vec<usize> = shape.iter().map(|side| *side as usize).collect();
    Ok(float_tensor(kind, &shape, values.into_owned())?.into())
}

/// These rows of a tensor of floats, in this order.
pub fn select_rows(value: &DynValue, rows: &[usize]) -> Result<DynValue, Error> {
    match value.dtype().tensor_type() {
        Some(TensorElementType::Float16) => gather::<f16>(value, rows),
        _ => gather::<f32>(value, rows),
    }
}

fn gather<T: PrimitiveTensorElementType + Copy + std::fmt::Debug + 'static>(value: &DynValue, rows: &[usize]) -> Result<DynValue, Error> {
    let (shape, values) = value.try_extract_tensor::<T>()?;
    let mut shape: Vec<usize> = shape.iter().map(|side| *side as usize).collect();
    let size: usize = shape.iter().skip(1).product();
    let mut gathered = Vec::with_capacity(rows.len() * size);
    for row in rows {
        let row = values.get(row * size..(row + 1) * size).ok_or_else(|| Error::Run(format!("no row {row} in a tensor of shape {shape:?}")))?;
        gathered.extend_from_slice(row);
    }
    if let Some(batch) = shape.first_mut() {
        *batch = rows.len();
    }
    Ok(Tensor::from_array((shape, gathered))?.into_dyn())
}

/// Token ids as the graph wants them: int64 or int32.
pub fn ids_tensor(kind: TensorElementType, shape: [usize; 2], ids: &[u32]) -> Result<SessionInputValue<'static>, Error> {
    match kind {
        TensorElementType::Int64 => Ok(Tensor::from_array((shape, ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>()))?.into()),
        TensorElementType::Int32 => Ok(Tensor::from_array((shape, ids.iter().map(|&id| id as i32).collect::<Vec<_>>()))?.into()),
        other => Err(Error::Run(format!("token ids as {other}: int64 and int32 are known"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_past_and_its_present_have_the_same_layer() {
        let present = |name: &str| Names::default().present(name);
        assert_eq!(present("past_key_values.11.value"), Some(("present.11.value".to_owned(), false)));
        assert_eq!(present("past_key_values.0.decoder.key"), Some(("present.0.decoder.key".to_owned(), false)));
        assert_eq!(present("past_key_values.3.encoder.value"), Some(("present.3.encoder.value".to_owned(), true)));
        for other in ["past_key_values.key", "past_key_values.x.key", "past_key_values.1.other.key", "past_key_values.1", "input_ids"] {
            assert_eq!(present(other), None, "{other}");
        }
        let names = Names { past_key: "k%d_in".to_owned(), present_key: "k%d_out".to_owned(), ..Names::default() };
        assert_eq!(names.present("k12_in"), Some(("k12_out".to_owned(), false)));
    }

    #[test]
    fn rows_go_where_they_are_asked_for() {
        runtime::library_path().unwrap();
        for kind in [TensorElementType::Float32, TensorElementType::Float16] {
            let value = float_tensor(kind, &[3, 1, 2], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
            let rows = select_rows(&value, &[2, 0, 2, 1]).unwrap();
            let (shape, values) = floats(&rows).unwrap();
            assert_eq!((&shape[..], &values[..]), (&[4, 1, 2][..], &[4.0, 5.0, 0.0, 1.0, 4.0, 5.0, 2.0, 3.0][..]));
            assert!(select_rows(&value, &[3]).is_err());
        }
    }
}
