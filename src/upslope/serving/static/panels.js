// The two side panels. On a wide window they stand beside the conversation; on a narrow one they lie over it, and then
// the rest of the page is inert, Escape closes them and the focus returns to the button that opened them.

const narrow = matchMedia("(max-width: 60rem)");

/** One side panel and its button. `toggled(open)` tells what the reader chose. */
export class Panel {
  constructor(id, button, toggled = () => {}) {
    this.element = document.getElementById(id);
    this.button = document.getElementById(button);
    this.toggled = toggled;
    this.button.addEventListener("click", () => this.set(this.element.hidden, true));
    this.element.querySelector("[data-close]").addEventListener("click", () => this.set(false, true));
    this.element.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault();
      this.set(false, true);
    });
    document.getElementById("centre").addEventListener("pointerdown", () => this.over && this.set(false));
    narrow.addEventListener("change", () => this.set(!narrow.matches && !this.element.hidden));
  }

  /** True while it lies over the conversation. */
  get over() {
    return narrow.matches && !this.element.hidden;
  }

  /** Open or close it; `asked`: by the reader, whose focus moves along. */
  set(open, asked = false) {
    if (open && narrow.matches) for (const other of Panel.all) if (other !== this) other.set(false);
    this.element.hidden = !open;
    this.button.setAttribute("aria-expanded", String(open));
    document.body.classList.toggle("covered", Panel.all.some((panel) => panel.over));
    for (const child of document.getElementById("centre").children) child.inert = Panel.all.some((panel) => panel.over);
    if (!asked) return;
    this.toggled(open);
    if (open) this.element.querySelector("[data-close]").focus();
    else this.button.focus();
  }

  static all = [];

  /** Make a panel and know it. */
  static of(...given) {
    const panel = new Panel(...given);
    Panel.all.push(panel);
    return panel;
  }
}

/** True on a window where panels lie over the conversation. */
export function isNarrow() {
  return narrow.matches;
}
