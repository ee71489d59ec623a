// The picture of a sound: waveform over spectrogram, regions, seams, the place of playing; and what the mouse does to it.

const RULER = 18; // pixels
const EDGE = 8; // pixels in which a border can be taken
const STOPS = [[0, 0, 4], [60, 16, 110], [150, 40, 110], [230, 90, 60], [252, 190, 90], [252, 253, 191]];

export class View {
  constructor(canvas, scroll) {
    this.canvas = canvas;
    this.scroll = scroll;
    this.sound = null; // what is shown: {id, seconds, regions, seams, sample_rate}
    this.from = 0;
    this.span = 1; // seconds that are shown
    this.regions = []; // {start, end} in seconds
    this.target = null; // seconds to extend to
    this.limit = 0; // longest that can be extended to
    this.position = 0;
    this.peaks = null; // {low, high, from, to}
    this.levels = null;
    this.on = { seek() {}, regions() {}, target() {}, window() {} };
    new ResizeObserver(() => this.resized()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.hover(event));
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    scroll.addEventListener("input", () => this.show(Number(scroll.value) * this.room, this.span));
  }

  get end() {
    return Math.max(this.sound?.seconds ?? 0, this.target ?? 0);
  }

  // Seconds that can be scrolled over.
  get room() {
    return Math.max(0, this.end - this.span);
  }

  open(sound) {
    this.sound = sound;
    this.regions = [];
    this.target = null;
    this.peaks = this.levels = null;
    this.show(0, sound?.seconds ?? 1);
  }

  show(from, span) {
    const shortest = Math.min(0.02, this.end || 0.02);
    this.span = Math.min(Math.max(span, shortest), Math.max(this.end, shortest));
    this.from = Math.min(Math.max(from, 0), this.room);
    this.scroll.value = this.room ? this.from / this.room : 0;
    this.scroll.disabled = !this.room;
    this.on.window();
    this.draw();
  }

  zoom(factor, around = this.from + this.span / 2) {
    const span = this.span * factor;
    this.show(around - (around - this.from) * factor, span);
  }

  x(seconds) {
    return ((seconds - this.from) / this.span) * this.canvas.clientWidth;
  }

  seconds(x) {
    return this.from + (x / this.canvas.clientWidth) * this.span;
  }

  setLevels(bytes, bands, columns) {
    const image = new ImageData(columns, bands);
    for (let band = 0; band < bands; band += 1) {
      for (let column = 0; column < columns; column += 1) {
        const color = shade(bytes[band * columns + column] / 255);
        image.data.set([...color, 255], ((bands - 1 - band) * columns + column) * 4);
      }
    }
    this.levels = new OffscreenCanvas(columns, bands);
    this.levels.getContext("2d").putImageData(image, 0, 0);
    this.draw();
  }

