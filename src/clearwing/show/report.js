// The page works without this: it adds the theme switch, the viewer, the mark in the navigation, and Copy.
(() => {
  "use strict";
  const root = document.documentElement;

  const button = document.querySelector("button.theme");
  const themes = ["auto", "light", "dark"];
  const showTheme = () => {
    const now = root.dataset.theme || "auto";
    button.querySelector("b").textContent = now[0].toUpperCase() + now.slice(1);
    button.setAttribute("aria-label", "Colours: " + now + "; press to change");
  };
  button.hidden = false;
  showTheme();
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % themes.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      if (next === "auto") localStorage.removeItem("clearwing-theme");
      else localStorage.setItem("clearwing-theme", next);
    } catch (error) { /* a file opened from disk may have no storage */ }
    showTheme();
  });

  const viewer = document.getElementById("viewer");
  const stage = viewer.querySelector(".stage");
  let card = null;
  const open = (next) => {
    card = next;
    const copy = card.cloneNode(true);
    copy.removeAttribute("id");
    copy.querySelectorAll(".zoom, .shut").forEach((link) => link.remove());
    stage.replaceChildren(copy);
    viewer.querySelector(".previous").disabled = !sibling(-1);
    viewer.querySelector(".next").disabled = !sibling(1);
    if (!viewer.open) viewer.showModal();
  };
  const sibling = (step) => {
    const cards = [...card.parentElement.querySelectorAll(":scope > .card")];
    return cards[cards.indexOf(card) + step];
  };
  const move = (step) => { const next = sibling(step); if (next) open(next); };
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.zoom");
    if (!link || event.metaKey || event.ctrlKey) return;
    event.preventDefault();
    open(link.closest(".card"));
  });
  viewer.querySelector(".previous").addEventListener("click", () => move(-1));
  viewer.querySelector(".next").addEventListener("click", () => move(1));
  viewer.querySelector(".close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  viewer.addEventListener("close", () => card.querySelector(".zoom").focus({ preventScroll: true }));

  const links = new Map([...document.querySelectorAll(".bar nav a")].map((a) => [a.hash.slice(1), a]));
  const strip = document.querySelector(".bar nav");
  const mark = () => {
    let now = null;
    for (const id of links.keys())
      if (document.getElementById(id).getBoundingClientRect().top < innerHeight * 0.35) now = id;
    if (innerHeight + scrollY >= document.body.scrollHeight - 4) now = [...links.keys()].pop();
    links.forEach((a, id) => {
      if (id === now && a.getAttribute("aria-current") !== "true") {
        a.setAttribute("aria-current", "true");
        strip.scrollTo({ left: a.offsetLeft - strip.clientWidth / 2 + a.offsetWidth / 2 });
      } else if (id !== now) a.removeAttribute("aria-current");
    });
  };
  addEventListener("scroll", mark, { passive: true });
  addEventListener("resize", mark);
  mark();

  if (navigator.clipboard)
    document.querySelectorAll("button.copy").forEach((copy) => {
      copy.hidden = false;
      copy.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(copy.parentElement.querySelector("code").textContent);
          copy.textContent = "Copied";
        } catch (error) {
          copy.textContent = "Not allowed here";
        }
        setTimeout(() => { copy.textContent = "Copy"; }, 1600);
      });
    });
})();
