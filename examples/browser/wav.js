// Reads WAV files (16-bit or float) in node, which has no decoder of audio.
import { readFileSync } from "node:fs";

// The samples of the first channel, between -1 and 1, as a Float32Array; their rate.
export function readWav(path) {
  const bytes = readFileSync(path);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const name = (at) => bytes.toString("latin1", at, at + 4);
  if (bytes.length < 12 || name(0) !== "RIFF" || name(8) !== "WAVE") throw new Error(`${path} is not a WAV file.`);
  let format = null;
  for (let at = 12; at + 8 <= bytes.length; ) {
    const [start, size] = [at + 8, view.getUint32(at + 4, true)];
    if (name(at) === "fmt ") {
      const [kind, channels, bits] = [0, 2, 14].map((offset) => view.getUint16(start + offset, true));
      format = { float: kind === 3, channels, bits, rate: view.getUint32(start + 4, true) };
    }
    if (name(at) === "data" && format) {
      const width = format.bits / 8;
      if (![16, 32].includes(format.bits) || format.float !== (width === 4)) throw new Error(`${path}: neither 16-bit nor float.`);
      const count = Math.floor(Math.min(size, bytes.length - start) / (width * format.channels));
      const sample = (i) => start + i * width * format.channels;
      const read = (_, i) => (format.float ? view.getFloat32(sample(i), true) : view.getInt16(sample(i), true) / 32768);
      return { samples: Float32Array.from({ length: count }, read), rate: format.rate };
    }
    at = start + size + (size % 2);
  }
  throw new Error(`${path} has no audio.`);
}
