// Every word the page shows, in both languages, and what to do about each reason.

export const WORDS = {
  en: {
    title: "k8s-consul-registrar", skip: "Skip to content", pause: "Pause", resume: "Resume",
    targets: "Targets", rejections: "Rejections", conflicts: "Conflicts", health: "Health",
    configuration: "Configuration", brake: "Brake", consul: "Consul", sources: "Sources",
    last_pass: "Last pass", passes: "Last passes", held: "held", followed: "followed", is_followed: "Followed",
    registered: "registered", pending: "pending", refused: "refused", conflict: "conflict",
    standby: "standby", kept: "kept", leader: "leader", single: "single", all: "all",
    pod: "Pod", node: "Node", any_kind: "every kind", any_namespace: "every namespace",
    state: "State", object: "Object", address: "Address", path: "Scrape", on_node: "Node", shard: "Shard",
    service: "Service", name: "Name", tags: "Tags", labels: "Meta in Consul", detail: "Detail",
    reason: "Reason", fix: "What to do", kept_id: "Consul still holds", id: "Service ID",
    holder: "Held by", wanted_by: "Wanted by", source: "Source", listed: "Last complete list",
    objects: "Objects", problem: "Problem", when: "When", kind: "Kind", outcome: "Outcome",
    counts: "Done", took: "Took", setting: "Setting", value: "Value", version: "Version",
    cluster: "Cluster", instance: "Instance", started: "Started", backend: "Backend",
    up: "up", down: "not usable", never: "never", yes: "yes", no: "no", more: "Details",
    full: "full", changes: "changes", success: "success", partial: "partial", failure: "failure",
    search_targets: "Search: name, address, node, label value …   ( / )",
    search_rejections: "Search: object, reason …   ( / )",
    previous: "Previous", next: "Next", range: "{from}–{to} of {found}", nothing: "Nothing found",
    no_rejections: "No object is rejected.", no_conflicts: "No service ID is in conflict.",
    no_passes: "No pass yet.", updated: "updated", deregistered: "deregistered", unchanged: "unchanged", paused: "paused", loading: "loading …",
    ago: "{span} ago", in: "in {span}", now: "just now",
    unreachable: "The registrar does not answer ({problem}). What is shown is from {ago}.",
    unready: "Not ready: {problem}",
    brake_on: "The brake holds {count} removals of {source}",
    brake_why: "These are missing from the last list. They go once lists agree until {until}; ALLOW_MASS_DEREGISTER=true lets them go at once.",
    consul_down: "Consul cannot be used: {problem}",
    source_down: "{source} cannot be followed: {problem}",
    source_why: "Nothing of it is deregistered meanwhile.",
    conflicts_why: "Somebody else's service has the ID. It is never overwritten: remove it in Consul, or name the cluster or instance it was written under in PREVIOUS_CLUSTER_NAMES or PREVIOUS_INSTANCES.",
    rejections_why: "These ask to be scraped and cannot be. What Consul holds of them stays as it is.",
    shown_first: "The first {shown} are shown.",
  },
  zh: {
    title: "k8s-consul-registrar", skip: "跳到内容", pause: "暂停", resume: "继续",
    targets: "采集目标", rejections: "拒绝", conflicts: "冲突", health: "健康",
    configuration: "配置", brake: "刹车", consul: "Consul", sources: "来源",
    last_pass: "最近一轮", passes: "最近各轮", held: "暂缓", followed: "跟踪中", is_followed: "跟踪",
    registered: "已注册", pending: "待写入", refused: "被 Consul 拒绝", conflict: "冲突",
    standby: "备用", kept: "保留", leader: "主", single: "单实例", all: "全部",
    pod: "Pod", node: "节点", any_kind: "所有类型", any_namespace: "所有命名空间",
    state: "状态", object: "对象", address: "地址", path: "采集", on_node: "节点", shard: "分片",
    service: "服务", name: "名称", tags: "标签", labels: "Consul 中的 meta", detail: "说明",
    reason: "原因", fix: "处理办法", kept_id: "Consul 中仍保留", id: "服务 ID",
    holder: "占用者", wanted_by: "需要者", source: "来源", listed: "最近一次完整列表",
    objects: "对象数", problem: "问题", when: "时间", kind: "类型", outcome: "结果",
    counts: "内容", took: "耗时", setting: "配置项", value: "值", version: "版本",
    cluster: "集群", instance: "实例", started: "启动", backend: "后端",
    up: "可用", down: "不可用", never: "尚无", yes: "是", no: "否", more: "详情",
    full: "全量", changes: "增量", success: "成功", partial: "部分成功", failure: "失败",
    search_targets: "搜索：名称、地址、节点、标签值……（按 / ）",
    search_rejections: "搜索：对象、原因……（按 / ）",
    previous: "上一页", next: "下一页", range: "第 {from}–{to} 条，共 {found} 条", nothing: "没有找到",
    no_rejections: "没有被拒绝的对象。", no_conflicts: "没有服务 ID 冲突。",
    no_passes: "还没有执行过。", updated: "已更新", deregistered: "已注销", unchanged: "未变", paused: "已暂停", loading: "加载中……",
    ago: "{span}前", in: "{span}后", now: "刚刚",
    unreachable: "registrar 没有应答（{problem}）。当前显示的是{ago}的内容。",
    unready: "尚未就绪：{problem}",
    brake_on: "刹车暂缓了 {source} 的 {count} 个注销",
    brake_why: "它们不在最近的列表里。若各次列表到 {until} 都一致才会注销；ALLOW_MASS_DEREGISTER=true 可立即放行。",
    consul_down: "Consul 不可用：{problem}",
    source_down: "无法跟踪 {source}：{problem}",
    source_why: "在此期间不会注销其中任何服务。",
    conflicts_why: "该 ID 被他人的服务占用，绝不会被覆盖：请在 Consul 中删除它，或在 PREVIOUS_CLUSTER_NAMES、PREVIOUS_INSTANCES 中写明它注册时的集群名或实例名。",
    rejections_why: "这些对象要求被采集但无法采集。Consul 中已有的记录保持不变。",
    shown_first: "只显示前 {shown} 条。",
  },
};

