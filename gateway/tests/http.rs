//! The HTTP API over a real server and a made-up orchestrator.
#![allow(clippy::unwrap_used)]

#[path = "../examples/synthetic/fake.rs"]
mod fake;

use std::{collections::HashSet, net::SocketAddr, time::Duration};

use dnd_gateway::router;
use dnd_mesh::{balance::Balanced, blobs, channel::Dial, server::InProcess};
use futures::StreamExt as _;
use parquet::{
    file::reader::{FileReader as _, SerializedFileReader},
    record::{Row, RowAccessor as _},
};
use reqwest::{Client, Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

struct Gateway {
    client: Client,
    address: SocketAddr,
    stopping: CancellationToken,
    _mesh: Option<InProcess>,
    _server: JoinSet<()>,
}

impl Gateway {
    async fn start(units: u32) -> Self {
        let mesh = fake::start(units).unwrap();
        let channel = mesh.channel().into();
        Self::over(channel, Some(mesh)).await
    }

    async fn over(channel: Balanced, mesh: Option<InProcess>) -> Self {
        // Which one is already there, from another test, does not matter.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stopping = CancellationToken::new();
        let router = router(channel, 4, stopping.clone());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { client: Client::new(), address, stopping, _mesh: mesh, _server: server }
    }

    fn ask(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("http://{}{path}", self.address))
    }

    async fn get(&self, path: &str) -> Response {
        self.ask(Method::GET, path).send().await.unwrap()
    }

    async fn json(&self, path: &str) -> Value {
        let response = self.get(path).await;
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        response.json().await.unwrap()
    }

    /// Starts a job of a few units.
    async fn job(&self, units: &[u32]) -> String {
        let request = json!({ "request": { "target": { "uri": "file:///net.onnx" }, "layers": [{ "layer": "fc", "units": units }] } });
        let created = self.ask(Method::POST, "/v1/jobs").json(&request).send().await.unwrap();
        assert_eq!(created.status(), StatusCode::CREATED);
        created.json::<Value>().await.unwrap()["job"]["job_id"].as_str().unwrap().to_owned()
    }
}

/// An event of a stream: its id, name and data.
type Told = (Option<u64>, String, Value);

/// Events as they come, until the stream ends or so many have been read.
async fn events(response: Response, most: usize) -> Vec<Told> {
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut stream = response.bytes_stream();
    let (mut text, mut events) = (String::new(), Vec::new());
    while events.len() < most {
        let Some(Ok(bytes)) = stream.next().await else { break };
        text.push_str(std::str::from_utf8(&bytes).unwrap());
        while let Some((event, rest)) = text.split_once("\n\n") {
            let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned));
            if let Some(name) = field("event") {
                events.push((field("id").map(|id| id.parse().unwrap()), name, serde_json::from_str(&field("data").unwrap()).unwrap()));
            }
            text = rest.to_owned();
        }
    }
    events
}

fn numbers(events: &[Told]) -> Vec<u64> {
    events.iter().filter_map(|(id, _, _)| *id).collect()
}

async fn problem(response: Response, status: u16) -> Value {
    assert_eq!(response.status(), status);
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let problem: Value = response.json().await.unwrap();
    assert_eq!(problem["status"], status);
    problem
}

#[tokio::test]
async fn a_job_is_started_watched_to_its_end_looked_at_and_deleted() {
    let gateway = Gateway::start(0).await;
    let id = gateway.job(&[0, 1, 17]).await;
    let told = events(gateway.get(&format!("/v1/jobs/{id}/events")).await, usize::MAX).await;
    assert_eq!(numbers(&told), [1, 2, 3, 4, 5]);
    let names: Vec<&str> = told.iter().map(|(_, name, _)| name.as_str()).filter(|name| *name != "progress").collect();
    assert_eq!(names, ["accepted", "unit", "unit", "unit", "done", "end"]);
    assert!(told.iter().filter(|(_, name, _)| name == "progress").all(|(id, _, data)| id.is_none() && data["progress"]["total"].is_string()));

    let job = gateway.json(&format!("/v1/jobs/{id}")).await;
    assert_eq!(
        (&job["job"]["state"], &job["job"]["units"]["dead"]),
        (&json!("JOB_STATE_DONE"), &json!("1")),
        "protobuf's JSON: names of values, 64 bits as text"
    );
    let units = gateway.json(&format!("/v1/jobs/{id}/units?state=UNIT_STATE_DEAD")).await;
    assert_eq!(units["units"].as_array().unwrap().len(), 1);
    assert_eq!(units["units"][0]["unit"], 17);
    let unit = gateway.json(&format!("/v1/jobs/{id}/units/fc/1")).await;
    assert_eq!(unit["unit"]["concepts"][0]["concept"], unit["unit"]["label"]);

    let path = format!("/v1/jobs/{id}");
    assert_eq!(gateway.ask(Method::DELETE, &path).send().await.unwrap().status(), StatusCode::NO_CONTENT);
    problem(gateway.get(&path).await, 404).await;
}

