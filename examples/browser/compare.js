// Is it one speaker? An exported model and ONNX Runtime in node, without transformers.js; WAV files at the model's rate.
//
//   mrl-redimnet export MODEL --to browser --out model
//   make browser && node examples/browser/compare.js model a.wav b.wav
import { existsSync, readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { thresholdsOf } from "./thresholds.js";
import { readWav } from "./wav.js";

const [folder, ...files] = process.argv.slice(2);
const read = (name) => JSON.parse(readFileSync(`${folder}/${name}`, "utf8"));
const { matryoshka_dims: dims, window_seconds: window, embedding_size: size } = read("config.json");
const { sampling_rate: rate, min_samples: shortest } = read("preprocessor_config.json");
const session = await ort.InferenceSession.create(`${folder}/onnx/model.onnx`);

// The embedding of a file and its seconds; one longer than the model's window is cut into equal parts.
async function embed(file) {
  const audio = readWav(file);
  const { length } = audio.samples;
  if (audio.rate !== rate || length < shortest) {
    throw new Error(`${file}: ${length} samples at ${audio.rate} Hz, expected ${shortest} or more at ${rate} Hz.`);
  }
  const count = Math.ceil(length / (window * rate));
  const mean = new Float32Array(size);
  for (let i = 0; i < count; i++) {
    const part = audio.samples.slice(Math.floor((i * length) / count), Math.floor(((i + 1) * length) / count));
    const shape = [1, part.length];
    const inputs = {
      input_values: new ort.Tensor("float32", part, shape),
      attention_mask: new ort.Tensor("int64", new BigInt64Array(part.length).fill(1n), shape),
    };
    const known = session.inputNames.map((name) => [name, inputs[name]]); // a model may have no mask
    const { embeddings } = await session.run(Object.fromEntries(known));
    embeddings.data.forEach((value, k) => (mean[k] += value / count));
  }
  return { mean, seconds: length / rate };
}

const dot = (a, b, dim) => a.slice(0, dim).reduce((sum, value, i) => sum + value * b[i], 0);
const [a, b] = [await embed(files[0]), await embed(files[1])];
const entries = existsSync(`${folder}/thresholds.json`) ? read("thresholds.json").entries : [];
const thresholds = thresholdsOf(entries);
for (const dim of dims) {
  const cosine = dot(a.mean, b.mean, dim) / Math.sqrt(dot(a.mean, a.mean, dim) * dot(b.mean, b.mean, dim));
  const threshold = thresholds.get(dim)?.(a.seconds, b.seconds);
  const decision = threshold === undefined ? "" : cosine >= threshold ? "  same" : "  different";
  console.log(`${String(dim).padStart(4)} dimensions: cosine ${cosine.toFixed(4)}${decision}`);
}
