/** What is uploaded of files, with nothing sent yet. */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { readdir, stat } from "node:fs/promises";
import { extname, join, relative, sep } from "node:path";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { ListedPictureSchema, type MissingBlob, type PictureList, PictureListSchema, type UploadRequestSchema } from "./gen/dnd/v1/upload_pb.js";

/** A file by its path, or bytes. */
export type Blob = string | Uint8Array;

const PIECE_BYTES = 1 << 20;
const ENDINGS = new Set([".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]);

export async function digestOf(blob: Blob): Promise<string> {
  const hash = createHash("sha256");
  for await (const piece of cut(blob, 0)) hash.update(piece);
  return hash.digest("hex");
}

/** The pictures of a folder and its subfolders, in the order that the mesh wants, and where each digest lies. */
export async function listed(folder: string): Promise<[PictureList, Map<string, Blob>]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const pictures = entries.filter((entry) => !entry.isDirectory() && !entry.name.startsWith(".") && ENDINGS.has(extname(entry.name).toLowerCase()));
  if (pictures.length === 0) throw new RangeError(`${folder}: no pictures in this folder`);
  const paths = pictures.map((entry) => relative(folder, join(entry.parentPath, entry.name)).split(sep).join("/"));
  paths.sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)));
  const [list, files] = [create(PictureListSchema), new Map<string, Blob>()];
  for (const path of paths) {
    const file = join(folder, path);
    const digest = await digestOf(file);
    list.pictures.push(create(ListedPictureSchema, { path, digest }));
    files.set(digest, file);
  }
  return [list, files];
}

/** What of the blobs is not there yet, piece by piece. */
export async function* pieces(missing: MissingBlob[], blobs: ReadonlyMap<string, Blob>): AsyncGenerator<MessageInitShape<typeof UploadRequestSchema>> {
  for (const { digest, received } of missing) {
    const blob = blobs.get(digest)!;
    const size = BigInt(typeof blob === "string" ? (await stat(blob)).size : blob.length);
    let offset = received;
    for await (const data of cut(blob, Number(received))) {
      yield { digest, size, offset, data };
      offset += BigInt(data.length);
    }
  }
}

async function* cut(blob: Blob, from: number): AsyncGenerator<Uint8Array> {
  if (typeof blob === "string") yield* createReadStream(blob, { start: from, highWaterMark: PIECE_BYTES }) as AsyncIterable<Uint8Array>;
  else for (let at = from; at < blob.length; at += PIECE_BYTES) yield blob.subarray(at, at + PIECE_BYTES);
}
