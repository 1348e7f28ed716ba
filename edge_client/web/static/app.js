/** Connects the page's parts: the form creates jobs, the stage shows their runs, the gallery the results. */

import { imageInAddress, nameNoImage } from "./address.js";
import { cancelJob, createJob, getJob, getPicture, ProblemError, streamEvents } from "./api.js";
import { CloudWatch } from "./cloud.js";
import { Compare } from "./compare.js";
import { Detail, followAddress, requestOf } from "./detail.js";
import { ask, byId, isDialogOpen, setText } from "./dom.js";
import { Estimator } from "./estimate.js";
import { Form, NUM_PREVIEWS, randomSeed } from "./form.js";
import { Gallery } from "./gallery.js";
import { Notifier } from "./notify.js";
import { maySayHowItWasMade } from "./pictures.js";
import { explain, leastCloudSteps, nearestSteps } from "./problems.js";
import { showQuotas } from "./quota.js";
import { readSettings } from "./restore.js";
import { applyEvent, beginRun, effectiveSteps, isActive } from "./run.js";
import { Split, splitRequest } from "./split.js";
import { RunList, Stage } from "./stage.js";
import { imagesOf } from "./start_image.js";

/** @type {import("./run.js").Run[]} newest first */
let runs = [];
let capabilities = null;

const estimator = new Estimator();
const ratesOf = (request) => estimator.rates({ ...capabilities?.defaults, ...withoutNulls(request) });
const form = new Form(new Split(ratesOf));
const showError = (error) => form.showProblem(error);
const gallery = new Gallery({
  onOpen: (entry) => detail.open(entry),
  onImage: ({ job, image }, isNewest) => estimator.learn(job.id, image, isNewest),
  onDeleted: forget,
  onError: showError,
});
const detail = new Detail(gallery, {
  onAgain: again,
  onCompare: (entry) => startCompare(requestOf(entry)),
  onBeginWith: beginWith,
  onDeleted: forget,
  onError: showError,
});
const stage = new Stage({ onOpen: openPicture, explain: explainRun, ratesOf });
const runList = new RunList({ onShow: showRun, onCancel: cancel });
const compare = new Compare({
  launch: (request, onUpdate) => launch(request, { onUpdate, isCompared: true }), onCancel: cancel,
  isBusy: () => runs.some(isActive), leastCloudSteps: leastOf,
});
const notifier = new Notifier();
const cloudWatch = new CloudWatch((answer) => {
  const isFirst = capabilities === null;
  capabilities = answer;
  form.setCapabilities(capabilities);
  detail.setCapabilities(capabilities.edge.has_image_encoder);
  const { num_running: numRunning, num_waiting: numWaiting } = capabilities.queue;
  if (isFirst) showQuotas();
  if (isFirst) loadGallery().then(openAddressed);
  else if (numRunning + numWaiting !== runs.length) refresh();  // another tab or client draws
});

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("cancel").addEventListener("click", () => cancel(stage.run));
byId("compare-form").addEventListener("click", async () => {
  form.clearProblems();
  if ((await isReady()) && form.check()) startCompare(form.request());
});
byId("gallery-more").addEventListener("click", () => loadGallery());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || isDialogOpen()) return;
  if (stage.run && isActive(stage.run)) cancel(stage.run);
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && capabilities) refresh();
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  const [file] = imagesOf(event.dataTransfer);
  if (!file) return;
  event.preventDefault();
  takeFile(file);
});
byId("settings-file").addEventListener("change", async () => {
  const [file] = byId("settings-file").files;
  byId("settings-file").value = "";  // so that the same one can be chosen again
  if (!file || !(await isReady())) return;
  form.clearProblems();
  const settings = await readSettings(file, capabilities);
  if (settings) restore(settings);
  else showError(Object.assign(new Error("This image does not say how it was made."), { field: "settings" }));
});
document.addEventListener("paste", (event) => {
  const [file] = imagesOf(event.clipboardData);
  if (!file || event.clipboardData.types.includes("text/plain")) return;
  event.preventDefault();
  takeFile(file);
});
followAddress(openAddressed, () => detail.close());

await cloudWatch.start();

/** @returns {Promise<boolean>} whether the gateway has answered; asks again if not */
async function isReady() {
  if (capabilities === null) await cloudWatch.start();
  return capabilities !== null;
}

