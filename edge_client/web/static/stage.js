/** The large image area, and the list of running jobs. */

import { byId, make, plural, seconds, setText } from "./dom.js";
import { remainingS } from "./estimate.js";
import { loadInto } from "./pictures.js";
import { isActive } from "./run.js";
import { Timeline } from "./timeline.js";

const TITLE = document.title;

/** Shows one run large. */
export class Stage {
  #run = null;
  #frames = [];
  #timeline = new Timeline();
  #onOpen;
  #explain;
  #ratesOf;

  /**
   * @param {{onOpen: (jobId: string, index: number) => void,
   *          explain: (run: object) => {title: string, text: string, actions: {label: string, act: () => void}[]},
   *          ratesOf: (request: object) => object|null}} actions `onOpen` opens a finished picture; `explain` says why
   *   a run failed, and what can be done; `ratesOf` what images of that kind took
   */
  constructor({ onOpen, explain, ratesOf }) {
    this.#onOpen = onOpen;
    this.#explain = explain;
    this.#ratesOf = ratesOf;
    this.#showEmpty();
  }

  get run() {
    return this.#run;
  }

  /** @param {import("./run.js").Run} run */
  show(run) {
    this.#run = run;
    byId("stage").dataset.job = run.job.id;
    this.#frames = run.pictures.map(({ index }) => new Frame(run.job, () => this.#onOpen(run.job.id, index)));
    byId("pictures").dataset.count = String(run.pictures.length);
    byId("pictures").replaceChildren(...this.#frames.map((frame) => frame.element));
    byId("stage-timeline").replaceChildren(this.#timeline.element);
    this.update();
  }

  /** Shows the changes of the run. */
  update() {
    const run = this.#run;
    const active = isActive(run);
    for (const [i, frame] of this.#frames.entries()) frame.update(run.pictures[i], active && i === run.current);
    this.#timeline.update(run.pictures[run.current]);
    this.#showProblem(run);
    setText(byId("status"), run.phase);
    const leftS = active ? remainingS(run, this.#ratesOf(run.job.request)) : null;
    const left = leftS >= 1 && !run.isLost ? `about ${seconds(Math.ceil(leftS))} left` : "";
    setText(byId("step-text"), active ? [stepText(run), left].filter(Boolean).join(" · ") : madeText(run));
    document.title = active ? `${Math.floor(100 * progress(run))} % · ${TITLE}` : TITLE;
    byId("cancel").hidden = !active;
    byId("stage").setAttribute("aria-busy", String(active));
  }

  /** Clears the area if it shows that job. */
  forget(jobId) {
    if (this.#run?.job.id === jobId) this.#showEmpty();
  }

  #showProblem(run) {
    const box = byId("stage-problem");
    const hasFailed = run?.job.state === "failed";
    if (hasFailed === !box.hidden && box.dataset.job === run?.job.id) return;
    box.hidden = !hasFailed;
    box.dataset.job = run?.job.id ?? "";
    byId("stage").classList.toggle("has-failed", hasFailed);
    const { title = "", text = "", actions = [] } = hasFailed ? this.#explain(run) : {};
    setText(byId("problem-title"), title);
    setText(byId("problem-text"), text);
    byId("problem-actions").replaceChildren(
      ...actions.map(({ label, act }) => make("button", { type: "button", onclick: act }, label)),
    );
  }

  #showEmpty() {
    this.#showProblem(null);
    this.#run = null;
    this.#frames = [];
    byId("pictures").dataset.count = "0";
    const art = make("span", { class: "empty-art", "aria-hidden": "true" });
    byId("pictures").replaceChildren(make("p", { class: "empty" }, art, "Your image appears here."));
    byId("stage-timeline").replaceChildren();
    for (const id of ["status", "step-text"]) setText(byId(id), "");
    document.title = TITLE;
    byId("cancel").hidden = true;
  }
}

/** One image: empty, then its previews, then the finished one. */
class Frame {
  #img = make("img", { class: "frame-picture", alt: "" });
  #button;
  #shown = null;
  #prompt;

  constructor(job, onOpen) {
    this.#prompt = job.request.prompt;
    const properties = { class: "frame-open", type: "button", disabled: true, hidden: true, onclick: onOpen };
    this.#button = make("button", properties, this.#img);
    this.element = make("div", { class: "frame" }, this.#button);
    this.#shape(job.request.width ?? 1, job.request.height ?? 1);
  }

  #shape(width, height) {
    this.element.style.setProperty("--ratio", String(width / height));
  }

  update(picture, isDrawing) {
    this.element.classList.toggle("drawing", isDrawing && !picture.image);
    this.element.classList.toggle("is-empty", !picture.image && !picture.preview);
    const next = picture.image ?? picture.preview;
    if (!next || next === this.#shown) return;
    this.#shown = next;
    this.#button.hidden = false;
    if (picture.image) this.#showResult(picture.image);
    else this.#showPreview(picture);
  }

  #showPreview({ preview, numSteps }) {
    this.#img.dataset.testid = "preview";
    this.#img.alt = `Preview after step ${preview.step + 1} of ${numSteps}`;
    this.#img.src = preview.image;
  }

  #showResult(image) {
    this.#img.dataset.testid = "result";
    this.#img.alt = this.#prompt;
    this.#button.disabled = false;
    this.#button.title = "Open";
    this.#shape(image.width, image.height);
    loadInto(this.#img, image.url);
  }
}

/** The list of running jobs; hidden unless there are several. */
export class RunList {
  #rows = new Map();
  #onShow;
  #onCancel;

  constructor({ onShow, onCancel }) {
    this.#onShow = onShow;
    this.#onCancel = onCancel;
  }

  /**
   * @param {import("./run.js").Run[]} runs newest first
   * @param {import("./run.js").Run|null} shown the one that is large
   */
  update(runs, shown) {
    const active = runs.filter(isActive);
    byId("running").hidden = active.every((run) => run === shown);
    for (const [id, row] of this.#rows) {
      if (active.some((run) => run.job.id === id)) continue;
      row.element.remove();
      this.#rows.delete(id);
    }
    for (const [i, run] of active.entries()) {
      const row = this.#rows.get(run.job.id) ?? this.#addRow(run);
      const place = byId("running-list").children[i] ?? null;
      if (place !== row.element) byId("running-list").insertBefore(row.element, place);
      showRow(row, run, run === shown);
    }
  }

  #addRow(run) {
    const { prompt } = run.job.request;
    const img = make("img", { alt: "", hidden: true });
    const phase = make("span", { class: "card-phase" });
    const bar = make("progress", { max: 1, value: 0, "aria-label": `Progress of ${prompt}` });
    const show = make(
      "button", { class: "card-show", type: "button", onclick: () => this.#onShow(run) },
      make("span", { class: "card-picture" }, img),
      make("span", { class: "card-text" }, make("span", { class: "card-prompt" }, prompt), phase),
    );
    const cancel = make("button", {
      class: "icon", type: "button", "data-testid": "card-cancel", "aria-label": `Cancel ${prompt}`, title: "Cancel",
      textContent: "✕", onclick: () => this.#onCancel(run),
    });
    const element = make("li", { class: "card", "data-testid": "card" }, show, cancel, bar);
    const row = { element, img, phase, bar, show };
    this.#rows.set(run.job.id, row);
    return row;
  }
}

function showRow(row, run, isShown) {
  const { preview } = run.pictures[run.current];
  row.show.setAttribute("aria-pressed", String(isShown));
  setText(row.phase, [run.phase, stepText(run)].filter(Boolean).join(" · "));
  row.bar.value = progress(run);
  if (preview && row.img.src !== preview.image) {
    row.img.src = preview.image;
    row.img.hidden = false;
  }
}

function progress({ pictures }) {
  const shares = pictures.map((picture) => (picture.image ? 1 : picture.steps.size / (picture.numSteps || 1)));
  return shares.reduce((sum, share) => sum + share, 0) / pictures.length;
}

function madeText({ pictures }) {
  const made = pictures.filter(({ image }) => image).map(({ image }) => image);
  if (!made.length) return "";
  const dropped = made[0].num_dropped_tokens;
  const cut = dropped > 0 ? ` · the last ${plural(dropped, "token")} of the text did not fit into the model` : "";
  return `seed ${made[0].seed} · ${seconds(made.reduce((sum, image) => sum + image.elapsed_s, 0))}${cut}`;
}

function stepText({ pictures, current }) {
  const { steps, numSteps } = pictures[current];
  if (!steps.size) return "";
  const which = pictures.length > 1 ? `image ${current + 1} of ${pictures.length}, ` : "";
  return `${which}step ${Math.max(...steps.keys()) + 1} of ${numSteps}`;
}
