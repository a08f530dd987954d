//! A target runs in a process of its own: whoever made the network may have made it to hurt.
//!
//! Each session of a target is a child of the service, this program started again under another name ([`is_target_process`], [`run_target`]). Its standard
//! input is a socket: requests come on it and answers go back, one after the other, each a header and raw bytes. Pictures go in as they are encoded, and what
//! comes back are the numbers that were asked for, so that little crosses. The child may take so much memory, and so long for an answer; it is killed when it
//! doesn't keep to that, and when its owner is dropped, and it ends by itself when the service does.

mod child;
mod parent;

use std::io::{self, Read, Write};

use dnd_mesh::{Fault, fault};
use dnd_onnx::{pictures::PictureLimits, runtime::EngineArgs};
use prost::Message as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::engine::{LayerInfo, Reading};

pub use child::{is_target_process, run_target};
pub(crate) use parent::{Host, Process};

/// The name, in place of the program's, that a target's process is started under.
const NAME: &str = "dnd-target";

/// What a target's process is asked.
#[derive(Serialize, Deserialize)]
pub(crate) enum Request {
    /// To run a network on blank pictures, and tell what its outputs are: answered with [`Looked`]. The bytes are the network.
    Look(Load, Look),
    /// To load a network for [`Self::Run`]. The bytes are the network.
    Load(Load, Target),
    /// To run these pictures: answered with each one's width and height, and as bytes `g` of every unit of every layer of those that could be run. The bytes are
    /// the pictures.
    Run { pictures: Vec<Given>, probing: bool },
    /// For activation maps on the pictures that were run last. The bytes of the answer are their values.
    Maps(Vec<MapOf>),
}

/// What a network is loaded with.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Load {
    /// Where its external data lies.
    pub(crate) folder: String,
    /// For one session.
    pub(crate) engine: EngineArgs,
    /// The name of its one input.
    pub(crate) input: String,
}

/// How a network is run to see what it has.
#[derive(Serialize, Deserialize)]
pub(crate) struct Look {
    /// Height and width of the pictures.
    pub(crate) size: (usize, usize),
    /// How many go together, where the graph says it.
    pub(crate) batch: Option<usize>,
}

/// What was seen of a network.
#[derive(Serialize, Deserialize)]
pub(crate) struct Looked {
    /// How many blank pictures it was run on.
    pub(crate) batch: usize,
    /// That number, where it runs on no other.
    pub(crate) fixed: Option<usize>,
    /// Outputs that are tensors: their names, types and shapes.
    pub(crate) values: Vec<(String, Element, Vec<usize>)>,
}

/// A type of values, as far as it matters for a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Element {
    Float32,
    /// Floats of another size.
    Float,
    /// Integers of 8 bits, which may be floats that were quantised.
    EightBits,
    Other(String),
}

/// What is wanted of a target's pictures.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Target {
    /// The batch size, where it runs at no other.
    pub(crate) batch: Option<usize>,
    pub(crate) layers: Vec<LayerInfo>,
    pub(crate) reading: Reading,
    /// The encoded message.
    pub(crate) preprocessing: Vec<u8>,
    pub(crate) picture_bytes: usize,
    pub(crate) picture_pixels: u64,
}

impl Target {
    fn limits(&self) -> PictureLimits {
        PictureLimits { bytes: self.picture_bytes, pixels: self.picture_pixels }
    }
}

/// A picture among the bytes of a request.
#[derive(Serialize, Deserialize)]
pub(crate) enum Given {
    /// A file of so many bytes.
    Encoded(usize),
    /// Its pixels, three bytes each.
    Pixels { width: u32, height: u32 },
}

/// The width and height of a picture.
pub(crate) type Size = (u32, u32);

/// Which map.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct MapOf {
    /// The picture's place among those that could be run.
    pub(crate) row: usize,
    /// The layer's place among the target's.
    pub(crate) layer: usize,
    pub(crate) unit: u32,
}

/// What a process answers: what was asked for, or the fault as an encoded status.
pub(crate) type Answer<T> = Result<T, Vec<u8>>;

fn answer_of<T>(result: Result<T, Fault>) -> Answer<T> {
    result.map_err(|fault| fault.into_item().encode_to_vec())
}

/// An answer as it was meant.
fn meant<T>(answer: Answer<T>) -> Result<T, Fault> {
    answer.map_err(|status| match tonic_types::Status::decode(&*status) {
        Ok(status) => Fault::relayed(&fault::item_status(&status)),
        Err(_) => Fault::internal("a target's process answered something that is no status"),
    })
}

pub(crate) fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn bytes_of(floats: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(floats)];
    bytes.as_chunks_mut().0.iter_mut().zip(floats).for_each(|(bytes, float)| *bytes = float.to_le_bytes());
    bytes
}

/// Writes a message: the lengths of its header and of its bytes, and these.
fn write<T: Serialize>(to: &mut impl Write, header: &T, bytes: &[u8]) -> io::Result<()> {
    let header = postcard::to_allocvec(header).map_err(io::Error::other)?;
    let mut start = Vec::with_capacity(2 * LENGTH + header.len());
    start.extend((header.len() as u64).to_le_bytes());
    start.extend((bytes.len() as u64).to_le_bytes());
    start.extend(header);
    to.write_all(&start)?;
    to.write_all(bytes)
}

/// Bytes of a length.
const LENGTH: usize = size_of::<u64>();

/// Reads a message whose header and bytes are at most so long.
fn read<T: DeserializeOwned>(from: &mut impl Read, most: u64) -> io::Result<(T, Vec<u8>)> {
    let mut length = || {
        let mut bytes = [0; LENGTH];
        from.read_exact(&mut bytes)?;
        let length = u64::from_le_bytes(bytes);
        if length <= most { Ok(length as usize) } else { Err(io::Error::other(format!("a message of {length} bytes"))) }
    };
    let (header, bytes) = (length()?, length()?);
    let mut part = |length| {
        let mut part = vec![0; length];
        from.read_exact(&mut part).map(|()| part)
    };
    let (header, bytes) = (part(header)?, part(bytes)?);
    Ok((postcard::from_bytes(&header).map_err(io::Error::other)?, bytes))
}
