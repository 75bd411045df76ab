// The live meter on SafeCFG Apply and SafeCFG Protect: per category a bar with its threshold and the trace of the run.
//
// Messages come from nodes/reporting/meter.py while a patched model samples. A node has no meter until its first message, and
// nothing of it is saved with the workflow. Its words are in locales/<language>/main.json.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { loadTexts, text as textOf } from "./texts.js";

const EVENT = "safecfg.meter";
const NODES = new Set(["SafeCFG_Apply", "SafeCFG_Protect"]);
const WIDGET = "safecfg_meter";
const ROW = 20; // pixels, as in the styles below
const LINE = 18; // pixels, a line of text
const STATUS_LINES = 2; // for each run
const NOTICE_LINES = 3; // for each thing that could not be redirected
const MARGIN = 6; // around the meter
const HARM = "#e24c3e";
const CLEAN = "#58a678";
const LIMIT = "#fac850";
const SVG = "http://www.w3.org/2000/svg";

const STYLE = `
.safecfg-meter { box-sizing: border-box; width: 100%; padding: 2px 4px; font: 11px/18px sans-serif; overflow: hidden;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); border-radius: 4px; pointer-events: none; }
.safecfg-meter-row { display: grid; grid-template-columns: 72px 1fr 1fr; gap: 6px; height: ${ROW}px; align-items: center; }
.safecfg-meter-name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; height: ${ROW - 2}px; }
.safecfg-meter-status, .safecfg-meter-notice { display: -webkit-box; -webkit-box-orient: vertical; overflow: hidden; margin-bottom: 2px; }
.safecfg-meter-status { color: var(--descrip-text, #999); max-height: ${STATUS_LINES * LINE}px; -webkit-line-clamp: ${STATUS_LINES}; }
.safecfg-meter-notice { color: ${HARM}; max-height: ${NOTICE_LINES * LINE}px; -webkit-line-clamp: ${NOTICE_LINES}; }
.safecfg-meter-track { position: relative; height: 8px; background: var(--border-color, #444); border-radius: 2px; }
.safecfg-meter-fill { position: absolute; left: 0; top: 0; bottom: 0; border-radius: 2px; }
.safecfg-meter-limit { position: absolute; top: -3px; bottom: -3px; width: 2px; background: ${LIMIT}; }
.safecfg-meter svg { width: 100%; height: 14px; display: block; background: var(--border-color, #444); border-radius: 2px; }
`;

const meters = new WeakMap(); // by node: a node that is deleted takes its meter with it
/** The meter's own words. */
const text = (key, values) => textOf("meter", key, values);

function create(tag, name, parent) {
  const element = document.createElement(tag);
  element.className = `safecfg-meter-${name}`;
  parent.append(element);
  return element;
}

/** One category: its name, a bar from 0 to 1 with the threshold as a tick, and the guidance over the run. */
class Row {
  constructor(parent, name) {
    const row = create("div", "row", parent);
    const label = create("div", "name", row);
    label.textContent = label.title = name;
    const track = create("div", "track", row);
    this.fill = create("div", "fill", track);
    this.limit = create("div", "limit", track);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 1 1");
    svg.setAttribute("preserveAspectRatio", "none");
    this.line = document.createElementNS(SVG, "polyline");
    for (const [key, value] of Object.entries({ fill: "none", "stroke-width": "1.5", "vector-effect": "non-scaling-stroke" })) {
      this.line.setAttribute(key, value);
    }
    svg.append(this.line);
    row.append(svg);
  }

  show({ value, limit, harmful }, points) {
    this.fill.style.width = `${100 * value}%`;
    this.fill.style.background = harmful ? HARM : CLEAN;
    this.limit.style.left = `calc(${100 * limit}% - 1px)`;
    this.line.setAttribute("points", points.map(([x, y]) => `${x},${1 - y}`).join(" "));
    this.line.setAttribute("stroke", harmful ? HARM : CLEAN);
  }
}

/** The meter of one node: it shows all runs of one queued prompt, a line for each sampler, with what could not be redirected. */
class Meter {
  constructor(node) {
    this.runs = new Map(); // by name: its latest message and its readings, in the order in which they began
    this.lines = STATUS_LINES;
    this.element = document.createElement("div");
    this.element.className = "safecfg-meter";
    const height = () => LINE * this.lines + ROW * (this.rows?.length ?? 0) + 10 + 2 * MARGIN;
    const options = { serialize: false, hideOnZoom: true, margin: MARGIN, getMinHeight: height, getMaxHeight: height };
    const widget = node.addDOMWidget(WIDGET, WIDGET, this.element, options);
    widget.serialize = false; // neither its value in the prompt (above) nor in the workflow
  }

