// The conversation on the page: turns, their actions, and the reply that is being written.

import { el, icon, iconButton } from "./dom.js";
import { Rendering, appendText } from "./markdown.js";
import { duelView, isOpen } from "./duel.js";
import { t } from "./strings.js";
import { TokenView, legend, named, percent, summary } from "./tokens.js";
import { path, place } from "./tree.js";

/** Shows one conversation in `container`. `actions` is what its buttons do; see app.js. */
export class Thread {
  constructor(container, actions) {
    this.container = container;
    this.actions = actions;
    this.bodies = new Map(); // of the shown replies, by node id
    this.dirty = new Set();
    this.probabilities = false;
    this.running = false; // while a reply is being written nothing can be edited
    this.score = null; // what is shown below a vote
    this.editing = null; // {id, text} of the message in the editor
  }

  /** Build the page anew for `conversation`; the focus goes back to the control it was on. */
  show(conversation) {
    const focus = focusOf(this.container);
    const follow = conversation === this.conversation && atBottom();
    this.conversation = conversation;
    this.bodies.clear();
    const turns = [];
    for (const node of path(conversation)) {
      if (isOpen(conversation, node)) turns.push(duelView(this, conversation, node));
      else turns.push(node.role === "user" ? this.asked(node) : this.replied(node));
    }
    this.container.replaceChildren(...turns);
    this.container.classList.toggle("wide", Boolean(this.container.querySelector(".duel")));
    refocus(this.container, focus);
    if (follow) toBottom();
  }

  /** Show what was added to a reply, once per frame. */
  touch(node) {
    if (!this.bodies.has(node.id)) return;
    if (!this.dirty.size) requestAnimationFrame(() => this.flush());
    this.dirty.add(node);
  }

  flush() {
    const follow = atBottom();
    for (const node of this.dirty) this.bodies.get(node.id)?.(node);
    this.dirty.clear();
    if (follow) toBottom();
  }

  asked(node) {
    const turn = el("article", { class: "turn user", "data-node": node.id }, el("h2", { class: "unseen" }, t("you")));
    if (this.editing?.id === node.id) turn.append(this.editor(node, t("save_send"), t("branch_hint")));
    else {
      const text = el("div", { class: "asked" });
      appendText(text, node.content);
      text.dir = "auto";
      const actions = [this.siblings(node), this.copy(node), this.edit(node)].filter(Boolean);
      turn.append(text, el("div", { class: "actions" }, ...actions));
    }
    return turn;
  }

  replied(node) {
    return el(
      "article",
      { class: "turn assistant", "data-node": node.id, "aria-busy": node.state === "streaming" ? "true" : null },
      ...this.replyParts(node),
    );
  }

  /** Who replied, the reply or its editor, what is known about it, and what can be done with it. */
  replyParts(node) {
    const who = el("h2", { class: "who" }, el("bdi", {}, node.model));
    if (this.editing?.id === node.id) return [who, this.editor(node, t("save"), t("edit_hint"))];
    const streaming = node.state === "streaming";
    const actions = el("div", { class: "actions" }, isOpen(this.conversation, node) ? null : this.siblings(node));
    if (!streaming) {
      const empty = !node.content.trim();
      actions.append(
        ...[this.regenerate(node), empty ? null : this.copy(node), this.edit(node)].filter(Boolean),
        ...(empty || node.edited ? [] : [this.thumb(node, true), this.thumb(node, false)]),
      );
    }
    return [who, this.reply(node), this.meta(node), actions];
  }

  /** The text of a reply, as tokens or as Markdown; registered so that `touch` finds it. */
  reply(node) {
    const tokens = this.probabilities && !node.edited && (node.tokens?.length || node.state === "streaming");
    const body = el("div", { class: tokens ? "reply tokens" : "reply", "data-state": node.state ?? null });
    const box = el("div", {}, body);
    const rendering = tokens ? new TokenView(body) : new Rendering(body);
    const update = (changed) => rendering.update(tokens ? (changed.tokens ?? []) : changed.content);
    update(node);
    this.bodies.set(node.id, update);
    if (!node.content && !node.state && !node.error) body.append(el("p", { class: "muted" }, t("empty_reply")));
    if (tokens && node.tokens?.length && !node.state) box.append(figures(node.tokens));
    if (this.probabilities && !tokens && !node.edited) box.append(el("p", { class: "note" }, t("no_probabilities")));
    if (node.error) box.append(el("p", { class: "problem" }, t("failed", { message: node.error })));
    return box;
  }

  meta(node) {
    const parts = [];
    if (node.edited) parts.push(t("edited"));
    if (node.version !== undefined && !node.edited) parts.push(t("weights", { version: node.version }));
    if (node.count) parts.push(t("count_tokens", { count: node.count }));
    if (node.rate) parts.push(t("rate", { rate: node.rate < 10 ? node.rate.toFixed(1) : Math.round(node.rate) }));
    if (node.seed !== undefined && !node.edited) parts.push(t("seed_used", { seed: node.seed }));
    if (["length", "cancelled", "tool_calls"].includes(node.finish)) parts.push(t(`finish_${node.finish}`));
    const spans = parts.map((part) => el("span", {}, part));
    if (node.duel?.preferred) spans.push(el("span", { class: "preferred" }, t("preferred")));
    return spans.length ? el("p", { class: "meta" }, ...spans) : null;
  }

