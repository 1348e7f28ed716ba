/** Errors of the gateway in the words of this page: what happened, and what to do now. */

/** What the page calls the fields of a request. */
const LABELS = {
  prompt: "Prompt", negative_prompt: "Negative prompt", n: "Images", width: "Width", height: "Height",
  num_inference_steps: "Steps", guidance_scale: "Guidance", guidance_rescale: "Guidance rescale", seed: "Seed", scheduler: "Scheduler", image: "The image",
  mask: "The mask", strength: "Strength", fit: "Fit", loras: "Adapters", lora: "Adapter", cloud_steps: "Steps in the cloud",
  split: "The split", hybrid: "The split", mode: "The split", model: "Large model", max_latency_ms: "Seconds",
};

/** @typedef {{title: string, text: string, actions: string[]}} Explanation `actions`: "again", "alone", "cloud", "steps" */

const WORDS = {
  PLAN_MISSING: () => "This device cannot draw this alone",
  UNAVAILABLE: () => "The cloud does not answer",
  DEADLINE_EXCEEDED: () => "The cloud took too long",
  QUEUE_FULL: () => "The cloud is busy",
  QUOTA_EXCEEDED: () => "A limit of your token is reached",
  TOO_MANY_JOBS: () => "This device has too many images waiting",
  UNAUTHENTICATED: () => "The token is missing or wrong",
  PERMISSION_DENIED: () => "This is not allowed here",
  MODEL_UNKNOWN: () => "The model is not there",
  LORA_UNKNOWN: () => "The adapter is not there",
  LATENT_SPACE_MISMATCH: () => "The cloud’s model does not go with this device’s",
  JOB_GONE: () => "This image was deleted",
  NOT_FOUND: () => "This image is not here",
  OUTPUT_NOT_FINITE: () => "The model failed",
  INTERNAL: () => "Something went wrong",
  BODY_TOO_LARGE: () => "The image file is too large",
};

/**
 * @param {{reason?: string, field?: ?string, detail?: string, message?: string}} problem
 * @param {{request?: object, capabilities?: ?object}} [context] what was asked, and what the gateway can do
 * @returns {Explanation}
 */
export function explain(problem, { request = {}, capabilities = null } = {}) {
  const { reason = "", field } = problem;
  const title = WORDS[reason]?.() ?? "The image could not be drawn";
  const own = capabilities && isPlanMissing(problem) ? planText(request, capabilities) : null;
  if (own) return { title: WORDS.PLAN_MISSING(), text: own.text, actions: own.steps ? ["steps", "again"] : ["again"] };
  const text = sentence(problem.detail ?? problem.message ?? "", field);
  if (["UNAVAILABLE", "DEADLINE_EXCEEDED", "QUEUE_FULL"].includes(reason)) {
    return { title, text, actions: ["again", "alone"] };
  }
  if (["MODEL_UNKNOWN", "LATENT_SPACE_MISMATCH"].includes(reason)) return { title, text, actions: ["alone", "again"] };
  return { title, text, actions: ["again"] };
}

/** @returns {string} the gateway's words with the page's names of the fields */
export function sentence(detail, field) {
  const name = field?.split(".").at(-1);
  let text = detail.replace(/`([a-z_.]+)`/g, (whole, each) => quoted(each.split(".").at(-1)) ?? whole);
  const plain = field && LABELS[name] ? [field, name].find((each) => text.startsWith(`${each} `) || text.startsWith(`${each}:`)) : null;
  if (plain) text = LABELS[name] + text.slice(plain.length);
  return text ? `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}` : "";
}

/** @returns {string} what the page calls a field */
export function labelOf(field) {
  return LABELS[field] ?? field;
}

/** @returns {{scheduler: string, steps: number[]}|null} what this device can draw with that scheduler without a cloud */
export function offlinePlans(scheduler, { edge }) {
  return edge.offline.find((each) => each.scheduler === scheduler) ?? null;
}

