// Uses the page of `mrl-redimnet demo` in Chromium as a person would, and prints what was seen as JSON.
//
//   node demo_page.js http://127.0.0.1:7860 FOLDER [--screenshots FOLDER]
//
// tests/demo_visit.py prepares the recordings in FOLDER and calls this. CHROMIUM=/path/to/chromium chooses the browser;
// playwright-core is that of examples/browser (`make browser`).
import { createRequire } from "node:module";
import { join } from "node:path";

const { chromium } = createRequire(new URL("../examples/browser/package.json", import.meta.url))("playwright-core");
const [address, folder, , screenshots] = process.argv.slice(2);
const speech = (...names) => names.map((name) => join(folder, `${name}.wav`));
const PATIENCE = { timeout: 90_000 };
const args = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-background-networking",
  "--use-fake-ui-for-media-stream",
  "--use-fake-device-for-media-stream",
  `--use-file-for-fake-audio-capture=${speech("anna_2")[0]}`,
];

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
const [requests, errors, seen] = [[], [], {}];

async function open(width = 800, height = 700) {
  const page = await browser.newPage({ viewport: { width, height } });
  page.setDefaultTimeout(PATIENCE.timeout);
  page.on("request", (request) => requests.push(request.url()));
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  await page.goto(address);
  await page.getByRole("slider", { name: "Numbers of the embedding" }).waitFor();
  await page.getByRole("group", { name: "First recording" }).waitFor();
  return page;
}

const give = (page, box, ...names) => page.locator(`#${box} input[type=file]`).setInputFiles(speech(...names));
const text = (page, box) => page.locator(`#${box} [role=status]`).innerText(); // without how long it took
const says = (page, box, words) => page.locator(`#${box}`).getByText(words).first().waitFor(PATIENCE);

async function shoot(page, name) {
  if (!screenshots) return;
  await page.mouse.move(0, 0);
  await page.waitForTimeout(1500); // waveforms are drawn after they are loaded
  await page.screenshot({ path: join(screenshots, `${name}.png`), fullPage: true });
}

async function compareTwo() {
  const page = await open();
  seen.empty = await text(page, "verdict");
  seen.live = await page.locator("#verdict [role=status]").getAttribute("aria-live");
  await shoot(page, "empty");
  await give(page, "first", "anna_1");
  await says(page, "verdict", "the second recording");
  await give(page, "second", "anna_2");
  await says(page, "verdict", "Accepted");
  seen.accepted = await text(page, "verdict");
  seen.sizes = await page.locator("#lost tbody tr").allInnerTexts();
  seen.pictures = await page.locator("#pictures img").evaluateAll((all) => all.map((each) => each.alt));
  await shoot(page, "accepted");
  const slider = page.getByRole("slider", { name: "Numbers of the embedding" });
  await slider.focus();
  await page.keyboard.press("Home");
  await says(page, "verdict", "With 16 numbers");
  seen.smallest = await text(page, "verdict");
  seen.slider = await slider.getAttribute("aria-valuetext");
  seen.chosen = await page.locator("#lost tr[aria-current=true] th").innerText();
  seen.focus = await page.evaluate(() => document.activeElement.type);
  await page.keyboard.press("End");
  await says(page, "verdict", "With 256 numbers");
  await page.getByRole("button", { name: "Error rates of this model" }).click();
  seen.rates = await page.locator("#rates tbody tr").allInnerTexts();
  await page.getByRole("button", { name: "Consent, and what happens" }).click();
  await says(page, "consent", "Nothing is logged");
  await shoot(page, "rates");
  await page.close();
}

async function others() {
  const page = await open();
  await give(page, "first", "anna_1");
  await give(page, "second", "berta_1");
  await says(page, "verdict", "Rejected");
  seen.rejected = await text(page, "verdict");
  await shoot(page, "rejected");
  await page.close();
  const careful = await open();
  await give(careful, "first", "anna_1");
  await give(careful, "second", "short_and_quiet");
  await says(careful, "verdict", "Too quiet");
  seen.warning = await text(careful, "verdict");
  await shoot(careful, "warning");
  await careful.close();
  const refused = await open();
  await give(refused, "first", "silence");
  await says(refused, "verdict", "Not possible");
  seen.refused = await text(refused, "verdict");
  await shoot(refused, "refused");
  await refused.close();
}

