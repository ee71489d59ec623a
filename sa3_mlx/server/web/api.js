// Talk to the server: requests, events, and what to do when it does not answer.

export class Refused extends Error {}
export class Lost extends Error {}

const watchers = [];

export function onConnection(tell) {
  watchers.push(tell);
}

let connected = true;

function connection(state) {
  if (state !== connected) {
    connected = state;
    watchers.forEach((tell) => tell(state));
  }
}

async function send(path, options) {
  try {
    const reply = await fetch(path, options);
    connection(true);
    return reply;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connection(false);
    throw new Lost("The server does not answer. Is sa3 serve still running?");
  }
}

async function refusal(reply) {
  let text = `The server refused (${reply.status}).`;
  try {
    text = (await reply.json()).error ?? text;
  } catch { /* no JSON: the status says enough */ }
  return new Refused(text[0].toUpperCase() + text.slice(1));
}

export async function request(path, options = {}) {
  let reply = await send(path, options);
  if (reply.status === 401 && (await login())) reply = await send(path, options);
  if (!reply.ok) throw await refusal(reply);
  return reply;
}

export async function get(path) {
  return (await request(path)).json();
}

export async function post(path, data, method = "POST") {
  const body = data === undefined ? undefined : JSON.stringify(data);
  return (await request(path, { method, body, headers: { "content-type": "application/json" } })).json();
}

export async function upload(file) {
  const path = `/api/uploads?name=${encodeURIComponent(file.name)}`;
  return (await request(path, { method: "POST", body: file })).json();
}

// The events of a job, read so that they can be taken up again after the connection broke.
export async function* follow(job, signal) {
  let last = "0";
  while (true) {
    try {
      const headers = { "last-event-id": last };
      const reply = await request(`/api/jobs/${job}/events?previews=true`, { headers, signal });
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      while (true) {
        const { value, done } = await Promise.race([reader.read(), silence()]);
        if (done) break;
        text += value;
        const blocks = text.split("\n\n");
        text = blocks.pop();
        for (const block of blocks) {
          const event = parse(block);
          if (!event) continue;
          last = event.id;
          yield event;
          if (["done", "failed", "cancelled", "interrupted"].includes(event.name)) {
            reader.cancel();
            return;
          }
        }
      }
    } catch (error) {
      if (error instanceof Refused || error.name === "AbortError") throw error;
    }
    connection(false);
    await back();
  }
}

// The end of a stream that is silent, though the server writes something every second.
function silence() {
  return new Promise((resolve) => setTimeout(() => resolve({ done: true }), 15000));
}

function parse(block) {
  const fields = Object.fromEntries(
    block.split("\n").filter((line) => line.includes(": ") && !line.startsWith(":"))
      .map((line) => [line.slice(0, line.indexOf(": ")), line.slice(line.indexOf(": ") + 2)]));
  return fields.event ? { name: fields.event, id: fields.id, data: JSON.parse(fields.data) } : null;
}

// Resolves when the server answers again.
export async function back() {
  while (true) {
    await new Promise((resolve) => setTimeout(resolve, 2000));
    try {
      await fetch("/api/status");
      connection(true);
      return;
    } catch { /* not yet */ }
  }
}

let asking = null;

async function login() {
  asking ??= show().finally(() => { asking = null; });
  return asking;
}

async function show() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  history.replaceState(null, "", location.pathname);
  if (given && (await open(given))) return true;
  const dialog = document.getElementById("login");
  const field = document.getElementById("token");
  while (true) {
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    const token = field.value;
    field.value = "";
    if (!token) return false;
    if (await open(token)) return true;
  }
}

async function open(token) {
  const headers = { "content-type": "application/json" };
  return (await send("/api/session", { method: "POST", body: JSON.stringify({ token }), headers })).ok;
}
