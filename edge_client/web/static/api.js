/** The gateway's API: requests, token, events and images. */

import { ask, byId, setText } from "./dom.js";
import { keep, readKept } from "./kept.js";

const TOKEN_KEY = "hybridsd.token";
const LAST_EVENTS = new Set(["completed", "failed", "cancelled"]);
const MAX_STREAMS = 3;  // browsers open 6 connections to a server; other requests need some
const FIRST_BACKOFF_MS = 500;
const LONGEST_BACKOFF_MS = 8000;

/** A request that failed, with the gateway's problem details (RFC 9457). */
export class ProblemError extends Error {
  /** @param {{status: number, detail?: string, title?: string, reason?: string, field?: ?string, retry_delay_s?: ?number}} problem */
  constructor(problem) {
    super(problem.detail || problem.title || "Something went wrong.");
    this.field = problem.field ?? null;
    this.status = problem.status;
    this.reason = problem.reason ?? "";
    this.retryDelayS = problem.retry_delay_s ?? null;
  }
}

/** A semaphore; waiters are served in order. */
class Semaphore {
  #numFree;
  #waiting = [];

  constructor(count) {
    this.#numFree = count;
  }

  async acquire() {
    if (this.#numFree > 0) this.#numFree -= 1;
    else await new Promise((resolve) => this.#waiting.push(resolve));
  }

  release() {
    const next = this.#waiting.shift();
    if (next) next();
    else this.#numFree += 1;
  }
}

const OPENED = Symbol("the connection is there");
const streams = new Semaphore(MAX_STREAMS);

/** @param {boolean} [isPoll] whether it runs in the background: then the user is not asked for a missing token */
export const getCapabilities = (isPoll = false) => getJson("/v1/capabilities", { asksToken: !isPoll });
/** @returns {Promise<{quotas: Object<string, {limit: number, used: ?number}>}>} who the token stands for */
export const getMe = () => getJson("/v1/me", { asksToken: false });
export const getJob = (id, isPoll = false) => getJson(`/v1/jobs/${id}`, { asksToken: !isPoll });
export const cancelJob = (id) => getJson(`/v1/jobs/${id}/cancel`, { method: "POST" });
export const deleteJob = (id) => send(`/v1/jobs/${id}`, { method: "DELETE" });

/** @param {object} request the body of POST /v1/jobs @returns {Promise<object>} the job */
export function createJob(request) {
  return getJson("/v1/jobs", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
  });
}

/** @param {string|null} before the cursor of the page before @returns {Promise<{jobs: object[], next: string|null}>} */
export function listJobs(before = null, limit = 24) {
  const query = new URLSearchParams({ limit: String(limit) });
  if (before) query.set("before", before);
  return getJson(`/v1/jobs?${query}`);
}

/** @param {string} image a data URL @returns {Promise<{info: string, items: object, parameters: object}>} what it says of itself */
export function readInfo(image) {
  return getJson("/sdapi/v1/png-info", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ image }),
  });
}

/**
 * Yields a job's events up to its last one; reconnects when a connection breaks, and says so: "disconnected",
 * "connected".
 * @param {string} id
 * @returns {AsyncGenerator<{name: string, data: object}>}
 */
export async function* streamEvents(id) {
  let lastId = null;
  let backoffMs = FIRST_BACKOFF_MS;
  let isLost = false;
  for (;;) {
    try {
      for await (const event of connect(id, lastId)) {
        if (isLost) yield { name: "connected", data: {} };
        isLost = false;
        if (event === OPENED) continue;
        lastId = event.id ?? lastId;
        backoffMs = FIRST_BACKOFF_MS;
        yield { name: event.name, data: JSON.parse(event.data) };
        if (LAST_EVENTS.has(event.name)) return;
      }
    } catch (error) {
      if (error instanceof ProblemError && error.status >= 400 && error.status < 500) throw error;
    }
    if (!isLost) yield { name: "disconnected", data: {} };
    isLost = true;
    await new Promise((resolve) => setTimeout(resolve, backoffMs));
    backoffMs = Math.min(2 * backoffMs, LONGEST_BACKOFF_MS);
  }
}

async function* connect(id, lastId) {
  const headers = { Accept: "text/event-stream", ...(lastId === null ? {} : { "Last-Event-ID": lastId }) };
  let reader;
  await streams.acquire();
  try {
    const response = await send(`/v1/jobs/${id}/events`, { headers, cache: "no-store" });
    yield OPENED;
    reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    yield* parseEvents(reader);
  } finally {
    reader?.cancel().catch(() => {});
    streams.release();
  }
}

