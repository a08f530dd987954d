// A job: how far it is, and its units as a grid that holds as many rows as there are, and as many elements as fit the window.
import {
  STAGES, ago, api, badge, bar, count, duration, ended, go, h, jobName, notices, number, pagesOf, paths, picture, plural, problem, say, score, watch,
} from "./lib.js";

const GAP = 12;
const CARD_WIDTH = 236;
const CARD_HEIGHT = 152;
/** Rows above and below the window that are there already. */
const SPARE = 6;
const FIRST_PAGE = 200;
const LATER_PAGES = 5000;
/** Units that the gateway makes a report of at most. */
const REPORTED = 1000;

/** The last job that was looked at, so that coming back to it is immediate. */
let kept = { job: null, units: [], shown: [], scroll: 0, complete: false };

/** The units as they were last shown, in their order, for the page of one of them. */
export function neighbours(job, layer, unit) {
  if (kept.job !== job) return [null, null];
  const at = kept.shown.findIndex((other) => other.unit === unit && other.layer === layer);
  return at < 0 ? [null, null] : [kept.shown[at - 1], kept.shown[at + 1]];
}

export async function show(root, [id], signal) {
  const back = kept.job === id;
  // Asked for together with the job: what is seen first need not wait for it.
  const first = back ? null : api(`/v1/jobs/${encodeURIComponent(id)}/units?page_size=${FIRST_PAGE}`, { signal });
  first?.catch(() => {});
  const { job } = await api(`/v1/jobs/${encodeURIComponent(id)}`, { signal });
  if (!back) kept = { job: id, units: [], shown: [], scroll: 0, complete: false };
  // What tells of the job; it ends before the page does where the job is deleted.
  const telling = new AbortController();
  signal.addEventListener("abort", () => telling.abort());
  const head = header(job, signal, telling);
  const grid = units(job, signal);
  root.append(head.element, ...grid.elements);
  signal.addEventListener("abort", () => (kept.scroll = head.scroll()));

  const filling = grid.load(first);
  if (!ended(job.state)) {
    const stop = watch(id, number(job.last_event), telling.signal, async (kind, event) => {
      head.told(kind, event);
      if (kind === "unit") grid.unit(event);
      // A stream that breaks is asked for again by the browser, unless it is the job that came to its end.
      if (["lost", "end", "problem"].includes(kind) && (await head.again().catch(() => false))) stop();
    });
  }
  if (back) {
    grid.draw();
    window.scrollTo(0, kept.scroll);
  }
  filling.catch((error) => signal.aborted || root.append(problem(error)));
}

// --- how far the job is ---

