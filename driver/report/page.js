
"use strict";
(() => {
  // ---- the graphs: opening modules, moving about

  const places = JSON.parse(document.getElementById("places").textContent);
  const sides = new Map();

  // places: [path, number of the picture, places that its boxes open], the whole graph first
  class Side {
    constructor(root) {
      this.key = root.dataset.side;
      this.places = places[this.key];
      this.parents = new Map(this.places.flatMap(([, , children], i) => children.map((child) => [child, i])));
      this.named = new Map([...this.places.entries()].reverse().map(([i, [path]]) => [path, i]));
      this.crumbs = root.querySelector(".crumbs");
      this.stage = root.querySelector(".stage");
      this.at = 0;
      this.scale = 1;
      root.querySelector(".zoom").hidden = false;
      this.stage.classList.add("live");
      root.querySelectorAll("[data-zoom]").forEach((b) => b.addEventListener("click", () => this.zoom(b.dataset.zoom)));
      this.stage.addEventListener("click", (event) => this.follow(event));
      this.stage.addEventListener("keydown", (event) => this.press(event));
      this.stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
      this.stage.addEventListener("pointerdown", (event) => this.drag(event));
      this.show(0);
    }

    // the nearest module around a path that there is
    nearest(path) {
      while (path && !this.named.has(path)) path = path.slice(0, Math.max(path.lastIndexOf("."), 0));
      return this.named.get(path) ?? 0;
    }

    show(at) {
      this.at = at;
      const picture = document.getElementById(`${this.key}-${this.places[at][1]}`);
      this.stage.replaceChildren(picture.content.cloneNode(true));
      this.svg = this.stage.firstElementChild;
      this.width = Number(this.svg.getAttribute("width"));
      this.height = Number(this.svg.getAttribute("height"));
      this.zoom("fit");
      this.stage.scrollTo((this.stage.scrollWidth - this.stage.clientWidth) / 2, 0);
      this.label();
    }

    label() {
      const way = [];
      for (let at = this.at; at !== undefined; at = this.parents.get(at)) way.unshift(at);
      const items = way.map((at, i) => {
        const [path, above] = [this.places[at][0], i ? this.places[way[i - 1]][0] : ""];
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = i ? (above && path.startsWith(`${above}.`) ? path.slice(above.length + 1) : path) : "model";
        if (at === this.at) button.setAttribute("aria-current", "true");
        button.addEventListener("click", () => this.open(at));
        return button;
      });
      this.crumbs.replaceChildren(...items.flatMap((item, i) => (i ? [" / ", item] : [item])));
    }

    // the other graph shows the same module, or what there is around it
    open(at) {
      this.show(at);
      this.stage.focus({ preventScroll: true }); // what had the focus is gone
      sides.forEach((side) => side === this || side.show(side.nearest(this.places[at][0])));
    }

    zoom(how) {
      const room = this.stage.clientWidth - 2;
      const next = { in: this.scale * 1.25, out: this.scale / 1.25, fit: Math.max(0.5, Math.min(1.15, room / this.width)) }[how];
      const old = this.scale;
      this.scale = Math.max(0.15, Math.min(4, next));
      const { scrollLeft, scrollTop, clientWidth, clientHeight } = this.stage;
      this.svg.setAttribute("width", this.width * this.scale);
      this.svg.setAttribute("height", this.height * this.scale);
      const ratio = this.scale / old;
      this.stage.scrollTo((scrollLeft + clientWidth / 2) * ratio - clientWidth / 2, (scrollTop + clientHeight / 2) * ratio - clientHeight / 2);
    }

    follow(event) {
      const box = event.target.closest("[data-open]");
      if (!box || this.dragged) return;
      this.open(this.places[this.at][2][box.dataset.open]);
    }

    press(event) {
      const how = { "+": "in", "=": "in", "-": "out", 0: "fit" }[event.key];
      if (how && !event.ctrlKey && !event.metaKey) {
        event.preventDefault();
        this.zoom(how);
      } else if ((event.key === "Enter" || event.key === " ") && event.target.closest("[data-open]")) {
        event.preventDefault();
        this.dragged = false;
        this.follow(event);
      } else if ((event.key === "Escape" || event.key === "Backspace") && this.at) {
        event.preventDefault();
        this.open(this.parents.get(this.at));
      }
    }

    wheel(event) {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? "in" : "out");
    }

    // a finger scrolls by itself
    drag(event) {
      this.dragged = false;
      if (event.pointerType !== "mouse" || event.button) return;
      const { scrollLeft, scrollTop } = this.stage;
      const move = (next) => {
        const [x, y] = [next.clientX - event.clientX, next.clientY - event.clientY];
        if (Math.abs(x) + Math.abs(y) > 4) this.dragged = true;
        if (this.dragged) this.stage.classList.add("held");
        this.stage.scrollTo(scrollLeft - x, scrollTop - y);
      };
      const end = () => {
        this.stage.classList.remove("held");
        window.removeEventListener("pointermove", move);
      };
      window.addEventListener("pointermove", move);
      window.addEventListener("pointerup", end, { once: true });
    }
  }

  document.querySelectorAll(".side").forEach((root) => sides.set(root.dataset.side, new Side(root)));

  // ---- tables: a click on a title sorts

  const value = (row, i) => {
    const cell = row.cells[i];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? 1 : -1);
  document.querySelectorAll("table").forEach((table) => {
    const titles = [...table.tHead.rows[0].cells];
    titles.forEach((title, i) => {
      if (!title.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title.textContent;
      title.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = title.getAttribute("aria-sort") !== "descending";
        titles.forEach((other) => other.removeAttribute("aria-sort"));
        title.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].sort((a, b) => compare(value(a, i), value(b, i)) * (down ? -1 : 1));
        table.tBodies[0].append(...rows);
      });
    });
  });

  // ---- print: all of it

  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((part) => (part.open = true));
  });
  window.addEventListener("afterprint", () => closed.forEach((part) => (part.open = false)));
})();
