/** Image files that the user selects. */

const LONGEST_SIDE = 1536;

/**
 * Reads an image file; scales down one that is too large.
 * @param {File} file
 * @param {number} maxChars how long the data URL may be
 * @returns {Promise<string>} a data URL
 * @throws where the browser cannot read it
 */
export async function readImage(file, maxChars) {
  const bitmap = await createImageBitmap(file);
  if (file.size * 1.4 < maxChars) return readDataUrl(file);
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/webp", 0.92);
}

function readDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
