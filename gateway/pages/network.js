// A network: what its layers hold, and which concepts many units share.
import { api, bar, count, h, jobName, pagesOf, paths, picture, plural, problem } from "./lib.js";

/** Concepts of a layer that are shown before one asks for more. */
const SHOWN = 24;
/** Units nearest to a word that are shown. */
const NEAREST = 24;

export async function show(root, [id], signal) {
  const { job } = await api(`/v1/jobs/${encodeURIComponent(id)}`, { signal });
  const told = h("p", { class: "soft", role: "status" }, "Reading …");
  root.append(
    h("p", { class: "crumbs" }, h("a", { href: "/" }, "Jobs"), " / ", h("a", { href: paths.job(id) }, jobName(job)), " / by layer"),
    h("div", { class: "head" }, h("h1", {}, `What ${jobName(job)} holds`)),
    nearest(id, signal),
    told,
  );
  const layers = new Map((job.accepted?.layers ?? []).map((layer) => [layer.layer, []]));
  let read = 0;
  for await (const { units } of pagesOf(`/v1/jobs/${encodeURIComponent(id)}/units`, 5000, signal)) {
    for (const unit of units) {
      if (!layers.has(unit.layer)) layers.set(unit.layer, []);
      layers.get(unit.layer).push(unit);
    }
    read += units.length;
    told.textContent = `Read ${count(read)} of ${plural(job.units?.total, "unit")} …`;
  }
  const all = [...layers.values()].flat();
  told.textContent = `${plural(all.length, "unit")}, ${plural(concepts(all).length, "different label")}. The larger a word, the more units of the layer have it.`;
  root.append(h("div", { class: "layers" }, ...[...layers].map(([layer, units]) => part(id, layer, units))));
}

/** Units whose labels are nearest to a word. */
function nearest(id, signal) {
  const word = h("input", { id: "near", name: "near", type: "search", placeholder: "such as: fur", maxlength: 200, required: true, value: new URLSearchParams(location.search).get("near") ?? "" });
  const told = h("p", { class: "soft", role: "status" });
  const list = h("ol", { class: "near" });
  async function find() {
    const text = word.value.trim();
    if (!text) return;
    told.textContent = "Looking …";
    try {
      const { units } = await api(`/v1/jobs/${encodeURIComponent(id)}/nearest?${new URLSearchParams({ text, most: NEAREST })}`, { signal });
      told.textContent = units.length ? `${plural(units.length, "unit")} whose labels are nearest to “${text}”, nearest first` : "No unit has a label yet.";
      list.replaceChildren(...units.map(({ unit, similarity }) =>
        h("li", {}, h("a", { href: paths.unit(id, unit.layer, unit.unit) }, h("span", { class: "strip small" }, ...unit.images.slice(0, 3).map((digest) => picture(digest, "", { loading: "lazy" }))),
          h("span", {}, unit.labels.join(" · ")), h("span", { class: "soft facts" }, h("span", { class: "mono" }, `${unit.layer} · ${unit.unit}`), ` · ${similarity.toFixed(3)}`)))));
      history.replaceState({}, "", `${location.pathname}?${new URLSearchParams({ near: text })}`);
    } catch (error) {
      if (signal.aborted) return;
      told.textContent = "";
      list.replaceChildren(problem(error));
    }
  }
  if (word.value) find();
  return h("section", { class: "card pad" },
    h("form", { class: "own", submit: (event) => (event.preventDefault(), find()) },
      h("label", { for: "near" }, "Units nearest to a word"), h("div", { class: "line" }, word, h("button", {}, "Find"))),
    told, list);
}

/** Labels with the number of units that have each, most first. */
function concepts(units) {
  const counts = new Map();
  for (const unit of units) if (unit.label) counts.set(unit.label, (counts.get(unit.label) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0]));
}

function part(id, layer, units) {
  const list = concepts(units);
  const labelled = units.filter((unit) => unit.label).length;
  const states = ["DEAD", "FAILED"].map((state) => [state.toLowerCase(), units.filter((unit) => unit.state === `UNIT_STATE_${state}`).length]);
  const most = list[0]?.[1] ?? 1;
  const cloud = h("ul", { class: "cloud" });
  const link = ([label, times]) => {
    const query = new URLSearchParams({ layer, q: `"${label}"` });
    return h("li", {}, h("a", { href: `${paths.job(id)}?${query}`, style: { fontSize: `${0.82 + 0.75 * Math.sqrt((times - 1) / Math.max(1, most - 1))}rem` } },
      label, h("span", { class: "soft number" }, ` ${times}`)));
  };
  cloud.append(...list.slice(0, SHOWN).map(link));
  const more = list.length > SHOWN && h("button", { class: "small", click: (event) => (cloud.append(...list.slice(SHOWN).map(link)), event.target.remove()) }, `${count(list.length - SHOWN)} more`);
  const facts = [plural(units.length, "unit"), plural(list.length, "label"), ...states.filter(([, times]) => times).map(([name, times]) => `${count(times)} ${name}`)];
  return h("section", { class: "card pad" },
    h("h2", {}, h("a", { href: `${paths.job(id)}?${new URLSearchParams({ layer })}`, class: "mono" }, layer)),
    bar(`Units of ${layer} with a label`, labelled, units.length),
    h("p", { class: "soft facts" }, facts.join(" · ")),
    cloud, more);
}
