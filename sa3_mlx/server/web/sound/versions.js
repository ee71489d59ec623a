// All versions of a sound as a tree, and the other one that is compared with.

import { get } from "../api.js";
import { $, doing, element } from "../dom.js";

const WORDS = { upload: "recording", generate: "made", vary: "varied", inpaint: "regions made again", extend: "extended" };

export class Versions {
  constructor(tell) {
    this.tell = tell; // open(sound), compare(sound)
    this.all = [];
  }

  async load(sound) {
    this.all = sound ? await get(`/api/sounds/${sound.id}/family`) : [];
    this.show(sound);
  }

  find(id) {
    return this.all.find((version) => version.id === id);
  }

  depth(version) {
    const parent = this.find(version.parent);
    return parent ? this.depth(parent) + 1 : 0;
  }

  // Parents before their children, each branch together.
  ordered(parent = null) {
    const roots = this.all.filter((version) => (parent ? version.parent === parent : !this.find(version.parent)));
    return roots.flatMap((version) => [version, ...this.ordered(version.id)]);
  }

  show(current) {
    $("versions").replaceChildren(...this.ordered().map((version) => {
      const near = version.kind === "generate" && version.parent;
      const words = `${near ? "near it" : WORDS[version.kind] ?? version.kind}: ${version.prompt || version.name}, ${version.seconds.toFixed(2)} s`;
      const open = element("button", { onclick: doing(() => this.tell.open(version)) }, words);
      open.setAttribute("aria-current", String(version.id === current?.id));
      const compare = element(
        "button", { className: "other", title: "Compare with this", "aria-label": `Compare with ${words}`, onclick: () => this.tell.compare(version) }, "B");
      compare.disabled = version.id === current?.id;
      const entry = element("li", {}, open, compare);
      entry.style.setProperty("--depth", this.depth(version));
      return entry;
    }));
  }
}
