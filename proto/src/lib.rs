//! The gRPC API of the mesh: messages, clients and servers generated from `dnd/v1`.
//!
//! The `.proto` files are the documentation; a generated item carries their comments. Messages serialise with serde as
//! protobuf's canonical JSON, with the field names of the files and zero values written out.

/// Package `dnd.v1`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/dnd.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/dnd.v1.serde.rs"));
}

impl v1::Usage {
    /// Counts another in. The cost is of those whose prices are known.
    pub fn add(&mut self, more: &Self) {
        self.calls += more.calls;
        self.prompt_tokens += more.prompt_tokens;
        self.answer_tokens += more.answer_tokens;
        self.cost = match (self.cost, more.cost) {
            (Some(cost), Some(more)) => Some(cost + more),
            (cost, more) => cost.or(more),
        };
    }
}

/// The compiled `.proto` files, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
