/** Polls the gateway's capabilities and shows whether the cloud is reachable. */

import { changeToken, getCapabilities } from "./api.js";
import { byId, make, setText } from "./dom.js";

const POLL_MS = 10_000;

export class CloudWatch {
  #onCapabilities;
  #capabilities = null;
  #lastLoss = null;
  #poll = null;

  /** @param {(capabilities: object) => void} onCapabilities called with each answer */
  constructor(onCapabilities) {
    this.#onCapabilities = onCapabilities;
    document.addEventListener("visibilitychange", () => this.#schedule(0));
  }

  /** Polls now, and from then on while the page is visible. */
  async start() {
    await this.#ask(false).catch((error) => this.#showError(error));
    this.#schedule(POLL_MS);
  }

  /** Shows that a job continued without the cloud, until the cloud answers again. */
  tookOver({ message, reason }) {
    this.#lastLoss = message || reason;
    this.#show();
    this.#schedule(POLL_MS);
  }

  #schedule(delayMs) {
    clearTimeout(this.#poll);
    if (document.hidden) return;
    this.#poll = setTimeout(async () => {
      await this.#ask(true).catch((error) => this.#showError(error));
      this.#schedule(POLL_MS);
    }, delayMs);
  }

  async #ask(isPoll) {
    const lossBefore = this.#lastLoss;
    this.#capabilities = await getCapabilities(isPoll);
    const isNewLoss = this.#lastLoss !== lossBefore;  // newer than the request
    if (this.#capabilities.cloud.reachable && !isNewLoss) this.#lastLoss = null;
    this.#show();
    this.#onCapabilities(this.#capabilities);
  }

  #showError(error) {
    const needsToken = error.status === 401;
    showBanner(error.message, needsToken && ["Enter the token", async () => {
      if (await changeToken()) await this.start();
    }]);
  }

  #show() {
    const { cloud, edge } = this.#capabilities;
    const isAway = cloud.configured && (!cloud.reachable || this.#lastLoss !== null);
    const reason = this.#lastLoss ?? cloud.message;
    showBanner(isAway ? `The cloud is away; this device continues alone${reason ? ` (${reason})` : ""}.` : "");
    showPlaces(cloud, edge, isAway);
  }
}

/** @param {string} text @param {[string, () => void]|false} [action] a button's label, and what it does */
function showBanner(text, action = false) {
  const banner = byId("banner");
  if (banner.dataset.text === text) return;  // so that it is read out once, and its button keeps the focus
  banner.dataset.text = text;
  setText(banner, text);
  if (action) banner.append(" ", make("button", { type: "button", onclick: action[1] }, action[0]));
}

function showPlaces(cloud, edge, isAway) {
  const cloudWords = cloud.models[0]?.id ?? (cloud.configured ? cloud.target : "not configured");
  const cloudState = isAway ? "away" : numberWords(cloud.clouds ?? []);
  byId("places").replaceChildren(
    place("cloud", "Cloud", cloudWords, cloud.configured ? cloudState : ""),
    place("edge", "This device", `${edge.model}, ${edge.provider.split(/[ :]/)[0]}${levelWords(edge)}`, ""),
  );
}

/** @returns {string} which of the timesteps, 999 to 0, its U-Net is trained for, where that is not all */
function levelWords({ max_timestep: most, has_high_noise_unet: hasOther }) {
  if (most === null) return "";
  return `, timesteps up to ${most}${hasOther ? ", with a second U-Net above" : ""}`;
}

function place(kind, name, words, state) {
  return make("li", { class: `place ${kind} ${state}` },
    make("i", { class: `swatch ${kind}`, "aria-hidden": "true" }), make("b", {}, name),
    make("span", { class: "place-words", title: words }, words), state ? make("span", { class: "place-state" }, state) : "");
}

/** @returns {string} "connected", "2 clouds", or "1 of 2 clouds" where one is away */
function numberWords(clouds) {
  if (clouds.length < 2) return "connected";
  const numThere = clouds.filter(({ reachable }) => reachable).length;
  return numThere === clouds.length ? `${clouds.length} clouds` : `${numThere} of ${clouds.length} clouds`;
}
