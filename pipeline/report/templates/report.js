// Light or dark, the threshold of the first picture, patch borders over samples, the entropy under the pointer,
// and tables that are wider than the window. The page is whole without it.
const root = document.documentElement;
root.classList.add("js");
const theme = document.querySelector("#theme");
const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const named = () => { theme.textContent = dark() ? "Light" : "Dark"; };
theme.hidden = false;
theme.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; named(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
named();

document.querySelector(".pick").hidden = false;
document.querySelector("#borders").onchange = (event) => {
  document.querySelector("#compared").classList.toggle("bordered", event.target.checked);
};

// Lengths of the patches of an image: the rule of dpar_core/patches/rule.py.
function patchLengths(entropies, { threshold, cuts, longest }) {
  const lengths = [];
  let gate = 0;
  entropies.forEach((entropy, token) => {
    const opens = cuts.has(token) || entropy > threshold;
    if (opens) gate = token;
    if (opens || (longest && (token - gate) % longest === 0)) lengths.push(0);
    lengths[lengths.length - 1] += 1;
  });
  return lengths;
}

// Borders between patches as an SVG path in token units.
function borderPath(lengths, width) {
  const patch = lengths.flatMap((length, number) => Array(length).fill(number));
  let path = "";
  patch.forEach((number, token) => {
    const x = token % width, y = (token - x) / width;
    if (x + 1 < width && patch[token + 1] !== number) path += `M${x + 1} ${y}V${y + 1}`;
    if (token + width < patch.length && patch[token + width] !== number) path += `M${x} ${y + 1}H${x + 1}`;
  });
  return path;
}

const hero = document.querySelector("#hero"), slider = document.querySelector("#slider");
if (slider) {
  const entropies = hero.dataset.exact.split(",").map((nats) => (nats === "" ? NaN : Number(nats)));
  const width = Number(hero.dataset.width), longest = Number(hero.dataset.longest), trained = Number(hero.dataset.threshold);
  const cuts = new Set(hero.dataset.cuts.split(",").map(Number)); // at which a patch begins whatever the entropies are
  const draw = (threshold) => {
    const lengths = patchLengths(entropies, { threshold: Math.fround(threshold), cuts, longest }), path = borderPath(lengths, width);
    for (const one of hero.querySelectorAll(".borders")) one.setAttribute("d", path);
    hero.dataset.lengths = lengths.join(",");
    document.querySelector("#at").textContent = `${threshold.toFixed(2)} nats`;
    const mean = (entropies.length / lengths.length).toFixed(2), count = document.querySelector("#count");
    count.querySelector("b").textContent = `${lengths.length} patches`;
    count.lastChild.textContent = ` instead of ${entropies.length} tokens (${mean} tokens per patch)`;
  };
  for (const one of document.querySelectorAll(".slider")) one.hidden = false;
  slider.oninput = () => draw(Number(slider.value));
  document.querySelector("#reset").onclick = () => { slider.value = trained.toFixed(2); draw(trained); };
}

const shown = document.querySelector("#token"), quiet = shown.textContent;
for (const one of document.querySelectorAll("[data-nats]")) {
  const nats = one.dataset.nats.split(","), width = Number(one.dataset.width);
  one.onpointermove = (event) => {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    const lengths = one.dataset.lengths.split(",").map(Number);
    const patch = lengths.flatMap((length, number) => Array.from({ length }, (_, place) => ({ number, length, place })));
    const box = tile.getBoundingClientRect();
    const at = (place, from, size) => Math.min(Math.max(Math.floor((place - from) / size * width), 0), width - 1);
    const token = at(event.clientY, box.top, box.height) * width + at(event.clientX, box.left, box.width);
    const { number, length, place } = patch[token];
    const words = `Token ${token + 1} of ${nats.length}: ${nats[token] ? `${nats[token]} nats` : "predicted by nothing"}; `
      + `${place + 1} of ${length} in patch ${number + 1} of ${lengths.length}.`;
    if (one === hero) shown.textContent = words;
    else tile.title = words;
  };
  one.onpointerleave = () => { if (one === hero) shown.textContent = quiet; };
}

// A table that goes on to the right fades there, and arrow keys move it.
for (const one of document.querySelectorAll(".scroll")) {
  const look = () => {
    one.classList.toggle("more", one.scrollLeft + one.clientWidth < one.scrollWidth - 2);
    if (one.clientWidth < one.scrollWidth - 2) one.tabIndex = 0; else one.removeAttribute("tabindex");
  };
  one.addEventListener("scroll", look);
  addEventListener("resize", look);
  look();
}
