// Compiles every shader of a folder with Tint, by way of Dawn's device without a driver: what browsers would say of them.
//
// Arguments: the folder of the module `webgpu`, the folder of the shaders.
import { readdirSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [module, folder] = process.argv.slice(2).map((path) => resolve(path));
const { create, globals } = await import(pathToFileURL(join(module, "index.js")));
Object.assign(globalThis, globals);
// Kept: what it has made lives no longer than it does.
const gpu = create(["backend=null"]);
const adapter = await gpu.requestAdapter();
// What every browser has, and subgroups.
const device = await adapter.requestDevice({
  requiredFeatures: ["subgroups"],
  requiredLimits: { maxStorageBuffersPerShaderStage: adapter.limits.maxStorageBuffersPerShaderStage },
});
let failed = 0;
const files = readdirSync(folder).filter((file) => file.endsWith(".wgsl")).sort();
for (const file of files) {
  const shader = device.createShaderModule({ code: readFileSync(join(folder, file), "utf8") });
  const { messages } = await shader.getCompilationInfo();
  const wrong = messages.filter((message) => message.type !== "info");
  if (wrong.length > 0) {
    failed += 1;
    for (const message of wrong) console.log(`${file}:${message.lineNum}: ${message.type}: ${message.message}`);
  }
}
console.log(`${files.length} shaders, ${failed} refused`);
process.exit(failed === 0 && files.length > 0 ? 0 : 1);
