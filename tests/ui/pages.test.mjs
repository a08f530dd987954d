// The pages over an orchestrator that makes everything up: size, speed, keys, contrast.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { accessible, browser, open, picturesLoad, synthetic } from "./browser.mjs";

const UNITS = 26_000;
let chromium, gateway;
before(async () => ([chromium, gateway] = await Promise.all([browser(), synthetic(UNITS)])));
after(() => Promise.all([chromium?.close(), gateway?.stop()]));

const PAGES = [
  "/", "/new", "/jobs/synthetic", "/jobs/synthetic/units/layer4.2/3", "/jobs/synthetic/units/layer4.2/17", "/jobs/synthetic/units/layer4.2/29",
  "/jobs/synthetic/network?near=red+stripes", "/compare?a=synthetic&b=synthetic", "/studies/new?job=synthetic", "/studies/any/rate", "/api",
];

for (const [width, scheme] of [[400, "dark"], [400, "light"], [1600, "light"], [1600, "dark"]]) {
  test(`every page is whole and accessible at ${width} px, ${scheme}`, async () => {
    const page = await open(chromium, gateway.url, width, scheme);
    for (const path of PAGES) {
      await page.goto(path);
      await page.locator("h1").waitFor();
      await page.waitForLoadState("networkidle");
      await accessible(page);
    }
    page.quiet();
    await page.context().close();
  });
}

test("a job of 26,000 units opens in under two seconds", async () => {
  const times = [];
  // The machine may be at something else: one opening of several tells what the page takes.
  while (times.length < 10 && !times.some((took) => took < 2000)) {
    const page = await open(chromium, gateway.url, 1600);
    const since = performance.now();
    await page.goto("/jobs/synthetic", { waitUntil: "commit" });
    await page.locator(".unit .label").first().waitFor();
    await picturesLoad(page, ".unit img");
    times.push(performance.now() - since);
    page.quiet();
    await page.context().close();
  }
  const told = `opened in ${times.map(Math.round).join(", ")} ms`;
  console.log(told);
  assert(Math.min(...times) < 2000, told);
});

test("scrolling anywhere shows units, not blanks, with few elements", async () => {
  const page = await open(chromium, gateway.url, 1600);
  await page.goto("/jobs/synthetic");
  await page.getByText(`${UNITS.toLocaleString("en")} units`, { exact: true }).waitFor();
  const seen = await page.evaluate(async () => {
    const frame = () => new Promise(requestAnimationFrame);
    const height = document.documentElement.scrollHeight;
    const blanks = [];
    let most = 0;
    for (let i = 0; i <= 60; i++) {
      // Far jumps and a fast wheel by turns.
      scrollTo(0, i % 3 ? scrollY + 900 : (height * ((i * 37) % 61)) / 60);
      await frame();
      await frame();
      most = Math.max(most, document.querySelectorAll(".unit").length);
      for (const x of [innerWidth * 0.2, innerWidth * 0.8]) {
        for (let y = 120; y < innerHeight - 40; y += 60) {
          const at = document.elementFromPoint(x, y);
          const onGrid = at?.closest(".grid");
          const between = at === onGrid;
          if (onGrid && !between && !at.closest(".unit")?.querySelector(".label")?.textContent) blanks.push([i, x, y]);
          const { bottom } = document.querySelector(".grid").getBoundingClientRect();
          const rows = [...document.querySelectorAll(".unit")].some((card) => { const box = card.getBoundingClientRect(); return box.top < y + 15 && box.bottom > y - 15; });
          if (y < bottom && !rows && y > document.querySelector(".grid").getBoundingClientRect().top) blanks.push([i, x, y, "no row"]);
        }
      }
    }
    return { blanks, most };
  });
  assert.deepEqual(seen.blanks, []);
  assert(seen.most < 250, `${seen.most} elements for units`);
  page.quiet();
  await page.context().close();
});

test("units are searched, filtered, sorted and walked with the keyboard", async () => {
  const page = await open(chromium, gateway.url, 1600);
  await page.goto("/jobs/synthetic");
  await page.getByText(`${UNITS.toLocaleString("en")} units`, { exact: true }).waitFor();
  await page.keyboard.press("/");
  await page.keyboard.type("red stripes");
  await page.waitForFunction(() => [...document.querySelectorAll(".unit a")].every((card) => card.textContent.includes("red stripes") || card.querySelector(".tag")?.title.includes("red stripes")));
  assert.match(await page.locator("#found").textContent(), /^\d+ of 26,000 units$/);
  assert.match(page.url(), /q=red\+stripes/);
  await page.getByLabel("Layer", { exact: true }).selectOption("layer2.3");
  await page.waitForFunction(() => [...document.querySelectorAll(".foot .mono")].every((name) => name.textContent.startsWith("layer2.3 ")));
  await page.getByLabel("Search labels", { exact: true }).fill("");
  await page.getByLabel("State", { exact: true }).selectOption("failed");
  await page.waitForFunction(() => document.querySelectorAll(".unit").length > 0 && [...document.querySelectorAll(".unit")].every((card) => card.textContent.includes("no_concept")));
  await page.getByLabel("State", { exact: true }).selectOption("labelled");
  await page.getByLabel("Order", { exact: true }).selectOption("label");
  const labels = await page.locator(".unit .label").allTextContents();
  assert.deepEqual(labels, [...labels].sort((a, b) => a.localeCompare(b)));

  await page.locator(".unit a").first().focus();
  for (const key of ["ArrowRight", "ArrowDown", "End", "Home", "PageDown", "ArrowLeft"]) await page.keyboard.press(key);
  const place = await page.evaluate(() => [document.activeElement.closest(".unit")?.getAttribute("aria-posinset"), document.activeElement.getBoundingClientRect().bottom <= innerHeight]);
  assert(Number(place[0]) > 5 && place[1], `${place}`);
  const label = await page.evaluate(() => document.activeElement.querySelector(".label").textContent);
  await page.keyboard.press("Enter");
  await page.locator("h1", { hasText: label }).waitFor();
  const opened = new URL(page.url()).pathname;
  await page.keyboard.press("j");
  await page.waitForFunction((opened) => location.pathname !== opened && document.querySelector(".why"), opened);
  await page.goBack();
  await page.goBack();
  await page.locator(".unit .label").first().waitFor();
  assert.equal(await page.getByLabel("Order", { exact: true }).inputValue(), "label", "what was chosen is still chosen");
  page.quiet();
  await page.context().close();
});

