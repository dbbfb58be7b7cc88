// Curves

function ticks(low, high, log) {
  if (log) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const digit of high / low > 1e3 ? [1] : [1, 2, 5]) all.push(digit * 10 ** power);
    return all.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  }
  const rough = (high - low) / 5 || 1,
    unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  return Array.from(
    { length: Math.floor(high / step) - Math.ceil(low / step) + 1 },
    (_, i) => (Math.ceil(low / step) + i) * step,
  );
}

function scale(values, from, to, log) {
  const map = log ? Math.log : (value) => value;
  let low = values.reduce((a, b) => Math.min(a, b)),
    high = values.reduce((a, b) => Math.max(a, b));
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 1, high + 1];
  const position = (value) => from + ((to - from) * (map(value) - map(low))) / (map(high) - map(low));
  return Object.assign(position, { low, high });
}

// `series`: [{name, color, points: [[step, value], ...]}]; `best` is a step to mark.
function chart(title, series, { best, logarithmic } = {}) {
  series = series.filter((line) => line.points.length);
  if (!series.length) return null;
  const values = series.flatMap((line) => line.points.map(([, value]) => value));
  const log =
    logarithmic && values.every((value) => value > 0) && scale(values, 0, 1).high / scale(values, 0, 1).low > 20;
  const readout = el("output"),
    holder = el("div", { class: "plot" });
  const labels = series.map(() => el("b"));
  const legend =
    series.length > 1 &&
    el(
      "div",
      { class: "legend" },
      series.map((line, i) =>
        el("span", {}, el("i", { style: `background:var(${line.color})` }), line.name, labels[i]),
      ),
    );
  const nearest = (points, step) => points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
  function updateReadout(step) {
    const at = series.map((line) => nearest(line.points, step));
    readout.value = series.length > 1 ? `step ${count(step)}` : `step ${count(at[0][0])}: ${short(at[0][1])}`;
    labels.forEach((label, i) => (label.textContent = short(at[i][1])));
    return at;
  }
  const steps = [...new Set(series.flatMap((line) => line.points.map(([step]) => step)))].sort((a, b) => a - b);
  updateReadout(steps.at(-1));

  function draw(width) {
    const height = 190,
      left = 46,
      right = width - 12,
      bottom = height - 24;
    const x = scale(steps, left, right),
      y = scale(values, bottom, 12, log);
    const path = (points) =>
      "M" + points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("L");
    const guide = svg("line", { class: "guide", y1: 8, y2: bottom, visibility: "hidden" });
    const dots = series.map((line) => svg("circle", { r: 3.5, fill: `var(${line.color})`, visibility: "hidden" }));
    function show(step) {
      const at = updateReadout(step),
        visible = { visibility: "visible" };
      fill(guide, { x1: x(step), x2: x(step), ...visible }, []);
      dots.forEach((dot, i) => fill(dot, { cx: x(at[i][0]), cy: y(at[i][1]), ...visible }, []));
    }
    const hide = () => {
      [guide, ...dots].forEach((node) => node.setAttribute("visibility", "hidden"));
      updateReadout(steps.at(-1));
    };
    let current = steps.length - 1;
    const plot = svg(
      "svg",
      {
        width,
        height,
        role: "img",
        tabindex: 0,
        "aria-label": `${title}, from step ${steps[0]} to ${steps.at(-1)}`,
        pointermove: (event) => {
          const pointer = event.clientX - plot.getBoundingClientRect().left;
          current = indexOfBest(
            steps.map((step) => Math.abs(x(step) - pointer)),
            isLess,
          );
          show(steps[current]);
        },
        pointerleave: hide,
        blur: hide,
        keydown: (event) => {
          const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
          if (move) {
            current = Math.min(steps.length - 1, Math.max(0, current + move));
            show(steps[current]);
            event.preventDefault();
          }
        },
      },
      ticks(y.low, y.high, log).map((tick) => [
        svg("line", { class: "axis", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
        svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, short(tick)),
      ]),
      ticks(x.low, x.high).map((tick) =>
        svg("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, count(tick)),
      ),
      known(best) && svg("line", { class: "best", x1: x(best), x2: x(best), y1: 8, y2: bottom }),
      series.length === 1 &&
        svg("path", {
          class: "area",
          fill: `var(${series[0].color})`,
          d: `${path(series[0].points)}V${bottom}H${x(series[0].points[0][0])}Z`,
        }),
      series.map((line) =>
        line.points.length > 1
          ? svg("path", { class: "curve", stroke: `var(${line.color})`, d: path(line.points) })
          : svg("circle", { r: 3, cx: x(line.points[0][0]), cy: y(line.points[0][1]), fill: `var(${line.color})` }),
      ),
      guide,
      dots,
    );
    holder.replaceChildren(plot);
  }
  onWidth(holder, draw);
  return el(
    "figure",
    { class: "card chart" },
    el("figcaption", {}, el("h3", {}, title + (log ? " (log)" : "")), readout),
    holder,
    legend,
    known(best) && el("div", { class: "legend good" }, `┆ best accuracy at step ${count(best)}`),
  );
}

const points = (columns, key) =>
  (columns.step || []).map((step, i) => [step, (columns[key] || [])[i]]).filter(([, value]) => known(value));

// The step of the best adapter: highest accuracy, then lowest loss.
function bestStep({ validation: { step, accuracy, loss } }) {
  if (!accuracy) return null;
  const highest = accuracy[indexOfBest(accuracy, isGreater)];
  return step[
    indexOfBest(
      loss.map((value, i) => (accuracy[i] === highest ? value : null)),
      isLess,
    )
  ];
}
const CURVES = [
  ["Training loss", "metrics", "loss", true],
  ["Validation accuracy, %", "validation", "accuracy"],
  ["Validation loss", "validation", "loss"],
  ["Learning rate", "metrics", "learning_rate"],
  ["Gradient norm", "metrics", "grad_norm", true],
];

function curves(runs) {
  return CURVES.map(([title, file, key, logarithmic]) =>
    chart(
      title,
      runs.map((run, i) => ({
        name: run.name,
        color: `--c${i % 8}`,
        points: points(run[file], key),
      })),
      { logarithmic, best: runs.length === 1 && file === "validation" ? bestStep(runs[0]) : null },
    ),
  ).filter(Boolean);
}

// Heat maps of the LoRA matrices: one row per layer, one column per measurement

const MEASURES = {
  ratio: "norm of the update relative to the weight",
  norm: "norm of the update",
  effective_rank: "effective rank",
  change: "change since the last measurement",
};

function heatMaps(updates) {
  const measures = [
    ...new Set([...Object.keys(MEASURES), ...updates.maps.flatMap((map) => Object.keys(map.values))]),
  ].filter((key) => updates.maps.some((map) => map.values[key]));
  const holder = el("div", { class: "grid" });
  const show = (measure) => {
    const maps = updates.maps.filter((map) => map.values[measure]);
    holder.replaceChildren(...maps.map((map) => heatMap(updates.steps, map, measure)));
  };
  show(measures[0]);
  return [
    el(
      "div",
      { class: "tools" },
      choice(
        measures.map((key) => [key, MEASURES[key] || key]),
        measures[0],
        show,
      ),
    ),
    updates.warnings.map((warning) =>
      el("p", { class: "note warning" }, `Step ${count(warning.step)}: ${warning.text}`),
    ),
    holder,
  ];
}

function heatMap(steps, map, measure) {
  const rows = map.values[measure],
    all = rows.flat().filter(known);
  const low = Math.min(0, ...all),
    high = Math.max(...all, 1e-12);
  const readout = el("output"),
    holder = el("div", { class: "plot" });
  function draw(width) {
    const left = 34,
      cellWidth = (width - left) / steps.length;
    const cellHeight = Math.max(7, Math.min(22, 260 / rows.length)),
      bottom = cellHeight * rows.length;
    const color = (value) =>
      `color-mix(in oklab, var(--accent) ${Math.min(100, (100 * (value - low)) / (high - low))}%, var(--fill))`;
    const cell = (value, row, column) =>
      svg("rect", {
        x: left + column * cellWidth,
        y: row * cellHeight,
        width: cellWidth + 0.3,
        height: cellHeight - 1,
        style: `fill:${known(value) ? color(value) : "none"}`,
      });
    const labelInterval = Math.ceil(14 / cellHeight),
      labels = ticks(0, steps.length - 1).filter(Number.isInteger);
    function updateReadout(event) {
      const box = plot.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left - left) / cellWidth);
      const row = Math.floor((event.clientY - box.top) / cellHeight);
      const inside = known(steps[column]) && rows[row];
      readout.value = inside
        ? `layer ${map.layers[row]}, step ${count(steps[column])}: ${short(rows[row][column])}`
        : "";
    }
    const plot = svg(
      "svg",
      {
        width,
        height: bottom + 20,
        role: "img",
        "aria-label": `${map.module}: ${MEASURES[measure] || measure}`,
        pointermove: updateReadout,
        pointerleave: () => (readout.value = ""),
      },
      rows.map((row, i) => row.map((value, column) => cell(value, i, column))),
      map.layers.map(
        (layer, i) =>
          i % labelInterval === 0 && svg("text", { x: left - 8, y: (i + 0.5) * cellHeight + 3, "text-anchor": "end" }, layer),
      ),
      labels.map((column) =>
        svg("text", { x: left + (column + 0.5) * cellWidth, y: bottom + 15, "text-anchor": "middle" }, count(steps[column])),
      ),
    );
    holder.replaceChildren(plot);
  }
  onWidth(holder, draw);
  return el(
    "figure",
    { class: "card heat" },
    el("figcaption", {}, el("h3", {}, map.module), readout),
    holder,
    el("div", { class: "ramp" }, short(low), el("i"), short(high)),
  );
}

