// Uploads a network and a folder of pictures for a mesh that can't read them: `upload.js ENDPOINT TARGET PICTURES`. Prints their digests, which a job names
// as its target's `digest` and its probing set's `listDigest`.
import { Client } from "../src/index.js";

const [endpoint = "", target = "", pictures = ""] = process.argv.slice(2);
const client = new Client(endpoint);
console.log(await client.upload(target));
console.log((await client.uploadPictures(pictures)).source.value);
