import { setTimeout as sleep } from "node:timers/promises";
import { randomUUID } from "node:crypto";
import { create, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { Code, createClient, type Client as ServiceClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { Dissection } from "./dissection.js";
import { DndError, Patience } from "./errors.js";
import { type ProbingSource, ProbingSourceSchema } from "./gen/dnd/v1/activation_pb.js";
import { DissectService, type SelectConceptRequestSchema } from "./gen/dnd/v1/dissect_pb.js";
import type { Job, JobEvent, StageProgress } from "./gen/dnd/v1/job_pb.js";
import { PictureService } from "./gen/dnd/v1/picture_pb.js";
import type { DissectRequestSchema } from "./gen/dnd/v1/request_pb.js";
import type { UnitResult } from "./gen/dnd/v1/result_pb.js";
import { PictureListSchema, UploadService } from "./gen/dnd/v1/upload_pb.js";
import { type Blob, digestOf, listed, pieces } from "./upload.js";

/** How a mesh is spoken to. */
export interface Connection {
  /** Shown with each call. */
  token?: string;
  /** Certificate of the authority that issued the server's, if it is none of the system's; PEM. */
  ca?: string | Buffer;
  /** This client's own certificate, with its key, where the server asks for one; PEM. */
  cert?: string | Buffer;
  key?: string | Buffer;
  /** Lets an endpoint on another machine be spoken to in the clear. */
  insecure?: boolean;
}

/** How a job is followed. */
export interface Following {
  /** Told how far the stages are. */
  progress?: (progress: StageProgress) => void;
  /** Ends the following, not the job. */
  signal?: AbortSignal;
}

/** Digests that one call may name. */
const MAX_DIGESTS = 10_000;

/**
 * Calls a mesh. Calls whose mesh is away are made again for about a minute; what fails throws a `DndError`. `dissectService`, `pictureService` and
 * `uploadService` are the generated clients, for all that has no method here; `DndError.from` reads what they throw.
 */
export class Client {
  readonly dissectService: ServiceClient<typeof DissectService>;
  readonly pictureService: ServiceClient<typeof PictureService>;
  readonly uploadService: ServiceClient<typeof UploadService>;

  /** @param endpoint Where an orchestrator listens, such as `http://127.0.0.1:50051`, or with https. */
  constructor(endpoint: string, { token, insecure = false, ...tls }: Connection = {}) {
    const { protocol, hostname } = new URL(endpoint);
    if (!["http:", "https:"].includes(protocol)) throw new TypeError(`${endpoint} is no endpoint: write it as http://127.0.0.1:50051, or with https`);
    if (protocol === "http:" && !insecure && !/^(localhost|127\..*|\[::1\])$/.test(hostname)) {
      throw new TypeError(`${endpoint} would be spoken to in the clear: use https, or say insecure: true`);
    }
    const authorize: Interceptor = (next) => (request) => {
      request.header.set("authorization", `Bearer ${token}`);
      return next(request);
    };
    const transport = createGrpcTransport({ baseUrl: endpoint, nodeOptions: tls, interceptors: token ? [authorize] : [] });
    this.dissectService = createClient(DissectService, transport);
    this.pictureService = createClient(PictureService, transport);
    this.uploadService = createClient(UploadService, transport);
  }

  /** Labels units, and comes back when all have ended. With the same requestId the same job is found again, by another process too. */
  async dissect(request: MessageInitShape<typeof DissectRequestSchema>, following: Following = {}): Promise<Dissection> {
    // An id of its own lets a call that was broken off be made again without a second job.
    const named = { ...request, requestId: request.requestId || randomUUID() };
    const { job } = await retried(() => this.dissectService.createJob({ request: named }));
    return this.follow(job!, following);
  }

  /** The results of a job, or of the one of an id, when it has ended. */
  async follow(job: Job | string, { progress, signal }: Following = {}): Promise<Dissection> {
    const found = typeof job === "string" ? (await retried(() => this.dissectService.getJob({ jobId: job }))).job! : job;
    const dissection = new Dissection(found);
    for await (const event of this.watch(found.jobId, 0n, signal)) {
      if (event.event.case === "progress") progress?.(event.event.value);
      if (dissection.take(event)) break;
    }
    return dissection;
  }

  /** What happens in a job, after the event of a number, until it has ended. A broken connection is made again, and no numbered event is missed. */
  async *watch(jobId: string, after = 0n, signal?: AbortSignal): AsyncGenerator<JobEvent> {
    for (let patience = new Patience(); ; ) {
      try {
        for await (const { event } of this.dissectService.watchJob({ jobId, after }, signal ? { signal } : {})) {
          patience = new Patience();
          if (event!.number > after) after = event!.number;
          yield event!;
        }
        return;
      } catch (error) {
        await sleep(patience.wait(DndError.from(error)), undefined, signal ? { signal } : {});
      }
    }
  }

  /** Lets concepts of your own compete for a unit. */
  select(request: MessageInitShape<typeof SelectConceptRequestSchema>, { progress, signal }: Following = {}): Promise<UnitResult> {
    return retried(async () => {
      let unit: UnitResult | undefined;
      for await (const { event } of this.dissectService.selectConcept(request, signal ? { signal } : {})) {
        if (event.case === "progress") progress?.(event.value);
        if (event.case === "unit") unit = event.value;
      }
      if (!unit) throw new DndError(Code.Unavailable, "the selection ended without a result");
      return unit;
    });
  }

  /** The pictures that results name, by digest. What is not kept any more is left out. */
  async pictures(digests: Iterable<string>): Promise<Map<string, Uint8Array>> {
    const found = new Map<string, Uint8Array>();
    for (const some of chunks(digests)) {
      await retried(async () => {
        for await (const { digest, result } of this.pictureService.getPictures({ digests: some })) {
          if (result.case === "picture") found.set(digest, result.value);
        }
      });
    }
    return found;
  }

  /** Uploads a file, if it is not there yet, and gives its digest. The target's is `{ digest, preprocessing }`. */
  async upload(file: string): Promise<string> {
    const digest = await digestOf(file);
    await this.#upload(new Map([[digest, file]]));
    return digest;
  }

  /** Uploads the pictures of a folder and its subfolders that are not there yet. */
  async uploadPictures(folder: string): Promise<ProbingSource> {
    const [list, blobs] = await listed(folder);
    const encoded = toBinary(PictureListSchema, list);
    const digest = await digestOf(encoded);
    await this.#upload(blobs.set(digest, encoded));
    return create(ProbingSourceSchema, { source: { case: "listDigest", value: digest } });
  }

  async #upload(blobs: ReadonlyMap<string, Blob>): Promise<void> {
    for (const digests of chunks(blobs.keys())) {
      await retried(async () => {
        // What had arrived of a broken upload is not sent again.
        const { missing } = await this.uploadService.checkUploads({ digests });
        if (missing.length > 0) await this.uploadService.upload(pieces(missing, blobs));
      });
    }
  }
}

/** Different digests, as many as one call takes. */
function* chunks(digests: Iterable<string>): Generator<string[]> {
  const every = [...new Set(digests)];
  for (let at = 0; at < every.length; at += MAX_DIGESTS) yield every.slice(at, at + MAX_DIGESTS);
}

/** Makes a call, and makes it again while the mesh is away. What is asked here may be asked twice. */
async function retried<T>(call: () => Promise<T>): Promise<T> {
  for (const patience = new Patience(); ; ) {
    try {
      return await call();
    } catch (error) {
      await sleep(patience.wait(DndError.from(error)));
    }
  }
}