// Accuracy by type

const MAX_BARS = 12;

function bars(title, after, before) {
  const names = Object.keys(after || {}).sort((a, b) => after[b] - after[a]);
  if (!names.length) return null;
  const earlier = (name) => (before && known(before[name]) ? before[name] : null);
  const rows = (shown) =>
    el(
      "div",
      { class: "bars" },
      shown.map((name) => [
        el("span", { class: "name" }, name),
        el(
          "div",
          {},
          el("div", { class: "bar", style: `width:${after[name]}%` }),
          known(earlier(name)) && el("div", { class: "bar before", style: `width:${earlier(name)}%` }),
        ),
        el(
          "span",
          { class: "value" },
          known(earlier(name)) && el("span", { class: "quiet" }, earlier(name).toFixed(1) + " → "),
          percent(after[name]),
        ),
      ]),
    );
  return el(
    "figure",
    { class: "card" },
    el("figcaption", {}, el("h3", {}, title)),
    before &&
      el(
        "div",
        { class: "key" },
        [
          ["accent", "after LoRA"],
          ["before", "before LoRA"],
        ].map(([color, name]) => el("span", {}, el("i", { style: `background:var(--${color})` }), name)),
      ),
    rows(names.slice(0, MAX_BARS)),
    names.length > MAX_BARS &&
      el("details", {}, el("summary", {}, `${names.length - MAX_BARS} more`), rows(names.slice(MAX_BARS))),
  );
}
