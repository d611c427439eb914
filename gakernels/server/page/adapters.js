// The list of adapters and what can be done with each.

import * as api from "./api.js";
import { choose } from "./chat.js";
import { contexts, find, refresh, watch } from "./contexts.js";
import { ask, byId, bytes, cut, element, nameOf, onAction, say, tokens } from "./dom.js";
import { into } from "./texts.js";

const when = (created) => new Date(1000 * created).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
const rows = new Map(); // they stay while the context exists, and so does the focus

const ACTIONS = [
  ["Chat", (context) => (choose(context.id), byId("question").focus())],
  ["Append", (context) => (into(context.id), byId("text").focus())],
  ["Rename", rename],
  ["PEFT", (context) => download(context, "peft")],
  ["GGUF", (context) => download(context, "gguf")],
  ["Delete", remove],
];

function row({ id }) {
  const box = element("input", { type: "checkbox", id: `pick-${id}` });
  const title = element("label", { htmlFor: box.id });
  const facts = element("p", { className: "hint" });
  const buttons = ACTIONS.map(([name, work]) => {
    const button = element("button", { type: "button", textContent: name });
    onAction(button, "click", () => work(find(id)));
    return button;
  });
  box.addEventListener("change", showSelection);

  function show(context) {
    title.textContent = nameOf(context);
    facts.textContent =
      `${tokens(context.tokens_seen)} in ${context.revision === 1 ? "1 append" : `${context.revision} appends`}, ` +
      `${bytes(context.adapter_bytes)}, ${when(context.created)}`;
    for (const button of buttons) {
      button.ariaLabel = `${button.textContent} ${nameOf(context)}`;
      button.disabled = ["PEFT", "GGUF"].includes(button.textContent) && !context.revision;
    }
    box.disabled = !context.revision;
  }

  const item = element("li", {}, box, title, facts, element("div", { className: "buttons" }, ...buttons));
  return { item, box, show };
}

const selected = () => contexts.filter(({ id }) => rows.get(id).box.checked);

function showSelection() {
  const chosen = selected();
  byId("compose").disabled = chosen.length < 2;
  byId("sum-label").placeholder = cut(chosen.map(nameOf).join(" + "), 200);
}

async function rename(context) {
  const label = await ask(`Rename ${nameOf(context)}`, "Rename", context.label);
  if (label === null) return;
  await api.rename(context.id, label);
  await refresh();
  say(`Renamed to ${label}.`);
}

async function remove(context) {
  if ((await ask(`Delete ${nameOf(context)} for good?`, "Delete")) === null) return;
  await api.remove(context.id);
  await refresh();
  say(`Deleted ${nameOf(context)}.`);
  byId("adapters-heading").focus();
}

async function download(context, format) {
  say(`Preparing the ${format.toUpperCase()} file.`);
  const { name, content } = await api.file(context.id, format);
  const url = URL.createObjectURL(content);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
  say(`Downloaded ${name}, ${bytes(content.size)}.`);
}

async function compose() {
  const chosen = selected();
  const label = byId("sum-label").value || byId("sum-label").placeholder;
  const made = await api.compose(label, chosen.map(({ id }) => id));
  for (const { id } of chosen) rows.get(id).box.checked = false;
  byId("sum-label").value = "";
  await refresh();
  choose(made.id);
  say(`Composed ${nameOf(made)}.`);
}

watch((found) => {
  for (const [id, { item }] of rows) {
    if (find(id)) continue;
    item.remove();
    rows.delete(id);
  }
  for (const context of found) {
    if (!rows.has(context.id)) {
      rows.set(context.id, row(context));
      byId("adapters").append(rows.get(context.id).item);
    }
    rows.get(context.id).show(context);
  }
  byId("none").hidden = found.length > 0;
  byId("composing").hidden = found.length < 2;
  showSelection();
});
onAction(byId("composing"), "submit", compose);
