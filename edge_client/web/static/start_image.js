/** The image to begin with: chosen, dropped or pasted; how it is fitted; and a mask, painted or chosen. */

import { byId, make, setText } from "./dom.js";
import { readImage } from "./pictures.js";

const MASK_SIDE = 1024;  // most pixels of a painted mask
const FITS = {
  crop: { style: "cover", words: cropWords },
  pad: { style: "contain", words: () => "Grey bars fill it up." },
  stretch: { style: "fill", words: () => "It is stretched." },
};

export class StartImage {
  #image = null;  // {url, width, height}
  #maskFile = null;  // a data URL
  #mask = new Mask(byId("mask-canvas"), () => this.#maskPainted());
  #size = [1, 1];
  #maxChars = Infinity;
  #onChange;
  #onProblem;

  /** @param {{onChange: () => void, onProblem: (field: string, text: string) => void}} actions */
  constructor({ onChange, onProblem }) {
    this.#onChange = onChange;
    this.#onProblem = onProblem;
    byId("image").addEventListener("change", () => this.#choose(byId("image").files[0]));
    byId("mask").addEventListener("change", () => this.#chooseMask(byId("mask").files[0]));
    byId("fit").addEventListener("input", () => this.#show());
    byId("mask-paint").addEventListener("input", () => this.#show());
    byId("mask-clear").addEventListener("click", () => this.#clearMask());
    byId("clear-image").addEventListener("click", () => this.clear());
  }

  /** @param {number} maxBodyBytes of a request @param {boolean} isPossible whether this device can begin with one */
  setLimits(maxBodyBytes, isPossible) {
    this.#maxChars = maxBodyBytes * 0.4;  // two images, and the rest
    byId("image-details").hidden = !isPossible;
  }

  get isPossible() {
    return !byId("image-details").hidden;
  }

  /** @returns {boolean} whether there is one */
  get isChosen() {
    return this.#image !== null;
  }

  /** @returns {object} its part of the body of POST /v1/jobs */
  request() {
    if (!this.#image) return { image: null, mask: null };
    const mask = this.#mask.toDataUrl() ?? this.#maskFile;
    const { url } = this.#image;
    return { image: url, mask, strength: byId("strength").valueAsNumber, fit: byId("fit").value };
  }

  /** @returns {[number, number]|null} the size of the image that is to be drawn, in its own shape */
  ownSize(area, multiple, maxSide) {
    if (!this.#image) return null;
    const ratio = this.#image.width / this.#image.height;
    const round = (side) => Math.min(Math.max(1, Math.round(side / multiple)) * multiple, maxSide - (maxSide % multiple));
    return [round(Math.sqrt(area * ratio)), round(Math.sqrt(area / ratio))];
  }

  /** Begins with this file. @returns {Promise<boolean>} whether it can */
  async use(file) {
    const isUsed = await this.#choose(file);
    if (isUsed) byId("image-details").open = true;
    return isUsed;
  }

  /** Begins from noise again. */
  clear() {
    byId("image").value = "";
    this.#image = null;
    this.#clearMask();
    this.#show();
    this.#onChange();
  }

  /** Tells the size that the image will have. */
  setSize(width, height) {
    if (!(width > 0 && height > 0) || String(this.#size) === String([width, height])) return;
    this.#size = [width, height];
    this.#show();
  }

  async #choose(file) {
    if (!file) {
      this.clear();
      return false;
    }
    try {
      const image = await readImage(file, this.#maxChars);
      this.#image = image;
    } catch {
      byId("image").value = "";
      this.#onProblem("image", `${file.name || "This file"} is no image that the browser can read. PNG, JPEG or WebP is.`);
      return false;
    }
    byId("image-thumb").src = this.#image.url;
    this.#clearMask();
    this.#mask.begin(this.#image.width, this.#image.height);
    this.#show();
    this.#onChange();
    return true;
  }

  async #chooseMask(file) {
    this.#clearMask({ keepsFile: true });
    try {
      this.#maskFile = file ? (await readImage(file, this.#maxChars)).url : null;
    } catch {
      byId("mask").value = "";
      this.#onProblem("mask", "This file is no image that the browser can read. PNG, JPEG or WebP is.");
    }
    this.#show();
    this.#onChange();
  }

  #maskPainted() {
    this.#maskFile = null;
    byId("mask").value = "";
    this.#show();
    this.#onChange();
  }

  #clearMask({ keepsFile = false } = {}) {
    this.#mask.clear();
    this.#maskFile = null;
    if (!keepsFile) byId("mask").value = "";
    this.#show();
  }

  #show() {
    const [width, height] = this.#size;
    const fit = FITS[byId("fit").value] ?? FITS.crop;
    byId("start").hidden = !this.#image;
    byId("start-frame").style.setProperty("--ratio", String(width / height));
    for (const id of ["image-thumb", "mask-canvas"]) byId(id).style.objectFit = fit.style;
    this.#mask.isOn = byId("mask-paint").checked;
    byId("mask-tools").hidden = !byId("mask-paint").checked;
    byId("mask-thumb").hidden = !this.#maskFile;
    if (this.#maskFile) byId("mask-thumb").src = this.#maskFile;
    if (!this.#image) return;
    const { width: ownWidth, height: ownHeight } = this.#image;
    const isSameShape = Math.abs(ownWidth / ownHeight / (width / height) - 1) < 0.01;
    const change = isSameShape ? "Nothing is cut off." : fit.words(ownWidth / ownHeight, width / height);
    setText(byId("start-text"), `${ownWidth} × ${ownHeight} becomes ${width} × ${height}. ${change}`);
    byId("own-shape").hidden = isSameShape;
  }
}

/** Reads the images of a drop or a paste. @returns {File[]} */
export function imagesOf(transfer) {
  return [...(transfer?.files ?? [])];
}

function cropWords(own, wanted) {
  const share = Math.round(100 * (1 - Math.min(own, wanted) / Math.max(own, wanted)));
  return `${share} % is cut off: ${own > wanted ? "left and right" : "top and bottom"}.`;
}

/** A canvas above the image that is painted on; in the image's own coordinates. */
class Mask {
  #canvas;
  #context;
  #isPainted = false;
  #last = null;
  isOn = false;

  constructor(canvas, onPainted) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.isOn) return;
      canvas.setPointerCapture(event.pointerId);
      this.#last = this.#pointOf(event);
      this.#paint(event);
    });
    canvas.addEventListener("pointermove", (event) => this.#last && this.#paint(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, () => {
        if (this.#last) onPainted();
        this.#last = null;
      });
    }
  }

  /** Begins an empty one for an image of that size. */
  begin(width, height) {
    const scale = Math.min(1, MASK_SIDE / Math.max(width, height));
    this.#canvas.width = Math.max(1, Math.round(width * scale));
    this.#canvas.height = Math.max(1, Math.round(height * scale));
    this.#isPainted = false;
  }

  clear() {
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    this.#isPainted = false;
  }

  /** @returns {string|null} a PNG, white where it was painted, on black; null where it was not, or is off */
  toDataUrl() {
    if (!this.isOn || !this.#isPainted) return null;
    const copy = make("canvas", { width: this.#canvas.width, height: this.#canvas.height });
    const context = copy.getContext("2d");
    context.drawImage(this.#canvas, 0, 0);
    for (const [operation, colour] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
      context.globalCompositeOperation = operation;
      context.fillStyle = colour;
      context.fillRect(0, 0, copy.width, copy.height);
    }
    return copy.toDataURL("image/png");
  }

  #paint(event) {
    const { x, y, scale } = this.#pointOf(event);
    const context = this.#context;
    context.globalCompositeOperation = byId("mask-erase").checked ? "destination-out" : "source-over";
    context.strokeStyle = "#e0218a";
    context.lineWidth = byId("mask-brush").valueAsNumber / scale;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(this.#last.x, this.#last.y);
    context.lineTo(x, y);
    context.stroke();
    this.#last = { x, y };
    this.#isPainted = true;
  }

  /** @returns {{x: number, y: number, scale: number}} where the pointer is on the canvas, under its `object-fit` */
  #pointOf(event) {
    const { left, top, width: boxWidth, height: boxHeight } = this.#canvas.getBoundingClientRect();
    const { width, height } = this.#canvas;
    const scales = [boxWidth / width, boxHeight / height];
    const [scaleX, scaleY] = {
      cover: Array(2).fill(Math.max(...scales)), contain: Array(2).fill(Math.min(...scales)), fill: scales,
    }[this.#canvas.style.objectFit] ?? scales;
    return {
      x: (event.clientX - left - (boxWidth - width * scaleX) / 2) / scaleX,
      y: (event.clientY - top - (boxHeight - height * scaleY) / 2) / scaleY,
      scale: Math.sqrt(scaleX * scaleY),
    };
  }
}
