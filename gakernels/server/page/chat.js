// Two conversations with the same questions: one with the adapter, one with the base model alone.

import * as api from "./api.js";
import { find, watch } from "./contexts.js";
import { byId, element, fill, nameOf, onAction, say, seconds, tokens } from "./dom.js";

const model = byId("model");
const question = byId("question");
let base = "";
let conversations = [[], []];
let stopper = null;

export function useBase(name) {
  base = name;
}

// The adapter to chat with. Another one starts a new conversation.
export function choose(id) {
  if (model.value === id) return;
  model.value = id;
  clear();
}

function clear() {
  stopper?.abort();
  conversations = [[], []];
  byId("turns").replaceChildren();
}

// The body of a request, as it is sent and shown.
function requestOf(name, messages) {
  const stop = byId("stop-text").value;
  const body = {
    model: name,
    messages,
    temperature: byId("temperature").valueAsNumber,
    max_tokens: byId("longest").valueAsNumber,
    ...(stop && { stop }),
    stream: true,
    stream_options: { include_usage: true },
  };
  return JSON.stringify(body, null, 2);
}

function sideOf(title, id, history, asked) {
  const messages = [...history, { role: "user", content: asked }];
  const side = {
    history,
    messages,
    sent: requestOf(id, messages),
    answer: element("p", { className: "answer", ariaBusy: "true" }),
    facts: element("p", { className: "hint" }),
  };
  side.shown = element("section", {}, element("h4", { textContent: title }), side.answer, side.facts);
  return side;
}

// Stream an answer into the page; what has arrived when it is stopped counts.
async function answer(side, signal) {
  const started = performance.now();
  let text = "";
  let usage = null;
  try {
    for await (const event of api.chat(side.sent, signal)) {
      text += event.choices[0]?.delta.content ?? "";
      side.answer.textContent = text.trimStart();
      usage = event.usage ?? usage;
    }
    side.facts.textContent =
      `Prompt: ${tokens(usage.prompt_tokens)}. Answer: ${tokens(usage.completion_tokens)} ` +
      `in ${seconds(performance.now() - started)}.`;
  } catch (error) {
    side.facts.textContent = error.name === "AbortError" ? "Stopped." : "Failed.";
    if (error.name !== "AbortError") throw error;
  } finally {
    side.answer.ariaBusy = "false";
  }
  side.history.push(side.messages.at(-1), { role: "assistant", content: text });
}

function show(asked, context, sides) {
  const sent = element(
    "details",
    {},
    element("summary", { textContent: "What was sent" }),
    element("p", {
      className: "hint",
      textContent:
        "These are the two requests, to the letter. The text that the adapter has read " +
        `(${tokens(context.tokens_seen)}) is not sent.`,
    }),
    element("div", { className: "pair" }, ...sides.map((side) => element("pre", { tabIndex: 0 }, side.sent))),
  );
  const pair = element("div", { className: "pair" }, ...sides.map((side) => side.shown));
  const turn = element("article", {}, element("h3", { textContent: asked }), pair, sent);
  byId("turns").append(turn);
}

async function send() {
  const asked = question.value.trim();
  const context = find(model.value);
  if (!context) throw new Error("There is no adapter yet: read a text first.");
  if (!asked) throw new Error("There is no question yet.");
  const sides = [
    sideOf("With the adapter", context.id, conversations[0], asked),
    sideOf("Without an adapter", base, conversations[1], asked),
  ];
  show(asked, context, sides);
  question.value = "";
  byId("asking").scrollIntoView({ block: "nearest" });
  say("Answering.");
  stopper = new AbortController();
  byId("stop").disabled = false;
  const ends = await Promise.allSettled(sides.map((side) => answer(side, stopper.signal)));
  byId("stop").disabled = true;
  byId("asking").scrollIntoView({ block: "nearest" });
  const failed = ends.find((end) => end.status === "rejected");
  if (failed) throw failed.reason;
  say(stopper.signal.aborted ? "Stopped." : "Both answers are there.");
}

watch((contexts) => {
  const before = model.value;
  fill(model, contexts.map((context) => [context.id, nameOf(context)]));
  byId("send").disabled = contexts.length === 0;
  if (before !== model.value) clear();
});
model.addEventListener("change", clear);
byId("stop").addEventListener("click", () => {
  stopper.abort();
  question.focus();
});
byId("clear").addEventListener("click", () => {
  clear();
  question.focus();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("asking").requestSubmit(byId("send"));
});
onAction(byId("asking"), "submit", send);
