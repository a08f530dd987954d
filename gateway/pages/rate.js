// What a rater sees (A.1.5): a unit's pictures and labels, without a word of where the labels come from.
import { api, h, picture, plural, problem, say } from "./lib.js";

const SCALE = ["Strongly disagree", "Disagree", "Neither agree nor disagree", "Agree", "Strongly agree"];
/** Under this the rater's name stays in the browser. */
const KEPT = "rater";

export async function show(root, [id], signal) {
  const rater = new URLSearchParams(location.search).get("rater") || localStorage.getItem(KEPT);
  if (rater) return rate(root, id, rater, signal);
  const name = h("input", { id: "rater", required: true, maxlength: 50, autocomplete: "off" });
  const form = h("form", {
    class: "card pad narrow",
    submit: (event) => {
      event.preventDefault();
      if (!name.value.trim()) return;
      localStorage.setItem(KEPT, name.value.trim());
      root.replaceChildren();
      rate(root, id, name.value.trim(), signal);
    },
  },
    h("p", {}, "You will see sets of pictures, each with a few descriptions. Say how well each description fits its pictures, and which one fits best."),
    h("div", { class: "field" }, h("label", { for: "rater" }, "Your name, or a code that you were given"), name),
    h("button", { class: "main" }, "Begin"));
  root.append(h("div", { class: "head" }, h("h1", {}, "Rate descriptions")), form);
  name.focus();
}

async function rate(root, id, rater, signal) {
  const path = `/v1/studies/${encodeURIComponent(id)}`;
  for (;;) {
    try {
      const { task, rated, left } = await api(`${path}/task?${new URLSearchParams({ rater })}`, { signal });
      if (!task) return thanks(root, rater, rated);
      const said = await ask(root, task, rater, rated, left, signal);
      if (signal.aborted) return;
      await said(path);
    } catch (error) {
      if (!signal.aborted) root.append(problem(error));
      return;
    }
  }
}

/** Shows a unit; gives what sends the answer, once there is one. */
function ask(root, task, rater, rated, left, signal) {
  const scale = (label, i) => h("fieldset", { class: "rating" }, h("legend", {}, label),
    h("div", { class: "points" }, ...SCALE.map((text, point) => h("label", { title: text },
      h("input", { type: "radio", name: `rating-${i}`, value: point + 1, required: true, "aria-label": `${point + 1}: ${text}` }), h("span", { "aria-hidden": "true" }, point + 1)))));
  const best = h("fieldset", { class: "rating best" }, h("legend", {}, "Which describes the pictures best?"),
    ...task.labels.map((label, i) => h("label", { class: "leaf" }, h("input", { type: "radio", name: "best", value: i, required: true }), label)));
  const heading = h("h1", { tabindex: -1 }, "Does the description fit most of these pictures?");
  return new Promise((resolve) => {
    const form = h("form", {
      submit: (event) => {
        event.preventDefault();
        const given = new FormData(form);
        const body = { rater, layer: task.layer, unit: task.unit, ratings: task.labels.map((_, i) => Number(given.get(`rating-${i}`))), best: Number(given.get("best")) };
        form.querySelector("button").disabled = true;
        resolve((path) => api(`${path}/ratings`, { method: "POST", body, signal }));
      },
    },
      h("p", { class: "soft hint" }, `1: ${SCALE[0].toLowerCase()} · 3: ${SCALE[2].toLowerCase()} · 5: ${SCALE[4].toLowerCase()}`),
      h("div", { class: "ratings" }, ...task.labels.map(scale)), best, h("button", { class: "main" }, left > 1 ? "Next" : "Done"));
    root.replaceChildren(
      h("p", { class: "crumbs" }, `${rater} · ${rated} rated, ${left} to go`),
      h("div", { class: "head" }, heading),
      h("ol", { class: "shown", "aria-label": "Pictures" }, ...task.pictures.map((digest, i) => h("li", {}, picture(digest, `Picture ${i + 1} of ${task.pictures.length}`)))),
      form);
    signal.addEventListener("abort", resolve, { once: true });
    window.scrollTo(0, 0);
    if (rated) heading.focus({ preventScroll: true });
  });
}

function thanks(root, rater, rated) {
  root.replaceChildren(
    h("div", { class: "head" }, h("h1", {}, "Thank you")),
    h("p", {}, rated ? `${rater} has rated ${plural(rated, "unit")}. There are no more.` : "There is nothing to rate here: each unit has its raters."),
    h("button", { click: () => (localStorage.removeItem(KEPT), location.assign(location.pathname)) }, "Someone else rates"));
  say("Thank you. There is no more to rate.");
}
