// The gallery

const VERDICTS = {
  mistake: "mistake",
  broken: "broken by LoRA",
  fixed: "fixed by LoRA",
  right: "right",
  unknown: "not scored",
};
const SEARCH = "Search questions and answers";
const WRONG = new Set(["mistake", "broken"]);

function answer(one) {
  if (!one) return "–";
  const right = one.accuracy >= 50;
  return el(
    "span",
    { class: known(one.accuracy) ? (right ? "right" : "wrong") : "" },
    (known(one.accuracy) ? (right ? "✓ " : "✗ ") : "") + (one.answer || "(nothing)"),
    el("span", { class: "quiet" }, one.accuracy > 0 && one.accuracy < 100 ? ` ${short(one.accuracy)} %` : ""),
  );
}

function example(one, pictures, compared) {
  const picture = pictures[one.row];
  return el(
    "article",
    { class: "card example", "data-verdict": one.verdict },
    el("div", { class: "picture" }, picture ? el("img", { src: picture, alt: "" }) : "no thumbnail"),
    el(
      "div",
      { class: "words" },
      el("h3", {}, one.question || "(caption)"),
      facts([
        ["People", one.people.map(([text, times]) => (times > 1 ? `${text} ×${times}` : text)).join(", ")],
        ["Before", compared && answer(one.before)],
        [compared ? "After" : "Model", answer(one.after)],
        ["Sure", known(one.after.probability) ? Math.round(100 * one.after.probability) + " %" : null],
      ]),
      el("span", { class: "chip " + one.verdict }, VERDICTS[one.verdict]),
    ),
  );
}

function gallery({ examples, pictures, counts, compared }) {
  const cards = examples.map((one) => example(one, pictures, compared));
  const texts = ({ question, after, before, people }) => [
    question,
    after.answer,
    before ? before.answer : "",
    ...people.map(([text]) => text),
  ];
  const words = examples.map((one) => texts(one).join("\n").toLowerCase());
  const kept = {
    all: () => true,
    mistakes: ({ verdict }) => WRONG.has(verdict),
    fixed: ({ verdict }) => verdict === "fixed",
    broken: ({ verdict }) => verdict === "broken",
  };
  const wanted = { verdict: "all", type: "", text: "" };
  const told = el("p", { class: "quiet", "aria-live": "polite", id: "shown" });
  function filter(change) {
    Object.assign(wanted, change);
    const isOfType = (one) => !wanted.type || one.type === wanted.type,
      text = wanted.text.toLowerCase();
    examples.forEach((one, i) => {
      cards[i].hidden = !(kept[wanted.verdict](one) && isOfType(one) && words[i].includes(text));
    });
    const shown = cards.filter((card) => !card.hidden).length;
    told.textContent =
      `Shown: ${count(shown)} of the ${count(examples.length)} examples in this page. ` +
      `All ${count(total)} questions: ${summed}.`;
  }
  const both = compared ? " before and after" : "";
  const sums = { ...VERDICTS, mistake: "wrong" + both, right: "right" + both };
  const summed = Object.keys(sums)
    .filter((key) => counts[key])
    .map((key) => `${count(counts[key])} ${sums[key]}`)
    .join(", ");
  const total = Object.values(counts).reduce((a, b) => a + b, 0);
  const number = (key) => examples.filter(kept[key]).length;
  const types = [...new Set(examples.map((one) => one.type).filter(Boolean))].sort();
  const verdicts = [
    ["all", "All"],
    ["mistakes", "Mistakes"],
    ["fixed", "Fixed by LoRA"],
    ["broken", "Broken by LoRA"],
  ].slice(0, compared ? 4 : 2);
  filter({});
  return [
    el(
      "div",
      { class: "tools" },
      choice(
        verdicts.map(([key, label]) => [key, `${label} ${number(key)}`]),
        "all",
        (verdict) => filter({ verdict }),
      ),
      types.length > 1 &&
        el(
          "select",
          { "aria-label": "Type of answer", change: (event) => filter({ type: event.target.value }) },
          el("option", { value: "" }, "every type"),
          types.map((type) => el("option", { value: type }, type)),
        ),
      el("input", {
        type: "search",
        placeholder: SEARCH,
        "aria-label": SEARCH,
        input: (event) => filter({ text: event.target.value }),
      }),
    ),
    told,
    el("div", { class: "gallery" }, cards),
  ];
}

// One run

