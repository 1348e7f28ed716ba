/** Finished images, newest first, and the dialog with an image's details. */

import { deleteJob, downloadPicture, listJobs, showPicture } from "/static/api.js";
import { ask, bytes, byId, closeOnBackdrop, isDialogOpen, make, plural, seconds, setText } from "/static/dom.js";
import { NUM_PREVIEWS } from "/static/form.js";
import { isActive, pictureRunOf } from "/static/run.js";
import { splitRequest } from "/static/split.js";
import { Timeline } from "/static/timeline.js";

/** @typedef {{job: object, image: object}} Entry */

export class Gallery {
  /** @type {Entry[]} */
  #entries = [];
  #next = null;
  #onOpen;

  /** @param {(entry: Entry) => void} onOpen */
  constructor(onOpen) {
    this.#onOpen = onOpen;
  }

  get entries() {
    return this.#entries;
  }

  /** Loads the next page of jobs. @returns {Promise<object[]>} those of them that still run */
  async loadMore() {
    const button = byId("gallery-more");
    button.disabled = true;
    try {
      const { jobs, next } = await listJobs(this.#next);
      this.#next = next;
      const active = jobs.filter((job) => isActive({ job }));
      for (const job of jobs) if (!active.includes(job)) this.#insert(job, false);
      return active;
    } finally {
      button.disabled = false;
      this.#show();
    }
  }

  /** Adds a job that has just finished. */
  add(job) {
    this.#insert(job, true);
    this.#show();
  }

  /** Removes a job's images. */
  remove(jobId) {
    this.#entries = this.#entries.filter(({ job }) => job.id !== jobId);
    for (const tile of [...byId("gallery").children]) if (tile.dataset.job === jobId) tile.remove();
    this.#show();
  }

  /** @returns {Entry|undefined} */
  find(jobId, index) {
    return this.#entries.find(({ job, image }) => job.id === jobId && image.index === index);
  }

  #insert(job, isNewest) {
    const fresh = job.images.filter((image) => !this.find(job.id, image.index)).map((image) => ({ job, image }));
    const tiles = fresh.map((entry) => this.#makeTile(entry));
    if (isNewest) {
      this.#entries.unshift(...fresh);
      byId("gallery").prepend(...tiles);
    } else {
      this.#entries.push(...fresh);
      byId("gallery").append(...tiles);
    }
  }

  #makeTile(entry) {
    const { job, image } = entry;
    const img = make("img", { alt: "", loading: "lazy", width: image.width, height: image.height });
    showPicture(img, image.url).catch(() => {});
    return make("li", { "data-job": job.id }, make(
      "button",
      {
        class: "tile", type: "button", "data-testid": "gallery-item", title: image.prompt,
        "aria-label": `${image.prompt}, ${splitWords(image)}, seed ${image.seed}`, onclick: () => this.#onOpen(entry),
      },
      img,
      make("span", { class: "tile-split", "aria-hidden": "true" }, splitBar(image)),
    ));
  }

  #show() {
    byId("gallery-empty").hidden = this.#entries.length > 0;
    byId("gallery-more").hidden = this.#next === null;
  }
}

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
    seed: image.seed,
    scheduler: image.scheduler,
    hybrid: splitRequest(image.planned_cloud_steps, job.request.hybrid?.model),
    image: null,
    mask: null,
    previews: NUM_PREVIEWS,
  };
}

/** The dialog with one image. */
export class Detail {
  #dialog = byId("detail");
  #timeline = new Timeline();
  #gallery;
  /** @type {Entry|null} */
  #entry = null;

