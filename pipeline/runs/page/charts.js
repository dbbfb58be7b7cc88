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

// `series`: [{name, colour, points: [[step, value], ...]}]; `best` is a step to be marked.
function chart(title, series, { best, logarithmic } = {}) {
  series = series.filter((one) => one.points.length);
  if (!series.length) return null;
  const values = series.flatMap((one) => one.points.map(([, value]) => value));
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
      series.map((one, i) =>
        el("span", {}, el("i", { style: `background:var(${one.colour})` }), one.name, labels[i]),
      ),
    );
  const nearest = (points, step) => points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
  function tell(step) {
    const at = series.map((one) => nearest(one.points, step));
    readout.value = series.length > 1 ? `step ${count(step)}` : `step ${count(at[0][0])}: ${short(at[0][1])}`;
    labels.forEach((label, i) => (label.textContent = short(at[i][1])));
    return at;
  }
  const steps = [...new Set(series.flatMap((one) => one.points.map(([step]) => step)))].sort((a, b) => a - b);
  tell(steps.at(-1));

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
    const dots = series.map((one) => svg("circle", { r: 3.5, fill: `var(${one.colour})`, visibility: "hidden" }));
    function show(step) {
      const at = tell(step),
        visible = { visibility: "visible" };
      fill(guide, { x1: x(step), x2: x(step), ...visible }, []);
      dots.forEach((dot, i) => fill(dot, { cx: x(at[i][0]), cy: y(at[i][1]), ...visible }, []));
    }
    const hide = () => {
      [guide, ...dots].forEach((node) => node.setAttribute("visibility", "hidden"));
      tell(steps.at(-1));
    };
    let place = steps.length - 1;
    const picture = svg(
      "svg",
      {
        width,
        height,
        role: "img",
        tabindex: 0,
        "aria-label": `${title}, from step ${steps[0]} to ${steps.at(-1)}`,
        pointermove: (event) => {
          const wanted = event.clientX - picture.getBoundingClientRect().left;
          place = pick(
            steps.map((step) => Math.abs(x(step) - wanted)),
            least,
          );
          show(steps[place]);
        },
        pointerleave: hide,
        blur: hide,
        keydown: (event) => {
          const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
          if (move) {
            place = Math.min(steps.length - 1, Math.max(0, place + move));
            show(steps[place]);
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
          fill: `var(${series[0].colour})`,
          d: `${path(series[0].points)}V${bottom}H${x(series[0].points[0][0])}Z`,
        }),
      series.map((one) =>
        one.points.length > 1
          ? svg("path", { class: "curve", stroke: `var(${one.colour})`, d: path(one.points) })
          : svg("circle", { r: 3, cx: x(one.points[0][0]), cy: y(one.points[0][1]), fill: `var(${one.colour})` }),
      ),
      guide,
      dots,
    );
    holder.replaceChildren(picture);
  }
  onWidth(holder, draw);
  return el(
    "figure",
    { class: "card chart" },
    el("figcaption", {}, el("h3", {}, title + (log ? " (log)" : "")), readout),
    holder,
    legend,
    known(best) && el("div", { class: "legend right" }, `┆ best accuracy at step ${count(best)}`),
  );
}

const points = (columns, key) =>
  (columns.step || []).map((step, i) => [step, (columns[key] || [])[i]]).filter(([, value]) => known(value));
const bestLook = ({ validation }) => (validation.accuracy ? validation.step[pick(validation.accuracy, most)] : null);
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
        colour: `--c${i % 8}`,
        points: points(run[file], key),
      })),
      { logarithmic, best: runs.length === 1 && file === "validation" ? bestLook(runs[0]) : null },
    ),
  ).filter(Boolean);
}

// Heat maps of the LoRA matrices: a row a layer, a column a look

const MEASURES = {
  ratio: "update relative to weight",
  norm: "norm of the update",
  effective_rank: "effective rank",
  change: "change since the last look",
};

function heatMaps(watch) {
  const measures = [
    ...new Set([...Object.keys(MEASURES), ...watch.maps.flatMap((map) => Object.keys(map.values))]),
  ].filter((key) => watch.maps.some((map) => map.values[key]));
  const holder = el("div", { class: "grid" });
  const show = (measure) => {
    const maps = watch.maps.filter((map) => map.values[measure]);
    holder.replaceChildren(...maps.map((map) => heatMap(watch.steps, map, measure)));
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
    watch.warnings.map((told) => el("p", { class: "note odd" }, `Step ${count(told.step)}: ${told.words}`)),
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
      wide = (width - left) / steps.length;
    const tall = Math.max(7, Math.min(22, 260 / rows.length)),
      bottom = tall * rows.length;
    const colour = (value) =>
      `color-mix(in oklab, var(--accent) ${Math.min(100, (100 * (value - low)) / (high - low))}%, var(--fill))`;
    const cell = (value, row, column) =>
      svg("rect", {
        x: left + column * wide,
        y: row * tall,
        width: wide + 0.3,
        height: tall - 1,
        style: `fill:${known(value) ? colour(value) : "none"}`,
      });
    const every = Math.ceil(14 / tall),
      labels = ticks(0, steps.length - 1).filter(Number.isInteger);
    function tell(event) {
      const box = picture.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left - left) / wide);
      const row = Math.floor((event.clientY - box.top) / tall);
      const inside = known(steps[column]) && rows[row];
      readout.value = inside
        ? `layer ${map.layers[row]}, step ${count(steps[column])}: ${short(rows[row][column])}`
        : "";
    }
    const picture = svg(
      "svg",
      {
        width,
        height: bottom + 20,
        role: "img",
        "aria-label": `${map.module}: ${MEASURES[measure] || measure}`,
        pointermove: tell,
        pointerleave: () => (readout.value = ""),
      },
      rows.map((row, i) => row.map((value, column) => cell(value, i, column))),
      map.layers.map(
        (layer, i) =>
          i % every === 0 && svg("text", { x: left - 8, y: (i + 0.5) * tall + 3, "text-anchor": "end" }, layer),
      ),
      labels.map((place) =>
        svg("text", { x: left + (place + 0.5) * wide, y: bottom + 15, "text-anchor": "middle" }, count(steps[place])),
      ),
    );
    holder.replaceChildren(picture);
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

const SHOWN = 12;

function bars(title, after, before) {
  const names = Object.keys(after || {}).sort((a, b) => after[b] - after[a]);
  if (!names.length) return null;
  const was = (name) => (before && known(before[name]) ? before[name] : null);
  const rows = (some) =>
    el(
      "div",
      { class: "bars" },
      some.map((name) => [
        el("span", { class: "name" }, name),
        el(
          "div",
          {},
          el("div", { class: "bar", style: `width:${after[name]}%` }),
          known(was(name)) && el("div", { class: "bar was", style: `width:${was(name)}%` }),
        ),
        el(
          "span",
          { class: "value" },
          known(was(name)) && el("span", { class: "quiet" }, was(name).toFixed(1) + " → "),
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
          ["before", "before"],
        ].map(([colour, name]) => el("span", {}, el("i", { style: `background:var(--${colour})` }), name)),
      ),
    rows(names.slice(0, SHOWN)),
    names.length > SHOWN &&
      el("details", {}, el("summary", {}, `${names.length - SHOWN} more`), rows(names.slice(SHOWN))),
  );
}