function accuracyScale(after, before) {
  const mark = (name, value, ...text) => el("span", { class: name, style: `left:${value}%` }, text);
  const between = (name, low, high) => el("div", { class: name, style: `left:${low}%;width:${high - low}%` });
  return el(
    "div",
    { class: "scale", "aria-hidden": "true" },
    el("div", { class: "rail" }),
    before &&
      (after.accuracy < before.accuracy
        ? between("gain loss", after.accuracy, before.accuracy)
        : between("gain", before.accuracy, after.accuracy)),
    after.accuracy_interval && between("span", ...after.accuracy_interval),
    before && mark("dot was", before.accuracy),
    mark("dot", after.accuracy),
    mark("tick", 0, "0"),
    mark("tick", 50, "50"),
    mark("tick", 100, "100 %"),
  );
}

function headline(run) {
  const { after, before } = run.evaluation;
  const single = before && before.method === (after || before).method ? before : null;
  if (!after || !known(after.accuracy)) {
    const last = `Training has not ended: the last step logged is ${count(run.last_step)}.`;
    const unfinished = run.state === "finished" ? "It was not evaluated." : last;
    return el(
      "div",
      {},
      el("div", { class: "none" }, "No accuracy yet"),
      el("p", { class: "quiet under" }, after ? `People's answers on ${run.split} are not known.` : unfinished),
    );
  }
  const gain = single ? after.accuracy - single.accuracy : 0;
  const points = `${gain < 0 ? "−" : "+"}${Math.abs(gain).toFixed(1)} points by LoRA`;
  return el(
    "div",
    {},
    el("div", { class: "label" }, `Accuracy on ${run.split}`),
    el("div", { class: "big num" }, after.accuracy.toFixed(1), el("small", {}, "%")),
    el(
      "div",
      { class: "under" },
      after.accuracy_interval && `95 % interval ${span(after.accuracy_interval)}`,
      single &&
        el(
          "div",
          { class: gain < 0 ? "wrong" : "right" },
          points,
          el("span", { class: "quiet" }, `, from ${percent(single.accuracy)}`),
        ),
    ),
    accuracyScale(after, single),
  );
}

function outcome(run) {
  const { after } = run.evaluation,
    took = run.training,
    looks = run.validation,
    best = bestLook(run);
  const soFar = run.state === "finished" ? "" : " so far";
  const beams = after && after.num_beams > 1 ? `${after.num_beams} beams` : "greedy";
  const rate = took.questions_per_second;
  return el(
    "div",
    { class: "card outcome" },
    headline(run),
    facts([
      ["Data set", run.data],
      ["Model", run.settings["model.checkpoint"]],
      ["Evaluated", after && `${count(after.scored)} questions, counted as ${after.method}, ${beams}`],
      ["LoRA", `rank ${run.settings["lora.r"]} on ${[].concat(run.settings["lora.target_modules"]).join(", ")}`],
      [
        "Trained",
        known(took.questions)
          ? `${count(took.questions)} questions, ${count(took.steps)} steps`
          : `${count(run.last_step)} steps${soFar}`,
      ],
      [
        "Best validation",
        known(best) && `${percent(looks.accuracy[looks.step.indexOf(best)])} at step ${count(best)}`,
      ],
      ["Training took", duration(took.seconds_training)],
      ["Speed", known(rate) && `${count(Math.round(rate))} questions a second`],
      ["Peak memory", mebibytes(took.peak_memory_bytes)],
    ]),
  );
}

const chip = (run) =>
  run.state === "finished"
    ? null
    : el("span", { class: "chip unfinished" }, `${run.state}, step ${count(run.last_step)}`);

function runPage(run) {
  const { after, before } = run.evaluation;
  const hints = (place) => run.hints.filter((hint) => hint.place === place).map(note);
  const drawn = curves([run]);
  return [
    el("header", {}, el("h1", {}, run.name, " ", chip(run)), el("div", { class: "quiet" }, run.path)),
    outcome(run),
    el("div", { class: "under" }, hints("outcome")),
    section("Curves", drawn.length && el("div", { class: "grid" }, drawn), hints("curves")),
    section("LoRA, layer by layer", run.watch && heatMaps(run.watch), hints("watch")),
    after &&
      section(
        "Accuracy by type",
        el(
          "div",
          { class: "grid" },
          bars("Type of answer", after.per_answer_type, before && before.per_answer_type),
          bars("Type of question", after.per_question_type, before && before.per_question_type),
        ),
      ),
    section("Examples", run.gallery && gallery(run.gallery), hints("gallery")),
    section(
      "Made with",
      facts(Object.entries(run.versions)),
      el("details", {}, el("summary", {}, "config.yaml, with every key"), el("pre", { tabindex: 0 }, run.config)),
    ),
  ];
}

