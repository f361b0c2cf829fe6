// The keyboard, dialogs and the theme. Every page works without this file; no page needs it to be safe.
"use strict";

const $ = (selector, from = document) => from.querySelector(selector);
const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];

// Theme: the system's, unless somebody chose.
const chosen = localStorage.getItem("theme");
if (chosen) document.documentElement.dataset.theme = chosen;

function start() {
  $$("[data-open], [data-theme]:is(button)").forEach((button) => { button.hidden = false; });
  $$("[data-open]").forEach((button) => button.addEventListener("click", () => open(button.dataset.open)));
  $$("[data-close]").forEach((button) => button.addEventListener("click", () => button.closest("dialog").close()));
  $$("button[data-theme]").forEach((button) => button.addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme === "dark" ||
      (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    localStorage.setItem("theme", document.documentElement.dataset.theme = dark ? "light" : "dark");
  }));
  $$("input.copy").forEach((input) => input.addEventListener("focus", () => input.select()));
  const keys = $("#keys-on");
  if (keys) {
    keys.checked = localStorage.getItem("keys") !== "off";
    keys.addEventListener("change", () => localStorage.setItem("keys", keys.checked ? "on" : "off"));
  }
  const problem = $("#problem");
  if (problem) {
    const field = document.getElementsByName(problem.dataset.field)[0], index = parts().findIndex((part) => part.contains(field));
    problem.focus({ preventScroll: true }); // not the field: its arrows would change an answer
    mark(index, false);
    field?.closest("fieldset, .card")?.scrollIntoView({ block: "center" });
  } else if ($("#answer")) mark(0, false);
  if ($("[data-again]")) setInterval(async () => { if ((await fetch("/more")).status === 200) location.assign("/"); }, 20000);
}

function open(id) {
  const dialog = document.getElementById(id);
  if (dialog && !dialog.open) dialog.showModal();
}

// What the keys act on: a card, an aspect, a reply.
const PARTS = { rank: "[data-card]", score: "[data-aspect]", mark: "[data-turn]" };
let at = 0;
const parts = () => { const kind = $("#answer")?.dataset.kind; return kind in PARTS ? $$(PARTS[kind], $("#answer")) : []; };

function mark(index, show = true) {
  const all = parts();
  if (!all.length) return;
  at = Math.min(Math.max(index, 0), all.length - 1);
  all.forEach((part, i) => part.classList.toggle("current", i === at));
  if (show) all[at].scrollIntoView({ block: "nearest" });
}

function choose(name, value, from = document) {
  const input = $$("input", from).find((i) => i.name === name && i.value === String(value));
  if (!input) return false;
  input.checked = input.type === "checkbox" ? !input.checked : true;
  input.dispatchEvent(new Event("change", { bubbles: true }));
  return true;
}

const KINDS = {
  rank(key) {
    const all = parts(), letter = key.length === 1 ? key.toUpperCase().charCodeAt(0) - 65 : -1;
    if (letter >= 0 && letter < all.length) return mark(letter), true;
    if (key === "ArrowRight" || key === "ArrowDown") return mark(at + 1), true;
    if (key === "ArrowLeft" || key === "ArrowUp") return mark(at - 1), true;
    if (key === "0") return choose("all_bad", 1);
    if (/^[1-9]$/.test(key) && choose(`rank-${at}`, key)) return mark(at + 1), true;
  },
  compare(key) { if (/^[1-7]$/.test(key)) return choose("preference", Number(key) - 4); },
  score(key) {
    if (key === "ArrowDown") return mark(at + 1), true;
    if (key === "ArrowUp") return mark(at - 1), true;
    const input = /^[0-9]$/.test(key) && $(`input[value="${key === "0" ? 10 : key}"]`, parts()[at]);
    if (input && choose(input.name, input.value)) return mark(at + 1), true;
  },
  mark(key) {
    const turn = parts()[at]?.dataset.turn;
    if (key === "j" || key === "ArrowDown") return mark(at + 1), true;
    if (key === "k" || key === "ArrowUp") return mark(at - 1), true;
    if (key === "g") return choose(`turn-${turn}`, "good");
    if (key === "b") return choose(`turn-${turn}`, "bad");
    if (key === "0") return choose(`turn-${turn}`, "");
    if (key === "w") return choose("first_wrong", turn);
    if (key === "n") return choose("first_wrong", "none");
  },
};

// A radio that was clicked must not keep the arrows; who came to it by Tab moves among its choices as everywhere, where no key is listed.
let clicked = false;
document.addEventListener("pointerdown", () => { clicked = true; });

document.addEventListener("keydown", (event) => {
  if (event.key === "Tab") clicked = false;
  const form = $("#answer"), writing = event.target.matches("textarea, select, input:not([type=radio], [type=checkbox])");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form && writing) { event.preventDefault(); form.requestSubmit(); return; }
  if (writing) { // in a dialog Enter sends what the dialog is for, not the whole answer
    const dialog = event.target.closest("dialog");
    if (dialog && event.key === "Enter") { event.preventDefault(); $("button.primary", dialog).click(); }
    if (!dialog && event.key === "Escape") event.target.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("dialog[open]")) return;
  if (event.key === "?") { event.preventDefault(); open("keys"); return; }
  if (localStorage.getItem("keys") === "off") return;
  const onButton = event.target.matches("button, a, summary");
  if (event.key === "Enter" && onButton) return;
  let done = event.repeat && /^(Enter|[a-z])$/.test(event.key); // a key that is held down says it once
  if (form && !done) {
    const arrow = event.key.startsWith("Arrow");
    done = KINDS[form.dataset.kind]?.(event.key);
    if (arrow && event.target.matches("#answer input") && (done || clicked)) { event.target.blur(); done = true; }
    if (!done && event.key === "Enter") { form.requestSubmit(); done = true; }
    if (!done && event.key === "m") { $("#comment").focus(); done = true; }
    if (!done && event.key === "s") { open("pass"); done = true; }
    if (!done && event.key === "x") { open("cannot"); done = true; }
    if (!done && event.key === "o") { const all = $$("details.fold"), shut = all.some((d) => !d.open); all.forEach((d) => { d.open = shut; }); done = true; }
  }
  if (!done && event.key === "u" && $("[data-undo]")) { $("[data-undo]").requestSubmit(); done = true; }
  if (done) event.preventDefault();
});

document.addEventListener("focusin", (event) => {
  const all = parts(), index = all.findIndex((part) => part.contains(event.target));
  if (index >= 0) mark(index, false);
});

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
