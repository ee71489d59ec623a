// Everything that was made: search, stars, deletion; and jobs that a stopped server left.

import { get, post } from "./api.js";
import { $, doing, element } from "./dom.js";

const PAGE = 40;

export class History {
  constructor(tell) {
    this.tell = tell; // open(sound), again(job)
    this.sounds = [];
    let waiting = 0;
    $("search").addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(doing(() => this.load()), 200);
    });
    $("starred").addEventListener("change", doing(() => this.load()));
    $("older").addEventListener("click", doing(() => this.load(this.sounds.at(-1).created)));
  }

  async load(before) {
    const query = new URLSearchParams({ limit: PAGE, text: $("search").value, starred: $("starred").checked });
    if (before) query.set("before", before);
    const found = await get(`/api/sounds?${query}`);
    this.sounds = before ? [...this.sounds, ...found] : found;
    $("older").hidden = found.length < PAGE;
    this.show();
    if (!before) await this.interrupted();
  }

  show(current = this.current) {
    this.current = current;
    $("history").replaceChildren(...this.sounds.filter(({ subtype }) => subtype !== "latents").map((sound) => {
      const open = element("button", { className: "open", onclick: doing(() => this.tell.open(sound)) },
        `${sound.starred ? "★ " : ""}${sound.name}`);
      open.setAttribute("aria-current", String(sound.id === current?.id));
      const remove = element("button", {
        "aria-label": `Delete ${sound.name}`, title: "Delete", onclick: doing(() => this.remove(sound)),
      }, "×");
      return element("li", {}, open, element("span", { className: "quiet" }, `${sound.seconds.toFixed(1)} s`), remove);
    }));
  }

  async remove(sound) {
    if (!confirm(`Delete "${sound.name}" and its file?`)) return;
    await post(`/api/sounds/${sound.id}`, undefined, "DELETE");
    await this.load();
    if (this.current?.id === sound.id) this.tell.open(null);
  }

  async interrupted() {
    const jobs = await get("/api/jobs?state=interrupted&limit=20");
    $("interrupted").replaceChildren(...jobs.map((job) => {
      const words = job.order.request?.items[0].prompt || job.kind;
      return element("li", { className: "row spread" }, `Interrupted: ${words}`,
        element("button", { onclick: doing(() => this.tell.again(job)) }, "Queue again"));
    }));
  }
}
