/** Image files that the user selects, and images that may fail to load. */

import { showPicture } from "./api.js";

const LONGEST_SIDE = 1536;
/** What the gateway reads; other kinds are converted here. */
const KNOWN_TYPES = ["image/png", "image/jpeg", "image/webp"];

/**
 * Reads an image file; scales down one that is too large, converts one that the gateway does not know.
 * @param {Blob} file
 * @param {number} maxChars how long the data URL may be
 * @returns {Promise<{url: string, width: number, height: number}>} a data URL, and the image's size, upright
 * @throws where the browser cannot read it
 */
export async function readImage(file, maxChars) {
  const bitmap = await createImageBitmap(file);
  const { width, height } = bitmap;
  if (KNOWN_TYPES.includes(file.type) && file.size * 1.4 < maxChars) {
    return { url: await readDataUrl(file), width, height };
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return { url: canvas.toDataURL("image/webp", 0.92), width, height };
}

/** @param {Blob} file @returns {boolean} whether the gateway can read what such a file says of itself */
export function maySayHowItWasMade(file) {
  return KNOWN_TYPES.includes(file.type);
}

/** @returns {Promise<string>} a file as a data URL */
export function readDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

/**
 * Shows an image of the gateway, or says in its place that it could not be loaded.
 * @param {HTMLImageElement} img in an element of its own
 * @param {string} url
 * @param {(error: Error) => void} [onFail]
 */
export async function loadInto(img, url, onFail) {
  const parent = img.parentElement;
  parent?.removeAttribute("data-problem");
  try {
    await showPicture(img, url);
  } catch (error) {
    if (img.dataset.url !== url) return;
    parent?.setAttribute("data-problem", "This image could not be loaded");
    img.alt = "This image could not be loaded";
    onFail?.(error);
  }
}
