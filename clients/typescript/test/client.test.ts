// The client over a mesh that breaks: what it asks again, what it tells, and what comes of it.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type Http2Server, type ServerHttp2Session } from "node:http2";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, beforeEach, test } from "node:test";
import { create, fromBinary, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { Client, DndError } from "../src/index.js";
import { DissectService, SelectConceptResponseSchema, WatchJobResponseSchema } from "../src/gen/dnd/v1/dissect_pb.js";
import type { JobEventSchema } from "../src/gen/dnd/v1/job_pb.js";
import { PictureService } from "../src/gen/dnd/v1/picture_pb.js";
import { UnitState } from "../src/gen/dnd/v1/result_pb.js";
import { PictureListSchema, UploadService } from "../src/gen/dnd/v1/upload_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";

let server: Http2Server;
const sessions: ServerHttp2Session[] = [];
let endpoint: string;
let requestIds: string[], tokens: Set<string | null>, watched: bigint[], selections: number;
let uploads: Map<string, Uint8Array>, uploadCalls: number;

const digest = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

const unit = (unit: number, label: string) => ({ layer: "colour", unit, label, labels: [label], state: UnitState.LABELLED });
const events: MessageInitShape<typeof JobEventSchema>["event"][] = [
  { case: "accepted", value: { layers: [{ layer: "colour", units: [3, 0] }] } },
  { case: "done", value: { cancelled: true } },
  { case: "unit", value: unit(0, "red") },
  { case: "unit", value: unit(3, "green") },
  { case: "done", value: { labelled: 2 } },
];

/** Has one job of two units. It was cancelled once, and resumed. The first call finds it full, and each watcher is cut off after three events. */
before(async () => {
  const routes = connectNodeAdapter({
    routes: (router) =>
      router
        .service(UploadService, {
          checkUploads: ({ digests }) => ({
            missing: digests
              .map((digest) => ({ digest, received: BigInt(uploads.get(digest)?.length ?? 0) }))
              .filter((blob) => digest(uploads.get(blob.digest) ?? new Uint8Array()) !== blob.digest),
          }),
          // It goes away after the first piece that it ever took.
          async upload(pieces) {
            uploadCalls += 1;
            for await (const { digest, size, offset, data } of pieces) {
              const arrived = uploads.get(digest) ?? new Uint8Array();
              assert.deepEqual([offset, data.length <= 1 << 20, offset + BigInt(data.length) <= size], [BigInt(arrived.length), true, true]);
              uploads.set(digest, Buffer.concat([arrived, data]));
              if (uploadCalls === 1) throw new ConnectError("gone", Code.Unavailable);
            }
            return {};
          },
        })
        .service(DissectService, {
          createJob({ request }, { requestHeader }) {
            tokens.add(requestHeader.get("authorization"));
            requestIds.push(request!.requestId);
            if (request!.layers[0]!.layer === "nowhere") {
              throw new ConnectError("no such layer", Code.InvalidArgument, undefined, [
                { desc: ErrorInfoSchema, value: { reason: "UNKNOWN_LAYER", domain: "dnd.v1" } },
                { desc: BadRequestSchema, value: { fieldViolations: [{ field: "layers[0].layer" }] } },
              ]);
            }
            if (requestIds.length === 1) {
              throw new ConnectError("full", Code.ResourceExhausted, undefined, [{ desc: RetryInfoSchema, value: { retryDelay: { nanos: 10_000_000 } } }]);
            }
            return { job: { jobId: "job", lastEvent: 3n } };
          },
          getJob: ({ jobId }) => ({ job: { jobId, lastEvent: jobId === "waiting" ? 1n : 3n } }),
          async *watchJob({ jobId, after }) {
            watched.push(after);
            if (jobId === "waiting") {
              const paused = { reason: "LLM_BUDGET", message: "the budget is reached" };
              yield create(WatchJobResponseSchema, { event: { number: 1n, event: { case: "paused", value: paused } } });
              throw new ConnectError("nobody should wait for more", Code.Internal);
            }
            for (const [i, event] of [...events.entries()].slice(Number(after), Number(after) + 3)) {
              yield create(WatchJobResponseSchema, { event: { number: BigInt(i + 1), event: event! } });
            }
            if (after < 3n) throw new ConnectError("gone", Code.Unavailable);
          },
          async *selectConcept({ concepts }) {
            selections += 1;
            yield create(SelectConceptResponseSchema, { event: { case: "progress", value: { done: BigInt(selections) } } });
            if (selections === 1) throw new ConnectError("gone", Code.Unavailable);
            yield create(SelectConceptResponseSchema, { event: { case: "unit", value: unit(7, concepts[1]!) } });
          },
        })
        .service(PictureService, {
          async *getPictures({ digests }) {
            for (const digest of digests) {
              if (digest === "kept") yield { digest, result: { case: "picture" as const, value: new Uint8Array([1]) } };
              else yield { digest, result: { case: "status" as const, value: { code: 5, message: "not kept" } } };
            }
          },
        }),
  });
  server = createServer(routes);
  server.on("session", (session) => sessions.push(session));
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  endpoint = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
after(() => {
  for (const session of sessions) session.destroy();
  server.close();
});
beforeEach(() => {
  requestIds = [];
  tokens = new Set();
  watched = [];
  selections = 0;
  uploads = new Map();
  uploadCalls = 0;
});

test("a job is followed through a full mesh and a broken stream", async () => {
  const result = await new Client(endpoint, { token: "secret" }).dissect({ layers: [{ layer: "colour", units: [3, 0] }] });
  assert.deepEqual(result.units.map(({ unit, label }) => [unit, label]), [[3, "green"], [0, "red"]], "in the order that was asked for");
  assert.equal(result.unit("colour", 0)?.label, "red");
  assert.equal(result.done?.labelled, 2);
  assert.deepEqual(watched, [0n, 3n], "the watch goes on after the last event");
  assert.equal(requestIds.length, 2);
  assert(requestIds[0]);
  assert.equal(new Set(requestIds).size, 1, "one job, however often it is asked for");
  assert.deepEqual([...tokens], ["Bearer secret"]);
});

test("an error says why and where and is not tried again", async () => {
  await assert.rejects(new Client(endpoint).dissect({ layers: [{ layer: "nowhere" }] }), (error) => {
    assert(error instanceof DndError);
    assert.deepEqual([error.code, error.reason, error.field, error.message], [Code.InvalidArgument, "UNKNOWN_LAYER", "layers[0].layer", "no such layer"]);
    return true;
  });
  assert.equal(requestIds.length, 1);
});

test("a job is found again by its id, and one that waits for someone says so", async () => {
  const client = new Client(endpoint);
  assert.equal((await client.follow("job")).unit("colour", 3)?.label, "green");
  await assert.rejects(client.follow("waiting"), { name: "DndError", reason: "LLM_BUDGET", message: "the budget is reached" });
});

test("concepts compete, also when the mesh goes away", async () => {
  const seen: bigint[] = [];
  const unit = await new Client(endpoint).select({ concepts: ["sea", "sky"] }, { progress: ({ done }) => seen.push(done) });
  assert.equal(unit.label, "sky");
  assert.deepEqual(seen, [1n, 2n]);
});

test("whoever stops following is not kept", async () => {
  await assert.rejects(new Client(endpoint).follow("job", { signal: AbortSignal.abort() }), { name: "DndError", code: Code.Canceled });
});

test("pictures that are not kept any more are left out", async () => {
  assert.deepEqual([...(await new Client(endpoint).pictures(["kept", "gone", "kept"])).keys()], ["kept"]);
});

test("a broken upload goes on where it stopped, and what is there is not sent again", async () => {
  const folder = mkdtempSync(join(tmpdir(), "dnd-"));
  try {
    const network = Buffer.from("0123456789".repeat(150_000));
    writeFileSync(join(folder, "net.onnx"), network);
    const client = new Client(endpoint);
    for (let i = 0; i < 2; i++) assert.equal(await client.upload(join(folder, "net.onnx")), digest(network));
    assert.deepEqual([...uploads.keys()], [digest(network)]);
    assert.equal(digest(uploads.get(digest(network))!), digest(network));
    assert.equal(uploadCalls, 2);
    await assert.rejects(client.upload(join(folder, "none.onnx")), { code: "ENOENT" });
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("a folder's pictures are uploaded, and listed by the bytes of their paths", async () => {
  const folder = mkdtempSync(join(tmpdir(), "dnd-"));
  try {
    mkdirSync(join(folder, "a"));
    for (const name of ["b.PNG", "a/é.jpg", "a/z.jpg", "B.png", ".hidden.png", "notes.txt"]) writeFileSync(join(folder, name), name);
    const { source } = await new Client(endpoint).uploadPictures(folder);
    assert(source.case === "listDigest");
    const { pictures } = fromBinary(PictureListSchema, uploads.get(source.value)!);
    assert.deepEqual(pictures.map(({ path }) => path), ["B.png", "a/z.jpg", "a/é.jpg", "b.PNG"]);
    for (const { path, digest } of pictures) assert.equal(Buffer.from(uploads.get(digest)!).toString(), path);
    assert.equal(uploads.size, 5);
    mkdirSync(join(folder, "none"));
    await assert.rejects(new Client(endpoint).uploadPictures(join(folder, "none")), /no pictures in this folder/);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("nothing goes in the clear to another machine unless that is said", () => {
  assert.throws(() => new Client("http://mesh.example:50051", { token: "secret" }), /in the clear/);
  new Client("http://mesh.example:50051", { insecure: true });
  assert.throws(() => new Client("127.0.0.1:50051"));
});
