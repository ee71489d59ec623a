// Jobs under way: their places, steps and remaining time; cancelling; the sound while it is decoded.

import { follow, get, post } from "./api.js";
import { $, doing, element, say, speak } from "./dom.js";
import { samplesOf } from "./sound/player.js";

const FOLLOWED = 3; // jobs at once

export class Jobs {
  constructor(tell) {
    this.tell = tell; // live(job), chunk(job, chunk), preview(job, peaks)
    this.open = [];
    this.followed = 0;
  }

  // Submits a job and shows how far it is; resolves to its sounds, [] when it was cancelled.
  async run(body) {
    const job = await post("/api/jobs", body);
    if (job.notes.length) say(job.notes.join(" "));
    return this.watch(job);
  }

  async watch(job) {
    const text = element("span", {}, "queued");
    const bar = element("progress", { max: 1, "aria-label": "Progress" });
    const cancel = element("button", { onclick: doing(() => this.cancel(job.id)) }, "Cancel");
    const item = job.order.request?.items[0];
    const title = element("div", {}, item?.prompt || job.kind);
    const entry = element("li", {}, title, bar, element("div", { className: "row spread" }, text, cancel));
    $("jobs").append(entry);
    this.open.push(job.id);
    const seconds = item?.seconds ?? 1;
    const whole = !job.order.request?.long; // else its sound comes between the steps
    let told = 0; // quarters of the steps that were spoken of
    try {
      for await (const { name, data } of this.events(job.id)) {
        if (name === "queued") text.textContent = queued(data);
        else if (name === "running") speak(text.textContent = "begins");
        else if (name === "step") {
          bar.value = ((whole ? 0.9 : 1) * data.step) / data.steps;
          text.textContent = `step ${data.step} of ${data.steps}${remaining(data)}`;
          const quarter = Math.floor((4 * data.step) / data.steps);
          if (quarter > told) speak(text.textContent);
          told = quarter;
        } else if (name === "preview") {
          if (data.item === 0) this.tell.preview(job, data, seconds);
        } else if (name === "audio") {
          if (whole) {
            bar.value = 0.9 + (0.1 * (data.start + data.samples)) / (data.sample_rate * seconds);
            text.textContent = "decoding";
          }
          if (data.item === 0) this.tell.chunk(job, samplesOf(data), seconds);
        } else if (name === "done") {
          speak(`Made: ${item?.prompt || job.kind}, ${data.sounds.length === 1 ? "one sound" : `${data.sounds.length} sounds`}.`);
          return data.sounds;
        } else if (name === "failed") throw new Error(sentence(data.error));
        else if (name === "interrupted") throw new Error("The server was stopped. Queue the job again below the history.");
        else if (name === "cancelled") return [];
      }
      return [];
    } finally {
      entry.remove();
      this.open = this.open.filter((id) => id !== job.id);
    }
  }

  // The events of a job. Browsers open few connections: beyond some, jobs are asked about now and then.
  async *events(id) {
    while (this.followed >= FOLLOWED) {
      const { state, progress, sounds, error } = await get(`/api/jobs/${id}`);
      if (!["queued", "running"].includes(state)) {
        yield { name: state, data: { sounds, error } };
        return;
      }
      if (progress?.place !== undefined) yield { name: "queued", data: progress };
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    this.followed += 1;
    try {
      yield* follow(id);
    } finally {
      this.followed -= 1;
    }
  }

  async cancel(id = this.open.at(-1)) {
    if (!id) return;
    await post(`/api/jobs/${id}/cancel`);
    say("Cancelled.");
  }
}

function queued({ place, remaining: rest }) {
  const before = place === 1 ? "1 job before it" : `${place} jobs before it`;
  return `${place ? before : "next"}${remaining({ remaining: rest })}`;
}

function remaining({ remaining: rest }) {
  return rest === null || rest === undefined ? "" : `, about ${rest < 10 ? rest.toFixed(1) : Math.round(rest)} s`;
}

function sentence(text) {
  return text ? `${text[0].toUpperCase()}${text.slice(1)}.` : "The job failed.";
}
