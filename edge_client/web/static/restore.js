/** Settings out of an image file: what the gateway and AUTOMATIC1111 write into their images. Nothing in it is trusted. */

import { readInfo } from "./api.js";
import { readDataUrl } from "./pictures.js";
import { modifierOf } from "./problems.js";

const ADAPTER = /<lora:([^:<>]{1,64})(?::(-?[\d.]+))?>/g;

/**
 * @param {Blob} file
 * @returns {Promise<{values: object, notes: string[]}|null>} fields of a request as far as they are known, and what
 *   was left out; null where the file says nothing
 */
export async function readSettings(file, capabilities) {
  const info = await readInfo(await readDataUrl(file)).catch(() => null);
  if (!info) return null;
  return fromOwn(info.items?.hybridsd) ?? fromParameters(info.parameters ?? {}, capabilities);
}

/** @param {unknown} text the JSON that this gateway writes */
function fromOwn(text) {
  let made;
  try {
    made = JSON.parse(text);
  } catch {
    return null;
  }
  if (typeof made?.prompt !== "string") return null;
  const leftOut = number(made.begin_step) ?? 0;  // by the image that it began with
  const values = {
    prompt: made.prompt, negative_prompt: String(made.negative_prompt ?? ""), seed: number(made.seed),
    num_inference_steps: number((number(made.num_inference_steps) ?? NaN) + leftOut), guidance_scale: number(made.guidance_scale),
    guidance_rescale: number(made.guidance_rescale),
    width: number(made.width), height: number(made.height), scheduler: String(made.scheduler ?? ""),
    cloud_steps: number(made.handoff?.actual), model: String(made.cloud_model ?? ""),
    strength: number(made.image?.strength), fit: made.fit,
    image_index: number(made.image_index), long_prompt: made.long_prompt, prompt_weighting: made.prompt_weighting,
    loras: Object.entries(made.loras ?? {}).map(([name, weight]) => ({ name, weight: Number(weight) || 0 })),
  };
  const notes = made.image ? ["It began with another image: choose that, too."] : [];
  const others = notOnThePage(made);
  if (others.length) notes.push(`It was made with what this page has no field for: ${others.join(", ")}.`);
  return { values, notes };
}

/** @returns {string[]} options of an image that the page cannot set, by their names in the API */
function notOnThePage(made) {
  const differs = {
    segments: Boolean(made.segments), cloud_skip: Boolean(made.cloud_skip),
    edge_skip: Boolean(made.edge_skip),
    approximate_reuse: Boolean(made.approximate_reuse),
    codec: made.mode !== "edge" && (made.codec ?? "fp16") !== "residual",
    state_psnr: (made.state_psnr ?? 64) !== 64, max_state_bytes: Boolean(made.max_state_bytes),
    private: made.private === true,
    initial_latents: Boolean(made.initial_latents),
  };
  return Object.keys(differs).filter((name) => differs[name]);
}

function fromParameters(fields, { schedulers }) {
  if (typeof fields.Prompt !== "string" || !fields.Steps) return null;
  const [width, height] = String(fields.Size ?? "").split("x").map(number);
  const wanted = [fields.Sampler, fields["Schedule type"]].filter((part) => part && part !== "Automatic").join(" ");
  const isNamed = (name) => ({ label, name: id }) => [label, id].some((each) => each?.toLowerCase() === name.toLowerCase());
  const [, sampler, modifier = modifierOf(fields["Schedule type"])] =  // "DPM++ 2M+trailing" is ours
    /^(.*?)(?:\+([a-z_].*))?$/.exec(String(fields.Sampler ?? ""));
  const base = schedulers.find(isNamed(sampler));
  const combined = base && modifier ? { name: `${base.name}+${modifier}` } : base;
  const scheduler = schedulers.find(isNamed(wanted)) ?? combined;
  const loras = [...fields.Prompt.matchAll(ADAPTER)].map(([, name, weight]) => ({ name, weight: Number(weight ?? 1) || 0 }));
  const notes = scheduler || !wanted ? [] : [`Its sampler, ${wanted}, is not known here.`];
  if (fields.Model) notes.push(`It was drawn by ${fields.Model}.`);
  const values = {
    prompt: fields.Prompt.replace(ADAPTER, "").trim(), negative_prompt: fields["Negative prompt"] ?? "",
    seed: number(fields.Seed), num_inference_steps: number(fields.Steps), guidance_scale: number(fields["CFG scale"]),
    guidance_rescale: number(fields["CFG rescale"]),
    width, height, scheduler: scheduler?.name ?? "", cloud_steps: number(fields["Cloud steps"]), model: "",
    strength: number(fields["Denoising strength"]), loras, long_prompt: "chunk", prompt_weighting: true,
  };
  return { values, notes };
}

/** @returns {number|undefined} */
function number(value) {
  const parsed = value === null || value === undefined || value === "" ? NaN : Number(value);
  return Number.isFinite(parsed) ? parsed : undefined;
}