  /**
   * @param {Gallery} gallery
   * @param {{onAgain: (entry: Entry, hasNewSeed: boolean) => void, onCompare: (entry: Entry) => void,
   *          onDeleted: (jobId: string) => void, onError: (error: Error) => void}} actions
   */
  constructor(gallery, { onAgain, onCompare, onDeleted, onError }) {
    this.#gallery = gallery;
    this.#dialog.addEventListener("close", () => this.#timeline.element.remove());
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
      "detail-download": () => this.#download().catch(onError),
      "detail-delete": () => this.#delete(onDeleted).catch(onError),
    };
    for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
    this.#dialog.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step && !byId("confirm-dialog").open) this.#move(step);
    });
  }

  /** @param {Entry} entry */
  open(entry) {
    byId("detail-timeline").append(this.#timeline.element);
    this.#show(entry);
    if (!isDialogOpen()) this.#dialog.showModal();
  }

  #move(by) {
    const entries = this.#gallery.entries;
    const at = entries.indexOf(this.#entry);
    this.#show(entries[(at + by + entries.length) % entries.length]);
  }

  #show(entry) {
    this.#entry = entry;
    const { job, image } = entry;
    const img = byId("detail-picture");
    img.alt = image.prompt;
    img.width = image.width;
    img.height = image.height;
    showPicture(img, image.url).catch(() => (img.alt = "This image could not be loaded"));
    this.#timeline.update(pictureRunOf(image));
    byId("detail-facts").replaceChildren(...facts(job, image).map(([name, value]) => make(
      "tr", {}, make("th", { scope: "row" }, name), make("td", {}, String(value)),
    )));
    byId("detail-compare").hidden = Boolean(job.request.image);  // a comparison would start from noise
    for (const id of ["detail-previous", "detail-next"]) byId(id).hidden = this.#gallery.entries.length < 2;
    const { entries } = this.#gallery;
    setText(byId("detail-title"), `Image ${entries.indexOf(entry) + 1} of ${entries.length}`);
  }

  async #download() {
    const { image } = this.#entry;
    const words = image.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
    await downloadPicture(image.url, `${words.slice(0, 8).join("-")}-${image.seed}.png`);
  }

  async #delete(onDeleted) {
    const { job } = this.#entry;
    const count = job.images.length;
    setText(byId("confirm-title"), count > 1 ? `Delete these ${count} images?` : "Delete this image?");
    if ((await ask(byId("confirm-dialog"))) !== "ok") return;
    const at = this.#gallery.entries.indexOf(this.#entry);
    await deleteJob(job.id);
    onDeleted(job.id);
    const next = this.#gallery.entries[Math.min(at, this.#gallery.entries.length - 1)];
    if (next) this.#show(next);
    else this.#dialog.close();
  }
}

/** @returns {string} who drew how many steps, in few words */
function splitWords({ actual_cloud_steps: cloud, num_inference_steps: steps }) {
  if (cloud === 0) return "this device alone";
  return cloud >= steps ? "cloud alone" : `cloud ${plural(cloud, "step")}, this device ${steps - cloud}`;
}

function splitBar({ actual_cloud_steps: cloud, num_inference_steps: steps }) {
  const part = make("i", { class: "cloud" });
  part.style.width = `${(100 * cloud) / steps}%`;
  return part;
}

/** @returns {[string, string|number][]} everything that is known of how a picture was made */
function facts(job, image) {
  const { planned_cloud_steps: planned, actual_cloud_steps: actual } = image;
  const rows = [
    ["Prompt", image.prompt],
    ["Negative prompt", image.negative_prompt],
    ["Who drew", splitWords(image)],
    ["Planned", planned === actual ? null : `${planned} steps in the cloud; it ran ${actual}`],
    ["Why", image.fallback_reason && [image.fallback_message, `(${image.fallback_reason})`].filter(Boolean).join(" ")],
    ["Handed over early", image.early_handoff_reason],
    ["Large model", actual ? image.cloud_model : null],
    ["Small model", image.edge_model],
    ["Scheduler", image.scheduler],
    ["Steps", image.num_inference_steps],
    ["Guidance", image.guidance_scale],
    ["Size", `${image.width} × ${image.height}`],
    ["Seed", image.seed],
    ["Began with", job.request.image && `an image${job.request.mask ? " and a mask" : ""}`],
    ["Strength", job.request.image && job.request.strength],
    ["Time", `${seconds(image.elapsed_s)}, ${seconds(image.decode_s)} of it to decode`],
    ["Received", image.received_bytes ? bytes(image.received_bytes) : null],
    ["Made", new Date(1000 * job.created_at).toLocaleString()],
  ];
  return rows.filter(([, value]) => ![null, undefined, "", false].includes(value));
}
