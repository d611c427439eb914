// The user's contexts, as the server last told. Whoever shows them is told of every change.

import * as api from "./api.js";

export let contexts = [];
const watchers = [];

export const find = (id) => contexts.find((context) => context.id === id);

export const watch = (watcher) => watchers.push(watcher);

export async function refresh() {
  contexts = (await api.list()).data;
  for (const watcher of watchers) watcher(contexts);
}