async function record() {
  const page = await open();
  await give(page, "first", "anna_1");
  const box = page.getByRole("group", { name: "Second recording" });
  await box.getByRole("button", { name: "Record audio" }).click();
  await box.getByRole("button", { name: "Record", exact: true }).click();
  await page.waitForTimeout(4500); // of speech
  await box.getByRole("button", { name: "Stop" }).first().click();
  await says(page, "verdict", "Score");
  seen.recorded = await text(page, "verdict");
  await page.close();
}

async function identify() {
  const page = await open();
  await page.getByRole("tab", { name: "Verify" }).focus(); // from there on by the keyboard
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await page.getByRole("group", { name: "Recording to enrol" }).waitFor();
  for (const [name, ...takes] of [["Anna", "anna_1", "anna_2a"], ["Berta", "berta_1a"]]) {
    for (const [number, take] of takes.entries()) {
      await page.getByRole("textbox", { name: "Name" }).fill(name);
      await give(page, "take", take);
      await page.locator("#take time").first().waitFor();
      await page.getByRole("button", { name: "Enrol", exact: true }).click();
      await says(page, "done", `${name} is enrolled with ${number + 1} `);
      await page.getByRole("group", { name: "Recording to enrol" }).getByRole("button", { name: "Clear" }).click();
    }
  }
  await give(page, "test", "anna_2b");
  await says(page, "identified", "this is Anna");
  seen.identified = await text(page, "identified");
  seen.nearest = await page.locator("#nearest tbody th").allInnerTexts();
  await shoot(page, "identify");
  await page.getByRole("button", { name: "Forget everybody" }).click();
  await says(page, "enrolled", "Nobody is enrolled");
  await says(page, "identified", "Enrol somebody");
  await page.close();
}

async function compareMany() {
  const page = await open();
  await page.getByRole("tab", { name: "Compare many" }).click();
  await page.locator("#files input[type=file]").waitFor({ state: "attached" });
  await give(page, "files", "anna_1a", "anna_1b", "anna_2a", "anna_2b", "berta_1a", "berta_1b");
  await page.locator("#map svg").waitFor(PATIENCE);
  seen.matrix = await page.locator("#matrix tbody tr").allInnerTexts();
  seen.map = await page.locator("#map svg").getAttribute("aria-label");
  await shoot(page, "compare");
  await page.close();
}

async function phone() {
  const page = await open(375, 700);
  await give(page, "first", "anna_1");
  await give(page, "second", "anna_2");
  await says(page, "verdict", "Accepted");
  await page.locator("#pictures img").nth(1).waitFor();
  seen.width = await page.evaluate(() => document.documentElement.scrollWidth);
  seen.narrowest = await page.locator("#verdict dd").evaluateAll((all) => Math.min(...all.map((each) => each.clientWidth)));
  seen.outside = await page.evaluate(() =>
    [...document.querySelectorAll("button, input:not([type=file]), [role=tab], .mrl-card, img")]
      .filter((each) => each.getClientRects().length && each.getBoundingClientRect().right > innerWidth + 1)
      .map((each) => each.outerHTML.slice(0, 100)),
  );
  await shoot(page, "phone");
  await page.close();
}

try {
  for (const part of [compareTwo, others, record, identify, compareMany, phone]) await part();
  const here = [new URL(address).origin, `blob:${new URL(address).origin}`, "data:"];
  const elsewhere = requests.filter((url) => !here.some((start) => url.startsWith(start)));
  console.log(JSON.stringify({ ...seen, elsewhere, errors, requests: requests.length, version: browser.version() }));
} finally {
  await browser.close();
}
