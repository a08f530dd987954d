// Rating studies (A.1.5): all of them, a new one, and what came of one.
import { Problem, ago, api, count, ended, go, h, jobName, number, pagesOf, picture, plural, problem, svg } from "./lib.js";

const address = (study, more = "") => `/studies/${encodeURIComponent(study)}${more}`;

export const list = {
  async show(root, _, signal) {
    root.append(
      h("div", { class: "head" }, h("h1", {}, "Studies"), h("a", { class: "button main", href: "/studies/new" }, "New study")),
      h("p", { class: "soft" }, "People see a unit's pictures and the labels that several methods gave it, without knowing whose they are, and rate each."));
    const items = h("ul", { class: "jobs", "aria-label": "Studies" });
    root.append(items);
    for await (const { studies } of pagesOf("/v1/studies", 100, signal)) {
      items.append(...studies.map((study) =>
        h("li", { class: "card job" },
          h("h2", {}, h("a", { href: address(study.study_id) }, study.name)),
          h("p", {}, study.methods.join(" · ")),
          h("p", { class: "soft facts" }, `${plural(study.units, "unit")} · ${plural(study.responses, "rating")} · `, ago(study.created_at)))));
    }
    if (!items.children.length) items.append(h("li", { class: "empty" }, h("p", {}, "No study yet.")));
  },
};

// --- a new one ---

export const create = {
  async show(root, _, signal) {
    const wanted = new URLSearchParams(location.search).getAll("job");
    const { jobs } = await api("/v1/jobs?page_size=1000", { signal });
    const methods = jobs.filter((job) => ended(job.state) && number(job.units?.labelled)).map((job) => method(job, wanted.includes(job.job_id)));
    const name = h("input", { id: "name", required: true, maxlength: 200, placeholder: "such as: two captioners on layer 4", autocomplete: "off" });
    const files = h("input", { id: "labels", type: "file", multiple: true, accept: ".csv,text/csv" });
    const units = h("input", { id: "units-per-layer", type: "number", min: 0, placeholder: "all" });
    const raters = h("input", { id: "raters", type: "number", min: 1, max: 1000, value: 3 });
    const told = h("div", { role: "status" });
    const start = h("button", { class: "main" }, "Create");
    const form = h("form", {
      submit: async (event) => {
        event.preventDefault();
        start.disabled = true;
        told.replaceChildren();
        try {
          const others = await Promise.all([...files.files].map(async (file) => ({ name: file.name.replace(/(\.cosy)?\.csv$/i, ""), labels: { labels: labelsOf(await file.text(), file.name) } })));
          const body = {
            name: name.value,
            methods: [...methods.map((method) => method.value()).filter(Boolean), ...others],
            units_per_layer: number(units.value),
            raters_per_unit: number(raters.value),
          };
          const { study } = await api("/v1/studies", { method: "POST", body, signal });
          go(address(study.study_id));
        } catch (error) {
          if (!signal.aborted) told.replaceChildren(problem(error));
          start.disabled = false;
        }
      },
    },
      h("div", { class: "new" },
        h("section", { class: "card pad" }, h("h2", {}, "1 · Methods"),
          h("p", { class: "soft hint" }, "Two or more, each by the labels it gave the same units: jobs on one network, with another seed, captioner or language model, say. Raters see the pictures of the first."),
          methods.length ? h("ul", { class: "methods" }, ...methods.map((method) => method.element)) : h("p", {}, "No job has ended with labels yet."),
          h("div", { class: "field" }, h("label", { for: "labels" }, "Labels of other methods"), files,
            h("p", { class: "soft hint" }, "CSV files with the columns layer, unit and description, as CoSy has them; a method is called as its file."))),
        h("section", { class: "card pad" }, h("h2", {}, "2 · Study"),
          h("div", { class: "field" }, h("label", { for: "name" }, "Name"), name),
          h("div", { class: "field" }, h("label", { for: "units-per-layer" }, "Units of each layer"), units,
            h("p", { class: "soft hint" }, "Drawn at random from those that all methods have a label for; the paper has 200 of ResNet-50's layers, 50 of ResNet-18's.")),
          h("div", { class: "field" }, h("label", { for: "raters" }, "Raters of each unit"), raters, h("p", { class: "soft hint" }, "The paper has 3.")))),
      told, h("div", { class: "actions" }, start));
    root.append(h("p", { class: "crumbs" }, h("a", { href: "/studies" }, "Studies"), " / new"), h("div", { class: "head" }, h("h1", {}, "New study")), form);
  },
};

/** A job that may be one of the methods. */
function method(job, chosen) {
  const id = `job-${job.job_id}`;
  const called = `${jobName(job)} ${job.job_id.slice(-4)}`;
  const box = h("input", { type: "checkbox", id, checked: chosen, change: () => (name.hidden = !box.checked) });
  const name = h("input", { value: called, "aria-label": `What the method of ${called} is called`, hidden: !chosen, maxlength: 100 });
  return {
    element: h("li", {}, h("label", { class: "leaf", for: id }, box, called, h("span", { class: "soft" }, `${plural(job.units.labelled, "label")} · `, ago(job.created_at))), name),
    value: () => box.checked && { name: name.value, job_id: job.job_id },
  };
}

/** The labels of a table with the columns layer, unit and description. */
function labelsOf(text, file) {
  const [head = [], ...rows] = cellsOf(text);
  const columns = head.map((name) => name.trim().toLowerCase());
  const at = ["layer", "unit", "description"].map((name) => columns.indexOf(name));
  if (at.includes(-1)) throw new Problem({ detail: `${file}: its first line has no column “${["layer", "unit", "description"][at.indexOf(-1)]}”` });
  return rows.filter((row) => row.length > 1).map((row, i) => {
    const [layer, unit, label] = at.map((place) => row[place] ?? "");
    if (!/^\d+$/.test(unit)) throw new Problem({ detail: `${file}: row ${i + 2} has the unit “${unit}”, which is no number` });
    return { layer, unit: Number(unit), label };
  });
}

