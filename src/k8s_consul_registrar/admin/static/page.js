// The status page: asks the API every few seconds and shows what it answers. What it shows is up to views.js.
import { getLanguage, setLanguage, word } from "./language.js";
import { chips, element, Keyed, number, place, table, timeOf, tone, visible } from "./parts.js";
import * as views from "./views.js";

const EVERY = 5000; // ms between two refreshes
const PATIENCE = 20000; // ms one answer may take
const TYPING = 250; // ms after the last key until a search starts
const LIMIT = 100;
const SEARCH = 200; // characters of a search at most
const { TABS, FILTERED } = views; // FILTERED: the facet of each tab that the API searches
const ASKED = views.ASKED ?? {}; // tabs whose field is a question to the API
const FILTERS = ["q", "kind", "namespace", ...new Set(Object.values(FILTERED))];
const NO_FILTERS = Object.fromEntries(FILTERS.map((name) => [name, ""]));

const $ = (id) => document.getElementById(id);
const state = {
  tab: TABS[0], ...NO_FILTERS, offset: 0,
  open: new Set(), status: null, answers: {}, failure: null, isPaused: false,
};
let timer = 0;
let asking = null;
let shown = null; // which kind of view the panel holds, so that tables are kept while they stay tables

function readAddress() {
  const [tab, query] = location.hash.slice(1).split("?");
  const given = new URLSearchParams(query);
  state.tab = TABS.includes(tab) ? tab : TABS[0];
  for (const name of FILTERS) state[name] = given.get(name) ?? "";
  state.offset = Math.max(0, Number.parseInt(given.get("offset") ?? "0", 10) || 0);
}

function question() {
  const asked = new URLSearchParams();
  const names = FILTERED[state.tab] ? ["q", "kind", "namespace", FILTERED[state.tab]] : ASKED[state.tab] ? ["q"] : [];
  for (const name of names) if (state[name]) asked.set(name, state[name]);
  if (names.length && state.offset) asked.set("offset", String(state.offset));
  return asked;
}

/** Show another selection: it goes into the address, so that it can be linked, reloaded and gone back from. */
function go(changes, { replace = false } = {}) {
  Object.assign(state, { offset: 0, ...changes });
  const asked = question().toString();
  const address = `#${state.tab}${asked ? `?${asked}` : ""}`;
  history[replace ? "replaceState" : "pushState"](null, "", address);
  show();
  refresh();
}

async function ask(path, parameters, signal) {
  const query = parameters?.toString();
  const response = await fetch(`api/v1/${path}${query ? `?${query}` : ""}`, { signal, cache: "no-store" });
  if (!response.ok) throw new Error(`HTTP ${response.status}`);
  return response.json();
}

/** Ask a tab's question; what the API says about a question it cannot answer is its answer. */
async function askQuestion(tab, what, signal) {
  const query = new URLSearchParams({ [ASKED[tab].parameter]: what });
  const response = await fetch(`api/v1/${tab}?${query}`, { signal, cache: "no-store" });
  return { ...(await response.json()), what };
}

/** Ask for what is shown; an answer that comes too late for a newer question is dropped. */
async function refresh() {
  clearTimeout(timer);
  asking?.abort();
  const mine = (asking = new AbortController());
  const limit = setTimeout(() => mine.abort(), PATIENCE);
  const tab = state.tab;
  const parameters = question();
  parameters.set("limit", String(LIMIT));
  try {
    const [status, answer] = await Promise.all([
      ask("status", null, mine.signal),
      FILTERED[tab] ? ask(tab, parameters, mine.signal) : ASKED[tab] && state.q ? askQuestion(tab, state.q, mine.signal) : null,
    ]);
    if (mine !== asking) return;
    Object.assign(state, { status, failure: null });
    if (answer) state.answers[tab] = answer;
    if (FILTERED[tab] && answer && !answer[tab].length && answer.found && state.offset) {
      go({ offset: Math.floor((answer.found - 1) / LIMIT) * LIMIT }, { replace: true });
      return;
    }
  } catch (error) {
    if (mine !== asking) return;
    const problem = error.name === "AbortError" ? "timeout" : error.message;
    state.failure = { problem, now: Date.now() / 1000 };
  } finally {
    clearTimeout(limit);
    if (mine === asking) schedule();
  }
  show();
}

