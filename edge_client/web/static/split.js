/** The split slider with its text, and the measured curve of quality over split. */

import { byId, make, makeSvg, plural, setText, stepRange } from "./dom.js";
import { describeCost, predict } from "./estimate.js";
import { leastCloudSteps, schedulerName } from "./problems.js";

const THUMB_PX = 24;  // as --thumb in style.css: the curve lies exactly below the slider
const CURVE_HEIGHT = 150;
const MARGIN = { top: 36, bottom: 42 };
const TICKS = [[0, "start"], [0.5, "middle"], [1, "end"]];
const PREFERRED_METRIC = "psnr";
const METRICS = {
  psnr: { name: "PSNR", axis: "likeness to the large model’s picture, dB" },
  ssim: { name: "SSIM", axis: "likeness to the large model’s picture" },
  semantic_accuracy: { name: "Objects right", axis: "share of images with the right objects" },
  judge_fid: { name: "FID", axis: "distance to real pictures, lower is better" },
  real_fid: { name: "FID", axis: "distance to real pictures (EfficientNet), lower is better" },
  judge_distance: { name: "Distance", axis: "distance to the large model’s picture, lower is better" },
  fid: { name: "FID", axis: "distance to real pictures, lower is better" },
  lpips: { name: "LPIPS", axis: "distance to the large model’s picture, lower is better" },
};

/** How many of the first steps the cloud runs; fires "input" on its slider when the user moves it. */
export class Split {
  #slider = byId("split");
  #auto = byId("auto-split");
  #maxSeconds = byId("max-seconds");
  #metric = byId("quality-metric");
  #points = [];
  #hasCloud = true;
  #capabilities = null;
  #wanted = null;
  #ratesOf;

