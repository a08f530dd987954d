//! The description of the HTTP API (OpenAPI 3.1): its messages are those of the `.proto` files, with their comments.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::LazyLock,
};

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet, field_descriptor_proto as field};
use serde_json::{Map, Value, json};

/// One thing that can be asked.
struct Operation {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    query: &'static [(&'static str, &'static str)],
    body: Body,
    status: &'static str,
    answer: Body,
}

/// What a request or an answer holds.
#[derive(Clone, Copy)]
enum Body {
    None,
    /// A message of the `.proto` files as JSON.
    Json(&'static str),
    /// Messages one after the other, of a media type.
    Stream(&'static str, &'static str),
    /// Bytes of a media type.
    Bytes(&'static str),
    /// A form of files.
    Form,
    /// An object with these fields.
    Fields(&'static [(&'static str, &'static str)]),
}

const PAGE: [(&str, &str); 2] = [("page_size", "How many at most."), ("page_token", "From the page before; empty for the first.")];
const ARRIVED: Body = Body::Fields(&[("complete", "boolean"), ("received", "integer")]);

const OPERATIONS: &[Operation] = &[
    Operation {
        method: "get",
        path: "/v1/jobs",
        summary: "The jobs, the newest first, a page at a time.",
        query: &PAGE,
        body: Body::None,
        status: "200",
        answer: Body::Json("ListJobsResponse"),
    },
    Operation {
        method: "post",
        path: "/v1/jobs",
        summary: "Creates a job.",
        query: &[],
        body: Body::Json("CreateJobRequest"),
        status: "201",
        answer: Body::Json("CreateJobResponse"),
    },
    Operation {
        method: "get",
        path: "/v1/jobs/{job_id}",
        summary: "A job as it stands.",
        query: &[],
        body: Body::None,
        status: "200",
        answer: Body::Json("GetJobResponse"),
    },
    Operation {
        method: "delete",
        path: "/v1/jobs/{job_id}",
        summary: "Deletes a job and its results.",
        query: &[],
        body: Body::None,
        status: "204",
        answer: Body::None,
    },
    Operation {
        method: "post",
        path: "/v1/jobs/{job_id}/cancel",
        summary: "Stops a job; the units that have ended are kept.",
        query: &[],
        body: Body::None,
        status: "200",
        answer: Body::Json("CancelJobResponse"),
    },
    Operation {
        method: "post",
        path: "/v1/jobs/{job_id}/resume",
        summary: "Lets a job go on where it stopped.",
        query: &[("failed", "true: its failed units are tried again, too.")],
        body: Body::None,
        status: "200",
        answer: Body::Json("ResumeJobResponse"),
    },
    Operation {
        method: "get",
        path: "/v1/jobs/{job_id}/events",
        summary: "What happens in a job, as server-sent events, until it has ended. An event's id is its number, which Last-Event-ID goes on after; its name is the \
                  field of JobEvent that is set. `end` follows the last; `problem` ends a stream that broke.",
        query: &[("after", "The number of the last event that was seen."), ("evidence", "false: units come without crops, captions and drawn pictures.")],
        body: Body::None,
        status: "200",
        answer: Body::Stream("text/event-stream", "JobEvent"),
    },
    Operation {
        method: "get",
        path: "/v1/jobs/{job_id}/units",
        summary: "The units of a job as they stand, without their evidence, a page at a time.",
        query: &[
            PAGE[0],
            PAGE[1],
            ("layer", "Only those of this layer."),
            ("state", "Only those that ended so, such as UNIT_STATE_LABELLED."),
            ("text", "Only those of whose labels one holds this text."),
        ],
        body: Body::None,
        status: "200",
        answer: Body::Json("ListUnitsResponse"),
    },
    Operation {
        method: "get",
        path: "/v1/jobs/{job_id}/units/{layer}/{unit}",
        summary: "A unit of a job with all its evidence.",
        query: &[],
        body: Body::None,
        status: "200",
        answer: Body::Json("GetUnitResponse"),
    },
    Operation {
        method: "get",
        path: "/v1/jobs/{job_id}/nearest",
        summary: "The labelled units of a job whose labels are nearest to a text, by CLIP's embeddings of both.",
        query: &[("text", "A word, or a few."), ("most", "How many at most.")],
        body: Body::None,
        status: "200",
        answer: Body::Json("NearestUnitsResponse"),
    },
    Operation {
        method: "get",
        path: "/v1/jobs/{job_id}/export",
        summary: "The units of a job that have ended, as a file: a table (csv, or parquet with all evidence as JSON), a line of JSON each with all evidence (jsonl), \
                  as CoSy's evaluation reads them (cosy), a line of JSON each with Neuronpedia's names (neuronpedia), or a report that opens anywhere (html).",
        query: &[("format", "csv, parquet, jsonl, cosy, neuronpedia or html."), ("layer", "Only those of this layer.")],
        body: Body::None,
        status: "200",
        answer: Body::Bytes("text/csv"),
    },
    Operation {
        method: "post",
        path: "/v1/select",
        summary: "Step 3 alone: which of your own candidate concepts fits a unit best. A line of JSON for each thing that happens, the last with the unit; a line \
                  with a `problem` ends one that failed.",
        query: &[],
        body: Body::Json("SelectConceptRequest"),
        status: "200",
        answer: Body::Stream("application/x-ndjson", "SelectConceptResponse"),
    },
    Operation {
        method: "post",
        path: "/v1/layers",
        summary: "The layers of a network, and the units of each, that a job can ask for.",
        query: &[],
        body: Body::Json("DissectServiceDescribeTargetRequest"),
        status: "200",
        answer: Body::Json("DescribeTargetResponse"),
    },
    Operation {
        method: "get",
        path: "/v1/pictures/{digest}",
        summary: "A picture that a result refers to.",
        query: &[],
        body: Body::None,
        status: "200",
        answer: Body::Bytes("image/*"),
    },
    Operation {
        method: "get",
        path: "/v1/uploads/{digest}",
        summary: "How much of a file has arrived.",
        query: &[],
        body: Body::None,
        status: "200",
        answer: ARRIVED,
    },
    Operation {
        method: "put",
        path: "/v1/uploads/{digest}",
        summary: "Uploads a network or a picture under its SHA-256. With `Content-Range: bytes 1000-1999/2000` an upload that was broken off goes on.",
        query: &[],
        body: Body::Bytes("application/octet-stream"),
        status: "200",
        answer: ARRIVED,
    },
    Operation {
        method: "post",
        path: "/v1/uploads",
        summary: "Uploads the files of a form, each in one go, and gives their digests: for pictures, what makes a probing set of them.",
        query: &[],
        body: Body::Form,
        status: "200",
        answer: Body::Json("PictureList"),
    },
    Operation {
        method: "post",
        path: "/v1/probing-sets",
        summary: "Makes a probing set of uploaded pictures; its list_digest names it in a ProbingSource.",
        query: &[],
        body: Body::Json("PictureList"),
        status: "200",
        answer: Body::Fields(&[("list_digest", "string")]),
    },
    Operation {
        method: "get",
        path: "/v1/studies",
        summary: "The rating studies, the newest first, a page at a time.",
        query: &PAGE,
        body: Body::None,
        status: "200",
        answer: Body::Json("ListStudiesResponse"),
    },
    Operation {
        method: "post",
        path: "/v1/studies",
        summary: "Creates a study: people rate the labels of several jobs, or of a job and other methods, without knowing whose they are.",
        query: &[],
        body: Body::Json("CreateStudyRequest"),
        status: "201",
        answer: Body::Json("CreateStudyResponse"),
    },
    Operation {
        method: "get",
        path: "/v1/studies/{study_id}",
        summary: "A study, with what its ratings say.",
        query: &[],
        body: Body::None,
        status: "200",
        answer: Body::Json("GetStudyResponse"),
    },
    Operation {
        method: "delete",
        path: "/v1/studies/{study_id}",
        summary: "Deletes a study and its ratings.",
        query: &[],
        body: Body::None,
        status: "204",
        answer: Body::None,
    },
    Operation {
        method: "get",
        path: "/v1/studies/{study_id}/task",
        summary: "What a rater sees next.",
        query: &[("rater", "What the rater is called.")],
        body: Body::None,
        status: "200",
        answer: Body::Json("NextTaskResponse"),
    },
    Operation {
        method: "get",
        path: "/v1/studies/{study_id}/ratings",
        summary: "All ratings as a table: a rater's rating of one method's label a row.",
        query: &[],
        body: Body::None,
        status: "200",
        answer: Body::Bytes("text/csv"),
    },
    Operation {
        method: "post",
        path: "/v1/studies/{study_id}/ratings",
        summary: "Keeps what a rater says of a unit. Said again, the later counts.",
        query: &[],
        body: Body::Json("RateRequest"),
        status: "200",
        answer: Body::Json("RateResponse"),
    },
];

/// `/openapi.json`.
pub(crate) async fn openapi() -> Response {
    static DOCUMENT: LazyLock<String> = LazyLock::new(|| document().to_string());
    ([(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-cache")], DOCUMENT.as_str()).into_response()
}

fn document() -> Value {
    let package = Package::read();
    let mut schemas = Map::new();
    let mut wanted = BTreeSet::new();
    let mut paths: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
    for operation in OPERATIONS {
        paths.entry(operation.path).or_default().insert(operation.method.to_owned(), describe(operation));
        for body in [operation.body, operation.answer] {
            if let Body::Json(name) | Body::Stream(_, name) = body {
                wanted.insert(name.to_owned());
            }
        }
    }
    while let Some(name) = wanted.pop_first() {
        if let Some(schema) = package.schema(&name, &mut wanted) {
            schemas.insert(name, schema);
        }
        wanted.retain(|name| !schemas.contains_key(name));
    }
    let problem = json!({
        "type": "object",
        "description": "What went wrong (RFC 9457).",
        "properties": {
            "status": { "type": "integer", "description": "The HTTP status." },
            "title": { "type": "string", "description": "The HTTP status in words." },
            "detail": { "type": "string", "description": "What was wrong, in a sentence." },
            "code": { "type": "string", "description": "The gRPC code, such as \"NOT_FOUND\"." },
            "reason": { "type": "string", "description": "A stable word, such as \"INVALID_FIELD\"." },
            "field": { "type": "string", "description": "The field that was wrong, such as \"layers[0].units\"." },
        },
    });
    schemas.insert("Problem".to_owned(), problem);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Describe-and-Dissect",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Labels neurons of vision networks in words, with the evidence for each label. Messages are those of dnd/v1/*.proto as protobuf's JSON, \
                            with the field names of the files.",
        },
        "paths": paths,
        "components": { "schemas": schemas },
    })
}

fn describe(operation: &Operation) -> Value {
    let in_path = operation.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let in_path = in_path.map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }));
    let in_query =
        operation.query.iter().map(|(name, description)| json!({ "name": name, "in": "query", "description": description, "schema": { "type": "string" } }));
    let mut answer = json!({ "description": "As asked for." });
    if let Some(content) = content(operation.answer) {
        answer["content"] = content;
    }
    let problem = json!({ "description": "What went wrong.", "content": { "application/problem+json": { "schema": reference("Problem") } } });
    let mut described = json!({
        "summary": operation.summary,
        "parameters": in_path.chain(in_query).collect::<Vec<_>>(),
        "responses": { operation.status: answer, "default": problem },
    });
    if let Some(content) = content(operation.body) {
        described["requestBody"] = json!({ "required": true, "content": content });
    }
    described
}