#[tokio::test]
async fn events_go_on_after_the_last_that_was_seen_at_another_gateway() {
    let first = Gateway::start(0).await;
    let id = first.job(&(0..8).collect::<Vec<_>>()).await;
    let path = format!("/v1/jobs/{id}/events?evidence=false");
    let before = events(first.get(&path).await, 9).await;
    let seen = *numbers(&before).last().unwrap();
    assert!((1..10).contains(&seen), "the job is not at its end: {seen}");

    let second = Gateway::over(first._mesh.as_ref().unwrap().channel().into(), None).await;
    let after = second.ask(Method::GET, &path).header("last-event-id", seen.to_string()).send().await.unwrap();
    let after = events(after, usize::MAX).await;
    assert_eq!(numbers(&after), (seen + 1..=10).collect::<Vec<_>>());
    let (_, _, unit) = after.iter().find(|(_, name, _)| name == "unit").unwrap();
    assert_eq!((&unit["unit"]["crops"], unit["unit"]["label"].as_str().unwrap().is_empty()), (&json!([]), false));
    let again = second.ask(Method::GET, &path).header("last-event-id", "nine").send().await.unwrap();
    assert_eq!(problem(again, 400).await["field"], "last-event-id");
}

#[tokio::test]
async fn streams_end_when_the_gateway_does() {
    let gateway = Gateway::start(0).await;
    let id = gateway.job(&(0..200).collect::<Vec<_>>()).await;
    let stream = gateway.get(&format!("/v1/jobs/{id}/events")).await;
    gateway.stopping.cancel();
    let told = tokio::time::timeout(Duration::from_secs(5), events(stream, usize::MAX)).await.unwrap();
    assert!(told.iter().all(|(_, name, _)| name != "end" && name != "done"), "a browser comes back for the rest");
}

#[tokio::test]
async fn pages_of_units_are_without_gaps_and_filtered_by_the_mesh() {
    let gateway = Gateway::start(500).await;
    let (mut seen, mut token) = (HashSet::new(), String::new());
    loop {
        let page = gateway.json(&format!("/v1/jobs/synthetic/units?page_size=200&page_token={token}")).await;
        for unit in page["units"].as_array().unwrap() {
            assert!(seen.insert(format!("{}/{}", unit["layer"], unit["unit"])));
        }
        token = page["next_page_token"].as_str().unwrap().to_owned();
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen.len(), 500);
    let stripes = gateway.json("/v1/jobs/synthetic/units?layer=layer1.2&text=stripes").await;
    let stripes = stripes["units"].as_array().unwrap();
    assert!(!stripes.is_empty() && stripes.iter().all(|unit| unit["layer"] == "layer1.2" && unit["labels"].to_string().contains("stripes")));
    assert_eq!(problem(gateway.get("/v1/jobs/synthetic/units?state=ALIVE").await, 400).await["field"], "state");
    assert_eq!(problem(gateway.get("/v1/jobs/synthetic/units?page_sise=3").await, 400).await["reason"], "INVALID_QUERY");
}

