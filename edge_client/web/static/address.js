/** The address of the page: with an open image it names that image, so that it can be kept, shared and left by Back. */

const NAME = "image";

history.scrollRestoration = "manual";  // the page scrolls itself to what an action concerns

/** @returns {{jobId: string, index: number}|null} the image that the address names */
export function imageInAddress() {
  const [, jobId, index] = /^([A-Za-z0-9_-]{1,64})\.(\d)$/.exec(new URLSearchParams(location.search).get(NAME) ?? "") ?? [];
  return jobId ? { jobId, index: Number(index) } : null;
}

/** Names an image in the address. Back then leads to where no image is open. */
export function nameImage({ job, image }) {
  const url = `?${new URLSearchParams({ [NAME]: `${job.id}.${image.index}` })}`;
  if (imageInAddress()) history.replaceState(history.state, "", url);
  else history.pushState({ isOpened: true }, "", url);
}

/** Names no image any more. */
export function nameNoImage() {
  if (!imageInAddress()) return;
  if (history.state?.isOpened) history.back();
  else history.replaceState(null, "", location.pathname);
}
