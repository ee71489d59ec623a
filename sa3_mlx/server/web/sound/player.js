// Play sounds: from anywhere, in a loop, two versions in turn, a sound that is still being decoded, and one that is too
// long to be held: {duration, element}, whose element fetches what it plays.

export class Player {
  constructor(tell) {
    this.tell = tell; // called when playing begins, ends or moves
    this.position = 0; // seconds
    this.playing = false;
    this.range = null; // seconds [from, to] that are repeated
    this.buffer = null;
    this.gain = 1;
    this.sources = [];
  }

  get context() {
    this.made ??= new AudioContext();
    return this.made;
  }

  // Decodes a file at its own rate, without a device.
  async load(bytes, rate) {
    return new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
  }

  // Takes another buffer; what plays goes on at the same place.
  use(buffer, gain = 1) {
    const going = this.playing;
    const at = this.now();
    this.stop();
    this.buffer = buffer;
    this.gain = gain;
    this.position = buffer ? Math.min(at, buffer.duration) : 0;
    if (going && buffer) this.play();
  }

  now() {
    if (!this.playing) return this.position;
    if (this.buffer?.element) return this.buffer.element.currentTime;
    const at = this.from + this.context.currentTime - this.began;
    if (this.range && at > this.range[1]) {
      const [start, end] = this.range;
      return start + ((at - start) % (end - start));
    }
    return this.buffer ? Math.min(at, this.buffer.duration) : at;
  }

  play() {
    if (!this.buffer || this.playing) return;
    this.context.resume();
    if (this.position >= this.buffer.duration - 0.001) this.position = 0;
    if (this.range) this.position = Math.min(Math.max(this.position, this.range[0]), this.range[1]);
    if (this.buffer.element) return this.playElement(this.buffer.element);
    const source = this.source(this.buffer);
    if (this.range) {
      source.loop = true;
      [source.loopStart, source.loopEnd] = this.range;
    }
    source.onended = () => {
      if (this.sources.includes(source)) {
        this.stop();
        this.position = 0;
        this.tell();
      }
    };
    this.start();
    source.start(0, this.position);
    this.tell();
  }

  // Plays what fetches itself; a loop of it comes round within some milliseconds.
  playElement(element) {
    element.currentTime = this.position;
    const again = () => { [element.currentTime] = this.range; };
    element.ontimeupdate = () => { if (this.range && element.currentTime >= this.range[1]) again(); };
    element.onended = () => {
      if (this.range) {
        again();
        element.play();
        return;
      }
      this.stop();
      this.position = 0;
      this.tell();
    };
    this.start();
    element.play().catch(() => { if (this.buffer?.element === element) this.stop(); });
    this.tell();
  }

  source(buffer) {
    const level = new GainNode(this.context, { gain: this.gain });
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(level).connect(this.context.destination);
    this.sources.push(source);
    return source;
  }

  start() {
    this.from = this.position;
    this.began = this.context.currentTime;
    this.playing = true;
  }

  stop() {
    this.position = this.now();
    this.playing = false;
    this.live = null;
    this.buffer?.element?.pause();
    const sources = this.sources;
    this.sources = [];
    for (const source of sources) source.stop();
    this.tell();
  }

  toggle() {
    if (this.playing) this.stop();
    else this.play();
  }

  seek(at) {
    const going = this.playing;
    this.stop();
    this.position = Math.max(0, at);
    if (going) this.play();
    this.tell();
  }

  // Plays chunks [{samples: [Float32Array, ...], rate}] one after the other, also those that come later.
  playLive(chunks) {
    this.stop();
    this.buffer = null;
    this.gain = 1;
    this.position = chunks[0].start / chunks[0].rate;
    this.context.resume();
    this.start();
    this.live = { next: this.context.currentTime + 0.05 };
    chunks.forEach((chunk) => this.append(chunk));
    this.tell();
  }

  append({ samples, rate }) {
    if (!this.live) return;
    const buffer = new AudioBuffer({ length: samples[0].length, numberOfChannels: samples.length, sampleRate: rate });
    samples.forEach((channel, index) => buffer.copyToChannel(channel, index));
    this.live.next = Math.max(this.live.next, this.context.currentTime);
    this.source(buffer).start(this.live.next);
    this.live.next += buffer.duration;
  }
}

// The level of a buffer, for comparing two at the same loudness.
export function level(buffer) {
  let sum = 0;
  for (let channel = 0; channel < buffer.numberOfChannels; channel += 1) {
    for (const sample of buffer.getChannelData(channel)) sum += sample * sample;
  }
  return Math.sqrt(sum / (buffer.length * buffer.numberOfChannels));
}

// A chunk of an event as samples by channel.
export function samplesOf(data) {
  const bytes = Uint8Array.from(atob(data.pcm16), (letter) => letter.charCodeAt(0));
  const words = new Int16Array(bytes.buffer);
  const samples = Array.from({ length: data.channels }, () => new Float32Array(data.samples));
  words.forEach((word, index) => { samples[index % data.channels][Math.floor(index / data.channels)] = word / 32768; });
  return { samples, rate: data.sample_rate, start: data.start };
}
