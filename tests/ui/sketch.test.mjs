// The pages over the whole mesh with the sketch suite: from a network to a label to one's own concept.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { accessible, browser, open, picturesLoad, root, start } from "./browser.mjs";

/** With it the pictures of the documentation are made anew. */
const SCREENSHOTS = process.env.SCREENSHOTS === "1";
const sketch = join(root, "models/sketch");
let chromium, mesh;
before(async () => {
  const up = (folder, port) => ["up", "--models", sketch, "--data", join(folder, "data"), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--http-port-file", port];
  [chromium, mesh] = await Promise.all([browser(), start("dnd", up)]);
});
after(() => Promise.all([chromium?.close(), mesh?.stop()]));

const shot = (page, name) => SCREENSHOTS && page.screenshot({ path: join(root, `docs/${name}.png`) });

test("from a network to its labels, their evidence and a concept of one's own", { timeout: 600_000 }, async () => {
  const page = await open(chromium, mesh.url, 1600);
  await page.goto("/");
  await page.getByRole("link", { name: "Start the first" }).click();
  await page.getByRole("textbox", { name: "Where it lies" }).fill(`file://${join(sketch, "targets/planted/planted.onnx")}`);
  await page.getByRole("button", { name: "Read its layers" }).click();
  for (const layer of SCREENSHOTS ? ["colour", "pattern", "mixture"] : ["colour", "mixture"]) {
    await page.getByRole("checkbox", { name: new RegExp(`^${layer}(?!\\.)`) }).check();
  }
  await page.getByLabel("Units of each").fill(SCREENSHOTS ? "0-5" : "0,3");
  await page.getByRole("textbox", { name: "Where they lie" }).fill(`file://${join(sketch, "probing.tar")}`);
  if (!SCREENSHOTS) {
    await page.getByText("constants; left alone").click();
    for (const [name, value] of [["images_per_concept", "3"], ["num_inference_steps", "3"], ["candidates", "2"]]) await page.getByLabel(name, { exact: true }).fill(value);
  }
  await page.getByRole("button", { name: "Start" }).click();
  await page.locator("h1", { hasText: "planted.onnx" }).waitFor({ timeout: 60_000 });
  await page.locator(".badge.done").first().waitFor({ timeout: 500_000 });
  await picturesLoad(page, ".unit img");
  await accessible(page);
  await shot(page, "units");
  const job = page.url();
  await page.getByText("Export", { exact: true }).click();
  const [file] = await Promise.all([page.waitForEvent("download"), page.getByRole("link", { name: "Table (CSV)" }).click()]);
  const rows = readFileSync(await file.path(), "utf8").trim().split("\n");
  assert.equal(rows[0], "layer,unit,label,score,second,third,state,reason");
  assert.equal(rows.length, 1 + (await page.locator(".unit").count()));

  await page.locator(".unit a", { hasText: SCREENSHOTS ? "blue polka dots" : "" }).first().click();
  await page.locator(".why").waitFor();
  const label = await page.locator("h1").textContent();
  assert.match(await page.locator(".why").textContent(), /^Why this label: .*best ranks 1/);
  await picturesLoad(page, ".drawn img, .thumb img, .captions img");
  await page.waitForFunction(() => document.querySelector(".view").getAttribute("aria-label")?.includes("activation"));
  await accessible(page);
  await shot(page, "unit");

  await page.getByLabel("Try a concept of your own").fill("photograph of the sea");
  await page.getByRole("button", { name: "Let it compete" }).click();
  const told = page.locator(".own-concept [role=status]");
  await told.filter({ hasText: "photograph of the sea” " }).waitFor({ timeout: 120_000 });
  assert.match(await told.textContent(), /comes|wins/);
  await page.locator(".own h3", { hasText: "photograph of the sea" }).waitFor();

  const phone = await open(chromium, mesh.url, 400, "dark");
  await phone.goto(page.url());
  await phone.locator("h1", { hasText: label }).waitFor();
  await phone.locator(".thumb img").first().scrollIntoViewIfNeeded();
  await picturesLoad(phone, ".thumb img");
  await accessible(phone);
  await phone.goto(job);
  await picturesLoad(phone, ".unit img");
  await accessible(phone);
  await page.goto("/");
  await page.locator(".job").waitFor();
  await shot(page, "jobs");
  page.quiet();
  phone.quiet();
});