async function generate() {
  form.clearProblems();
  if (!(await isReady()) || !form.check()) return;
  const button = byId("generate");
  button.disabled = true;  // until the gateway has answered, so that a double click makes one job
  try {
    await launch(form.request(), { isShown: true });
    if (!isInView(byId("pictures"))) byId("stage").scrollIntoView();
  } catch (error) {
    form.showProblem(error, { takesFocus: true });
  } finally {
    button.disabled = false;
  }
}

/**
 * Makes a job and follows it.
 * @returns {Promise<import("./run.js").Run>} as soon as the gateway has taken it; its `ended` resolves once it has ended
 */
async function launch(request, { onUpdate, isShown = false, isCompared = false } = {}) {
  const job = await createJob(request).finally(showQuotas);
  const run = Object.assign(beginRun(job), { request, isCompared });
  run.ended = follow(run, onUpdate);
  if (isShown) showRun(run);
  else update(run);
  return run;
}

async function follow(run, onUpdate) {
  runs = [run, ...runs].sort((a, b) => b.job.created_at - a.job.created_at);
  onUpdate?.(run);
  try {
    for await (const { name, data } of streamEvents(run.job.id)) {
      applyEvent(run, name, data);
      if (name === "fallback") cloudWatch.tookOver(data);
      if (!isActive(run)) end(run);
      update(run);
      onUpdate?.(run);
    }
  } catch (error) {
    await giveUp(run, error);
    onUpdate?.(run);
  }
}

function end(run) {
  showQuotas();
  runs = runs.filter((each) => each !== run);
  if (run.job.images.length) gallery.add(run.job);
  const { state, request } = run.job;
  if (state === "failed" && stage.run !== run && !run.isCompared) {
    const { title, text } = explain(run.problem ?? {}, { request, capabilities });
    showError(new Error(`${title}: ${text}`));
  }
  if (state === "completed") notifier.tell(request.prompt, "Your image is ready");
  else if (state === "failed") notifier.tell(request.prompt, "Your image could not be drawn");
}

/** The event stream failed; asks the gateway whether the job has ended. */
async function giveUp(run, error) {
  const job = await getJob(run.job.id, true).catch(() => null);
  if (job && !isActive({ job })) {
    applyEvent(run, job.state, { job });
  } else {
    const { reason, field, message: detail } = error;
    Object.assign(run, { job: { ...run.job, state: "failed" }, phase: "Lost", problem: { reason, field, detail } });
  }
  end(run);
  update(run);
}

/** @returns {{title: string, text: string, actions: object[]}} why a run failed, with what can be done now */
function explainRun(run) {
  const { title, text, actions } = explain(run.problem ?? {}, { request: run.job.request, capabilities });
  const request = run.request ?? requestBefore(run.job.request);
  if (!request) return { title, text, actions: [] };
  const redo = (changes) => () => launch({ ...request, ...changes }, { isShown: true }).catch(showError);
  const scheduler = request.scheduler ?? capabilities?.defaults.scheduler;
  const steps = actions.includes("steps") ? nearestSteps(scheduler, request.num_inference_steps, capabilities) : null;
  const offers = {
    again: { label: "Try again", act: redo({}) },
    alone: { label: "Draw it on this device alone", act: redo({ loras: [], hybrid: splitRequest(0) }) },
    steps: {
      label: `Draw it with ${steps} steps`,
      act: () => {
        form.setSteps(steps);
        const drawn = effectiveSteps({ ...request, num_inference_steps: steps });
        const least = leastOf({ ...request, num_inference_steps: steps });
        const cloudSteps = Math.max(least, Math.min(request.hybrid?.cloud_steps ?? 0, drawn));
        const hybrid = { ...request.hybrid, split: null, cloud_steps: cloudSteps };
        redo({ num_inference_steps: steps, hybrid })();
      },
    },
  };
  const canAlone = capabilities && leastOf(request) === 0;
  return { title, text, actions: actions.filter((name) => name !== "alone" || canAlone).map((name) => offers[name]) };
}

/** @returns {number} after how many cloud steps this device can draw a request */
function leastOf(request) {
  return leastCloudSteps(request, capabilities, effectiveSteps(request));
}