function header(job, signal, telling) {
  const stages = h("dl", { class: "stages" });
  const facts = h("p", { class: "facts soft" });
  const state = h("span", {});
  const actions = h("div", { class: "actions" });
  const said = h("div", {});
  const progress = new Map((job.progress ?? []).map((stage) => [stage.stage, stage]));
  let counts = { ...job.units };
  /** When units ended, as far as this page saw it. */
  const times = [];
  let scroll = 0;
  addEventListener("scroll", () => (scroll = window.scrollY), { passive: true, signal });

  function draw() {
    state.replaceChildren(badge(job.state));
    const done = number(counts.labelled) + number(counts.dead) + number(counts.failed);
    const total = number(counts.total);
    const left = total - done;
    const parts = [
      `${count(counts.labelled)} of ${plural(total, "unit")} labelled`,
      number(counts.dead) && `${count(counts.dead)} dead`,
      number(counts.failed) && `${count(counts.failed)} failed`,
    ];
    if (!ended(job.state) && job.state !== "JOB_STATE_PAUSED") {
      const rate = perSecond(done);
      if (rate > 0) parts.push(`${(rate * 60).toFixed(rate * 60 < 10 ? 1 : 0)} units a minute`, `about ${duration(left / rate)} left`);
    } else if (job.ended_at && job.created_at) {
      parts.push(`took ${duration((new Date(job.ended_at) - new Date(job.created_at)) / 1000)}`);
    }
    facts.replaceChildren(parts.filter(Boolean).join(" · "), " · begun ", job.created_at ? ago(job.created_at) : "");
    stages.replaceChildren(
      ...Object.entries(STAGES).map(([key, [name, of]]) => {
        const { done, total } = progress.get(key) ?? {};
        const shown = number(total) ? `${count(done)} of ${count(total)} ${of}` : "not begun";
        return h("div", {}, h("dt", {}, name), h("dd", {}, bar(`${name}: ${shown}`, number(done), number(total)), h("span", { class: "soft" }, shown)));
      }),
    );
    actions.replaceChildren(...buttons());
    const warnings = [...(job.accepted?.warnings ?? []), ...(job.done?.warnings ?? [])];
    said.replaceChildren(
      ...(job.message ? [h("p", { class: job.state === "JOB_STATE_FAILED" ? "problem" : "notice" }, job.message)] : []),
      ...notices(job).concat(warnings).map((text) => h("p", { class: "notice" }, text)),
    );
  }

  function perSecond(done) {
    const now = Date.now() / 1000;
    while (times.length > 2 && now - times[0] > 120) times.shift();
    if (times.length > 3) return (times.length - 1) / (now - times[0]);
    const since = now - new Date(job.created_at) / 1000;
    return done / since;
  }

  function buttons() {
    const list = [];
    const act = (label, question, ask, kind = "") =>
      h("button", {
        class: kind,
        click: async (event) => {
          if (question && !confirm(question)) return;
          event.target.disabled = true;
          try {
            await ask();
          } catch (error) {
            said.prepend(problem(error));
            event.target.disabled = false;
          }
        },
      }, label);
    const post = (what) => async () => {
      await api(`/v1/jobs/${encodeURIComponent(job.job_id)}/${what}`, { method: "POST" });
      kept.job = null;
      dispatchEvent(new PopStateEvent("popstate"));
    };
    if (!ended(job.state)) list.push(act("Cancel", "Stop this job? The units that have ended are kept.", post("cancel")));
    if (["JOB_STATE_PAUSED", "JOB_STATE_CANCELLED", "JOB_STATE_FAILED"].includes(job.state)) list.push(act("Resume", null, post("resume"), "main"));
    if (job.state === "JOB_STATE_DONE" && number(counts.failed)) list.push(act("Try failed units again", null, post("resume?failed=true")));
    list.push(h("a", { class: "button", href: `${paths.job(job.job_id)}/network` }, "By layer"));
    list.push(h("a", { class: "button", href: `/compare?a=${encodeURIComponent(job.job_id)}` }, "Compare"));
    list.push(
      act("Delete", "Delete this job and its results for good?", async () => {
        telling.abort();
        await api(`/v1/jobs/${encodeURIComponent(job.job_id)}`, { method: "DELETE" });
        kept.job = null;
        go("/");
      }, "danger"),
    );
    return list;
  }

  const told = (kind, event) => {
    if (kind === "progress") progress.set(event.stage, event);
    else if (kind === "unit") {
      times.push(Date.now() / 1000);
      const which = { UNIT_STATE_LABELLED: "labelled", UNIT_STATE_DEAD: "dead", UNIT_STATE_FAILED: "failed" }[event.state];
      counts[which] = number(counts[which]) + 1;
    } else if (kind === "paused") Object.assign(job, { state: "JOB_STATE_PAUSED", message: event.message });
    else if (kind === "resumed") Object.assign(job, { state: "JOB_STATE_RUNNING", message: "" });
    else if (kind === "away") job.message = "The gateway does not answer; this page goes on by itself once it does.";
    else if (kind === "connected" && job.state !== "JOB_STATE_PAUSED") job.message = "";
    schedule();
  };
  let waiting = false;
  function schedule() {
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      if (!signal.aborted && !actions.contains(document.activeElement)) draw();
    }, 250);
  }
  const again = async () => {
    ({ job } = await api(`/v1/jobs/${encodeURIComponent(job.job_id)}`, { signal }));
    counts = { ...job.units };
    for (const stage of job.progress ?? []) progress.set(stage.stage, stage);
    draw();
    if (ended(job.state)) say(`The job has ended: ${plural(counts.labelled, "label")}.`);
    return ended(job.state);
  };

  draw();
  const element = h(
    "section",
    {},
    h("p", { class: "crumbs" }, h("a", { href: "/" }, "Jobs"), " / ", h("span", { class: "mono" }, job.job_id)),
    h("div", { class: "head" }, h("div", { class: "job-title" }, h("h1", {}, jobName(job)), state), actions),
    facts,
    said,
    h("details", { open: !ended(job.state) }, h("summary", {}, "Stages"), stages),
    how(job),
    exports(job),
  );
  return { element, told, again, scroll: () => scroll };
}

