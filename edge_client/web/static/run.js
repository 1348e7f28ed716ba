/** The state of a job, updated by its events. Pure functions. */

/**
 * @typedef {object} PictureRun one picture of a job, as far as it is
 * @property {number} index
 * @property {number} numSteps
 * @property {number} cloudSteps steps that the cloud is to run, or has run
 * @property {Map<number, {place: string, elapsedS: number}>} steps those that are done
 * @property {{step: number, image: string}|null} preview
 * @property {Set<number>} previewed steps after which there was one
 * @property {number} previewS what the previews took, in seconds
 * @property {object|null} image the finished picture, as the gateway describes it
 */

/**
 * @typedef {object} Run
 * @property {object} job as the gateway last gave it
 * @property {PictureRun[]} pictures
 * @property {number} current index of the picture that is being drawn
 * @property {string} phase one sentence for a person; changes only when something worth saying happens
 * @property {object|null} problem why it failed
 * @property {boolean} isLost whether the gateway does not answer
 */

/** @param {object} job @returns {Run} */
export function beginRun(job) {
  const { num_inference_steps: asked, hybrid } = job.request;
  const numSteps = effectiveSteps({ ...job.request, num_inference_steps: asked ?? 0 });  // "planned" has the default
  const cloudSteps = { edge: 0, cloud: numSteps }[hybrid?.mode] ?? hybrid?.cloud_steps ?? 0;
  const pictures = Array.from({ length: job.request.n ?? 1 }, (_, index) => ({
    index, numSteps, cloudSteps, steps: new Map(), preview: null, previewed: new Set(), previewS: 0, image: null,
  }));
  const phase = waiting(job.queue_position);
  const run = { job, pictures, current: 0, phase, problem: null, isLost: false };
  for (const image of job.images) finishPicture(run, image);
  return run;
}

/** @param {{job: object}} run @returns {boolean} whether its job has not ended */
export function isActive({ job }) {
  return job.state === "queued" || job.state === "running";
}

/** @param {object} image a finished picture, as the gateway describes it @returns {PictureRun} */
export function pictureRunOf(image) {
  return {
    index: image.index, numSteps: image.num_inference_steps, cloudSteps: image.actual_cloud_steps,
    steps: stepMap(image.steps), preview: null, previewed: new Set(), previewS: image.preview_s ?? 0, image,
  };
}

/** @returns {number} steps that are drawn: an image to begin with leaves out the first ones */
export function effectiveSteps({ num_inference_steps: numSteps, image, strength }) {
  return image && strength ? Math.max(1, Math.floor(numSteps * strength)) : numSteps;
}

const HANDLERS = {
  queued(run, { position }) {
    run.phase = waiting(position);
  },
  started(run) {
    run.job.state = "running";
    run.phase = "Begun";
  },
  planned(run, data) {
    const picture = pictureAt(run, data.image_index);
    run.current = picture.index;
    picture.numSteps = data.num_inference_steps;
    picture.cloudSteps = data.cloud_steps;
    picture.steps.clear();  // sent again after a restart of the gateway
    picture.previewed.clear();
    picture.previewS = 0;
    const where = data.cloud_steps ? "The cloud begins" : "This device draws";
    run.phase = `${where}${run.pictures.length > 1 ? ` picture ${picture.index + 1}` : ""}`;
  },
  waiting(run, { position }) {
    run.phase = position ? `Waiting in the cloud, ${position} before it` : "Waiting in the cloud";
  },
  step(run, data) {
    const picture = pictureAt(run, data.image_index);
    run.current = picture.index;
    run.job.state = "running";
    const before = picture.steps.get(data.step)?.elapsedS ?? 0;  // some solvers call the model twice in a step
    picture.steps.set(data.step, { place: data.place, elapsedS: before + data.elapsed_s });
    run.phase = data.place === "cloud" ? "The cloud draws" : "This device draws";
  },
  preview(run, { image_index, step, image, elapsed_s = 0 }) {
    const picture = pictureAt(run, image_index);
    picture.preview = { step, image };
    if (!picture.previewed.has(step)) picture.previewS += elapsed_s;
    picture.previewed.add(step);
  },
  disconnected(run) {
    Object.assign(run, { isLost: true, phase: "The gateway does not answer; it is asked again" });
  },
  connected(run) {
    Object.assign(run, { isLost: false, phase: "The gateway answers again" });
  },
  retrying(run, { delay_s }) {
    run.phase = `The cloud does not answer; asked again in ${Math.ceil(delay_s)} s`;
  },
  failover(run, { server }) {
    run.phase = `A cloud is away; ${server} goes on`;
  },
  fallback(run, data) {
    pictureAt(run, data.image_index).cloudSteps = data.actual;
    const cost = data.untrained_steps ? ", also where its model is not trained" : "";
    run.phase = `The cloud is away; this device continues alone${cost}`;
  },
  early_handoff(run, data) {
    if (data.actual !== undefined) pictureAt(run, data.image_index).cloudSteps = data.actual;
    run.phase = "The cloud hands over early";
  },
  image(run, { image }) {
    finishPicture(run, image);
  },
  completed: endRun,
  failed: endRun,
  cancelled: endRun,
};

/** Applies an event to a run; unknown names are ignored. */
export function applyEvent(run, name, data) {
  HANDLERS[name]?.(run, data);
}

function endRun(run, { job }) {
  run.job = job;
  run.isLost = false;
  run.problem = job.error;
  for (const image of job.images) finishPicture(run, image);
  run.phase = { completed: "Ready", cancelled: "Cancelled", failed: "Failed" }[job.state];
}

function finishPicture(run, image) {
  const { previewed = new Set() } = run.pictures[image.index] ?? {};
  run.pictures[image.index] = { ...pictureRunOf(image), previewed };
}

function pictureAt(run, index = run.current) {
  return run.pictures[index] ?? run.pictures[run.current];
}

function stepMap(records) {
  const steps = new Map();
  for (const { step, place, elapsed_s } of records) {
    steps.set(step, { place, elapsedS: (steps.get(step)?.elapsedS ?? 0) + elapsed_s });
  }
  return steps;
}

function waiting(numBefore) {
  return numBefore ? `Waiting, ${numBefore} before it` : "Waiting";
}
