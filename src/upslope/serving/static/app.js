// The page: what its parts have in common, and what happens when the reader does something.

import { json, onUnauthorized } from "./api.js";
import { el, icon, newId } from "./dom.js";
import { scoreLine, shuffled, voteBody } from "./duel.js";
import { describe, generate } from "./generate.js";
import { announce, askForKey, startKeyDialog, toast } from "./notices.js";
import { Panel, isNarrow } from "./panels.js";
import { showSaved } from "./saved.js";
import { Settings } from "./settings.js";
import { download, showList } from "./sidebar.js";
import * as store from "./store.js";
import { language, preferred, setLanguage, t } from "./strings.js";
import { startCard } from "./tokens.js";
import * as tree from "./tree.js";
import { Thread, toBottom, welcome } from "./view.js";

const $ = (id) => document.getElementById(id);
const state = { models: [], conversation: null, conversations: [], blind: false, running: null, deleted: null };

const thread = new Thread($("thread"), { regenerate, turn, copy, edit, thumb, vote, skip });
const settings = new Settings(showModel);
const conversations = Panel.of("conversations", "open-conversations", (open) => store.remember("sidebar", open));
Panel.of("settings", "open-settings", (open) => open && loadSaved());

// --- replies

async function send(text) {
  const above = tree.path(state.conversation).at(-1) ?? state.conversation.nodes.root;
  await reply(tree.add(state.conversation, above, { role: "user", content: text }));
}

async function reply(above) {
  const models = state.blind ? shuffled(state.models) : [settings.model];
  const id = newId();
  const nodes = models.map((model) => {
    const duel = state.blind ? { duel: { id } } : {};
    return tree.add(state.conversation, above, { role: "assistant", content: "", model, ...duel });
  });
  await run(state.conversation, nodes);
}

async function run(conversation, nodes) {
  const controller = new AbortController();
  state.running = { conversation, controller };
  for (const node of nodes) node.state = "streaming";
  keep(conversation);
  store.remember("open", conversation.id);
  refresh();
  toBottom();
  announce(t("generating"));
  const { signal } = controller;
  const values = { ...settings.values };
  await Promise.all(nodes.map((node) => generate(conversation, node, values, { signal, touched: () => thread.touch(node) })));
  state.running = null;
  keep(conversation);
  refresh();
  announce(nodes.map((node) => (node.error ? t("failed", { message: node.error }) : t("finished", { text: clipped(node.content) }))).join(" "));
}

function clipped(text) {
  return text.length > 400 ? `${text.slice(0, 400)}…` : text || t("empty_reply");
}

// --- what the buttons of the conversation do

async function regenerate(node) {
  if (state.running || refused()) return;
  const above = tree.parentOf(state.conversation, node);
  await run(state.conversation, [tree.add(state.conversation, above, { role: "assistant", content: "", model: settings.model })]);
}

function turn(node, step) {
  const shown = tree.turn(state.conversation, node, step);
  keep(state.conversation);
  refresh();
  const button = $("thread").querySelector(`[data-node="${shown.id}"] [data-do="${step < 0 ? "left" : "right"}"]`);
  button?.focus({ preventScroll: true });
}

async function copy(node) {
  await navigator.clipboard.writeText(node.content);
  toast(t("copied"));
}

/** A user's message becomes a new branch; a reply becomes one that is preferred to it. */
async function edit(node, text) {
  if (state.running || refused()) return;
  const { conversation } = state;
  const above = tree.parentOf(conversation, node);
  if (node.role === "user") {
    thread.editing = null;
    await reply(tree.add(conversation, above, { role: "user", content: text }));
    return;
  }
  const id = newId();
  const judged = { id, messages: tree.messagesTo(conversation, above, node.system) };
  const about = { model: node.model ?? "", weight_version: node.version ?? null };
  if (!(await saved("feedback/edit", { ...judged, original: node.content, edited: text, ...about }))) return;
  thread.editing = null;
  const { model, version, system } = node;
  tree.add(conversation, above, { id, role: "assistant", content: text, model, version, system, edited: true });
  keep(conversation);
  refresh();
}

async function thumb(node, label) {
  const { conversation } = state;
  const messages = tree.messagesTo(conversation, tree.parentOf(conversation, node), node.system);
  const about = { model: node.model, weight_version: node.version ?? null };
  if (!(await saved("feedback/thumb", { id: node.id, messages, reply: node.content, label, ...about }))) return;
  node.label = label;
  keep(conversation);
  refresh();
}

async function vote(sides, winner) {
  const { conversation } = state;
  const messages = tree.messagesTo(conversation, tree.parentOf(conversation, sides[0]), sides[0].system);
  const answer = await saved("feedback/vote", voteBody(messages, sides, winner));
  if (!answer) return;
  thread.score = scoreLine(answer.tally, sides.map(({ model }) => model));
  settle(conversation, sides, winner);
}

function skip(sides) {
  thread.score = null;
  settle(state.conversation, sides, null, "skipped");
}

function settle(conversation, sides, winner, word = "tie") {
  sides.forEach((side, index) => {
    side.duel = { id: side.duel.id, winner: winner === null ? word : sides[winner].model, preferred: index === winner };
  });
  tree.show(conversation, sides[winner ?? 0]);
  keep(conversation);
  refresh();
  $("message").focus();
}

/** The server's answer once the feedback is saved; null, with the reason on the page, when it is not. */
async function saved(path, body) {
  try {
    const answer = await json(path, body);
    if (!$("settings").hidden) loadSaved();
    return answer;
  } catch (error) {
    toast(t("not_saved", { message: describe(error) }));
    return null;
  }
}

