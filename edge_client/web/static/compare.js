/** "Compare splits": one prompt and seed with the large model, a hybrid and the small model, side by side. */

import { byId, closeOnBackdrop, make, plural, seconds, setText } from "./dom.js";
import { loadInto } from "./pictures.js";
import { explain } from "./problems.js";
import { effectiveSteps, isActive } from "./run.js";
import { Timeline } from "./timeline.js";

export class Compare {
  #dialog = byId("compare-view");
  #launch;
  #onCancel;
  #isBusy;
  #leastCloudSteps;
  #columns = [];

  /**
   * @param {{launch: (request: object, onUpdate: (run: object) => void) => Promise<object>,
   *          onCancel: (run: object) => void, isBusy: () => boolean,
   *          leastCloudSteps: (request: object) => number}} actions `launch` gives a run whose `ended`
   *   resolves once it has ended; `isBusy` tells whether something else is drawn now; `leastCloudSteps` tells after how
   *   many cloud steps this device can draw a request
   */
  constructor({ launch, onCancel, isBusy, leastCloudSteps }) {
    this.#launch = launch;
    this.#onCancel = onCancel;
    this.#isBusy = isBusy;
    this.#leastCloudSteps = leastCloudSteps;
    closeOnBackdrop(this.#dialog);
    this.#dialog.addEventListener("close", () => {
      this.#columns = [];  // what has not begun is not drawn
      byId("compare-columns").replaceChildren();
    });
    byId("compare-close").addEventListener("click", () => this.#dialog.close());
    byId("compare-cancel").addEventListener("click", () => this.#cancelAll());
    for (const id of ["wipe-left", "wipe-right"]) byId(id).addEventListener("change", () => this.#showWipe());
    byId("wipe-range").addEventListener("input", moveWipe);
  }

  /**
   * Draws the same image three ways, one after the other: two at once would slow each other down.
   * @param {object} request with a seed; `cloud_steps` of its `hybrid` is the split in the middle
   * @throws {Error} with a `field`, where the request is wrong
   */
  async start(request) {
    const columns = variants(request, this.#leastCloudSteps(request)).map((variant) => new Column(variant, request));
    this.#columns = columns;
    setText(byId("compare-prompt"), `${request.prompt} · seed ${request.seed}`);
    setText(byId("compare-note"), this.#isBusy()
      ? "One after the other. Other images are drawn meanwhile, which makes these slower."
      : "One after the other, so that their times can be compared.");
    byId("compare-columns").replaceChildren(...columns.map((column) => column.element));
    byId("wipe").hidden = true;
    if (!this.#dialog.open) this.#dialog.showModal();
    for (const column of columns) {
      try {
        await (await this.#launch(column.request, (run) => this.#update(columns, column, run))).ended;
      } catch (error) {
        if (error.field) {  // the same for all columns: shown next to that field
          this.#dialog.close();
          throw error;
        }
        column.showError(explain(error).title);
      }
      if (columns !== this.#columns) return;  // closed or cancelled, or another comparison has started
    }
  }

  #update(columns, column, run) {
    column.run = run;
    column.update();
    if (columns !== this.#columns) return;
    const numDone = columns.filter((each) => each.image).length;
    const isLast = columns.at(-1).run !== null;
    byId("compare-cancel").hidden = isLast && !isActive(columns.at(-1).run);
    setText(byId("compare-status"), numDone ? `${numDone} of ${columns.length} images are ready` : "");
    if (numDone >= 2 && column.image && !isActive(run)) this.#offerWipe();
  }

  #cancelAll() {
    const columns = this.#columns;
    this.#columns = [];
    byId("compare-cancel").hidden = true;
    for (const column of columns) {
      if (!column.run) column.showError("Cancelled");
      else if (isActive(column.run)) this.#onCancel(column.run);
    }
  }

  #offerWipe() {
    const ready = this.#columns.filter((column) => column.image);
    byId("wipe-frame").style.setProperty("--ratio", String(ready[0].image.width / ready[0].image.height));
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
      loadInto(byId(img), column.image.url);
    }
    moveWipe();
  }
}

/** One split of the comparison. */
class Column {
  run = null;
  #img = make("img", { alt: "", hidden: true });
  #note = make("p", { class: "column-note" }, "Waits for its turn");
  #timeline = new Timeline();
  #shown = null;

  constructor({ title, subtitle, hybrid }, request) {
    this.title = title;
    const loras = hybrid.mode === "edge" ? [] : request.loras;  // they are the cloud's
    this.request = { ...request, n: 1, loras, hybrid };
    const frame = make("div", { class: "frame" }, this.#img);
    frame.style.setProperty("--ratio", String(request.width / request.height));
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
    const phase = error ? explain(error).title : this.run.phase;
    setText(this.#note, this.image ? `${seconds(this.image.elapsed_s)} in all` : phase);
    this.#timeline.update(picture);
    const next = picture.image ?? picture.preview;
    if (!next || next === this.#shown) return;
    this.#shown = next;
    this.#img.hidden = false;
    this.#img.alt = this.title;
    if (picture.image) loadInto(this.#img, picture.image.url);
    else this.#img.src = picture.preview.image;
  }

  showError(message) {
    setText(this.#note, message);
    this.#note.classList.add("is-bad");
  }
}

/** @param {number} least steps that this device cannot draw: then it is not asked to draw alone */
function variants(request, least) {
  const { cloud_steps: cloudSteps, model } = request.hybrid;
  const numSteps = effectiveSteps(request);
  const numHere = numSteps - cloudSteps;
  return [
    {
      title: "Large alone",
      subtitle: `${plural(numSteps, "step")} in the cloud`,
      hybrid: { model, mode: "cloud", cloud_steps: null },
    },
    {
      title: "Hybrid",
      subtitle: `${cloudSteps} in the cloud, ${numHere} here`,
      hybrid: { model, mode: "hybrid", cloud_steps: cloudSteps },
    },
    {
      title: "Small alone",
      subtitle: `${plural(numSteps, "step")} here, offline`,
      hybrid: { model, mode: "edge", cloud_steps: null },
    },
  ].filter(({ hybrid }) => least === 0 || hybrid.mode !== "edge");
}

function moveWipe() {
  byId("wipe-frame").style.setProperty("--wipe", `${byId("wipe-range").value}%`);
}
