// A network: what its layers hold, and which concepts many units share.
import { api, bar, count, h, jobName, pagesOf, paths, plural } from "./lib.js";

/** Concepts of a layer that are shown before one asks for more. */
const SHOWN = 24;

export async function show(root, [id], signal) {
  const { job } = await api(`/v1/jobs/${encodeURIComponent(id)}`, { signal });
  const told = h("p", { class: "soft", role: "status" }, "Reading …");
  root.append(
    h("p", { class: "crumbs" }, h("a", { href: "/" }, "Jobs"), " / ", h("a", { href: paths.job(id) }, jobName(job)), " / by layer"),
    h("div", { class: "head" }, h("h1", {}, `What ${jobName(job)} holds`)),
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
