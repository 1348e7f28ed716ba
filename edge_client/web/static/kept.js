/** What the browser keeps between visits; where it keeps nothing, what lasts as long as the page. */

const meanwhile = new Map();

/** @param {"localStorage"|"sessionStorage"} storage @returns {string|null} */
export function readKept(key, storage = "localStorage") {
  try {
    return globalThis[storage].getItem(key);
  } catch {
    return meanwhile.get(key) ?? null;  // the browser forbids it
  }
}

/** @param {"localStorage"|"sessionStorage"} storage */
export function keep(key, value, storage = "localStorage") {
  try {
    globalThis[storage].setItem(key, value);
  } catch {
    meanwhile.set(key, value);  // forbidden, or full
  }
}

/** @returns {unknown} what was kept as JSON; null where that is nothing, or no JSON */
export function readKeptJson(key) {
  try {
    return JSON.parse(readKept(key));
  } catch {
    return null;
  }
}
