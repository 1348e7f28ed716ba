/** The form: offers the gateway's capabilities, makes requests, and shows their errors. */

import { Adapters } from "./adapters.js";
import { byId, make, setText } from "./dom.js";
import { keep, readKeptJson } from "./kept.js";
import { labelOf, listNumbers, modifierName, offlinePlans, schedulerName, sentence } from "./problems.js";
import { effectiveSteps } from "./run.js";
import { StartImage } from "./start_image.js";

/** Previews of each image. */
export const NUM_PREVIEWS = 5;
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
  "prompt", "negative", "steps", "scheduler", "schedule", "guidance", "rescale", "size", "width", "height", "seed", "random-seed", "count",
  "split", "auto-split", "max-seconds", "strength", "fit", "quality-metric",
  "long-prompt", "prompt-weighting",
];
/** Numbers, by id. An empty one would silently become a default, so those that must be there are `required`. */
const NUMBERS = ["steps", "guidance", "rescale", "width", "height", "seed", "max-seconds"];

export class Form {
  #split;
  #capabilities = null;
  #counting = null;
  #imageIndex = 0;  // which of several images with one seed
  #adapters = new Adapters();
  #start = new StartImage({
    onChange: () => this.#changed(),
    onProblem: (field, text) => {
      byId("image-details").open = true;
      this.#say(field, text);
    },
  });

  /** @param {import("./split.js").Split} split */
  constructor(split) {
    this.#split = split;
    byId("form").addEventListener("input", () => this.#changed());
    byId("dice").addEventListener("click", () => this.throwDice());
    for (const id of ["seed", "random-seed"]) byId(id).addEventListener("input", () => (this.#imageIndex = 0));
    byId("own-shape").addEventListener("click", () => this.#takeOwnShape());
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

  /** @returns {boolean} whether every number is in its range, and every text; says it at those that are not */
  check() {
    const wrong = NUMBERS.map(byId).filter((control) => !control.disabled && !control.closest("[hidden]"))
      .filter((control) => !control.checkValidity());
    for (const control of wrong) this.#sayAt(control, numberWords(control));
    const { max_prompt_chars: mostChars } = this.#capabilities.limits;
    const long = ["prompt", "negative"].map(byId).filter(({ value }) => [...value].length > mostChars);
    for (const control of long) {
      this.#sayAt(control, `This has ${[...control.value].length} characters; at most ${mostChars} are drawn from.`);
    }
    [...long, ...wrong][0]?.focus();
    return wrong.length + long.length === 0;
  }

  /** @returns {object} the body of POST /v1/jobs */
  request() {
    const [width, height] = this.#size();
    return {
      prompt: byId("prompt").value,
      negative_prompt: byId("negative").disabled ? "" : byId("negative").value,
      n: Number(byId("count").value),
      width,
      height,
      num_inference_steps: byId("steps").valueAsNumber,
      guidance_scale: byId("guidance").valueAsNumber,
      guidance_rescale: byId("guidance").valueAsNumber > 1 ? byId("rescale").valueAsNumber : 0,
      consecutive_seeds: true,  // so that each image can be made again alone
      seed: byId("random-seed").checked || byId("seed").value === "" ? null : byId("seed").valueAsNumber,
      scheduler: this.#scheduler,
      hybrid: this.#split.request(),
      ...(this.#imageIndex && !byId("random-seed").checked ? { image_index: this.#imageIndex } : {}),
      long_prompt: byId("long-prompt").checked ? "chunk" : "truncate",
      prompt_weighting: byId("prompt-weighting").checked,
      loras: this.#hasCloudSteps ? this.#adapters.chosen : [],
      ...this.#start.request(),
      previews: NUM_PREVIEWS,
    };
  }

  /** Begins with an image file. @returns {Promise<boolean>} whether it can */
  async beginWith(file) {
    this.clearProblems();
    if (!this.#start.isPossible) {
      setText(byId("form-alert"), "This device has no model to begin with an image.");
      return false;
    }
    const isUsed = await this.#start.use(file);
    if (isUsed) this.#note("The next image begins with this one.");
    else byId("image-details").scrollIntoView({ block: "center" });
    return isUsed;
  }

  /**
   * Shows the settings of an image.
   * @param {object} request fields of a request, as far as they are known
   * @param {{notes?: string[], asked?: object}} [options] what to say with it; the job's own request: the form cannot
   *   choose the image that it began with by itself
   */
  fill(request, { notes = [], asked = {} } = {}) {
    this.clearProblems();
    const values = {
      prompt: request.prompt, negative: request.negative_prompt, count: request.n, seed: request.seed,
      steps: request.num_inference_steps, guidance: request.guidance_scale, rescale: request.guidance_rescale ?? 0, width: request.width,
      height: request.height, strength: request.strength ?? asked.strength,
    };
    for (const [id, value] of Object.entries(values)) {
      if (value !== undefined && value !== null) byId(id).value = String(value);
    }
    const scheduler = this.#chooseScheduler(request.scheduler);
    const missing = this.#choose({ scheduler, fit: request.fit ?? asked.fit, "cloud-model": request.hybrid?.model });
    byId("random-seed").checked = request.seed === undefined;
    this.#imageIndex = request.image_index ?? 0;
    byId("long-prompt").checked = request.long_prompt === "chunk";
    byId("prompt-weighting").checked = request.prompt_weighting === true;
    byId("text-details").open ||= byId("long-prompt").checked || byId("prompt-weighting").checked;
    const size = `${request.width}x${request.height}`;
    if (request.width && request.height) byId("size").value = isOffered(byId("size"), size) ? size : "custom";
    if (!request.negative_prompt && request.prompt !== undefined) byId("negative").value = "";
    if (request.negative_prompt) byId("negative-details").open = true;
    this.#offerAdapters();
    missing.push(...this.#adapters.set(request.loras ?? []));
    this.#changed();
    const { cloud_steps: cloudSteps } = request.hybrid ?? {};
    const drawn = effectiveSteps({ ...asked, num_inference_steps: request.num_inference_steps });
    if (cloudSteps !== undefined) this.#split.fix(Math.round((cloudSteps / drawn) * this.#split.numSteps));
    this.#changed();
    const gone = missing.map((name) => `${name} is not there any more.`);
    this.#note(["The form has the settings of this image now.", ...gone, ...notes].join(" "));
    if (asked.image && !this.#start.isChosen) this.#say("image", "This one began with an image: choose it again.");
    byId("form").scrollIntoView();
    byId("generate").focus({ preventScroll: true });
  }

  /** Changes the number of steps. */
  setSteps(numSteps) {
    byId("steps").value = String(numSteps);
    this.#changed();
  }

  /** Fixes another seed. */
  throwDice() {
    this.#imageIndex = 0;
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
    if (error.retryDelayS) this.#countDown(error.retryDelayS);
    const name = error.field?.split(".").at(-1);
    const words = sentence(error.message, error.field);
    const control = name ? this.#say(name, words) : null;
    if (!control) setText(byId("form-alert"), words);
    else if (takesFocus) control.focus();
  }

  /** Says every second when there is room again; the alert says it once, to be read out. */
  #countDown(seconds) {
    const until = Date.now() + 1000 * seconds;
    const tick = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      setText(byId("retry-note"), left > 0 ? `Room again in ${left} s.` : "There is room again: try now.");
      if (left <= 0) clearInterval(this.#counting);
    };
    clearInterval(this.#counting);
    this.#counting = setInterval(tick, 1000);
    tick();
  }

  clearProblems() {
    clearInterval(this.#counting);
    setText(byId("retry-note"), "");
    setText(byId("form-alert"), "");
    setText(byId("form-note"), "");
    for (const message of document.querySelectorAll(".field-error")) message.remove();
    for (const control of document.querySelectorAll("[aria-invalid]")) {
      control.removeAttribute("aria-invalid");
      control.removeAttribute("aria-errormessage");
    }
  }

  #note(text) {
    setText(byId("form-note"), text);
  }

  /** @returns {HTMLElement|null} the control of that name, which now has the text next to it */
  #say(name, text) {
    const field = document.querySelector(`[data-field~="${CSS.escape(name)}"]`);
    if (!field || field.closest("[hidden]")) return null;
    return this.#sayAt(field.querySelector("input, textarea, select"), text);
  }

  #sayAt(control, text) {
    const field = control.closest("[data-field]");
    const id = `${control.id}-error`;
    byIdOrNull(id)?.remove();
    field.append(make("p", { id, class: "field-error", role: "alert", textContent: text }));
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-errormessage", id);
    const closed = field.closest("details:not([open])");
    if (closed) closed.open = true;
    return control;
  }

  /** Chooses options. @returns {string[]} those that are not offered */
  #choose(values) {
    const wanted = Object.entries(values).filter(([, value]) => value);
    for (const [id, value] of wanted) if (isOffered(byId(id), value)) byId(id).value = value;
    return wanted.filter(([id, value]) => !isOffered(byId(id), value)).map(([, value]) => value);
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
    for (const id of ["width", "height"]) {
      setLimits(id, edge.size_multiple, edge.max_size);
      byId(id).step = String(edge.size_multiple);
    }
    this.#start.setLimits(limits.max_body_bytes, edge.has_image_encoder);
    byId("guidance").disabled = edge.guidance === "fused";
    byId("negative").disabled = byId("negative-details").hidden = edge.guidance !== "cfg";
  }

  #offerModels() {
    const models = this.#capabilities.cloud.models;
    const ids = models.map(({ id }) => id);
    const before = byId("cloud-model").value;
    const offered = [...byId("cloud-model").options].map((option) => option.value);
    if (ids.length && ids.join() !== offered.join()) {
      offer("cloud-model", ids.map((id) => ({ value: id, label: id })));
      if (ids.includes(before)) byId("cloud-model").value = before;
    }
    byId("cloud-model-field").hidden = models.length === 0;
    this.#offerAdapters();
  }

  #offerAdapters() {
    const model = this.#capabilities?.cloud.models.find(({ id }) => id === byId("cloud-model").value);
    this.#adapters.offer(model?.loras ?? []);
  }

  #restoreDefaults() {
    const { defaults } = this.#capabilities;
    byId("steps").value = String(defaults.num_inference_steps);
    byId("scheduler").value = defaults.scheduler;
    this.#offerSchedules();
    byId("rescale").value = "0";
    byId("guidance").value = String(defaults.guidance_scale);
    byId("width").value = String(defaults.width);
    byId("height").value = String(defaults.height);
    byId("size").value = `${defaults.width}x${defaults.height}`;
    this.#split.numSteps = defaults.num_inference_steps;
    this.#split.cloudSteps = defaults.cloud_steps;
  }

  #restoreKept() {
    const kept = readKeptJson(STORE_KEY) ?? {};
    if (kept.steps >= 1) byId("split").max = String(kept.steps);
    for (const id of KEPT) {
      const control = byId(id);
      if (id === "schedule") this.#offerSchedules();
      if (!(id in kept)) continue;
      if (control.type === "checkbox") control.checked = kept[id];
      else if (control.tagName !== "SELECT" || isOffered(control, kept[id])) control.value = kept[id];
    }
    this.#split.show();
  }

  #changed() {
    setText(byId("form-note"), "");
    this.#offerAdapters();
    this.#show();
    const kept = KEPT.map((id) => [id, byId(id).type === "checkbox" ? byId(id).checked : byId(id).value]);
    keep(STORE_KEY, JSON.stringify(Object.fromEntries(kept)));
  }

  #show() {
    const [width, height] = this.#size();
    const strength = byId("strength").valueAsNumber;
    const asked = byId("steps").valueAsNumber;
    const isFromImage = this.#start.isChosen;
    const drawn = effectiveSteps({ num_inference_steps: asked, image: isFromImage, strength });
    byId("custom-size").hidden = byId("size").value !== "custom";
    byId("seed").disabled = byId("random-seed").checked;
    setText(byId("strength-text"), byId("strength").value);
    setText(byId("strength-hint"), asked >= 1
      ? `${drawn} of ${asked} steps are drawn; the split is of these.`
      : "How much of the image is drawn anew.");
    this.#offerSchedules();
    byId("rescale").disabled = !(byId("guidance").valueAsNumber > 1);
    this.#start.setSize(width, height);
    this.#split.numSteps = drawn;
    this.#split.setWanted({
      width, height, num_inference_steps: asked, guidance_scale: byId("guidance").valueAsNumber,
      scheduler: this.#scheduler, model: byId("cloud-model").value, loras: this.#adapters.chosen, isFromImage,
    });
    this.#adapters.show(this.#hasCloudSteps);
    const hint = this.#offlineHint();
    byId("offline-hint").hidden = !hint;
    setText(byId("offline-hint"), hint);
  }

  /** The scheduler with its schedule type, as a request names it. */
  get #scheduler() {
    const [name, schedule] = [byId("scheduler").value, byId("schedule").value];
    return schedule ? `${name}+${schedule}` : name;
  }

  /** Offers the schedule types of the chosen scheduler. */
  #offerSchedules() {
    const chosen = byId("scheduler").value;
    const modifiers = this.#capabilities?.schedulers.find(({ name }) => name === chosen)?.modifiers ?? [];
    const offered = [...byId("schedule").options].slice(1).map(({ value }) => value);
    if (byId("schedule").options.length && modifiers.join() === offered.join()) return;
    const before = byId("schedule").value;
    const choices = modifiers.map((name) => ({ value: name, label: modifierName(name) }));
    offer("schedule", [{ value: "", label: "Automatic" }, ...choices]);
    byId("schedule").value = modifiers.includes(before) ? before : "";
  }

  /** Chooses the schedule type that a name ends with. @returns {string|undefined} the name to choose a scheduler by */
  #chooseScheduler(wanted) {
    if (!wanted || isOffered(byId("scheduler"), wanted)) {
      if (wanted) byId("schedule").value = "";
      return wanted;
    }
    const { schedulers } = this.#capabilities;
    const [base, modifier] = [wanted.slice(0, wanted.indexOf("+")), wanted.slice(wanted.indexOf("+") + 1)];
    if (schedulers.find(({ name }) => name === base)?.modifiers.includes(modifier)) {
      byId("scheduler").value = base;
      this.#offerSchedules();
      byId("schedule").value = modifier;
      return base;
    }
    if (schedulers.some(({ name }) => name === base)) {  // several modifiers, or one with a value
      byId("scheduler").append(make("option", { value: wanted }, schedulerName(wanted, this.#capabilities)));
      byId("schedule").value = "";
    }
    return wanted;
  }

  get #hasCloudSteps() {
    return this.#split.isAuto || this.#split.cloudSteps > 0;
  }

  #takeOwnShape() {
    const { edge, defaults } = this.#capabilities;
    const own = this.#start.ownSize(defaults.width * defaults.height, edge.size_multiple, edge.max_size);
    if (!own) return;
    [byId("width").value, byId("height").value] = own.map(String);
    byId("size").value = isOffered(byId("size"), own.join("x")) ? own.join("x") : "custom";
    this.#changed();
  }

  /** @returns {string} what this device can do by itself, where that is not what the form asks for */
  #offlineHint() {
    if (!this.#capabilities) return "";
    const { cloud, edge } = this.#capabilities;
    const steps = byId("steps").valueAsNumber;
    const scheduler = this.#scheduler;
    const own = offlinePlans(scheduler, this.#capabilities);
    if (own?.steps.includes(steps)) return "";
    const isAway = cloud.configured && !cloud.reachable ? ", and it is away" : "";
    const name = schedulerName(scheduler, this.#capabilities);
    const needs = `The cloud is needed for ${own ? `${steps} steps` : name}${isAway}`;
    if (own) return `${needs}; alone, this device draws ${name} with ${listNumbers(own.steps)} steps.`;
    const others = edge.offline.map((each) => schedulerName(each.scheduler, this.#capabilities)).join(", ");
    return `${needs}${others ? `; alone, this device has ${others}` : ""}.`;
  }

  #size() {
    const chosen = byId("size").value;
    if (chosen === "custom") return [byId("width").valueAsNumber, byId("height").valueAsNumber];
    return chosen.split("x").map(Number);
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

/** @returns {string} what a number may be: "Steps is empty: choose a whole number from 1 to 1000." */
function numberWords(control) {
  const { min, max, step, value, validity } = control;
  const name = labelOf(control.closest("[data-field]").dataset.field.split(" ")[0]);
  const given = validity.badInput ? "is no number" : value === "" ? "is empty" : `is ${value}`;
  const kind = step === "any" ? "a number" : Number(step) > 1 ? `a multiple of ${step}` : "a whole number";
  return `${name} ${given}: choose ${kind} ${max ? `from ${min} to ${max}` : `of ${min} or more`}.`;
}
