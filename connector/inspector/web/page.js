"use strict";
// The page: one state, one live connection, one function per view.

const state = { view: "streams", rows: new Map(), status: {}, filter: "", filterError: "", picked: null, tab: "overview", raw: false, frames: new Map(), lastSeq: 0, paused: false, control: { messages: [], events: [], configurations: [], links: [] }, link: null, linkFrames: [], closed: new Set(), noPayload: false };
const VIEWS = [["streams", "Streams"], ["mqtt", "MQTT"], ["control", "Control plane"], ["wire", "Wire"], ["decode", "Decode"], ["faults", "Faults"]];
const $ = (id) => document.getElementById(id);
const here = new URL(location.href);
let token = here.searchParams.get("token") || sessionStorage.getItem("token") || "";
if (here.searchParams.has("token")) { sessionStorage.setItem("token", token); history.replaceState(null, "", "/" + location.hash); }

async function api(path, body) {
  const options = { headers: { "X-Inspector-Token": token } };
  if (body !== undefined) { options.method = "POST"; options.body = body instanceof Blob ? body : JSON.stringify(body); }
  const response = await fetch(path, options);
  const value = await response.json();
  if (!response.ok) throw new Error(value.error || response.statusText);
  return value;
}

function notice(message) { $("notice").textContent = message || ""; $("notice").hidden = !message; }
async function attempt(work) { try { notice(""); return await work(); } catch (error) { notice(error.message); return null; } }

// A row that is replaced between pressing and releasing loses the click: nothing is redrawn meanwhile.
let pressed = 0;
function release() { if (!pressed) return; clearTimeout(pressed); pressed = 0; if (state.view === "streams" && !state.paused) drawStreams(); }
document.addEventListener("pointerdown", (event) => { if (event.button === 0 && event.target.closest("tr, button, summary")) pressed = setTimeout(release, 3000); });
for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => setTimeout(release));

// --- live ------------------------------------------------------------------------------------------------------------

let socket = null;
function connectLive() {
  socket = new WebSocket(`ws://${location.host}/api/live?token=${encodeURIComponent(token)}`);
  socket.onopen = () => { notice(""); if (state.filter) sendFilter(); };
  socket.onmessage = (event) => take(JSON.parse(event.data));
  socket.onclose = () => { notice("The inspected process does not answer; trying again…"); setTimeout(connectLive, 1500); };
}

function sendFilter() { state.filterError = ""; if (socket && socket.readyState === 1) socket.send(JSON.stringify({ filter: state.filter })); }

function take(update) {
  if (update.filter_error) { state.filterError = update.filter_error; drawStreams(); return; }
  if (update.reset) state.rows.clear();
  for (const id of update.gone || []) state.rows.delete(id);
  for (const row of update.rows || []) state.rows.set(row.id, row);
  while (state.rows.size > 2000) state.rows.delete(state.rows.keys().next().value);
  if (update.status) { state.status = update.status; drawStatus(); }
  if (!state.paused && state.view === "streams" && (update.reset || update.rows.length || (update.gone || []).length)) drawStreams();
}

function drawStatus() {
  const status = state.status;
  document.title = `Inspector: ${status.role}${status.title ? " " + status.title : ""}`;
  $("status").textContent = `${status.role}, ${status.seen} streams, ${size(status.kept)} of ${size(status.ceiling)}${status.redacted ? "" : " — NOT REDACTED"}`;
  $("status").className = status.redacted ? "" : "bad";
  $("capture").hidden = !status.features.includes("capture");
  $("capture").textContent = status.capture ? `Stop capture (${size(status.capture.bytes)})` : "Capture";
  $("open").hidden = status.role !== "capture";
  drawTabs();
}

function drawTabs() {
  const wanted = VIEWS.filter(([name]) => name !== "faults" || (state.status.features || []).includes("faults"));
  const key = wanted.map(([name]) => name).join() + state.view;
  if ($("views").dataset.key === key) return;
  $("views").dataset.key = key;
  $("views").replaceChildren(...wanted.map(([name, title], at) => el("button", { role: "tab", id: `view-${name}`, "aria-selected": state.view === name ? "true" : "false", title: `Key ${at + 1}`, onclick: () => show(name) }, title)));
}

