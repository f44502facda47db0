// The views of the registrar: each tab, made of what the API answered.
import { hint, word } from "./language.js";
import {
  ago, badge, banner, card, cell, clock, code, configuration, dim, element, heading, Keyed, moment, none, notice, number, objectName, pairs,
  span, table, took, tone,
} from "./parts.js";

export const TABS = ["targets", "rejections", "conflicts", "removals", "explain", "health", "configuration"];
export const FILTERED = { targets: "state", rejections: "reason", removals: "proof" };

// Tabs that ask the API what their field holds: the parameter, and the longest question.
export const ASKED = { explain: { parameter: "what", longest: 400 } };

const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);

export const header = (status) => ({
  name: [status.cluster, status.instance].filter(Boolean).join(" / "),
  role: status.leader.role === "single" ? "" : status.leader.role,
  detail: status.leader.holder,
});

export const facets = ({ counts }) => ({ targets: counts.states, rejections: counts.rejections, removals: counts.removals });

export const figures = ({ counts }) => ({ targets: counts.targets, rejections: sum(counts.rejections), conflicts: counts.conflicts, removals: sum(counts.removals) });

function scrapeText(target) {
  const query = Object.entries(target.params).map(([name, value]) => `${name}=${value}`).join("&");
  return `${target.path}${query ? `?${query}` : ""}`;
}

/** A link to the explanation of an object. */
function explainLink(object) {
  const kind = object.kind === "endpoint" ? "service" : object.kind;
  const what = new URLSearchParams({ q: `${kind} ${objectName(object)}` });
  return element("a", { href: `#explain?${what}` }, word("explain_why"));
}

function targetDetails(target) {
  const rows = [
    ...(target.detail ? [[word("detail"), target.detail]] : []),
    [word("id"), target.id],
    [word("name"), target.name],
    [word("explain"), explainLink(target.object)],
    ...(target.tags.length ? [[word("tags"), target.tags.join(", ")]] : []),
  ];
  return element(
    "tr", { class: "details" },
    element("td", { colspan: 7 }, pairs(rows), element("h3", {}, word("labels")), pairs(Object.entries(target.labels))),
  );
}

function targetRow(target, isOpen, toggle) {
  const name = objectName(target.object);
  const button = element(
    "button",
    { type: "button", class: "fold", "aria-expanded": String(isOpen), "data-id": target.id, onclick: () => toggle(target.id) },
    element("bdi", {}, name),
  );
  return element(
    "tr", { class: isOpen ? "open" : undefined },
    cell("state", {}, badge(target.state, tone(target.state))),
    cell("kind", { class: "dim" }, word(target.object.kind)),
    cell("object", { class: "main" }, button),
    cell("address", {}, code(target.socket)),
    cell("path", {}, dim(target.scheme === "http" ? "" : `${target.scheme} `), code(scrapeText(target))),
    cell("on_node", { class: "dim" }, target.node),
    cell("shard", { class: "dim" }, target.shard),
  );
}

const targetRows = new Keyed();

function targetsView({ answer, open, toggle }) {
  if (!answer.targets.length) return [none(word("nothing"))];
  const groups = targetRows.of(
    answer.targets,
    (target) => target.id,
    (target) => {
      const isOpen = open.has(target.id);
      return [targetRow(target, isOpen, toggle), ...(isOpen ? [targetDetails(target)] : [])];
    },
    (target) => `${open.has(target.id)}${JSON.stringify(target)}`,
  );
  return { columns: ["state", "kind", "object", "address", "path", "on_node", "shard"], rows: groups.flat() };
}

const rejectionRows = new Keyed();

function rejectionsView({ answer }) {
  if (!answer.total) return [none(word("no_rejections"))];
  if (!answer.found) return [none(word("nothing"))];
  const rows = rejectionRows.of(
    answer.rejections,
    (one) => JSON.stringify(one.object) + one.kept_id,
    (one) =>
      element(
        "tr", {},
        cell("object", { class: "main" }, element("bdi", {}, objectName(one.object)), " ", dim(word(one.object.kind))),
        cell("reason", {}, element("span", { class: "badge bad" }, one.reason), element("p", {}, one.detail)),
        cell(
          "fix", {}, element("p", {}, hint(one.reason)), one.kept_id ? element("p", {}, dim(`${word("kept_id")} `, code(one.kept_id))) : null,
          explainLink(one.object),
        ),
      ),
  );
  return { notice: word("rejections_why"), columns: ["object", "reason", "fix"], rows };
}

const removalRows = new Keyed();

