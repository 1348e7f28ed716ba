/** The dialog with one image: how it was made, and what can be done with it. */

import { imageInAddress, nameImage, nameNoImage } from "./address.js";
import { downloadPicture, pictureUrl } from "./api.js";
import { bytes, byId, cents, closeOnBackdrop, isDialogOpen, joules, make, plural, seconds, setText } from "./dom.js";
import { NUM_PREVIEWS } from "./form.js";
import { confirmDeletion, deleteIfThere, fileName, splitWords } from "./gallery.js";
import { loadInto } from "./pictures.js";
import { pictureRunOf } from "./run.js";
import { splitRequest } from "./split.js";
import { Timeline } from "./timeline.js";

/** @typedef {import("./gallery.js").Entry} Entry */

/** @param {Entry} entry @returns {object} the body of POST /v1/jobs that draws this picture again, as it was planned */
export function requestOf({ job, image }) {
  return {
    prompt: image.prompt,
    negative_prompt: image.negative_prompt,
    n: 1,
    width: image.width,
    height: image.height,
    num_inference_steps: job.request.num_inference_steps ?? image.num_inference_steps,  // fewer ran with a strength
    guidance_scale: image.guidance_scale,
    guidance_rescale: image.guidance_rescale ?? 0,
    seed: image.seed,
    scheduler: image.scheduler,
    ...(image.image_index ? { image_index: image.image_index } : {}),  // one of several with one seed
    long_prompt: job.request.long_prompt ?? "truncate",
    prompt_weighting: job.request.prompt_weighting ?? false,
    hybrid: splitRequest(image.planned_cloud_steps, job.request.hybrid?.model),
    loras: image.planned_cloud_steps ? job.request.loras ?? [] : [],
    image: null,
    mask: null,
    previews: NUM_PREVIEWS,
  };
}

export class Detail {
  #dialog = byId("detail");
  #timeline = new Timeline();
  #gallery;
  /** @type {Entry|null} */
  #entry = null;

  /**
   * @param {import("./gallery.js").Gallery} gallery
   * @param {{onAgain: (entry: Entry, hasNewSeed: boolean) => void, onCompare: (entry: Entry) => void,
   *          onBeginWith: (entry: Entry) => void, onDeleted: (jobId: string) => void,
   *          onError: (error: Error) => void}} actions
   */
  constructor(gallery, { onAgain, onCompare, onBeginWith, onDeleted, onError }) {
    this.#gallery = gallery;
    this.#dialog.addEventListener("close", () => {
      this.#timeline.element.remove();
      nameNoImage();
    });
    closeOnBackdrop(this.#dialog);
    const leave = (action) => () => {
      this.#dialog.close();
      action(this.#entry);
    };
    const actions = {
      "detail-close": () => this.#dialog.close(),
      "detail-previous": () => this.#move(-1),
      "detail-next": () => this.#move(1),
      "detail-again": leave((entry) => onAgain(entry, false)),
      "detail-new-seed": leave((entry) => onAgain(entry, true)),
      "detail-compare": leave(onCompare),
      "detail-use": leave(onBeginWith),
      "detail-star": () => this.#star(),
      "detail-zoom": () => this.#zoom(),
      "detail-download": () => this.#download().catch((error) => this.#say(error.message)),
      "detail-delete": () => this.#delete(onDeleted).catch((error) => this.#say(error.message)),
    };
    for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
    this.#dialog.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step && !byId("confirm-dialog").open && event.target.tagName !== "SELECT") this.#move(step);
    });
  }

  /** @param {Entry} entry */
  open(entry) {
    byId("detail-timeline").append(this.#timeline.element);
    this.#show(entry);
    if (!isDialogOpen()) this.#dialog.showModal();
  }

  /** Closes it: the address names no image any more. */
  close() {
    if (this.#dialog.open) this.#dialog.close();
  }

  /** @param {boolean} canBeginWithImage */
  setCapabilities(canBeginWithImage) {
    byId("detail-use").hidden = !canBeginWithImage;
  }

  #move(by) {
    const entries = this.#gallery.entries;
    if (!entries.length) return;
    const at = entries.indexOf(this.#entry);
    this.#show(entries[(at + by + entries.length) % entries.length]);
  }

  #show(entry) {
    this.#entry = entry;
    nameImage(entry);
    const { job, image } = entry;
    const img = byId("detail-picture");
    img.alt = image.prompt;
    img.width = image.width;
    img.height = image.height;
    loadInto(img, image.url);
    this.#zoom(false);
    this.#say("");
    this.#timeline.update(pictureRunOf(image));
    byId("detail-facts").replaceChildren(...facts(job, image).map(([name, value]) => make(
      "tr", {}, make("th", { scope: "row" }, name), make("td", {}, String(value)),
    )));
    byId("detail-compare").hidden = Boolean(job.request.image);  // a comparison would start from noise
    const { entries } = this.#gallery;
    for (const id of ["detail-previous", "detail-next"]) byId(id).hidden = entries.length < 2;
    const at = entries.indexOf(entry);
    setText(byId("detail-title"), at < 0 ? "Image" : `Image ${at + 1} of ${entries.length}`);
    this.#showStar();
  }

  #say(text) {
    setText(byId("detail-alert"), text);
  }

  #star() {
    this.#gallery.setFavourite(this.#entry, !this.#gallery.isFavourite(this.#entry));
    this.#showStar();
  }

  #showStar() {
    const isFavourite = this.#gallery.isFavourite(this.#entry);
    byId("detail-star").setAttribute("aria-pressed", String(isFavourite));
    setText(byId("detail-star"), isFavourite ? "★" : "☆");
  }

  /** Shows a pixel of the image on a pixel of the screen, or fits it in again. */
  #zoom(isWanted = !byId("detail-frame").classList.contains("zoomed")) {
    const frame = byId("detail-frame");
    const { image } = this.#entry;
    frame.classList.toggle("zoomed", isWanted);
    byId("detail-zoom").setAttribute("aria-pressed", String(isWanted));
    byId("detail-picture").style.width = isWanted ? `${image.width / devicePixelRatio}px` : "";
    frame.tabIndex = isWanted ? 0 : -1;  // so that the keyboard can scroll it
  }

  async #download() {
    const { image } = this.#entry;
    const format = byId("detail-format").value;
    const url = format === "png" ? image.url : pictureUrl(image.url, { format, quality: 92 });
    await downloadPicture(url, fileName(image, format));
  }

  async #delete(onDeleted) {
    const { job } = this.#entry;
    if (!(await confirmDeletion([job]))) return;
    const at = this.#gallery.entries.indexOf(this.#entry);
    await deleteIfThere(job.id);
    onDeleted(job.id);
    const { entries } = this.#gallery;
    const next = entries[Math.min(at, entries.length - 1)];
    if (next) this.#show(next);
    else this.close();
  }
}

