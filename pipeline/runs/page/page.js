// The gallery

const VERDICTS = {
  incorrect: "incorrect",
  regressed: "regressed with LoRA",
  fixed: "fixed by LoRA",
  correct: "correct",
  unscored: "not scored",
};
const MIN_CORRECT_ACCURACY = 50;
const SEARCH = "Search questions and answers";
const MISTAKES = new Set(["incorrect", "regressed"]);

function answer(prediction) {
  if (!prediction) return "–";
  const { accuracy, answer } = prediction,
    correct = accuracy >= MIN_CORRECT_ACCURACY;
  return el(
    "span",
    { class: known(accuracy) ? (correct ? "good" : "bad") : "" },
    (known(accuracy) ? (correct ? "✓ " : "✗ ") : "") + (answer || "(empty)"),
    el("span", { class: "quiet" }, accuracy > 0 && accuracy < 100 ? ` ${short(accuracy)} %` : ""),
  );
}

function exampleCard(example, thumbnails, compared) {
  const { row, verdict, question, references, after, before } = example;
  return el(
    "article",
    { class: "card example", "data-verdict": verdict },
    el("div", { class: "image" }, thumbnails[row] ? el("img", { src: thumbnails[row], alt: "" }) : "no thumbnail"),
    el(
      "div",
      { class: "text" },
      el("h3", {}, question || "(caption)"),
      facts([
        ["References", references.map(([text, times]) => (times > 1 ? `${text} ×${times}` : text)).join(", ")],
        ["Before", compared && answer(before)],
        [compared ? "After" : "Prediction", answer(after)],
        ["Probability", known(after.probability) ? Math.round(100 * after.probability) + " %" : null],
      ]),
      el("span", { class: "chip " + verdict }, VERDICTS[verdict]),
    ),
  );
}

function gallery({ examples, thumbnails, counts, compared }) {
  const cards = examples.map((example) => exampleCard(example, thumbnails, compared));
  const texts = ({ question, after, before, references }) => [
    question,
    after.answer,
    before ? before.answer : "",
    ...references.map(([text]) => text),
  ];
  const searchTexts = examples.map((example) => texts(example).join("\n").toLowerCase());
  const filters = {
    all: () => true,
    mistakes: ({ verdict }) => MISTAKES.has(verdict),
    fixed: ({ verdict }) => verdict === "fixed",
    regressed: ({ verdict }) => verdict === "regressed",
  };
  const selected = { verdict: "all", type: "", text: "" };
  const status = el("p", { class: "quiet", "aria-live": "polite", id: "shown" });
  function filter(change) {
    Object.assign(selected, change);
    const isOfType = (example) => !selected.type || example.answer_type === selected.type,
      text = selected.text.toLowerCase();
    examples.forEach((example, i) => {
      cards[i].hidden = !(filters[selected.verdict](example) && isOfType(example) && searchTexts[i].includes(text));
    });
    const shown = cards.filter((card) => !card.hidden).length;
    status.textContent =
      `Showing ${count(shown)} of the ${count(examples.length)} examples on this page. ` +
      `All ${count(total)} questions: ${summary}.`;
  }
  const both = compared ? " before and after LoRA" : "";
  const labels = { ...VERDICTS, incorrect: "incorrect" + both, correct: "correct" + both };
  const summary = Object.keys(labels)
    .filter((key) => counts[key])
    .map((key) => `${count(counts[key])} ${labels[key]}`)
    .join(", ");
  const total = Object.values(counts).reduce((a, b) => a + b, 0);
  const number = (key) => examples.filter(filters[key]).length;
  const types = [...new Set(examples.map((example) => example.answer_type).filter(Boolean))].sort();
  const verdicts = [
    ["all", "All"],
    ["mistakes", "Incorrect"],
    ["fixed", "Fixed by LoRA"],
    ["regressed", "Regressed with LoRA"],
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
          { "aria-label": "Answer type", change: (event) => filter({ type: event.target.value }) },
          el("option", { value: "" }, "all answer types"),
          types.map((type) => el("option", { value: type }, type)),
        ),
      el("input", {
        type: "search",
        placeholder: SEARCH,
        "aria-label": SEARCH,
        input: (event) => filter({ text: event.target.value }),
      }),
    ),
    status,
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
    before && mark("dot before", before.accuracy),
    mark("dot", after.accuracy),
    mark("tick", 0, "0"),
    mark("tick", 50, "50"),
    mark("tick", 100, "100 %"),
  );
}

function headline(run) {
  const { after, before } = run.evaluation;
  const baseline = before && before.metric === (after || before).metric ? before : null;
  if (!after || !known(after.accuracy)) {
    const unfinished = `Training is not finished. Last logged step: ${count(run.last_step)}.`;
    const reason = run.state === "finished" ? "The run was not evaluated." : unfinished;
    return el(
      "div",
      {},
      el("div", { class: "none" }, "No accuracy yet"),
      el("p", { class: "quiet under" }, after ? `The split ${run.split} has no references.` : reason),
    );
  }
  const gain = baseline ? after.accuracy - baseline.accuracy : 0;
  const points = `${gain < 0 ? "−" : "+"}${Math.abs(gain).toFixed(1)} points with LoRA`;
  return el(
    "div",
    {},
    el("div", { class: "label" }, `Accuracy on ${run.split}`),
    el("div", { class: "big num" }, after.accuracy.toFixed(1), el("small", {}, "%")),
    el(
      "div",
      { class: "under" },
      after.accuracy_interval && `95 % interval ${span(after.accuracy_interval)}`,
      baseline &&
        el(
          "div",
          { class: gain < 0 ? "bad" : "good" },
          points,
          el("span", { class: "quiet" }, `, from ${percent(baseline.accuracy)}`),
        ),
    ),
    accuracyScale(after, baseline),
  );
}

