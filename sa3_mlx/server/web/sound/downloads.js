// Taking a sound along: in which format, and how it is finished on its way.

import { request } from "../api.js";
import { $, doing, element, say } from "../dom.js";

const NUMBERS = { loudness: "loudness_lufs", ceiling: "true_peak_db", "fade-in": "fade_in", "fade-out": "fade_out" };
const SWITCHES = { limit: "limit", trim: "trim_silence" };
const CHOSEN = ["wav", "flac"]; // formats whose samples can be chosen

export class Downloads {
  constructor(form) {
    this.form = form;
    this.sound = null;
    $("finish").addEventListener("input", () => this.show(this.sound));
  }

  // What is asked for, as the address says it; empty where the sound stays as it is.
  get asked() {
    const numbers = Object.entries(NUMBERS).filter(([id]) => $(id).value !== "").map(([id, name]) => [name, $(id).value]);
    const switches = Object.entries(SWITCHES).filter(([id]) => $(id).checked).map(([, name]) => [name, "true"]);
    return [...numbers, ...switches];
  }

  address(format) {
    const query = new URLSearchParams([["format", format], ["download", "true"], ...this.asked]);
    if (CHOSEN.includes(format) && $("samples").value) query.set("samples", $("samples").value);
    return new URL(`/api/sounds/${this.sound.id}/audio?${query}`, location.href).href;
  }

  show(sound) {
    this.sound = sound;
    if (!this.form.loudness) Object.assign($("loudness"), { disabled: true, placeholder: "needs pyloudnorm" });
    $("downloads").replaceChildren(...(sound ? this.form.formats : []).map((format) => this.link(format)));
  }

  link(format) {
    const [href, name] = [this.address(format), `${this.sound.name}.${format}`];
    const link = element("a", { href, download: name, draggable: true }, format);
    link.title = "Click to download, or drag it to the desktop or a DAW";
    link.addEventListener("click", doing((event) => this.check(event, href, name)));
    link.addEventListener("dragstart", (event) => {
      event.dataTransfer.setData("DownloadURL", `audio/${format}:${name}:${href}`);
      event.dataTransfer.setData("text/uri-list", href);
    });
    return link;
  }

  // Has a finished sound made first: what is refused, or was not reached, is said on the page.
  async check(event, href, download) {
    if (!this.asked.length && !$("samples").value) return;
    event.preventDefault();
    const reply = await request(href, { headers: { range: "bytes=0-0" } });
    say(reply.headers.get("x-notes") ?? "");
    element("a", { href, download }).click();
  }
}
