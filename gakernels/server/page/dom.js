// What all parts of the page share. Texts become text nodes, never HTML.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function say(text) {
  byId("status").textContent = text;
}

export function report(error) {
  say("");
  byId("error").textContent = error.message;
  if (error.status !== 401) return;
  byId("access").hidden = false;
  byId("key").focus();
}

// Do something and report what goes wrong; returns whether it went well.
export async function attempt(work) {
  byId("error").textContent = "";
  try {
    await work();
    return true;
  } catch (error) {
    report(error);
    return false;
  }
}

// A form or button that does one thing at a time and does not leave the page.
export function onAction(target, kind, work) {
  let busy = false;
  target.addEventListener(kind, async (event) => {
    event.preventDefault();
    if (busy) return;
    busy = true;
    target.ariaBusy = "true";
    await attempt(work);
    target.ariaBusy = "false";
    busy = false;
  });
}

export function fill(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => element("option", { value, textContent: text })));
  if (options.some(([value]) => value === before)) select.value = before;
}

// Ask for a new name, or for a yes if there is no `value`; returns the name, or null for no.
export function ask(title, yes, value) {
  const dialog = byId("dialog");
  const input = byId("dialog-input");
  byId("dialog-title").textContent = title;
  byId("dialog-yes").textContent = yes;
  byId("dialog-field").hidden = value === undefined;
  input.value = value ?? "";
  return new Promise((resolve) => {
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      resolve(input.value);
      dialog.close();
    };
    byId("dialog-no").onclick = () => dialog.close();
    dialog.onclose = () => resolve(null);
    dialog.showModal();
    input.select();
  });
}

export const nameOf = (context) => context.label || context.id.slice(0, 12);

// So many characters; the two halves of one stay together.
export const cut = (text, most) => Array.from(text).slice(0, most).join("");

export const number = (value) => value.toLocaleString("en");

export const tokens = (count) => (count === 1 ? "1 token" : `${number(count)} tokens`);

export const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(milliseconds < 1000 ? 2 : 1)} s`;

export function bytes(count) {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; count >= 1024 && unit + 1 < units.length; unit += 1) count /= 1024;
  return `${number(unit && count < 100 ? Math.round(count * 10) / 10 : Math.round(count))} ${units[unit]}`;
}
