// The parts that pages are made of. Everything is written as text, never as HTML.
import { getLanguage, word } from "./language.js";

// What a terminal or a browser would act on and not show: controls, and marks that turn the reading direction.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** The text with every character one cannot see spelled out. */
export const visible = (text) =>
  String(text).replace(UNSEEN, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** An element; what is given as a child or as `text` is text unless it is an element. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") made.className = value;
    else if (name === "onclick") made.addEventListener("click", value);
    else made.setAttribute(name, value === true ? "" : visible(value));
  }
  for (const child of children.flat()) {
    if (child === undefined || child === null) continue;
    made.append(child instanceof Node ? child : visible(child));
  }
  return made;
}

/** Make `parent` hold exactly these nodes, leaving alone those that are in place: focus and scroll stay. */
export function place(parent, nodes) {
  let at = parent.firstChild;
  for (const node of nodes) {
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

/** Keeps the elements of a list, so that what did not change is not made again. */
export class Keyed {
  #kept = new Map();

  /** One element for each item: `make(item)` is asked only for those whose `print` is new under their key. */
  of(items, key, make, print = JSON.stringify) {
    const fresh = new Map();
    for (const item of items) {
      const name = key(item);
      const text = `${getLanguage()}${print(item)}`;
      const kept = this.#kept.get(name);
      fresh.set(name, kept?.text === text ? kept : { text, made: make(item) });
    }
    this.#kept = fresh;
    return [...fresh.values()].map((entry) => entry.made);
  }
}

const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];

/** A span of seconds in words, in its largest unit. */
export function span(seconds) {
  const [unit, size] = UNITS.find(([, length]) => seconds >= length) ?? UNITS.at(-1);
  const format = new Intl.NumberFormat(getLanguage(), { style: "unit", unit, unitDisplay: "short" });
  return format.format(Math.floor(seconds / size));
}

export function ago(at, now) {
  const seconds = now - at;
  if (Math.abs(seconds) < 1) return word("now");
  return seconds > 0 ? word("ago", { span: span(seconds) }) : word("in", { span: span(-seconds) });
}

export const clock = (at) => new Date(at * 1000).toLocaleString(getLanguage() === "zh" ? "zh-CN" : undefined);
export const timeOf = (at) => new Date(at * 1000).toLocaleTimeString(getLanguage() === "zh" ? "zh-CN" : undefined);
export const number = (value) => value.toLocaleString(getLanguage());
export const took = (seconds) => (seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`);

/** A moment as how long ago it was, with the date on hover. */
export const moment = (at, now) =>
  at === null
    ? element("span", { class: "dim" }, word("never"))
    : element("time", { datetime: new Date(at * 1000).toISOString(), title: clock(at) }, ago(at, now));

export const badge = (name, tone = name) => element("span", { class: `badge ${tone}` }, word(name));

/** A table whose rows become cards on a narrow screen: each cell carries its column's name. */
export const table = (columns, rows) =>
  element(
    "table", { role: "table" },
    element("thead", {}, element("tr", {}, columns.map((name) => element("th", { scope: "col" }, word(name))))),
    element("tbody", {}, rows),
  );

export const cell = (column, properties, ...children) =>
  element("td", { "data-label": word(column), ...properties }, ...children);

export const objectName = (object) =>
  object.namespace ? `${object.namespace}/${object.name}` : object.name;

const TONES = {
  registered: "good", standby: "good", pending: "wait", kept: "wait", withheld: "wait", blocked: "wait", unwanted: "wait", refused: "bad", conflict: "bad",
  success: "good", partial: "wait", failure: "bad", leader: "good", single: "good",
  answers: "good", fails: "bad", idle: "plain", ready: "good", "not ready": "bad",
};
export const tone = (name) => TONES[name] ?? "plain";

export const pairs = (entries) =>
  element("dl", { class: "pairs" }, entries.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));

export const dim = (...children) => element("span", { class: "dim" }, ...children);
export const code = (text) => element("code", {}, text);
export const notice = (text) => element("p", { class: "notice" }, text);
export const none = (text) => element("p", { class: "none" }, text);
export const heading = (name) => element("h2", {}, word(name));

export const banner = (kind, title, text, names) =>
  element(
    "div", { class: `banner ${kind}` }, element("b", {}, title),
    text ? element("p", {}, text) : null, names ? element("p", { class: "names" }, names) : null,
  );

/** A figure at the top, which leads to the tab that explains it. */
export const card = (tab, name, kind, figure, ...text) =>
  element("a", { class: `card ${kind}`, href: `#${tab}` }, element("span", { class: "name" }, word(name)), element("b", {}, figure), dim(...text));

/** A row of buttons that choose one value of the filter `by`; `counts` in the order given. */
export const chips = (by, counts, chosen, choose) =>
  counts.map(([name, count]) =>
    element(
      "button",
      { type: "button", class: `chip ${tone(name)}`, "aria-pressed": String(name === chosen), "data-by": by, "data-chip": name, onclick: () => choose(name) },
      name ? word(name) : word("all"), " ", element("b", {}, number(count)),
    ),
  );

/** The settings of a mode, below some facts about it. */
export const configuration = (status, about) => {
  const rows = status.settings.map((one) =>
    element("tr", {}, cell("setting", { class: "main" }, code(one.name)), cell("value", {}, one.value ? code(one.value) : dim("–"))),
  );
  return [pairs([...about, [word("started"), moment(status.started_at, status.now)]]), table(["setting", "value"], rows)];
};
