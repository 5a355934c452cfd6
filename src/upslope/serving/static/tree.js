// A conversation is a tree: a message may have several successors, of which one is shown. Nothing here touches the page.

import { newId } from "./dom.js";

/** An empty conversation. Its nodes are kept by id; "root" is above the first message. */
export function newConversation() {
  return { id: newId(), created: Date.now(), updated: Date.now(), nodes: { root: { id: "root", children: [], shown: 0 } } };
}

/** Add a message below `parent` and show it. Returns its node. */
export function add(conversation, parent, message) {
  const node = { id: newId(), parent: parent.id, children: [], shown: 0, created: Date.now(), ...message };
  conversation.nodes[node.id] = node;
  parent.children.push(node.id);
  parent.shown = parent.children.length - 1;
  conversation.updated = node.created;
  return node;
}

/** The node above. */
export function parentOf(conversation, node) {
  return conversation.nodes[node.parent];
}

/** The shown messages from the first to the last, below `from` (default: all). */
export function path(conversation, from = conversation.nodes.root) {
  const nodes = [];
  for (let node = from; node.children.length; ) {
    node = conversation.nodes[node.children[node.shown]];
    nodes.push(node);
  }
  return nodes;
}

/** The node's place among its alternatives, from 0, and their number. */
export function place(conversation, node) {
  const { children } = parentOf(conversation, node);
  return { index: children.indexOf(node.id), count: children.length };
}

/** Show the alternative `step` places further; stays within the ends. Returns the node now shown. */
export function turn(conversation, node, step) {
  const parent = parentOf(conversation, node);
  const { index, count } = place(conversation, node);
  parent.shown = Math.min(count - 1, Math.max(0, index + step));
  return conversation.nodes[parent.children[parent.shown]];
}

/** Show this node among its alternatives. */
export function show(conversation, node) {
  parentOf(conversation, node).shown = place(conversation, node).index;
}

/** The messages, as the API takes them, that lead to `node` (itself included), behind the system prompt if any. */
export function messagesTo(conversation, node, system = "") {
  const messages = [];
  for (let at = node; at.id !== "root"; at = parentOf(conversation, at)) {
    messages.unshift({ role: at.role, content: at.content });
  }
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** The first words of the first message, or "" while there is none. */
export function titleOf(conversation) {
  const [first] = path(conversation);
  return first ? first.content.trim().slice(0, 80).replace(/\s+/g, " ") : "";
}

/** True for what `newConversation` and `add` build: every id leads to a node and every node to its parent. */
export function isConversation(value) {
  const nodes = value?.nodes;
  if (typeof value?.id !== "string" || !nodes?.root || typeof nodes !== "object") return false;
  let links = 0;
  for (const [id, node] of Object.entries(nodes)) {
    if (node?.id !== id || !Array.isArray(node.children) || !Number.isInteger(node.shown)) return false;
    if (node.children.length && !nodes[node.children[node.shown]]) return false;
    if (!node.children.every((child) => nodes[child]?.parent === id)) return false;
    if (id !== "root" && (typeof node.content !== "string" || !["user", "assistant"].includes(node.role))) return false;
    links += node.children.length;
  }
  return links === Object.keys(nodes).length - 1;
}
