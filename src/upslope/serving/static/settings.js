// The sampling settings: a form made from one table, remembered in the browser.

import { el } from "./dom.js";
import { recall, remember } from "./store.js";
import { t } from "./strings.js";

// `slider`: the upper end of the slider, where there is one. `empty`: what an empty field (null) is called.
const FIELDS = [
  { name: "temperature", min: 0, max: 5, slider: 2, step: 0.05, value: 0.7 },
  { name: "top_p", min: 0.01, max: 1, slider: 1, step: 0.01, value: 0.95 },
  { name: "min_p", min: 0, max: 1, slider: 1, step: 0.01, value: 0 },
  { name: "top_k", min: 0, max: 100000, step: 1, value: 0 },
  { name: "max_tokens", min: 1, max: 1000000, step: 1, value: 512, empty: "all_that_fit" },
  { name: "seed", min: 0, max: 2 ** 31 - 1, step: 1, value: null, empty: "random" },
];

const DEFAULTS = { system: "", logprobs: true, ...Object.fromEntries(FIELDS.map(({ name, value }) => [name, value])) };

/** The form `#sampling`; `changed()` is called after each change that is in range. */
export class Settings {
  constructor(changed) {
    this.form = document.getElementById("sampling");
    this.values = { ...DEFAULTS, ...within(recall("settings", {})) };
    this.form.addEventListener("input", (event) => {
      this.input(event.target);
      changed();
    });
    this.form.addEventListener("submit", (event) => event.preventDefault());
    document.getElementById("defaults").addEventListener("click", () => {
      this.values = { ...DEFAULTS };
      remember("settings", this.values);
      this.build();
    });
  }

  /** (Re)build the fields in the present language. */
  build() {
    document.getElementById("fields").replaceChildren(...FIELDS.map((field) => this.field(field)));
    this.form.elements.system.value = this.values.system;
    this.form.elements.logprobs.checked = this.values.logprobs;
  }

  /** Offer several models, or none to choose from. */
  models(names, chosen) {
    const select = this.form.elements.model;
    select.replaceChildren(...names.map((name) => el("option", { value: name, selected: name === chosen }, name)));
    document.getElementById("model-field").hidden = names.length < 2;
  }

  get model() {
    return this.form.elements.model.value;
  }

  /** The first field that is out of range, or null. */
  invalid() {
    return this.form.querySelector('[aria-invalid="true"]');
  }

  field({ name, min, max, step, slider, empty }) {
    const label = t(name);
    const value = this.values[name] ?? "";
    const hint = el("p", { class: "hint", id: `h-${name}` }, t(`${name}_hint`));
    const number = el("input", {
      type: "number", id: `s-${name}`, name, min, max, step, value, inputmode: "decimal",
      "aria-describedby": `h-${name}`, placeholder: empty ? t(empty) : null,
    });
    const range = slider && el("input", { type: "range", "data-for": name, min, max: slider, step, value, "aria-label": label });
    return el("div", { class: "field" }, el("label", { for: `s-${name}` }, label), number, range, hint);
  }

  input(target) {
    if (target.name === "system") this.values.system = target.value;
    else if (target.name === "logprobs") this.values.logprobs = target.checked;
    else if (target.dataset.for) {
      const number = this.form.elements[target.dataset.for];
      number.value = target.value;
      this.number(number);
    } else if (target.type === "number") {
      this.number(target);
      const range = this.form.querySelector(`[data-for="${target.name}"]`);
      if (range) range.value = target.value;
    }
    remember("settings", this.values);
  }

  number(input) {
    const field = FIELDS.find(({ name }) => name === input.name);
    const value = input.value === "" ? null : Number(input.value);
    const valid = !input.validity.badInput && accepts(field, value);
    input.setAttribute("aria-invalid", String(!valid));
    const hint = document.getElementById(`h-${field.name}`);
    hint.textContent = valid ? t(`${field.name}_hint`) : t("out_of_range", { ...field, name: t(field.name) });
    if (valid) this.values[field.name] = value;
  }
}

function accepts({ min, max, step, empty }, value) {
  if (value === null) return Boolean(empty);
  return Number.isFinite(value) && value >= min && value <= max && (step < 1 || Number.isInteger(value));
}

// Values that another version of this page may have left.
function within(stored) {
  const kept = {};
  for (const field of FIELDS) {
    if (field.name in stored && accepts(field, stored[field.name])) kept[field.name] = stored[field.name];
  }
  if (typeof stored.system === "string") kept.system = stored.system;
  if (typeof stored.logprobs === "boolean") kept.logprobs = stored.logprobs;
  return kept;
}
