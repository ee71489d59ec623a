// Prompts over time: what the sound goes over to, and when.

import { $, element, speak } from "./dom.js";

export class Timed {
  constructor() {
    this.rows = []; // {start, prompt}, as they were typed
    $("add-prompt").addEventListener("click", () => this.add());
  }

  // Those that have words, in the order of time.
  get prompts() {
    return this.rows.filter(({ prompt }) => prompt.trim())
      .map(({ start, prompt }) => ({ start: Number(start), prompt: prompt.trim() })).sort((a, b) => a.start - b.start);
  }

  add() {
    const last = this.rows.length ? Number(this.rows.at(-1).start) : 0;
    this.rows.push({ start: String(last + 1), prompt: "" });
    this.show();
    $("timed").lastElementChild.querySelector("[type=text]").focus();
  }

  show() {
    $("timed").replaceChildren(...this.rows.map((row, index) => {
      const field = (name, label, more) => {
        const input = element("input", { value: row[name], "aria-label": `Prompt ${index + 1}, ${label}`, ...more });
        input.addEventListener("input", () => { row[name] = input.value; });
        return input;
      };
      const remove = element("button", { type: "button", "aria-label": `Remove prompt ${index + 1}`, onclick: () => {
        this.rows.splice(index, 1);
        this.show();
        $("add-prompt").focus();
        speak("The prompt is removed.");
      } }, "×");
      return element("li", {},
        field("start", "from this second on", { type: "number", min: 0, step: "any", required: true }),
        field("prompt", "what it goes over to", { type: "text", maxLength: 10000, placeholder: "another prompt" }), remove);
    }));
  }
}
