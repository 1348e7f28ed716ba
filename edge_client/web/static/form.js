/** The form: offers the gateway's capabilities, makes requests, and shows their errors. */

import { byId, make, setText } from "/static/dom.js";
import { readImage } from "/static/pictures.js";

/** Previews of each image. */
export const NUM_PREVIEWS = 10;
const STORE_KEY = "hybridsd.form";
const MOST_PICTURES = 4;
const LARGEST_DICE = 2 ** 32;
const SHAPES = [
  { ratio: 3 / 2, name: "landscape" },
  { ratio: 2 / 3, name: "portrait" },
  { ratio: 16 / 9, name: "wide" },
  { ratio: 9 / 16, name: "tall" },
];
/** Controls that are kept between visits, by id. */
const KEPT = [
  "prompt", "negative", "steps", "scheduler", "guidance", "size", "width", "height", "seed", "random-seed", "count",
  "split", "auto-split", "max-seconds", "strength", "quality-metric",
];

export class Form {
  #split;
  #capabilities = null;
  #images = { image: null, mask: null };

  /** @param {import("./split.js").Split} split */
  constructor(split) {
    this.#split = split;
    byId("form").addEventListener("input", () => this.#changed());
    byId("dice").addEventListener("click", () => this.throwDice());
    byId("clear-image").addEventListener("click", () => this.#clearImages());
    for (const name of ["image", "mask"]) byId(name).addEventListener("change", () => this.#chooseImage(name));
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      byId("form").requestSubmit();
    });
  }

  /** Applies the gateway's capabilities; the first time also its defaults and the saved values of the last visit. */
  setCapabilities(capabilities) {
    const isFirst = this.#capabilities === null;
    this.#capabilities = capabilities;
    if (isFirst) {
      this.#offerChoices();
      this.#restoreDefaults();
    }
    this.#offerModels();
    this.#split.setCapabilities(capabilities);
    if (isFirst) this.#restoreKept();
    this.#show();
  }

  /** @returns {object} the body of POST /v1/jobs */
  request() {
    const { image, mask } = this.#images;
    const [width, height] = this.#size();
    return {
      prompt: byId("prompt").value,
      negative_prompt: byId("negative").disabled ? "" : byId("negative").value,
      n: Number(byId("count").value),
      width,
      height,
      num_inference_steps: byId("steps").valueAsNumber,
      guidance_scale: byId("guidance").valueAsNumber,
      consecutive_seeds: true,  // so that each image can be made again alone
      seed: byId("random-seed").checked || byId("seed").value === "" ? null : byId("seed").valueAsNumber,
      scheduler: byId("scheduler").value,
      hybrid: this.#split.request(),
      image,
      mask: image ? mask : null,
      ...(image ? { strength: byId("strength").valueAsNumber } : {}),
      previews: NUM_PREVIEWS,
    };
  }

  /**
   * Shows the request of an image.
   * @param {object} request with every value filled in
   * @param {{image?: boolean, strength?: number}} asked what it began with: the form cannot choose a file by itself
   */
  fill(request, asked) {
    this.clearProblems();
    const values = {
      prompt: request.prompt, negative: request.negative_prompt, count: request.n, seed: request.seed,
      steps: request.num_inference_steps, scheduler: request.scheduler, guidance: request.guidance_scale,
      width: request.width, height: request.height,
    };
    for (const [id, value] of Object.entries(values)) byId(id).value = String(value);
    byId("random-seed").checked = false;
    if (asked.strength) byId("strength").value = String(asked.strength);
    const size = `${request.width}x${request.height}`;
    byId("size").value = isOffered(byId("size"), size) ? size : "custom";
    if (request.hybrid.model) byId("cloud-model").value = request.hybrid.model;
    this.#split.set({ cloudSteps: request.hybrid.cloud_steps, numSteps: request.num_inference_steps });
    this.#changed();
    if (asked.image && !this.#images.image) this.#say("image", "This one began with a picture: choose it again.");
  }

  /** Fixes another seed. */
  throwDice() {
    byId("seed").value = String(randomSeed(this.#capabilities?.limits.max_seed));
    byId("random-seed").checked = false;
    this.#changed();
  }

  /**
   * Shows an error next to the field that it names, else as an alert.
   * @param {Error & {field?: ?string}} error
   * @param {{takesFocus?: boolean}} [options] whether the user waits for it, and may be taken to the field
   */
  showProblem(error, { takesFocus = false } = {}) {
    const name = error.field?.split(".").at(-1);
    const control = name ? this.#say(name, error.message) : null;
    if (!control) setText(byId("form-alert"), error.message);
    else if (takesFocus) control.focus();
  }

  clearProblems() {
    setText(byId("form-alert"), "");
    for (const message of document.querySelectorAll(".field-error")) message.remove();
    for (const control of document.querySelectorAll("[aria-invalid]")) {
      control.removeAttribute("aria-invalid");
      control.removeAttribute("aria-errormessage");
    }
  }

  /** @returns {HTMLElement|null} the control of that name, which now has the text next to it */
  #say(name, text) {
    const field = document.querySelector(`[data-field~="${CSS.escape(name)}"]`);
    if (!field || field.closest("[hidden]")) return null;
    const control = field.querySelector("input, textarea, select");
    const id = `${control.id}-error`;
    byIdOrNull(id)?.remove();
    field.append(make("p", { id, class: "field-error", role: "alert", textContent: text }));
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-errormessage", id);
    const closed = field.closest("details:not([open])");
    if (closed) closed.open = true;
    return control;
  }

  #offerChoices() {
    const { defaults, edge, limits, schedulers } = this.#capabilities;
    offer("scheduler", schedulers.map(({ name, label }) => ({ value: name, label: label ?? name })));
    const counts = Array.from({ length: Math.min(limits.max_n, MOST_PICTURES) }, (_, i) => String(i + 1));
    offer("count", counts.map((count) => ({ value: count, label: count })));
    offer("size", [...offeredSizes(edge, defaults), { value: "custom", label: "Custom …" }]);
    setLimits("steps", 1, limits.max_steps);
    setLimits("guidance", limits.min_guidance, limits.max_guidance);
    setLimits("seed", 0, Math.min(limits.max_seed, Number.MAX_SAFE_INTEGER));
    for (const id of ["prompt", "negative"]) byId(id).maxLength = limits.max_prompt_chars;
    for (const id of ["width", "height"]) {
      setLimits(id, edge.size_multiple, edge.max_size);
      byId(id).step = String(edge.size_multiple);
    }
    byId("image-details").hidden = !edge.has_image_encoder;
    byId("guidance").disabled = edge.guidance === "fused";
    byId("negative").disabled = byId("negative-details").hidden = edge.guidance !== "cfg";
  }

  #offerModels() {
    const models = this.#capabilities.cloud.models;
    const ids = models.map(({ id }) => id);
    const offered = [...byId("cloud-model").options].map((option) => option.value);
    if (ids.length && ids.join() !== offered.join()) offer("cloud-model", ids.map((id) => ({ value: id, label: id })));
    byId("cloud-model-field").hidden = models.length < 2;
  }

  #restoreDefaults() {
    const { defaults } = this.#capabilities;
    byId("steps").value = String(defaults.num_inference_steps);
    byId("scheduler").value = defaults.scheduler;
    byId("guidance").value = String(defaults.guidance_scale);
    byId("width").value = String(defaults.width);
    byId("height").value = String(defaults.height);
    byId("size").value = `${defaults.width}x${defaults.height}`;
    this.#split.numSteps = defaults.num_inference_steps;
    this.#split.cloudSteps = defaults.cloud_steps;
  }

