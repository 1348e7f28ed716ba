/** What is left of the token's limits, in one line; nothing where it has none. */

import { getMe } from "./api.js";
import { byId, setText } from "./dom.js";

const MIB = 2 ** 20;
const WORDS = {
  steps_per_minute: (left, limit) => `${left} of ${limit} steps a minute`,
  queued: (left, limit) => `${left} of ${limit} places in the queue`,
  jobs: (left, limit) => `${left} of ${limit} images at once`,
  pixels: (left, limit) => `images of up to ${limit} pixels`,
  bytes: (left, limit) => `${(left / MIB).toFixed(1)} of ${(limit / MIB).toFixed(1)} MiB for finished images`,
};

let asked = 0;

/** Asks the gateway what is left, and shows it. */
export async function showQuotas() {
  asked += 1;
  const number = asked;
  const { quotas } = await getMe().catch(() => ({ quotas: {} }));
  if (number === asked) setText(byId("quota"), quotaText(quotas));
}

/** @returns {string} a sentence for people; empty without limits */
export function quotaText(quotas) {
  const parts = Object.keys(WORDS).filter((name) => quotas[name]).map((name) => {
    const { limit, used } = quotas[name];
    return WORDS[name](Math.max(limit - (used ?? 0), 0), limit);
  });
  return parts.length ? `Your token has left: ${parts.join(", ")}.` : "";
}
