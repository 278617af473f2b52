// Draw with OpenAI's client for JavaScript: `node openai_client.cjs URL PICTURE` prints what it got as JSON.
"use strict";

const fs = require("node:fs");
const { OpenAI } = require("openai");

const STEPS = { steps: 4, guidance_scale: 1, seed: 5 };

async function main([baseURL, picture]) {
  const { images, models } = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
  const names = (await models.list()).data.map((model) => model.id);
  const generated = await images.generate({ prompt: "fox", n: 2, ...STEPS });
  const edited = await images.edit({ image: fs.createReadStream(picture), prompt: "fox", strength: 0.5, ...STEPS });
  const events = [];
  for await (const event of await images.generate({ prompt: "fox", stream: true, partial_images: 2, ...STEPS })) {
    events.push(event);
  }
  const refused = await images.generate({ prompt: "fox", size: "big" }).then(
    () => null,
    ({ constructor, status, param, code, requestID }) => ({ name: constructor.name, status, param, code, requestID }),
  );
  console.log(JSON.stringify({ names, generated, edited, events, refused }));
}

main(process.argv.slice(2));
