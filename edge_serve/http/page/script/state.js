// Shares what several modules change.

import { newConversation } from "./conversation.js";

export const state = {
  conversation: newConversation(),  // the one that is shown
  request: null,  // the AbortController of the answer that is under way
  files: [],  // that wait for the next message: texts { name, text }, and pictures { name, picture }, a data URI
  served: [],  // as /v1/models lists them
  models: [],  // those of them that chat
  stats: null,  // the last answer of /stats
  timer: 0,
};

/** Returns a model as /v1/models describes it; null where there is none of that name. */
export const modelNamed = (name) => state.models.find(({ id }) => id === name) ?? null;

/** Returns the model that is chosen. */
export const chosenModel = () => modelNamed(document.getElementById("model").value);
