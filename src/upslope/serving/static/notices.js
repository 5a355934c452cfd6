// What the page says beside the conversation: to assistive technology, for a few seconds, and when it needs a key.

import { el } from "./dom.js";
import { apiKey } from "./store.js";

const SECONDS = 8;
const $ = (id) => document.getElementById(id);
let timer = 0;

/** Have `text` read out once, when the reader pauses. A reply is read when it has ended, not while it grows. */
export function announce(text) {
  $("status").replaceChildren(el("p", {}, text));
}

/** Show `text` for a while, with a button `label` that does `act`. */
export function toast(text, label, act) {
  const pressed = () => {
    $("toast").hidden = true;
    act();
  };
  $("toast").replaceChildren(el("span", {}, text), label ? el("button", { type: "button", class: "text", onclick: pressed }, label) : "");
  $("toast").hidden = false;
  clearTimeout(timer);
  timer = setTimeout(() => ($("toast").hidden = true), SECONDS * 1000);
}

/** The key that the reader types, or null; `wrong`: an earlier one was refused. Asks once for all who wait. */
export function askForKey(wrong) {
  const dialog = $("key");
  const asked = dialog.open;
  if (!asked) {
    $("key-wrong").hidden = !wrong;
    dialog.showModal();
  }
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(asked ? apiKey() : typed()), { once: true });
  });
}

let accepted = false;

function typed() {
  const key = accepted ? $("key-input").value : null;
  accepted = false;
  $("key-input").value = "";
  return key;
}

/** The buttons of the key's dialog. To be called once. */
export function startKeyDialog() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    accepted = true;
    $("key").close();
  });
  $("key-cancel").addEventListener("click", () => $("key").close());
}
