// node caption.mjs FOLDER DTYPE PICTURE...: captions by transformers.js from a folder of convert.py onnx, as JSON.
import { env, pipeline } from '@huggingface/transformers';

const [folder, dtype, ...pictures] = process.argv.slice(2);
env.allowRemoteModels = false;
const captioner = await pipeline('image-to-text', folder, { dtype, device: 'cpu' });
const captions = [];
for (const picture of pictures) {
  captions.push((await captioner(picture, { max_new_tokens: 12 }))[0].generated_text);
}
console.log(JSON.stringify(captions));
