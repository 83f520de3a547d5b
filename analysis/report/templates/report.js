(function () {
  "use strict";
  // Plotly changes what it is given, so every drawing starts from the text.
  function read(id) { return JSON.parse(document.getElementById(id).textContent); }
  function all(selector, within) { return Array.prototype.slice.call((within || document).querySelectorAll(selector)); }
  var templates = read("templates"), data = read("trials-data");
  var root = document.documentElement, PRINT_WIDTH = 660, PRINT_HEIGHT = 700;
  var systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  var narrow = window.matchMedia("(max-width: 40rem)");
  var printing = false;
  var card = document.getElementById("card"), ring = document.getElementById("ring");

  // ------------------------------------------------------------------------------------------------ theme
  var themeBox = document.getElementById("theme"), themeKey = "mebm-theme";
  function setTheme(name) {
    if (name) { root.dataset.theme = name; } else { delete root.dataset.theme; }
    themeBox.value = name;
  }
  try { setTheme(localStorage.getItem(themeKey) || ""); } catch (error) { /* without a storage: the system's */ }
  function scheme() {
    if (printing) { return "light"; }
    return root.dataset.theme || (systemDark.matches ? "dark" : "light");
  }

  // ---------------------------------------------------------------------------------------------- filters
  var form = document.querySelector("#filters form"), filterBox = document.getElementById("filters");
  // Per field the chosen values' numbers; null where none is chosen, which lets everything through.
  var chosen = data.filters.map(function () { return null; });
  function passes(study, id) {
    var trial = data.studies[study].trials[id];
    return !trial || chosen.every(function (some, i) { return some === null || some.indexOf(trial.chosen[i]) >= 0; });
  }
  function filtering() { return chosen.some(function (some) { return some !== null; }); }

  // The state is in the address after the anchor, as in #study-0-trials&outcome=diverged,collapsed&sampling_steps=1
  function fromHash() {
    var parts = location.hash.replace(/^#/, "").split("&");
    var anchor = parts[0].indexOf("=") < 0 ? parts.shift() : "";
    var found = data.filters.map(function () { return null; });
    parts.forEach(function (part) {
      var at = part.indexOf("="), field = part.slice(0, at);
      data.filters.forEach(function (filter, i) {
        if (filter.field !== field) { return; }
        var some = part.slice(at + 1).split(",").map(function (v) {
          try { return filter.values.indexOf(decodeURIComponent(v)); } catch (error) { return -1; }
        }).filter(function (n) { return n >= 0; });
        found[i] = some.length ? some : null;
      });
    });
    return { anchor: anchor, chosen: found };
  }
  function toHash(anchor) {
    var parts = anchor ? [anchor] : [];
    data.filters.forEach(function (filter, i) {
      if (chosen[i]) {
        parts.push(filter.field + "=" + chosen[i].map(function (n) { return encodeURIComponent(filter.values[n]); }).join(","));
      }
    });
    return "#" + parts.join("&");
  }
  function showChoice() {
    if (form) { all("input", form).forEach(function (box) {
      var i = data.filters.findIndex(function (f) { return f.field === box.name; });
      box.checked = chosen[i] !== null && chosen[i].indexOf(Number(box.value)) >= 0;
    }); }
    applyFilters();
  }
  function applyFilters() {
    var total = 0, shown = 0, by = data.filters.findIndex(function (f) { return f.field === "study"; });
    data.studies.forEach(function (study, number) {
      var ids = Object.keys(study.trials), left = ids.filter(function (id) { return passes(number, id); }).length;
      total += ids.length;
      shown += left;
      var away = by >= 0 && chosen[by] !== null && chosen[by].indexOf(number) < 0;
      all("[data-of='" + number + "']").forEach(function (part) { part.hidden = away; });
      all(".plot[data-study='" + number + "'] .shown").forEach(function (note) {
        note.textContent = filtering() ? left + " of " + ids.length + " trials shown" : "";
      });
    });
    all("tr[data-trial]").forEach(function (row) { row.hidden = !passes(Number(row.dataset.study), row.dataset.trial); });
    if (filterBox) {
      var words = data.filters.map(function (filter, i) {
        return chosen[i] && filter.label + " " + chosen[i].map(function (n) { return filter.values[n]; }).join(" or ");
      }).filter(Boolean);
      document.getElementById("filtered").textContent =
        words.length ? "· " + shown + " of " + total + " shown: " + words.join("; ") : "· all " + total + " shown";
      filterBox.classList.toggle("active", words.length > 0);
    }
    hideCard();
    refresh();
  }
  function readForm() {
    chosen = data.filters.map(function (filter) {
      var some = all("input:checked", form).filter(function (box) { return box.name === filter.field; });
      return some.length ? some.map(function (box) { return Number(box.value); }) : null;
    });
    history.replaceState(null, "", toHash(fromHash().anchor));
    applyFilters();
  }
  if (form) {
    form.addEventListener("change", readForm);
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.addEventListener("reset", function () { setTimeout(readForm, 0); });
  }
  // A plain link would drop the filters from the address.
  document.addEventListener("click", function (event) {
    var link = event.target.closest && event.target.closest("a[href^='#']");
    if (!link) { return; }
    event.preventDefault();
    history.pushState(null, "", toHash(link.getAttribute("href").slice(1)));
    goTo(fromHash().anchor);
  });
  function goTo(anchor) {
    var place = anchor && document.getElementById(anchor);
    if (!place) { return; }
    for (var fold = place.closest("details"); fold; fold = fold.parentElement.closest("details")) { fold.open = true; }
    place.scrollIntoView();
    place.setAttribute("tabindex", "-1");
    place.focus({ preventScroll: true });
  }
  function followHash() {
    var state = fromHash();
    chosen = state.chosen;
    showChoice();
    goTo(state.anchor);
  }
  window.addEventListener("hashchange", followHash);
  window.addEventListener("popstate", followHash);

  // ---------------------------------------------------------------------------------------------- figures
  var items = all(".plot").map(function (plot) {
    return {
      plot: plot,
      canvas: plot.querySelector(".canvas"),
      source: plot.querySelector("script").textContent,
      study: plot.dataset.study === undefined ? null : Number(plot.dataset.study),
      height: parseFloat(plot.querySelector(".canvas").style.height),
      drawn: null,
      near: false
    };
  });
  function trialOf(trace, point) {
    if (trace.ids) { return trace.ids[point]; }
    return trace.meta && trace.meta.trial !== undefined ? trace.meta.trial : null;
  }
  function masked(object, keep, depth) {
    // A trace's arrays of one value per point, also those of its marker and error bars.
    Object.keys(object).forEach(function (name) {
      var value = object[name];
      if (Array.isArray(value) && value.length === keep.length) {
        object[name] = value.filter(function (_, i) { return keep[i]; });
      } else if (depth && value && typeof value === "object" && !Array.isArray(value)) {
        masked(value, keep, depth - 1);
      }
    });
  }
  function onlyShown(traces, study) {
    // Trials by the name of what draws them: a figure of two panels has two lines of one trial.
    var counts = {};
    function count(name, id) {
      var sum = counts[name] || (counts[name] = { shown: new Set(), all: new Set() }), shown = passes(study, id);
      sum.all.add(id);
      if (shown) { sum.shown.add(id); }
      return shown;
    }
    traces.forEach(function (trace) {
      if (trace.ids) {
        masked(trace, trace.ids.map(function (id) { return count(trace.name, id); }), 1);
      } else if (trialOf(trace, 0) !== null) {
        trace.visible = count(trace.name, trace.meta.trial);
      }
    });
    if (filtering()) {
      traces.forEach(function (trace) {
        var sum = counts[trace.name];
        if (sum && sum.shown.size < sum.all.size) { trace.name += ": " + (sum.shown.size || "none") + " shown"; }
      });
    }
  }
  function columnsOf(layout) {
    var starts = new Set();
    Object.keys(layout).forEach(function (name) {
      if (/^xaxis/.test(name)) { starts.add((layout[name].domain || [0])[0]); }
    });
    return starts.size;
  }
  function wanted(item) {
    return [scheme(), printing, narrow.matches, item.study === null ? "" : JSON.stringify(chosen)].join("|");
  }
  // The library is run when the first figure is drawn: the page can be read and filtered before that.
  function needPlotly() {
    if (window.Plotly) { return; }
    var script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.appendChild(script);
  }
  function draw(item) {
    needPlotly();
    var figure = JSON.parse(item.source), layout = figure.layout, first = item.drawn === null;
    item.drawn = wanted(item);
    layout.template = templates[scheme()];
    // Zoom and the legend's choices outlive a filter and a change of theme.
    layout.uirevision = "kept";
    layout.autosize = !printing;
    if (printing) { layout.width = PRINT_WIDTH; }
    // A figure and its caption stay on one sheet; what is taller than that is drawn lower for it.
    if (item.height > PRINT_HEIGHT) {
      layout.height = printing ? PRINT_HEIGHT : item.height;
      item.canvas.style.height = layout.height + "px";
    }
    if (narrow.matches && !printing) {
      layout.font = { size: 12 };
      layout.margin = { l: 45, r: 8, t: 100, b: 50 };
    }
    // Plots side by side would be a finger wide on a telephone: they keep a width to read them at, and scroll.
    var columns = narrow.matches && !printing ? columnsOf(layout) : 1;
    item.canvas.classList.toggle("wide", columns > 1);
    if (columns > 1) {
      layout.autosize = false;
      layout.width = Math.max(item.canvas.clientWidth, 320 * columns);
    }
    if (item.study !== null) {
      onlyShown(figure.data, item.study);
      figure.data.forEach(function (trace) {
        if (trialOf(trace, 0) !== null && trace.hoverinfo !== "skip") { trace.hoverinfo = "none"; }
      });
    }
    var drawing = Plotly.react(item.canvas, figure.data, layout, {
      responsive: false,
      displaylogo: false,
      displayModeBar: narrow.matches || printing ? false : "hover",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]
    });
    if (first) {
      item.canvas.on("plotly_hover", function (event) { overPoint(item, event.points); });
      item.canvas.on("plotly_unhover", hideCard);
    }
    return drawing;
  }
  function refresh() {
    items.forEach(function (item) {
      if (item.near && item.drawn !== wanted(item)) { draw(item); }
    });
  }
  // A figure is drawn when it comes near the window: a report of many studies opens as fast as a small one.
  if (window.IntersectionObserver) {
    var watch = new IntersectionObserver(function (entries) {
      entries.forEach(function (entry) {
        var item = items.find(function (one) { return one.plot === entry.target; });
        item.near = entry.isIntersecting;
      });
      refresh();
    }, { rootMargin: "500px 0px" });
    items.forEach(function (item) { watch.observe(item.plot); });
  } else {
    items.forEach(function (item) { item.near = true; });
  }
  // A figure follows its box, not the window: the box also changes when a scroll bar comes or the page is split.
  if (window.ResizeObserver) {
    var watcher = new ResizeObserver(function (entries) {
      if (printing) { return; }
      entries.forEach(function (entry) {
        var width = Math.round(entry.contentRect.width), shown = entry.target._fullLayout;
        if (width > 0 && shown && !entry.target.classList.contains("wide") && Math.abs(shown.width - width) > 1) { Plotly.Plots.resize(entry.target); }
      });
    });
    items.forEach(function (item) { watcher.observe(item.canvas); });
  }
  all(".choice select").forEach(function (box) {
    var figures = all(".plot", box.closest(".choice"));
    function choose() { figures.forEach(function (plot, i) { plot.hidden = i !== box.selectedIndex; }); hideCard(); }
    box.addEventListener("change", choose);
    choose();
  });

  // ------------------------------------------------------------------------------------ what a pointer shows
  function add(parent, tag, words, kind) {
    var element = document.createElement(tag);
    element.textContent = words;
    if (kind) { element.className = kind; }
    parent.appendChild(element);
    return element;
  }
  function plain(markup) { return new DOMParser().parseFromString(markup, "text/html").body.textContent; }
  function fillCard(study, id, lines) {
    var of = data.studies[study], trial = of.trials[id];
    card.textContent = "";
    var title = add(card, "p", "");
    add(title, "b", id);
    title.appendChild(document.createTextNode(" " + trial.ending));
    lines.forEach(function (line) { add(card, "p", line); });
    var list = add(card, "dl", ""), rest = [];
    of.fields.forEach(function (field, i) {
      if (field[1]) {
        add(list, "dt", field[0]);
        add(list, "dd", trial.values[i]);
      } else {
        rest.push(field[0] + " " + trial.values[i]);
      }
    });
    add(list, "dt", "seed");
    add(list, "dd", trial.seed + ", setting " + trial.setting);
    of.common.forEach(function (pair) { rest.push(pair[0] + " " + pair[1]); });
    if (rest.length) { add(card, "p", rest.join(", "), "soft"); }
    if (trial.samples) {
      var picture = add(card, "img", "");
      picture.alt = trial.samples[0];
      picture.onload = function () {
        // A whole number of times its size, so that every pixel is equally large.
        var room = Math.min(240 / picture.naturalWidth, window.innerHeight * (narrow.matches ? 0.25 : 0.4) / picture.naturalHeight);
        picture.width = picture.naturalWidth * Math.max(1, Math.floor(room));
        placeCard();
      };
      picture.src = trial.samples[1];
      add(card, "p", "Samples: " + trial.samples[0], "soft");
    }
    card.hidden = false;
  }
  var at = { x: 0, y: 0 };
  var placedAt = 0;
  function placeCard() {
    placedAt = window.scrollY;
    var width = card.offsetWidth, height = card.offsetHeight, gap = 16;
    var left = at.x + gap + width < window.innerWidth ? at.x + gap : at.x - gap - width;
    var top = Math.min(at.y + gap, window.innerHeight - height - 6);
    if (left < 4) { left = Math.max(4, (window.innerWidth - width) / 2); top = at.y + gap + height < window.innerHeight ? at.y + gap : at.y - gap - height; }
    card.style.left = left + "px";
    card.style.top = Math.max(4, top) + "px";
  }
  function overPoint(item, points) {
    var point = points.find(function (p) { return item.study !== null && trialOf(p.data, p.pointNumber) !== null; });
    if (!point) { hideCard(); return; }
    var trace = point.data, lines = [];
    if (Array.isArray(trace.hovertext)) { lines = String(trace.hovertext[point.pointNumber]).split("<br>").map(plain).filter(Boolean); }
    if (!trace.ids && !lines.length) { lines = ["at " + plain(point.xaxis.title.text || "") + " " + point.x]; }
    fillCard(item.study, trialOf(trace, point.pointNumber), lines);
    var box = item.canvas.querySelector(".main-svg").getBoundingClientRect();
    at = {
      x: box.left + point.xaxis._offset + point.xaxis.d2p(point.x),
      y: box.top + point.yaxis._offset + point.yaxis.d2p(point.y)
    };
    ring.hidden = false;
    ring.style.left = at.x + "px";
    ring.style.top = at.y + "px";
    placeCard();
  }
  function hideCard() { card.hidden = true; ring.hidden = true; }
  // The news of a scroll that brought a figure into view may come once its card is there already.
  window.addEventListener("scroll", function () {
    if (Math.abs(window.scrollY - placedAt) > 2) { hideCard(); }
  }, { passive: true });
  all("tr[data-trial]").forEach(function (row) {
    row.addEventListener("pointerenter", function (event) {
      if (event.pointerType !== "mouse" || !data.studies[row.dataset.study].trials[row.dataset.trial]) { return; }
      fillCard(Number(row.dataset.study), row.dataset.trial, []);
      at = { x: event.clientX, y: event.clientY };
      placeCard();
    });
    row.addEventListener("pointerleave", hideCard);
  });

  // Arrow keys go through a focused figure's points, as a pointer would.
  function steps(canvas) {
    var found = [];
    (canvas._fullData || []).forEach(function (trace, curve) {
      if (trace.visible !== true || trace.hoverinfo === "skip" || ["scatter", "bar"].indexOf(trace.type) < 0) { return; }
      var xs = trace.x || [], ys = trace.y || [], points = [];
      for (var i = 0; i < xs.length; i += 1) { if (xs[i] !== null && ys[i] !== null) { points.push(i); } }
      if (trace.type === "scatter") { points.sort(function (a, b) { return xs[a] - xs[b]; }); }
      if (points.length) { found.push({ curve: curve, points: points, subplot: trace.xaxis + trace.yaxis }); }
    });
    return found;
  }
  items.forEach(function (item) {
    var trace = -1, point = 0;
    item.canvas.addEventListener("keydown", function (event) {
      var move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Escape") { trace = -1; leave(); return; }
      if (!move || event.ctrlKey || event.altKey || event.metaKey || !item.canvas._fullData) { return; }
      var found = steps(item.canvas);
      if (!found.length) { return; }
      event.preventDefault();
      if (trace < 0 || trace >= found.length) {
        trace = 0; point = 0;
      } else if (move[0]) {
        trace = (trace + move[0] + found.length) % found.length; point = 0;
      } else if (point + move[1] < 0 || point + move[1] >= found[trace].points.length) {
        // Beyond the last point of a group comes the next group.
        trace = (trace + move[1] + found.length) % found.length;
        point = move[1] > 0 ? 0 : found[trace].points.length - 1;
      } else {
        point += move[1];
      }
      var at = { curveNumber: found[trace].curve, pointNumber: found[trace].points[point] };
      Plotly.Fx.hover(item.canvas, [at], [found[trace].subplot]);
      // Plotly tells of what a pointer is over, not of what it was told to show.
      var full = item.canvas._fullData[at.curveNumber], layout = item.canvas._fullLayout;
      overPoint(item, [{
        data: item.canvas.data[at.curveNumber],
        pointNumber: at.pointNumber,
        x: full.x[at.pointNumber],
        y: full.y[at.pointNumber],
        xaxis: layout["xaxis" + full.xaxis.slice(1)],
        yaxis: layout["yaxis" + full.yaxis.slice(1)]
      }]);
    });
    function leave() { Plotly.Fx.unhover(item.canvas); hideCard(); }
    item.canvas.addEventListener("blur", function () { if (item.canvas._fullLayout) { leave(); } });
  });

  // ------------------------------------------------------------------------------------------------ tables
  all("table.sortable").forEach(function (table) {
    var heads = all("th", table), body = table.tBodies[0];
    function key(row, column) {
      var cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
    }
    heads.forEach(function (head, column) {
      head.querySelector("button").addEventListener("click", function () {
        var down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
        all("tr", body).sort(function (a, b) {
          var x = key(a, column), y = key(b, column);
          // What was not measured stays last either way.
          if (typeof x !== typeof y) { return typeof x === "number" ? -1 : 1; }
          return down * (typeof x === "number" ? x - y : x.localeCompare(y));
        }).forEach(function (row) { body.appendChild(row); });
      });
    });
  });

  all(".copy").forEach(function (button) {
    button.addEventListener("click", function () {
      var code = button.parentElement.querySelector("code");
      function said(words) { button.textContent = words; setTimeout(function () { button.textContent = "copy"; }, 1500); }
      // Without a clipboard (a page from a file in some browsers) the line is selected, to be copied by hand.
      function select() { window.getSelection().selectAllChildren(code); said("selected"); }
      if (!navigator.clipboard) { select(); return; }
      navigator.clipboard.writeText(code.textContent).then(function () { said("copied"); }, select);
    });
  });

  // ------------------------------------------------------------------------------------- theme, print, start
  themeBox.addEventListener("change", function () {
    setTheme(themeBox.value);
    try { localStorage.setItem(themeKey, themeBox.value); } catch (error) { /* it lasts as long as the page */ }
    refresh();
  });
  systemDark.addEventListener("change", refresh);
  narrow.addEventListener("change", refresh);
  // Paper has no click: what is closed on the screen is opened for it, and closed again, but for published tables of
  // which nothing is measured. Every figure is drawn for it.
  var closed = [];
  window.addEventListener("beforeprint", function () {
    if (printing) { return; }
    printing = true;
    hideCard();
    closed = all("details:not([open]):not(.query):not(#filters):not(#tables)");
    closed.forEach(function (box) { box.open = true; });
    items.forEach(function (item) { if (!item.plot.closest("[hidden]")) { draw(item); } });
  });
  window.addEventListener("afterprint", function () {
    if (!printing) { return; }
    printing = false;
    closed.forEach(function (box) { box.open = false; });
    refresh();
  });
  followHash();
  // Whoever scrolls to the first figure should not wait for the library.
  if (items.length) { window.addEventListener("load", function () { setTimeout(needPlotly, 50); }); }
})();
