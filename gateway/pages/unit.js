// A unit: its label and everything that speaks for it.
import { STAGES, api, badge, bar, count, go, h, jobName, lines, number, paths, picture, plural, problem, say, score, svg } from "./lib.js";
import { neighbours } from "./units.js";

export async function show(root, [id, layer, index], signal) {
  const [{ unit }, { job }] = await Promise.all([
    api(`/v1/jobs/${encodeURIComponent(id)}/units/${encodeURIComponent(layer)}/${index}`, { signal }),
    api(`/v1/jobs/${encodeURIComponent(id)}`, { signal }),
  ]);
  root.append(heading(job, unit, signal));
  const seen = [unit.probed?.length ? viewer(unit, signal) : null, unit.images?.length ? captions(unit) : null].filter(Boolean);
  const said = unit.concepts?.length ? [candidates(job, unit, signal)] : [];
  if (seen.length && said.length) root.append(h("div", { class: "halves" }, h("div", {}, ...seen), ...said));
  else root.append(...seen, ...said);
  root.append(...details(unit));
}

function heading(job, unit, signal) {
  const [before, after] = neighbours(job.job_id, unit.layer, unit.unit);
  const link = (other, text, keys) =>
    other
      ? h("a", { class: "button", href: paths.unit(job.job_id, other.layer, other.unit), "aria-keyshortcuts": keys }, text)
      : h("span", { class: "button off", "aria-hidden": "true" }, text);
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const other = { j: after, k: before }[event.key];
    if (other) go(paths.unit(job.job_id, other.layer, other.unit));
  }, { signal });
  const state = unit.state?.replace("UNIT_STATE_", "").toLowerCase();
  const title = unit.label || (state === "dead" ? "Dead: all its activations are equal" : state === "failed" ? "No label" : "Not ended yet");
  return h(
    "section",
    {},
    h("p", { class: "crumbs" },
      h("a", { href: "/" }, "Jobs"), " / ",
      h("a", { href: paths.job(job.job_id) }, jobName(job)), " / ",
      h("span", { class: "mono" }, `${unit.layer} unit ${unit.unit}`)),
    h("div", { class: "head" },
      h("div", { class: "job-title" }, h("h1", { class: "unit-label" }, title), state !== "labelled" && badge(unit.state)),
      h("div", { class: "actions" }, link(before, "← Previous", "k"), link(after, "Next →", "j"))),
    unit.labels?.length > 1 && h("p", { class: "also" }, "also ", ...unit.labels.slice(1).map((label) => h("span", { class: "chip" }, label))),
    unit.label && h("p", { class: "why" }, why(unit)),
    unit.message && h("p", { class: "problem" }, unit.message, unit.reason && h("span", { class: "soft" }, ` (${unit.reason})`)),
  );
}

const ranks = (concept) => concept.pictures.map((picture) => number(picture.rank)).filter((rank) => rank > 0).sort((a, b) => a - b);

/** Why the label won, in one line. */
export function why(unit) {
  const [best, second] = unit.concepts ?? [];
  if (!best?.scores) return "";
  const usable = unit.concepts.reduce((sum, concept) => sum + ranks(concept).length, 0);
  const first = ranks(best).slice(0, 5);
  const byRank = [...unit.concepts].filter((concept) => concept.scores).sort((a, b) => b.scores.topk_squared - a.scores.topk_squared);
  const place = byRank.indexOf(best) + 1;
  const excite = place === 1 ? "excite the unit most" : `excite the unit ${ordinal(place)} most`;
  const against = second?.scores ? `, against ${second.scores.image_products.toFixed(2)} of the runner-up “${second.concept}”` : "";
  const list = `best ranks ${first.join(", ")} of ${count(usable)}`;
  const alone = unit.concepts.length === 1 ? "the only candidate; " : "";
  return `Why this label: ${alone}pictures drawn of it ${excite} (${list}), and they look like the unit's own: similarity ${best.scores.image_products.toFixed(2)}${against}.`;
}

function ordinal(place) {
  return ["", "", "second", "third", "fourth", "fifth"][place] ?? `${place}th`;
}

// --- the pictures, with the activation laid over ---