function how(job) {
  const provenance = job.accepted?.provenance;
  if (!provenance) return null;
  const models = ["captioner", "summarizer", "diffusion", "clip"].map((which) => {
    const model = provenance[which];
    return model && h("tr", {}, h("th", { scope: "row" }, which), h("td", {}, `${model.name} ${model.layout ? `(${model.layout})` : ""} ${model.engine ?? ""}`));
  });
  const pictures = (job.request?.probing_set?.sources ?? []).map((source) => source.uri || `uploaded list ${source.list_digest?.slice(0, 12)}`);
  return h(
    "details",
    {},
    h("summary", {}, "How it came about"),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "How it came about" },
      h("table", { class: "plain" },
        h("tr", {}, h("th", { scope: "row" }, "network"), h("td", {}, job.request?.target?.uri || provenance.target_digest)),
        h("tr", {}, h("th", { scope: "row" }, "pictures"), h("td", {}, pictures.join(", "))),
        ...models.filter(Boolean),
        ...(job.done?.times ?? []).map((time) =>
          h("tr", {}, h("th", { scope: "row" }, `time of ${(STAGES[time.stage]?.[0] ?? time.stage).toLowerCase()}`),
            h("td", {}, `${duration(time.seconds)} over units side by side, ${plural(time.calls, "call")} of a model, ${count(time.reused)} kept from before`))),
      ),
      h("pre", {}, JSON.stringify(provenance.parameters ?? {}, null, 1))),
  );
}

function exports(job) {
  const formats = [["csv", "Table (CSV)"], ["parquet", "Parquet"], ["jsonl", "All evidence (JSON lines)"], ["cosy", "CoSy's CSV"], ["neuronpedia", "Neuronpedia's JSON"]];
  if (number(job.units?.total) <= REPORTED) formats.push(["html", "Report (HTML)"]);
  const link = ([format, text]) => h("a", { class: "button", href: `/v1/jobs/${encodeURIComponent(job.job_id)}/export?format=${format}`, download: "" }, text);
  return h("details", {}, h("summary", {}, "Export"), h("div", { class: "actions exports" }, ...formats.map(link)));
}

// --- the units ---

const SORTS = {
  asked: ["As asked for", null],
  score: ["Best score first", (a, b) => (b.score ?? -Infinity) - (a.score ?? -Infinity)],
  label: ["Label, A to Z", (a, b) => (a.label || "\uffff").localeCompare(b.label || "\uffff")],
  highest: ["Strongest first", (a, b) => b.highest - a.highest],
};
const FILTERS = {
  "": ["All states", () => true],
  labelled: ["Labelled", (unit) => unit.state === "UNIT_STATE_LABELLED"],
  several: ["With several meanings", (unit) => unit.labels.length > 1],
  dead: ["Dead", (unit) => unit.state === "UNIT_STATE_DEAD"],
  failed: ["Failed", (unit) => unit.state === "UNIT_STATE_FAILED"],
  waiting: ["Not ended", (unit) => !unit.state || unit.state === "UNIT_STATE_UNSPECIFIED"],
};

