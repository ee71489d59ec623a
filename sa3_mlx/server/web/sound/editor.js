// The open sound: its picture, playing it, editing it, comparing it, taking it along.

import { get, post, request } from "../api.js";
import { $, doing, element, number, say, seconds, speak } from "../dom.js";
import { Downloads } from "./downloads.js";
import { level, Player } from "./player.js";
import { View } from "./view.js";

const HELD = 600; // seconds of a sound that are held; a longer one is fetched while it plays

export class Editor {
  constructor(form, tell) {
    this.form = form;
    this.tell = tell; // run(body) -> sounds, open(sound)
    this.sound = null;
    this.other = null; // that is compared with
    this.buffers = new Map();
    this.chunks = []; // of a sound that is being decoded
    this.downloads = new Downloads(form);
    this.view = new View($("view"), $("scroll"));
    this.player = new Player(() => this.played());
    this.view.on = {
      seek: (at) => this.seek(at),
      regions: () => this.regionsChanged(),
      target: () => { $("length").value = (this.view.target ?? this.sound.seconds).toFixed(2); },
      window: () => this.refresh(),
    };
    const listen = (id, work) => $(id).addEventListener("click", doing(work.bind(this)));
    listen("play", this.play);
    listen("in", () => this.view.zoom(0.5));
    listen("out", () => this.view.zoom(2));
    listen("undo", this.undo);
    listen("compare", this.swap);
    listen("add", this.addRegion);
    listen("inpaint", this.inpaint);
    listen("extend", this.extend);
    listen("vary", this.vary);
    listen("near", this.near);
    listen("again", this.again);
    listen("copy", this.copy);
    listen("star", this.star);
    $("loop").addEventListener("change", () => this.loop());
    $("length").addEventListener("input", () => {
      if (!this.sound) return;
      this.view.extend(number("length") ?? 0);
      this.view.draw();
    });
    for (const name of ["strength", "spread"]) {
      $(name).addEventListener("input", () => { $(`${name}-text`).textContent = Number($(name).value).toFixed(2); });
    }
  }

  async open(sound) {
    this.sound = sound;
    this.chunks = [];
    this.begun = undefined; // seconds, where the keyboard began a region
    this.compareWith(null);
    const [heard, at] = [Boolean(this.player.live), this.player.now()]; // whole now: it is heard on from there
    this.player.use(null);
    this.player.position = 0;
    this.view.limit = this.form.model?.longest_piece ?? 0;
    this.view.open(sound);
    this.shown(Boolean(sound));
    $("edit-title").textContent = sound ? sound.name : "Nothing is open";
    $("facts").textContent = sound ? facts(sound) : "";
    $("length").value = sound ? sound.seconds.toFixed(2) : "";
    $("star").setAttribute("aria-pressed", String(Boolean(sound?.starred)));
    $("again").disabled = $("near").disabled = !sound?.job;
    this.tellPlace();
    this.view.canvas.setAttribute("aria-label", sound ? describe(sound) : "Waveform over spectrogram");
    this.regionsChanged();
    this.downloads.show(sound);
    this.showSeams();
    $("provenance").replaceChildren();
    if (!sound) return;
    const loaded = this.buffer(sound).then((buffer) => {
      if (this.sound?.id !== sound.id) return;
      this.player.use(buffer);
      if (heard && at < sound.seconds) {
        this.player.position = at;
        this.player.play();
      }
    });
    await Promise.all([loaded, this.levels(sound), this.showProvenance(sound)]);
  }

  // Hides what needs a sound while there is none.
  shown(there) {
    $("empty").hidden = there;
    for (const id of ["stage", "transport", "tools", "origin", "versions-title"]) $(id).hidden = !there;
  }

  async buffer(sound) {
    if (sound.seconds > HELD) return streamed(sound);
    if (!this.buffers.has(sound.id)) {
      const bytes = await (await request(`/api/sounds/${sound.id}/audio?samples=float`)).arrayBuffer();
      this.buffers.set(sound.id, await this.player.load(bytes, sound.sample_rate));
      if (this.buffers.size > 8) this.buffers.delete(this.buffers.keys().next().value);
    }
    return this.buffers.get(sound.id);
  }