  siblings(node) {
    const { index, count } = place(this.conversation, node);
    if (count < 2) return null;
    const step = (by, name, label) =>
      iconButton(name, label, () => this.actions.turn(node, by), {
        "data-do": name,
        "aria-disabled": index + by < 0 || index + by >= count ? "true" : null,
      });
    return el(
      "div",
      { class: "siblings" },
      step(-1, "left", t("previous")),
      el("span", { "aria-label": t("of", { index: index + 1, count }), role: "img" }, `${index + 1}/${count}`),
      step(1, "right", t("next")),
    );
  }

  copy(node) {
    if (!navigator.clipboard) return null; // only where the browser calls the connection secure
    return iconButton("copy", t("copy"), () => this.actions.copy(node), { "data-do": "copy" });
  }

  regenerate(node) {
    if (this.running) return null;
    return iconButton("again", t("regenerate"), () => this.actions.regenerate(node), { "data-do": "regenerate" });
  }

  edit(node) {
    if (this.running) return null;
    return iconButton("edit", t("edit"), () => this.startEditing(node), { "data-do": "edit" });
  }

  thumb(node, label) {
    const given = node.label === label;
    return iconButton(label ? "up" : "down", t(label ? "good" : "bad"), () => this.actions.thumb(node, given ? null : label), {
      "aria-pressed": String(given),
      "data-do": label ? "up" : "down",
    });
  }

  startEditing(node) {
    this.editing = { id: node.id, text: node.content };
    this.show(this.conversation);
    const field = this.container.querySelector(".editor textarea");
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  stopEditing(node) {
    this.editing = null;
    this.show(this.conversation);
    this.container.querySelector(`[data-node="${node.id}"] [data-do="edit"]`)?.focus();
  }

  editor(node, save, hint) {
    const field = el("textarea", { dir: "auto", rows: 2, "aria-label": t("edit_label"), "data-do": "editor" });
    field.value = this.editing.text;
    field.addEventListener("input", () => (this.editing.text = field.value));
    const submit = async (event) => {
      event.preventDefault();
      if (!field.value.trim() || (node.role === "assistant" && field.value === node.content)) return;
      await this.actions.edit(node, field.value);
    };
    const key = (event) => {
      if (event.key === "Escape") {
        event.preventDefault();
        this.stopEditing(node);
      }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) submit(event);
    };
    return el(
      "form",
      { class: "editor", onsubmit: submit, onkeydown: key },
      field,
      el("p", { class: "hint" }, hint),
      el(
        "div",
        { class: "buttons" },
        el("button", { type: "button", onclick: () => this.stopEditing(node) }, t("cancel")),
        el("button", { type: "submit", class: "primary" }, save),
      ),
    );
  }
}

/** What an empty conversation shows; `start(text)` sends one of the examples. */
export function welcome(model, blind, start) {
  const title = el("p", { class: "title" });
  const [before, after] = t(blind ? "welcome_blind" : "welcome", { model: "\u0000" }).split("\u0000");
  title.append(before);
  if (after !== undefined) title.append(el("bdi", {}, model), after);
  return el(
    "div",
    { class: "welcome" },
    icon("mark"),
    title,
    el("p", { class: "muted" }, t(blind ? "welcome_blind_hint" : "welcome_hint")),
    el(
      "ul",
      {},
      ...["try_1", "try_2", "try_3"].map((name) =>
        el("li", {}, el("button", { type: "button", onclick: () => start(t(name)) }, t(name))),
      ),
    ),
  );
}

/** Show the end of the page. */
export function toBottom() {
  scrollTo({ top: document.documentElement.scrollHeight });
}

function atBottom() {
  return document.documentElement.scrollHeight - innerHeight - scrollY < 120;
}

function figures(tokens) {
  const { perplexity, least } = summary(tokens);
  const token = el("bdi", {});
  const [before, after] = t("least", { token: "\u0000", percent: percent(Math.exp(least[1])) }).split("\u0000");
  appendText(token, named(least[0].slice(0, 32)));
  return el(
    "div",
    { class: "figures" },
    el("p", {}, el("span", {}, t("perplexity", { value: perplexity.toPrecision(3) })), el("span", {}, before, token, after)),
    legend(),
  );
}

function focusOf(container) {
  const active = document.activeElement;
  if (!container.contains(active)) return null;
  return { node: active.closest("[data-node]")?.dataset.node, action: active.dataset.do };
}

function refocus(container, focus) {
  if (!focus?.node || !focus.action) return;
  const find = (selector) => container.querySelector(selector);
  const own = find(`[data-node="${focus.node}"] [data-do="${focus.action}"]`);
  own?.focus({ preventScroll: true });
}
