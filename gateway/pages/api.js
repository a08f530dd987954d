// The API, described by itself, and to be tried.
import { api, h, problem } from "./lib.js";

const main = document.getElementById("main");
const root = h("div", { class: "page" });
main.append(root);
try {
  const document = await api("/openapi.json");
  const operations = Object.entries(document.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, operation]) => ({ path, method, ...operation })));
  root.append(
    h("div", { class: "head" }, h("h1", {}, "API"), h("a", { class: "button", href: "/openapi.json" }, "openapi.json")),
    h("p", { class: "soft" }, document.info.description),
    h("p", { class: "soft" }, "The same services answer gRPC-Web on this port, and gRPC on the orchestrator's."),
    ...operations.map((operation) => show(operation, document.components.schemas)),
    h("h2", {}, "Messages"),
    ...Object.entries(document.components.schemas).sort(([a], [b]) => a.localeCompare(b)).map(([name, schema]) => message(name, schema)));
  if (location.hash) window.document.getElementById(location.hash.slice(1))?.setAttribute("open", "");
} catch (error) {
  root.append(problem(error));
}

function show({ path, method, summary, parameters, requestBody, responses }, schemas) {
  const inputs = parameters.map((parameter) => [parameter, h("input", { id: `${method}${path}-${parameter.name}`, autocomplete: "off" })]);
  const kind = requestBody && Object.keys(requestBody.content)[0];
  const schema = requestBody?.content[kind]?.schema;
  const body = kind === "application/json" && h("textarea", { rows: 6, spellcheck: "false", class: "mono", id: `${method}${path}-body`, value: example(schema, schemas) });
  const file = kind && kind !== "application/json" && h("input", { type: "file", multiple: kind === "multipart/form-data", id: `${method}${path}-body` });
  const sent = () => {
    if (kind !== "multipart/form-data") return body ? body.value : file ? file.files[0] : undefined;
    const form = new FormData();
    for (const one of file.files) form.append("file", one);
    return form;
  };
  const told = h("div", { role: "status" });
  const answer = Object.values(responses)[0].content ?? {};
  const send = async (event) => {
    event.preventDefault();
    const value = (name) => inputs.find(([parameter]) => parameter.name === name)[1].value;
    const query = new URLSearchParams(parameters.filter((p) => p.in === "query" && value(p.name)).map((p) => [p.name, value(p.name)]));
    const address = `${path.replace(/\{(\w+)\}/g, (_, name) => encodeURIComponent(value(name)))}${query.size ? `?${query}` : ""}`;
    told.replaceChildren(h("p", { class: "soft mono" }, `${method.toUpperCase()} ${address}`));
    const leaving = new AbortController();
    try {
      const response = await fetch(address, {
        method: method.toUpperCase(), signal: leaving.signal, body: sent(), headers: body ? { "content-type": "application/json" } : {},
      });
      const output = h("pre", { tabindex: 0, "aria-label": "Answer" });
      told.append(h("p", {}, `${response.status} ${response.statusText}`), output);
      const type = response.headers.get("content-type") ?? "";
      if (type.startsWith("image/")) {
        output.replaceWith(h("img", { src: URL.createObjectURL(await response.blob()), alt: "the picture" }));
      } else if (type.includes("json") && !type.includes("ndjson")) {
        output.textContent = JSON.stringify(await response.json(), null, 1).slice(0, 100_000);
      } else {
        const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
        for (let part = await reader?.read(); part && !part.done && output.textContent.length < 100_000; part = await reader.read()) output.append(part.value);
        leaving.abort();
      }
    } catch (error) {
      told.append(problem(error));
    }
  };
  return h("details", { class: "card pad operation" },
    h("summary", {}, h("span", { class: `method ${method}` }, method.toUpperCase()), h("code", {}, path), h("span", { class: "soft" }, ` ${summary}`)),
    h("form", { submit: send },
      ...inputs.map(([parameter, input]) => h("div", { class: "field" }, h("label", { for: input.id, class: "mono" }, parameter.name), input, parameter.description && h("p", { class: "soft hint" }, parameter.description))),
      (body || file) && h("div", { class: "field" }, h("label", { for: (body || file).id }, "Body ", link(schema)), body || file),
      h("p", { class: "soft" }, "Answer: ", Object.entries(answer).map(([kind, { schema }]) => [`${kind} `, link(schema)]), Object.keys(answer).length ? "" : "nothing"),
      h("button", {}, "Send"), told));
}

function link(schema) {
  const name = schema?.$ref?.split("/").pop();
  return name ? h("a", { href: `#${name}`, click: () => window.document.getElementById(name)?.setAttribute("open", "") }, name) : "";
}

function message(name, schema) {
  const kind = (field) => field.$ref ? link(field) : field.type === "array" ? ["list of ", kind(field.items)] : field.format ?? field.type ?? "object";
  return h("details", { class: "card pad", id: name }, h("summary", {}, h("code", {}, name), h("span", { class: "soft" }, ` ${(schema.description ?? "").split("\n")[0]}`)),
    schema.enum ? h("ul", {}, ...schema.description.split("\n").slice(1).map((line) => h("li", {}, line)))
      : h("dl", { class: "message" }, ...Object.entries(schema.properties ?? {}).sort(([, a], [, b]) => a["x-order"] - b["x-order"]).map(([field, value]) => h("div", {}, h("dt", {}, h("code", {}, field), " ", h("span", { class: "soft" }, kind(value))), h("dd", {}, value.description ?? "")))));
}

/** A message with its fields at nothing, two levels deep. */
function example(schema, schemas) {
  const make = (schema, depth) => {
    if (schema.$ref) return depth > 0 ? make(schemas[schema.$ref.split("/").pop()], depth - 1) : {};
    if (schema.enum) return schema.enum[0];
    if (schema.type === "array") return depth > 0 ? [make(schema.items, depth - 1)] : [];
    if (schema.type === "object") {
      const fields = Object.entries(schema.properties ?? {});
      let taken = false;
      return Object.fromEntries(fields.filter(([, field]) => {
        const isChoice = field.description?.includes("At most one field of");
        const keep = field.type !== "boolean" && !(isChoice && taken);
        taken ||= isChoice;
        return keep && !["parameters", "preprocessing", "options", "on_disconnect"].includes(fields.find(([, other]) => other === field)[0]);
      }).map(([name, field]) => [name, make(field, depth)]));
    }
    return schema.type === "integer" || schema.type === "number" ? 0 : "";
  };
  return JSON.stringify(make(schema, 4), null, 1);
}
