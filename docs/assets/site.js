// The theme gives its search dialog no name that a screen reader could say.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");

// What scrolls sideways must be reached from the keyboard too; the theme makes these when a page is shown.
const reachable = () => {
  for (const each of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code"))
    if (!each.hasAttribute("tabindex")) each.setAttribute("tabindex", "0");
};
new MutationObserver(reachable).observe(document.body, { childList: true, subtree: true });
reachable();
