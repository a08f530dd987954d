// Starting a job: which network, which of its units, which pictures, and the method's constants.
import { Problem, api, bar, count, go, h, parseUnits, paths, plural, problem, say } from "./lib.js";

const PICTURE = /\.(png|jpe?g|webp|gif|bmp|tiff?|ppm|pgm|pbm|pnm)$/i;
/** Uploads side by side. */
const AT_A_TIME = 6;

export async function show(root, _, signal) {
  const target = chooser("target", "Network", {
    uri: ["Where it lies", "file:///path/to/network.onnx", "An ONNX file that the mesh can read. A preprocessor_config.json beside it says how pictures become its input."],
    upload: ["Upload", { accept: ".onnx" }, "One ONNX file, with its weights inside. ImageNet's usual pre-processing is taken for it."],
  });
  const pictures = chooser("pictures", "Pictures", {
    uri: ["Where they lie", "file:///path/to/pictures", "A folder, searched with its subfolders, or a .tar file. Several: one a line.", true],
    upload: ["Upload a folder", { webkitdirectory: true, multiple: true }, "The pictures that the network is probed with. A few thousand of many kinds say most."],
  });
  const layers = layerTree();
  const told = h("div", { role: "status" });
  const read = h("button", {
    type: "button",
    click: async () => {
      read.disabled = true;
      told.replaceChildren(h("p", { class: "soft" }, "Reading the network …"));
      try {
        const described = await api("/v1/layers", { method: "POST", body: { target: await resolveTarget() }, signal });
        layers.show(described);
        told.replaceChildren();
        say(plural(described.layers.length, "layer"));
      } catch (error) {
        if (!signal.aborted) told.replaceChildren(problem(error));
      }
      read.disabled = false;
    },
  }, "Read its layers");
  const parameters = await constants(signal);
  const start = h("button", { class: "main" }, "Start");

  async function resolveTarget() {
    const { uri, files } = target.value();
    if (uri !== undefined) {
      if (!uri) throw new Problem({ detail: "Name the network, or upload it." });
      return { uri };
    }
    if (!files.length) throw new Problem({ detail: "Choose the network's ONNX file." });
    return { digest: await upload(files[0], files[0].name) };
  }

  async function resolvePictures() {
    const { uri, files } = pictures.value();
    if (uri !== undefined) {
      const uris = uri.split("\n").map((line) => line.trim()).filter(Boolean);
      if (!uris.length) throw new Problem({ detail: "Name a folder of pictures, or upload one." });
      return uris.map((uri) => ({ uri }));
    }
    const chosen = files.filter((file) => PICTURE.test(file.name));
    if (!chosen.length) throw new Problem({ detail: "Choose a folder with pictures." });
    const listed = [];
    const waiting = [...chosen];
    const work = async () => {
      for (let file = waiting.pop(); file; file = waiting.pop()) {
        // Without the folder's own name, as a folder that is read in place has its paths.
        const path = file.webkitRelativePath.split("/").slice(1).join("/") || file.name;
        listed.push({ path, digest: await upload(file, null) });
        told.replaceChildren(h("p", { class: "soft" }, `Uploaded ${count(listed.length)} of ${plural(chosen.length, "picture")}`), bar("Uploaded pictures", listed.length, chosen.length));
      }
    };
    await Promise.all(Array.from({ length: AT_A_TIME }, work));
    const { list_digest } = await api("/v1/probing-sets", { method: "POST", body: { pictures: listed }, signal });
    return [{ list_digest }];
  }

  async function upload(file, shown) {
    if (!crypto.subtle) throw new Problem({ detail: "Browsers upload by digest on https and on localhost only; name a place that the mesh can read instead." });
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
    const digest = [...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    const place = `/v1/uploads/${digest}`;
    const { complete, received } = await api(place, { signal });
    if (complete) return digest;
    if (shown) told.replaceChildren(h("p", { class: "soft" }, `Uploading ${shown} …`));
    const rest = file.slice(received ?? 0);
    const headers = received ? { "content-range": `bytes ${received}-${file.size - 1}/${file.size}` } : {};
    await api(place, { method: "PUT", body: rest, headers, signal });
    return digest;
  }

  const form = h("form", {
    novalidate: true,
    submit: async (event) => {
      event.preventDefault();
      start.disabled = true;
      try {
        const asked = layers.value();
        const request = {
          request_id: crypto.randomUUID?.() ?? "",
          target: await resolveTarget(),
          layers: asked,
          probing_set: { sources: await resolvePictures() },
          parameters: parameters.value(),
        };
        told.replaceChildren(h("p", { class: "soft" }, "Starting …"));
        const { job } = await api("/v1/jobs", { method: "POST", body: { request }, signal });
        go(paths.job(job.job_id));
      } catch (error) {
        if (!signal.aborted) told.replaceChildren(problem(error));
        start.disabled = false;
      }
    },
  },
    h("div", { class: "new" },
      h("section", { class: "card pad" }, h("h2", {}, "1 · Network"), target.element, read),
      h("section", { class: "card pad" }, h("h2", {}, "2 · Units"), layers.element),
      h("section", { class: "card pad" }, h("h2", {}, "3 · Pictures"), pictures.element),
      h("section", { class: "card pad" }, h("h2", {}, "4 · Method"), parameters.element)),
    told, h("div", { class: "actions" }, start));
  root.append(h("div", { class: "head" }, h("h1", {}, "New job")), form);
}

/** A thing that is named by its place or uploaded. */
function chooser(id, label, { uri, upload }) {
  const place = uri[3]
    ? h("textarea", { id: `${id}-uri`, rows: 2, placeholder: uri[1], spellcheck: "false" })
    : h("input", { id: `${id}-uri`, placeholder: uri[1], spellcheck: "false", autocomplete: "off" });
  const file = h("input", { id: `${id}-file`, type: "file", ...upload[1] });
  const ways = {
    uri: h("div", { class: "field" }, h("label", { for: `${id}-uri` }, uri[0]), place, h("p", { class: "soft hint" }, uri[2])),
    upload: h("div", { class: "field", hidden: true }, h("label", { for: `${id}-file` }, upload[0]), file, h("p", { class: "soft hint" }, upload[2])),
  };
  let way = "uri";
  const choose = (chosen) => {
    way = chosen;
    for (const [name, element] of Object.entries(ways)) element.hidden = name !== way;
  };
  const toggle = h("fieldset", { class: "toggle" }, h("legend", { class: "unseen" }, `${label}: how it is given`),
    ...[["uri", uri[0]], ["upload", upload[0]]].map(([name, text]) =>
      h("label", {}, h("input", { type: "radio", name: id, checked: name === way, change: () => choose(name) }), h("span", {}, text))));
  return {
    element: h("div", {}, toggle, ways.uri, ways.upload),
    value: () => (way === "uri" ? { uri: place.value.trim() } : { files: [...file.files] }),
  };
}

/** The layers of a network as a tree of their names, each with a box and the units that are wanted of it. */
function layerTree() {
  const tree = h("div", { class: "tree" });
  const find = h("input", { type: "search", placeholder: "Search layers", "aria-label": "Search layers", hidden: true, input: () => filter() });
  const named = h("input", { id: "layer-names", placeholder: "such as: layer4.2", autocomplete: "off", spellcheck: "false" });
  const byHand = h("div", { class: "field" }, h("label", { for: "layer-names" }, "Layers"), named,
    h("p", { class: "soft hint" }, "Read the network's layers to pick from them, or name some here, with commas between."));
  const units = h("input", { id: "units", placeholder: "all", autocomplete: "off" });
  const chosen = new Map();
  let rows = [];

  function show({ layers, warnings }) {
    chosen.clear();
    rows = [];
    const top = { inside: new Map() };
    for (const layer of layers) {
      let node = top;
      for (const part of layer.name.split(/[./]/).filter(Boolean)) {
        if (!node.inside.has(part)) node.inside.set(part, { inside: new Map() });
        node = node.inside.get(part);
      }
      node.layer = layer;
    }
    tree.replaceChildren(...(warnings ?? []).map((warning) => h("p", { class: "notice" }, warning)), ...branch(top));
    find.hidden = layers.length < 12;
    byHand.hidden = true;
  }

  function branch(node) {
    return [...node.inside].flatMap(([name, child]) => {
      const elements = [];
      if (child.layer) elements.push(leaf(child.layer));
      if (child.inside.size) {
        const only = child.inside.size === 1 && !child.layer;
        elements.push(h("details", { open: only || node.inside.size < 8 }, h("summary", {}, name, h("span", { class: "soft" }, ` ${plural(leaves(child), "layer")}`)), h("div", { class: "inside" }, ...branch(child))));
      }
      return elements;
    });
  }

  const leaves = (node) => [...node.inside.values()].reduce((sum, child) => sum + leaves(child) + (child.layer ? 1 : 0), 0);

  function leaf(layer) {
    const box = h("input", { type: "checkbox", change: () => (box.checked ? chosen.set(layer.name, layer) : chosen.delete(layer.name)) });
    const map = layer.map?.length ? `, ${layer.map.join(" × ")}` : "";
    const row = h("label", { class: "leaf" }, box, h("span", { class: "mono" }, layer.name),
      h("span", { class: "soft" }, ` ${layer.units ? plural(layer.units, "unit") : "units"}${map} · ${layer.operator}`));
    rows.push([row, layer.name.toLowerCase()]);
    return row;
  }

  function filter() {
    const text = find.value.toLowerCase();
    for (const [row, name] of rows) row.hidden = !name.includes(text);
    for (const details of tree.querySelectorAll("details")) {
      const has = Boolean(details.querySelector(".leaf:not([hidden])"));
      details.hidden = !has;
      if (text) details.open = has;
    }
  }

  return {
    show,
    element: h("div", {}, byHand, find, tree,
      h("div", { class: "field" }, h("label", { for: "units" }, "Units of each"), units, h("p", { class: "soft hint" }, "all, or numbers and ranges such as 0-9,17"))),
    value: () => {
      const names = chosen.size ? [...chosen.keys()] : named.value.split(",").map((name) => name.trim()).filter(Boolean);
      if (!names.length) throw new Problem({ detail: "Choose at least one layer." });
      return names.map((layer) => ({ layer, units: parseUnits(units.value) }));
    },
  };
}

/** The method's constants, from the API's own description: what each is, and its default. */
async function constants(signal) {
  const { components } = await api("/openapi.json", { signal });
  const schemas = components.schemas;
  const inOrder = Object.entries(schemas.Parameters.properties).sort(([, a], [, b]) => a["x-order"] - b["x-order"]);
  const fields = inOrder.map(([name, schema]) => {
    const id = `parameter-${name}`;
    const normal = schema.description.match(/Default ([^\s,;(]+?)[.,;]?(?=\s|$)/)?.[1] ?? "";
    const of = schema.$ref && schemas[schema.$ref.split("/").pop()];
    const options = of ? of.enum.filter((value) => !value.endsWith("_UNSPECIFIED")) : schema.type === "boolean" ? ["true", "false"] : null;
    const input = options
      ? h("select", { id }, h("option", { value: "" }, `default: ${normal}`), ...options.map((value) => h("option", { value }, value)))
      : h("input", { id, inputmode: "decimal", placeholder: normal, autocomplete: "off" });
    const parse = (text) => {
      if (schema.type === "boolean") return text === "true";
      if (schema.type !== "number" && schema.type !== "integer") return text;
      if (text.trim() === "" || Number.isNaN(Number(text))) throw new Problem({ detail: `${text} is not a number`, field: name });
      return Number(text);
    };
    return { name, input, parse, element: h("div", { class: "field" }, h("label", { for: id, class: "mono" }, name), input, h("p", { class: "soft hint" }, schema.description)) };
  });
  return {
    element: h("details", {}, h("summary", {}, `${fields.length} constants; left alone they have the paper's values`), h("div", { class: "parameters" }, ...fields.map((field) => field.element))),
    value: () => Object.fromEntries(fields.filter((field) => field.input.value.trim() !== "").map((field) => [field.name, field.parse(field.input.value)])),
  };
}
