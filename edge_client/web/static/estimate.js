/** What an image takes at each split, learnt from finished images. */

import { bytes, cents, seconds } from "./dom.js";

const MOST_SAMPLES = 12;

/** @typedef {{width: number, height: number, guidance: number, scheduler: string}} Kind what the time of a step depends on */

/** Remembers what finished images took. */
export class Estimator {
  /** @type {Map<string, object[]>} newest first, by kind */
  #samples = new Map();
  #seen = new Set();

  /** Takes in a finished image, as the gateway describes it. */
  learn(jobId, image, isNewest) {
    const name = `${jobId}/${image.index}`;
    if (this.#seen.has(name) || !image.steps.length) return;
    this.#seen.add(name);
    const samples = this.#samples.get(keyOf(image)) ?? [];
    if (isNewest) samples.unshift(image);
    else samples.push(image);
    this.#samples.set(keyOf(image), samples.slice(0, MOST_SAMPLES));
  }

  /**
   * @param {object} wanted with `width`, `height`, `guidance_scale` and `scheduler`
   * @returns {{cloudStepS: ?number, edgeStepS: ?number, decodeS: number, bytesPerStep: ?number}|null}
   *   medians; null where no such image was drawn yet
   */
  rates(wanted) {
    const samples = this.#samples.get(keyOf(wanted));
    if (!samples) return null;
    const inCloud = samples.filter((image) => image.actual_cloud_steps && image.received_bytes);
    return {
      cloudStepS: median(samples.map((image) => usualStep(image, "cloud"))),
      edgeStepS: median(samples.map((image) => usualStep(image, "edge"))),
      decodeS: median(samples.map((image) => image.decode_s)),
      bytesPerStep: median(inCloud.map((image) => image.received_bytes / image.actual_cloud_steps)),
    };
  }
}

/**
 * What a split takes.
 * @returns {{cloudS: number, edgeS: number, totalS: number, wireBytes: number}|null} null where a part is not known yet
 */
export function predict(rates, cloudSteps, numSteps) {
  if (!rates) return null;
  const { cloudStepS, edgeStepS, decodeS, bytesPerStep } = rates;
  if ((cloudSteps && cloudStepS === null) || (cloudSteps < numSteps && edgeStepS === null)) return null;
  const cloudS = cloudSteps * (cloudStepS ?? 0);
  const edgeS = (numSteps - cloudSteps) * (edgeStepS ?? 0);
  return { cloudS, edgeS, totalS: cloudS + edgeS + decodeS, wireBytes: cloudSteps * (bytesPerStep ?? 0) };
}

/**
 * @param {number|null} dollarsPerHour what the cloud costs while it computes
 * @returns {string} "About 1.6 s: cloud 0.6 s, this device 0.9 s · 33 KB over the network · 0.02 ¢"
 */
export function describeCost({ cloudS, edgeS, totalS, wireBytes }, dollarsPerHour) {
  const parts = [cloudS ? `cloud ${seconds(cloudS)}` : "", edgeS ? `this device ${seconds(edgeS)}` : ""].filter(Boolean);
  const cost = dollarsPerHour ? cents((dollarsPerHour * cloudS) / 3600) : "";
  const wire = wireBytes ? `${bytes(Math.round(wireBytes))} over the network` : "nothing over the network";
  return [`About ${seconds(totalS)}: ${parts.join(", ")}`, wire, cost].filter(Boolean).join(" · ");
}

function keyOf({ width, height, guidance_scale: guidance, scheduler }) {
  return [width, height, guidance > 1, scheduler].join();
}

/** @returns {number|null} the median of an image's steps there: one that waited for something does not count */
function usualStep(image, place) {
  const perStep = new Map();
  for (const step of image.steps) {
    if (step.place === place) perStep.set(step.step, (perStep.get(step.step) ?? 0) + step.elapsed_s);
  }
  return median([...perStep.values()]);
}

function median(values) {
  const sorted = values.filter((value) => Number.isFinite(value)).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

/**
 * @param {import("./run.js").Run} run
 * @param {object|null} rates as `Estimator.rates` gives them
 * @returns {number|null} seconds that are left; null where they cannot be known
 */
export function remainingS({ job, pictures }, rates) {
  if (job.state !== "running") return null;
  const times = { cloud: [], edge: [] };
  for (const { steps } of pictures) for (const { place, elapsedS } of steps.values()) times[place].push(elapsedS);
  const stepS = { cloud: median(times.cloud) ?? rates?.cloudStepS, edge: median(times.edge) ?? rates?.edgeStepS };
  let left = 0;
  for (const { image, steps, numSteps, cloudSteps } of pictures) {
    if (image) continue;
    const begin = steps.size ? Math.max(...steps.keys()) + 1 : 0;
    const numCloud = Math.max(0, Math.min(cloudSteps, numSteps) - begin);
    const numEdge = Math.max(0, numSteps - begin - numCloud);
    left += (numCloud ? numCloud * stepS.cloud : 0) + (numEdge ? numEdge * stepS.edge : 0) + (rates?.decodeS ?? 0);
  }
  return Number.isFinite(left) ? left : null;
}
