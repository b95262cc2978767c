const form = document.getElementById("filter");
const table = document.getElementById("rollouts");
const rows = [...table.tBodies[0].rows];

function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  const text = wanted.text.toLowerCase();
  for (const row of rows) {
    const { environment, ...numbers } = row.dataset;
    const within = ["step", "score"].every((name) => {
      const [low, high] = [wanted[name + "-from"], wanted[name + "-to"]];
      const value = numbers[name] === "" ? NaN : Number(numbers[name]);
      return (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));
    });
    row.hidden = !within || (wanted.environment || environment) !== environment
      || !row.querySelector(".text").textContent.toLowerCase().includes(text);
  }
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("count").textContent = `${shown} of ${rows.length} sequences`;
}

function sort(head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const each of head.parentElement.cells) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => parseFloat(row.cells[head.cellIndex].textContent.replaceAll(",", ""));
  const key = (row) => (Number.isNaN(value(row)) ? -Infinity : value(row));
  const sign = down ? -1 : 1;
  table.tBodies[0].append(...rows.sort((a, b) => sign * (key(a) > key(b)) - sign * (key(a) < key(b))));
}

form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
table.tHead.addEventListener("click", (event) => {
  const head = event.target.closest("button")?.closest("th");
  if (head) sort(head);
});
filter();
