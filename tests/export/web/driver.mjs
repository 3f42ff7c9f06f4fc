// Runs the page's scripts for the tests: node driver.mjs FOLDER-OF-THE-PAGE < requests > answers, both JSON.
// {noise: [[seed, count], …]} → the values' bits; {words: [[counter, key], …]} → four words each;
// {tokenizer, texts, specials} → the ids of every text. What throws gives {error: its message}.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const page = (name) => import(pathToFileURL(`${process.argv[2]}/${name}`));

async function answer({ noise, words, tokenizer, texts, specials }) {
  if (tokenizer) {
    const { encode } = (await page("tokenizer.js")).loadTokenizer(tokenizer);
    return texts.map((text) => encode(text, { specials }));
  }
  const { philox, standardNormal } = await page("philox.js");
  if (words) return words.map(([counter, key]) => philox(counter, key));
  return noise.map(([seed, count]) => Array.from(new Uint32Array(standardNormal(seed, count).buffer)));
}

const answers = [];
for (const request of JSON.parse(readFileSync(0, "utf8"))) {
  answers.push(await answer(request).catch((error) => ({ error: error.message })));
}
process.stdout.write(JSON.stringify(answers));