  #restoreKept() {
    const kept = readKept();
    if ("steps" in kept) byId("split").max = String(kept.steps);
    for (const id of KEPT) {
      const control = byId(id);
      if (!(id in kept)) continue;
      if (control.type === "checkbox") control.checked = kept[id];
      else if (control.tagName !== "SELECT" || isOffered(control, kept[id])) control.value = kept[id];
    }
    this.#split.show();
  }

  #changed() {
    this.#split.numSteps = byId("steps").valueAsNumber;
    this.#split.show();
    this.#show();
    const kept = KEPT.map((id) => [id, byId(id).type === "checkbox" ? byId(id).checked : byId(id).value]);
    localStorage.setItem(STORE_KEY, JSON.stringify(Object.fromEntries(kept)));
  }

  #show() {
    byId("custom-size").hidden = byId("size").value !== "custom";
    byId("seed").disabled = byId("random-seed").checked;
    setText(byId("strength-text"), byId("strength").value);
    const hint = this.#offlineHint();
    byId("offline-hint").hidden = !hint;
    setText(byId("offline-hint"), hint);
  }

  /** @returns {string} what this device can do by itself, where that is not what the form asks for */
  #offlineHint() {
    if (!this.#capabilities) return "";
    const { edge, schedulers } = this.#capabilities;
    const steps = byId("steps").valueAsNumber;
    const own = edge.offline.find(({ scheduler }) => scheduler === byId("scheduler").value);
    if (own?.steps.includes(steps)) return "";
    const label = (name) => schedulers.find((scheduler) => scheduler.name === name)?.label ?? name;
    if (own) return `The cloud is needed for ${steps} steps; alone, this device does ${listNumbers(own.steps)}.`;
    const others = edge.offline.map(({ scheduler }) => label(scheduler)).join(", ");
    return `The cloud is needed for this scheduler${others ? `; alone, this device has ${others}` : ""}.`;
  }

  #size() {
    const chosen = byId("size").value;
    if (chosen === "custom") return [byId("width").valueAsNumber, byId("height").valueAsNumber];
    return chosen.split("x").map(Number);
  }

  async #chooseImage(name) {
    this.clearProblems();
    const [file] = byId(name).files;
    const thumb = byId(`${name}-thumb`);
    try {
      const share = (this.#capabilities?.limits.max_body_bytes ?? Infinity) * 0.4;  // two images, and the rest
      this.#images[name] = file ? await readImage(file, share) : null;
    } catch {
      this.#images[name] = null;
      byId(name).value = "";
      this.#say(name, "This file is no image that the browser can read.");
    }
    thumb.hidden = !this.#images[name];
    if (this.#images[name]) thumb.src = this.#images[name];
  }

  #clearImages() {
    for (const name of ["image", "mask"]) {
      byId(name).value = "";
      this.#images[name] = null;
      byId(`${name}-thumb`).hidden = true;
    }
    this.clearProblems();
  }
}

