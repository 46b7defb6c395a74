// Shares what several modules change.

export const state = { turns: [], request: null, models: [], timer: 0 };