  async levels(sound) {
    const reply = await request(`/api/sounds/${sound.id}/spectrogram`);
    const [bands, columns] = ["x-bands", "x-columns"].map((name) => Number(reply.headers.get(name)));
    const bytes = new Uint8Array(await reply.arrayBuffer());
    if (this.sound?.id === sound.id) this.view.setLevels(bytes, bands, columns);
  }

  // Asks for the waveform of what is shown, when it has stopped moving.
  refresh() {
    clearTimeout(this.waiting);
    const { sound, view } = this;
    if (!sound?.id) return;
    this.waiting = setTimeout(doing(async () => {
      const [from, to] = [view.from, Math.min(view.from + view.span, sound.seconds)];
      if (to <= from) return;
      const columns = Math.max(100, Math.min(4000, Math.round(view.canvas.clientWidth * ((to - from) / view.span))));
      const found = await get(`/api/sounds/${sound.id}/peaks?columns=${columns}&start=${from}&end=${to}`);
      if (this.sound?.id === sound.id) Object.assign(view, { peaks: { ...found, from, to } });
      view.draw();
    }), 60);
  }

  // Shows a sound that is still being made: its outline first, its samples as they come.
  live(job, length) {
    if (this.liveJob === job.id) return;
    this.liveJob = job.id;
    this.chunks = [];
    this.sound = null;
    this.player.use(null);
    this.view.open({ seconds: length, regions: [], seams: [] });
    $("edit-title").textContent = job.order.request.items[0].prompt || job.kind;
    $("facts").textContent = "being made";
    this.shown(true);
    $("edit").scrollIntoView({ block: "nearest" });
  }

  preview(job, { low, high }, length) {
    this.live(job, length);
    this.view.peaks = { low, high, from: 0, to: length };
    this.view.draw();
  }

  chunk(job, chunk, length) {
    this.live(job, length);
    this.chunks.push(chunk);
    while (chunk.start - this.chunks[0].start > HELD * chunk.rate) this.chunks.shift();
    if (this.player.live) this.player.append(chunk);
    const columns = Math.max(1, Math.round((400 * chunk.samples[0].length) / (length * chunk.rate)));
    const before = chunk.start === 0 ? { low: [], high: [] } : this.view.peaks;
    const next = outline(chunk.samples, columns);
    const to = (chunk.start + chunk.samples[0].length) / chunk.rate;
    this.view.peaks = { low: [...before.low, ...next.low], high: [...before.high, ...next.high], from: 0, to };
    this.view.draw();
  }

  async play() {
    const { sound, player } = this;
    if (!sound && this.chunks.length && !player.playing) player.playLive(this.chunks);
    else if (sound && !player.buffer) { // it is still being fetched
      const buffer = await this.buffer(sound);
      if (this.sound?.id !== sound.id || player.playing) return;
      player.use(buffer);
      player.play();
    } else player.toggle();
  }

  seek(at) {
    this.player.seek(at);
    this.played();
  }

  played() {
    $("play").textContent = this.player.playing ? "Stop" : "Play";
    $("play").setAttribute("aria-pressed", String(this.player.playing));
    this.view.position = this.player.now();
    $("time").value = seconds(this.view.position);
    if (!this.player.playing) this.tellPlace();
    this.view.draw();
    if (this.player.playing) requestAnimationFrame(() => this.played());
  }

  // What a screen reader says of the picture: the place, and the region around it.
  tellPlace() {
    const { canvas, position, regions } = this.view;
    const length = this.sound?.seconds ?? 0;
    const around = regions.findIndex(({ start, end }) => position >= start && position < end);
    canvas.setAttribute("aria-valuemax", length.toFixed(3));
    canvas.setAttribute("aria-valuenow", Math.min(position, length).toFixed(3));
    const text = `${seconds(position)} of ${seconds(length)}${around < 0 ? "" : `, in region ${around + 1}`}`;
    canvas.setAttribute("aria-valuetext", text);
  }

  // Begins a region at the place of playing, or ends the one that was begun.
  mark() {
    if (!this.sound) return;
    const at = this.player.now();
    if (this.begun === undefined) {
      this.begun = at;
      speak(`A region begins at ${seconds(at)}; move, and press R again.`);
      return;
    }
    const [start, end] = [this.begun, at].sort((a, b) => a - b);
    this.begun = undefined;
    if (end > start) this.view.add(start, end);
    this.view.settle();
    speak(end > start ? `Region from ${seconds(start)} to ${seconds(end)}.` : "A region needs two places.");
  }