#[tokio::test]
async fn what_goes_wrong_is_problem_json_with_the_meshs_reason_code_and_field() {
    let gateway = Gateway::start(1).await;
    let missing = problem(gateway.get("/v1/jobs/none").await, 404).await;
    assert_eq!((&missing["code"], &missing["reason"], &missing["detail"]), (&json!("NOT_FOUND"), &json!("NO_SUCH_JOB"), &json!("there is no job none")));
    let post = |body: &'static str, kind: &'static str| gateway.ask(Method::POST, "/v1/jobs").header("content-type", kind).body(body).send();
    assert_eq!(problem(post("{}", "application/json").await.unwrap(), 400).await["field"], "target");
    let unknown = problem(post(r#"{"request": {"targget": {}}}"#, "application/json").await.unwrap(), 400).await;
    assert!(unknown["detail"].as_str().unwrap().contains("targget"), "{unknown}");
    problem(post("{}", "text/plain").await.unwrap(), 415).await;
    problem(gateway.get("/v1/nothing").await, 404).await;
    problem(gateway.ask(Method::DELETE, "/v1/jobs").send().await.unwrap(), 405).await;

    let alone = Gateway::over(Dial::default().lazy("http://127.0.0.1:1").unwrap(), None).await;
    assert_eq!(problem(alone.get("/v1/jobs").await, 503).await["code"], "UNAVAILABLE");
}

#[tokio::test]
async fn pages_of_other_sites_change_nothing() {
    let gateway = Gateway::start(1).await;
    let delete = |origin: &str| gateway.ask(Method::DELETE, "/v1/jobs/synthetic").header("origin", origin).send();
    assert_eq!(problem(delete("https://elsewhere.example").await.unwrap(), 403).await["reason"], "OTHER_SITE");
    assert_eq!(problem(delete("null").await.unwrap(), 403).await["reason"], "OTHER_SITE");
    assert_eq!(delete(&format!("http://{}", gateway.address)).await.unwrap().status(), StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn every_answer_has_the_headers_that_keep_a_browser_safe() {
    let gateway = Gateway::start(1).await;
    for path in ["/", "/new", "/compare", "/jobs/synthetic/units/fc%2Fa/3", "/pages/app.js", "/api", "/openapi.json", "/v1/jobs", "/v1/nothing"] {
        let response = gateway.get(path).await;
        let policy = response.headers()["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe") && !policy.contains("http"), "{path}: {policy}");
        assert_eq!(
            (&response.headers()["x-content-type-options"], &response.headers()["referrer-policy"]),
            (&"nosniff".parse().unwrap(), &"no-referrer".parse().unwrap())
        );
    }
    let page = gateway.get("/pages/app.js").await;
    assert_eq!(page.headers()["content-type"], "text/javascript; charset=utf-8");
    let known = gateway.ask(Method::GET, "/pages/app.js").header("if-none-match", page.headers()["etag"].clone()).send().await.unwrap();
    assert_eq!(known.status(), StatusCode::NOT_MODIFIED);
    problem(gateway.get("/pages/../Cargo.toml").await, 404).await;
    problem(gateway.get("/pages/..%2FCargo.toml").await, 404).await;
}

#[tokio::test]
async fn pictures_are_kept_for_good_and_what_is_no_picture_is_never_shown() {
    let gateway = Gateway::start(40).await;
    let units = gateway.json("/v1/jobs/synthetic/units").await;
    let path = format!("/v1/pictures/{}", units["units"][0]["images"][0].as_str().unwrap());
    let picture = gateway.get(&path).await;
    assert_eq!(picture.headers()["content-type"], "image/png");
    assert_eq!(picture.headers()["cache-control"], "private, max-age=31536000, immutable");
    let tag = picture.headers()["etag"].clone();
    assert!(picture.bytes().await.unwrap().starts_with(b"\x89PNG"));
    assert_eq!(gateway.ask(Method::GET, &path).header("if-none-match", tag).send().await.unwrap().status(), StatusCode::NOT_MODIFIED);

    let page = "<!doctype html><script>alert(1)</script>";
    let digest = blobs::digest(page.as_bytes());
    gateway.ask(Method::PUT, &format!("/v1/uploads/{digest}")).body(page).send().await.unwrap();
    let response = gateway.get(&format!("/v1/pictures/{digest}")).await;
    assert_eq!(
        (&response.headers()["content-type"], &response.headers()["content-disposition"]),
        (&"application/octet-stream".parse().unwrap(), &"attachment".parse().unwrap())
    );
    assert!(response.headers()["content-security-policy"].to_str().unwrap().contains("sandbox"));
    problem(gateway.get(&format!("/v1/pictures/{}", "f".repeat(64))).await, 404).await;
    problem(gateway.get("/v1/pictures/..").await, 404).await;
    problem(gateway.get("/v1/pictures/AB").await, 400).await;
}

#[tokio::test]
async fn an_upload_that_was_broken_off_goes_on_and_is_checked() {
    let gateway = Gateway::start(1).await;
    let file: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(i) % 251) as u8).collect();
    let digest = blobs::digest(&file);
    let path = format!("/v1/uploads/{digest}");
    let put = |part: &[u8], range: Option<String>| {
        let request = gateway.ask(Method::PUT, &path).body(part.to_vec());
        range.into_iter().fold(request, |request, range| request.header("content-range", range)).send()
    };
    let part = put(&file[..1_500_000], Some("bytes 0-1499999/3000000".to_owned())).await.unwrap();
    assert_eq!(part.json::<Value>().await.unwrap(), json!({ "complete": false }));
    assert_eq!(gateway.json(&path).await, json!({ "complete": false, "received": 1_500_000 }));
    let gap = put(&file[2_000_000..], Some("bytes 2000000-2999999/3000000".to_owned())).await.unwrap();
    assert_eq!(problem(gap, 400).await["reason"], "UPLOAD_OFFSET");
    let rest = put(&file[1_500_000..], Some("bytes 1500000-2999999/3000000".to_owned())).await.unwrap();
    assert_eq!(rest.json::<Value>().await.unwrap(), json!({ "complete": true }));
    assert_eq!(gateway.json(&path).await, json!({ "complete": true }));

    let other = gateway.ask(Method::PUT, &format!("/v1/uploads/{}", "0".repeat(64))).body("abc").send().await.unwrap();
    assert_eq!(problem(other, 500).await["reason"], "DIGEST_MISMATCH");
    let large = gateway.ask(Method::PUT, &path).header("content-range", "bytes 0-2/99999999").body("abc").send().await.unwrap();
    assert_eq!(problem(large, 413).await["reason"], "TOO_LARGE");

    let list = json!({ "pictures": [{ "path": "b.png", "digest": digest }, { "path": "a.png", "digest": digest }] });
    let listed = gateway.ask(Method::POST, "/v1/probing-sets").json(&list).send().await.unwrap().json::<Value>().await.unwrap();
    let uploaded = gateway.json(&format!("/v1/uploads/{}", listed["list_digest"].as_str().unwrap())).await;
    assert_eq!(uploaded, json!({ "complete": true }));
}

#[tokio::test]
async fn the_files_of_a_form_are_uploaded_and_make_a_probing_set() {
    let gateway = Gateway::start(1).await;
    let files: [(&str, Vec<u8>); 2] = [("b.png", (0..3_000_000u32).map(|i| (i % 241) as u8).collect()), ("a.png", Vec::new())];
    let form = |files: &[(&str, Vec<u8>)]| {
        let mut body = b"--frontier\r\ncontent-disposition: form-data; name=\"note\"\r\n\r\nno file\r\n".to_vec();
        for (name, bytes) in files {
            let head = format!("--frontier\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n");
            body.extend([head.as_bytes(), bytes, b"\r\n"].concat());
        }
        body.extend(b"--frontier--\r\n");
        body
    };
    let post = |kind: &'static str, body: Vec<u8>| gateway.ask(Method::POST, "/v1/uploads").header("content-type", kind).body(body).send();
    let kind = "multipart/form-data; boundary=frontier";
    let listed: Value = post(kind, form(&files)).await.unwrap().json().await.unwrap();
    let expected = files.each_ref().map(|(name, bytes)| json!({ "path": name, "digest": blobs::digest(bytes) }));
    assert_eq!(listed, json!({ "pictures": expected }));
    for (_, bytes) in &files {
        assert_eq!(gateway.json(&format!("/v1/uploads/{}", blobs::digest(bytes))).await, json!({ "complete": true }));
    }
    let set = gateway.ask(Method::POST, "/v1/probing-sets").json(&listed).send().await.unwrap();
    assert_eq!(set.json::<Value>().await.unwrap()["list_digest"].as_str().unwrap().len(), 64);

    assert_eq!(problem(post("application/json", Vec::new()).await.unwrap(), 400).await["field"], "content-type");
    let cut = form(&files);
    assert_eq!(problem(post(kind, cut[..cut.len() - 20].to_vec()).await.unwrap(), 400).await["reason"], "INVALID_BODY");
    let large = form(&[("large.png", vec![0; 5 << 20])]);
    assert_eq!(problem(post(kind, large).await.unwrap(), 413).await["reason"], "TOO_LARGE");
}

#[tokio::test]
async fn a_jobs_results_are_exported_for_other_programs() {
    let gateway = Gateway::start(300).await;
    let export = async |format: &str| {
        let response = gateway.get(&format!("/v1/jobs/synthetic/export?format={format}")).await;
        assert!(response.headers()["content-disposition"].to_str().unwrap().starts_with("attachment; filename=\"dnd-synthetic."));
        response.text().await.unwrap()
    };
    let csv = export("csv").await;
    let rows: Vec<&str> = csv.lines().collect();
    assert_eq!((rows[0], rows.len()), ("layer,unit,label,score,second,third,state,reason", 301));
    assert!(rows[1].starts_with("conv1,0,") && rows[30].ends_with(",failed,no_concept"), "{} {}", rows[1], rows[30]);
    let lines: Vec<Value> = export("jsonl").await.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 300);
    assert_eq!(lines[3], gateway.json("/v1/jobs/synthetic/units/conv1/3").await["unit"]);
    let cosy = export("cosy").await;
    assert!(cosy.starts_with("layer,unit,description\nconv1,0,") && !cosy.contains("conv1,17,"), "a dead unit has no description");
    let feature: Value = serde_json::from_str(export("neuronpedia").await.lines().next().unwrap()).unwrap();
    assert_eq!((&feature["modelId"], &feature["index"]), (&json!("resnet50.onnx"), &json!("0")));
    assert_eq!(feature["explanations"][0]["description"], lines[0]["label"]);
    let of_a_layer = gateway.get("/v1/jobs/synthetic/export?format=csv&layer=layer1.2").await.text().await.unwrap();
    assert!(of_a_layer.lines().count() == 237 && of_a_layer.lines().skip(1).all(|row| row.starts_with("layer1.2,")));

    let parquet = gateway.get("/v1/jobs/synthetic/export?format=parquet").await;
    assert_eq!(parquet.headers()["content-type"], "application/vnd.apache.parquet");
    let table = SerializedFileReader::new(parquet.bytes().await.unwrap()).unwrap();
    assert_eq!(table.num_row_groups(), 2, "a long table is read in parts");
    let rows: Vec<Row> = table.get_row_iter(None).unwrap().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 300);
    for (row, unit) in rows.iter().zip(&lines) {
        assert_eq!((row.get_string(0).unwrap(), row.get_int(1).unwrap()), (&unit["layer"].as_str().unwrap().to_owned(), unit["unit"].as_i64().unwrap() as i32));
        assert_eq!((row.get_string(3).unwrap().as_str(), row.get_double(4).ok()), (unit["label"].as_str().unwrap(), unit["concepts"][0]["score"].as_f64()));
        assert_eq!(serde_json::from_str::<Value>(row.get_string(10).unwrap()).unwrap(), *unit);
    }

    let report = export("html").await;
    let label = lines[3]["label"].as_str().unwrap();
    assert!(report.starts_with("<!doctype html>") && report.contains(label) && report.contains("data:image/"));
    let large = Gateway::start(1001).await;
    let refused = problem(large.get("/v1/jobs/synthetic/export?format=html").await, 400).await;
    assert_eq!((&refused["field"], refused["detail"].as_str().unwrap().contains("1001 units")), (&json!("format"), true));
    assert_eq!(large.get("/v1/jobs/synthetic/export?format=html&layer=conv1").await.status(), StatusCode::OK);
    problem(gateway.get("/v1/jobs/synthetic/export?format=pdf").await, 400).await;
    let elsewhere = problem(gateway.get("/v1/jobs/synthetic/export?format=csv&layer=layer1").await, 400).await;
    assert_eq!((&elsewhere["field"], elsewhere["detail"].as_str().unwrap().contains("conv1, layer1.2")), (&json!("layer"), true));
    problem(gateway.get("/v1/jobs/none/export?format=csv").await, 404).await;
}

