const bar = document.querySelector(".filter");
const items = [...document.querySelectorAll("details .item")];
const filter = () => {
  const words = bar.querySelector("input").value.toLowerCase();
  const fate = bar.querySelector("select").value;
  for (const item of items) {
    const fits = (!fate || item.dataset.fate === fate) && item.textContent.toLowerCase().includes(words);
    item.hidden = !fits;
  }
  for (const part of document.querySelectorAll(".group, details.items")) {
    part.hidden = !part.querySelector(".item:not([hidden])");
    if (part.localName === "details" && (words || fate)) part.open = !part.hidden;
  }
  const shown = items.filter((item) => !item.hidden).length;
  bar.querySelector("output").textContent = `${shown} of ${items.length} items`;
};
if (bar) {
  bar.hidden = false;
  bar.addEventListener("input", filter);
  bar.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
