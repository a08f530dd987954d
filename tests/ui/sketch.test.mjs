// The pages over the whole mesh with the sketch suite: from a network to a label to one's own concept.
import assert from "node:assert/strict";
import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { accessible, browser, open, picturesLoad, root, start } from "./browser.mjs";

/** With it the pictures of the documentation are made anew. */
const SCREENSHOTS = process.env.SCREENSHOTS === "1";
/** How long the job may take; with pictures worth showing it takes minutes of a core. */
const PATIENCE = SCREENSHOTS ? 3_000_000 : 1_500_000;
const sketch = join(root, "models/sketch");
let chromium, mesh;
before(async () => {
  const up = (folder, port) => ["up", "--models", sketch, "--data", join(folder, "data"), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--http-port-file", port];
  [chromium, mesh] = await Promise.all([browser(), start("dnd", up)]);
});
after(() => Promise.all([chromium?.close(), mesh?.stop()]));

/** Holds that a report opens by itself, with nothing but the file. */
async function report(html) {
  const context = await chromium.newContext({ offline: true, viewport: { width: 1600, height: 1000 } });
  const page = await context.newPage();
  page.setDefaultTimeout(180_000);
  await page.setContent(html.toString());
  await page.waitForFunction(() => [...document.images].filter((image) => image.complete && image.naturalWidth > 0).length > 10);
  await shot(page, "report", 1010);
  await context.close();
}

/** Starts jobs for a list that shows what one sees in it: one that ends, and one that goes on. */
async function moreJobs(page) {
  const start = async (target, layer, units, images_per_concept) => {
    const request = {
      target: { uri: `file://${join(sketch, "targets", target)}` }, layers: [{ layer, units }],
      probing_set: { sources: [{ uri: `file://${join(sketch, "probing.tar")}` }] },
      parameters: { images_per_concept, num_inference_steps: 4, candidates: 2 },
    };
    const answer = await page.request.post("/v1/jobs", { data: { request } });
    assert.equal(answer.status(), 201, await answer.text());
    return (await answer.json()).job.job_id;
  };
  const state = async (id) => (await (await page.request.get(`/v1/jobs/${id}`)).json()).job;
  const short = await start("resnet/resnet.onnx", "layer3", [0, 1, 2, 3, 4, 5, 6, 7], 2);
  while ((await state(short)).state !== "JOB_STATE_DONE") await page.waitForTimeout(500);
  const long = await start("resnet/resnet.onnx", "layer4", [...Array(40).keys()], 6);
  while (Number((await state(long)).units.labelled) < 5) await page.waitForTimeout(200);
}

/** A picture for the documentation: of a size that fits a page of text, and light enough to be kept. */
async function shot(page, name, height = 780) {
  if (!SCREENSHOTS) return;
  const path = join(root, `docs/${name}.png`);
  const before = page.viewportSize();
  await page.setViewportSize({ width: 1180, height });
  await page.waitForTimeout(500);
  await page.screenshot({ path });
  await page.setViewportSize(before);
  assert(statSync(path).size < 300_000, `${path} has ${statSync(path).size} bytes`);
}

test("from a network to its labels, their evidence and a concept of one's own", { timeout: 2 * PATIENCE }, async () => {
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
  await page.locator("h1", { hasText: "planted.onnx" }).waitFor();
  await page.locator(".badge.done").first().waitFor({ timeout: PATIENCE });
  await picturesLoad(page, ".unit img");
  await accessible(page);
  await shot(page, "units");
  const job = page.url();
  await page.getByText("Export", { exact: true }).click();
  const save = async (link) => {
    const [file] = await Promise.all([page.waitForEvent("download"), page.getByRole("link", { name: link, exact: true }).click()]);
    return readFileSync(await file.path());
  };
  const rows = (await save("Table (CSV)")).toString().trim().split("\n");
  assert.equal(rows[0], "layer,unit,label,score,second,third,state,reason");
  assert.equal(rows.length, 1 + (await page.locator(".unit").count()));
  const parquet = await save("Parquet");
  assert.deepEqual([parquet.subarray(0, 4).toString(), parquet.subarray(-4).toString()], ["PAR1", "PAR1"]);
  await report(await save("Report (HTML)"));

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
  await told.filter({ hasText: "photograph of the sea” " }).waitFor({ timeout: PATIENCE });
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
  await page.goto(`${job}/network`);
  await page.getByLabel("Units nearest to a word").fill(label);
  await page.getByRole("button", { name: "Find" }).click();
  await page.locator(".near li").first().waitFor();
  const [near] = await page.locator(".near li").allTextContents();
  assert(near.includes(label) && near.endsWith("1.000"), near);
  await picturesLoad(page, ".near img");
  await accessible(page);

  if (SCREENSHOTS) await moreJobs(page);
  await page.goto("/");
  await page.locator(".job").first().waitFor();
  await shot(page, "jobs", 360);
  page.quiet();
  phone.quiet();
});

test("people rate three units in a study, and it says what they think", { timeout: PATIENCE }, async () => {
  const page = await open(chromium, mesh.url, 1600);
  const job = (await (await page.request.get("/v1/jobs")).json()).jobs.find(({ target_name }) => target_name === "planted.onnx").job_id;
  const labels = (await (await page.request.get(`/v1/jobs/${job}/export?format=cosy`)).text()).trim().split("\n").slice(1);
  const others = labels.map((row) => row.split(",").slice(0, 2).join(",") + ',"a picture, ""of something"""');
  await page.goto("/studies");
  await page.getByRole("link", { name: "New study" }).click();
  await page.getByLabel("Name", { exact: true }).fill("Is it better than nothing?");
  await page.getByRole("checkbox", { name: /planted\.onnx/ }).check();
  await page.getByLabel(/What the method of planted/).fill("DnD");
  await page.getByLabel("Labels of other methods").setInputFiles({ name: "vague.csv", mimeType: "text/csv", buffer: Buffer.from(["layer,unit,description", ...others].join("\n")) });
  await page.getByLabel("Raters of each unit").fill("2");
  await accessible(page);
  await page.getByRole("button", { name: "Create" }).click();
  await page.locator("h1", { hasText: "Is it better than nothing?" }).waitFor();
  const study = page.url();
  assert.match(await page.locator(".facts").first().textContent(), new RegExp(`${labels.length} units, each for 2 raters · 0 responses`));

  await page.getByRole("link", { name: "Rate", exact: true }).click();
  await page.getByLabel("Your name, or a code").fill("Ann");
  await page.getByRole("button", { name: "Begin" }).click();
  for (let unit = 0; unit < 3; unit++) {
    await page.locator(".crumbs", { hasText: `Ann · ${unit} rated` }).waitFor();
    await picturesLoad(page, ".shown img");
    assert(!(await page.content()).includes("vague"), "no method's name is there to be seen");
    if (unit === 0) await accessible(page);
    if (unit === 0) await shot(page, "rate");
    const asked = page.locator(".ratings .rating");
    assert.equal(await asked.count(), 2);
    for (let i = 0; i < 2; i++) {
      const vague = (await asked.nth(i).locator("legend").textContent()).startsWith("a picture, \"of");
      // With the keyboard alone: the arrows choose.
      await asked.nth(i).getByRole("radio", { name: "1: Strongly disagree" }).focus();
      await page.keyboard.press("Space");
      for (let point = 1; !vague && point < 5; point++) await page.keyboard.press("ArrowRight");
      if (!vague) await page.locator(".best").getByRole("radio").nth(i).check();
    }
    await page.getByRole("button", { name: /Next|Done/ }).click();
  }
  await page.locator(".crumbs, h1", { hasText: /3 rated|Thank you/ }).first().waitFor();

  const phone = await open(chromium, mesh.url, 400, "dark");
  await phone.goto(`${study}/rate?rater=Bob`);
  await picturesLoad(phone, ".shown img");
  await accessible(phone);
  await phone.goto(study);
  await phone.locator("h1", { hasText: "better than nothing" }).waitFor();
  await accessible(phone);

  await page.goto(study);
  const row = (method) => page.getByRole("region", { name: "Results over all layers" }).getByRole("row", { name: method }).textContent();
  await page.locator("h2", { hasText: "Results" }).waitFor();
  assert.match(await row("DnD"), /^DnD5\.00.*100\.0 %.*3$/);
  assert.match(await row("vague"), /^vague1\.00.*0\.0 %.*3$/);
  await accessible(page);
  const [file] = await Promise.all([page.waitForEvent("download"), page.getByRole("link", { name: "Ratings (CSV)" }).click()]);
  const rows = readFileSync(await file.path(), "utf8").trim().split("\n");
  assert.equal(rows[0], "rater,layer,unit,method,label,rating,best,valid");
  assert.equal(rows.length, 1 + 3 * 2);
  assert(rows.slice(1).every((row) => /^Ann,.*,(DnD,.*,5,true|vague,"a picture, ""of something""",1,false),true$/.test(row)), rows.join("\n"));
  page.quiet();
  phone.quiet();
});