function viewer(unit, signal) {
  const canvas = h("canvas", { class: "view", role: "img", width: 480, height: 360 });
  const slider = h("input", { type: "range", min: 0, max: 255, step: 1, id: "threshold", input: () => draw() });
  const mark = h("span", { class: "mark", "aria-hidden": "true" });
  const otsu = h("button", { class: "small", click: () => ((slider.value = current.threshold), draw()) });
  const value = h("output", { for: "threshold", class: "number" });
  const modes = ["Region", "Heat", "Picture"];
  let mode = "Region";
  const toggles = h("fieldset", { class: "toggle" }, h("legend", { class: "unseen" }, "What is laid over"),
    ...modes.map((name) => h("label", {}, h("input", { type: "radio", name: "mode", value: name, checked: name === mode, change: () => ((mode = name), draw()) }), h("span", {}, name))));
  const text = h("p", { class: "soft facts" });
  const strip = h("div", { class: "thumbs", role: "group", "aria-label": "Highest activating pictures" });
  let current = null;

  async function choose(at) {
    const chosen = unit.probed[at];
    const crops = (unit.crops ?? []).filter((crop) => crop.parent_digest === chosen.digest);
    for (const [i, button] of [...strip.children].entries()) button.setAttribute("aria-pressed", i === at);
    text.replaceChildren(`activation ${chosen.activation.toFixed(3)} · ${plural(crops.length, "crop")} · `, h("span", { class: "mono" }, chosen.path));
    const [image, map] = await Promise.all([load(chosen.digest), chosen.map_digest ? load(chosen.map_digest) : null]);
    if (signal.aborted) return;
    if (!image) {
      text.append(h("span", { class: "bad" }, " The picture is not kept any more."));
      return;
    }
    const threshold = crops[0]?.threshold;
    current = { chosen, image, crops, threshold, map: map && chosen.seen ? spread(map, image, chosen.seen) : null };
    const has = Boolean(current.map);
    slider.disabled = !has;
    slider.value = threshold ?? 128;
    otsu.hidden = mark.hidden = threshold === undefined;
    otsu.textContent = `Otsu's: ${threshold}`;
    mark.style.left = `calc(${(100 * (threshold ?? 0)) / 255}% + ${8 - (16 * (threshold ?? 0)) / 255}px)`;
    controls.hidden = !has;
    draw();
  }

  function draw() {
    if (!current) return;
    const { chosen, image, crops, map } = current;
    const scale = Math.min(4, 640 / Math.max(image.naturalWidth, image.naturalHeight));
    canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
    canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    value.textContent = slider.value;
    if (map && mode !== "Picture") {
      const over = new ImageData(map.width, map.height);
      const threshold = Number(slider.value);
      for (let i = 0; i < map.values.length; i++) {
        const v = map.values[i];
        if (mode === "Heat") over.data.set([255, 255 - v / 2, 0, v * 0.62], 4 * i);
        else over.data.set([8, 10, 16, v > threshold ? 0 : 178], 4 * i);
      }
      const layer = new OffscreenCanvas(map.width, map.height);
      layer.getContext("2d").putImageData(over, 0, 0);
      const { left, top, right, bottom } = chosen.seen;
      const seen = [left * scale, top * scale, (right - left) * scale, (bottom - top) * scale];
      context.drawImage(layer, ...seen);
      // What the network did not see.
      context.beginPath();
      context.rect(0, 0, canvas.width, canvas.height);
      context.rect(...seen);
      context.fillStyle = "rgb(8 10 16 / 82%)";
      context.fill("evenodd");
      for (const { box } of crops) {
        const rect = [box.left * scale, box.top * scale, (box.right - box.left) * scale, (box.bottom - box.top) * scale];
        for (const [style, width] of [["#000", 4], ["#ffd166", 2]]) Object.assign(context, { strokeStyle: style, lineWidth: width }), context.strokeRect(...rect);
      }
    }
    const share = map && (100 * map.values.filter((v) => v > Number(slider.value)).length) / map.values.length;
    const what = map ? `; above threshold ${slider.value} lies ${share.toFixed(0)} % of what the network saw` : "";
    canvas.setAttribute("aria-label", `Picture ${unit.probed.indexOf(chosen) + 1} of ${unit.probed.length}, activation ${chosen.activation.toFixed(2)}${what}`);
  }

  strip.append(...unit.probed.map((probed, at) =>
    h("button", { class: "thumb", "aria-pressed": "false", "aria-label": `Picture ${at + 1}, activation ${probed.activation.toFixed(2)}`, click: () => choose(at) }, picture(probed.digest))));
  const controls = h("div", { class: "controls" }, toggles,
    h("div", { class: "slide" }, h("label", { for: "threshold" }, "Threshold"), h("span", { class: "range" }, slider, mark), value, otsu));
  choose(0).catch(() => {});
  return h("section", { class: "card pad" },
    h("h2", {}, "What excites it"),
    h("p", { class: "soft hint" }, "Bright: where the activation lies above the threshold. Boxes: what was cut out and looked at once more."),
    h("div", { class: "frame" }, canvas), controls, text, strip);
}

