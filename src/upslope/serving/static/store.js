// What survives a reload: conversations, settings and small choices in localStorage; the API key for this tab only.

import { isConversation } from "./tree.js";

const CHAT = "upslope.chat.";
const KEY = "upslope.key";

/** Every readable conversation, the latest first. An entry that is not one is left alone and not shown. */
export function conversations() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const name = localStorage.key(i);
    if (!name.startsWith(CHAT)) continue;
    const value = parsed(localStorage.getItem(name));
    if (isConversation(value)) found.push(value);
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/** Save one conversation. Out of space, the probabilities of the others are given up, the oldest first; false: no room. */
export function save(conversation) {
  const text = JSON.stringify(conversation);
  if (written(CHAT + conversation.id, text)) return true;
  for (const other of conversations().reverse()) {
    if (other.id === conversation.id) continue;
    const nodes = Object.values(other.nodes);
    if (!nodes.some((node) => node.tokens)) continue;
    for (const node of nodes) delete node.tokens;
    written(CHAT + other.id, JSON.stringify(other));
    if (written(CHAT + conversation.id, text)) return true;
  }
  return false;
}

/** Delete a conversation. */
export function remove(conversation) {
  localStorage.removeItem(CHAT + conversation.id);
}

/** A small choice by name, or `otherwise`. */
export function recall(name, otherwise) {
  return parsed(localStorage.getItem(`upslope.${name}`)) ?? otherwise;
}

/** Remember a small choice. */
export function remember(name, value) {
  written(`upslope.${name}`, JSON.stringify(value));
}

/** The API key given in this tab, or null. */
export function apiKey() {
  return sessionStorage.getItem(KEY);
}

/** Keep the API key until the tab is closed. */
export function setApiKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Call `changed` when another tab saves or deletes a conversation. */
export function onOtherTab(changed) {
  addEventListener("storage", (event) => {
    if (event.storageArea === localStorage && (event.key === null || event.key.startsWith(CHAT))) changed();
  });
}

function written(name, text) {
  try {
    localStorage.setItem(name, text);
    return true;
  } catch {
    return false; // the quota is used up
  }
}

function parsed(text) {
  try {
    return text === null ? null : JSON.parse(text);
  } catch {
    return null;
  }
}
