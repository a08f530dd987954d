// All jobs.
import { ago, api, badge, bar, count, ended, h, jobName, number, paths, plural, say } from "./lib.js";

/** How often a list with running jobs is asked for again. */
const EVERY = 2500;

export async function show(root, _, signal) {
  const list = h("ul", { class: "jobs", "aria-label": "Jobs" });
  const more = h("button", { hidden: true, click: () => load(true) }, "Older jobs");
  root.append(
    h("div", { class: "head" }, h("h1", {}, "Jobs"), h("a", { class: "button main", href: "/new" }, "New job")),
    list,
    more,
  );
  const known = new Map();
  let token = "";

  function place(job, at) {
    const item = h("li", { class: "card job" }, ...row(job));
    const old = known.get(job.job_id);
    known.set(job.job_id, { item, job });
    if (old) old.item.replaceWith(item);
    else if (at === "start") list.prepend(item);
    else list.append(item);
  }

  async function load(older = false) {
    const answer = await api(`/v1/jobs?page_size=50&page_token=${encodeURIComponent(older ? token : "")}`, { signal });
    const first = known.size === 0;
    if (older || first) token = answer.next_page_token;
    more.hidden = !token;
    const jobs = older || first ? answer.jobs : [...answer.jobs].reverse();
    for (const job of jobs) {
      const old = known.get(job.job_id)?.job;
      if (old && JSON.stringify(old) === JSON.stringify(job)) continue;
      // Replacing a row would take the focus from a link in it.
      if (old && known.get(job.job_id).item.contains(document.activeElement)) continue;
      if (old && !ended(old.state) && ended(job.state)) say(`The job on ${jobName(job)} has ended: ${plural(job.units?.labelled, "label")}.`);
      place(job, older || first ? "end" : "start");
    }
    // What is not among the newest any more, though it is no older than they are, was deleted.
    const listed = new Set(answer.jobs.map((job) => job.job_id));
    const oldest = answer.next_page_token ? new Date(answer.jobs.at(-1).created_at) : 0;
    for (const [id, { item, job }] of older ? [] : [...known]) {
      if (listed.has(id) || new Date(job.created_at) < oldest) continue;
      item.remove();
      known.delete(id);
    }
    if (!known.size) list.replaceChildren(nothing());
    else list.querySelector(".empty")?.remove();
  }

  await load();
  const timer = setInterval(() => {
    if (!document.hidden) load().catch(() => {});
  }, EVERY);
  signal.addEventListener("abort", () => clearInterval(timer));
}

function row(job) {
  const units = job.units ?? {};
  const done = number(units.labelled) + number(units.dead) + number(units.failed);
  const facts = [
    plural(units.labelled, "label"),
    number(units.dead) > 0 && `${count(units.dead)} dead`,
    number(units.failed) > 0 && `${count(units.failed)} failed`,
    `${count(units.total)} in all`,
  ];
  return [
    h("div", { class: "job-title" }, h("h2", {}, h("a", { href: paths.job(job.job_id) }, jobName(job))), badge(job.state)),
    bar(`Units of ${jobName(job)} that have ended`, done, number(units.total)),
    h("p", { class: "soft facts" }, facts.filter(Boolean).join(" · "), " · ", job.created_at && ago(job.created_at)),
    job.message && h("p", { class: job.state === "JOB_STATE_FAILED" ? "bad" : "warn" }, job.message),
  ];
}

function nothing() {
  return h(
    "li",
    { class: "empty" },
    h("p", {}, "No job yet."),
    h("p", { class: "soft" }, "Name a network and a folder of pictures, and each of its units gets a label in words, with the evidence for it."),
    h("a", { class: "button main", href: "/new" }, "Start the first"),
  );
}
