/** Connects the page's parts: the form creates jobs, the stage shows their runs, the gallery the results. */

import { cancelJob, createJob, getJob, ProblemError, streamEvents } from "/static/api.js";
import { CloudWatch } from "/static/cloud.js";
import { Compare } from "/static/compare.js";
import { byId, isDialogOpen } from "/static/dom.js";
import { Form, randomSeed } from "/static/form.js";
import { Detail, Gallery, requestOf } from "/static/gallery.js";
import { applyEvent, beginRun, isActive } from "/static/run.js";
import { Split } from "/static/split.js";
import { RunList, Stage } from "/static/stage.js";

/** @type {import("./run.js").Run[]} newest first */
let runs = [];
let defaults = null;

const form = new Form(new Split());
const gallery = new Gallery((entry) => detail.open(entry));
const detail = new Detail(gallery, {
  onAgain: again,
  onCompare: (entry) => startCompare(requestOf(entry)),
  onDeleted: (jobId) => {
    gallery.remove(jobId);
    stage.forget(jobId);
  },
  onError: (error) => form.showProblem(error),
});
const stage = new Stage(openPicture);
const runList = new RunList({ onShow: showRun, onCancel: cancel });
const compare = new Compare({ launch: (request, onUpdate) => launch(request, { onUpdate }), onCancel: cancel });
const cloudWatch = new CloudWatch((capabilities) => {
  const isFirst = defaults === null;
  defaults = capabilities.defaults;
  form.setCapabilities(capabilities);
  if (isFirst) loadGallery();
});

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("cancel").addEventListener("click", () => cancel(stage.run));
byId("compare-form").addEventListener("click", async () => {
  if (await isReady()) startCompare(form.request());
});
byId("gallery-more").addEventListener("click", () => loadGallery());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || isDialogOpen()) return;
  if (stage.run && isActive(stage.run)) cancel(stage.run);
});

await cloudWatch.start();

/** @returns {Promise<boolean>} whether the gateway has answered; asks again if not */
async function isReady() {
  if (defaults === null) await cloudWatch.start();
  return defaults !== null;
}

async function generate() {
  form.clearProblems();
  if (!(await isReady())) return;
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

/** Makes a job and follows it. @returns {Promise<import("./run.js").Run>} as soon as the gateway has taken it */
async function launch(request, { onUpdate, isShown = false } = {}) {
  const run = beginRun(await createJob(request));
  follow(run, onUpdate);
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
  runs = runs.filter((each) => each !== run);
  if (run.job.images.length) gallery.add(run.job);
  if (run.job.state === "failed" && run.job.error) form.showProblem(new ProblemError(run.job.error));
}

/** The event stream failed; asks the gateway whether the job has ended. */
async function giveUp(run, error) {
  const job = await getJob(run.job.id).catch(() => null);
  if (job && !isActive({ job })) {
    applyEvent(run, job.state, { job });
  } else {
    Object.assign(run, { job: { ...run.job, state: "failed" }, phase: "Lost" });
    form.showProblem(error);
  }
  end(run);
  update(run);
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

function again(entry, hasNewSeed) {
  form.fill(requestOf(entry), entry.job.request);
  if (hasNewSeed) form.throwDice();
  byId("prompt").focus();
}

/** Compares the splits of a request; one without a hybrid split gets the default one. */
async function startCompare(request) {
  form.clearProblems();
  const { num_inference_steps: numSteps, hybrid } = request;
  const isHybrid = hybrid.cloud_steps > 0 && hybrid.cloud_steps < numSteps;
  const usual = Math.max(1, Math.round((numSteps * defaults.cloud_steps) / defaults.num_inference_steps));
  const cloudSteps = isHybrid ? hybrid.cloud_steps : Math.min(usual, numSteps - 1);
  const seed = request.seed ?? randomSeed();
  try {
    await compare.start({ ...request, seed, hybrid: { ...hybrid, cloud_steps: cloudSteps } });
  } catch (error) {
    form.showProblem(error, { takesFocus: true });
  }
}

async function loadGallery() {
  try {
    for (const job of await gallery.loadMore()) {
      if (!runs.some((run) => run.job.id === job.id)) follow(beginRun(job));
    }
    if (runs.length && !stage.run) showRun(runs[0]);
  } catch (error) {
    form.showProblem(error);
  }
}

function isInView(element) {
  const { top, bottom } = element.getBoundingClientRect();
  return top >= 0 && bottom <= innerHeight;
}