// By the words of `targets/reasons.py`; a test holds both lists against it.
export const HINTS = {
  en: {
    no_host_ip: "Wait: the Pod is still starting. If it stays, look at its events.",
    undeclared_port: "Declare the port in the container, or set prometheus.io/port to a declared one.",
    no_ip: "Wait: the Pod is still starting. If it stays, look at its events.",
    invalid_ip: "The cluster's network gave the Pod an address that cannot be scraped: look at the CNI.",
    no_port: "Set prometheus.io/port, or declare the container's TCP port.",
    ambiguous_port: "Set prometheus.io/port, or name one of the ports “metrics”.",
    invalid_port: "Set prometheus.io/port to a number from 1 to 65535, or to a container port's name.",
    unknown_port_name: "No container port has this name: correct prometheus.io/port or the port's name.",
    invalid_path: "Correct prometheus.io/path: no control characters, and a short query string in UTF-8.",
    invalid_scheme: "Set prometheus.io/scheme to http or https, or remove it.",
    invalid_param: "Correct prometheus.io/param-…: a name of A-Z a-z 0-9 _, given once, without control characters.",
    meta_too_long: "Shorten the value: Consul takes 512 bytes for one meta value.",
    meta_too_many: "Remove some parameters or labels: Consul takes 64 meta pairs.",
    no_address: "The Node has neither an InternalIP nor an ExternalIP: look at its kubelet or cloud provider.",
    address_taken: "Two Nodes have this address: delete the Node object that is gone.",
    id_taken: "Rename one of the two Pods, or its namespace: both make the same service ID.",
    undecodable: "The API server's object cannot be read: kubectl get it with -o yaml and report it.",
    too_many_ports: "Annotate fewer ports: one Pod may have only so many targets.",
    invalid_meta: "Correct the label or annotation that is copied into the meta: Consul does not take it.",
    empty_name: "The name template gives no name: set the label or annotation it reads.",
    invalid_name: "Correct the annotation or the name template: this is no name for a service.",
    name_too_long: "Shorten the name: the label, annotation or template makes it too long.",
    name_taken: "Somebody else's services already have this name: choose another one.",
    invalid_tag: "Correct the label or annotation a tag is made of: Consul does not take it.",
  },
  zh: {
    no_host_ip: "请稍候：Pod 还在启动。若长期如此，请查看它的事件。",
    undeclared_port: "请在容器里声明该端口，或把 prometheus.io/port 设为已声明的端口。",
    no_ip: "请稍候：Pod 还在启动。若长期如此，请查看它的事件。",
    invalid_ip: "集群网络给 Pod 分配了无法采集的地址：请检查 CNI。",
    no_port: "请设置 prometheus.io/port，或为容器声明 TCP 端口。",
    ambiguous_port: "请设置 prometheus.io/port，或把其中一个端口命名为 “metrics”。",
    invalid_port: "请把 prometheus.io/port 设为 1 到 65535 的数字，或容器端口的名称。",
    unknown_port_name: "没有这个名称的容器端口：请更正 prometheus.io/port 或端口名称。",
    invalid_path: "请更正 prometheus.io/path：不能有控制字符，查询串要短且为 UTF-8。",
    invalid_scheme: "请把 prometheus.io/scheme 设为 http 或 https，或删除它。",
    invalid_param: "请更正 prometheus.io/param-…：名称只用 A-Z a-z 0-9 _，只写一次，不含控制字符。",
    meta_too_long: "请缩短该值：Consul 的一个 meta 值最多 512 字节。",
    meta_too_many: "请减少参数或标签：Consul 最多接受 64 对 meta。",
    no_address: "节点既没有 InternalIP 也没有 ExternalIP：请检查它的 kubelet 或云厂商组件。",
    address_taken: "两个节点有相同地址：请删除已经不存在的那个 Node 对象。",
    id_taken: "两个 Pod 产生相同的服务 ID：请重命名其中一个 Pod 或其命名空间。",
    undecodable: "无法读取 API server 给出的对象：请用 kubectl get -o yaml 查看并反馈。",
    too_many_ports: "请减少注解中的端口：一个 Pod 的采集目标数量有限。",
    invalid_meta: "请更正复制到 meta 的标签或注解：Consul 不接受它。",
    empty_name: "名称模板得不到名称：请设置它所读取的标签或注解。",
    invalid_name: "请更正注解或名称模板：它不能作为服务名。",
    name_too_long: "请缩短名称：标签、注解或模板使它过长。",
    name_taken: "他人的服务已使用此名称：请换一个名称。",
    invalid_tag: "请更正用来生成标签（tag）的标签或注解：Consul 不接受它。",
  },
};

let language = "en";

export function setLanguage(name) {
  language = name in WORDS ? name : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
}

export const getLanguage = () => language;

/** The word in the language chosen, with `{name}` replaced by what is given. */
export function word(name, given = {}) {
  const text = Object.hasOwn(WORDS[language], name) ? WORDS[language][name] : name;
  return text.replace(/\{(\w+)\}/g, (whole, key) => (key in given ? String(given[key]) : whole));
}

export const hint = (reason) => (Object.hasOwn(HINTS[language], reason) ? HINTS[language][reason] : "");