  loop() {
    const chosen = this.view.regions[0];
    const whole = this.sound ? [0, this.sound.seconds] : null;
    this.player.range = $("loop").checked ? (chosen ? [chosen.start, chosen.end] : whole) : null;
    this.player.seek(this.player.now());
  }

  move(by) {
    this.seek(Math.min(this.player.now() + by * this.view.span, this.sound?.seconds ?? 0));
  }

  addRegion() {
    if (!this.sound) return;
    const start = Math.min(this.player.now(), this.sound.seconds * 0.75);
    this.view.add(start, Math.min(this.sound.seconds, start + Math.max(0.1, this.sound.seconds / 5)));
    this.view.settle();
  }

  regionsChanged() {
    const list = $("regions");
    if (list.contains(document.activeElement) && list.children.length === this.view.regions.length) return;
    list.replaceChildren(...this.view.regions.map((region, index) => this.regionEntry(region, index)));
    $("inpaint").disabled = !this.view.regions.length;
    if ($("loop").checked) this.loop();
  }

  regionEntry(region, index) {
    const field = (side) => {
      const input = element("input", { type: "number", step: 0.01, min: 0, value: region[side].toFixed(3) });
      input.setAttribute("aria-label", `Region ${index + 1}, ${side} in seconds`);
      input.addEventListener("change", () => {
        region[side] = this.view.inside(Number(input.value));
        input.blur();
        this.view.settle();
      });
      return input;
    };
    const prompt = element("input", { type: "text", value: region.prompt, placeholder: "its own prompt" });
    prompt.setAttribute("aria-label", `Region ${index + 1}, its own prompt`);
    prompt.addEventListener("input", () => { region.prompt = prompt.value; });
    const remove = element("button", { "aria-label": `Remove region ${index + 1}`, onclick: () => {
      this.view.regions.splice(index, 1);
      this.view.settle();
    } }, "×");
    return element("li", {}, field("start"), field("end"), remove, prompt);
  }

  // All regions are one job; those with a prompt of their own carry it.
  async inpaint() {
    const regions = this.view.regions.map(({ start, end, prompt }) => (
      prompt.trim() ? { start, end, prompt: prompt.trim() } : [start, end]));
    await this.edit("inpaint", { items: [this.form.item({ seconds: this.sound?.seconds })], inpaint: { regions } });
  }

  // What is longer than a clip is made in windows.
  async extend() {
    const length = number("length");
    const more = length > this.form.model.max_seconds ? { long: {} } : {};
    await this.edit("extend", { items: [this.form.item({ seconds: length })], ...more });
  }

  async vary() {
    const items = [this.form.item({ seconds: this.sound?.seconds })];
    const strength = Number($("strength").value); // without a dial of the model it is the noise level itself
    if (this.form.model.dial) await this.edit("vary", { items }, { strength });
    else await this.edit("vary", { items, init: { noise_level: strength } });
  }

  async edit(kind, asked, more = {}) {
    if (!this.sound) throw new Error("Nothing is open: make a sound first, or drop a recording.");
    const [made] = await this.tell.run({ ...this.form.body(asked), ...more, kind, source: this.sound.id });
    if (made) await this.tell.open(made);
  }

  async undo() {
    if (!this.sound?.parent) return say("This is the first version.");
    return this.tell.open(await get(`/api/sounds/${this.sound.parent}`));
  }

  compareWith(sound) {
    this.other = sound;
    this.swapped = false;
    $("compare").disabled = !sound;
    $("compare").textContent = "A";
    $("compare").setAttribute("aria-pressed", "false");
    $("compared").textContent = sound ? `B is: ${sound.name}` : "";
  }

  // Plays the other version at the same place; the louder one is turned down to the level of the softer one.
  async swap() {
    if (!this.other || !this.sound) return;
    const [own, other] = await Promise.all([this.buffer(this.sound), this.buffer(this.other)]);
    if (own.element || other.element) throw new Error(`Sounds of more than ${HELD} s are not compared here.`);
    const softest = Math.min(level(own), level(other));
    this.swapped = !this.swapped;
    const buffer = this.swapped ? other : own;
    this.player.use(buffer, softest / (level(buffer) || 1));
    $("compare").textContent = this.swapped ? "B" : "A";
    $("compare").setAttribute("aria-pressed", String(this.swapped));
  }

