/** "Compare splits": one prompt and seed with the large model, a hybrid and the small model, side by side. */

import { showPicture } from "/static/api.js";
import { byId, closeOnBackdrop, make, plural, seconds, setText } from "/static/dom.js";
import { isActive } from "/static/run.js";
import { Timeline } from "/static/timeline.js";

export class Compare {
  #dialog = byId("compare-view");
  #launch;
  #onCancel;
  #columns = [];

  /**
   * @param {{launch: (request: object, onUpdate: (run: object) => void) => Promise<object>,
   *          onCancel: (run: object) => void}} actions
   */
  constructor({ launch, onCancel }) {
    this.#launch = launch;
    this.#onCancel = onCancel;
    closeOnBackdrop(this.#dialog);
    this.#dialog.addEventListener("close", () => byId("compare-columns").replaceChildren());
    byId("compare-close").addEventListener("click", () => this.#dialog.close());
    byId("compare-cancel").addEventListener("click", () => this.#cancelAll());
    for (const id of ["wipe-left", "wipe-right"]) byId(id).addEventListener("change", () => this.#showWipe());
    byId("wipe-range").addEventListener("input", moveWipe);
  }

  /**
   * Draws the same image three ways.
   * @param {object} request with a seed; `cloud_steps` of its `hybrid` is the split in the middle
   * @throws {Error} with a `field`, where the request is wrong
   */
  async start(request) {
    const columns = variants(request).map((variant) => new Column(variant, request));
    this.#columns = columns;
    setText(byId("compare-prompt"), `${request.prompt} · seed ${request.seed}`);
    byId("compare-columns").replaceChildren(...columns.map((column) => column.element));
    byId("wipe").hidden = true;
    if (!this.#dialog.open) this.#dialog.showModal();
    for (const column of columns) {
      try {
        column.run = await this.#launch(column.request, (run) => this.#update(columns, column, run));
      } catch (error) {
        if (error.field) {  // the same for all columns: shown next to that field
          this.#dialog.close();
          throw error;
        }
        column.showError(error.message);
      }
    }
  }

  #update(columns, column, run) {
    column.run = run;
    column.update();
    if (columns !== this.#columns) return;  // another comparison has started
    const numDone = columns.filter((each) => each.image).length;
    byId("compare-cancel").hidden = !columns.some((each) => each.run && isActive(each.run));
    setText(byId("compare-status"), numDone ? `${numDone} of ${columns.length} images are ready` : "");
    if (numDone >= 2 && column.image && !isActive(run)) this.#offerWipe();
  }

  #cancelAll() {
    for (const { run } of this.#columns) if (run && isActive(run)) this.#onCancel(run);
  }

  #offerWipe() {
    const ready = this.#columns.filter((column) => column.image);
    for (const [id, column] of [["wipe-left", ready[0]], ["wipe-right", ready.at(-1)]]) {
      byId(id).replaceChildren(...ready.map(({ title }) => make("option", { value: title }, title)));
      byId(id).value = column.title;
    }
    byId("wipe").hidden = false;
    this.#showWipe();
  }

  #showWipe() {
    for (const [select, img] of [["wipe-left", "wipe-over"], ["wipe-right", "wipe-under"]]) {
      const column = this.#columns.find(({ title }) => title === byId(select).value);
      byId(img).alt = column.title;
      byId("wipe-frame").style.aspectRatio = `${column.image.width} / ${column.image.height}`;
      showPicture(byId(img), column.image.url).catch(() => {});
    }
    moveWipe();
  }
}

/** One split of the comparison. */
class Column {
  run = null;
  #img = make("img", { alt: "", hidden: true });
  #note = make("p", { class: "column-note" }, "Waiting");
  #timeline = new Timeline();
  #shown = null;

  constructor({ title, subtitle, hybrid }, request) {
    this.title = title;
    this.request = { ...request, n: 1, hybrid };
    const frame = make("div", { class: "frame" }, this.#img);
    frame.style.aspectRatio = `${request.width} / ${request.height}`;
    this.element = make(
      "li", { class: "column", "data-testid": "compare-column" },
      make("h3", {}, title), make("p", { class: "hint" }, subtitle), frame, this.#note, this.#timeline.element,
    );
  }

  /** The finished image, as the gateway describes it; undefined before. */
  get image() {
    return this.run?.pictures[0].image ?? undefined;
  }

  update() {
    const [picture] = this.run.pictures;
    const { error } = this.run.job;
    setText(this.#note, this.image ? `${seconds(this.image.elapsed_s)} in all` : (error?.detail ?? this.run.phase));
    this.#timeline.update(picture);
    const next = picture.image ?? picture.preview;
    if (!next || next === this.#shown) return;
    this.#shown = next;
    this.#img.hidden = false;
    this.#img.alt = this.title;
    if (picture.image) showPicture(this.#img, picture.image.url).catch(() => {});
    else this.#img.src = picture.preview.image;
  }

  showError(message) {
    setText(this.#note, message);
    this.#note.classList.add("is-bad");
  }
}

function variants({ num_inference_steps: numSteps, hybrid }) {
  const { cloud_steps: cloudSteps, model } = hybrid;
  const numHere = numSteps - cloudSteps;
  return [
    {
      title: "Large alone",
      subtitle: `${plural(numSteps, "step")} in the cloud`,
      hybrid: { model, mode: "cloud", cloud_steps: numSteps },
    },
    {
      title: "Hybrid",
      subtitle: `${cloudSteps} in the cloud, ${numHere} here`,
      hybrid: { model, mode: "hybrid", cloud_steps: cloudSteps },
    },
    {
      title: "Small alone",
      subtitle: `${plural(numSteps, "step")} here, offline`,
      hybrid: { model, mode: "edge", cloud_steps: 0 },
    },
  ];
}

function moveWipe() {
  byId("wipe-frame").style.setProperty("--wipe", `${byId("wipe-range").value}%`);
}