test("two jobs are compared, and what has not ended in one is no difference", async () => {
  const page = await open(chromium, gateway.url, 1600);
  await page.goto("/compare?a=synthetic&b=synthetic");
  await page.getByText("They say the same of every unit that has ended in both.").waitFor();
  await page.getByLabel("Only where they differ").uncheck();
  assert.equal(await page.locator("tbody tr").count(), 100);
  const request = { target: { uri: "file:///nets/halfway.onnx" }, layers: [{ layer: "conv1", units: [...Array(64).keys()] }] };
  const { job } = await (await page.request.post("/v1/jobs", { data: { request } })).json();
  await page.goto(`/compare?a=synthetic&b=${job.job_id}`);
  await page.getByText("64 units in both").waitFor();
  await page.getByLabel("Only where they differ").uncheck();
  assert.match(await page.locator("tbody tr").last().textContent(), /not ended/);
  await page.getByLabel("Only where they differ").check();
  assert.equal(await page.getByText("not ended").count(), 0);
  await page.request.delete(`/v1/jobs/${job.job_id}`);
  page.quiet();
  await page.context().close();
});

test("the threshold's slider changes what is laid over, and Otsu's is one press away", async () => {
  const page = await open(chromium, gateway.url, 1600);
  await page.goto("/jobs/synthetic/units/layer4.2/3");
  const shown = () => page.locator(".view").getAttribute("aria-label");
  await page.waitForFunction(() => document.querySelector(".view")?.getAttribute("aria-label")?.includes("threshold"));
  const [before, otsu] = [await shown(), await page.locator("#threshold").inputValue()];
  await page.locator("#threshold").fill("250");
  assert.notEqual(await shown(), before);
  await page.getByRole("button", { name: `Otsu's: ${otsu}` }).click();
  assert.equal(await shown(), before);
  await page.getByRole("button", { name: "Picture 2, activation" }).click();
  await page.waitForFunction(() => document.querySelector(".view").getAttribute("aria-label").startsWith("Picture 2 of 10"));
  page.quiet();
  await page.context().close();
});

test("text of models is shown as text, whatever it holds", async () => {
  const page = await open(chromium, gateway.url, 400);
  const evil = '<img src=x onerror="document.title=1">';
  await page.goto("/jobs/synthetic/units/layer4.2/3");
  await page.getByLabel("Try a concept of your own").fill(evil);
  await page.getByRole("button", { name: "Let it compete" }).click();
  await page.locator(".own h3", { hasText: evil }).waitFor();
  await accessible(page);
  page.quiet();
  await page.context().close();
});

test("a job is picked from the layers of its network, watched live, cancelled, resumed and deleted", async () => {
  const page = await open(chromium, gateway.url, 1600);
  await page.goto("/new");
  await page.getByRole("textbox", { name: "Where it lies" }).fill("file:///nets/alexnet.onnx");
  await page.getByRole("button", { name: "Read its layers" }).click();
  await page.getByText("layer4").click().catch(() => {});
  await page.getByRole("checkbox", { name: /layer4\.2/ }).check();
  // So many that it goes on for as long as this test does.
  await page.getByLabel("Units of each").fill("0-1999");
  await page.getByRole("textbox", { name: "Where they lie" }).fill("file:///pictures");
  await page.getByText("constants; left alone").click();
  await page.getByLabel("images_per_concept").fill("4");
  await accessible(page);
  await page.getByRole("button", { name: "Start" }).click();
  await page.locator("h1", { hasText: "alexnet.onnx" }).waitFor();
  await page.waitForFunction(() => [...document.querySelectorAll(".unit .number")].length > 4);
  assert.match(await page.locator(".facts").first().textContent(), /units a minute · about .* left/);
  const list = await open(chromium, gateway.url, 400);
  await list.goto("/");
  await list.locator(".job", { hasText: "alexnet.onnx" }).waitFor();
  page.on("dialog", (dialog) => dialog.accept());
  await page.getByRole("button", { name: "Cancel" }).click();
  await page.locator(".badge.cancelled").first().waitFor();
  await page.getByRole("button", { name: "Resume" }).click();
  await page.locator(".badge.running").first().waitFor();
  await page.getByRole("button", { name: "Delete" }).click();
  await page.locator("h1", { hasText: "Jobs" }).waitFor();
  for (const jobs of [page, list]) {
    await jobs.locator(".job", { hasText: "alexnet.onnx" }).waitFor({ state: "detached" });
    await jobs.locator(".job").first().waitFor();
    jobs.quiet();
    await jobs.context().close();
  }
});