async function* parseEvents(reader) {
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).split(/\r\n\r\n|\n\n|\r\r/);
    text = blocks.pop();
    for (const block of blocks) {
      const event = parseEvent(block);
      if (event) yield event;
    }
  }
}

/** @param {string} block the lines of one event @returns {{id: ?string, name: string, data: string}|null} */
function parseEvent(block) {
  const event = { id: null, name: "message", data: [] };
  for (const line of block.split(/\r\n|\n|\r/)) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line) ?? [];
    if (field === "id") event.id = value;
    else if (field === "event") event.name = value;
    else if (field === "data") event.data.push(value);
  }
  return event.data.length ? { ...event, data: event.data.join("\n") } : null;
}

/**
 * Shows an image of the gateway in an `<img>`. Its address gives access; where that is no longer so it is fetched with
 * the token.
 * @returns {Promise<void>} as soon as it is there
 * @throws {ProblemError} where it cannot be loaded
 */
export function showPicture(img, url) {
  img.dataset.url = url;
  return new Promise((resolve, reject) => {
    img.onload = () => resolve();
    img.onerror = () => showFetched(img, url).then(resolve, reject);
    img.src = url;
  });
}

async function showFetched(img, url) {
  img.onerror = null;
  const blobUrl = URL.createObjectURL(await getPicture(url));
  const revoke = () => URL.revokeObjectURL(blobUrl);
  if (img.dataset.url !== url) return revoke();  // it shows another image by now
  try {
    await new Promise((resolve, reject) => {
      img.onload = resolve;
      img.onerror = () => reject(new ProblemError({ status: 0, detail: "The browser cannot show this image." }));
      img.src = blobUrl;
    });
  } finally {
    revoke();
  }
}

/** @returns {string} the address of an image in another format, or no larger than `side` pixels */
export function pictureUrl(url, options) {
  return `${url}${url.includes("?") ? "&" : "?"}${new URLSearchParams(options)}`;
}

/** @returns {Promise<Blob>} */
export async function getPicture(url) {
  return (await send(url)).blob();
}

/** Saves an image as a file of that name. */
export async function downloadPicture(url, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await getPicture(url));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function getJson(path, options) {
  return (await send(path, options)).json();
}

async function send(path, { asksToken = true, ...options } = {}) {
  const used = token();
  const headers = { ...options.headers, ...(used ? { Authorization: `Bearer ${used}` } : {}) };
  // credentials: otherwise the browser shows its own password dialog when the token is missing
  const response = await fetch(path, { credentials: "omit", ...options, headers }).catch(() => {
    throw new ProblemError({ status: 0, detail: "The gateway on this device does not answer. Is it running?" });
  });
  if (response.status === 401 && asksToken && (await askToken(used))) return send(path, options);
  if (!response.ok) throw await readProblem(response);
  return response;
}

async function readProblem(response) {
  const problem = await response.json().catch(() => ({}));
  const fallback = response.status === 401 ? "The token is missing or wrong." : `The gateway answered ${response.status} ${response.statusText}`.trim();
  return new ProblemError({ detail: fallback, ...problem, status: response.status });
}

function token() {
  return readKept(TOKEN_KEY, "sessionStorage");
}

let asking = null;

/**
 * Asks the user for the token, once for all waiting requests.
 * @param {string|null} refused the token that was refused
 * @returns {Promise<boolean>} whether there is another one
 */
async function askToken(refused) {
  if (token() !== refused) return true;
  asking ??= readToken(refused !== null).finally(() => (asking = null));
  return asking;
}

/** Asks for the token at the next chance: on the user's wish. @returns {Promise<boolean>} whether there is another one */
export const changeToken = () => askToken(token());

async function readToken(wasRefused) {
  const input = byId("token");
  setText(byId("token-error"), wasRefused ? "The gateway refused the token: it is wrong, or no longer valid." : "");
  input.toggleAttribute("aria-invalid", wasRefused);
  input.value = "";
  const answer = await ask(byId("token-dialog"));
  const value = input.value.trim();
  input.value = "";
  if (answer !== "ok" || !value) return false;
  keep(TOKEN_KEY, value, "sessionStorage");
  return true;
}
