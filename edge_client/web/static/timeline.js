/** A row of segments, one per step: colour shows the place, width the duration. */

import { bytes, make, plural, seconds, setText } from "./dom.js";

const MOST_SPOKEN = 100;  // of more steps only the summary is read out, and they touch each other
const PLACE_NAMES = { cloud: "cloud", edge: "this device" };

/** Shows the steps of one `PictureRun`, as they come. */
export class Timeline {
  #segments = make("ol", { class: "segments", "aria-label": "Steps and how long they took" });
  #summary = make("p", { class: "summary" });
  #summaryParts = [];
  element = make("div", { class: "timeline", "data-testid": "timeline" }, legend(), this.#segments, this.#summary);

  /** @param {import("./run.js").PictureRun} picture */
  update(picture) {
    const first = picture.steps.size ? Math.min(...picture.steps.keys()) : 0;
    const usualS = meanS(picture.steps);
    const numShown = picture.numSteps - first;
    while (this.#segments.children.length > numShown) this.#segments.lastChild.remove();
    while (this.#segments.children.length < numShown) this.#segments.append(makeSegment());
    this.#segments.classList.toggle("dense", numShown > MOST_SPOKEN);
    this.#segments.setAttribute("aria-hidden", String(numShown > MOST_SPOKEN));
    for (let i = 0; i < numShown; i++) {
      const step = first + i;
      const done = picture.steps.get(step);
      const place = done?.place ?? (step < picture.cloudSteps ? "cloud" : "edge");
      const isPreviewed = picture.previewed.has(step);
      showSegment(this.#segments.children[i], { step, place, done, usualS, isPreviewed });
    }
    const parts = summarize(picture);
    if (parts.join() === this.#summaryParts.join()) return;
    this.#summaryParts = parts;
    this.#summary.replaceChildren(...parts.flatMap((part, i) => [i ? " · " : "", make("span", {}, part)]));
  }
}

/** @returns {string[]} such as "Cloud 8 steps 1.9 s", "wire 121 KB", "edge 17 steps 2.3 s", "previews 0.05 s", "decode 0.1 s" */
function summarize(picture) {
  const { image } = picture;
  const [first, ...others] = [
    part("cloud", picture.steps) + cloudsWords(image?.clouds ?? []),
    image?.received_bytes ? `wire ${bytes(image.received_bytes)}` : "",
    part("edge", picture.steps),
    picture.previewS ? `previews ${seconds(picture.previewS)}` : "",
    image ? `decode ${seconds(image.decode_s)}` : "",
  ].filter(Boolean);
  return first ? [first.charAt(0).toUpperCase() + first.slice(1), ...others] : [];
}

/** @returns {string} such as " (3 at a:50051, 5 at b:50051)", where more than one cloud ran steps */
function cloudsWords(clouds) {
  const ran = clouds.filter((run) => run.num_steps);
  return ran.length > 1 ? ` (${ran.map((run) => `${run.num_steps} at ${run.server}`).join(", ")})` : "";
}

function part(place, steps) {
  const times = [...steps.values()].filter((step) => step.place === place).map((step) => step.elapsedS);
  if (!times.length) return "";
  return `${place} ${plural(times.length, "step")} ${seconds(times.reduce((sum, s) => sum + s, 0))}`;
}

function legend() {
  const entry = (place, name) => make("span", { class: "legend-entry" }, make("i", { class: `swatch ${place}` }), name);
  return make("p", { class: "legend", "aria-hidden": "true" }, entry("cloud", "Cloud"), entry("edge", "This device"));
}

function makeSegment() {
  return make("li", { class: "segment" }, make("span", { class: "visually-hidden" }));
}

/** Shows a step. Its width is relative to that of a usual step: `flex-grow` must not add up to less than 1. */
function showSegment(segment, { step, place, done, usualS, isPreviewed }) {
  const preview = isPreviewed ? ", then a preview" : "";
  const words = `Step ${step + 1}, ${PLACE_NAMES[place]}, ${done ? seconds(done.elapsedS) : "to come"}${preview}`;
  segment.className = `segment ${place}${done ? " done" : ""}${isPreviewed ? " previewed" : ""}`;
  segment.style.flexGrow = String(usualS ? Math.max((done?.elapsedS ?? usualS) / usualS, 0.05) : 1);
  segment.title = words;
  setText(segment.firstChild, words);
}

function meanS(steps) {
  let sum = 0;
  for (const { elapsedS } of steps.values()) sum += elapsedS;
  return steps.size ? sum / steps.size : 1;
}