function removalsView({ answer, status }) {
  if (!answer.total) return [none(word("no_removals"))];
  if (!answer.found) return [none(word("nothing"))];
  const rows = removalRows.of(
    answer.removals,
    (one) => `${one.at} ${one.id}`,
    (one) => {
      const decided = [one.generation ? `${word("generation")} ${number(one.generation)}` : "", one.brake].filter(Boolean);
      return element(
        "tr", {},
        cell("when", {}, moment(one.at, status.now)),
        cell("id", { class: "main" }, code(one.id), one.is_answered ? null : element("p", { class: "problem" }, word("unanswered"))),
        cell("object", {}, one.object ? objectName(one.object) : dim("–")),
        cell("proof", {}, element("span", { class: "badge plain" }, one.proof), element("p", {}, decided.join(" · "))),
        cell("leader", { class: "dim" }, one.leader),
        cell("place", { class: "dim" }, one.place || dim("–")),
      );
    },
    (one) => `${Math.floor(status.now / 60)}${JSON.stringify(one)}`,
  );
  return { notice: word("removals_why"), columns: ["when", "id", "object", "proof", "leader", "place"], rows };
}

function conflictsView({ status }) {
  if (!status.conflicts.length) return [none(word("no_conflicts"))];
  const rows = status.conflicts.map((one) =>
    element(
      "tr", {},
      cell("id", { class: "main" }, code(one.id)),
      cell("wanted_by", {}, objectName(one.object), " ", dim(word(one.object.kind))),
      cell("holder", {}, one.holder),
    ),
  );
  const shown = status.conflicts.length;
  return [
    notice(word("conflicts_why")),
    ...(shown < status.counts.conflicts ? [notice(word("shown_first", { shown: number(shown) }))] : []),
    table(["id", "wanted_by", "holder"], rows),
  ];
}

/** The name of a condition, in the reader's language where it has a word there. */
function conditionName(name) {
  const key = `condition_${name.replaceAll(" ", "_").toLowerCase()}`;
  return word(key) === key ? name : word(key);
}

function conditions(list) {
  const rows = list.map((one) =>
    element(
      "tr", {},
      cell("state", {}, badge(one.is_met ? "yes" : "no", one.is_met ? "good" : "bad")),
      cell("condition", { class: "main" }, conditionName(one.name)),
      cell("detail", {}, one.detail),
    ),
  );
  const made = table(["state", "condition", "detail"], rows);
  made.className = "conditions";
  return made;
}

function explainedService(service) {
  const labels = Object.entries(service.labels).sort();
  return [
    element("h3", {}, code(service.id), " ", dim(service.address)),
    conditions(service.conditions),
    ...(labels.length ? [element("h3", {}, word("labels_discovered")), pairs(labels)] : []),
  ];
}

function explainView({ answer, question }) {
  if (!question) return [notice(word("explain_how"))];
  if (answer?.what !== question) return [none(word("loading"))];
  if (answer.error) return [none(answer.error)];
  if (!answer.objects.length) return [none(word("explain_none"))];
  return answer.objects.flatMap((one) => [
    element("h2", {}, one.object, " ", badge(one.is_target ? "is_target" : "is_no_target", one.is_target ? "good" : "bad")),
    conditions(one.conditions),
    ...one.services.flatMap(explainedService),
  ]);
}

function passRow(pass, now) {
  const done = Object.entries(pass.counts).filter(([, count]) => count).map(([name, count]) => `${word(name)} ${number(count)}`);
  return element(
    "tr", {},
    cell("when", {}, moment(pass.at, now)),
    cell("kind", {}, word(pass.kind)),
    cell("outcome", {}, badge(pass.outcome, tone(pass.outcome))),
    cell("took", {}, took(pass.seconds)),
    cell("counts", {}, done.join(" · ") || dim("–"), pass.problem ? element("p", { class: "problem" }, pass.problem) : null),
  );
}

function lostAgents({ lost_agents: lost, now }) {
  if (!lost.length) return [];
  const rows = lost.map((one) => {
    const stays = Object.entries(one.stays).map(([why, count]) => `${number(count)} ${word(`stays_${why}`)}`);
    return element(
      "tr", {},
      cell("on_node", { class: "main" }, one.node),
      cell("lost", {}, moment(one.since, now)),
      cell("cleared", {}, one.due > now ? moment(one.due, now) : word("with_next_pass")),
      cell("stays", {}, stays.join(" · ") || dim("–")),
    );
  });
  return [heading("lost_agents"), notice(word("lost_agents_why")), table(["on_node", "lost", "cleared", "stays"], rows)];
}