/** @returns {object|null} the request of a job of an earlier visit; null where its image is not here any more */
function requestBefore(request) {
  return request.image ? null : { ...request, image: null, mask: null, previews: NUM_PREVIEWS, webhook: null };
}

function update(run) {
  if (stage.run === run) stage.update();
  runList.update(runs, stage.run);
}

function showRun(run) {
  stage.show(run);
  runList.update(runs, run);
}

async function cancel(run) {
  try {
    const job = await cancelJob(run.job.id);
    if (isActive({ job })) return;  // it stops after its current step, and its events say so
    applyEvent(run, job.state, { job });
    end(run);
    update(run);
  } catch (error) {
    if (error.status !== 409) form.showProblem(error);  // 409: it has already finished
  }
}

function openPicture(jobId, index) {
  const entry = gallery.find(jobId, index);
  if (entry) detail.open(entry);
}

/** Opens the image that the address names. */
async function openAddressed(named = imageInAddress()) {
  if (!named) return;
  const { jobId, index } = named;
  try {
    const job = gallery.find(jobId, index)?.job ?? (await getJob(jobId));
    const image = job.images.find((each) => each.index === index);
    if (!image) throw new ProblemError({ status: 404, detail: "This job has no such image." });
    detail.open(gallery.find(jobId, index) ?? { job, image });
  } catch (error) {
    nameNoImage();
    showError([404, 410].includes(error.status)
      ? new Error("The image of this address is not here: it was deleted, or drawn with another token.") : error);
  }
}

function again(entry, hasNewSeed) {
  form.fill(requestOf(entry), { asked: entry.job.request });
  if (hasNewSeed) form.throwDice();
}

async function beginWith({ image }) {
  try {
    const isUsed = await form.beginWith(await getPicture(image.url));
    if (isUsed) byId("image-details").scrollIntoView();
  } catch (error) {
    showError(error);
  }
}

/** Takes an image file that was dropped or pasted: its settings, or the image itself. */
async function takeFile(file) {
  if (isDialogOpen() || !(await isReady())) return;
  const settings = maySayHowItWasMade(file) ? await readSettings(file, capabilities) : null;
  if (!settings) return form.beginWith(file);
  setText(byId("file-prompt"), settings.values.prompt);
  byId("file-use").hidden = !capabilities.edge.has_image_encoder;
  const answer = await ask(byId("file-dialog"));
  if (answer === "settings") restore(settings);
  else if (answer === "image") await form.beginWith(file);
}

function restore({ values: { cloud_steps: cloudSteps, model, ...values }, notes }) {
  const hybrid = cloudSteps === undefined ? { model } : splitRequest(cloudSteps, model);
  form.fill({ ...values, hybrid }, { notes });
}

/** Compares the splits of a request; one without a hybrid split gets the default one. */
async function startCompare(request) {
  form.clearProblems();
  const { hybrid } = request;
  const numSteps = effectiveSteps(request);
  const { cloud_steps: usualCloud, num_inference_steps: usualSteps } = capabilities.defaults;
  const isHybrid = hybrid.cloud_steps > 0 && hybrid.cloud_steps < numSteps;
  const usual = Math.max(1, Math.round((numSteps * usualCloud) / usualSteps));
  const cloudSteps = isHybrid ? hybrid.cloud_steps : Math.min(Math.max(usual, leastOf(request)), numSteps - 1);
  const seed = request.seed ?? randomSeed();
  const { model } = hybrid;
  try {
    await compare.start({ ...request, seed, hybrid: { model, cloud_steps: cloudSteps } });
  } catch (error) {
    form.showProblem(error, { takesFocus: true });
  }
}

async function loadGallery() {
  await followAll(() => gallery.loadMore());
  if (runs.length && !stage.run) showRun(runs[0]);
}

function refresh() {
  return followAll(() => gallery.refresh());
}

/** Loads jobs, and follows those that run. */
async function followAll(load) {
  try {
    for (const job of await load()) {
      if (!runs.some((run) => run.job.id === job.id)) follow(beginRun(job));
    }
  } catch (error) {
    showError(error);
  }
}

function forget(jobId) {
  gallery.remove(jobId);
  stage.forget(jobId);
}

function withoutNulls(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null && value !== undefined));
}

function isInView(element) {
  const { top, bottom } = element.getBoundingClientRect();
  return top >= 0 && bottom <= innerHeight;
}
