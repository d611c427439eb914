// The server's interface. Whatever goes wrong becomes an ApiError whose message is a sentence.

const KEY = "gakernels-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = () => sessionStorage.getItem(KEY) ?? "";

export function useKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

async function send(method, path, body, signal) {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server can't be reached, or closed the connection. Does it still run?");
  }
  if (!response.ok) throw new ApiError(response.status, await reason(response));
  return response;
}

async function reason(response) {
  const text = await response.text();
  if (response.status === 401) {
    return key() ? "The server does not accept this API key." : "This server needs an API key: enter yours.";
  }
  try {
    return sentence(JSON.parse(text).error.message);
  } catch {
    return `The server answered with ${response.status} ${response.statusText}.`;
  }
}

function sentence(message) {
  return `The server says: ${message}${message.endsWith(".") ? "" : "."}`;
}

async function call(method, path, body) {
  const response = await send(method, path, body === undefined ? undefined : JSON.stringify(body));
  return response.json();
}

const one = (id) => `v1/contexts/${encodeURIComponent(id)}`;

export const health = () => call("GET", "health");
export const schema = () => call("GET", "openapi.json");
export const list = () => call("GET", "v1/contexts");
export const create = (label, text) => call("POST", "v1/contexts", { label, text });
export const compose = (label, contexts) => call("POST", "v1/contexts/compose", { label, contexts });
export const append = (id, text, revision) => call("POST", `${one(id)}/append`, { text, revision });
export const rename = (id, label) => call("POST", one(id), { label });
export const remove = (id) => call("DELETE", one(id));

// The adapter as a file: its name and content.
export async function file(id, format) {
  const response = await send("GET", `${one(id)}/export?format=${format}`);
  const name = /filename="([^"]+)"/.exec(response.headers.get("Content-Disposition"))[1];
  return { name, content: await response.blob() };
}

// The events of a streamed chat; `body` is sent as it is.
export async function* chat(body, signal) {
  const response = await send("POST", "v1/chat/completions", body, signal);
  for await (const line of lines(response.body)) {
    if (line === "data: [DONE]") return;
    if (!line.startsWith("data: ")) continue;
    const event = JSON.parse(line.slice(6));
    if (event.error) throw new ApiError(0, sentence(event.error.message));
    yield event;
  }
  throw new ApiError(0, "The answer broke off: the server closed the connection.");
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}
