// Small helpers for the document.

export const $ = (id) => document.getElementById(id);

// An element with properties, attributes (aria-..., data-...) and listeners (onclick), and what is in it.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export function say(text, bad = false) {
  const notice = $("notice");
  notice.textContent = text;
  notice.classList.toggle("bad", bad);
  notice.hidden = !text;
}

// Tells a screen reader what others see.
export function speak(text) {
  $("spoken").textContent = text;
}

// Runs what a control does; what goes wrong is said in a sentence.
export function doing(work) {
  return async (...given) => {
    try {
      await work(...given);
    } catch (error) {
      if (error.name !== "AbortError") say(error.message, true);
    }
  };
}

export const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

export const seconds = (value) => `${value.toFixed(3)} s`;
