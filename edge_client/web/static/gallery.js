/** Finished images, newest first: search, favourites and selection. */

import { deleteJob, downloadPicture, listJobs, pictureUrl } from "./api.js";
import { ask, byId, make, plural, setText } from "./dom.js";
import { keep, readKeptJson } from "./kept.js";
import { loadInto } from "./pictures.js";
import { isActive } from "./run.js";

const FAVOURITES_KEY = "hybridsd.favourites";
const THUMB_SIDE = 384;
const PAGE = 24;
const LONGEST_PAGE = 200;

/** @typedef {{job: object, image: object}} Entry */

export class Gallery {
  /** @type {Entry[]} */
  #entries = [];
  #tiles = new Map();  // by the name of the entry
  #next = null;
  #favourites = new Set(readFavourites());
  #selected = new Set();
  #isSelecting = false;
  #onOpen;
  #onImage;
  #onDeleted;

  /**
   * @param {{onOpen: (entry: Entry) => void, onImage: (entry: Entry, isNewest: boolean) => void,
   *          onDeleted: (jobId: string) => void, onError: (error: Error) => void}} actions `onImage` is told of each one
   */
  constructor({ onOpen, onImage, onDeleted, onError }) {
    this.#onOpen = onOpen;
    this.#onImage = onImage;
    this.#onDeleted = onDeleted;
    byId("gallery-search").addEventListener("input", () => this.#search().catch(onError));
    byId("gallery-favourites").addEventListener("change", () => this.#search().catch(onError));
    byId("gallery-select").addEventListener("click", () => this.#setSelecting(!this.#isSelecting));
    byId("selected-none").addEventListener("click", () => this.#setSelecting(false));
    byId("selected-star").addEventListener("click", () => this.#starSelected());
    byId("selected-download").addEventListener("click", () => this.#downloadSelected().catch(onError));
    byId("selected-delete").addEventListener("click", () => this.#deleteSelected().catch(onError));
    addEventListener("storage", (event) => {
      if (event.key !== FAVOURITES_KEY) return;  // starred in another tab
      this.#favourites = new Set(readFavourites());
      this.#show();
    });
  }

  /** Those that the search shows, newest first. */
  get entries() {
    return this.#entries.filter((entry) => this.#isWanted(entry));
  }

  /** Loads the next page of jobs. @returns {Promise<object[]>} those of them that still run */
  async loadMore(limit = PAGE) {
    const button = byId("gallery-more");
    button.disabled = true;
    try {
      const { jobs, next } = await listJobs(this.#next, limit);
      this.#next = next;
      for (const job of jobs) if (!isActive({ job })) this.#insert(job, false);
      return jobs.filter((job) => isActive({ job }));
    } finally {
      button.disabled = false;
      this.#show();
    }
  }

  /** Takes in what other tabs and clients made or deleted. @returns {Promise<object[]>} jobs that run */
  async refresh() {
    const before = [...this.#entries];
    const { jobs } = await listJobs(null, PAGE);
    const active = jobs.filter((job) => isActive({ job }));
    for (const job of [...jobs].reverse()) if (!active.includes(job)) this.#insert(job, true);
    if (jobs.length) {
      const [there, oldest] = [new Set(jobs.map(({ id }) => id)), jobs.at(-1).created_at];
      for (const { job } of before) {
        if (job.created_at > oldest && !there.has(job.id)) this.#onDeleted(job.id);
      }
    }
    this.#show();
    return active;
  }

  /** Adds a job that has just finished. */
  add(job) {
    this.#insert(job, true);
    this.#show();
  }

  /** Removes a job's images. */
  remove(jobId) {
    for (const entry of this.#entries.filter(({ job }) => job.id === jobId)) {
      this.#tiles.get(nameOf(entry))?.remove();
      this.#tiles.delete(nameOf(entry));
      this.#selected.delete(nameOf(entry));
    }
    this.#entries = this.#entries.filter(({ job }) => job.id !== jobId);
    this.#show();
  }

  /** @returns {Entry|undefined} */
  find(jobId, index) {
    return this.#entries.find(({ job, image }) => job.id === jobId && image.index === index);
  }

  isFavourite(entry) {
    return this.#favourites.has(nameOf(entry));
  }

  setFavourite(entry, isFavourite) {
    this.#favourites[isFavourite ? "add" : "delete"](nameOf(entry));
    keep(FAVOURITES_KEY, JSON.stringify([...this.#favourites]));
    this.#show();
  }

  #insert(job, isNewest) {
    const fresh = job.images.filter((image) => !this.find(job.id, image.index)).map((image) => ({ job, image }));
    const tiles = fresh.map((entry) => this.#makeTile(entry));
    for (const entry of fresh) this.#onImage(entry, isNewest);
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
    const button = make(
      "button",
      {
        class: "tile", type: "button", "data-testid": "gallery-item", title: image.prompt,
        "aria-label": `${image.prompt}, ${splitWords(image)}, seed ${image.seed}`,
        onclick: () => this.#isSelecting ? this.#toggle(entry) : this.#onOpen(entry),
      },
      img,
      make("span", { class: "tile-star", "aria-hidden": "true" }, "★"),
      make("span", { class: "tile-split", "aria-hidden": "true" }, splitBar(image)),
    );
    loadInto(img, pictureUrl(image.url, { format: "webp", quality: 85, max_side: THUMB_SIDE }), (error) => {
      if ([404, 410].includes(error.status)) this.#onDeleted(job.id);  // by another tab
    });
    const tile = make("li", { "data-job": job.id }, button);
    this.#tiles.set(nameOf(entry), tile);
    return tile;
  }

  /** Shows what is searched for. All images take part: the pages that are not loaded yet are. */
  async #search() {
    this.#show();
    while (this.#isSearching && this.#next !== null) await this.loadMore(LONGEST_PAGE);
  }

  get #isSearching() {
    return byId("gallery-search").value.trim() !== "" || byId("gallery-favourites").checked;
  }

  #isWanted(entry) {
    if (byId("gallery-favourites").checked && !this.isFavourite(entry)) return false;
    const { image } = entry;
    const text = [image.prompt, image.negative_prompt, image.scheduler, image.cloud_model, image.edge_model, image.seed,
      `${image.width}x${image.height}`].join(" ").toLowerCase();
    return byId("gallery-search").value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  }

  #setSelecting(isSelecting) {
    this.#isSelecting = isSelecting;
    this.#selected.clear();
    this.#show();
  }

  #toggle(entry) {
    const name = nameOf(entry);
    if (!this.#selected.delete(name)) this.#selected.add(name);
    this.#show();
  }

  get #chosen() {
    return this.entries.filter((entry) => this.#selected.has(nameOf(entry)));
  }

  #starSelected() {
    const chosen = this.#chosen;
    const isAll = chosen.every((entry) => this.isFavourite(entry));
    for (const entry of chosen) this.setFavourite(entry, !isAll);
  }

  async #downloadSelected() {
    for (const { image } of this.#chosen) await downloadPicture(image.url, fileName(image, "png"));
  }

  async #deleteSelected() {
    const jobs = [...new Map(this.#chosen.map(({ job }) => [job.id, job])).values()];
    if (!jobs.length || !(await confirmDeletion(jobs))) return;
    for (const { id } of jobs) {
      await deleteIfThere(id);
      this.#onDeleted(id);
    }
    this.#setSelecting(false);
  }

  #show() {
    let numShown = 0;
    for (const entry of this.#entries) {
      const tile = this.#tiles.get(nameOf(entry));
      const isShown = this.#isWanted(entry);
      const isSelected = this.#selected.has(nameOf(entry));
      numShown += Number(isShown);
      tile.hidden = !isShown;
      tile.classList.toggle("starred", this.isFavourite(entry));
      if (this.#isSelecting) tile.firstChild.setAttribute("aria-pressed", String(isSelected));
      else tile.firstChild.removeAttribute("aria-pressed");
    }
    const isEmpty = numShown === 0;
    byId("gallery-tools").hidden = this.#entries.length === 0 && this.#next === null;
    byId("gallery-empty").hidden = !isEmpty;
    setText(byId("gallery-empty"), this.#isSearching
      ? "No image is like that."
      : "Finished images gather here. They stay on this device.");
    byId("gallery-more").hidden = this.#next === null;
    setText(byId("gallery-count"), this.#isSearching ? plural(numShown, "image") : "");
    byId("gallery-select").setAttribute("aria-pressed", String(this.#isSelecting));
    byId("selected").hidden = !this.#isSelecting;
    const count = this.#chosen.length;
    setText(byId("selected-count"), count ? `${plural(count, "image")} selected` : "Select images");
    for (const id of ["selected-star", "selected-download", "selected-delete"]) byId(id).disabled = count === 0;
  }
}

/** Asks whether these jobs may be deleted. @returns {Promise<boolean>} */
export async function confirmDeletion(jobs) {
  const count = jobs.reduce((sum, job) => sum + job.images.length, 0);
  setText(byId("confirm-title"), count > 1 ? `Delete these ${count} images?` : "Delete this image?");
  return (await ask(byId("confirm-dialog"))) === "ok";
}

/** Deletes a job, unless another tab has. */
export async function deleteIfThere(jobId) {
  await deleteJob(jobId).catch((error) => {
    if (![404, 410].includes(error.status)) throw error;
  });
}

/** @returns {string} a file's name for an image */
export function fileName({ prompt, seed }, format) {
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  return `${words.slice(0, 8).join("-").slice(0, 80)}-${seed}.${format === "jpeg" ? "jpg" : format}`;
}

/** @returns {string} who drew how many steps, in few words */
export function splitWords({ actual_cloud_steps: cloud, num_inference_steps: steps }) {
  if (cloud === 0) return "this device alone";
  return cloud >= steps ? "cloud alone" : `cloud ${plural(cloud, "step")}, this device ${steps - cloud}`;
}

function splitBar({ actual_cloud_steps: cloud, num_inference_steps: steps }) {
  const part = make("i", { class: "cloud" });
  part.style.width = `${(100 * cloud) / steps}%`;
  return part;
}

function nameOf({ job, image }) {
  return `${job.id}.${image.index}`;
}

function readFavourites() {
  const names = readKeptJson(FAVOURITES_KEY);
  return Array.isArray(names) ? names : [];
}
