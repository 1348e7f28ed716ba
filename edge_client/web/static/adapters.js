/** The adapters (LoRAs) of the cloud's model: which are used, and how much. */

import { byId, make, setText } from "./dom.js";

const HEAVIEST = 2;

export class Adapters {
  #names = [];
  #weights = new Map();  // of those that are used

  /** @param {string[]} names what the chosen model has */
  offer(names) {
    if (names.join("\n") === this.#names.join("\n")) return;
    this.#names = names;
    byId("adapters").hidden = !names.length;
    byId("adapters-list").replaceChildren(...names.map((name, i) => this.#makeRow(name, i)));
  }

  /** @returns {{name: string, weight: number}[]} */
  get chosen() {
    return this.#names.filter((name) => this.#weights.has(name))
      .map((name) => ({ name, weight: this.#weights.get(name) }));
  }

  /** Chooses these. @returns {string[]} those that are not offered */
  set(loras) {
    this.#weights = new Map(loras.map(({ name, weight = 1 }) => [name, Number(weight)]));
    byId("adapters-list").replaceChildren(...this.#names.map((name, i) => this.#makeRow(name, i)));
    byId("adapters").open ||= this.chosen.length > 0;
    return loras.map(({ name }) => name).filter((name) => !this.#names.includes(name));
  }

  /** Says whether the split lets them work. */
  show(hasCloudSteps) {
    const isIdle = this.chosen.length > 0 && !hasCloudSteps;
    setText(byId("adapters-hint"), isIdle ? "They change the large model only: give the cloud some steps, or they are left out." : "");
  }

  #makeRow(name, i) {
    const weight = this.#weights.get(name);
    const box = make("input", { type: "checkbox", id: `adapter-${i}`, checked: weight !== undefined });
    const range = make("input", {
      type: "range", min: -HEAVIEST, max: HEAVIEST, step: 0.05, value: weight ?? 1, disabled: weight === undefined,
      "aria-label": `Weight of ${name}`,
    });
    const text = make("output", { class: "hint" }, String(weight ?? 1));
    const change = () => {
      range.disabled = !box.checked;
      setText(text, range.value);
      if (box.checked) this.#weights.set(name, range.valueAsNumber);
      else this.#weights.delete(name);
    };
    for (const control of [box, range]) control.addEventListener("input", change);
    return make("li", { class: "adapter" }, make("label", { class: "check", for: box.id }, box, name), range, text);
  }
}
