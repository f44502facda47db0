// The views of the proxy: each tab, made of what the API answered.
import { hint, word } from "./language.js";
import {
  ago, badge, banner, card, cell, code, configuration, dim, element, heading, Keyed, moment, none, notice, number, objectName, pairs, span,
  table, took, tone,
} from "./parts.js";

export const TABS = ["upstreams", "health", "configuration"];
export const FILTERED = { upstreams: "state" };

const SOON = 14 * 86400; // seconds before a certificate expires
const ROTATED = 2 * 86400; // the same for one that a kubelet has to have replaced by itself long before

export const header = (status) => ({ name: status.api_server, role: status.unready ? "not ready" : "ready", detail: status.unready });
export const facets = ({ counts }) => ({ upstreams: counts.states });
export const figures = ({ counts }) => ({ upstreams: counts.upstreams });

const rows = new Keyed();

function failureText(one, now) {
  if (!one.failures) return dim("–");
  return [
    dim(`${number(one.failures)} × `, element("span", { class: "badge bad" }, one.outcome), " ", ago(one.failed_at, now)),
    element("p", {}, one.reason),
    // A reason that has a remedy of its own is more exact.
    hint(one.outcome) && !one.reason.includes("; ") ? element("p", { class: "dim" }, hint(one.outcome)) : null,
  ];
}

function upstreamsView({ answer, status }) {
  if (!answer.found) return [none(word("nothing"))];
  const made = rows.of(
    answer.upstreams,
    (one) => `${one.object.kind}/${objectName(one.object)}/${one.address}`,
    (one) =>
      element(
        "tr", {},
        cell("state", {}, badge(one.state, tone(one.state))),
        cell("kind", { class: "dim" }, word(one.object.kind)),
        cell("object", { class: "main" }, element("bdi", {}, objectName(one.object))),
        cell("address", {}, code(one.address)),
        cell("last_scrape", {}, moment(one.at, status.now)),
        cell("took", {}, one.seconds === null ? dim("–") : took(one.seconds)),
        cell("certificate", {}, expiry(one, status.now, ROTATED)),
        cell("failures", {}, failureText(one, status.now)),
      ),
    (one) => `${JSON.stringify(one)}${one.at === null ? "" : ago(one.at, status.now)}`,
  );
  return { columns: ["state", "kind", "object", "address", "last_scrape", "took", "certificate", "failures"], rows: made };
}

function contestsView({ contests }) {
  if (!contests.length) return [];
  const list = contests.map((one) =>
    element(
      "tr", {},
      cell("address", { class: "main" }, code(one.address)),
      cell("winner", {}, one.winner),
      cell("losers", {}, one.losers.join(", ")),
    ),
  );
  return [heading("contested"), notice(word("contested_why")), table(["address", "winner", "losers"], list)];
}

const expiry = (one, now, soon = SOON) => {
  if (one.expires_at === null) return dim("–");
  return one.expires_at - now < soon ? element("span", { class: "badge bad" }, moment(one.expires_at, now)) : moment(one.expires_at, now);
};

function healthView({ status }) {
  const { connections, now, workers } = status;
  const sources = status.sources.map((one) =>
    element(
      "tr", {},
      cell("source", { class: "main" }, one.name),
      cell("is_followed", {}, badge(one.behind ? "no" : "yes", one.behind ? "bad" : "good")),
      cell("objects", {}, number(one.objects)),
      cell("problem", {}, one.problem || (one.behind ? word("behind", { span: span(one.behind) }) : dim("–"))),
    ),
  );
  const certificates = status.certificates.map((one) =>
    element("tr", {}, cell("of", { class: "main" }, code(one.of)), cell("expires", {}, expiry(one, now))),
  );
  const scrapes = Object.entries(status.scrapes).map(([outcome, count]) =>
    element(
      "tr", {},
      cell("outcome", { class: "main" }, element("span", { class: `badge ${outcome === "ok" ? "good" : hint(outcome) ? "bad" : "wait"}` }, outcome)),
      cell("count", {}, number(count)),
      cell("fix", {}, hint(outcome) || dim("–")),
    ),
  );
  return [
    ...contestsView(status),
    heading("connections"),
    pairs(["clients", "kept", "running", "waiting"].map((name) => [word(name), number(connections[name])])),
    ...(workers ? [heading("workers"), pairs([[word("running_workers"), number(workers[0])], [word("deaths"), number(workers[1])]])] : []),
    heading("certificates"),
    certificates.length ? table(["of", "expires"], certificates) : none(word("no_certificates")),
    heading("sources"),
    table(["source", "is_followed", "objects", "problem"], sources),
    heading("scrapes"),
    scrapes.length ? table(["outcome", "count", "fix"], scrapes) : none(word("nothing")),
  ];
}

const yes = (value) => word(value ? "yes" : "no");

const configurationView = ({ status }) =>
  configuration(status, [
    [word("version"), status.version],
    [word("api_server"), code(status.api_server)],
    [word("port"), String(status.port)],
    [word("tls"), yes(status.tls)],
    [word("authentication"), yes(status.authentication)],
  ]);

export const show = { upstreams: upstreamsView, health: healthView, configuration: configurationView };

/** What an operator has to know whatever tab is open, the worst first. */
export function banners(status, failure) {
  const list = [];
  if (failure) list.push(banner("bad", word("unreachable", { problem: failure.problem, ago: ago(status.now, failure.now) })));
  if (status.unready) list.push(banner("wait", word("unready", { problem: status.unready })));
  for (const one of status.sources.filter((source) => source.problem))
    list.push(banner("bad", word("source_down", { source: one.name, problem: one.problem }), word("source_why")));
  for (const one of status.certificates.filter(({ expires_at: at }) => at !== null && at - status.now < SOON))
    list.push(banner("bad", word("expires_soon", { of: one.of, ago: ago(one.expires_at, status.now) })));
  return list;
}

/** The figures at the top: each leads to the tab that explains it. */
export function cards(status) {
  const { connections, counts, now, workers } = status;
  const failing = counts.states.fails;
  const behind = status.sources.filter((one) => one.behind).length;
  const expiries = status.certificates.map((one) => one.expires_at).filter((at) => at !== null);
  const first = Math.min(...expiries);
  return [
    card(
      "upstreams", "upstreams", "good", number(counts.upstreams),
      `${number(counts.kinds.node)} ${word("node")} · ${number(counts.kinds.pod)} ${word("pod")}`,
    ),
    card("upstreams?state=fails", "failing", failing ? "bad" : "good", number(failing), `${number(counts.states.idle)} ${word("idle")}`),
    card("health", "connections", "good", number(connections.clients), `${number(connections.running)} ${word("under_way")}`),
    ...(workers ? [card("health", "workers", workers[0] ? "good" : "bad", number(workers[0]), `${number(workers[1])} ${word("restarted")}`)] : []),
    ...(expiries.length
      ? [card("health", "certificates", first - now < SOON ? "bad" : "good", span(Math.max(0, first - now)), word("first_expiry"))]
      : []),
    card(
      "health", "sources", behind ? "bad" : "good", `${status.sources.length - behind}/${status.sources.length}`, word("followed"),
    ),
  ];
}
