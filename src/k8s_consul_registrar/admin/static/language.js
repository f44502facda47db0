// The language of the page, and the texts that every page of this program has.
import { HINTS, WORDS } from "./words.js";

const COMMON = {
  en: {
    skip: "Skip to content", pause: "Pause", resume: "Resume", health: "Health", configuration: "Configuration",
    sources: "Sources", followed: "followed", is_followed: "Followed", all: "all", pod: "Pod", node: "Node", endpoint: "Endpoint",
    any_kind: "every kind", any_namespace: "every namespace", state: "State", object: "Object", address: "Address",
    on_node: "Node", name: "Name", detail: "Detail", reason: "Reason", fix: "What to do", source: "Source",
    listed: "Last complete list", objects: "Objects", problem: "Problem", when: "When", kind: "Kind",
    outcome: "Outcome", took: "Took", setting: "Setting", value: "Value", version: "Version", started: "Started",
    up: "up", down: "not usable", never: "never", yes: "yes", no: "no", previous: "Previous", next: "Next",
    range: "{from}–{to} of {found}", nothing: "Nothing found", paused: "paused", loading: "loading …",
    ago: "{span} ago", in: "in {span}", now: "just now", unready: "Not ready: {problem}",
    shown_first: "Only the first {shown} are shown.",
  },
  zh: {
    skip: "跳到内容", pause: "暂停", resume: "继续", health: "健康", configuration: "配置", sources: "来源", followed: "跟踪中",
    is_followed: "跟踪", all: "全部", pod: "Pod", node: "节点", endpoint: "端点", any_kind: "所有类型", any_namespace: "所有命名空间", state: "状态",
    object: "对象", address: "地址", on_node: "节点", name: "名称", detail: "说明", reason: "原因", fix: "处理办法", source: "来源",
    listed: "最近一次完整列表", objects: "对象数", problem: "问题", when: "时间", kind: "类型", outcome: "结果", took: "耗时",
    setting: "配置项", value: "值", version: "版本", started: "启动", up: "可用", down: "不可用", never: "尚无", yes: "是", no: "否",
    previous: "上一页", next: "下一页", range: "第 {from}–{to} 条，共 {found} 条", nothing: "没有找到", paused: "已暂停",
    loading: "加载中……", ago: "{span}前", in: "{span}后", now: "刚刚", unready: "尚未就绪：{problem}",
    shown_first: "只显示前 {shown} 条。",
  },
};

let language = "en";

export function setLanguage(name) {
  language = name in COMMON ? name : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
}

export const getLanguage = () => language;

/** The word in the language chosen, with `{name}` replaced by what is given. */
export function word(name, given = {}) {
  const found = [WORDS, COMMON].find((words) => Object.hasOwn(words[language], name));
  const text = found ? found[language][name] : name;
  return text.replace(/\{(\w+)\}/g, (whole, key) => (key in given ? String(given[key]) : whole));
}

export const hint = (reason) => (Object.hasOwn(HINTS[language], reason) ? HINTS[language][reason] : "");