/** @returns {number} a seed that numbers in JavaScript can hold, and people can read out */
export function randomSeed(maxSeed = LARGEST_DICE) {
  return Math.floor(Math.random() * Math.min(maxSeed, LARGEST_DICE));
}

function offer(id, options) {
  byId(id).replaceChildren(...options.map(({ value, label }) => make("option", { value }, label)));
}

function isOffered(select, value) {
  return [...select.options].some((option) => option.value === value);
}

function setLimits(id, min, max) {
  Object.assign(byId(id), { min: String(min), max: String(max) });
}

function byIdOrNull(id) {
  return document.getElementById(id);
}

/** @returns {{value: string, label: string}[]} the model's own sizes, else shapes of about the default area */
function offeredSizes({ sizes, size_multiple: multiple, max_size: maxSize }, { width, height }) {
  const round = (side) => Math.min(Math.max(1, Math.round(side / multiple)) * multiple, maxSize);
  const shaped = SHAPES.map(({ ratio, name }) => {
    const side = Math.sqrt(width * height * ratio);
    return { size: [round(side), round(side / ratio)], name };
  });
  const others = sizes.length ? sizes.map((size) => ({ size, name: "" })) : shaped;
  const labels = new Map();
  for (const { size, name } of [{ size: [width, height], name: "default" }, ...others]) {
    const value = size.join("x");
    if (!labels.has(value)) labels.set(value, `${size.join(" × ")}${name ? ` · ${name}` : ""}`);
  }
  return [...labels].map(([value, label]) => ({ value, label }));
}

/** @returns {string} "8, 15, 25" or "1 to 50" where it is many */
function listNumbers(numbers) {
  return numbers.length > 8 ? `some of ${Math.min(...numbers)} to ${Math.max(...numbers)}` : numbers.join(", ");
}

function readKept() {
  try {
    return JSON.parse(localStorage.getItem(STORE_KEY)) ?? {};
  } catch {
    return {};
  }
}