function schedule() {
  clearTimeout(timer);
  if (!state.isPaused && !document.hidden) timer = setTimeout(refresh, EVERY);
}

function toggle(id) {
  if (!state.open.delete(id)) state.open.add(id);
  show();
  document.querySelector(`button[data-id="${CSS.escape(id)}"]`)?.focus();
}

const banners = new Keyed();
const cards = new Keyed();
const tabs = new Keyed();
const chipKeys = new Keyed();
const outer = (node) => node.outerHTML;
const asText = (keyed, nodes) => keyed.of(nodes, (node) => outer(node), (node) => node, outer);

function show() {
  showFrame();
  const { status } = state;
  if (!status) {
    place($("banners"), state.failure ? [element("div", { class: "banner bad" }, state.failure.problem)] : []);
    place($("view"), [element("p", { class: "none" }, state.failure ? "" : word("loading"))]);
    return;
  }
  const { name, role, detail } = views.header(status);
  $("name").textContent = visible(name);
  $("role").textContent = visible(word(role));
  $("role").className = `badge ${tone(role)}`;
  $("role").title = visible(detail);
  $("role").hidden = !role;
  $("version").textContent = visible(`v${status.version}`);
  document.title = visible(`${name} – k8s-consul-registrar`);
  place($("banners"), asText(banners, views.banners(status, state.failure)));
  place($("cards"), asText(cards, views.cards(status)));
  showFilter();
  showPanel();
}

function showFrame() {
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  $("pause").textContent = word(state.isPaused ? "resume" : "pause");
  $("pause").setAttribute("aria-pressed", String(state.isPaused));
  $("language").textContent = getLanguage() === "zh" ? "English" : "中文";
  $("language").lang = getLanguage() === "zh" ? "en" : "zh";
  $("live").className = `dot ${state.failure ? "bad" : state.isPaused ? "wait" : "good"}`;
  $("updated").textContent = state.isPaused ? word("paused") : state.status ? timeOf(state.status.now) : "";
  const figures = state.status && views.figures(state.status);
  const list = TABS.map((name) => ({ name, figure: figures?.[name], isChosen: name === state.tab }));
  place($("tabs"), tabs.of(list, (tab) => tab.name, makeTab));
  if ($("panel").getAttribute("aria-labelledby") === `tab-${state.tab}`) return;
  $("panel").setAttribute("aria-labelledby", `tab-${state.tab}`);
  // On a phone the tabs are wider than the screen.
  const chosen = $(`tab-${state.tab}`);
  $("tabs").scrollLeft = chosen.offsetLeft - ($("tabs").clientWidth - chosen.offsetWidth) / 2;
}

function makeTab({ name, figure, isChosen }) {
  const properties = {
    type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", "aria-selected": String(isChosen),
    tabindex: isChosen ? 0 : -1, onclick: () => go({ tab: name, ...NO_FILTERS }),
  };
  return element("button", properties, word(name), figure === undefined ? null : element("span", {}, number(figure)));
}

function fill(select, values, chosen) {
  const options = values.map(([value, text]) => element("option", { value, selected: value === chosen }, text));
  if (select.dataset.print !== options.map(outer).join("")) {
    select.dataset.print = options.map(outer).join("");
    select.replaceChildren(...options);
  }
  select.value = chosen;
}

function showFilter() {
  const { status, tab } = state;
  $("filter").hidden = !FILTERED[tab] && !ASKED[tab];
  if ($("filter").hidden) return;
  const q = $("q");
  q.maxLength = ASKED[tab]?.longest ?? SEARCH;
  q.placeholder = word(`search_${tab}`);
  q.setAttribute("aria-label", q.placeholder);
  if (document.activeElement !== q) q.value = state.q;
  for (const name of ["kind", "namespace", "chips"]) $(name).hidden = !FILTERED[tab];
  if (!FILTERED[tab]) return;
  fill($("kind"), [["", word("any_kind")], ...["pod", "node", "endpoint"].filter((kind) => (status.counts.seen_kinds ?? Object.keys(status.counts.kinds)).includes(kind)).map((kind) => [kind, word(kind)])], state.kind);
  $("kind").setAttribute("aria-label", word("kind"));
  const names = status.namespaces.includes(state.namespace) || !state.namespace ? status.namespaces : [state.namespace, ...status.namespaces];
  fill($("namespace"), [["", word("any_namespace")], ...names.map((name) => [name, name])], state.namespace);
  $("namespace").setAttribute("aria-label", word("any_namespace"));
  const by = FILTERED[tab];
  const counts = views.facets(status)[tab];
  const total = Object.values(counts).reduce((sum, count) => sum + count, 0);
  const some = Object.entries(counts).filter(([name, count]) => count || name === state[by]);
  place($("chips"), asText(chipKeys, chips(by, [["", total], ...some], state[by], (name) => go({ [by]: name }))));
}

