// Labels units of a network: `dissect.js ENDPOINT TARGET PICTURES LAYER:UNIT...`, the target and the folder of pictures by paths that the mesh can read.
import { pathToFileURL } from "node:url";
import { Client, DndError } from "../src/index.js";
import { Stage } from "../src/gen/dnd/v1/job_pb.js";

const [endpoint = "", target = "", pictures = "", ...asked] = process.argv.slice(2);
const layers = new Map<string, number[]>();
for (const [layer = "", unit] of asked.map((at) => at.split(":"))) layers.set(layer, [...(layers.get(layer) ?? []), Number(unit)]);

try {
  const result = await new Client(endpoint).dissect(
    {
      target: { uri: pathToFileURL(target).href },
      layers: [...layers].map(([layer, units]) => ({ layer, units })),
      probingSet: { sources: [{ source: { case: "uri", value: pathToFileURL(pictures).href } }] },
    },
    { progress: ({ stage, done, total }) => console.error(`${Stage[stage].toLowerCase()} ${done}/${total}`) },
  );
  for (const { layer, unit, label } of result.units) console.log(`${layer}\t${unit}\t${label}`);
} catch (error) {
  if (!(error instanceof DndError)) throw error;
  console.error(`error: ${error.message} (${error.reason || error.code}${error.field && `, field ${error.field}`})`);
  process.exitCode = 1;
}
