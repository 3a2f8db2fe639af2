// Light or dark, one set of samples at a time, and the entropy under the pointer. The page is whole without it.
const root = document.documentElement;
root.classList.add("js");
const theme = document.querySelector("#theme");
const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const named = () => { theme.textContent = dark() ? "Light" : "Dark"; };
theme.hidden = false;
theme.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; named(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
named();

const samples = document.querySelector(".samples");
const choose = (name) => {
  for (const one of samples.querySelectorAll("section")) one.classList.toggle("on", one.dataset.set === name);
  for (const one of document.querySelectorAll(".pick button")) one.setAttribute("aria-pressed", one.dataset.set === name);
  for (const one of document.querySelectorAll(".pick label")) one.hidden = name !== "dpar";
};
for (const one of document.querySelectorAll(".pick button")) one.onclick = () => choose(one.dataset.set);
document.querySelector("#borders").onchange = (event) => samples.classList.toggle("bordered", event.target.checked);
document.querySelector(".pick").hidden = false;
choose("dpar");

const told = document.querySelector("#told"), quiet = told.textContent;
for (const one of document.querySelectorAll("[data-nats]")) {
  const nats = one.dataset.nats.split(","), lengths = one.dataset.lengths.split(",").map(Number), width = Number(one.dataset.width);
  const patch = lengths.flatMap((length, number) => Array.from({ length }, (_, place) => ({ number, length, place })));
  one.onpointermove = (event) => {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    const box = tile.getBoundingClientRect();
    const at = (place, from, size) => Math.min(Math.max(Math.floor((place - from) / size * width), 0), width - 1);
    const token = at(event.clientY, box.top, box.height) * width + at(event.clientX, box.left, box.width);
    const { number, length, place } = patch[token];
    const entropy = nats[token] ? `${nats[token]} nats` : "predicted by nothing";
    told.textContent = `Token ${token} of ${nats.length}: ${entropy}; place ${place + 1} of ${length} in patch ${number + 1} of ${lengths.length}.`;
  };
  one.onpointerleave = () => { told.textContent = quiet; };
}
