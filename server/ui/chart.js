// A small line chart in SVG: the last minutes to the right, one or two series, a readout under the pointer.

import { el, svg } from "./dom.js";

const WIDTH = 400;
const HEIGHT = 96;
const TOP = 8;
const BOTTOM = 80;

export class Chart {
  /**
   * series   [{name, className}], drawn in this order; the first is filled
   * span     seconds from the left edge to the right
   * show     a value as text
   * max      the top of the scale; without it, a round number above the largest value
   */
  constructor(container, { label, series, span, show, max = null }) {
    Object.assign(this, { label, series, span, show, max });
    this.points = []; // {time, values}, oldest first
    this.grid = svg("g", { class: "grid" });
    this.area = svg("path", { class: `area ${series[0].className}` });
    this.lines = series.map(({ className }) => svg("path", { class: `line ${className}` }));
    this.cursor = svg("line", { class: "cursor", y1: TOP, y2: BOTTOM, visibility: "hidden" });
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none" },
      this.grid, this.area, ...this.lines, this.cursor);
    this.top = el("span", { class: "scale", "aria-hidden": "true" });
    this.readout = el("p", { class: "readout", "aria-hidden": "true" });
    container.append(this.svg, this.top, this.readout);
    for (const y of [TOP, (TOP + BOTTOM) / 2, BOTTOM]) this.grid.append(svg("line", { x1: 0, x2: WIDTH, y1: y, y2: y }));
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#leave());
    this.#leave();
  }

  /** Adds a moment. A null value is a gap. */
  add(time, values) {
    this.points.push({ time, values });
    while (this.points.length && this.points[0].time < time - this.span) this.points.shift();
    this.#draw(time);
  }

  #draw(now) {
    const known = this.points.flatMap(({ values }) => values).filter((value) => value != null);
    const scale = this.max ?? roundUp(Math.max(1e-9, ...known));
    const x = (time) => Math.round((WIDTH - (now - time) / this.span * WIDTH) * 10) / 10;
    const y = (value) => Math.round((BOTTOM - Math.min(value / scale, 1) * (BOTTOM - TOP)) * 10) / 10;
    this.lines.forEach((line, i) => line.setAttribute("d", path(this.points, i, x, y)));
    this.area.setAttribute("d", area(this.points, x, y));
    this.top.textContent = known.length ? this.show(scale) : "";
    const last = this.points[this.points.length - 1].values;
    this.svg.setAttribute("aria-label", `${this.label}, last ${this.span / 60} minutes; now ${this.#text(last)}`);
  }

  #text(values) {
    return this.series.map(({ name }, i) => `${name} ${values[i] == null ? "unknown" : this.show(values[i])}`).join(", ");
  }

  #point(event) {
    if (this.points.length === 0) return;
    const box = this.svg.getBoundingClientRect();
    const newest = this.points[this.points.length - 1].time;
    const time = newest - (1 - (event.clientX - box.left) / box.width) * this.span;
    const nearest = this.points.reduce((a, b) => (Math.abs(b.time - time) < Math.abs(a.time - time) ? b : a));
    const at = WIDTH - (newest - nearest.time) / this.span * WIDTH;
    this.cursor.setAttribute("x1", at);
    this.cursor.setAttribute("x2", at);
    this.cursor.setAttribute("visibility", "visible");
    const age = Math.round(newest - nearest.time);
    this.readout.textContent = `${age === 0 ? "now" : `${age} s ago`}: ${this.#text(nearest.values)}`;
  }

  #leave() {
    this.cursor.setAttribute("visibility", "hidden");
    this.readout.textContent = `last ${this.span / 60} minutes`;
  }
}

function path(points, i, x, y) {
  let drawn = "";
  let pen = "M";
  for (const { time, values } of points) {
    if (values[i] == null) { pen = "M"; continue; }
    drawn += `${pen}${x(time)} ${y(values[i])}`;
    pen = "L";
  }
  return drawn;
}

function area(points, x, y) {
  let drawn = "";
  let last = null;
  const close = () => { if (last !== null) drawn += `L${last} ${BOTTOM}Z`; last = null; };
  for (const { time, values } of points) {
    if (values[0] == null) { close(); continue; }
    drawn += last === null ? `M${x(time)} ${BOTTOM}L${x(time)} ${y(values[0])}` : `L${x(time)} ${y(values[0])}`;
    last = x(time);
  }
  close();
  return drawn;
}

/** 1, 2 or 5 times a power of ten, at least `value`. */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((candidate) => candidate >= value * (1 - 1e-9));
}
