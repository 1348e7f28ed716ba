/** Whether the cloud is there: polls what the gateway can do, and tells when this device is on its own. */

import { getCapabilities } from "/static/api.js";
import { byId, make, setText } from "/static/dom.js";

const POLL_MS = 10_000;

export class CloudWatch {
  #onCapabilities;
  #lastLoss = null;
  #poll = null;

  /** @param {(capabilities: object) => void} onCapabilities called with each answer */
  constructor(onCapabilities) {
    this.#onCapabilities = onCapabilities;
    document.addEventListener("visibilitychange", () => this.#schedule(0));
  }

  /** Asks now, and from then on while the page is visible. */
  async start() {
    await this.#ask(false).catch((error) => showBanner(error.message));
    this.#schedule(POLL_MS);
  }

  /** Tells that a job went on without the cloud; forgotten when the cloud answers again. @param {object} event took_over */
  tookOver({ message, reason }) {
    this.#lastLoss = message || reason;
    showAway(this.#lastLoss);
    this.#schedule(POLL_MS);
  }

  #schedule(delayMs) {
    clearTimeout(this.#poll);
    if (document.hidden) return;
    this.#poll = setTimeout(async () => {
      await this.#ask(true).catch((error) => showBanner(error.message));
      this.#schedule(POLL_MS);
    }, delayMs);
  }

  async #ask(isPoll) {
    const lossBefore = this.#lastLoss;
    const capabilities = await getCapabilities(isPoll);
    const { configured, reachable, message } = capabilities.cloud;
    if (reachable && this.#lastLoss === lossBefore) this.#lastLoss = null;
    if (configured && !reachable) showAway(message || this.#lastLoss);
    else if (this.#lastLoss) showAway(this.#lastLoss);
    else showBanner("");
    showPlaces(capabilities);
    this.#onCapabilities(capabilities);
  }
}

function showAway(reason) {
  showBanner(`The cloud is away; this device goes on alone${reason ? ` (${reason})` : ""}.`);
}

function showBanner(text) {
  setText(byId("banner"), text);
}

function showPlaces({ cloud, edge }) {
  const cloudWords = cloud.configured ? (cloud.models[0]?.id ?? cloud.target) : "not configured";
  const state = cloud.reachable ? "connected" : "away";
  byId("places").replaceChildren(
    place("cloud", "Cloud", cloudWords ?? "", cloud.configured ? state : ""),
    place("edge", "This device", `${edge.model}, ${edge.provider.replace(/ExecutionProvider$/, "")}`, ""),
  );
}

function place(kind, name, words, state) {
  return make("li", { class: `place ${kind} ${state}` },
    make("i", { class: `swatch ${kind}`, "aria-hidden": "true" }), make("b", {}, name),
    make("span", { class: "place-words" }, words), state ? make("span", { class: "place-state" }, state) : "");
}
