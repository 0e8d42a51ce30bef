"use strict";
// Small makers of elements, and the parts that show one thing each. No state is kept here.

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const text = (value) => (value === null || value === undefined ? "" : String(value));
const shown = (value) => (value && typeof value === "object" && "hex" in value ? hexLines(value.hex) : text(value));
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false }) + "." + String(Math.floor((seconds * 1000) % 1000)).padStart(3, "0");

function size(bytes) {
  if (bytes < 10000) return `${bytes} B`;
  for (const unit of ["kB", "MB", "GB"]) { bytes /= 1000; if (bytes < 10000) return `${bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${unit}`; }
  return `${Math.round(bytes)} GB`;
}

function span(ms) {
  if (ms === null || ms === undefined) return "open";
  if (ms < 1000) return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
  return ms < 120000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms / 60000)} min`;
}

function hexLines(hex) {
  const lines = [];
  for (let at = 0; at < Math.min(hex.length, 8192); at += 32) lines.push(`${(at / 2).toString(16).padStart(6, "0")}  ${hex.slice(at, at + 32).replace(/(..)/g, "$1 ")}`);
  return lines.join("\n");
}

// Rows of [offset, hex, meaning, text] as the server annotated them.
function hexView(rows) {
  if (!rows || !rows.length) return el("p", { class: "faint" }, "No bytes were kept of this.");
  const body = rows.map(([at, raw, meaning, plain]) => el("tr", {}, el("td", {}, at.toString(16).padStart(6, "0")), el("td", {}, raw), el("td", {}, meaning || ""), el("td", { class: "faint" }, plain || "")));
  return el("div", { class: "hexview" }, el("table", {}, el("tbody", {}, body)));
}

function pretty(body, raw) {
  if (!body || !body.size) return el("p", { class: "faint" }, "No body.");
  let data = shown(body.data);
  let note = `${size(body.size)}${body.type ? ", " + body.type : ""}${body.encoding ? ", was " + body.encoding : ""}`;
  if (body.truncated) note += `, TRUNCATED: only the first ${size(body.kept)} were kept`;
  if (!raw && typeof body.data === "string") {
    try { data = JSON.stringify(JSON.parse(body.data), null, 2); } catch { /* not JSON */ }
    if (/urlencoded/.test(body.type)) data = body.data.split("&").map(decode).join("\n");
    if (/(html|xml)/.test(body.type)) data = data.replace(/>\s*</g, ">\n<");
  }
  return el("div", {}, el("p", { class: body.truncated ? "warn" : "faint" }, note), el("pre", { "data-body": "1" }, data));
}

function decode(part) { try { return decodeURIComponent(part.replace(/\+/g, " ")); } catch { return part; } }

function headerTable(headers) {
  if (!headers.length) return el("p", { class: "faint" }, "None.");
  return el("table", { class: "plain" }, el("tbody", {}, headers.map(([name, value]) => el("tr", {}, el("td", { class: "faint mono" }, name), el("td", { class: "mono url" }, value)))));
}

// What went wrong, at which hop, and what to do; null when there is nothing to say.
function verdictView(stream) {
  const verdict = stream.verdict;
  if (!verdict.line) return null;
  const hops = [["visitor", stream.session ? "client" : "visitor"], ["edge", "edge"], ["connector", "connector"], ["origin", stream.session ? "broker" : "origin"]];
  const chain = hops.flatMap(([name, title], at) => [at ? el("span", { class: verdict.hop === "link" && name === "connector" ? "line bad" : "line" }, verdict.hop === "link" && name === "connector" ? "✂" : "") : null, el("span", { class: verdict.hop === name ? "hop at" : "hop" }, verdict.hop === name && stream.ms !== null ? `✂ ${title}` : title)]);
  return el("div", { class: verdict.hop ? "verdict" : "verdict fine", role: "status" }, verdict.hop ? el("p", { class: "chain", "aria-label": `Where: ${verdict.hop}` }, chain) : null, el("p", { class: "line1" }, verdict.line), verdict.evidence.length ? el("ul", {}, verdict.evidence.map((line) => el("li", {}, line))) : null, verdict.advice ? el("p", { class: "advice" }, "→ ", verdict.advice) : null);
}

// Frames, the newest first, with the silences between them and the end.
const TELLING_SILENCE = 5;

function frameRows(frames, stream, open) {
  const end = stream.ms === null ? stream.age / 1000 : stream.ms / 1000;
  const rows = [];
  const note = (at, kind, words) => rows.push(el("tr", { class: kind }, el("td", { class: "num faint" }, at === null ? "" : at.toFixed(3)), el("td", {}, ""), el("td", { colspan: 2 }, words)));
  if (stream.ms !== null) note(end, stream.why ? "note bad" : "note", `■ ${stream.why || (stream.how === "complete" ? "complete" : `ended by the ${stream.how}`)}`);
  let later = end;
  const answered = new Set();
  let answers = 0;
  for (const frame of frames) for (const packet of frame.packets) {
    if (packet.type === "PINGRESP") answers += 1;
    if (packet.type === "PINGREQ") { if (answers) { answers -= 1; answered.add(frame.seq); } }
  }
  for (const frame of frames) {
    if (later - frame.at >= TELLING_SILENCE) note(null, "note faint", `┆ ${later === end && stream.ms === null ? "silent for" : "nothing for"} ${(later - frame.at).toFixed(1)} s`);
    later = frame.at;
    const lost = frame.packets.some((packet) => packet.type === "PINGREQ") && !answered.has(frame.seq) && end - frame.at >= 2;
    rows.push(el("tr", { tabindex: 0, "data-frame": frame.seq, onclick: () => open(frame.seq) },
      el("td", { class: "num faint" }, frame.at.toFixed(3)), el("td", { class: `way${frame.way}` }, frame.way ? "↓" : "↑"),
      el("td", {}, frame.packets.length ? frame.packets.map((packet) => el("div", {}, el("b", {}, packet.type), " ", packet.text, packet.type === "PINGREQ" && lost ? el("span", { class: "tag bad" }, "no PINGRESP") : null)) : [el("b", {}, frame.opcode), " ", el("span", { class: "mono faint" }, text(typeof frame.payload === "string" ? frame.payload : frame.payload.hex).slice(0, 120))]),
      el("td", { class: "num" }, size(frame.length))));
  }
  return rows;
}

const NS = "http://www.w3.org/2000/svg";

// From the edge to the connector to the origin and back, as bars on one scale.
function waterfall(stream) {
  const marks = stream.marks;
  const total = Math.max(stream.ms === null ? stream.age : stream.ms, 0.001);
  const at = (name, fallback) => (name in marks ? marks[name] : fallback);
  const reached = at("connected", at("reused", at("head", total)));
  const head = at("head", total);
  const first = at("first byte down", head);
  const bars = [
    ["edge → connector", 0, at("end up", at("first byte up", 0)), "request comes in"],
    ["origin dial", 0, reached, "reused" in marks ? "a kept connection" : "connected" in marks ? "a new connection" : "no origin"],
    ["origin thinks", reached, head, "until the response head"],
    ["first byte", head, Math.max(head, first), "of the body"],
    ["origin → edge", first, total, stream.ms === null ? "still open" : "until the end"],
  ];
  return el("div", { class: "fall", "data-waterfall": "1" }, bars.flatMap(([name, from, to, title]) => {
    const svg = document.createElementNS(NS, "svg");
    svg.setAttribute("viewBox", "0 0 1000 10"); svg.setAttribute("preserveAspectRatio", "none");
    const rect = document.createElementNS(NS, "rect");
    const start = Math.max(0, Math.min(1000, (from / total) * 1000));
    rect.setAttribute("x", start); rect.setAttribute("width", Math.max(3, Math.min(1000 - start, ((to - from) / total) * 1000))); rect.setAttribute("height", 10);
    svg.append(rect);
    return [el("span", { title }, name), el("span", { class: "track", title }, svg), el("span", { class: "num faint" }, span(Math.max(0, to - from)))];
  }));
}

function sessionView(session) {
  const count = (counts) => Object.entries(counts).map(([name, number]) => `${name} ${number}`).join(", ") || "none";
  let countdown = "off";
  if (session.keep_alive) countdown = session.countdown === null ? `${session.keep_alive} s` : session.countdown > 0 ? `${session.keep_alive} s, broker gives up in ${session.countdown} s` : `OVERDUE by ${-session.countdown} s`;
  return el("div", { "data-session": session.client_id },
    el("dl", {},
      el("dt", {}, "Client"), el("dd", {}, `${session.client_id || "(assigned by the broker)"} ${session.username ? `as ${session.username}` : ""}`),
      el("dt", {}, "State"), el("dd", { class: session.state === "connected" ? "ok" : "warn" }, `${session.state}, MQTT ${{ 3: "3.1", 4: "3.1.1", 5: "5.0" }[session.version]}${session.clean ? ", clean" : ", persistent"}${session.session_present ? ", session present" : ""}`),
      el("dt", {}, "Keep alive"), el("dd", { class: session.countdown !== null && session.countdown < 0 ? "bad" : "" }, countdown),
      el("dt", {}, "Ping"), el("dd", { class: session.ping_outstanding ? "bad" : "" }, session.ping_outstanding ? `no PINGRESP for ${session.ping_age} s` : "none outstanding"),
      el("dt", {}, "Silent for"), el("dd", {}, `client ${text(session.last_client)} s, broker ${text(session.last_broker)} s`),
      session.will ? [el("dt", {}, "Will"), el("dd", {}, `${session.will.topic}, QoS ${session.will.qos}${session.will.retain ? ", retained" : ""}`)] : null,
      el("dt", {}, "From client"), el("dd", {}, count(session.from_client)), el("dt", {}, "From broker"), el("dd", {}, count(session.from_broker))),
    el("h3", {}, `Subscriptions (${session.subscriptions.length})`),
    el("table", { class: "plain" }, el("tbody", {}, session.subscriptions.map((item) => el("tr", {}, el("td", { class: "mono" }, item.topic), el("td", {}, `QoS ${item.qos}`))))),
    el("h3", {}, `In flight (${session.in_flight.length})`),
    el("table", { class: "plain" }, el("tbody", {}, session.in_flight.slice(0, 50).map((item) => el("tr", {}, el("td", {}, `${item.from} ${item.packet_id}`), el("td", { class: "mono" }, item.topic), el("td", {}, `QoS ${item.qos}, ${item.state}`), el("td", { class: "num" }, `${item.since} s`))))),
    session.problems.map((problem) => el("p", { class: "finding" }, problem)));
}

function topicTree(topics) {
  const root = { children: new Map(), count: 0, rate: 0, topic: null };
  for (const topic of topics) {
    let node = root;
    for (const part of topic.topic.split("/")) {
      if (!node.children.has(part)) node.children.set(part, { children: new Map(), count: 0, rate: 0, topic: null });
      node = node.children.get(part);
      node.count += topic.count; node.rate += topic.rate;
    }
    node.topic = topic;
  }
  return root;
}

function treeView(node, openPaths, path) {
  return el("ul", {}, [...node.children].map(([name, child]) => {
    const here = path ? `${path}/${name}` : name;
    const topic = child.topic;
    const rate = el("span", { class: "rate" }, `${child.count} · ${child.rate.toFixed(1)}/s`);
    const line = el("span", { class: "leaf" }, el("span", { class: "mono" }, name || "(empty)"), topic ? el("span", { class: "last mono", title: text(shown(topic.last)) }, `${topic.retained ? "retained " : ""}${text(shown(topic.last)).slice(0, 80)}`) : null, rate);
    if (!child.children.size) return el("li", { "data-topic": here }, line);
    const details = el("details", { open: !openPaths.closed.has(here) }, el("summary", {}, line), treeView(child, openPaths, here));
    details.addEventListener("toggle", () => { if (details.open) openPaths.closed.delete(here); else openPaths.closed.add(here); });
    return el("li", { "data-topic": here }, details);
  }));
}

function diffView(lines) {
  return el("pre", {}, lines.map((line) => el("span", { class: line.startsWith("+") ? "add" : line.startsWith("-") ? "del" : "faint" }, line + "\n")));
}
