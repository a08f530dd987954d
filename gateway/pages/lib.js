// What all pages share: elements, the API, events, words and numbers.
//
// Labels, captions, answers and paths are other people's text: they only ever become text nodes.

/** An element. `props` are its properties and attributes; functions are listeners; children that are null or false are left out. */
export function h(name, props = {}, ...children) {
  return fill(document.createElement(name), props, children);
}

/** As `h`, of SVG. */
export function svg(name, props = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), props, children);
}

function fill(element, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(key, value);
    else if (key === "style") Object.assign(element.style, value);
    else if (key === "value") element.value = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** What the API says went wrong. */
export class Problem extends Error {
  constructor(problem) {
    super(problem.detail || problem.title || "something went wrong");
    Object.assign(this, { status: problem.status, reason: problem.reason, field: problem.field });
  }
}

/** Asks the API. `body` is sent as JSON, or as it is if it is a Blob. */
export async function api(path, { method = "GET", body, headers = {}, signal } = {}) {
  const response = await ask(path, { method, body, headers, signal });
  return response.status === 204 ? null : response.json();
}

async function ask(path, { method, body, headers, signal }) {
  const isBlob = body instanceof Blob;
  let response;
  try {
    response = await fetch(path, {
      method,
      signal,
      headers: body && !isBlob ? { "content-type": "application/json", ...headers } : headers,
      body: body && !isBlob ? JSON.stringify(body) : body,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ detail: "The gateway does not answer. Is it running?", status: 0 });
  }
  if (!response.ok) {
    throw new Problem(await response.json().catch(() => ({ title: response.statusText, status: response.status })));
  }
  return response;
}

/** Asks the API and gives its answer line by line, as values. */
export async function* lines(path, body, signal) {
  const response = await ask(path, { method: "POST", body, headers: {}, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const line of parts) {
      const told = JSON.parse(line);
      if (told.problem) throw new Problem(told.problem);
      yield told;
    }
  }
}

export const paths = {
  job: (job) => `/jobs/${encodeURIComponent(job)}`,
  unit: (job, layer, unit) => `/jobs/${encodeURIComponent(job)}/units/${encodeURIComponent(layer)}/${unit}`,
  picture: (digest) => `/v1/pictures/${digest}`,
};

/** All pages of a list, one after the other; `first` is one that was asked for already. */
export async function* pagesOf(path, size, signal, first) {
  let page = (await first) ?? (await api(`${path}?page_size=${size}`, { signal }));
  for (;;) {
    yield page;
    if (!page.next_page_token) return;
    page = await api(`${path}?${new URLSearchParams({ page_size: size, page_token: page.next_page_token })}`, { signal });
  }
}

/** The events of a job from one on, until it ends or the page is left. Comes back by itself when the connection is lost. Gives what ends it. */
export function watch(job, after, signal, on) {
  const source = new EventSource(`/v1/jobs/${encodeURIComponent(job)}/events?evidence=false&after=${after}`);
  const kinds = ["accepted", "progress", "skipped", "unit", "done", "paused", "resumed"];
  for (const kind of kinds) {
    source.addEventListener(kind, (event) => on(kind, JSON.parse(event.data)[kind]));
  }
  source.addEventListener("end", () => {
    source.close();
    on("end", {});
  });
  source.addEventListener("problem", (event) => on("problem", JSON.parse(event.data)));
  source.addEventListener("open", () => on("connected", {}));
  source.addEventListener("error", () => on(source.readyState === EventSource.CLOSED ? "lost" : "away", {}));
  signal.addEventListener("abort", () => source.close());
  return () => source.close();
}

/** Goes to another page. */
export function go(address) {
  history.pushState({}, "", address);
  dispatchEvent(new PopStateEvent("popstate"));
}

/** Tells people who can't see the page what changed in it. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

/** The box that says what went wrong. */
export function problem(error) {
  return h("p", { class: "problem", role: "alert" }, error.message, error.field && h("span", { class: "soft" }, ` (${error.field})`));
}

export const number = (value) => Number(value ?? 0);
export const count = (value) => number(value).toLocaleString("en");
export const plural = (value, one, many) => `${count(value)} ${number(value) === 1 ? one : many ?? one + "s"}`;
export const score = (value) => (value === undefined || value === null ? "–" : Number(value).toFixed(3));
export const short = (digest) => (digest || "").slice(0, 12);

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

export function ago(time) {
  const date = new Date(time);
  const seconds = (Date.now() - date) / 1000;
  const text = seconds < 45 ? "just now" : `${duration(seconds)} ago`;
  return h("time", { datetime: date.toISOString(), title: date.toLocaleString() }, text);
}

export const ended = (state) => ["JOB_STATE_DONE", "JOB_STATE_CANCELLED", "JOB_STATE_FAILED"].includes(state);

/** What a job is called: after its network. */
export function jobName(job) {
  const name = job.target_name || job.job_id;
  return /^[0-9a-f]{64}$/.test(name) ? `network ${name.slice(0, 10)}` : name;
}

/** A state as a small badge: of a job or a unit. */
export function badge(state) {
  const name = (state || "").replace(/^(JOB|UNIT)_STATE_/, "").toLowerCase();
  const shown = name === "unspecified" || !name ? "waiting" : name;
  return h("span", { class: `badge ${shown}` }, shown);
}

export const STAGES = {
  STAGE_PROBE: ["Probe", "pictures"],
  STAGE_CROP: ["Crop", "units"],
  STAGE_CAPTION: ["Caption", "units"],
  STAGE_SUMMARIZE: ["Summarise", "units"],
  STAGE_GENERATE: ["Draw", "units"],
  STAGE_SCORE: ["Score", "units"],
};

/** A bar from nothing to all. */
export function bar(label, done, total) {
  const share = total > 0 ? Math.min(1, done / total) : 0;
  return h(
    "div",
    { class: "bar", role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share) },
    h("span", { style: { width: `${100 * share}%` } }),
  );
}

/** A picture by digest. */
export function picture(digest, alt = "", props = {}) {
  if (!digest) return h("span", { class: "nothing", ...props });
  return h("img", { src: paths.picture(digest), alt, decoding: "async", ...props });
}

/** What a person has to be told of the models that a job used. */
export function notices(job) {
  const provenance = job.accepted?.provenance ?? {};
  const models = ["captioner", "summarizer", "diffusion", "clip"].map((name) => provenance[name]?.notice);
  return [...new Set(models.filter(Boolean))];
}

/** "0-3,7" as numbers; nothing or "all" as none, which asks for all. */
export function parseUnits(text) {
  const units = [];
  if (!text.trim() || text.trim().toLowerCase() === "all") return units;
  for (const part of text.split(",")) {
    const match = part.trim().match(/^(\d+)(?:\s*-\s*(\d+))?$/);
    if (!match) throw new Problem({ detail: `"${part.trim()}" is no unit and no range of units; write all, or 0-9,17` });
    const [from, to] = [Number(match[1]), Number(match[2] ?? match[1])];
    if (to < from || to - from > 1_000_000) throw new Problem({ detail: `${part.trim()} runs the wrong way, or too far` });
    for (let unit = from; unit <= to; unit++) units.push(unit);
  }
  return units;
}
