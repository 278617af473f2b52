// Dark and light, and keys: Ctrl or Cmd with Enter draws, Escape cancels.
(() => {
  const KEPT = "latentdiff-theme";
  const wanted = () => {
    const kept = localStorage.getItem(KEPT);
    return kept ? kept === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const show = (dark) => {
    document.body.classList.toggle("dark", dark);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
  };
  const press = (id) => {
    const button = document.getElementById(id);
    if (button && button.offsetParent !== null && !button.disabled) button.click();
  };
  document.addEventListener("click", (event) => {
    if (!event.target.closest("[data-theme]")) return;
    const dark = !document.body.classList.contains("dark");
    localStorage.setItem(KEPT, dark ? "dark" : "light");
    show(dark);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.target.blur?.(); // so that gradio takes what is being typed
      setTimeout(() => press("draw"), 50);
    }
    if (event.key === "Escape") press("cancel");
    const ways = [...document.querySelectorAll("#mode input")];
    const place = ways.indexOf(event.target);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (place >= 0 && step) { // gradio gives each of its radio buttons a name of its own, so that arrows do nothing
      event.preventDefault();
      const next = ways[(place + step + ways.length) % ways.length];
      next.focus();
      next.click();
    }
  }, true);
  // gradio sets its own theme when it has started, after this
  const keep = () => document.body && document.body.classList.contains("dark") !== wanted() && show(wanted());
  addEventListener("load", () => {
    show(wanted());
    new MutationObserver(keep).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  });
})();