function show(view) {
  state.view = view; location.hash = view; drawTabs(); closeDetail();
  $("list").replaceChildren();
  refresh();
}

async function refresh() {
  if (state.view === "streams") return drawStreams();
  if (state.view === "mqtt") return attempt(drawMqtt);
  if (state.view === "control") return attempt(drawControl);
  if (state.view === "wire") return attempt(drawWire);
  if (state.view === "decode") return drawDecode();
  return attempt(drawFaults);
}

// --- streams ---------------------------------------------------------------------------------------------------------

const COLUMNS = [["Time", "wide"], ["", ""], ["Status", ""], ["Method", ""], ["URL or destination", ""], ["Rule", "wide extra"], ["Conn", "wide extra"], ["Up", "num wide extra"], ["Down", "num wide extra"], ["Took", "num"], ["Client", "wide extra"], ["Ray", "wide extra"]];

function drawStreams() {
  if (state.view !== "streams" || pressed) return;
  const list = $("list");
  if (!list.querySelector("#filter")) {
    list.replaceChildren(
      el("div", { class: "bar" },
        el("input", { id: "filter", type: "search", placeholder: "Filter: status>=500 host:api or kind=websocket", "aria-label": "Filter", value: state.filter, spellcheck: "false", oninput: (event) => { state.filter = event.target.value; clearTimeout(drawStreams.timer); drawStreams.timer = setTimeout(sendFilter, 250); } }),
        el("button", { id: "pause", "aria-pressed": "false", onclick: (event) => { state.paused = !state.paused; event.target.setAttribute("aria-pressed", state.paused); event.target.textContent = state.paused ? "Go on" : "Pause"; if (!state.paused) drawStreams(); } }, "Pause"),
        el("span", { id: "filter-error", class: "error", role: "alert" })),
      el("table", { id: "streams" }, el("thead", {}, el("tr", {}, COLUMNS.map(([name, kind]) => el("th", { class: kind }, name)))), el("tbody", {})));
  }
  $("filter-error").textContent = state.filterError;
  const rows = [...state.rows.values()].sort((a, b) => b.id - a.id).slice(0, 300);
  const body = list.querySelector("#streams tbody");
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.id : null;
  const known = new Map([...body.children].map((node) => [node.dataset.id, node]));
  body.replaceChildren(...rows.map((row) => {
    const key = `${row.status} ${row.up} ${row.down} ${row.ms} ${row.mqtt} ${row.why} ${state.picked === row.id}`;
    const old = known.get(String(row.id));
    if (old && old.dataset.key === key) return old;
    return streamRow(row, key, !old && known.size > 0);
  }));
  if (!rows.length) body.append(el("tr", {}, el("td", { colspan: COLUMNS.length, class: "faint" }, state.filter ? "No stream matches the filter." : "Nothing has passed yet. Send a request through the tunnel.")));
  if (focused) body.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function streamRow(row, key, fresh) {
  const kind = row.mqtt ? "MQTT" : row.kind === "websocket" ? "WS" : row.kind === "tcp" ? "TCP" : "";
  return el("tr", { tabindex: 0, "data-id": row.id, "data-key": key, class: `${state.picked === row.id ? "picked" : ""} ${fresh ? "new" : ""}`, onclick: () => open(row.id) },
    el("td", { class: "wide mono faint" }, clock(row.time)), el("td", {}, el("span", { class: "tag" }, row.transport)),
    el("td", { class: `s${Math.floor((row.status || 0) / 100)}` }, row.status || "…"),
    el("td", {}, row.method), el("td", { class: "url" }, row.url, " ", row.why ? el("span", { class: "tag bad", title: row.error || row.how }, row.why) : null, " ", kind ? el("span", { class: "tag" }, row.mqtt ? `MQTT ${row.mqtt}` : kind) : null, row.replay ? el("span", { class: "tag" }, `replay of ${row.replay}`) : null),
    el("td", { class: "wide extra", title: row.service }, row.rule === null ? "" : `${row.rule}`), el("td", { class: "wide extra" }, row.conn < 0 ? "" : row.conn),
    el("td", { class: "num wide extra" }, size(row.up)), el("td", { class: "num wide extra" }, size(row.down)), el("td", { class: "num" }, span(row.ms)),
    el("td", { class: "wide extra" }, row.client), el("td", { class: "wide extra mono faint" }, row.ray));
}

function closeDetail() {
  state.picked = null; $("detail").hidden = true; document.querySelector("main").classList.remove("split"); $("detail").replaceChildren();
  for (const row of document.querySelectorAll("tr.picked")) row.classList.remove("picked");
}

function open(id) {
  state.picked = id; state.frames = new Map(); state.lastSeq = 0; state.tab = "overview";
  for (const row of document.querySelectorAll("tr.picked")) row.classList.remove("picked");
  document.querySelector(`tr[data-id="${id}"]`)?.classList.add("picked");
  return drawDetail(true);
}

async function drawDetail(first) {
  const id = state.picked;
  if (id === null || state.view !== "streams") return;
  const stream = await attempt(() => api(`/api/streams/${id}`));
  if (!stream || state.picked !== id || (pressed && !first)) return;
  const detail = $("detail");
  if (first && stream.frame_log && state.tab === "overview") state.tab = "frames";
  const tabs = [["overview", "Overview"], ["request", "Request"], ["response", "Response"]];
  if (stream.frame_log) tabs.push(["frames", "Frames"]);
  if (stream.session) tabs.push(["session", "MQTT session"]);
  const scroll = detail.scrollTop;
  const content = el("div", { id: "content" });
  const head = [
    el("div", { class: "bar" }, el("button", { id: "close", "aria-label": "Close", onclick: closeDetail }, "✕"), tabs.map(([name, title]) => el("button", { role: "tab", id: `tab-${name}`, "aria-selected": state.tab === name ? "true" : "false", onclick: () => { state.tab = name; drawDetail(false); } }, title))),
    el("h2", { class: "url" }, `${stream.method} ${stream.url}`),
    verdictView(stream),
  ].filter(Boolean);
  if (state.tab === "overview") overview(content, stream);
  if (state.tab === "request") content.append(el("h3", {}, "Headers"), headerTable(stream.request.headers), bodyPart("request", stream));
  if (state.tab === "response") content.append(el("h3", {}, "Headers"), headerTable(stream.response.headers), stream.response.trailers.length ? el("h3", {}, "Trailers") : null, stream.response.trailers.length ? headerTable(stream.response.trailers) : "", bodyPart("response", stream));
  if (state.tab === "session") content.append(sessionView(stream.session));
  if (state.tab === "frames") await frameList(content, stream, id);
  if (state.picked !== id || (pressed && !first)) return;
  detail.hidden = false; document.querySelector("main").classList.add("split");
  detail.replaceChildren(...head, content);
  detail.scrollTop = scroll;
}

function bodyPart(which, stream) {
  return el("div", {}, el("h3", {}, "Body ", el("button", { id: "raw", "aria-pressed": state.raw, onclick: () => { state.raw = !state.raw; drawDetail(false); } }, state.raw ? "Show pretty" : "Show raw")), pretty(stream[which].body, state.raw));
}

function overview(content, stream) {
  const can = (feature) => (state.status.features || []).includes(feature);
  const copy = (kind) => el("button", { "data-copy": kind, onclick: () => attempt(async () => snippetDialog((await api(`/api/streams/${stream.id}/snippet?as=${kind}`)).text)) }, `Copy as ${kind}`);
  content.append(el("p", {}, can("replay") && stream.kind === "http" ? [el("button", { id: "replay", onclick: () => attempt(async () => { const { id } = await api(`/api/streams/${stream.id}/replay`, {}); await open(id); }) }, "Replay"), " ", el("button", { id: "edit", onclick: () => editDialog(stream) }, "Edit and replay…"), " "] : "", copy("curl"), " ", stream.session ? copy("mosquitto_pub") : "", " ", copy("pytest")),
    el("h3", {}, "Timing"), waterfall(stream),
    el("dl", {}, ...[["Status", `${stream.status || "none yet"}${stream.source ? `, from ${stream.source}` : ""}`], ["Ended", stream.ms === null ? "open" : `${stream.how} after ${span(stream.ms)}${stream.error && !stream.verdict.line ? `: ${stream.error}` : ""}`], ["Bytes", `${size(stream.up)} up, ${size(stream.down)} down`], ["Transport", `${stream.transport}, connection ${stream.conn}, stream ${text(stream.stream)}`], ["Rule", stream.rule === null ? "none" : `${stream.rule}: ${stream.service}`], ["Client", stream.client], ["Ray", stream.ray], ["Started", new Date(stream.time * 1000).toISOString()]].flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}

async function frameList(content, stream, id) {
  const fresh = await api(`/api/streams/${id}/frames?after=${state.lastSeq}&limit=300`);
  for (const frame of fresh) { state.frames.set(frame.seq, frame); state.lastSeq = Math.max(state.lastSeq, frame.seq); }
  while (state.frames.size > 600) state.frames.delete(state.frames.keys().next().value);
  const log = stream.frame_log;
  const shownFrames = [...state.frames.values()].reverse().slice(0, 300);
  content.append(el("p", { class: "faint" }, `${log.counts[0]} frames up, ${log.counts[1]} down${log.dropped ? `, ${log.dropped} forgotten` : ""}`), log.broken ? el("p", { class: "finding" }, `Not understood any more: ${log.broken}`) : "",
    el("table", { id: "frames" }, el("thead", {}, el("tr", {}, el("th", { class: "num" }, "Seconds"), el("th", {}, ""), el("th", {}, "Frame"), el("th", { class: "num" }, "Size"))), el("tbody", {}, frameRows(shownFrames, stream, (seq) => attempt(() => frameDialog(id, seq))))));
}

async function frameDialog(id, seq) {
  const frame = await api(`/api/streams/${id}/frames/${seq}`);
  dialog(`Frame ${seq}: ${frame.opcode}, ${size(frame.length)}${frame.truncated ? ", its start" : ""}`, hexView(frame.hex), frame.value ? el("pre", {}, JSON.stringify(frame.value, null, 2)) : "", el("h3", {}, "Payload"), el("pre", {}, shown(frame.payload)));
}

function dialog(title, ...content) {
  $("dialog").replaceChildren(el("h2", {}, title), ...content, el("p", {}, el("button", { id: "dialog-close", onclick: () => $("dialog").close() }, "Close")));
  if (!$("dialog").open) $("dialog").showModal();
}

function snippetDialog(value) {
  navigator.clipboard?.writeText(value).catch(() => {});
  dialog("Copied", el("pre", { id: "snippet" }, value));
}

function editDialog(stream) {
  const field = (name, value) => el("input", { type: "text", name, value, "aria-label": name });
  const body = stream.request.body;
  const editable = typeof body.data === "string";
  const original = body.size ? text(editable ? body.data : "") : "";
  const headers = stream.request.headers.map(([name, value]) => `${name}: ${value}`).join("\n");
  const form = el("form", { method: "dialog", onsubmit: (event) => {
    event.preventDefault();
    const data = new FormData(form);
    const changes = { method: data.get("method"), target: data.get("target"), host: data.get("host"), headers: data.get("headers").split("\n").filter((line) => line.trim()).map((line) => { const at = line.indexOf(":", 1); return [line.slice(0, at).trim(), line.slice(at + 1).trim()]; }) };
    if (data.get("body") !== original) changes.body = data.get("body");
    if (changes.target === stream.target) delete changes.target;
    attempt(async () => { const { id } = await api(`/api/streams/${stream.id}/replay`, changes); $("dialog").close(); await open(id); });
  } }, el("label", {}, "Method", field("method", stream.method)), el("label", {}, "Host", field("host", stream.host)), el("label", {}, "Path", field("target", stream.target)), el("label", {}, "Headers (masked values are put back)", el("textarea", { name: "headers" }, headers)), el("label", {}, editable || !body.size ? "Body" : "Body (binary: as it was, unless you write here)", el("textarea", { name: "body" }, original)), el("button", { id: "send", type: "submit" }, "Send"));
  dialog("Edit and replay", form);
}

// --- the other views -------------------------------------------------------------------------------------------------

async function drawMqtt() {
  const found = await api("/api/mqtt");
  if (state.view !== "mqtt" || pressed) return;
  const scroll = $("list").scrollTop;
  const opened = found.sessions.filter((session) => session.open), ended = found.sessions.filter((session) => !session.open);
  const goto = (session) => el("button", { onclick: () => { show("streams"); open(session.id); } }, `Stream ${session.id}`);
  $("list").replaceChildren(
    el("h2", {}, `Open sessions (${opened.length})`),
    el("div", { class: "cards" }, opened.slice(-60).reverse().map((session) => el("div", { class: "card" }, el("p", {}, goto(session), " ", session.host), verdictView({ verdict: session.verdict, session, ms: session.ms }), sessionView(session)))),
    ended.length ? el("h2", {}, `Ended sessions (${ended.length})`) : "",
    ended.length ? el("table", { class: "plain", id: "ended" }, el("tbody", {}, ended.slice(-100).reverse().map((session) => el("tr", {}, el("td", { class: "faint mono" }, clock(session.time)), el("td", { class: "mono" }, session.client_id || "?"), el("td", { class: "num" }, span(session.ms)), el("td", {}, session.why ? el("span", { class: "tag bad" }, session.why) : "in order"), el("td", { class: "wide" }, session.verdict.line), el("td", {}, goto(session)))))) : "",
    el("h2", {}, `Topics (${found.topics_total})`), el("div", { class: "tree", id: "topics" }, treeView(topicTree(found.topics), state, "")));
  $("list").scrollTop = scroll;
}

async function drawControl() {
  const found = await api("/api/control");
  if (state.view !== "control" || pressed) return;
  const scroll = $("list").scrollTop;
  const peer = state.status.role === "edge" ? "connector" : "edge";
  $("list").replaceChildren(
    el("h2", {}, `Connections with the ${peer}`),
    el("table", { class: "plain", id: "links" }, el("tbody", {}, found.links.slice(-40).reverse().map((link) => el("tr", {}, el("td", { class: "faint mono" }, clock(link.time)), el("td", {}, el("span", { class: "tag" }, link.protocol), link.conn < 0 ? " not registered" : ` connection ${link.conn}`), el("td", { class: "mono" }, link.remote), el("td", { class: link.open ? "ok" : "bad" }, link.open ? `open for ${link.seconds} s` : `ended after ${link.seconds} s, ${link.error}`))))),
    el("h2", {}, "Calls"),
    el("table", { class: "plain", id: "calls" }, el("tbody", {}, found.messages.slice(-200).reverse().map((message) => el("tr", { tabindex: 0, onclick: () => attempt(() => controlDialog(message.seq)) }, el("td", { class: "faint mono" }, clock(message.time)), el("td", { class: message.out ? "out" : "in" }, `${message.out ? "→" : "←"} ${peer}`), el("td", {}, message.conn < 0 ? message.where : `${message.where}, conn ${message.conn}`), el("td", {}, el("b", {}, message.name)), el("td", { class: "url" }, message.text))))),
    el("h2", {}, "Configurations"),
    el("div", { id: "configurations" }, found.configurations.slice().reverse().map((entry) => el("details", { open: true }, el("summary", {}, `${clock(entry.time)} version ${text(entry.version)}`), entry.diff.length ? diffView(entry.diff) : el("p", { class: "faint" }, "No change."), el("details", {}, el("summary", {}, "whole"), el("pre", {}, entry.text))))),
    el("h2", {}, "Events"),
    el("table", { class: "plain", id: "events" }, el("tbody", {}, found.events.slice(-200).reverse().map((event) => el("tr", {}, el("td", { class: "faint mono" }, clock(event.time)), el("td", {}, event.fields.message || event.event), el("td", { class: "faint url" }, Object.entries(event.fields).filter(([key]) => !["message", "level"].includes(key)).map(([key, value]) => `${key}=${typeof value === "object" ? JSON.stringify(value) : value}`).join(" ")))))));
  $("list").scrollTop = scroll;
}

async function controlDialog(seq) {
  const message = await api(`/api/control/${seq}`);
  dialog(`${message.name} (${message.where})`, hexView(message.hex), message.value ? el("pre", {}, JSON.stringify(message.value, null, 2)) : "");
}

async function drawWire() {
  const { links } = await api("/api/control?after=9007199254740990");
  if (!links.some((link) => link.id === state.link)) state.link = links.length ? links[links.length - 1].id : null;
  const found = state.link === null ? null : await api(`/api/links/${state.link}/frames?limit=300${state.noPayload ? "&payload=0" : ""}`);
  if (state.view !== "wire" || pressed) return;
  const scroll = $("list").scrollTop;
  const rows = found ? found.frames.slice().reverse().map((frame) => el("tr", { tabindex: 0, "data-frame": frame.seq, onclick: () => dialog(`${frame.kind} on stream ${frame.stream}`, el("p", { class: "url" }, frame.text), el("p", { class: "faint" }, frame.kind === "DATA" || frame.kind.startsWith("STREAM") ? "Payload belongs to a stream: see its page, where secrets are masked." : ""), hexView(frame.hex.map(([at, raw, plain]) => [at, raw, "", plain]))) }, el("td", { class: "num faint" }, frame.at.toFixed(3)), el("td", { class: frame.out ? "out" : "in" }, frame.out ? "→" : "←"), el("td", {}, el("b", {}, frame.kind)), el("td", { class: "num" }, frame.stream), el("td", { class: "num" }, size(frame.length)), el("td", { class: "url mono" }, frame.text.slice(0, 300)))) : [];
  $("list").replaceChildren(
    el("div", { class: "bar" }, el("select", { id: "link", "aria-label": "Link", onchange: (event) => { state.link = Number(event.target.value); attempt(drawWire); } }, links.slice().reverse().map((link) => el("option", { value: link.id, selected: link.id === state.link }, `${link.protocol} ${link.conn < 0 ? "" : `connection ${link.conn} `}to ${link.remote}${link.open ? "" : " (ended)"}`))), el("label", {}, el("input", { type: "checkbox", id: "no-payload", checked: state.noPayload, onchange: (event) => { state.noPayload = event.target.checked; event.target.blur(); attempt(drawWire); } }), " without payload"), found ? el("span", { class: "faint" }, Object.entries(found.link.frames).map(([name, count]) => `${name} ${count}`).join(", ")) : "No link yet."),
    el("table", { id: "wire" }, el("thead", {}, el("tr", {}, ["Seconds", "", "Frame", "Stream", "Size", "Meaning"].map((name) => el("th", {}, name)))), el("tbody", {}, rows)));
  $("list").scrollTop = scroll;
}

function drawDecode() {
  const output = el("div", { id: "decoded" });
  const forms = ["auto", ...(state.status.forms || [])];
  $("list").replaceChildren(el("h2", {}, "Decode bytes"), el("textarea", { id: "bytes", placeholder: "Hex or base64", "aria-label": "Bytes" }), el("p", {}, el("select", { id: "form", "aria-label": "Form" }, forms.map((form) => el("option", {}, form))), " ", el("button", { id: "decode", onclick: () => attempt(async () => { const found = await api("/api/decode", { text: $("bytes").value, form: $("form").value }); output.replaceChildren(el("h3", {}, `${found.form}, ${found.size} bytes`), hexView(found.hex), el("pre", {}, JSON.stringify(found.value, null, 2))); }) }, "Decode")), output);
}

async function drawFaults() {
  const found = await api("/api/faults");
  if (state.view !== "faults" || $("list").querySelector("#fault:focus")) return;
  const change = (order) => attempt(async () => { await api("/api/faults", order); await drawFaults(); });
  const written = $("fault") ? $("fault").value : "";
  $("list").replaceChildren(el("h2", {}, "Faults of the dev edge"),
    el("form", { class: "bar", onsubmit: (event) => { event.preventDefault(); const value = $("fault").value; $("fault").value = ""; document.activeElement.blur(); change({ add: value }); } }, el("input", { id: "fault", type: "search", placeholder: "delay:200ms", "aria-label": "Fault", value: written }), el("button", { id: "add-fault" }, "Switch on"), el("button", { type: "button", id: "clear-faults", onclick: () => change({ clear: "" }) }, "All off")),
    el("table", { class: "plain", id: "faults" }, el("tbody", {}, found.active.map((fault) => el("tr", {}, el("td", { class: "mono" }, fault), el("td", {}, el("button", { onclick: () => change({ clear: fault }) }, "Off")))))),
    el("h3", {}, "What there is"), el("pre", { class: "hex" }, found.grammar));
}

// --- keys, tools -----------------------------------------------------------------------------------------------------

function move(step) {
  const rows = [...document.querySelectorAll("#list tbody tr[tabindex]")];
  if (!rows.length) return;
  const at = rows.indexOf(document.activeElement);
  rows[Math.max(0, Math.min(rows.length - 1, at < 0 ? 0 : at + step))].focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape") { if ($("dialog").open) return; if (typing) event.target.blur(); else closeDetail(); return; }
  if (typing) { if (event.key === "ArrowDown" && event.target.id === "filter") { event.preventDefault(); event.target.blur(); move(0); } return; }
  if (event.key === "Enter" && event.target.matches("tr[tabindex]")) { event.target.click(); return; }
  if ($("dialog").open) return;
  const number = Number(event.key);
  const tabs = [...$("views").children];
  if (number >= 1 && number <= tabs.length) return tabs[number - 1].click();
  if (event.key === "j" || event.key === "ArrowDown") { event.preventDefault(); move(1); }
  if (event.key === "k" || event.key === "ArrowUp") { event.preventDefault(); move(-1); }
  if (event.key === "/") { event.preventDefault(); if (state.view !== "streams") show("streams"); $("filter").focus(); }
  if (event.key === "r") $("replay")?.click();
  if (event.key === "p") $("pause")?.click();
  if (event.key === "t") $("theme").click();
  if (event.key === "?") help();
});

function help() {
  const keys = [["j k ↓ ↑", "next, previous row"], ["Enter", "open"], ["Esc", "close"], ["/", "filter"], ["1 … 6", "views"], ["r", "replay the open request"], ["p", "pause the list"], ["t", "theme"]];
  dialog("Keys and filters", el("dl", {}, keys.flatMap(([key, meaning]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, meaning)])), el("h3", {}, "Filter"), el("pre", {}, "status>=500 host:api              both\nmethod=POST or kind=websocket     either\nnot (path:/health)                the others\nmqtt:sensor  ms>1000  how~reset   client id, duration, regular expression\n\nNames: method host path url status ms up down rule service kind transport conn client ray how mqtt id error frames source"));
}

function applyTheme() { const theme = localStorage.getItem("theme"); if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme; $("theme").textContent = theme ? (theme === "dark" ? "Dark" : "Light") : "Auto"; }

$("theme").onclick = () => { const next = { "": "light", light: "dark", dark: "" }[localStorage.getItem("theme") || ""]; if (next) localStorage.setItem("theme", next); else localStorage.removeItem("theme"); applyTheme(); };
$("help").onclick = help;
$("clear").onclick = () => attempt(async () => { await api("/api/clear", {}); closeDetail(); });
$("capture").onclick = () => attempt(async () => { if (state.status.capture) await api("/api/capture", { stop: true }); else notice(`Capturing to ${(await api("/api/capture", {})).path}`); });
$("export").onchange = (event) => { const form = event.target.value; event.target.value = ""; if (form) attempt(async () => { const response = await fetch(`/api/export?format=${form}`, { headers: { "X-Inspector-Token": token } }); if (!response.ok) throw new Error((await response.json()).error); const link = el("a", { href: URL.createObjectURL(await response.blob()), download: `capture.${form}` }); link.click(); setTimeout(() => URL.revokeObjectURL(link.href), 10000); }); };
$("file").onchange = (event) => attempt(async () => { if (event.target.files[0]) await api("/api/open", event.target.files[0]); });

applyTheme();
const wanted = location.hash.slice(1);
if (VIEWS.some(([name]) => name === wanted)) state.view = wanted;
drawTabs(); refresh(); connectLive();
setInterval(() => {
  if (document.hidden || state.paused || pressed || $("dialog").open) return;
  if (state.view === "streams") { const row = state.rows.get(state.picked); if (row && (row.ms === null || !drawDetail.done)) { drawDetail.done = row.ms !== null; drawDetail(false); } }
  else if (["mqtt", "control", "wire"].includes(state.view) && !$("list").contains(document.activeElement)) refresh();
}, 1000);