function units(job, signal) {
  const query = new URLSearchParams(location.search);
  const layers = (job.accepted?.layers ?? []).map((layer) => layer.layer);
  const total = number(job.units?.total);
  const byName = new Map(kept.units.map((unit, at) => [`${unit.layer}/${unit.unit}`, at]));

  const find = h("input", { type: "search", placeholder: "Search labels", "aria-label": "Search labels", value: query.get("q") ?? "", input: () => filter() });
  const select = (label, options, value) => {
    const element = h("select", { "aria-label": label, change: () => filter() }, ...options.map(([key, text]) => h("option", { value: key }, text)));
    element.value = options.some(([key]) => key === value) ? value : options[0][0];
    return element;
  };
  const layer = select("Layer", [["", "All layers"], ...layers.map((name) => [name, name])], query.get("layer"));
  const state = select("State", Object.entries(FILTERS).map(([key, [text]]) => [key, text]), query.get("state"));
  const sort = select("Order", Object.entries(SORTS).map(([key, [text]]) => [key, text]), query.get("sort"));
  const found = h("p", { class: "soft", role: "status", id: "found" });
  const tools = h("form", { class: "tools", role: "search", submit: (event) => event.preventDefault() }, find, layer, state, sort, found);
  const grid = h("ul", { class: "grid", "aria-label": "Units" });
  const failures = h("div", {});
  const cards = new Map();
  let columns = 1;
  let current = 0;

  /** What of the units is shown, in which order. Keeps to the address what a person would want to send to another. */
  function filter(keep = true) {
    const text = find.value.trim().toLowerCase();
    const of = FILTERS[state.value][1];
    const exactly = text.match(/^"(.+)"$/)?.[1];
    const says = (unit) => (exactly ? unit.label.toLowerCase() === exactly : unit.labels.some((label) => label.toLowerCase().includes(text)));
    let shown = kept.units.filter((unit) => (!layer.value || unit.layer === layer.value) && of(unit) && (!text || says(unit)));
    if (SORTS[sort.value][1]) shown = shown.toSorted(SORTS[sort.value][1]);
    kept.shown = shown;
    const isAll = !text && !layer.value && !state.value;
    found.textContent = !kept.complete
      ? `${count(kept.units.length)} of ${count(total)} read …`
      : isAll ? plural(shown.length, "unit") : `${count(shown.length)} of ${plural(total, "unit")}`;
    if (keep) {
      const query = new URLSearchParams();
      for (const [key, value] of [["q", find.value], ["layer", layer.value], ["state", state.value], ["sort", sort.value]]) {
        if (value && value !== "asked") query.set(key, value);
      }
      history.replaceState({}, "", `${location.pathname}${query.size ? `?${query}` : ""}`);
      current = 0;
      for (const card of cards.values()) card.remove();
      cards.clear();
    }
    draw();
    why();
  }

  /** Why units failed, where any did. */
  function why() {
    const reasons = new Map();
    for (const unit of kept.units) {
      if (unit.state !== "UNIT_STATE_FAILED") continue;
      const seen = reasons.get(unit.reason) ?? { count: 0, message: unit.message };
      seen.count += 1;
      reasons.set(unit.reason, seen);
    }
    const rows = [...reasons].sort((a, b) => b[1].count - a[1].count);
    const key = JSON.stringify(rows);
    if (failures.dataset.key === key) return;
    failures.dataset.key = key;
    failures.replaceChildren(
      ...(rows.length
        ? [h("details", {}, h("summary", {}, `Why units failed (${rows.length})`),
            h("ul", { class: "reasons" }, ...rows.map(([reason, { count: times, message }]) =>
              h("li", {}, h("code", {}, reason || "unknown"), ` ${plural(times, "unit")}: `, message))))]
        : []),
    );
  }

  /** How many units the grid is for: those to come are counted in while nothing is filtered, so that the scroll bar does not jump. */
  const length = () => (!kept.complete && kept.shown.length === kept.units.length ? Math.max(total, kept.shown.length) : kept.shown.length);

  function draw() {
    if (signal.aborted) return;
    const width = grid.clientWidth;
    const fits = Math.max(1, Math.floor((width + GAP) / (CARD_WIDTH + GAP)));
    const resized = fits !== columns || grid.dataset.width !== String(width);
    columns = fits;
    grid.dataset.width = width;
    const size = length();
    const rows = Math.ceil(size / columns);
    grid.style.height = `${Math.max(0, rows * (CARD_HEIGHT + GAP) - GAP)}px`;
    const top = grid.getBoundingClientRect().top;
    const step = CARD_HEIGHT + GAP;
    const first = Math.max(0, Math.floor(-top / step) - SPARE) * columns;
    const last = Math.min(size, (Math.ceil((innerHeight - top) / step) + SPARE) * columns);
    const focused = cards.get(current)?.contains(document.activeElement) ? current : -1;
    for (const [at, card] of cards) {
      if ((at < first || at >= last) && at !== focused) {
        card.remove();
        cards.delete(at);
      }
    }
    for (let at = first; at < last; at++) {
      const unit = kept.shown[at];
      let card = cards.get(at);
      if (card && card.unit !== unit) {
        if (at === focused) continue;
        card.remove();
        card = null;
      }
      if (!card) {
        card = make(unit, at, size);
        cards.set(at, card);
        const next = [...grid.children].find((other) => Number(other.dataset.at) > at);
        grid.insertBefore(card, next ?? null);
        put(card, at, width);
      } else if (resized) put(card, at, width);
    }
  }

  function put(card, at, width) {
    const wide = (width - GAP * (columns - 1)) / columns;
    card.style.width = `${wide}px`;
    card.style.transform = `translate(${(at % columns) * (wide + GAP)}px, ${Math.floor(at / columns) * (CARD_HEIGHT + GAP)}px)`;
  }

  function make(unit, at, size) {
    const props = { class: "unit card", "data-at": at, "aria-setsize": size, "aria-posinset": at + 1 };
    if (!unit) return Object.assign(h("li", { ...props, class: "unit card empty-card" }), { unit });
    const { layer, unit: index, label, labels, images, reason } = unit;
    const isWaiting = !unit.state || unit.state === "UNIT_STATE_UNSPECIFIED";
    const shown = label || (unit.state === "UNIT_STATE_DEAD" ? "dead" : unit.state === "UNIT_STATE_FAILED" ? `failed: ${reason}` : `${(STAGES[unit.stage]?.[0] ?? "waiting").toLowerCase()} …`);
    const card = h(
      "li",
      props,
      h("a", { href: paths.unit(job.job_id, layer, index), tabindex: at === current ? 0 : -1, "aria-label": `${shown}, ${layer} unit ${index}`, focus: () => (current = at) },
        h("span", { class: "strip" }, ...[0, 1, 2, 3].map((place) => picture(images[place]))),
        h("span", { class: `label ${label ? "" : "soft"}` }, shown),
        h("span", { class: "foot soft" },
          h("span", { class: "mono" }, `${layer} · ${index}`),
          labels.length > 1 && h("span", { class: "tag", title: labels.join("; ") }, `+${labels.length - 1}`),
          label ? h("span", { class: "number", title: "score" }, score(unit.score)) : !isWaiting && badge(unit.state))),
    );
    return Object.assign(card, { unit });
  }

  function move(to) {
    const at = Math.max(0, Math.min(kept.shown.length - 1, to));
    cards.get(current)?.querySelector("a")?.setAttribute("tabindex", -1);
    current = at;
    const row = Math.floor(at / columns);
    const top = grid.getBoundingClientRect().top + scrollY + row * (CARD_HEIGHT + GAP);
    const under = tools.offsetHeight + 16;
    if (top < scrollY + under) window.scrollTo(0, top - under);
    else if (top + CARD_HEIGHT > scrollY + innerHeight) window.scrollTo(0, top + CARD_HEIGHT + 16 - innerHeight);
    draw();
    const link = cards.get(at)?.querySelector("a");
    link?.setAttribute("tabindex", 0);
    link?.focus({ preventScroll: true });
  }

  grid.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(innerHeight / (CARD_HEIGHT + GAP)) - 1) * columns;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(current + steps[event.key]);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, select, textarea")) return;
    event.preventDefault();
    find.focus();
  }, { signal });

  let drawing = false;
  const soon = () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => {
      drawing = false;
      draw();
    });
  };
  addEventListener("scroll", soon, { passive: true, signal });
  addEventListener("resize", soon, { signal });

  async function load(first) {
    if (kept.complete) {
      filter(false);
      if (ended(job.state)) return;
    }
    for await (const page of pagesOf(`/v1/jobs/${encodeURIComponent(job.job_id)}/units`, LATER_PAGES, signal, first)) {
      for (const unit of page.units) {
        const name = `${unit.layer}/${unit.unit}`;
        const known = kept.units[byName.get(name)];
        // What the events said meanwhile is newer.
        if (known?.stamp && unit.state === "UNIT_STATE_UNSPECIFIED") unit.state = known.state;
        if (known) kept.units[byName.get(name)] = { ...unit, stamp: known.stamp };
        else {
          byName.set(name, kept.units.length);
          kept.units.push(unit);
        }
      }
      if (!page.next_page_token) continue;
      filter(false);
      // What can be seen comes before what can't.
      const pictures = [...grid.querySelectorAll("img")].map((image) => image.decode().catch(() => {}));
      await Promise.race([Promise.all(pictures), new Promise((resolve) => setTimeout(resolve, 1000))]);
    }
    kept.complete = true;
    filter(false);
  }

  let refreshing = false;
  /** A unit has ended. */
  function unit(result) {
    const at = byName.get(`${result.layer}/${result.unit}`);
    const summary = {
      layer: result.layer,
      unit: result.unit,
      state: result.state,
      stage: "STAGE_SCORE",
      label: result.label,
      labels: result.labels ?? [],
      score: result.concepts?.[0]?.score,
      reason: result.reason,
      message: result.message,
      images: (result.images ?? []).map((image) => image.digest),
      highest: result.highest ?? 0,
      stamp: performance.now(),
    };
    if (at === undefined) {
      byName.set(`${result.layer}/${result.unit}`, kept.units.length);
      kept.units.push(summary);
    } else kept.units[at] = summary;
    if (refreshing) return;
    refreshing = true;
    setTimeout(() => {
      refreshing = false;
      filter(false);
    }, 300);
  }

  return { elements: [failures, h("h2", { class: "unseen" }, "Units"), tools, grid], load, unit, draw: () => filter(false) };
}
