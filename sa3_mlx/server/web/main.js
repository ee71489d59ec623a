// The page: what belongs together, files that are dropped, keys.

import { back, get, Lost, onConnection, post, upload } from "./api.js";
import { $, doing, say } from "./dom.js";
import { Form } from "./form.js";
import { History } from "./history.js";
import { Jobs } from "./jobs.js";
import { Editor } from "./sound/editor.js";
import { Versions } from "./sound/versions.js";

const form = new Form();
const versions = new Versions({ open, compare: (sound) => editor.compareWith(sound) });
const history = new History({ open, again });
const editor = new Editor(form, { run, watch, open, changed: () => history.load() });
const jobs = new Jobs({
  chunk: (job, chunk, seconds) => editor.chunk(job, chunk, seconds),
  preview: (job, peaks, seconds) => editor.preview(job, peaks, seconds),
});

async function open(sound) {
  await Promise.all([editor.open(sound), versions.load(sound)]);
  history.show(sound);
}

async function finish(sounds) {
  editor.liveJob = null;
  await history.load();
  if (sounds.length) form.seen(sounds[0]);
  return sounds;
}

async function run(body) {
  say("");
  const before = editor.sound;
  try {
    const sounds = await jobs.run(body);
    if (!sounds.length && before && !editor.sound) await open(before);
    return await finish(sounds);
  } catch (error) {
    if (before && !editor.sound) await open(before);
    throw error;
  }
}

async function watch(job) {
  const sounds = await finish(await jobs.watch(job));
  if (sounds.length) await open(sounds[0]);
}

async function again(job) {
  await watch(await post(`/api/jobs/${job.id}/again`));
}

async function take(files) {
  for (const file of files) {
    say(`Reading ${file.name} ...`);
    const sound = await upload(file);
    await history.load();
    await open(sound);
    say("");
  }
}

$("form").addEventListener("submit", doing(async (event) => {
  event.preventDefault();
  const body = form.generate();
  const [first] = await run(body);
  if (!first) return;
  await open(first);
  $("loop").checked = Boolean(body.request.loop);
  editor.loop();
}));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("file").addEventListener("change", doing(() => take($("file").files)));
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", doing(async (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  await take(event.dataTransfer.files);
}));

const KEYS = {
  " ": () => editor.play(),
  Enter: () => $("form").requestSubmit(),
  ArrowLeft: () => editor.move(-0.02),
  ArrowRight: () => editor.move(0.02),
  z: () => editor.undo(),
  x: () => editor.swap(),
  r: () => editor.mark(),
  "+": () => editor.view.zoom(0.5),
  "-": () => editor.view.zoom(2),
};
document.addEventListener("keydown", doing(async (event) => {
  if (event.key === "Escape" && !$("login").open) return jobs.cancel();
  const own = event.target.closest("input, textarea, select, dialog, summary, a");
  const pressed = event.target.closest("button") && [" ", "Enter"].includes(event.key);
  const work = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!work || own || pressed || event.altKey || (event.ctrlKey || event.metaKey) !== false) return undefined;
  event.preventDefault();
  return work();
}));

onConnection(doing(async (there) => {
  $("lost").hidden = there;
  if (there) {
    say("The server is back.");
    await history.load();
  } else await back();
}));

async function begin() {
  try {
    await form.load();
    await history.load();
    const going = [...(await get("/api/jobs?state=running")), ...(await get("/api/jobs?state=queued"))];
    going.slice(0, 20).forEach((job) => doing(watch)(job)); // of this page before it was loaded again, or of somebody else
    if (!going.length && history.sounds.length) await open(history.sounds.find(({ subtype }) => subtype !== "latents") ?? null);
    else await open(null);
    document.body.dataset.ready = "true";
  } catch (error) {
    if (!(error instanceof Lost)) throw error;
    await back();
    await begin();
  }
}

doing(begin)();