  resized() {
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.canvas.clientWidth * scale);
    this.canvas.height = Math.round(this.canvas.clientHeight * scale);
    this.on.window();
    this.draw();
  }

  draw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = null;
      this.paint();
    });
  }

  paint() {
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    const pen = this.canvas.getContext("2d");
    const scale = devicePixelRatio || 1;
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.fillStyle = "#0b0d12";
    pen.fillRect(0, 0, width, height);
    if (!this.sound) return;
    const wave = (height - RULER) * 0.36;
    const low = { top: wave, height: height - RULER - wave };
    if (this.levels) this.paintLevels(pen, low);
    if (this.peaks) this.paintPeaks(pen, wave, color("--wave"));
    this.paintMade(pen, height, color);
    for (const region of this.regions) this.paintRegion(pen, region, height, color("--pick"));
    this.paintEnd(pen, height, color("--pick"));
    this.paintRuler(pen, width, height);
    pen.fillStyle = "#fff";
    pen.fillRect(this.x(this.position) - 0.75, 0, 1.5, height - RULER);
  }

  paintLevels(pen, { top, height }) {
    const whole = this.sound.seconds;
    const [from, to] = [this.from, Math.min(this.from + this.span, whole)];
    const columns = this.levels.width;
    const left = (from / whole) * columns;
    const wide = ((to - from) / whole) * columns;
    if (wide > 0) pen.drawImage(this.levels, left, 0, wide, this.levels.height, 0, top, this.x(to), height);
  }

  paintPeaks(pen, height, color) {
    const { low, high, from, to } = this.peaks;
    const middle = height / 2;
    pen.fillStyle = color;
    for (let column = 0; column < low.length; column += 1) {
      const left = this.x(from + ((to - from) * column) / low.length);
      const right = this.x(from + ((to - from) * (column + 1)) / low.length);
      const top = middle - Math.min(1, high[column]) * middle;
      const bottom = middle - Math.max(-1, low[column]) * middle;
      pen.fillRect(left, top, Math.max(1, right - left), Math.max(1, bottom - top));
    }
  }

  // A band at the bottom: what was kept bit for bit, what was made, and the level of every seam.
  paintMade(pen, height, color) {
    if (!this.sound.regions?.length) return;
    const top = height - RULER - 5;
    pen.fillStyle = color("--kept");
    pen.fillRect(0, top, this.x(this.sound.seconds), 5);
    pen.fillStyle = color("--made");
    for (const [start, end] of this.sound.regions) pen.fillRect(this.x(start), top, this.x(end) - this.x(start), 5);
    pen.font = "11px system-ui";
    for (const seam of this.sound.seams ?? []) {
      const x = this.x(seam.sample / this.sound.sample_rate);
      pen.fillRect(x - 0.5, 0, 1, height - RULER);
      pen.fillText(`${seam.level_difference_db >= 0 ? "+" : ""}${seam.level_difference_db.toFixed(1)} dB`, x + 3, 12);
    }
  }

  paintRegion(pen, { start, end }, height, color) {
    const [left, right] = [this.x(start), this.x(end)];
    pen.globalAlpha = 0.28;
    pen.fillStyle = color;
    pen.fillRect(left, 0, right - left, height - RULER);
    pen.globalAlpha = 1;
    pen.fillRect(left - 1, 0, 2, height - RULER);
    pen.fillRect(right - 1, 0, 2, height - RULER);
  }

  paintEnd(pen, height, color) {
    const x = this.x(this.target ?? this.sound.seconds);
    pen.fillStyle = color;
    pen.fillRect(x - 2, 0, 4, height - RULER);
    if (this.target) {
      pen.globalAlpha = 0.2;
      pen.fillRect(this.x(this.sound.seconds), 0, x - this.x(this.sound.seconds), height - RULER);
      pen.globalAlpha = 1;
    }
  }

  paintRuler(pen, width, height) {
    pen.fillStyle = "#171b22";
    pen.fillRect(0, height - RULER, width, RULER);
    pen.fillStyle = "#b9c4cf";
    pen.font = "11px system-ui";
    const wish = (this.span * 70) / width;
    const power = 10 ** Math.floor(Math.log10(wish));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= wish);
    const digits = Math.max(0, -Math.floor(Math.log10(step)));
    for (let at = Math.ceil(this.from / step) * step; at <= this.from + this.span; at += step) {
      pen.fillRect(this.x(at), height - RULER, 1, 4);
      pen.fillText(at.toFixed(digits), this.x(at) + 3, height - 5);
    }
  }

  // What lies under the mouse: the end of the sound, the border of a region, or nothing.
  grip(x) {
    if (!this.sound) return null;
    const near = (seconds) => Math.abs(this.x(seconds) - x) <= EDGE;
    for (const region of this.regions) {
      if (near(region.start)) return { region, side: "start" };
      if (near(region.end)) return { region, side: "end" };
    }
    return near(this.target ?? this.sound.seconds) ? { end: true } : null;
  }

  hover(event) {
    if (event.buttons) return;
    this.canvas.style.cursor = this.grip(event.offsetX) ? "ew-resize" : "crosshair";
  }

  down(event) {
    if (!this.sound || event.button) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.focus();
    const grip = this.grip(event.offsetX);
    const first = this.seconds(event.offsetX);
    const width = this.canvas.clientWidth;
    const span = this.span;
    let drawn = null;
    const move = (next) => {
      const at = this.from + (next.offsetX / width) * span;
      if (grip?.end) {
        this.extend(at);
        this.on.target();
      } else if (grip) this.bound(grip, at);
      else if (drawn || Math.abs(next.offsetX - event.offsetX) > 4) {
        drawn ??= this.add(first, first);
        Object.assign(drawn, { start: this.inside(Math.min(first, at)), end: this.inside(Math.max(first, at)) });
        this.on.regions();
      }
      this.draw();
    };
    const up = () => {
      this.canvas.removeEventListener("pointermove", move);
      if (!grip && !drawn) this.on.seek(this.inside(first));
      this.settle();
    };
    this.canvas.addEventListener("pointermove", move);
    this.canvas.addEventListener("pointerup", up, { once: true });
    this.canvas.addEventListener("pointercancel", up, { once: true });
  }

  inside(at) {
    return Math.min(Math.max(0, at), this.sound.seconds);
  }

  extend(at) {
    const target = Math.min(at, this.limit);
    this.target = target > this.sound.seconds + 0.01 ? target : null;
  }

  bound({ region, side }, at) {
    region[side] = this.inside(at);
    if (region.start > region.end) [region.start, region.end] = [region.end, region.start];
    this.on.regions();
  }

  add(start, end) {
    const region = { start: this.inside(start), end: this.inside(end), prompt: "" };
    this.regions.push(region);
    return region;
  }

  // Joins regions that overlap, and drops what is too short to be made.
  settle() {
    const kept = [];
    for (const region of [...this.regions].sort((a, b) => a.start - b.start)) {
      const before = kept.at(-1);
      if (before && region.start < before.end) before.end = Math.max(before.end, region.end);
      else if (region.end > region.start) kept.push(region);
    }
    this.regions = kept;
    this.on.regions();
    if (this.target && this.target > this.from + this.span) this.show(this.from, this.span);
    this.draw();
  }

  wheel(event) {
    if (!this.sound) return;
    event.preventDefault();
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      this.show(this.from + ((event.deltaX || event.deltaY) / this.canvas.clientWidth) * this.span, this.span);
    } else this.zoom(1.0015 ** event.deltaY, this.seconds(event.offsetX));
  }
}

function shade(value) {
  const place = value * (STOPS.length - 1);
  const index = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[index].map((start, channel) => start + (STOPS[index + 1][channel] - start) * (place - index));
}
