// What the server does now: numbers from two answers of GET /status, and the plan that runs.

import { read } from "./api.js";
import { byId, drawn, element } from "./dom.js";
import { drawPlan } from "./plan.js";

const EVERY_MS = 1000;
const SAMPLES = 60;
const GIB = 2 ** 30;

/** Look every second while the page can be seen. */
export function startPanel() {
  const panel = new Panel();
  const look = async () => {
    if (!document.hidden && (byId("live").open || byId("plan").open)) await panel.look();
    setTimeout(look, EVERY_MS);
  };
  look();
}

class Panel {
  constructor() {
    this.before = null;
    this.rates = [];
    this.digest = null;
    this.mean = null; // as a text, of the last second with an iteration
  }

  async look() {
    try {
      const now = await read("status");
      this.show(now);
      this.before = now;
      if (byId("plan").open && (now.plan ?? "") !== this.digest) await this.drawPlan(now);
    } catch (failure) {
      byId("numbers").replaceChildren(element("dt", {}, "State"), element("dd", {}, failure.status === 401 ? "an API key is needed" : String(failure)));
      this.before = null;
    }
  }

  show(now) {
    const before = this.before ?? now, iterations = now.iterations - before.iterations;
    if (iterations > 0) this.mean = `${((1000 * (now.iterations_s - before.iterations_s)) / iterations).toFixed(1)} ms`;
    const isIdle = iterations <= 0 && !now.num_running; // an iteration may take longer than a second
    const rows = numbers(before, now, isIdle && this.mean ? `${this.mean}, idle now` : this.mean);
    byId("numbers").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
    byId("version").textContent = `nanoflow ${now.version}`;
    if (!this.before) return;
    this.rates = [...this.rates, rate(this.before, now, "generation_tokens")].slice(-SAMPLES);
    drawSpark(this.rates);
  }

  async drawPlan(now) {
    const drawing = byId("drawing");
    try {
      drawing.replaceChildren(...(now.plans.length ? drawPlan(await read(`plan${now.plan ? `?digest=${now.plan}` : ""}`))
        : ["This engine runs no plans."]));
    } catch (failure) {
      drawing.replaceChildren(element("p", { class: "soft" }, String(failure)));
      return; // the next look tries again
    }
    this.digest = now.plan ?? "";
  }
}

const rate = (before, now, name) => (now.time_s > before.time_s ? Math.max(0, now[name] - before[name]) / (now.time_s - before.time_s) : 0);
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");

/** Rows of the panel: what, and how much, since the answer before where it is a rate; `mean` is the time of an iteration. */
export function numbers(before, now, mean) {
  const tiers = Object.entries(now.tiers).filter(([, tier]) => tier.capacity_bytes);
  return [
    ["Generated tokens/s", rate(before, now, "generation_tokens").toFixed(1)],
    ["Prompt tokens/s", rate(before, now, "prompt_tokens").toFixed(1)],
    ["Running, waiting", `${now.num_running}, ${now.num_waiting}`],
    ["Iteration, mean time", mean ?? (now.num_running ? "–" : "idle")],
    ["Prefix cache, found", percent(now.prefix_cache_hits, now.prefix_cache_queries)],
    ...(tiers.length ? tiers.map(([name, tier]) => [`KV cache, ${name}`, used(tier)])
      : [["KV cache, pages", percent(now.kv_pages_in_use, now.kv_pages)]]),
    ["Preemptions", String(now.num_preemptions)],
  ];
}

function used({ used_bytes: part, capacity_bytes: whole }) {
  return `${percent(part, whole)} of ${(whole / GIB).toFixed(whole < GIB ? 2 : 1)} GiB`;
}

function drawSpark(rates) {
  const spark = byId("spark"), most = Math.max(1, ...rates);
  const points = rates.map((value, at) => `${((SAMPLES - rates.length + at) / (SAMPLES - 1)) * 100},${29 - (value / most) * 28}`).join(" ");
  spark.setAttribute("viewBox", "0 0 100 30");
  spark.setAttribute("preserveAspectRatio", "none");
  spark.replaceChildren(drawn("polyline", { points, "vector-effect": "non-scaling-stroke" }));
}