function healthView({ status }) {
  const { consul, now } = status;
  const sources = status.sources.map((one) =>
    element(
      "tr", {},
      cell("source", { class: "main" }, one.name),
      cell("is_followed", {}, badge(one.is_followed ? "yes" : "no", one.is_followed ? "good" : "bad")),
      cell("listed", {}, moment(one.listed_at, now)),
      cell("objects", {}, number(one.objects)),
      cell("problem", {}, one.problem || dim("–")),
    ),
  );
  return [
    heading("consul"),
    pairs([
      [word("state"), badge(consul.is_up ? "up" : "down", consul.is_up ? "good" : "bad")],
      [word("backend"), consul.backend_reason ? `${consul.backend}: ${consul.backend_reason}` : consul.backend],
      ...(consul.address ? [[word("address"), code(consul.address)]] : []),
      ...(consul.problem ? [[word("problem"), consul.problem]] : []),
    ]),
    ...lostAgents(status),
    heading("sources"),
    table(["source", "is_followed", "listed", "objects", "problem"], sources),
    heading("passes"),
    status.passes.length
      ? table(["when", "kind", "outcome", "took", "counts"], status.passes.map((pass) => passRow(pass, now)))
      : none(word("no_passes")),
  ];
}

function configurationView({ status }) {
  return configuration(status, [
    [word("version"), status.version],
    [word("cluster"), status.cluster],
    ...(status.instance ? [[word("instance"), status.instance]] : []),
  ]);
}

export const show = {
  targets: targetsView, rejections: rejectionsView, conflicts: conflictsView, removals: removalsView, explain: explainView, health: healthView,
  configuration: configurationView,
};

/** What an operator has to know whatever tab is open, the worst first. */
export function banners(status, failure) {
  const list = [];
  const add = (...given) => list.push(banner(...given));
  if (failure) add("bad", word("unreachable", { problem: failure.problem, ago: ago(status.now, failure.now) }));
  if (status.unready) add("wait", word("unready", { problem: status.unready }));
  if (!status.consul.is_up) add("bad", word("consul_down", { problem: status.consul.problem }));
  else if (status.consul.problem) add("wait", status.consul.problem);
  for (const one of status.brakes) {
    const names = `${one.sample.join(", ")}${one.count > one.sample.length ? ", …" : ""}`;
    const until = `${clock(one.until)} (${word("in", { span: span(Math.max(0, one.until - status.now)) })})`;
    add("wait", word("brake_on", { count: number(one.count), source: one.source }), word("brake_why", { until }), names);
  }
  if (status.proxy_wait.count) {
    const { count, problem } = status.proxy_wait;
    add("wait", word("proxy_wait", { count: number(count) }), word("proxy_wait_why"), problem);
  }
  for (const one of status.sources.filter((source) => source.problem))
    add("bad", word("source_down", { source: one.name, problem: one.problem }), word("source_why"));
  return list;
}

/** The figures at the top: each leads to the tab that explains it. */
export function cards(status) {
  const { counts, now } = status;
  const rejected = sum(counts.rejections);
  const held = status.brakes.reduce((total, one) => total + one.count, 0);
  const followed = status.sources.filter((one) => one.is_followed).length;
  const pass = status.passes[0];
  const unwell = ["refused", "conflict", "pending"].filter((name) => counts.states[name]);
  const passText = pass ? `${pass.problem || took(pass.seconds)} · ${ago(pass.at, now)}` : "";
  return [
    card(
      "targets", "targets", counts.states.refused ? "wait" : "good", number(counts.targets),
      unwell.map((name) => `${number(counts.states[name])} ${word(name)}`).join(" · ") ||
        ["pod", "node", "endpoint"].filter((kind) => kind !== "endpoint" || counts.kinds.endpoint)
          .map((kind) => `${number(counts.kinds[kind])} ${word(kind)}`).join(" · "),
    ),
    card("rejections", "rejections", rejected ? "wait" : "good", number(rejected), Object.keys(counts.rejections).slice(0, 2).join(", ")),
    card("conflicts", "conflicts", counts.conflicts ? "bad" : "good", number(counts.conflicts)),
    ...(held ? [card("health", "brake", "wait", number(held), word("held"))] : []),
    card("health", "consul", status.consul.is_up ? "good" : "bad", word(status.consul.is_up ? "up" : "down"), status.consul.backend),
    card(
      "health", "sources", followed === status.sources.length ? "good" : "bad", `${followed}/${status.sources.length}`, word("followed"),
    ),
    card("health", "last_pass", pass ? tone(pass.outcome) : "plain", pass ? word(pass.outcome) : "–", passText),
  ];
}