  // Made as this one was, from noise between that of its seed and that of others.
  async near() {
    const asked = { variations: number("near-count") ?? 4, spread: Number($("spread").value) };
    await this.tell.watch(await post(`/api/sounds/${this.sound.id}/near`, asked));
  }

  async again() {
    const job = await post(`/api/sounds/${this.sound.id}/again`);
    await this.tell.watch(job);
  }

  async copy() {
    if (!this.sound) return;
    const text = JSON.stringify(await get(`/api/sounds/${this.sound.id}/provenance`), null, 1);
    await navigator.clipboard.writeText(text);
    say("The settings are copied.");
  }

  async star() {
    if (!this.sound) return;
    this.sound = await post(`/api/sounds/${this.sound.id}`, { starred: !this.sound.starred }, "PATCH");
    $("star").setAttribute("aria-pressed", String(this.sound.starred));
    this.tell.changed();
  }

  showSeams() {
    const seams = this.sound?.seams ?? [];
    $("seams-box").hidden = !seams.length;
    $("legend").hidden = !this.sound?.regions.length;
    $("seams").replaceChildren(...seams.map((seam) => element("li", {},
      `${seconds(seam.sample / this.sound.sample_rate)}, ${seam.side === "in" ? "into" : "out of"} a made part: ` +
      `${seam.level_difference_db.toFixed(1)} dB against what was kept`)));
  }

  async showProvenance(sound) {
    const made = await get(`/api/sounds/${sound.id}/provenance`);
    if (this.sound?.id !== sound.id) return;
    const rows = made.request ? {
      command: made.command, model: `${made.model.name} (${made.model.hash.slice(0, 19)}...)`,
      ...asked(made.request.items[made.item]), ...flat(made.request.sampling), backend: made.runtime.backend,
      dtype: made.runtime.dtype, sa3: made.sa3, input: made.input?.name,
    } : { recording: sound.name, samples: `${sound.subtype}, ${sound.sample_rate} Hz, ${sound.channels} channels` };
    $("provenance").replaceChildren(...Object.entries(rows).filter(([, value]) => value !== null && value !== undefined)
      .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]));
  }
}

function facts({ seconds: length, sample_rate: rate, channels, peak_db: peak, seed }) {
  const parts = [`${length.toFixed(2)} s`, `${rate} Hz`, channels === 1 ? "mono" : `${channels} channels`];
  if (seed !== null) parts.push(`seed ${seed}`);
  parts.push(peak === null ? "silent" : `peak ${peak.toFixed(1)} dB`);
  return parts.join(" · ");
}

function describe(sound) {
  const made = sound.regions.length ? ` Made again: ${sound.regions.map(([a, b]) => `${a.toFixed(2)} to ${b.toFixed(2)}`)} s.` : "";
  return `Waveform over spectrogram of ${sound.name}, ${sound.seconds.toFixed(2)} seconds.${made}`;
}

function flat({ sampler, steps, guidance }) {
  return { sampler, steps, guidance: guidance.scale };
}

function asked({ prompts_over_time: timed, ...item }) {
  if (!item.spread) delete item.spread;
  return timed.length ? { ...item, then: timed.map(({ start, prompt }) => `${prompt} at ${start} s`).join(", ") } : item;
}

// A sound that is too long to be held.
function streamed({ id, seconds: duration }) {
  return { duration, element: element("audio", { src: `/api/sounds/${id}/audio`, preload: "metadata" }) };
}

function outline(channels, columns) {
  const size = channels[0].length / columns;
  const low = [];
  const high = [];
  for (let column = 0; column < columns; column += 1) {
    const parts = channels.map((samples) => samples.subarray(Math.floor(column * size), Math.floor((column + 1) * size) || 1));
    low.push(Math.min(...parts.map((part) => part.reduce((a, b) => Math.min(a, b), 1))));
    high.push(Math.max(...parts.map((part) => part.reduce((a, b) => Math.max(a, b), -1))));
  }
  return { low, high };
}
