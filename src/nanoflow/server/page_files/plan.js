// A pipeline plan as a picture: a row for each lane, its nano-operations from left to right.

import { drawn, element } from "./dom.js";

const WIDTH = 360, TOP = 12, ROW = 26, GAP = 6;
const RESOURCES = ["compute", "memory", "network"];

/** The elements that show a plan, as GET /plan has it. */
export function drawPlan(whole) {
  // A lane without nano-operations runs what stands outside the layers.
  const plan = { ...whole, lanes: whole.lanes.filter((lane) => whole.nano_operations.some((nano) => nano.lane === lane.name)) };
  const isTimed = plan.nano_operations.every((nano) => nano.predicted_start_s !== null && nano.predicted_end_s !== null);
  const spans = spansOf(plan, isTimed), makespan = plan.predicted_makespan_s;
  const scale = (isTimed ? "predicted times of one layer" : "in their order, as no times were predicted for each") +
    (makespan === null ? "" : `; a layer takes ${(makespan * 1e3).toFixed(2)} ms, predicted`);
  const batches = new Set(plan.nano_operations.map((nano) => `${nano.start}:${nano.stop}`)).size;
  const about = `${plan.name}, up to ${plan.num_tokens} tokens: ${count(plan.nano_operations, "nano-operation")} on ` +
    `${count(plan.lanes, "lane")}, ${batches} token range${batches === 1 ? "" : "s"}; ${scale}`;
  return [element("p", { class: "soft" }, about + (plan.is_latest ? "" : " (nothing has run yet)")), picture(plan, spans, isTimed, about),
    legend(), table(plan, isTimed)];
}

const count = (things, name) => `${things.length} ${name}${things.length === 1 ? "" : "s"}`;

/**
 * Begin and end of each nano-operation: predicted, or by order. By order, each of the fullest lane has one column; one of
 * another lane begins where it is issued and ends where the first one begins that waits for it.
 */
export function spansOf({ lanes, nano_operations: nanos }, isTimed) {
  if (isTimed) return nanos.map((nano) => [nano.predicted_start_s, nano.predicted_end_s]);
  const size = (lane) => nanos.filter((nano) => nano.lane === lane.name).length;
  const main = lanes.reduce((most, lane) => (size(lane) > size(most) ? lane : most), lanes[0]).name;
  let columns = 0;
  const begins = nanos.map((nano) => (nano.lane === main ? columns++ : columns));
  return nanos.map((nano, at) => {
    if (nano.lane === main) return [begins[at], begins[at] + 1];
    const after = nanos.findIndex((other, place) => place > at && (other.waits.includes(at) || other.lane === nano.lane));
    return [begins[at], Math.max(after < 0 ? columns : begins[after], begins[at] + 0.5)];
  });
}

function picture(plan, spans, isTimed, about) {
  const first = Math.min(...spans.map(([start]) => start)), last = Math.max(...spans.map(([, end]) => end));
  const x = (value) => ((value - first) / (last - first || 1)) * WIDTH;
  const height = plan.lanes.length * (TOP + ROW + GAP) + (isTimed ? 14 : 0);
  const svg = drawn("svg", { class: "plan", viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": about });
  const ranges = [...new Set(plan.nano_operations.map((nano) => nano.start))].sort((one, other) => one - other);
  plan.lanes.forEach((lane, row) => {
    const y = row * (TOP + ROW + GAP);
    svg.append(drawn("text", { x: 0, y: y + TOP - 3 }, `${lane.name === lane.mechanism ? "" : `${lane.name}: `}${lane.mechanism}, share ${Math.round(100 * lane.share)} %`));
    svg.append(drawn("line", { x1: 0, x2: WIDTH, y1: y + TOP + ROW + 1, y2: y + TOP + ROW + 1 }));
    plan.nano_operations.forEach((nano, at) => {
      if (nano.lane !== lane.name) return;
      const [left, right] = spans[at].map(x), isOdd = ranges.indexOf(nano.start) % 2 === 1;
      svg.append(bar(nano, left, Math.max(right - left - 0.6, 0.6), y + TOP, isOdd));
    });
  });
  if (isTimed) svg.append(drawn("text", { x: WIDTH, y: height - 3, "text-anchor": "end" }, `${((last - first) * 1e3).toFixed(2)} ms`));
  return svg;
}

function bar(nano, left, width, y, isOdd) {
  const kind = RESOURCES.includes(nano.resource) ? nano.resource : "unknown";
  const fits = width > nano.operation.length * 5.4 + 4;
  return drawn("g", {}, drawn("rect", { x: left, y, width, height: ROW, class: isOdd ? `${kind} odd` : kind },
    drawn("title", {}, said(nano))), fits ? drawn("text", { class: "inside", x: left + 3, y: y + ROW / 2 + 3.5 }, nano.operation) : null);
}

const layerOf = (nano) => (nano.stage ? `${nano.stage} before` : "this");
const said = (nano) => `${nano.operation}, tokens ${nano.start} to ${nano.stop}, ${nano.resource ?? "unknown resource"}` +
  `${nano.stage ? `, of the layer ${nano.stage} before` : ""}`;

function legend() {
  const entry = (kind) => element("span", {}, drawn("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" },
    drawn("rect", { width: 10, height: 10, class: kind })), ` ${kind}`);
  return element("p", { class: "key" }, "Bound by: ", ...RESOURCES.map(entry));
}

function table(plan, isTimed) {
  const heads = ["Operation", "Tokens", "Lane", "Layer", ...(isTimed ? ["ms"] : [])];
  const rows = plan.nano_operations.map((nano) => [nano.operation, `${nano.start} to ${nano.stop}`, nano.lane, layerOf(nano),
    ...(isTimed ? [`${(nano.predicted_start_s * 1e3).toFixed(3)} to ${(nano.predicted_end_s * 1e3).toFixed(3)}`] : [])]);
  const cells = (kind, texts) => element("tr", {}, ...texts.map((text) => element(kind, {}, text)));
  return element("details", {}, element("summary", {}, "As a table"), element("div", { class: "wide", tabindex: 0, role: "region",
    "aria-label": "Nano-operations" }, element("table", {}, cells("th", heads), ...rows.map((row) => cells("td", row)))));
}
