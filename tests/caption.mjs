// node caption.mjs FOLDER DTYPE PICTURE...: captions by transformers.js from a folder of convert.py onnx, as JSON.
import path from 'node:path';
import { env, pipeline } from '@huggingface/transformers';

const [folder, dtype, ...pictures] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const captioner = await pipeline('image-to-text', path.basename(folder), { dtype, device: 'cpu' });
const captions = [];
for (const picture of pictures) {
  captions.push((await captioner(picture, { max_new_tokens: 12 }))[0].generated_text);
}
console.log(JSON.stringify(captions));
