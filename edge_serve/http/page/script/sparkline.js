// A curve of the last readings, with its scale, and what it was where the pointer is.

import { node } from "./dom.js";
import { t } from "./words.js";

const WIDTH = 100, HEIGHT = 30;
const SVG = "http://www.w3.org/2000/svg";

export class Sparkline {
  /** Args: how many readings are kept. */
  constructor(size) {
    this.size = size;
    this.points = [];  // [number, text, short text, time]
    this.root = node("div", "spark");
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("aria-hidden", "true");
    this.line = this.#add("polyline");
    this.cursor = this.#add("line");
    this.cursor.setAttribute("y2", String(HEIGHT));
    [this.top, this.bottom] = ["top", "bottom"].map((name) => node("span", `scale ${name}`));
    for (const scale of [this.top, this.bottom]) scale.setAttribute("aria-hidden", "true");
    this.root.append(this.svg, this.top, this.bottom);
    this.root.addEventListener("pointermove", (event) => this.#point(event));
    this.root.addEventListener("pointerleave", () => this.onpoint?.(null));
  }

  #add(name) {
    const made = document.createElementNS(SVG, name);
    this.svg.append(made);
    return made;
  }

  /** Adds a reading; the scale, which begins at 0, shows the short text of the highest one. */
  push(value, text, short = text) {
    this.points.push([value, text, short, Date.now()]);
    if (this.points.length > this.size) this.points.shift();
    const values = this.points.map(([one]) => one);
    const top = Math.max(...values), low = Math.min(0, ...values);
    this.line.setAttribute("points", values.map((one, at) => {
      const y = HEIGHT - 2 - (HEIGHT - 4) * (top > low ? (one - low) / (top - low) : 0);
      return `${this.#x(at).toFixed(1)},${y.toFixed(1)}`;
    }).join(" "));
    this.top.textContent = this.points[values.indexOf(top)][2];
    this.bottom.textContent = top > low ? low < 0 ? this.points[values.indexOf(low)][2] : "0" : "";
  }

  #x(at) {
    return WIDTH * (this.size - this.points.length + at) / (this.size - 1);
  }

  #point(event) {
    const box = this.svg.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    const at = Math.round(share * (this.size - 1)) - (this.size - this.points.length);
    if (!this.points[at]) { this.onpoint?.(null); return; }
    for (const name of ["x1", "x2"]) this.cursor.setAttribute(name, String(this.#x(at)));
    const [, text, , time] = this.points[at];
    this.onpoint?.(t("at_time", { value: text, n: Math.round((Date.now() - time) / 1000) }));
  }
}