fn content(body: Body) -> Option<Value> {
    Some(match body {
        Body::None => return None,
        Body::Json(name) => json!({ "application/json": { "schema": reference(name) } }),
        Body::Stream(kind, name) => json!({ kind: { "schema": reference(name) } }),
        Body::Bytes(kind) => json!({ kind: {} }),
        Body::Form => json!({ "multipart/form-data": { "schema": { "type": "object", "additionalProperties": { "type": "string", "format": "binary" } } } }),
        Body::Fields(fields) => {
            let properties: Map<String, Value> = fields.iter().map(|(name, kind)| ((*name).to_owned(), json!({ "type": kind }))).collect();
            json!({ "application/json": { "schema": { "type": "object", "properties": properties } } })
        }
    })
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// The messages and enums of `dnd.v1`, by name, with the comments of each and of its fields or values.
struct Package {
    messages: HashMap<String, (DescriptorProto, Comments)>,
    enums: HashMap<String, (EnumDescriptorProto, Comments)>,
}

/// A comment for the thing itself, and one for each of its members.
struct Comments(Option<String>, Vec<Option<String>>);

impl Package {
    fn read() -> Self {
        let mut package = Self { messages: HashMap::new(), enums: HashMap::new() };
        let files = FileDescriptorSet::decode(dnd_proto::FILE_DESCRIPTOR_SET).unwrap_or_default().file;
        for file in files.into_iter().filter(|file| file.package() == "dnd.v1") {
            let comments: HashMap<Vec<i32>, String> = file
                .source_code_info
                .into_iter()
                .flat_map(|info| info.location)
                .filter_map(|location| Some((location.path, location.leading_comments?.split_whitespace().collect::<Vec<_>>().join(" "))))
                .collect();
            // The numbers are those of the fields of descriptor.proto: a file's messages and enums, and their members.
            let of = |kind: i32, index: usize, count: usize| {
                let index = index as i32;
                let members = (0..count as i32).map(|member| comments.get(&vec![kind, index, 2, member]).cloned()).collect();
                Comments(comments.get(&vec![kind, index]).cloned(), members)
            };
            for (i, message) in file.message_type.into_iter().enumerate() {
                let comments = of(4, i, message.field.len());
                package.messages.insert(message.name().to_owned(), (message, comments));
            }
            for (i, kind) in file.enum_type.into_iter().enumerate() {
                let comments = of(5, i, kind.value.len());
                package.enums.insert(kind.name().to_owned(), (kind, comments));
            }
        }
        package
    }

    /// The schema of a message or an enum; what it refers to is added to `wanted`.
    fn schema(&self, name: &str, wanted: &mut BTreeSet<String>) -> Option<Value> {
        if let Some((message, Comments(comment, comments))) = self.messages.get(name) {
            let properties: Map<String, Value> = message
                .field
                .iter()
                .zip(comments)
                .enumerate()
                .map(|(place, (field, comment))| {
                    let mut schema = field_schema(field, wanted);
                    let one_of = field.oneof_index.filter(|_| !field.proto3_optional()).and_then(|i| message.oneof_decl.get(i as usize));
                    let one_of = one_of.map(|group| format!("At most one field of \"{}\" is set.", group.name()));
                    let description = comment.iter().cloned().chain(one_of).collect::<Vec<_>>().join(" ");
                    schema["description"] = description.into();
                    // JSON's objects have no order; who shows the fields wants that of the file.
                    schema["x-order"] = place.into();
                    (field.name().to_owned(), schema)
                })
                .collect();
            return Some(json!({ "type": "object", "description": comment, "properties": properties }));
        }
        let (kind, Comments(comment, comments)) = self.enums.get(name)?;
        let values: Vec<&str> = kind.value.iter().map(|value| value.name()).collect();
        let lines = values.iter().zip(comments).map(|(value, comment)| format!("{value}: {}", comment.as_deref().unwrap_or_default()));
        let description = comment.iter().cloned().chain(lines).collect::<Vec<_>>().join("\n");
        Some(json!({ "type": "string", "enum": values, "description": description }))
    }
}

fn field_schema(field: &FieldDescriptorProto, wanted: &mut BTreeSet<String>) -> Value {
    let schema = match field.r#type() {
        field::Type::Double | field::Type::Float => json!({ "type": "number" }),
        // Numbers of 64 bits are strings in protobuf's JSON.
        field::Type::Uint64 | field::Type::Fixed64 => json!({ "type": "string", "format": "uint64" }),
        field::Type::Int64 | field::Type::Sint64 | field::Type::Sfixed64 => json!({ "type": "string", "format": "int64" }),
        field::Type::Int32 | field::Type::Sint32 | field::Type::Sfixed32 => json!({ "type": "integer" }),
        field::Type::Uint32 | field::Type::Fixed32 => json!({ "type": "integer", "minimum": 0 }),
        field::Type::Bool => json!({ "type": "boolean" }),
        field::Type::String => json!({ "type": "string" }),
        field::Type::Bytes => json!({ "type": "string", "contentEncoding": "base64" }),
        field::Type::Enum | field::Type::Message | field::Type::Group => match field.type_name() {
            ".google.protobuf.Timestamp" => json!({ "type": "string", "format": "date-time" }),
            name => match name.strip_prefix(".dnd.v1.") {
                Some(name) => {
                    wanted.insert(name.to_owned());
                    reference(name)
                }
                None => json!({ "type": "object" }),
            },
        },
    };
    if field.label() == field::Label::Repeated { json!({ "type": "array", "items": schema }) } else { schema }
}
