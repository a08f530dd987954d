//! Results as a Parquet file: a unit a row, with all its evidence as JSON in the last column.

use std::sync::Arc;

use bytes::Bytes;
use dnd_mesh::Fault;
use dnd_proto::v1::UnitResult;
use futures::{Stream, TryStreamExt as _, stream};
use parquet::{
    basic::Compression,
    data_type::{ByteArray, ByteArrayType, DataType, DoubleType, FloatType, Int32Type},
    errors::ParquetError,
    file::{
        properties::WriterProperties,
        writer::{SerializedFileWriter, SerializedRowGroupWriter},
    },
    schema::parser::parse_message_type,
};
use tonic::Status;

use crate::table::state;

/// A unit's number is below 2³¹, which the type of its column holds; there are readers that know no other.
const SCHEMA: &str = "message unit {
    required binary layer (STRING);
    required int32 unit;
    required binary state (STRING);
    required binary label (STRING);
    optional double score;
    required binary second (STRING);
    required binary third (STRING);
    required binary reason (STRING);
    required float lowest;
    required float highest;
    required binary result (JSON);
}";

/// Units that are written together: what a reader reads at once, and what is held in memory here.
const GROUP: usize = 256;

/// The file, a group of units after the other.
pub(crate) fn file(units: impl Stream<Item = Result<UnitResult, Status>> + Send + 'static) -> impl Stream<Item = Result<Bytes, Status>> {
    let groups = Box::pin(units.try_chunks(GROUP).map_err(|broken| broken.1));
    stream::try_unfold((Some(Columns::new()), groups), |(columns, mut groups)| async move {
        let Some(columns) = columns else { return Ok(None) };
        let mut columns = columns.map_err(failed)?;
        match groups.try_next().await? {
            Some(units) => {
                // A group is megabytes of JSON to write and to compress.
                let written = tokio::task::spawn_blocking(move || columns.write(&units).map(|bytes| (bytes, columns)));
                let (bytes, columns) = written.await.map_err(|_| Fault::internal("the writing of a Parquet file panicked"))?.map_err(failed)?;
                Ok(Some((bytes, (Some(Ok(columns)), groups))))
            }
            None => Ok(Some((columns.end().map_err(failed)?, (None, groups)))),
        }
    })
}

fn failed(error: ParquetError) -> Status {
    Fault::internal(format!("a Parquet file can't be written: {error}")).into()
}

struct Columns(SerializedFileWriter<Vec<u8>>);

impl Columns {
    fn new() -> Result<Self, ParquetError> {
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        SerializedFileWriter::new(Vec::new(), Arc::new(parse_message_type(SCHEMA)?), Arc::new(properties)).map(Self)
    }

    /// Writes units; gives the bytes so far that were not given before.
    fn write(&mut self, units: &[UnitResult]) -> Result<Bytes, ParquetError> {
        let texts = |of: &dyn Fn(&UnitResult) -> String| -> Vec<ByteArray> { units.iter().map(|unit| of(unit).into_bytes().into()).collect() };
        let concept = |unit: &UnitResult, place: usize| unit.concepts.get(place).map(|concept| concept.concept.clone()).unwrap_or_default();
        let scores: Vec<Option<f64>> = units.iter().map(|unit| unit.concepts.first().and_then(|concept| concept.score)).collect();
        let levels: Vec<i16> = scores.iter().map(|score| i16::from(score.is_some())).collect();
        let results: Result<Vec<ByteArray>, _> = units.iter().map(|unit| serde_json::to_vec(unit).map(ByteArray::from)).collect();

        let mut group = self.0.next_row_group()?;
        column::<ByteArrayType>(&mut group, &texts(&|unit| unit.layer.clone()), None)?;
        column::<Int32Type>(&mut group, &units.iter().map(|unit| unit.unit as i32).collect::<Vec<_>>(), None)?;
        column::<ByteArrayType>(&mut group, &texts(&|unit| state(unit).to_owned()), None)?;
        column::<ByteArrayType>(&mut group, &texts(&|unit| unit.label.clone()), None)?;
        column::<DoubleType>(&mut group, &scores.into_iter().flatten().collect::<Vec<_>>(), Some(&levels))?;
        column::<ByteArrayType>(&mut group, &texts(&|unit| concept(unit, 1)), None)?;
        column::<ByteArrayType>(&mut group, &texts(&|unit| concept(unit, 2)), None)?;
        column::<ByteArrayType>(&mut group, &texts(&|unit| unit.reason.clone()), None)?;
        column::<FloatType>(&mut group, &units.iter().map(|unit| unit.lowest).collect::<Vec<_>>(), None)?;
        column::<FloatType>(&mut group, &units.iter().map(|unit| unit.highest).collect::<Vec<_>>(), None)?;
        column::<ByteArrayType>(&mut group, &results.map_err(|error| ParquetError::External(error.into()))?, None)?;
        group.close()?;
        self.0.flush()?;
        Ok(std::mem::take(self.0.inner_mut()).into())
    }

    fn end(self) -> Result<Bytes, ParquetError> {
        self.0.into_inner().map(Bytes::from)
    }
}

fn column<T: DataType>(group: &mut SerializedRowGroupWriter<'_, Vec<u8>>, values: &[T::T], levels: Option<&[i16]>) -> Result<(), ParquetError> {
    let missing = || ParquetError::General("more columns than the schema has".to_owned());
    let mut column = group.next_column()?.ok_or_else(missing)?;
    column.typed::<T>().write_batch(values, levels, None)?;
    column.close()
}
