// A table of coloured cells: drawn once for its shape, afterwards only the cells that changed.
const OUTLINE = "#E69F00";
const SIDES = ["0 2px", "-2px 0", "0 -2px", "2px 0"]; // top, right, bottom, left, as bits 1, 2, 4, 8

function build(box, data) {
  box.replaceChildren();
  const table = document.createElement("table");
  table.setAttribute("role", "grid");
  table.tabIndex = 0;
  box.cells = data.rows.map(() => []);
  for (let row = data.rows.length - 1; row >= 0; row--) {
    const line = table.insertRow();
    line.appendChild(document.createElement("th")).scope = "row";
    for (let column = 0; column < data.columns.length; column++) {
      const cell = line.insertCell();
      cell.id = `cell-${row}-${column}`;
      cell.at = [row, column];
      box.cells[row].push(cell);
    }
  }
  const feet = table.createTFoot().insertRow();
  for (let i = 0; i <= data.columns.length; i++) feet.appendChild(document.createElement("th")).scope = "col";
  const cone = Object.assign(document.createElement("div"), { className: "cone", hidden: true });
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  const scroll = Object.assign(document.createElement("div"), { className: "scroll" });
  scroll.append(table, cone);
  const [legend, card] = ["legend", "card"].map((name) => Object.assign(document.createElement("div"), { className: name }));
  card.setAttribute("aria-live", "polite");
  box.append(scroll, tip, legend, card);
  Object.assign(box, { table, cone, tip, card, chosen: null, was: new Map() });
  table.onclick = (event) => pick(box, event.target.closest("td"));
  table.onpointerover = (event) => hover(box, event.target.closest("td"));
  table.onpointerleave = () => hover(box, null);
  table.onkeydown = (event) => move(box, event);
}

function paint(box, data) {
  const { table } = box;
  table.setAttribute("aria-label", data.alt);
  table.className = data.text ? "words" : "plain";
  data.rows.forEach((name, row) => {
    const line = box.cells[row][0].parentElement;
    if (line.cells[0].textContent !== name) line.cells[0].textContent = name;
    box.cells[row].forEach((cell, column) => {
      const colour = data.colours[row][column];
      const text = data.text ? data.text[row][column] : "";
      const border = data.borders ? data.borders[row][column] : 0;
      const now = `${colour} ${border} ${text}`;
      if (box.was.get(cell) !== now) {
        box.was.set(cell, now);
        const [back, ink] = colour === null ? ["transparent", "inherit"] : data.palette[colour];
        cell.style.background = back;
        cell.style.color = ink;
        if (cell.textContent !== text) cell.textContent = text;
        cell.style.boxShadow = SIDES.filter((_, i) => border & (1 << i)).map((side) => `inset ${side} ${OUTLINE}`).join(",");
      }
    });
  });
  table.tFoot.className = data.columns.every((name) => name.length < 3) ? "short" : "";
  data.columns.forEach((name, i) => {
    const foot = table.tFoot.rows[0].cells[i + 1];
    if (foot.textContent !== name) foot.textContent = name;
  });
  table.tFoot.rows[0].cells[0].textContent = `${data.y}\u00a0↑ ${data.x}\u00a0→`;
  const colours = data.palette.map(([back]) => back).join(",");
  const legend = box.querySelector(".legend");
  const bar = Object.assign(document.createElement("span"), { className: "bar" });
  bar.style.background = `linear-gradient(to right, ${colours})`;
  legend.replaceChildren(data.low, bar, `${data.high} ${data.label}`);
  choose(box, data.chosen);
  table.dataset.step = data.step;
}

function choose(box, at) {
  box.chosen?.classList.remove("chosen");
  box.chosen?.removeAttribute("aria-selected");
  box.chosen = at ? box.cells[at[0]]?.[at[1]] : null;
  if (!box.chosen) return;
  box.chosen.classList.add("chosen");
  box.chosen.setAttribute("aria-selected", "true");
  box.table.setAttribute("aria-activedescendant", box.chosen.id);
  if (box.data.cells) tell(box, at);
}

function words(box, [row, column], most) {
  const { cells } = box.data;
  return cells.tokens[row][column].slice(0, most).map((token, i) => [token, cells.probabilities[row][column][i]]);
}

function titled(box, [row, column]) {
  return `${box.data.y} ${box.data.rows[row]}, ${box.data.x} ${box.data.columns[column]}`;
}

function listed(heads, lines) {
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const text of heads) head.appendChild(document.createElement("th")).textContent = text;
  const body = table.createTBody();
  for (const line of lines) {
    const row = body.insertRow();
    for (const value of line) row.insertCell().textContent = value;
  }
  return table;
}

// Everything that is known of one cell, told beside it without asking the server.
function tell(box, at) {
  const [row, column] = at;
  const { cells } = box.data;
  const title = Object.assign(document.createElement("strong"), { textContent: titled(box, at) });
  const facts = listed(["", ""], Object.entries(cells.facts).map(([name, values]) => [name, values[row][column]]));
  const top = listed(["token", "probability"], words(box, at));
  const watched = listed(["watched", "probability", "rank"],
    cells.watch.map((token, i) => [token, cells.watched[row][column][i], cells.ranks[row][column][i]]));
  box.card.replaceChildren(title, facts, top, ...(cells.watch.length ? [watched] : []));
}

function pick(box, cell) {
  if (!cell || !box.data.picks) return;
  choose(box, cell.at);
  box.send(cell.at);
}

function hover(box, cell) {
  box.tip.hidden = !cell;
  box.cone.hidden = !cell || !box.data.cone;
  if (!cell) return;
  const [row, column] = cell.at;
  const { cells, tips } = box.data;
  const said = cells && [titled(box, cell.at), ...words(box, cell.at, 3).map((word) => word.join(" "))].join("\n");
  box.tip.textContent = said || tips[row][column];
  const [frame, own] = [box.getBoundingClientRect(), cell.getBoundingClientRect()];
  const left = own.right - frame.left + 6;
  box.tip.style.left = left + 190 > frame.width ? "" : `${left}px`;
  box.tip.style.right = left + 190 > frame.width ? `${frame.right - own.left + 6}px` : "";
  box.tip.style.top = `${own.top - frame.top}px`;
  const last = box.cells[box.cells.length - 1].at(-1);
  Object.assign(box.cone.style, {
    left: `${cell.offsetLeft}px`, top: `${last.offsetTop}px`, width: `${last.offsetLeft + last.offsetWidth - cell.offsetLeft}px`,
    height: `${cell.offsetTop + cell.offsetHeight - last.offsetTop}px`,
  });
}

const STEPS = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function move(box, event) {
  const step = STEPS[event.key];
  if (step) {
    const [row, column] = box.chosen ? box.chosen.at : [0, -step[1]];
    const at = [row + step[0], column + step[1]];
    if (box.cells[at[0]]?.[at[1]]) choose(box, at);
    box.chosen?.scrollIntoView({ block: "nearest", inline: "nearest" });
  } else if (event.key === "Enter" || event.key === " ") pick(box, box.chosen);
  else return;
  event.preventDefault();
}

export default function ({ data, parentElement, setTriggerValue }) {
  const box = parentElement.querySelector(".box");
  const shape = `${data.rows.length} ${data.columns.length}`;
  box.send = (at) => setTriggerValue("picked", at);
  box.data = data;
  if (box.shape !== shape) build(box, data);
  box.shape = shape;
  paint(box, data);
}