// Several runs

const FEW = 4; // keys that stand before what came out; of more the table would begin with nothing else
const settingOf = (run, key) => (Array.isArray(run.settings[key]) ? run.settings[key].join(", ") : run.settings[key]);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function columns(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].filter(
    (key) => key !== "train.output_dir" && runs.some((run) => !same(run.settings[key], runs[0].settings[key])),
  );
  const counted = (run) => run.evaluation.after && `${run.split}, ${run.evaluation.after.method}`;
  const last = (values) => (values ? values.filter(known).at(-1) : null);
  const text = (found) => (known(found) ? String(found) : "–");
  const value = (name, of, show = text, better = null) => ({ name, of, show, better });
  const after = (run) => run.evaluation.after || {},
    before = (run) => run.evaluation.before || {};
  const changed = keys.map((key) => value(key, (run) => settingOf(run, key)));
  return [
    value("run", (run) => run.name),
    ...(changed.length > FEW ? [] : changed),
    value("accuracy", (run) => after(run).accuracy, percent, most),
    value(
      "95 % interval",
      (run) => after(run).accuracy_interval,
      (found) => span(found) || "–",
    ),
    value("evaluated on", counted),
    value("before LoRA", (run) => before(run).accuracy, percent),
    value("best validation", (run) => run.validation.accuracy && Math.max(...run.validation.accuracy), percent, most),
    value("last loss", (run) => last(run.metrics.loss), short),
    value("questions/s", (run) => run.training.questions_per_second, short),
    value(
      "training",
      (run) => run.training.seconds_training,
      (found) => duration(found) || "–",
    ),
    ...(changed.length > FEW ? changed : []),
  ].filter(({ of }, place) => place === 0 || runs.some((run) => known(of(run))));
}

function compare(a, b, sign) {
  if (!known(a) || !known(b)) return known(b) - known(a);
  return (
    sign *
    (typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true }))
  );
}

function comparison(runs) {
  const all = columns(runs),
    body = el("tbody");
  const best = all.map(({ of, better }) => better && runs.map(of)[pick(runs.map(of), better)]);
  const kind = (value, i) =>
    known(value) && value === best[i] ? "most" : all[i].show(value).length > 24 ? "wide" : null;
  const row = (run) =>
    el(
      "tr",
      {},
      all.map(({ of, show }, i) =>
        el(
          "td",
          { class: kind(of(run), i) },
          i === 0 && el("i", { class: "swatch", style: `background:var(--c${runs.indexOf(run) % 8})` }),
          show(of(run)),
          i === 0 && chip(run),
        ),
      ),
    );
  const heads = all.map(({ name }, i) =>
    el("th", { scope: "col" }, el("button", { type: "button", click: () => sort(i) }, name)),
  );
  function sort(i) {
    const { of } = all[i],
      before = heads[i].getAttribute("aria-sort");
    const falling = before ? before === "ascending" : runs.some((run) => typeof of(run) === "number");
    const order = [...runs].sort((a, b) => compare(of(a), of(b), falling ? -1 : 1));
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", falling ? "descending" : "ascending");
    body.replaceChildren(...order.map(row));
  }
  body.append(...runs.map(row));
  const accuracy = all.findIndex(({ name }) => name === "accuracy");
  if (accuracy >= 0) sort(accuracy);
  return el("div", { class: "card table", tabindex: 0 }, el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
}

function runsPage(runs) {
  return [
    el(
      "header",
      {},
      el("h1", {}, `${runs.length} runs compared`),
      el(
        "div",
        { class: "quiet" },
        "What differs in their configs, and what came out. A click on a column sorts by it.",
      ),
    ),
    el("div", { class: "under" }, comparison(runs)),
    section("Curves", el("div", { class: "grid" }, curves(runs))),
    section("What is missing", runs.flatMap((run) => run.hints.filter((hint) => hint.place === "outcome")).map(note)),
  ];
}

const page = data.runs.length > 1 ? runsPage(data.runs) : runPage(data.runs[0]);
document.getElementById("page").replaceChildren(...page.flat(Infinity).filter(Boolean));
