// The page's parts: audio to samples, samples to embeddings, embeddings to a decision. See index.html.
import { cosine, embed, load } from "./speaker.js";
import { thresholdsOf } from "./thresholds.js";

const show = (id, text) => (document.getElementById(id).textContent = text);
const [dim, dtype] = ["dim", "dtype"].map((id) => document.getElementById(id));
const folder = new URLSearchParams(location.search).get("model") ?? "model";
const takes = [...document.querySelectorAll("fieldset")].map((box) => ({ box, note: box.querySelector(".note") }));
let speaker = null;
let thresholds = new Map();
let work = Promise.resolve();
const inTurn = (step) => (work = work.then(step)); // one after another: they would slow each other, and be timed so

async function loadThresholds() {
  const answer = await fetch(`${folder}/thresholds.json`);
  thresholds = thresholdsOf(answer.ok ? (await answer.json()).entries : []);
}

async function start() {
  speaker = null;
  show("decision", "Loading the model ...");
  try {
    await loadThresholds();
    const loaded = await load(folder, dtype.value);
    await embed(loaded, new Float32Array(loaded.rate)); // the first run is slower than all others
    const chosen = Number(dim.value) || loaded.dims.at(-1);
    dim.replaceChildren(...loaded.dims.map((size) => new Option(size, size, false, size === chosen)));
    speaker = loaded;
  } catch (error) {
    show("decision", `The model in the folder ${folder} cannot be loaded: ${error.message}`);
    return;
  }
  for (const take of takes) await listen(take);
  compare();
}

// A recording (a file or a take of the microphone) as samples: mono, at the model's rate.
async function decode(blob) {
  const context = new OfflineAudioContext(1, 1, speaker.rate); // it resamples what it decodes
  const audio = await context.decodeAudioData(await blob.arrayBuffer());
  const samples = new Float32Array(audio.length);
  for (let channel = 0; channel < audio.numberOfChannels; channel++) {
    audio.getChannelData(channel).forEach((value, i) => (samples[i] += value / audio.numberOfChannels));
  }
  return samples;
}

// Embeds the recording of a take, where it has one.
async function listen(take) {
  take.embedding = null;
  if (!take.blob || !speaker) return;
  try {
    const samples = await decode(take.blob);
    const before = performance.now();
    take.embedding = await embed(speaker, samples);
    take.seconds = samples.length / speaker.rate;
    take.speed = (performance.now() - before) / take.seconds;
    const short = take.seconds < 2 ? " Two seconds or more give a surer answer." : "";
    take.note.textContent = `${take.seconds.toFixed(1)} s of audio.${short}`;
  } catch (error) {
    take.note.textContent = `This recording cannot be used: ${error.message}`;
  }
}

function compare() {
  const [a, b] = takes;
  const ready = speaker && a.embedding && b.embedding;
  const score = ready ? cosine(a.embedding, b.embedding, Number(dim.value)) : null;
  const known = thresholds.get(Number(dim.value));
  const threshold = ready ? known?.(a.seconds, b.seconds) : undefined;
  const decided = threshold === undefined ? "No threshold for these dimensions" : score >= threshold ? "Same speaker" : "Different speakers";
  show("decision", !speaker ? "Loading the model ..." : ready ? decided : "Choose or record two recordings");
  show("cosine", ready ? score.toFixed(4) : "-");
  show("threshold", threshold === undefined ? "-" : threshold.toFixed(4));
  show("time", ready ? `${((a.speed + b.speed) / 2).toFixed(1)} ms per second of audio` : "-");
}

function take(one, blob) {
  const player = one.box.querySelector("audio");
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(blob);
  inTurn(() => {
    one.blob = blob;
    return listen(one);
  }).then(compare);
}

// Starts a take of the microphone, or ends the one that runs.
async function record(one, button) {
  if (one.recorder) return one.recorder.stop();
  try {
    if (!navigator.mediaDevices) throw new Error("browsers allow it on localhost and over https alone.");
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    const stream = await navigator.mediaDevices.getUserMedia({ audio });
    const parts = [];
    one.recorder = new MediaRecorder(stream);
    one.recorder.ondataavailable = (event) => parts.push(event.data);
    one.recorder.onstop = () => {
      stream.getTracks().forEach((track) => track.stop());
      button.textContent = "Record by microphone";
      const { mimeType } = one.recorder;
      one.recorder = null;
      take(one, new Blob(parts, { type: mimeType }));
    };
    one.recorder.start();
    button.textContent = "Stop recording";
  } catch (error) {
    one.note.textContent = `No microphone: ${error.message}`;
  }
}

for (const one of takes) {
  one.box.querySelector("input").onchange = (event) => event.target.files[0] && take(one, event.target.files[0]);
  const button = one.box.querySelector("button");
  button.onclick = () => record(one, button);
}
dim.onchange = compare;
dtype.onchange = () => inTurn(start);
inTurn(start);