  /** @param {(request: object) => object|null} ratesOf what images like this took, as `Estimator.rates` gives it */
  constructor(ratesOf) {
    this.#ratesOf = ratesOf;
    for (const control of [this.#slider, this.#auto, this.#metric]) {
      control.addEventListener("input", () => this.show());
    }
    new ResizeObserver(() => this.#showCurve()).observe(byId("quality-curve"));
  }

  /** Applies the gateway's capabilities. */
  setCapabilities(capabilities) {
    const { cloud, quality } = capabilities;
    this.#capabilities = capabilities;
    this.#hasCloud = cloud.configured;
    this.#setPoints(quality.filter((point) => Number.isFinite(point.value)));
    this.show();
  }

  /**
   * Tells what else is asked for: it decides what a split takes, and whether the curve applies.
   * @param {object} wanted the fields of a request, with `isFromImage`
   */
  setWanted(wanted) {
    this.#wanted = wanted;
    this.show();
  }

  /** Steps that are drawn: with an image to begin with fewer than the request has. */
  get numSteps() {
    return Number(this.#slider.max);
  }

  /** Changes the number of steps; the cloud keeps its share of them. */
  set numSteps(value) {
    if (value === this.numSteps || !(value >= 1)) return;
    const share = this.numSteps ? this.cloudSteps / this.numSteps : 0;
    this.#slider.min = "0";
    this.#slider.max = String(value);
    this.cloudSteps = Math.round(share * value);
  }

  get cloudSteps() {
    return this.#hasCloud ? Number(this.#slider.value) : 0;
  }

  set cloudSteps(value) {
    this.#slider.value = String(value);
    this.show();
  }

  /** Steps that this device cannot draw, as its model is not trained for them: the slider begins behind them. */
  get #least() {
    return this.#capabilities && this.#wanted ? leastCloudSteps(this.#wanted, this.#capabilities, this.numSteps) : 0;
  }

  get isAuto() {
    return this.#auto.checked && this.#hasCloud;
  }

  /** @returns {object} the `hybrid` of a request */
  request() {
    const model = byId("cloud-model-field").hidden ? "" : byId("cloud-model").value;
    if (!this.#hasCloud && this.#least) return { mode: "auto", cloud_steps: null, model };  // it takes over at once
    if (!this.isAuto) return splitRequest(this.cloudSteps, model);
    const maxS = this.#maxSeconds.valueAsNumber;
    const goal = maxS > 0 ? { max_latency_ms: Math.round(1000 * maxS) } : { max_cloud_steps: this.numSteps };
    return { mode: "auto", cloud_steps: null, model, ...goal };  // with a goal the gateway chooses the split
  }

  /** Fixes a split. */
  fix(cloudSteps) {
    this.#auto.checked = false;
    this.cloudSteps = cloudSteps;
  }

  /** Renders everything again. */
  show() {
    this.#slider.min = String(this.#least);
    this.#slider.disabled = this.isAuto || !this.#hasCloud;
    this.#auto.disabled = !this.#hasCloud;
    byId("max-seconds-field").hidden = !this.isAuto;
    const words = this.isAuto
      ? "The split is chosen when the image begins, from what this device, the link and the cloud take."
      : describeSplit(this.cloudSteps, this.numSteps);
    const limit = this.#least ? ` ${levelWords(this.#least, this.#hasCloud)}` : "";
    setText(byId("split-text"), (this.#hasCloud ? words : `${words} No cloud is configured.`) + limit);
    this.#slider.setAttribute("aria-valuetext", describeSplit(this.cloudSteps, this.numSteps));
    setText(byId("split-cost"), this.#costText());
    this.#showBar();
    this.#showCurve();
  }

  #costText() {
    if (!this.#wanted || this.isAuto) return "";
    const cost = predict(this.#ratesOf(this.#wanted), this.cloudSteps, this.numSteps);
    const dollars = this.#capabilities?.cloud.dollars_per_hour;
    return cost ? describeCost(cost, dollars) : "What it takes is known after the first image of this size and split.";
  }

  /** Says for what the curve was measured, and greys it out where that is not what is asked for. */
  #showMeasured() {
    if (!this.#capabilities || !this.#wanted || !this.#points.length) return;
    const { defaults, cloud } = this.#capabilities;
    const [{ num_inference_steps: steps }] = this.#points;
    const other = [
      this.#wanted.num_inference_steps !== steps && "steps",
      this.#wanted.scheduler !== defaults.scheduler && "scheduler",
      this.#wanted.guidance_scale !== defaults.guidance_scale && "guidance",
      this.#wanted.isFromImage && "an image to begin with",
      this.#wanted.model && cloud.models[0] && this.#wanted.model !== cloud.models[0].id && "large model",
      this.#wanted.loras.length > 0 && "adapters",
    ].filter(Boolean);
    const name = schedulerName(defaults.scheduler, this.#capabilities);
    const measured = `Measured with ${steps} steps, ${name}, guidance ${defaults.guidance_scale}.`;
    const differs = other.length ? ` Not measured for what is set here (${other.join(", ")}).` : "";
    setText(byId("quality-for"), measured + differs);
    byId("quality").classList.toggle("stale", other.length > 0);
  }

  #showBar() {
    const bar = byId("split-cloud").parentElement;
    const share = this.cloudSteps / this.numSteps;
    bar.style.setProperty("--share", String(share));
    bar.classList.toggle("auto", this.isAuto);
    setText(byId("split-cloud"), barLabel("Cloud", this.cloudSteps, share));
    setText(byId("split-edge"), barLabel("Device", this.numSteps - this.cloudSteps, 1 - share));
  }

  #setPoints(points) {
    this.#points = points;
    const counts = new Map();
    for (const { metric } of points) counts.set(metric, (counts.get(metric) ?? 0) + 1);
    const usable = [...counts.keys()].filter((metric) => counts.get(metric) > 1);
    const most = usable.reduce((best, metric) => (counts.get(metric) > counts.get(best) ? metric : best), usable[0]);
    const chosen = [this.#metric.value, PREFERRED_METRIC, most].find((metric) => usable.includes(metric));
    this.#metric.replaceChildren(...usable.map((value) => make("option", { value }, metricOf(value).name)));
    this.#metric.value = chosen ?? "";
    byId("quality").hidden = !usable.length;
  }

  #showCurve() {
    const holder = byId("quality-curve");
    const metric = this.#metric.value;
    this.#showMeasured();
    if (!metric || !holder.clientWidth) return;
    const points = curvePoints(this.#points, metric);
    const isStale = byId("quality").classList.contains("stale");  // then it tells nothing of this split
    const mark = this.isAuto || isStale ? null : this.cloudSteps / this.numSteps;
    holder.replaceChildren(drawCurve(points, metricOf(metric), mark, holder.clientWidth));
  }
}

/**
 * Makes the `hybrid` object of a request with this split. With cloud steps the mode is "auto": this device continues
 * when the cloud fails.
 */
export function splitRequest(cloudSteps, model = "") {
  return { mode: cloudSteps ? "auto" : "edge", cloud_steps: cloudSteps, model };
}

/** @returns {string} from which step on this device can draw, and what it does to those before without a cloud */
function levelWords(least, hasCloud) {
  const first = least === 1 ? "the first step" : `the first ${least} steps`;
  return hasCloud
    ? `The model of this device is not trained for ${first}: the cloud draws them.`
    : `Its model is not trained for ${first}, so the image may be worse.`;
}

/** @returns {string} as much as fits into that share of the bar */
function barLabel(name, numSteps, share) {
  if (share < 0.14) return "";
  return share < 0.3 ? String(numSteps) : `${name} ${numSteps}`;
}

/** @returns {string} what runs where, in words */
export function describeSplit(cloudSteps, numSteps) {
  if (cloudSteps === 0) return `This device alone, works offline: ${plural(numSteps, "step")}, small U-Net, tiny VAE.`;
  const cloud = `${stepRange(0, cloudSteps)}, large U-Net`;
  if (cloudSteps >= numSteps) return `Cloud alone, decoded here: ${cloud}; tiny VAE on this device.`;
  return `Cloud: ${cloud} · This device: ${stepRange(cloudSteps, numSteps)}, small U-Net, tiny VAE`;
}

function metricOf(id) {
  return METRICS[id] ?? { name: id, axis: id };
}

/** @returns {{x: number, y: number}[]} shares of steps in the cloud, rising, with their values */
function curvePoints(points, metric) {
  return points
    .filter((point) => point.metric === metric)
    .map((point) => ({ x: point.cloud_steps / point.num_inference_steps, y: point.value }))
    .sort((a, b) => a.x - b.x);
}

function drawCurve(points, metric, mark, width) {
  const [low, high] = [Math.min(...points.map((p) => p.y)), Math.max(...points.map((p) => p.y))];
  const span = high - low || 1;
  const x = (share) => THUMB_PX / 2 + share * (width - THUMB_PX);
  const height = CURVE_HEIGHT - MARGIN.top - MARGIN.bottom;
  const y = (value) => MARGIN.top + height * (1 - (value - low) / span);
  const svg = makeSvg("svg", {
    viewBox: `0 0 ${width} ${CURVE_HEIGHT}`, width, height: CURVE_HEIGHT, role: "img",
    "aria-label": describeCurve(points, metric, mark),
  });
  const bottom = y(low);
  svg.append(
    makeSvg("line", { class: "axis", x1: x(0), x2: x(1), y1: bottom + 8, y2: bottom + 8 }),
    ...TICKS.map(([share, anchor]) => text(x(share), bottom + 20, `${100 * share} %`, anchor)),
    text(x(0.5), CURVE_HEIGHT - 2, "share of the steps in the cloud", "middle"),
    text(x(0), 11, metric.axis, "start"),
    text(x(0), y(points[0].y) - 8, short(points[0].y), "start"),
    text(x(points.at(-1).x), y(points.at(-1).y) - 8, short(points.at(-1).y), points.at(-1).x > 0.8 ? "end" : "middle"),
    makeSvg("polyline", { class: "curve", points: points.map((p) => `${x(p.x)},${y(p.y)}`).join(" ") }),
    ...points.map((p) => makeSvg("circle", { class: "point", cx: x(p.x), cy: y(p.y), r: 2.5 })),
  );
  if (mark !== null) {
    svg.append(makeSvg("line", { class: "mark-line", x1: x(mark), x2: x(mark), y1: 16, y2: bottom + 8 }));
    const value = interpolate(points, mark);
    if (value !== null) svg.append(makeSvg("circle", { class: "mark", cx: x(mark), cy: y(value), r: 6 }));
  }
  return svg;
}

function text(x, y, content, anchor) {
  return makeSvg("text", { x, y, "text-anchor": anchor }, content);
}

function describeCurve(points, { name, axis }, mark) {
  const all = points.map((p) => `${short(p.y)} at ${Math.round(100 * p.x)} %`).join(", ");
  const here = mark === null ? null : interpolate(points, mark);
  const now = here === null ? "" : `; about ${short(here)} at this split`;
  return `${name}, ${axis}, by the share of steps in the cloud: ${all}${now}.`;
}

/** @returns {number|null} the value there; null beyond the measured points */
function interpolate(points, share) {
  const next = points.findIndex((point) => point.x >= share);
  if (next < 0 || share < points[0].x) return null;
  if (points[next].x === share) return points[next].y;
  const [a, b] = [points[next - 1], points[next]];
  return a.y + ((share - a.x) / (b.x - a.x)) * (b.y - a.y);
}

function short(value) {
  return Number(value.toPrecision(3)).toString();
}