#[tokio::test]
async fn units_are_found_by_a_word() {
    let gateway = Gateway::start(500).await;
    let found = gateway.json("/v1/jobs/synthetic/nearest?text=red%20stripes&most=5").await;
    let near = found["units"].as_array().unwrap();
    assert_eq!((near.len(), &near[0]["similarity"]), (5, &json!(1.0)));
    assert!(near[0]["unit"]["labels"].to_string().contains("red stripes"));
    assert_eq!(problem(gateway.get("/v1/jobs/synthetic/nearest").await, 400).await["reason"], "INVALID_QUERY");
}

#[tokio::test]
async fn ones_own_concepts_compete_and_progress_is_told_line_by_line() {
    let gateway = Gateway::start(1).await;
    let select = |concepts: Value| gateway.ask(Method::POST, "/v1/select").json(&json!({ "layer": "fc", "unit": 3, "concepts": concepts })).send();
    let response = select(json!(["red stripes", "mine"])).await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let text = response.text().await.unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (last, progress) = lines.split_last().unwrap();
    assert!(!progress.is_empty() && progress.iter().all(|line| line["progress"]["stage"] == "STAGE_GENERATE"));
    assert_eq!(last["unit"]["concepts"].as_array().unwrap().len(), 2);
    assert_eq!(problem(select(json!([])).await.unwrap(), 400).await["field"], "concepts");
}

