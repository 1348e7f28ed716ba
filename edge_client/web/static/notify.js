/** Tells the user of the system when an image is done and this page is not in view. */

import { byId } from "./dom.js";
import { keep, readKept } from "./kept.js";

const KEY = "hybridsd.notify";

export class Notifier {
  #box = byId("notify");

  constructor() {
    if (!("Notification" in globalThis) || !isSecureContext) return;  // then the browser has none to give
    byId("notify-field").hidden = false;
    this.#box.checked = readKept(KEY) === "1" && Notification.permission === "granted";
    this.#box.addEventListener("change", () => this.#change());
  }

  /** Tells that a run has ended, unless the page is in view. */
  tell(prompt, words) {
    if (!document.hidden || !this.#box.checked || Notification.permission !== "granted") return;
    const notification = new Notification(words, { body: prompt.slice(0, 200) });
    notification.addEventListener("click", () => {
      window.focus();
      notification.close();
    });
  }

  async #change() {
    const isAllowed = !this.#box.checked || (await Notification.requestPermission()) === "granted";
    this.#box.checked &&= isAllowed;
    byId("notify-hint").hidden = isAllowed;
    keep(KEY, this.#box.checked ? "1" : "0");
  }
}
