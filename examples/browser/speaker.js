// Speaker embeddings by transformers.js, in a browser and in node: what page.js and measure.js need of it.
import { AutoFeatureExtractor, AutoModel, env } from "@huggingface/transformers";

env.allowLocalModels = true; // the model lies beside this page
env.allowRemoteModels = false;
env.useBrowserCache = false;
if (typeof window !== "undefined") {
  env.localModelPath = new URL("./", location.href).href;
  // Without this the runtime would come from a server of its makers.
  env.backends.onnx.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", location.href).href;
}

// A model of a folder that `mrl-redimnet export --to browser` wrote. dtype: fp32, fp16 or q8.
export async function load(folder, dtype) {
  const model = await AutoModel.from_pretrained(folder, { dtype, device: typeof window === "undefined" ? "cpu" : "wasm" });
  const extractor = await AutoFeatureExtractor.from_pretrained(folder);
  return { model, extractor, rate: extractor.config.sampling_rate, dims: model.config.matryoshka_dims };
}

// The embedding of samples (a Float32Array at `rate`); audio longer than the window is cut into equal parts.
export async function embed({ model, extractor, rate }, samples) {
  const shortest = extractor.config.min_samples;
  if (samples.length < shortest) throw new Error(`The recording has ${samples.length} samples, expected ${shortest} or more.`);
  const count = Math.ceil(samples.length / (model.config.window_seconds * rate));
  const cut = (i) => Math.floor((i * samples.length) / count);
  const mean = new Float32Array(model.config.embedding_size);
  for (let i = 0; i < count; i++) {
    const { embeddings } = await model(await extractor(samples.slice(cut(i), cut(i + 1))));
    embeddings.data.forEach((value, k) => (mean[k] += value / count));
  }
  return mean;
}

// The cosine of the first `dim` numbers of two embeddings.
export function cosine(a, b, dim) {
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < dim; i++) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return ab / Math.sqrt(aa * bb);
}
