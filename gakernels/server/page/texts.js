// Texts and files that are read into adapters, one append for each.

import * as api from "./api.js";
import { choose } from "./chat.js";
import { find, refresh, watch } from "./contexts.js";
import { attempt, byId, bytes, cut, element, fill, nameOf, number, onAction, say, seconds, tokens } from "./dom.js";

const area = byId("text");
const target = byId("target");
const NEW = [
  ["new", "a new adapter"],
  ["each", "a new adapter for each text"],
];
const EXAMPLE = {
  text:
    "The town of Mira Tolden is Old Oakbury. The job of Mira Tolden is kite mender. " +
    "The pet of Mira Tolden is grey hamster. The drink that Mira Tolden orders is iced cider.",
  question: "What is the pet of Mira Tolden?",
};
let pending = [];

function showPending() {
  byId("pending").replaceChildren(
    ...pending.map((file) => {
      const remove = element("button", { type: "button", textContent: "Remove", ariaLabel: `Remove ${file.name}` });
      remove.addEventListener("click", () => {
        drop(file);
        byId("files").focus();
      });
      return element("li", {}, `${file.name}, ${bytes(file.size)} `, remove);
    }),
  );
}

function add(files) {
  pending.push(...files);
  showPending();
}

function drop(file) {
  pending = pending.filter((other) => other !== file);
  showPending();
}

async function contentOf(file) {
  const content = await file.arrayBuffer();
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(content);
  } catch {
    throw new Error(`${file.name} is not a text in UTF-8.`);
  }
}

function given() {
  const pasted = area.value;
  const title = cut(pasted.trim().replace(/\s+/g, " "), 40).trim();
  const files = pending.map((file) => ({
    name: file.name,
    title: cut(file.name, 200),
    read: () => contentOf(file),
    done: () => drop(file),
  }));
  const done = () => (area.value = area.value === pasted ? "" : area.value);
  return title ? [{ name: "Pasted text", title, read: () => pasted, done }, ...files] : files;
}

async function readAll() {
  const texts = given();
  if (!texts.length) throw new Error("There is nothing to read yet: paste a text or choose a file.");
  byId("progress").replaceChildren();
  say("Reading.");
  const label = byId("label").value;
  let goal = target.value;
  try {
    for (const text of texts) {
      const context = await readOne(text, find(goal), label || text.title);
      text.done();
      if (goal === "new") goal = context.id;
      choose(context.id);
    }
  } catch (error) {
    if (find(goal)) into(goal); // where what is left belongs
    throw error;
  }
  byId("label").value = "";
  say(texts.length === 1 ? "The text is read." : `All ${texts.length} texts are read.`);
  byId("read").focus();
}

// Does something while a line shows the time that it takes; returns what it makes of it, and that time.
async function timed(line, work) {
  const started = performance.now();
  const clock = setInterval(() => (line.textContent = seconds(performance.now() - started)), 100);
  try {
    return [await work(), performance.now() - started];
  } finally {
    clearInterval(clock);
  }
}

// Append a text to a context, or to a new one of that label if there is none; returns the context.
async function readOne(text, before, label) {
  const line = element("span");
  const bar = element("progress", { ariaLabel: `Reading ${text.name}` });
  byId("progress").append(element("li", {}, element("strong", { textContent: text.name }), " ", line, bar));
  try {
    const content = await text.read();
    const [context, spent] = await timed(line, () =>
      before ? api.append(before.id, content, before.revision) : api.create(label, content),
    );
    const count = context.tokens_seen - (before?.tokens_seen ?? 0);
    line.textContent =
      `${tokens(count)} (${bytes(new Blob([content]).size)}) in ${seconds(spent)}, ` +
      `${number(Math.round((1000 * count) / spent))} tokens/s; ` +
      `the adapter has read ${tokens(context.tokens_seen)} and takes ${bytes(context.adapter_bytes)}`;
    return context;
  } catch (error) {
    line.textContent = "not read";
    throw error;
  } finally {
    bar.remove();
    await attempt(refresh); // after a failure too: another page may have changed the adapter
  }
}

// Read the next texts into an adapter that exists.
export function into(id) {
  target.value = id;
  target.dispatchEvent(new Event("change"));
}

function useExample() {
  into("new");
  area.value = EXAMPLE.text;
  byId("question").value = EXAMPLE.question;
  byId("stop-text").value = "."; // the model of the package writes on without end
  byId("read").focus();
}

watch((contexts) => {
  const before = target.value;
  fill(target, [...NEW, ...contexts.map((context) => [context.id, nameOf(context)])]);
  if (target.value !== before) into("new");
});
target.addEventListener("change", () => {
  byId("label").disabled = target.value !== "new";
  byId("label").value = "";
});
byId("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
const form = byId("reading");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  form.classList.add("over");
});
document.addEventListener("dragleave", () => form.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  form.classList.remove("over");
  if (event.dataTransfer.files.length) add(event.dataTransfer.files);
  else area.value += event.dataTransfer.getData("text/plain");
});
onAction(form, "submit", readAll);
byId("example").addEventListener("click", useExample);
