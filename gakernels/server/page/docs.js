// The server's interface, written out from its OpenAPI schema.

import * as api from "./api.js";
import { attempt, byId, element } from "./dom.js";

let schemas = {};

const named = (reference) => reference.split("/").at(-1);

function typeOf(schema) {
  if (schema.$ref) return named(schema.$ref);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return several.map(typeOf).join(" or ");
  return schema.type === "array" ? `list of ${typeOf(schema.items ?? {})}` : (schema.type ?? "anything");
}

function table(caption, rows) {
  const head = ["name", "type", "needed", "default", "description"];
  const cells = (tag, texts) => element("tr", {}, ...texts.map((text) => element(tag, { textContent: text })));
  return element(
    "div",
    { className: "table", tabIndex: 0 },
    element(
      "table",
      {},
      element("caption", { textContent: caption }),
      element("thead", {}, cells("th", head)),
      element("tbody", {}, ...rows.map((row) => cells("td", row))),
    ),
  );
}

function row(name, schema, required, description) {
  const standard = schema.default === undefined ? "" : JSON.stringify(schema.default);
  return [name, typeOf(schema), required ? "yes" : "", standard, description ?? schema.description ?? ""];
}

function fields(name) {
  const { properties = {}, required = [] } = schemas[name];
  return Object.entries(properties).map(([field, schema]) => row(field, schema, required.includes(field)));
}

// The schemas that one names, itself first, each once.
function reached(name, found = []) {
  if (found.includes(name) || !schemas[name].properties) return found;
  found.push(name);
  for (const [, other] of JSON.stringify(schemas[name]).matchAll(/"#\/components\/schemas\/(\w+)"/g)) {
    reached(other, found);
  }
  return found;
}

// Of the JSON that is sent or answered.
function tables(kind, body) {
  const reference = body?.content?.["application/json"]?.schema?.$ref;
  return reference ? reached(named(reference)).map((name) => table(`${kind}: ${name}`, fields(name))) : [];
}

function answers(responses) {
  return Object.entries(responses).map(([status, { description }]) => element("li", {}, `${status}: ${description}`));
}

function operation(method, path, { description, parameters = [], requestBody, responses }) {
  const made = element("section", {}, element("h2", {}, element("code", {}, `${method.toUpperCase()} ${path}`)));
  made.append(element("p", { textContent: description ?? "" }));
  if (parameters.length) {
    const rows = parameters.map((one) => row(`${one.name} (${one.in})`, one.schema, one.required, one.description));
    made.append(table("Parameters", rows));
  }
  made.append(...tables("Body", requestBody));
  const success = Object.entries(responses).find(([status]) => status.startsWith("2"))[1];
  const list = element("ul", {}, ...answers(responses));
  made.append(element("details", {}, element("summary", {}, "Answers"), list, ...tables("Answer", success)));
  return made;
}

attempt(async () => {
  const { paths, components } = await api.schema();
  schemas = components.schemas;
  for (const [path, operations] of Object.entries(paths)) {
    for (const [method, found] of Object.entries(operations)) byId("operations").append(operation(method, path, found));
  }
  byId("operations").ariaBusy = "false";
});
