// Pictures that go with the next message: read, made small enough for a request and for what this browser keeps.

import { pathOf } from "./conversation.js";
import { chosenModel, state } from "./state.js";
import { t } from "./words.js";

const MOST = 10;  // of a chat, as a server takes them in a request
const MAX_BYTES = 8e5;  // of one, so that all of them are less than a server takes
const EDGES_PX = [2048, 1536, 1024, 512];  // models see no more than the first
const KEPT = ["image/png", "image/jpeg", "image/webp"];  // as they are, where they are small enough

/** Whether a file says that it is a picture; one in SVG is a text. */
export const isPicture = (file) => file.type.startsWith("image/") && !file.type.startsWith("image/svg");

/** Whether a model takes pictures. */
export const seesPictures = (model) => model?.architecture?.input_modalities?.includes("image") ?? false;

/** Reads a picture as `{ name, picture }`, a data URI; throws an Error that says why it cannot go. */
export async function readPicture(file, name) {
  if (!seesPictures(chosenModel())) {
    const others = state.models.filter(seesPictures).map(({ id }) => id).join(", ");
    throw new Error(t(others ? "picture_other_model" : "picture_no_model", { name, models: others }));
  }
  const files = [...pathOf(state.conversation).flatMap((turn) => turn.files ?? []), ...state.files];
  if (files.filter(({ picture }) => picture).length >= MOST) throw new Error(t("picture_many", { name, most: MOST }));
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch (error) {
    throw new Error(t("file_unread", { name, why: error.message }));
  }
  try {
    const isSmall = file.size <= MAX_BYTES && Math.max(bitmap.width, bitmap.height) <= EDGES_PX[0];
    const blob = isSmall && KEPT.includes(file.type) ? file : await shrunk(bitmap);
    return { name, picture: await dataURI(blob) };
  } finally {
    bitmap.close();
  }
}

async function shrunk(bitmap) {
  let blob;
  for (const edge of EDGES_PX) {
    const scale = Math.min(1, edge / Math.max(bitmap.width, bitmap.height));
    const [width, height] = [bitmap.width, bitmap.height].map((px) => Math.max(1, Math.round(px * scale)));
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
    context.fillStyle = "white";  // JPEG has nothing to see through
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
    blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.9 });
    if (blob.size <= MAX_BYTES) break;
  }
  return blob;
}

function dataURI(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
