// Shows one board at a time, sorts all boards alike and filters their rows; without it every board is shown, by rank.
(function () {
  "use strict";
  const boards = [...document.querySelectorAll("section.board")];
  const byId = (id) => document.getElementById(id);
  const level = byId("level"), text = byId("filter"), defence = byId("defence"), form = byId("controls");
  const ranked = new Map(boards.map((board) => [board, [...board.querySelectorAll("tbody tr")]]));
  let sorted = "by rank";

  function shown() {
    return byId(level.value);
  }

  function announce() {
    const rows = ranked.get(shown()), visible = rows.filter((row) => !row.hidden).length;
    const none = visible ? "" : " No model fits the filters.";
    byId("status").textContent = `${visible} of ${rows.length} models shown, sorted ${sorted}.${none}`;
  }

  function filter() {
    const wanted = text.value.trim().toLowerCase();
    for (const board of boards) {
      const hidden = new Set();
      for (const row of ranked.get(board)) {
        const words = [...row.children].slice(1, 4).map((cell) => cell.textContent).join(" ").toLowerCase();
        row.hidden = !words.includes(wanted) || (defence.value !== "" && row.dataset.defence !== defence.value);
        if (row.hidden) hidden.add(row.dataset.id);
      }
      board.querySelectorAll("svg.scatter a").forEach((point) => point.toggleAttribute("hidden", hidden.has(point.dataset.id)));
    }
    announce();
  }

  // Shows a hint if the table is wider than the window.
  function hint() {
    const table = shown().querySelector(".scroll");
    shown().querySelector(".hint").hidden = table.scrollWidth <= table.clientWidth;
  }

  function show() {
    boards.forEach((board) => { board.hidden = board.id !== level.value; });
    announce();
    hint();
  }

  // The value that a row is sorted by; null, for no value, stays last in either direction.
  function valueOf(row, column, numeric) {
    const cell = row.children[column];
    if (!numeric) return cell.textContent.trim().toLowerCase();
    const value = cell.dataset.value;
    return value ? Number(value === "inf" ? Infinity : value) : null;
  }

  function compare(a, b) {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : (a > b) - (a < b);
  }

  function sort(column, direction) {
    for (const board of boards) {
      const heads = [...board.querySelectorAll("thead th")], numeric = heads[column].dataset.kind === "number";
      heads.forEach((head, place) => head.setAttribute("aria-sort", place === column ? direction : "none"));
      const sign = direction === "ascending" ? 1 : -1;
      const rows = ranked.get(board).map((row) => [valueOf(row, column, numeric), row]);
      rows.sort(([a], [b]) => compare(a, b) * (a === null || b === null ? 1 : sign));
      board.querySelector("tbody").append(...rows.map(([, row]) => row));
      sorted = `by ${heads[column].textContent.trim().toLowerCase()}, ${direction}`;
    }
    announce();
  }

  function makeSortable(head, column) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    if (!head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort"), first = head.dataset.first || "ascending";
      const other = now === "ascending" ? "descending" : "ascending";
      sort(column, now === "none" ? first : other);
    });
  }

  // The address may name a board, or a note in one.
  function follow() {
    const target = byId(decodeURIComponent(location.hash.slice(1)));
    const board = target && target.closest("section.board");
    if (board) level.value = board.id;
    show();
    if (board && target !== board) target.scrollIntoView({ block: "center" });
  }

  boards.forEach((board) => board.querySelectorAll("thead th").forEach(makeSortable));
  level.addEventListener("change", () => {
    history.replaceState(null, "", "#" + encodeURIComponent(level.value));
    show();
  });
  text.addEventListener("input", filter);
  defence.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    text.value = "";
    defence.value = "";
    filter();
  });
  window.addEventListener("hashchange", follow);
  window.addEventListener("resize", hint);
  form.hidden = false;
  follow();
})();