/**
 * After how many cloud steps this device can draw: its U-Net may be trained for low noise levels only.
 * @param {{scheduler?: string, num_inference_steps?: number}} request
 * @param {object} capabilities
 * @param {number} [drawn] steps that an image to begin with leaves; all without
 * @returns {number} 0 where it can draw alone; of steps that it has no plan for about as many as of the nearest
 */
export function leastCloudSteps(request, capabilities, drawn) {
  const { edge, defaults } = capabilities;
  const steps = request.num_inference_steps ?? defaults.num_inference_steps;
  const scheduler = request.scheduler ?? defaults.scheduler;
  const near = nearestSteps(scheduler, steps, capabilities) === null ? defaults.scheduler : scheduler;
  const nearest = nearestSteps(near, steps, capabilities);
  if (edge.max_timestep === null || edge.has_high_noise_unet || nearest === null) return 0;
  const own = offlinePlans(near, capabilities);
  const least = Math.ceil((own.least_cloud_steps[own.steps.indexOf(nearest)] / nearest) * steps);
  return Math.max(0, least - (steps - (drawn ?? steps)));
}

/** @returns {number|null} the number of steps next to `steps` that this device can draw alone */
export function nearestSteps(scheduler, steps, capabilities) {
  const own = offlinePlans(scheduler, capabilities)?.steps ?? [];
  return own.length ? own.reduce((best, each) => (Math.abs(each - steps) < Math.abs(best - steps) ? each : best)) : null;
}

/** @returns {string} "8, 15 or 25"; "some of 1 to 50" where it is many */
export function listNumbers(numbers) {
  if (numbers.length > 8) return `some of ${Math.min(...numbers)} to ${Math.max(...numbers)}`;
  return numbers.length < 2 ? numbers.join() : `${numbers.slice(0, -1).join(", ")} or ${numbers.at(-1)}`;
}

/** @returns {string} the name of a scheduler for people */
export function schedulerName(name, capabilities) {
  const [base, ...modifiers] = name.split("+");
  const label = capabilities.schedulers.find((each) => each.name === base)?.label;
  return label ? [label, ...modifiers.map(modifierName)].join(", ") : name;
}

const MODIFIERS = {
  karras: "Karras", exponential: "Exponential", beta: "Beta", kl_optimal: "KL Optimal", leading: "DDIM Uniform",
  linspace: "Uniform", trailing: "SGM Uniform (trailing)", ays: "Align Your Steps", ays_xl: "Align Your Steps, SDXL",
  zero_snr: "Zero terminal SNR",
};

/** @returns {string} what AUTOMATIC1111 calls a modifier of schedulers */
export function modifierName(name) {
  return MODIFIERS[name] ?? name;
}

/** @returns {string|undefined} the modifier that an image of AUTOMATIC1111 calls its schedule type */
export function modifierOf(label) {
  const wanted = String(label ?? "").toLowerCase();
  const names = { ...MODIFIERS, trailing: "SGM Uniform", linspace: undefined };  // Uniform is the model's own there
  return Object.keys(names).find((name) => names[name]?.toLowerCase() === wanted);
}

function isPlanMissing({ reason, field }) {
  return reason === "PLAN_MISSING" || (reason === "MODEL_UNKNOWN" && field === "scheduler");
}

function planText({ scheduler, num_inference_steps: steps }, capabilities) {
  const wanted = scheduler ?? capabilities.defaults.scheduler;
  const numSteps = steps ?? capabilities.defaults.num_inference_steps;
  const name = schedulerName(wanted, capabilities);
  const own = offlinePlans(wanted, capabilities);
  const { configured, reachable } = capabilities.cloud;
  const cloud = !configured ? "and none is configured" : reachable ? "and it could not help" : "and it is away";
  const why = `${numSteps} steps with ${name} need the cloud, ${cloud}.`;
  if (own) return { text: `${why} Alone, this device draws ${name} with ${listNumbers(own.steps)} steps.`, steps: true };
  const others = capabilities.edge.offline.map((each) => schedulerName(each.scheduler, capabilities)).join(", ");
  return { text: `${why} Alone, this device draws ${others || "nothing"}.`, steps: false };
}

function quoted(name) {
  return LABELS[name] ? `“${LABELS[name]}”` : null;
}