function summary(run) {
  const { after } = run.evaluation,
    { training, validation } = run,
    best = bestStep(run);
  const soFar = run.state === "finished" ? "" : " so far";
  const beams = after && after.num_beams > 1 ? `${after.num_beams} beams` : "greedy";
  const rate = training.questions_per_second;
  return el(
    "div",
    { class: "card summary" },
    headline(run),
    facts([
      ["Data format", run.data],
      ["Model", run.settings["model.checkpoint"]],
      ["Evaluated", after && `${count(after.scored)} questions, metric ${after.metric}, ${beams}`],
      ["LoRA", `rank ${run.settings["lora.r"]} on ${[].concat(run.settings["lora.target_modules"]).join(", ")}`],
      [
        "Trained",
        known(training.questions)
          ? `${count(training.questions)} questions, ${count(training.steps)} steps`
          : `${count(run.last_step)} steps${soFar}`,
      ],
      [
        "Best validation",
        known(best) && `${percent(validation.accuracy[validation.step.indexOf(best)])} at step ${count(best)}`,
      ],
      ["Training time", duration(training.seconds_training)],
      ["Speed", known(rate) && `${count(Math.round(rate))} questions per second`],
      ["Peak memory", mebibytes(training.peak_memory_bytes)],
    ]),
  );
}

const chip = (run) =>
  run.state === "finished"
    ? null
    : el("span", { class: "chip unfinished" }, `${run.state}, step ${count(run.last_step)}`);

function runPage(run) {
  const { after, before } = run.evaluation;
  const hints = (section) => run.hints.filter((hint) => hint.section === section).map(note);
  const charts = curves([run]);
  return [
    el("header", {}, el("h1", {}, run.name, " ", chip(run)), el("div", { class: "quiet" }, run.path)),
    summary(run),
    el("div", { class: "under" }, hints("summary")),
    section("Curves", charts.length && el("div", { class: "grid" }, charts), hints("curves")),
    section("LoRA updates by layer", run.lora_updates && heatMaps(run.lora_updates), hints("lora_updates")),
    after &&
      section(
        "Accuracy by type",
        el(
          "div",
          { class: "grid" },
          bars("Answer type", after.per_answer_type, before && before.per_answer_type),
          bars("Question type", after.per_question_type, before && before.per_question_type),
        ),
      ),
    section("Examples", run.gallery && gallery(run.gallery), hints("gallery")),
    section(
      "Environment and config",
      facts(Object.entries(run.versions)),
      el("details", {}, el("summary", {}, "config.yaml, all keys"), el("pre", { tabindex: 0 }, run.config)),
    ),
  ];
}

// Several runs

const MAX_LEADING_KEYS = 4; // if more config keys differ, they follow the results
const settingOf = (run, key) => (Array.isArray(run.settings[key]) ? run.settings[key].join(", ") : run.settings[key]);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function columns(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].filter(
    (key) => key !== "train.output_dir" && runs.some((run) => !same(run.settings[key], runs[0].settings[key])),
  );
  const evaluatedOn = (run) => run.evaluation.after && `${run.split}, ${run.evaluation.after.metric}`;
  const last = (values) => (values ? values.filter(known).at(-1) : null);
  const text = (value) => (known(value) ? String(value) : "–");
  const column = (name, of, show = text, better = null) => ({ name, of, show, better });
  const after = (run) => run.evaluation.after || {},
    before = (run) => run.evaluation.before || {};
  const changed = keys.map((key) => column(key, (run) => settingOf(run, key)));
  return [
    column("run", (run) => run.name),
    ...(changed.length > MAX_LEADING_KEYS ? [] : changed),
    column("accuracy", (run) => after(run).accuracy, percent, isGreater),
    column(
      "95 % interval",
      (run) => after(run).accuracy_interval,
      (interval) => span(interval) || "–",
    ),
    column("evaluated on", evaluatedOn),
    column("before LoRA", (run) => before(run).accuracy, percent),
    column("best validation", (run) => run.validation.accuracy && Math.max(...run.validation.accuracy), percent, isGreater),
    column("final loss", (run) => last(run.metrics.loss), short),
    column("questions/s", (run) => run.training.questions_per_second, short),
    column(
      "training time",
      (run) => run.training.seconds_training,
      (seconds) => duration(seconds) || "–",
    ),
    ...(changed.length > MAX_LEADING_KEYS ? changed : []),
  ].filter(({ of }, i) => i === 0 || runs.some((run) => known(of(run))));
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
  const best = all.map(({ of, better }) => better && runs.map(of)[indexOfBest(runs.map(of), better)]);
  const cellClass = (value, i) =>
    known(value) && value === best[i] ? "highest" : all[i].show(value).length > 24 ? "wide" : null;
  const row = (run) =>
    el(
      "tr",
      {},
      all.map(({ of, show }, i) =>
        el(
          "td",
          { class: cellClass(of(run), i) },
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
    const descending = before ? before === "ascending" : runs.some((run) => typeof of(run) === "number");
    const order = [...runs].sort((a, b) => compare(of(a), of(b), descending ? -1 : 1));
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", descending ? "descending" : "ascending");
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
        "Differing config keys and results. Click a column header to sort.",
      ),
    ),
    el("div", { class: "under" }, comparison(runs)),
    section("Curves", el("div", { class: "grid" }, curves(runs))),
    section("Missing results", runs.flatMap((run) => run.hints.filter((hint) => hint.section === "summary")).map(note)),
  ];
}

const page = data.runs.length > 1 ? runsPage(data.runs) : runPage(data.runs[0]);
document.getElementById("page").replaceChildren(...page.flat(Infinity).filter(Boolean));