#[tokio::test]
async fn layers_of_a_network_are_listed() {
    let gateway = Gateway::start(1).await;
    let layers = |uri: &str| gateway.ask(Method::POST, "/v1/layers").json(&json!({ "target": { "uri": uri } })).send();
    let described: Value = layers("file:///net.onnx").await.unwrap().json().await.unwrap();
    assert_eq!((&described["layers"][0]["name"], &described["layers"][0]["units"]), (&json!("conv1"), &json!(64)));
    assert_eq!(problem(layers("file:///net.pt").await.unwrap(), 400).await["field"], "target.uri");
}

#[tokio::test]
async fn what_the_api_says_of_itself_is_there_and_whole() {
    let gateway = Gateway::start(1).await;
    let document = gateway.json("/openapi.json").await;
    assert_eq!(document["openapi"], "3.1.0");
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let address = path
                .replace("{job_id}", "none")
                .replace("{layer}", "fc")
                .replace("{unit}", "0")
                .replace("{digest}", &"f".repeat(64))
                .replace("{study_id}", "none");
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let answer = gateway.ask(method.clone(), &address).send().await.unwrap();
            let text = answer.text().await.unwrap();
            assert!(!text.contains("NO_SUCH_PAGE") && !text.contains("NO_SUCH_METHOD"), "{method} {path}: {text}");
        }
    }
    let text = document.to_string();
    for (_, reference) in
        text.match_indices("#/components/schemas/").map(|(at, found)| text[at + found.len()..].split_once('"').unwrap()).map(|(name, _)| ((), name))
    {
        assert!(document["components"]["schemas"][reference].is_object(), "{reference} is referred to");
    }
    let seed = &document["components"]["schemas"]["Parameters"]["properties"]["seed"];
    assert_eq!((&seed["type"], &seed["format"]), (&json!("string"), &json!("uint64")));
    assert!(seed["description"].as_str().unwrap().contains("Default 0"), "the comments of the .proto files: {seed}");
}

#[tokio::test]
async fn browsers_may_speak_grpc_web() {
    let gateway = Gateway::start(1).await;
    let call = |path: &str, message: &'static [u8]| gateway.ask(Method::POST, path).header("content-type", "application/grpc-web+proto").body(message).send();
    // GetJobRequest { job_id: "none" }, in a frame of its 6 bytes.
    let response = call("/dnd.v1.DissectService/GetJob", b"\0\0\0\0\x06\x0a\x04none").await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let headers = response.headers().clone();
    let body = response.bytes().await.unwrap();
    let trailers = String::from_utf8_lossy(&body).into_owned();
    let status = headers.get("grpc-status").map_or(trailers, |status| format!("grpc-status:{}", status.to_str().unwrap()));
    assert!(status.contains("grpc-status:5"), "{status}");
    let jobs = call("/dnd.v1.DissectService/ListJobs", b"\0\0\0\0\0").await.unwrap().bytes().await.unwrap();
    assert!(String::from_utf8_lossy(&jobs).contains("resnet50.onnx") && String::from_utf8_lossy(&jobs).contains("grpc-status:0"));
    problem(call("/dnd.v1.ActivationService/GetModel", b"\0\0\0\0\0").await.unwrap(), 404).await;
}