/** Opens and closes the dialog as the address says, when the user goes back and forth. */
export function followAddress(open, close) {
  addEventListener("popstate", () => {
    const named = imageInAddress();
    if (named) open(named);
    else close();
  });
}

/**
 * @param {Object<string, object|number|null>|undefined} found by place; null is not known
 * @param {(own: any) => string} describe
 * @param {boolean} saysUnknown whether what is not known is said
 * @returns {string} "cloud 1.2 kJ (modelled), this device 0.8 kJ (measured)"
 */
function placesOf(found, describe, saysUnknown = true) {
  return Object.entries(found ?? {})
    .filter(([, own]) => saysUnknown || own !== null)
    .map(([place, own]) => `${place === "edge" ? "this device" : place} ${own === null ? "unknown" : describe(own)}`)
    .join(", ");
}

/** @returns {[string, string|number][]} everything that is known of how a picture was made */
function facts(job, image) {
  const { planned_cloud_steps: planned, actual_cloud_steps: actual } = image;
  const asked = job.request.num_inference_steps;
  const adapters = (job.request.loras ?? []).map(({ name, weight }) => `${name} (${weight})`).join(", ");
  const dropped = image.num_dropped_tokens;
  const rows = [
    ["Prompt", image.prompt],
    ["Cut off", dropped > 0 && `the last ${plural(dropped, "token")} of the text did not fit into the model`],
    ["Negative prompt", image.negative_prompt],
    ["Text", [job.request.long_prompt === "chunk" && "read in parts", job.request.prompt_weighting && "with weights"]
      .filter(Boolean).join(", ")],
    ["Who drew", splitWords(image)],
    ["Planned", planned === actual ? null : `${planned} steps in the cloud; it ran ${actual}`],
    ["Kept", image.reused_cloud_steps > 0 && `${plural(image.reused_cloud_steps, "step")} the cloud had from an earlier image`
      + (image.reuse_similarity ? `, of a text near by ${image.reuse_similarity.toFixed(3)}` : "")],
    ["Why", image.fallback_reason && [image.fallback_message, `(${image.fallback_reason})`].filter(Boolean).join(" ")],
    ["Untrained", image.untrained_steps > 0 && `${plural(image.untrained_steps, "step")} above the noise level that the small model is trained for`],
    ["High noise", image.high_noise_steps > 0 && `${plural(image.high_noise_steps, "step")} by this device's second U-Net`],
    ["Handed over early", image.early_handoff_reason],
    ["Clouds", cloudWords(image.clouds ?? [])],
    ["Large model", actual ? image.cloud_model : null],
    ["Small model", image.edge_model],
    ["Adapters", adapters],
    ["Scheduler", image.scheduler],
    ["Steps", asked > image.num_inference_steps ? `${image.num_inference_steps} of ${asked}` : image.num_inference_steps],
    ["Guidance", image.guidance_rescale ? `${image.guidance_scale}, rescaled by ${image.guidance_rescale}` : image.guidance_scale],
    ["Size", `${image.width} × ${image.height}`],
    ["Seed", image.seed],
    ["Began with", job.request.image && `an image${job.request.mask ? " and a mask" : ""}`],
    ["Strength", job.request.image && job.request.strength],
    ["Fit", job.request.image && job.request.fit],
    ["Time", `${seconds(image.elapsed_s)}, ${seconds(image.decode_s)} of it to decode`],
    ["Energy", placesOf(image.energy, ({ joules: own, source }) => `${joules(own)} (${source})`)],
    ["Cost", placesOf(image.cost, cents, false)],
    ["Received", image.received_bytes ? bytes(image.received_bytes) : null],
    ["Made", new Date(1000 * job.created_at).toLocaleString()],
  ];
  return rows.filter(([, value]) => ![null, undefined, "", false].includes(value));
}

/** Which cloud ran what, where it was more than one. */
function cloudWords(clouds) {
  if (clouds.length < 2) return "";
  return clouds.map(({ server, num_steps: steps, left }) =>
    `${server} ${plural(steps, "step")}${left ? `, left: ${left}` : ""}`).join("; ");
}