/** The rows and cells of CSV (RFC 4180). */
function cellsOf(text) {
  const rows = [[]];
  for (const [, quoted, plain, end] of text.replace(/^\ufeff/, "").matchAll(/(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|$)/g)) {
    rows.at(-1).push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
    if (end === "") break;
    if (end !== ",") rows.push([]);
  }
  return rows;
}

// --- what came of one ---

const SHOWN = 50;

export const results = {
  async show(root, [id], signal) {
    const { study, raters, valid, results } = await api(`/v1/studies/${encodeURIComponent(id)}`, { signal });
    const told = h("div", {});
    const remove = h("button", {
      class: "danger",
      click: async () => {
        if (!confirm("Delete this study and its ratings for good?")) return;
        try {
          await api(`/v1/studies/${encodeURIComponent(id)}`, { method: "DELETE" });
          go("/studies");
        } catch (error) {
          told.replaceChildren(problem(error));
        }
      },
    }, "Delete");
    const share = study.responses ? ` (${Math.round((100 * valid) / study.responses)} %)` : "";
    const layers = [...new Set(results.map((result) => result.layer))].filter(Boolean);
    const more = h("button", { click: () => draw(body.children.length + SHOWN) }, "More");
    const body = h("tbody", {});
    function draw(upTo = SHOWN) {
      body.replaceChildren(...study.shown.slice(0, upTo).map((unit) =>
        h("tr", {}, h("th", { scope: "row", class: "mono" }, `${unit.layer} · ${unit.unit}`),
          h("td", { class: "strip small" }, ...unit.pictures.slice(0, 3).map((digest) => picture(digest, "", { loading: "lazy" }))),
          ...unit.labels.map((label) => h("td", {}, label)))));
      more.hidden = study.shown.length <= upTo;
    }
    draw();
    root.append(
      h("p", { class: "crumbs" }, h("a", { href: "/studies" }, "Studies"), " / ", h("span", { class: "mono" }, id)),
      h("div", { class: "head" }, h("h1", {}, study.name),
        h("div", { class: "actions" },
          h("a", { class: "button main", href: address(id, "/rate") }, "Rate"),
          h("a", { class: "button", href: `/v1/studies/${encodeURIComponent(id)}/ratings`, download: "" }, "Ratings (CSV)"), remove)),
      told,
      h("p", { class: "soft facts" },
        `${plural(study.units, "unit")}, each for ${plural(study.raters_per_unit, "rater")} · ${plural(study.responses, "response")} of ${plural(raters, "person", "people")}, `,
        `${count(valid)} of them valid${share} · begun `, ago(study.created_at)),
      h("p", { class: "soft" }, "Raters go to ", h("code", {}, `${location.origin}${address(id, "/rate")}`)),
      h("section", { class: "card pad" }, h("h2", {}, "Results"),
        h("p", { class: "soft hint" }, "A response is valid if the label that it chooses as best is one of those that it rates highest; the others are left out. Intervals are of 95 % and allow for responses to one unit being alike."),
        table("Results over all layers", results.filter((result) => !result.layer))),
      layers.length > 1 && h("details", { class: "card pad" }, h("summary", {}, "By layer"),
        ...layers.flatMap((layer) => [h("h3", { class: "mono" }, layer), table(`Results of ${layer}`, results.filter((result) => result.layer === layer))])),
      h("details", { class: "card pad" }, h("summary", {}, "What is compared"),
        h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "What is compared" },
          h("table", { class: "plain wide" }, h("thead", {}, h("tr", {}, ...["Unit", "Pictures", ...study.methods].map((text) => h("th", { scope: "col" }, text)))), body)), more));
  },
};

function table(name, results) {
  const heads = ["Method", "Mean rating", "", "Selected as best", "Responses"];
  const percent = (share) => (100 * share).toFixed(1);
  const interval = (interval, text) => interval && h("span", { class: "soft number" }, ` ${text(interval.low)} to ${text(interval.high)}`);
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": name },
    h("table", { class: "plain wide" },
      h("thead", {}, h("tr", {}, ...heads.map((text) => (text ? h("th", { scope: "col" }, text) : h("td", {}))))),
      h("tbody", {}, ...results.map((result) =>
        h("tr", {}, h("th", { scope: "row" }, result.method),
          h("td", {}, result.mean == null ? "–" : h("strong", { class: "number" }, result.mean.toFixed(2)), interval(result.mean_interval, (mean) => mean.toFixed(2))),
          h("td", {}, scale(result)),
          h("td", {}, result.share == null ? "–" : h("strong", { class: "number" }, `${percent(result.share)} %`), interval(result.share_interval, percent)),
          h("td", { class: "number" }, count(result.responses)))))));
}

/** The mean on a line from 1 to 5, with its interval. */
function scale({ mean, mean_interval: interval }) {
  const at = (rating) => `${2 + 96 * ((rating - 1) / 4)}%`;
  return svg("svg", { class: "scale", "aria-hidden": "true", width: "9rem", height: 16 },
    svg("line", { x1: at(1), x2: at(5), y1: 8, y2: 8 }),
    ...(interval ? [svg("line", { class: "interval", x1: at(interval.low), x2: at(interval.high), y1: 8, y2: 8 })] : []),
    ...(mean == null ? [] : [svg("circle", { cx: at(mean), cy: 8, r: 4.5 })]));
}
