// Shares what several modules change.

import { newConversation } from "./conversation.js";

export const state = {
  conversation: newConversation(),  // the one that is shown
  request: null,  // the AbortController of the answer that is under way
  models: [],  // as /v1/models lists them
  stats: null,  // the last answer of /stats
  timer: 0,
};

/** Returns the model that is chosen, as /v1/models describes it. */
export function chosenModel() {
  return state.models.find((model) => model.id === document.getElementById("model").value) ?? null;
}
