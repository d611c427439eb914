// The page starts here.

import * as api from "./api.js";
import { useBase } from "./chat.js";
import { refresh } from "./contexts.js";
import { attempt, byId, onAction, say } from "./dom.js";
import "./texts.js";
import "./adapters.js";

async function start() {
  const { model } = await api.health();
  useBase(model);
  byId("base").textContent = `Base model: ${model}`;
  byId("access").hidden = !api.key();
  await refresh();
}

onAction(byId("access"), "submit", async () => {
  api.useKey(byId("key").value.trim());
  byId("key").value = "";
  await refresh();
  say("The key is accepted.");
});
byId("forget").addEventListener("click", () => {
  api.useKey("");
  location.reload();
});
attempt(start);