function showPanel() {
  const { tab, status } = state;
  const answer = state.answers[tab];
  showPager(answer);
  if (FILTERED[tab] && !answer) return place($("view"), [element("p", { class: "none" }, word("loading"))]);
  const made = views.show[tab]({ status, answer, question: state.q, open: state.open, toggle });
  if (Array.isArray(made)) {
    shown = null;
    const text = made.map(outer).join("");
    if ($("view").dataset.print === text) return undefined;
    $("view").dataset.print = text;
    return place($("view"), made);
  }
  const print = `${tab}${getLanguage()}`;
  if (shown?.print !== print) {
    shown = { print, table: table(made.columns, []), notice: made.notice ? [element("p", { class: "notice" }, made.notice)] : [] };
    shown.table.className = tab;
  }
  delete $("view").dataset.print;
  place(shown.table.tBodies[0], made.rows);
  return place($("view"), [...shown.notice, shown.table]);
}

function showPager(answer) {
  const isPaged = Boolean(FILTERED[state.tab] && answer && answer.found);
  $("pager").hidden = !isPaged;
  if (!isPaged) return;
  const to = Math.min(answer.offset + LIMIT, answer.found);
  $("range").textContent = word("range", { from: number(answer.offset + 1), to: number(to), found: number(answer.found) });
  $("previous").textContent = word("previous");
  $("next").textContent = word("next");
  $("previous").disabled = answer.offset === 0;
  $("next").disabled = to >= answer.found;
}

function listen() {
  let typing = 0;
  $("q").addEventListener("input", () => {
    clearTimeout(typing);
    if (ASKED[state.tab]) return;
    typing = setTimeout(() => go({ q: $("q").value.trim() }, { replace: true }), TYPING);
  });
  $("filter").addEventListener("submit", (event) => {
    event.preventDefault();
    if (ASKED[state.tab]) go({ q: $("q").value.trim() });
  });
  for (const name of ["kind", "namespace"]) $(name).addEventListener("change", () => go({ [name]: $(name).value }));
  const turn = (by) => () => {
    go({ offset: Math.max(0, state.offset + by) });
    $("tabs").scrollIntoView({ block: "start" });
  };
  $("previous").addEventListener("click", turn(-LIMIT));
  $("next").addEventListener("click", turn(LIMIT));
  $("pause").addEventListener("click", () => {
    state.isPaused = !state.isPaused;
    show();
    if (state.isPaused) clearTimeout(timer);
    else refresh();
  });
  $("language").addEventListener("click", () => {
    setLanguage(getLanguage() === "zh" ? "en" : "zh");
    try {
      localStorage.setItem("language", getLanguage());
    } catch {
      // The browser keeps nothing for us; the choice then lasts as long as the page.
    }
    show();
  });
  $("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = TABS[(TABS.indexOf(state.tab) + step + TABS.length) % TABS.length];
    $(`tab-${next}`).click();
    $(`tab-${next}`).focus();
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.matches("input, select, textarea");
    if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey && !$("filter").hidden) {
      $("q").focus();
      event.preventDefault();
    } else if (event.key === "Escape" && event.target === $("q")) {
      $("q").value = "";
      go({ q: "" }, { replace: true });
    }
  });
  // Not by the link's address: that is where the selection is kept.
  document.querySelector(".skip").addEventListener("click", (event) => {
    $("panel").focus();
    event.preventDefault();
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : !state.isPaused && refresh()));
  addEventListener("popstate", () => {
    readAddress();
    $("q").value = state.q;
    show();
    refresh();
  });
}

function chooseLanguage() {
  let kept = null;
  try {
    kept = localStorage.getItem("language");
  } catch {
    // The browser keeps nothing for us.
  }
  setLanguage(kept ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"));
}

chooseLanguage();
readAddress();
listen();
show();
refresh();
