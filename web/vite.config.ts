// Builds the page into dist/: a folder of plain files, which any static server can publish under any path.
import { copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { defaultClientConditions, defineConfig, type Plugin } from "vite";

const RUNTIME = "node_modules/onnxruntime-web/dist";
// What the page may load of onnxruntime: with WASM alone, and with WebGPU.
const RUNTIME_FILES = ["ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"].flatMap((name) => [`${name}.mjs`, `${name}.wasm`]);
const COMPRESSED = /\.(html|js|mjs|css|wasm|json|onnx)$/; // weights of float16 do not shrink

function files(folder: string): string[] {
  return readdirSync(folder).flatMap((name) => {
    const path = join(folder, name);
    return statSync(path).isDirectory() ? files(path) : [path];
  });
}

function wholePage(): Plugin {
  return {
    name: "whole-page",
    apply: "build",
    buildStart() {
      if (!existsSync("public/networks/student/network.json")) {
        this.error("public/networks is empty: run `python -m web.export` in the repository first");
      }
    },
    closeBundle() {
      mkdirSync("dist/ort", { recursive: true });
      for (const name of RUNTIME_FILES) copyFileSync(join(RUNTIME, name), join("dist/ort", name));
      for (const path of files("dist").filter((each) => COMPRESSED.test(each))) {
        writeFileSync(`${path}.gz`, gzipSync(readFileSync(path))); // served by demo.py to browsers that take it
      }
    },
  };
}

export default defineConfig({
  base: "./",
  build: { target: "es2022", chunkSizeWarningLimit: 300 },
  worker: { format: "es" },
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", ...defaultClientConditions] },
  plugins: [wholePage()],
});