  /** Takes a message in; whether the meter has another height now. */
  update(message) {
    const before = this.lines;
    if (!this.runs.has(message.run) && (message.prompt_id ?? null) !== this.queued) this.runs.clear();
    this.queued = message.prompt_id ?? undefined; // without a number every run stands for itself
    const run = this.runs.get(message.run) ?? { series: new Map() };
    this.runs.set(message.run, Object.assign(run, { message }));
    const categories = message.categories.join("\n");
    const others = categories !== this.categories;
    if (others) {
      this.categories = categories;
      this.element.replaceChildren();
      this.rows = message.categories.map((name) => new Row(this.element, name));
      this.status = create("div", "lines", this.element);
    }
    for (const reading of message.series) run.series.set(reading.step, reading);
    this.lines = [...this.runs.values()].reduce((sum, { message }) => sum + STATUS_LINES + notices(message).length * NOTICE_LINES, 0);
    if (!this.due) {
      this.due = true; // one drawing per frame, however many messages
      requestAnimationFrame(() => {
        this.due = false;
        this.draw();
      });
    }
    return others || this.lines !== before;
  }

  draw() {
    const runs = [...this.runs.values()].map(({ message, series }) => {
      const readings = [...series.values()].sort((a, b) => a.step - b.step);
      const steps = Math.max(message.steps, readings.at(-1)?.step ?? 1); // some samplers evaluate more often than they step
      return { message, readings, steps };
    });
    this.rows.forEach((row, k) => {
      const bars = runs.map((run) => ({ ...run, ...category(run.message, run.readings, k) }));
      const bar = bars.reduce((most, other) => (other.harmful > most.harmful || (other.harmful === most.harmful && other.margin > most.margin) ? other : most));
      const points = bar.readings.map((r) => [bar.steps > 1 ? (r.step - 1) / (bar.steps - 1) : 0, r.guidance[k] ?? 0]);
      row.show(bar, points);
    });
    this.status.replaceChildren();
    for (const { message, readings, steps } of runs) {
      const line = create("div", "status", this.status);
      line.textContent = (runs.length > 1 ? `${samplerTitle(message.sampler)}: ` : "") + status(message, readings, steps);
      for (const notice of notices(message)) create("div", "notice", this.status).textContent = `⚠ ${notice}`;
    }
  }
}

/** What a run could not redirect, or why it was stopped. */
function notices(message) {
  return [...(message.notices ?? []), ...(message.stopped ? [message.stopped] : [])];
}

/** The name that a user sees on a sampler; its number where it is not in this workflow. */
function samplerTitle(id) {
  const node = anyNodeOf(id);
  return node?.getTitle?.() ?? node?.title ?? String(id ?? "");
}

/** A category's bar in a run: the prompt or the latest step, whichever lies closer to its threshold or further above it. */
function category(message, readings, k) {
  const last = readings.at(-1);
  const prompt = message.prompt && { value: message.prompt[k] ?? 0, limit: message.prompt_thresholds[k] };
  const guidance = last && { value: last.guidance[k] ?? 0, limit: last.thresholds[k] };
  const margin = (bar) => (bar ? bar.value - bar.limit : -Infinity);
  const bar = (margin(guidance) > margin(prompt) ? guidance : prompt) ?? guidance ?? { value: 0, limit: 1 };
  const harmful = Boolean(message.prompt_redirected?.[k] || readings.some((r) => r.redirected[k]));
  return { ...bar, harmful, margin: margin(bar) };
}

function status(message, readings, steps) {
  const names = (flags) => message.categories.filter((_, k) => flags?.[k]).join(", ");
  const prompt = names(message.prompt_redirected);
  const guidance = names(message.categories.map((_, k) => readings.some((r) => r.redirected[k])));
  const { images, redirected_images: redirected } = message;
  const step = readings.at(-1)?.step ?? 0;
  const parts = [];
  if (!message.done) parts.push(text("step", { step, steps }));
  if (prompt) parts.push(text("prompt", { categories: prompt }));
  if (guidance) parts.push(text("guidance", { categories: guidance }));
  if (message.stopped) parts.push(text("stopped"));
  else if (message.done && redirected) parts.push(text("images", { redirected, images }));
  else if (message.done) parts.push(text("nothing"));
  return parts.join(" · ");
}

/** The node of an execution id such as 12, or 5:12 for node 12 in the subgraph node 5; null when it is not in this workflow. */
function anyNodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node ?? null;
}

function nodeOf(id) {
  const node = anyNodeOf(id);
  return NODES.has(node?.comfyClass) ? node : null;
}

function onMessage({ detail }) {
  const node = nodeOf(detail.node);
  if (!node) return;
  if (!meters.has(node)) meters.set(node, new Meter(node));
  if (meters.get(node).update(detail)) node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "SafeCFG.Meter",
  async setup() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
    api.addEventListener(EVENT, onMessage);
    await loadTexts();
  },
});
