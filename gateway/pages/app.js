// Which page an address shows, and moving between them without loading anew.
import { go, h, problem, say } from "./lib.js";
import * as compare from "./compare.js";
import * as jobs from "./jobs.js";
import * as network from "./network.js";
import * as start from "./new.js";
import * as rate from "./rate.js";
import * as studies from "./studies.js";
import * as unit from "./unit.js";
import * as units from "./units.js";

const PAGES = [
  [/^\/$/, jobs],
  [/^\/new$/, start],
  [/^\/compare$/, compare],
  [/^\/studies$/, studies.list],
  [/^\/studies\/new$/, studies.create],
  [/^\/studies\/([^/]+)$/, studies.results],
  [/^\/studies\/([^/]+)\/rate$/, rate],
  [/^\/jobs\/([^/]+)$/, units],
  [/^\/jobs\/([^/]+)\/network$/, network],
  [/^\/jobs\/([^/]+)\/units\/([^/]+)\/(\d+)$/, unit],
];

const main = document.getElementById("main");
let leaving = new AbortController();
history.scrollRestoration = "manual";

async function show(first = false) {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.pathname === location.pathname) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const [pattern, page] = PAGES.find(([pattern]) => pattern.test(location.pathname)) ?? [];
  if (!page) return;
  const params = location.pathname.match(pattern).slice(1).map(decodeURIComponent);
  const root = h("div", { class: "page" });
  main.replaceChildren(root);
  window.scrollTo(0, 0);
  try {
    await page.show(root, params, signal);
  } catch (error) {
    if (signal.aborted) return;
    root.append(problem(error));
  }
  const heading = main.querySelector("h1");
  if (heading) document.title = `${heading.textContent} · Describe-and-Dissect`;
  if (!first && !signal.aborted && !main.contains(document.activeElement)) {
    main.focus({ preventScroll: true });
    say(document.title);
  }
}

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  if (link.origin !== location.origin || link.target || link.hasAttribute("download") || link.hash) return;
  if (!PAGES.some(([pattern]) => pattern.test(link.pathname))) return;
  event.preventDefault();
  go(link.href);
});
addEventListener("popstate", () => show());
show(true);