// --- the parts around the conversation

function refresh() {
  const { conversation, running } = state;
  const pending = tree.path(conversation).at(-1);
  const undecided = Boolean(pending?.duel && !pending.duel.winner && !running);
  thread.running = Boolean(running);
  thread.show(conversation);
  if (!tree.path(conversation).length) $("thread").append(welcome(settings.model, state.blind, (text) => submit(text)));
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = undecided;
  $("hint").textContent = undecided ? t("vote_first") : t("keys_hint");
  document.title = `${tree.titleOf(conversation) || t("new_conversation")} · upslope`;
  showConversations();
  showModel();
}

function showModel() {
  const last = tree.path(state.conversation).findLast((node) => node.model === settings.model && node.version !== undefined);
  const name = el("bdi", {}, settings.model);
  const version = last ? el("span", {}, t("weights", { version: last.version })) : null;
  $("model").replaceChildren(...(state.blind ? [t("blind")] : [name, ...(version ? [version] : [])]));
  for (const button of $("mode").children) {
    button.setAttribute("aria-pressed", String((button.dataset.mode === "blind") === state.blind));
  }
}

function showConversations() {
  const { conversation } = state;
  const others = state.conversations.filter((other) => other.id !== conversation.id);
  const listed = tree.path(conversation).length ? [conversation, ...others] : others;
  listed.sort((a, b) => b.updated - a.updated);
  showList($("list"), listed, conversation.id, { open, remove });
}

function open(conversation) {
  thread.editing = null;
  state.conversation = conversation;
  store.remember("open", conversation.id);
  if (isNarrow()) conversations.set(false);
  refresh();
  toBottom();
}

function start() {
  open(tree.newConversation());
  $("message").focus();
}

function remove(conversation) {
  if (state.running?.conversation === conversation) state.running.controller.abort();
  store.remove(conversation);
  state.deleted = conversation.id;
  state.conversations = state.conversations.filter((other) => other.id !== conversation.id);
  if (state.conversation.id === conversation.id) open(tree.newConversation());
  else showConversations();
  toast(t("deleted"), t("undo"), () => {
    state.deleted = null;
    keep(conversation);
    open(conversation);
  });
}

function keep(conversation) {
  if (conversation.id === state.deleted) return; // its reply was still being written
  state.conversations = [...state.conversations.filter(({ id }) => id !== conversation.id), conversation];
  if (!store.save(conversation)) toast(t("storage_full"));
}

function loadSaved() {
  return showSaved($("saved-body"), state.models);
}

// --- the message box

/** True, with the reason on the page, where a setting is out of range or a vote is due. */
function refused() {
  const invalid = settings.invalid();
  if (!invalid) return false;
  Panel.all[1].set(true);
  invalid.focus();
  return true;
}

function submit(text = $("message").value) {
  if (!text.trim() || state.running || $("send").disabled || !state.models.length || refused()) return;
  $("message").value = "";
  grow();
  send(text.trim());
}

function grow() {
  const box = $("message");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function stop() {
  state.running?.controller.abort();
  $("message").focus();
}

// --- the start

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("message").addEventListener("input", grow);
  $("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return; // Enter ends the input of a Chinese word
    event.preventDefault();
    submit();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.running && !event.defaultPrevented) stop();
  });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", start);
  $("export").addEventListener("click", () => download(state.conversation, settings.values.system));
  $("probabilities").addEventListener("click", (event) => {
    thread.probabilities = !thread.probabilities;
    event.currentTarget.setAttribute("aria-pressed", String(thread.probabilities));
    store.remember("probabilities", thread.probabilities);
    refresh();
  });
  for (const button of $("mode").children) {
    button.addEventListener("click", () => {
      state.blind = button.dataset.mode === "blind";
      store.remember("blind", state.blind);
      refresh();
    });
  }
  for (const button of document.querySelectorAll("[data-language]")) {
    button.addEventListener("click", () => speak(button.dataset.language));
  }
  addEventListener("pagehide", () => state.running && keep(state.running.conversation));
  store.onOtherTab(() => {
    state.conversations = store.conversations();
    showConversations();
  });
}

function speak(tag) {
  store.remember("language", tag);
  setLanguage(tag);
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language()));
  }
  settings.build();
  refresh();
  if (!$("settings").hidden) loadSaved();
}

async function loadModels() {
  try {
    state.models = (await json("v1/models")).data.map(({ id }) => id);
  } catch (error) {
    $("thread").prepend(el("p", { class: "problem" }, describe(error)));
    return;
  }
  settings.models(state.models, state.models[0]);
  $("mode").hidden = state.models.length !== 2;
  state.blind = state.models.length === 2 && store.recall("blind", false);
  refresh();
}

function restore() {
  state.conversations = store.conversations();
  for (const conversation of state.conversations) {
    for (const node of Object.values(conversation.nodes)) {
      if (node.state === "streaming") Object.assign(node, { state: undefined, finish: "cancelled" });
    }
  }
  const last = store.recall("open", null);
  state.conversation = state.conversations.find(({ id }) => id === last) ?? tree.newConversation();
  thread.probabilities = store.recall("probabilities", false);
  $("probabilities").setAttribute("aria-pressed", String(thread.probabilities));
}

for (const button of document.querySelectorAll("[data-icon]")) button.prepend(icon(button.dataset.icon));
onUnauthorized(askForKey);
restore();
listen();
startCard();
startKeyDialog();
speak(store.recall("language", preferred()));
if (!isNarrow()) conversations.set(store.recall("sidebar", true));
await loadModels();
$("message").focus();
