// What the tests ask of a page in the browser. Each probe returns the offenders, so that an empty list is good news.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const says = (element) => `${element.tagName} "${element.textContent.trim().slice(0, 40)}"`;

function sidewaysOverflow() {
  const wide = all("body *").filter((e) => !e.closest(".scroll") && !e.closest(".skip") && e.getBoundingClientRect().right > innerWidth + 0.5);
  return document.documentElement.scrollWidth > innerWidth ? [`page ${document.documentElement.scrollWidth}`, ...wide.map(says)] : wide.map(says);
}

const emptySections = () => all("main > section").filter((s) => !s.checkVisibility() || s.innerText.trim().length < 20).map((s) => s.id);

// Labels of a plot that leave its box, come too close, or are drawn too small to read.
function badLabels() {
  const bad = [];
  for (const svg of all("svg")) {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    if (box.width < 200 || box.height < 150) bad.push(`plot of ${box.width} x ${box.height}`);
    const labels = all("text", svg).map((e) => [e, e.getBoundingClientRect()]);
    if (labels.length < 6) bad.push("plot without labels");
    labels.forEach(([e, r], i) => {
      if (r.left < box.left - 0.5 || r.right > box.right + 0.5 || r.top < box.top - 0.5 || r.bottom > box.bottom + 0.5) bad.push(`clipped ${says(e)}`);
      if (parseFloat(getComputedStyle(e).fontSize) * scale < 10) bad.push(`small ${says(e)}`);
      for (const [other, s] of labels.slice(i + 1)) {
        const gap = Math.max(r.left, s.left) - Math.min(r.right, s.right);
        const sharedHeight = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
        if (gap < 3 && sharedHeight > 0.4 * Math.min(r.height, s.height)) bad.push(`crowded ${says(e)} ${says(other)}`);
      }
    });
  }
  return bad;
}

// WCAG 2 contrast of two computed colours.
const rgb = (colour) => colour.match(/[\d.]+/g).map(Number);
const luminance = (colour) => {
  const [r, g, b] = rgb(colour).slice(0, 3).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const isClear = (colour) => colour === "transparent" || (rgb(colour).length === 4 && rgb(colour)[3] === 0);

function ground(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (!isClear(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
}

function faintText() {
  const speaks = (e) => [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
  return all("body *")
    .filter((e) => speaks(e) && e.checkVisibility())
    .map((e) => [e, contrast(e.closest("svg") ? getComputedStyle(e).fill : getComputedStyle(e).color, ground(e))])
    .filter(([, value]) => value < 4.5)
    .map(([e, value]) => `${value.toFixed(2)} ${says(e)}`);
}

// Lines and markers that carry data; the grid is meant to be faint.
function faintLines() {
  const grid = getComputedStyle(document.documentElement).getPropertyValue("--line").trim();
  const probe = document.body.appendChild(Object.assign(document.createElement("i"), { style: `color: ${grid}` }));
  const gridColour = getComputedStyle(probe).color;
  probe.remove();
  return all("svg path, svg use")
    .map((e) => getComputedStyle(e).stroke)
    .filter((stroke) => stroke !== "none" && stroke !== gridColour)
    .filter((stroke) => contrast(stroke, ground(document.body)) < 3);
}

// "beside" or "stacked" for each pair of samples.
const pairs = () =>
  all(".pair").map((pair) => {
    const [a, b] = [...pair.children].map((e) => e.getBoundingClientRect());
    if (a.right <= b.left && a.top === b.top) return "beside";
    return a.bottom <= b.top && a.left === b.left ? "stacked" : "neither";
  });

// Boxes that scroll and cannot be reached by the keyboard, or have no name.
const deafBoxes = () => all(".scroll").filter((e) => e.tabIndex !== 0 || e.getAttribute("role") !== "region" || !e.ariaLabel).map(says);
const silentPlots = () => all("svg").filter((e) => e.getAttribute("role") !== "img" || (e.ariaLabel || "").length < 30).map(says);
