/** DOM helpers. */

/** @param {string} id @returns {HTMLElement} the element with that id, which must be in index.html */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`index.html has no #${id}`);
  return element;
}

/**
 * Makes an element.
 * @param {string} tag its name
 * @param {Object<string, unknown>} [properties] `class`, `data-*`, `aria-*`, `role` and `for` as attributes, `on*` as
 *   listeners, all else as properties; undefined is left out
 * @param {...(Node|string)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (/^(class|role|for|data-.*|aria-.*)$/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Makes an SVG element from attributes. */
export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** Sets text where it differs, so that live regions speak once. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Shows a modal dialog, and resolves with its return value once it is closed ("" by Escape). */
export function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

/** Closes a dialog on a click outside of it. */
export function closeOnBackdrop(dialog) {
  dialog.addEventListener("click", (event) => {
    const { left, right, top, bottom } = dialog.getBoundingClientRect();
    const { clientX: x, clientY: y } = event;
    const isOutside = x < left || x > right || y < top || y > bottom;
    if (event.target === dialog && isOutside) dialog.close();
  });
}

/** @returns {boolean} whether any modal dialog is open */
export function isDialogOpen() {
  return document.querySelector("dialog[open]") !== null;
}

/** @returns {string} "0.25 s", "1.9 s", "12 s", "2 min 5 s" */
export function seconds(value) {
  if (value >= 60) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${value >= 10 ? Math.round(value) : value.toFixed(value < 1 ? 2 : 1)} s`;
}

/** @returns {string} "121 KB" */
export function bytes(value) {
  if (value < 1000) return `${value} B`;
  return value < 1e6 ? `${Math.round(value / 1e3)} KB` : `${(value / 1e6).toFixed(1)} MB`;
}

/** @returns {string} "1.2 kJ" */
export function joules(value) {
  return value < 1000 ? `${Number(value.toPrecision(2))} J` : `${Number((value / 1000).toPrecision(3))} kJ`;
}

/** @param {number} dollars @returns {string} "0.02 ¢" */
export function cents(dollars) {
  return `${Number((100 * dollars).toPrecision(2))} ¢`;
}

/** @returns {string} "1 step", "8 steps" */
export function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** @returns {string} "steps 1–8", "step 3", counted from 1; `end` is exclusive */
export function stepRange(begin, end) {
  return end - begin === 1 ? `step ${end}` : `steps ${begin + 1}–${end}`;
}
