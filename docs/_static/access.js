// What the theme leaves to be done for a keyboard and for screen readers.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll("p.caption[role=heading]")) {
    caption.setAttribute("aria-level", "2");
  }
  const drawers = { "sidebar-drawer": "site", "toc-drawer": "this page" };
  for (const [name, label] of Object.entries(drawers)) {
    for (const drawer of document.querySelectorAll(`aside.${name}`)) {
      drawer.setAttribute("aria-label", label);
    }
  }
  // What is larger than its place is scrolled by arrow keys once it has the focus.
  const wide = "pre, .table-wrapper, .math-wrapper, article table, #explorer > div";
  const reachable = () => {
    const found = [...document.querySelectorAll(wide)].filter((box) => {
      if (!box.checkVisibility()) return false;
      const wider = box.scrollWidth > box.clientWidth;
      const larger = wider || box.scrollHeight > box.clientHeight;
      return larger && /auto|scroll/.test(getComputedStyle(box).overflow);
    });
    for (const box of found) box.tabIndex = 0; // once all is measured
  };
  reachable();
  window.addEventListener("resize", reachable);
  document.addEventListener("toggle", reachable, true); // details that open
});
