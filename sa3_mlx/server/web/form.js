// The form: what is asked for, as the body of a job.

import { get } from "./api.js";
import { $, element, number } from "./dom.js";
import { Timed } from "./timed.js";

const SHOWN = 6; // prompts, before the others are asked for

export class Form {
  constructor() {
    this.models = [];
    this.timed = new Timed();
    $("seconds").addEventListener("input", () => this.sized());
    $("model").addEventListener("change", () => this.chosen());
    $("ring").addEventListener("change", () => {
      $("bpm").disabled = $("bars").disabled = !$("ring").checked;
      $("seconds").disabled = $("ring").checked; // bars at a tempo have their length
      this.sized();
    });
  }

  async load() {
    const [models, adapters, status] = await Promise.all([get("/api/models"), get("/api/adapters"), get("/api/status")]);
    this.models = models;
    this.formats = status.formats;
    this.loudness = status.loudness; // whether it can be measured
    $("model").replaceChildren(...models.map(({ name }) => element("option", { value: name }, name)));
    $("sampler").append(...status.samplers.map((name) => element("option", { value: name }, name)));
    $("adapters").replaceChildren(...adapters.map(adapter));
    $("server").textContent = `sa3 ${status.sa3}`;
    this.chosen();
  }

  get model() {
    return this.models.find(({ name }) => name === $("model").value) ?? this.models[0];
  }

  chosen() {
    const { prompts, longest_piece: piece, words } = this.model;
    $("length").max = $("seconds").max = piece;
    this.sized();
    const buttons = prompts.map((text) => element(
      "button", { type: "button", onclick: () => { $("prompt").value = text; $("prompt").focus(); } }, text));
    const more = element("button", { type: "button", onclick: () => $("presets").replaceChildren(...buttons) }, "more ...");
    $("presets").replaceChildren(...(buttons.length > SHOWN ? [...buttons.slice(0, SHOWN), more] : buttons));
    $("prompt").placeholder = words.length ? `This model knows: ${words.slice(0, 9).join(", ")} ...` : "";
  }

  // Tells whether the seconds are more than a clip has, and says what that means.
  sized() {
    const { max_seconds: longest } = this.model;
    const long = !$("ring").checked && Number($("seconds").value) > longest;
    $("long").hidden = !long;
    $("long").textContent = `Beyond ${Math.floor(longest * 100) / 100} s it is made in windows, each continuing the one before.`;
    return long;
  }

  // Settings that all jobs of the page share; exact: the file is that of the command with the same seed.
  body(request = {}) {
    const sampling = {};
    if (number("steps")) sampling.steps = number("steps");
    if ($("sampler").value) sampling.sampler = $("sampler").value;
    if (number("guidance") !== undefined) sampling.guidance = number("guidance");
    if (Object.keys(sampling).length) request.sampling = sampling;
    if (number("fade") !== undefined) request.prompt_fade_seconds = number("fade");
    if (number("room") !== undefined) request.head_room_seconds = number("room");
    if (request.inpaint && number("crossfade") !== undefined) request.crossfade_ms = number("crossfade");
    const adapters = [...$("adapters").querySelectorAll("input")]
      .map((slider) => ({ name: slider.name, strength: Number(slider.value) })).filter(({ strength }) => strength);
    return { model: this.model.name, request, adapters, exact: true, stream: $("early").checked };
  }

  // A clip: with the prompt of the form unless another is given.
  item(more = {}) {
    const item = { prompt: $("prompt").value.trim(), ...more };
    if (this.timed.prompts.length) item.prompts_over_time = this.timed.prompts;
    if ($("negative").value.trim()) item.negative_prompt = $("negative").value.trim();
    if ($("lock").checked && number("seed") !== undefined) item.seed = number("seed");
    return item;
  }

  generate() {
    const request = $("ring").checked ? this.loop() : { items: [this.item({ seconds: Number($("seconds").value) })] };
    if (this.sized()) request.long = {};
    return { ...this.body(request), kind: "generate", variations: Number($("variations").value) };
  }

  // Bars of four beats, to the sample; the prompt names the tempo, where the model knows what bpm are.
  loop() {
    const [bpm, beats, rate] = [Number($("bpm").value), 4 * Number($("bars").value), this.model.sample_rate];
    const prompt = $("prompt").value.trim();
    const { words } = this.model;
    const said = /\d\s*bpm/i.test(prompt) || (words.length && !words.includes("bpm"));
    const named = said ? prompt : `${prompt}, ${bpm} bpm`;
    const seconds = Math.round((beats * 60 * rate) / bpm) / rate;
    return { items: [this.item({ prompt: named, seconds })], loop: { bpm, beats } };
  }

  seen(sound) {
    if (!$("lock").checked && sound.seed !== null) $("seed").value = sound.seed;
  }
}

function adapter(name) {
  const text = element("span", {}, "off"); // an output would take the label from the slider
  const slider = element("input", { type: "range", name, min: 0, max: 2, step: 0.05, value: 0 });
  slider.addEventListener("input", () => { text.textContent = Number(slider.value) ? slider.value : "off"; });
  return element("label", {}, `${name.replace(/\.safetensors$/, "")} `, text, slider);
}
