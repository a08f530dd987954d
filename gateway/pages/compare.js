// Two jobs side by side: where they say the same of a unit, and where not.
import { api, count, go, h, jobName, pagesOf, paths, picture, plural, score } from "./lib.js";

const SHOWN = 100;

export async function show(root, _, signal) {
  const query = new URLSearchParams(location.search);
  const { jobs } = await api("/v1/jobs?page_size=1000", { signal });
  const ids = { a: query.get("a") ?? "", b: query.get("b") ?? "" };
  const name = (job) => `${jobName(job)} · ${new Date(job.created_at).toLocaleString()} · ${job.job_id.slice(0, 8)}`;
  const choose = (side, label) => {
    const select = h("select", { id: side, change: () => go(`/compare?${new URLSearchParams({ ...ids, [side]: select.value })}`) },
      h("option", { value: "" }, "choose a job"), ...jobs.map((job) => h("option", { value: job.job_id }, name(job))));
    select.value = ids[side];
    return h("div", { class: "field" }, h("label", { for: side }, label), select);
  };
  root.append(h("div", { class: "head" }, h("h1", {}, "Compare")),
    h("p", { class: "soft" }, "Two jobs on one network: with another seed, captioner or language model, say."),
    h("div", { class: "two" }, choose("a", "First job"), choose("b", "Second job")));
  if (!ids.a || !ids.b) return;
  const told = h("p", { class: "soft", role: "status" }, "Reading …");
  root.append(told);
  const [a, b] = await Promise.all([ids.a, ids.b].map((id) => read(id, signal)));
  const both = [...a.values()].filter((unit) => b.has(key(unit))).map((unit) => [unit, b.get(key(unit))]);
  const labelled = both.filter(([one, other]) => one.label && other.label);
  const same = labelled.filter(([one, other]) => one.label === other.label);
  const share = labelled.length ? ` (${Math.round((100 * same.length) / labelled.length)} %)` : "";
  told.textContent = both.length
    ? `${plural(both.length, "unit")} in both, ${count(labelled.length)} labelled in both; the same label for ${count(same.length)}${share}.`
    : "The two jobs have no unit in common.";
  if (!both.length) return;
  root.append(h("p", {}, h("a", { class: "button", href: `/studies/new?${new URLSearchParams([["job", ids.a], ["job", ids.b]])}` }, "Have people rate both")));
  const only = h("input", { type: "checkbox", checked: true, change: () => draw() });
  const body = h("tbody", {});
  const more = h("button", { click: () => draw(body.children.length + SHOWN) }, "More");
  function draw(upTo = SHOWN) {
    const rows = only.checked ? both.filter(([one, other]) => one.label !== other.label && hasEnded(one) && hasEnded(other)) : both;
    const none = h("tr", {}, h("td", { colspan: 4, class: "soft" }, "They say the same of every unit that has ended in both."));
    body.replaceChildren(...(rows.length ? rows.slice(0, upTo).map(row) : [none]));
    more.hidden = rows.length <= upTo;
  }
  const side = (id, unit) =>
    h("td", {}, h("a", { href: paths.unit(id, unit.layer, unit.unit) }, unit.label || (hasEnded(unit) ? unit.state.replace("UNIT_STATE_", "").toLowerCase() : "not ended")), h("span", { class: "soft number" }, ` ${score(unit.score)}`));
  const row = ([one, other]) =>
    h("tr", {}, h("th", { scope: "row", class: "mono" }, `${one.layer} · ${one.unit}`), h("td", { class: "strip small" }, ...one.images.slice(0, 3).map((digest) => picture(digest, "", { loading: "lazy" }))), side(ids.a, one), side(ids.b, other));
  root.append(h("label", { class: "leaf" }, only, "Only where they differ"),
    h("div", { class: "scroll card", tabindex: 0, role: "region", "aria-label": "Units of both jobs" }, h("table", { class: "plain wide" }, h("thead", {}, h("tr", {}, ...["Unit", "Pictures", "First job", "Second job"].map((text) => h("th", { scope: "col" }, text)))), body)), more);
  draw();
}

const hasEnded = (unit) => unit.state && unit.state !== "UNIT_STATE_UNSPECIFIED";
const key = (unit) => `${unit.layer}/${unit.unit}`;

async function read(id, signal) {
  const units = new Map();
  for await (const page of pagesOf(`/v1/jobs/${encodeURIComponent(id)}/units`, 5000, signal)) for (const unit of page.units) units.set(key(unit), unit);
  return units;
}
