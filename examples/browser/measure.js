// What transformers.js answers, and how fast, in node or in Chromium; tests/test_browser.py compares it with PyTorch.
//
//   node measure.js node     MODEL_FOLDER         a.wav b.wav
//   node measure.js chromium http://127.0.0.1:8000 a.wav b.wav [--screenshot page.png]
//
// The second opens index.html of a server that runs (see there), gives it the two recordings, and reads the answer.
// It prints JSON: by dtype the embeddings, and milliseconds per second of audio (the best of three for each recording).
// CHROMIUM=/path/to/chromium chooses the browser.
import { resolve } from "node:path";
import { readWav } from "./wav.js";

// Runs in node and, as text, in the page.
async function measure({ module, folder, recordings }) {
  const { embed, load } = await import(module);
  const found = {};
  for (const dtype of ["fp32", "fp16", "q8"]) {
    const speaker = await load(folder, dtype);
    const [embeddings, speeds] = [[], []];
    for (const recording of recordings) {
      const samples = Float32Array.from(recording);
      embeddings.push(Array.from(await embed(speaker, samples)));
      let best = Infinity;
      for (let i = 0; i < 3; i++) {
        const before = performance.now();
        await embed(speaker, samples);
        best = Math.min(best, performance.now() - before);
      }
      speeds.push((best * speaker.rate) / samples.length);
    }
    found[dtype] = { embeddings, milliseconds: speeds.reduce((a, b) => a + b) / speeds.length };
  }
  return found;
}

const [where, place, ...files] = process.argv.slice(2);
const screenshot = files.at(-2) === "--screenshot" ? files.splice(-2)[1] : null;
const recordings = files.map((file) => Array.from(readWav(file).samples));

async function inChromium() {
  const { chromium } = await import("playwright-core");
  const flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: flags });
  try {
    const page = await browser.newPage({ viewport: { width: 800, height: 640 } });
    const [requests, errors] = [[], []];
    page.on("request", (request) => requests.push(request.url()));
    page.on("pageerror", (error) => errors.push(String(error)));
    page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
    await page.goto(place);
    for (const [i, legend] of ["First recording", "Second recording"].entries()) {
      await page.getByRole("group", { name: legend }).getByLabel("Audio file").setInputFiles(files[i]);
    }
    const text = (id) => page.locator(`#${id}`).textContent();
    const answers = {};
    const answered = () => document.getElementById("cosine").textContent !== "-";
    await page.waitForFunction(answered, null, { timeout: 60_000 }).catch(async () => {
      throw new Error(`The page has no answer: ${await page.locator("main").innerText()} ${errors.join(" ")}`);
    });
    for (const dim of await page.getByLabel("Dimensions").locator("option").allTextContents()) {
      await page.getByLabel("Dimensions").selectOption(dim);
      answers[dim] = { cosine: Number(await text("cosine")), decision: await text("decision") };
    }
    if (screenshot) await page.screenshot({ path: screenshot });
    const folder = new URL(place).searchParams.get("model") ?? "model";
    const found = await page.evaluate(measure, { module: new URL("speaker.js", page.url()).href, folder, recordings });
    const local = [new URL("./", page.url()).href, "blob:", "data:"];
    const elsewhere = requests.filter((url) => !local.some((start) => url.startsWith(start)));
    return { ...found, page: { answers, elsewhere, errors }, version: browser.version() };
  } finally {
    await browser.close();
  }
}

const module = import.meta.resolve("./speaker.js");
const found = where === "node" ? await measure({ module, folder: resolve(place), recordings }) : await inChromium();
console.log(JSON.stringify(found));
