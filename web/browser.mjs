// Drives the built page in headless Chromium: `node browser.mjs ORDERS.json` carries out the orders and writes what it saw to ORDERS.json.out.
//
// An order is a list: a verb of `verbs` below and its arguments. What the page itself can do by mouse and keyboard is done so.

import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [path] = process.argv.slice(2);
const { chromium: executablePath, url, orders, viewport, colorScheme = "light", route, timeout, gpu = false } = JSON.parse(readFileSync(path, "utf8"));
const software = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--disable-gpu-compositing", "--disable-gpu-rasterization"]; // a GPU in software
const profile = mkdtempSync(join(tmpdir(), "page-"));
const seen = { errors: [], bytes: 0, files: {}, values: {} };

const context = await chromium.launchPersistentContext(profile, {
  executablePath, headless: true, viewport, colorScheme, timeout,
  args: [
    "--headless", "--no-sandbox", ...(gpu ? software : ["--disable-gpu"]), "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
  ],
});
const page = context.pages()[0] ?? (await context.newPage());
page.setDefaultTimeout(timeout);
page.on("pageerror", (error) => seen.errors.push(error.message));
page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
page.on("requestfinished", async (request) => {
  const { responseBodySize: size } = await request.sizes();
  seen.bytes += size;
  seen.files[new URL(request.url()).pathname] = size;
});
await page.addInitScript(() => {
  window.recorded = [];
  document.addEventListener("frame", () => {
    for (const canvas of document.querySelectorAll("#players canvas")) {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      window.recorded.push({ id: canvas.id, pixels: Array.from(data.filter((_, index) => index % 4 === 0)) });
    }
  });
});
if (route !== undefined) {
  await page.route(route.glob, async (each) => {
    if (route.abort) return each.abort();
    const response = await each.fetch();
    const body = await response.body();
    const isolation = Object.entries(response.headers()).filter(([name]) => name.startsWith("cross-origin-")); // a worker needs them too
    const changed = route.length === undefined ? route.prefix + body.toString() : body.subarray(0, route.length);
    return each.fulfill({ body: changed, headers: { ...Object.fromEntries(isolation), "content-type": route.type } });
  });
}

/** What /proc says of the page's processes, by the name of a file there. */
function processes(file) {
  return readdirSync("/proc").flatMap((pid) => {
    try {
      const command = readFileSync(`/proc/${pid}/cmdline`, "utf8");
      return command.includes("--type=renderer") && command.includes(profile) ? [readFileSync(`/proc/${pid}/${file}`, "utf8")] : [];
    } catch {
      return []; // gone meanwhile
    }
  });
}

/** Resident bytes of the page's process, after a collection. */
async function memory() {
  const session = await context.newCDPSession(page);
  await session.send("HeapProfiler.collectGarbage");
  await session.detach();
  const pageSize = Number(execFileSync("getconf", ["PAGESIZE"]));
  return Math.max(...processes("statm").map((line) => pageSize * Number(line.split(" ")[1])));
}

/** Seconds of processor time that the page's processes have used. */
function cpuSeconds() {
  const ticks = Number(execFileSync("getconf", ["CLK_TCK"]));
  return processes("stat").reduce((sum, line) => {
    const fields = line.slice(line.lastIndexOf(")") + 2).split(" "); // from the third one on
    return sum + (Number(fields[11]) + Number(fields[12])) / ticks;
  }, 0);
}

const verbs = {
  frames: async (count, name) => {
    await page.evaluate(() => (window.recorded = []));
    await page.waitForFunction(
      (wanted) => window.recorded.length >= wanted * document.querySelectorAll("#players canvas").length, count, { polling: 100, timeout },
    );
    if (name !== undefined) seen.values[name] = await page.evaluate(() => window.recorded);
  },
  step: async (name) => {
    await page.evaluate(() => (window.recorded = []));
    await page.click("#step");
    await page.waitForFunction(() => window.recorded.length >= 3, undefined, { polling: 100, timeout });
    await page.waitForTimeout(200);
    seen.values[name] = [...(seen.values[name] ?? []), ...(await page.evaluate(() => window.recorded))];
  },
  recorded: async (name) => (seen.values[name] = await page.evaluate(() => window.recorded)),
  ready: () => page.waitForSelector("body[data-ready]", { timeout }),
  waitFor: (expression) => page.waitForFunction(expression, undefined, { polling: 100, timeout }),
  click: (selector) => page.click(selector, { timeout }),
  check: (selector) => page.check(selector, { force: true, timeout }),
  press: (key) => page.keyboard.press(key),
  hold: async (...keys) => {
    for (const key of keys) await page.keyboard.down(key);
    for (const key of keys) await page.keyboard.up(key);
  },
  fill: (selector, text) => page.fill(selector, text),
  slide: (selector, value) =>
    page.$eval(selector, (input, wanted) => {
      input.value = wanted;
      input.dispatchEvent(new Event("input", { bubbles: true }));
      input.dispatchEvent(new Event("change", { bubbles: true }));
    }, String(value)),
  blur: () => page.evaluate(() => document.activeElement?.blur()),
  read: async (name, expression) => (seen.values[name] = await page.evaluate(expression)),
  memory: async (name) => (seen.values[name] = await memory()),
  cpu: (name) => (seen.values[name] = cpuSeconds()),
  clock: (name) => (seen.values[name] = performance.now() / 1000),
  picture: (file, fullPage = true) => page.screenshot({ path: file, fullPage }),
};

try {
  await page.goto(url, { timeout });
  for (const [verb, ...rest] of orders) await verbs[verb](...rest);
} catch (error) {
  seen.failure = `${error.message.split("\n")[0]}; the page says: ${await page.$eval("#message", (line) => line.textContent).catch(() => "nothing")}`;
} finally {
  await context.close().catch(() => {});
  rmSync(profile, { recursive: true, force: true });
}
writeFileSync(`${path}.out`, JSON.stringify(seen));