function load(digest) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => resolve(null);
    image.src = paths.picture(digest);
  });
}

/** A map as 0..255 over what the network saw of the picture; none if it is even. */
function spread(map, image, seen) {
  const scale = Math.min(1, 375 / Math.max(seen.right - seen.left, seen.bottom - seen.top));
  const grow = Math.max(scale, Math.min(4, 256 / Math.max(1, seen.right - seen.left)));
  const width = Math.max(1, Math.round((seen.right - seen.left) * grow));
  const height = Math.max(1, Math.round((seen.bottom - seen.top) * grow));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(map, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  const values = new Uint8ClampedArray(width * height);
  let [lowest, highest] = [255, 0];
  for (let i = 0; i < values.length; i++) {
    lowest = Math.min(lowest, data[4 * i]);
    highest = Math.max(highest, data[4 * i]);
  }
  // The same everywhere, as of a picture of one colour: no region stands out.
  if (highest === lowest) return null;
  const range = highest - lowest;
  for (let i = 0; i < values.length; i++) values[i] = Math.round((255 * (data[4 * i] - lowest)) / range);
  return { values, width, height };
}

// --- what was said of them ---

function captions(unit) {
  return h("section", { class: "card pad" },
    h("h2", {}, "What was said of them"),
    h("p", { class: "soft hint" }, "The highest activating pictures and crops, the captioner's words, and what the language model made of them."),
    h("ol", { class: "captions" }, ...unit.images.map((image) =>
      h("li", {},
        picture(image.digest, image.caption || "not captioned"),
        h("p", {}, image.simplified || image.caption || h("span", { class: "soft" }, "not captioned")),
        image.caption && image.simplified !== image.caption && h("p", { class: "soft said" }, image.caption),
        h("p", { class: "soft facts" }, image.box ? "crop · " : "", image.activation.toFixed(2))))));
}

// --- the candidates ---

const SCORES = [
  ["topk_squared_image_products", "rank × similarity"],
  ["image_products", "similarity"],
  ["topk_squared", "−mean of the 5 best ranks²"],
  ["mean", "−mean rank"],
];

function candidates(job, unit, signal) {
  const list = h("div", { class: "competing" }, competing(unit.concepts, unit.concepts.map(() => false)));
  return h("section", { class: "card pad" },
    h("h2", {}, "Candidates"),
    h("p", { class: "soft hint" }, "Each dot is a picture drawn of a candidate; the further left, the more it excites the unit."),
    list,
    unit.images?.length ? own(job, unit, list, signal) : null);
}

function competing(concepts, isOwn) {
  const total = concepts.reduce((sum, concept) => sum + ranks(concept).length, 0);
  return h("ol", { class: "candidates" }, ...concepts.map((concept, place) => {
    const drawn = [...concept.pictures].sort((a, b) => (b.activation ?? -Infinity) - (a.activation ?? -Infinity));
    const unusable = drawn.filter((picture) => picture.unusable);
    return h("li", { class: `${place === 0 ? "best" : ""} ${isOwn[place] ? "own" : ""}` },
      h("div", { class: "candidate" },
        h("h3", {}, concept.concept, isOwn[place] && h("span", { class: "tag" }, "yours")),
        h("span", { class: "number", title: "score" }, score(concept.score))),
      strip(concept, total),
      h("div", { class: "drawn" }, ...drawn.filter((drawn) => drawn.digest).map((drawn) =>
        picture(drawn.digest, `drawn picture ${drawn.index + 1}, rank ${drawn.rank || "none"}`, {
          loading: "lazy",
          title: drawn.unusable ? `not used: ${drawn.unusable}` : `rank ${drawn.rank}, activation ${drawn.activation?.toFixed(3)}`,
          class: drawn.unusable ? "unusable" : "",
        }))),
      h("details", {}, h("summary", {}, "All scores"),
        h("dl", { class: "scores" }, ...SCORES.map(([key, text]) => h("div", {}, h("dt", {}, text), h("dd", { class: "number" }, score(concept.scores?.[key])))),
          h("div", {}, h("dt", {}, "candidate"), h("dd", { class: "number" }, `${concept.candidate + 1}`)),
          unusable.length ? h("div", {}, h("dt", {}, "not used"), h("dd", {}, [...new Set(unusable.map((picture) => picture.unusable))].join("; "))) : null)));
  }));
}

/** The ranks of a candidate's pictures among all that were drawn, as dots on a line. */
function strip(concept, total) {
  const of = ranks(concept);
  const at = (rank) => `${total > 1 ? 1.5 + (97 * (rank - 1)) / (total - 1) : 50}%`;
  return svg("svg", { class: "ranks", role: "img", "aria-label": `ranks ${of.join(", ")} of ${total}`, height: 22, width: "100%" },
    svg("line", { x1: "0", x2: "100%", y1: 11, y2: 11 }),
    ...of.map((rank) => svg("circle", { cx: at(rank), cy: 11, r: 4.5 }, svg("title", {}, `rank ${rank} of ${total}`))));
}

/** A concept of one's own, which competes with the candidates. */
function own(job, unit, list, signal) {
  const input = h("input", { id: "own", name: "concept", placeholder: "such as: striped textiles", autocomplete: "off", maxlength: 200, required: true });
  const button = h("button", { class: "main" }, "Let it compete");
  const told = h("div", { role: "status", class: "soft told" });
  const tried = [];
  const form = h("form", {
    class: "own-concept",
    submit: async (event) => {
      event.preventDefault();
      const concept = input.value.trim();
      if (!concept) return;
      if (!tried.includes(concept)) tried.push(concept);
      button.disabled = true;
      told.replaceChildren("Asking …");
      try {
        const result = await compete(concept);
        list.replaceChildren(competing(result.concepts, result.concepts.map((ranked) => tried.includes(ranked.concept))));
        const place = result.concepts.findIndex((ranked) => ranked.concept === concept) + 1;
        const best = result.concepts[0].concept;
        told.replaceChildren(
          place === 1 ? `“${concept}” wins against ${plural(result.concepts.length - 1, "candidate")}.`
            : place ? `“${concept}” comes ${ordinal(place)} of ${result.concepts.length}; “${best}” stays ahead.` : `“${concept}” was a candidate already.`);
        input.value = "";
      } catch (error) {
        if (!signal.aborted) told.replaceChildren(problem(error));
      }
      button.disabled = false;
    },
  }, h("label", { for: "own" }, "Try a concept of your own"), h("div", { class: "line" }, input, button), told);

  async function compete() {
    // As the job's, so that the pictures of its candidates are drawn no second time.
    const concepts = [...unit.concepts].sort((a, b) => a.candidate - b.candidate).map((ranked) => ranked.concept);
    const provenance = job.accepted?.provenance ?? {};
    const request = {
      target: { ...job.request.target, digest: provenance.target_digest, preprocessing: provenance.preprocessing },
      layer: unit.layer,
      unit: unit.unit,
      concepts: [...concepts, ...tried.filter((concept) => !concepts.includes(concept))],
      stored: { images: unit.images },
      parameters: provenance.parameters,
    };
    for await (const event of lines("/v1/select", request, signal)) {
      if (event.progress) {
        const { stage, done, total } = event.progress;
        told.replaceChildren(`${STAGES[stage]?.[0] ?? stage} …`, bar(`${STAGES[stage]?.[0]}`, number(done), number(total)));
      }
      if (event.unit) return event.unit;
    }
    throw new Error("The mesh ended the selection without a result.");
  }
  return form;
}

// --- the rest ---

function details(unit) {
  const parts = [];
  if (unit.answers?.length) {
    parts.push(h("details", { class: "card pad" }, h("summary", {}, `What the language model answered (${unit.answers.length})`),
      h("ol", {}, ...unit.answers.map((answer) => h("li", { class: "answer" }, answer)))));
  }
  if (unit.warnings?.length) {
    parts.push(h("details", { class: "card pad" }, h("summary", {}, `What was left out (${unit.warnings.length})`),
      h("ul", {}, ...unit.warnings.map((warning) => h("li", {}, warning)))));
  }
  parts.push(h("p", { class: "soft facts" },
    `Over the probing set its activation runs from ${Number(unit.lowest).toFixed(3)} to ${Number(unit.highest).toFixed(3)}.`,
    number(unit.not_finite) ? ` On ${plural(unit.not_finite, "picture")} it was not finite.` : ""));
  return parts;
}
