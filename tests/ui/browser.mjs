// Servers and browsers for the tests of the pages.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import AxeBuilder from "@axe-core/playwright";
import { chromium } from "playwright-core";

export const root = join(import.meta.dirname, "../..");
const built = join(root, "target/debug");
/** What a person would not wait for, but a machine that has much else to do may need. */
const PATIENCE = 180_000;

/** Starts a program that writes the address it listens on to a file; `arguments_` gets a folder and that file. Gives its address and how to end it. */
export async function start(program, arguments_) {
  const folder = mkdtempSync(join(tmpdir(), "dnd-ui-"));
  const port = join(folder, "port");
  const process_ = spawn(join(built, program), arguments_(folder, port), { stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  process_.stderr.on("data", (text) => (log = (log + text).slice(-4000)));
  let gone = false;
  const ended = new Promise((resolve) => process_.on("close", resolve)).then(() => (gone = true));
  while (!existsSync(port) || !readFileSync(port, "utf8")) {
    assert(!gone, `${program} ended: ${log}`);
    await sleep(20);
  }
  return {
    url: `http://${readFileSync(port, "utf8")}`,
    async stop() {
      process_.kill("SIGTERM");
      await ended;
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

export const synthetic = (units) => start("examples/synthetic", (_, port) => ["127.0.0.1:0", String(units), port]);

export function browser() {
  const flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync";
  return chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: flags.split(" "), timeout: PATIENCE });
}

/** A page of a size, light or dark. `quiet` holds that nothing was said on its console and nothing asked of another host. */
export async function open(browser, url, width, colorScheme = "light") {
  const context = await browser.newContext({ viewport: { width, height: width < 800 ? 860 : 1000 }, colorScheme, baseURL: url });
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  const complaints = [];
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && complaints.push(`${page.url()}: ${message.text()}`));
  page.on("pageerror", (error) => complaints.push(`${page.url()}: ${error.stack}`));
  page.on("request", (request) => {
    const to = new URL(request.url());
    if (to.protocol !== "data:" && to.origin !== url) complaints.push(`${page.url()} asks ${to.origin}`);
  });
  page.quiet = () => assert.deepEqual(complaints, []);
  return page;
}

/** Holds that axe finds nothing serious, and that nothing sticks out of the window. */
export async function accessible(page) {
  const { violations } = await new AxeBuilder({ page }).analyze();
  const serious = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
  assert.deepEqual(serious.map(({ id, nodes }) => `${page.url()}: ${id}: ${nodes[0].html}: ${nodes[0].failureSummary}`), []);
  assert.equal(await page.evaluate(() => Math.max(0, document.documentElement.scrollWidth - innerWidth)), 0, `${page.url()} is wider than the window`);
}

/** Holds that all pictures inside the window are there. */
export async function picturesLoad(page, selector) {
  await page.waitForFunction((selector) => {
    const shown = [...document.querySelectorAll(selector)].filter((image) => {
      const { top, bottom } = image.getBoundingClientRect();
      return bottom > 0 && top < innerHeight;
    });
    return shown.length > 0 && shown.every((image) => image.complete && image.naturalWidth > 0);
  }, selector);
}
