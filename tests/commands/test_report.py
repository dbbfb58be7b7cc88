"""The report page: its content, its hints, and how a browser renders it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from data_set import write_config, write_data_set

from pipeline.cli import main
from pipeline.commands.evaluate import evaluate
from pipeline.commands.precompute import precompute
from pipeline.commands.report import MAX_MEASUREMENTS, heat_maps, render_page, report
from pipeline.commands.train import train_run
from pipeline.config import Config, load_config
from pipeline.runs.gallery import VERDICTS, choose_examples, verdict_of
from pipeline.runs.jsonl import write_jsonl
from pipeline.runs.record import read_record
from pipeline.runs.run import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAME = "a </script><b> run & \u2028 more"
WARNING = "layers.1.self_attn.q_proj diverges <b>"


def measurement(step: int) -> dict[str, Any]:
    values = {"norm": 0.5 * step, "ratio": 0.01 * step, "effective_rank": None, "change": 0.1}
    names = [f"layers.{layer}.self_attn.{kind}" for layer in range(4) for kind in ("q_proj", "v_proj")]
    return {"step": step, "matrices": dict.fromkeys(names, values), "warnings": [WARNING] if step == 2 else []}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return a config with validation, and a cache with two answer types."""
    folder = tmp_path_factory.mktemp("reported")
    write_data_set(folder)
    for split in "train", "val":
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["answer_type"] = "place" if "where" in row["question"] else "appearance"
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = load_config(write_config(folder, validation={"steps": 2}))
    precompute(config)
    return config


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run with LoRA measurements, evaluated with and without the adapter."""
    found = Run(tmp_path_factory.mktemp("run") / NAME.replace("/", "_"))
    train_run(config, found)
    write_jsonl(found.lora_updates, [measurement(step) for step in range(0, 5)])
    for with_adapter in True, False:
        evaluate(found, with_adapter=with_adapter)
    return found


def copy_run(run: Run, folder: Path, *without: str) -> Run:
    return Run(shutil.copytree(run.path, folder / "copy", ignore=shutil.ignore_patterns(*without)))


def content_of(path: Path) -> dict[str, Any]:
    """Return the data in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def only_run(path: Path) -> dict[str, Any]:
    (content,) = content_of(path)["runs"]
    return content


def test_verdict_compares_the_accuracies_before_and_after() -> None:
    accuracies = [(0.0, 0.0), (100.0, 30.0), (0.0, 60.0), (100.0, 100.0), (0.0, None), (None, 90.0), (None, 0.0)]
    assert [verdict_of(*pair) for pair in accuracies] == [*VERDICTS, "correct", "incorrect"]


def test_examples_are_balanced_over_verdicts_and_reproducible() -> None:
    verdicts = ["correct"] * 1000 + ["incorrect"] * 50 + ["fixed"] * 30 + ["regressed"] * 5
    indices = choose_examples(verdicts, 60, seed=0)
    chosen = [verdicts[index] for index in indices]
    assert [chosen.count(verdict) for verdict in VERDICTS] == [18, 5, 18, 19, 0]
    assert chosen == sorted(chosen, key=VERDICTS.index)
    assert (
        choose_examples(verdicts, 60, seed=0)
        == choose_examples(verdicts, 60, seed=0)
        != choose_examples(verdicts, 60, seed=1)
    )
    assert len(set(choose_examples(verdicts, 5000, seed=0))) == len(verdicts)
    assert choose_examples([], 60, seed=0) == []


def test_heat_map_has_layers_as_rows_and_measurements_as_columns() -> None:
    measurements = [measurement(step) for step in range(150)]
    del measurements[-1]["matrices"]["layers.3.self_attn.v_proj"]
    found = heat_maps(measurements)
    assert len(found["steps"]) <= MAX_MEASUREMENTS
    assert found["steps"][-1] == 149
    queries, values = found["maps"]
    assert (queries["module"], values["module"], queries["layers"]) == ("q_proj", "v_proj", ["0", "1", "2", "3"])
    assert queries["values"]["norm"][0] == [0.5 * step for step in found["steps"]]
    assert values["values"]["norm"][3][-1] is None
    assert found["warnings"] == [{"step": 2, "text": WARNING}]


def test_text_cannot_close_the_script_element() -> None:
    text = render_page("a <title>", {"runs": [{"name": "</script><script>alert(1)</script><!--"}]})
    assert "<title>a &lt;title></title>" in text
    assert text.count("</script>") == 2
    assert "alert(1)</script>" not in text


def test_page_contains_the_data_of_the_run(run: Run) -> None:
    summary = report([run])
    assert (summary.report, summary.runs, summary.examples) == (str(run.report), 1, 18)
    assert summary.thumbnails == 6
    assert summary.missing == []
    assert summary.bytes == run.report.stat().st_size
    content = only_run(run.report)
    assert content["evaluation"]["after"] == json.loads(run.evaluation("val", True).read_text())
    assert content["metrics"]["step"] == [1, 2, 3, 4]
    assert len(content["validation"]["accuracy"]) == 2
    assert content["training"]["steps"] == 4
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(content["versions"])
    gallery = content["gallery"]
    assert sum(gallery["counts"].values()) == 18
    for example in gallery["examples"]:
        after = example["after"]
        correct = example["references"] == [[after["answer"], 1]]
        assert after["accuracy"] == (100 if correct else 0)
        assert example["verdict"] == verdict_of(example["before"]["accuracy"], after["accuracy"])
        assert gallery["thumbnails"][str(example["row"])].startswith("data:image/png;base64,")


def test_max_examples_limits_the_examples_and_zero_gives_no_hint(run: Run, tmp_path: Path) -> None:
    assert report([run], tmp_path / "new" / "some.html", max_examples=5).examples == 5
    summary = report([run], tmp_path / "none.html", max_examples=0)
    assert (summary.examples, summary.missing) == (0, [])


@pytest.mark.parametrize(
    ("without", "command"),
    [
        ("evaluation-val.json", "pipe evaluate RUN"),
        ("evaluation-val-no-adapter.json", "pipe evaluate RUN --adapter none"),
        ("predictions-val.jsonl", "pipe evaluate RUN"),
        ("validation.jsonl", "pipe train RUN/config.yaml validation.steps=500"),
        ("lora_updates.jsonl", "pipe train RUN/config.yaml train.lora_monitor_steps=50"),
        ("adapter", "pipe train RUN --resume"),
    ],
)
def test_missing_content_is_reported_with_the_command_that_creates_it(
    run: Run, tmp_path: Path, without: str, command: str
) -> None:
    other = copy_run(run, tmp_path, without)
    assert any(line.endswith(": " + command.replace("RUN", str(other.path))) for line in report([other]).missing)


def test_run_with_only_a_config_gives_a_page(run: Run, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    shutil.copy(run.config, tmp_path / "begun")
    report([Run(tmp_path / "begun")])
    content = only_run(tmp_path / "begun" / "report.html")
    assert (content["state"], content["last_step"], content["gallery"], content["lora_updates"]) == (
        "unfinished",
        0,
        None,
        None,
    )


def test_page_is_written_without_cache_thumbnails_or_matching_questions(
    run: Run, config: Config, tmp_path: Path
) -> None:
    other = copy_run(run, tmp_path)
    moved = config.model_copy(update={"cache": config.cache.model_copy(update={"dir": tmp_path / "cache"})})
    other.config.write_text(moved.to_yaml())
    (missing,) = report([other]).missing
    assert f"no cache at {tmp_path}/cache. Run `pipe precompute` first" in missing
    precompute(moved.model_copy(update={"precompute": moved.precompute.model_copy(update={"thumbnail_size": 0})}))
    (missing,) = report([other]).missing
    assert re.search(f"no thumbnails.*: pipe precompute {other.config}", missing)
    assert only_run(other.report)["gallery"]["thumbnails"] == {}
    lines = other.predictions("val", True).read_text().splitlines(keepends=True)
    other.predictions("val", True).write_text("".join(lines[1:]))
    (missing,) = report([other]).missing
    assert re.search(f"for other questions.*: pipe evaluate {other.path}", missing)


def test_several_runs_are_compared(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy_run(run, tmp_path, "adapter", "lora_updates.jsonl")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["report", str(run.path), str(other.path), "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["report"], summary["runs"]) == ("report.html", 2)
    runs = content_of(tmp_path / "report.html")["runs"]
    assert [content["state"] for content in runs] == ["finished", "unfinished"]
    assert runs[0]["settings"]["lora.r"] == 16
    assert "gallery" not in runs[0]


# Browser tests. The page posts its results to the page around it, whose DOM is then dumped.

PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
addEventListener("load", async () => {
  const images = [...document.images];
  await Promise.all(images.map((image) => image.decode().catch((error) => errors.push(String(error)))));
  const drawn = async () => {
    // A chart is drawn when its size is observed, in a frame, and a loaded machine is late with frames.
    const wait = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)));
    for (let i = 0; i < 1000 && document.querySelector(".plot:empty"); i++) await wait();
  };
  const found = {};
  await drawn();
  try { await (async () => { ACTIONS })(); } catch (error) { errors.push(String(error)); }
  parent.postMessage(JSON.stringify({
    ...found, errors, width: innerWidth, scrollWidth: document.documentElement.scrollWidth,
    images: images.map((image) => image.naturalWidth),
    charts: document.querySelectorAll("figure.chart svg path").length,
    requests: performance.getEntriesByType("resource").map(({ name }) => name.slice(0, 5)),
  }), "*");
});
</script>"""
OUTER_PAGE = """<!doctype html><script>
addEventListener("message", ({ data }) => {
  document.body.append(Object.assign(document.createElement("pre"), { textContent: data }));
});
</script><body>"""


def render(path: Path, folder: Path, actions: str) -> dict[int, dict[str, Any]]:
    """Return the state of the page after `actions`, by width in pixels: 1280 and 390."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    (folder / "probed.html").write_text(
        path.read_text().replace("<head>", "<head>" + PROBE.replace("ACTIONS", actions), 1)
    )
    inside = (
        "position:absolute;top:0;left:0;height:900px"  # overlapping, because frames outside the window are not drawn
    )
    frames = [f'<iframe src="probed.html" style="{inside};width:{width}px"></iframe>' for width in (1280, 390)]
    (folder / "around.html").write_text(OUTER_PAGE + "".join(frames))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=120000 "
    flags += "--window-size=1400,1000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", (folder / "around.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    found = [json.loads(html.unescape(text)) for text in re.findall(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)]
    return {state["width"]: state for state in found}


def check_rendering(found: dict[int, dict[str, Any]]) -> None:
    assert sorted(found) == [390, 1280]
    for width, state in found.items():
        assert state["errors"] == []
        assert set(state["requests"]) <= {"data:"}
        assert state["scrollWidth"] <= width
        assert all(state["images"])
        assert state["charts"] > 0


def test_browser_shows_a_run_and_filters_its_examples(run: Run, tmp_path: Path) -> None:
    report([run])
    actions = """
      const visible = () => [...document.querySelectorAll(".example")].filter((card) => !card.hidden);
      const state = () => visible().map((card) => card.dataset.verdict);
      found.all = state();
      document.querySelector("[data-key=mistakes]").click(); found.mistakes = state();
      document.querySelector("[data-key=fixed]").click(); found.fixed = state();
      document.querySelector("[data-key=all]").click();
      const [type, search] = [document.querySelector("select"), document.querySelector("input")];
      type.value = "place"; type.dispatchEvent(new Event("change")); found.places = state();
      type.value = ""; type.dispatchEvent(new Event("change"));
      search.value = "WHAT SHAPE"; search.dispatchEvent(new Event("input"));
      found.searched = visible().map((card) => card.querySelector("h3").textContent);
      found.shown = document.getElementById("shown").textContent;
      document.querySelector("[data-key=norm]").click(); await drawn();
      found.cells = document.querySelectorAll("figure.heat rect").length;
      const chart = document.querySelector("figure.chart svg");
      chart.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
      found.hovered = document.querySelector("figure.chart output").value;
      found.best = document.querySelector(".legend.good").textContent;
      found.name = document.querySelector("h1").textContent;
      found.gain = document.querySelector(".summary .under").textContent;
      found.warning = document.querySelector(".warning").textContent;
    """
    best_step = read_record(run)["summary"]["validation"]["best_step"]
    found = render(run.report, tmp_path, actions)
    check_rendering(found)
    for state in found.values():
        assert len(state["all"]) == len(state["images"]) == 18
        assert state["mistakes"] == [verdict for verdict in state["all"] if verdict in ("incorrect", "regressed")]
        assert state["fixed"] == [verdict for verdict in state["all"] if verdict == "fixed"]
        assert len(state["mistakes"]) < 18 or not state["fixed"]
        assert len(state["places"]) == 6
        assert state["searched"] == ["what shape is it?"] * 6
        assert "6 of the 18 examples" in state["shown"]
        assert state["cells"] == 2 * 4 * 5
        assert state["hovered"].startswith("step 3: ")
        assert state["name"].startswith(run.path.name)
        assert "points with LoRA" in state["gain"]
        assert state["best"].endswith(f"best accuracy at step {best_step}")
        assert state["warning"] == f"Step 2: {WARNING}"


def test_browser_sorts_runs(run: Run, tmp_path: Path) -> None:
    other = copy_run(run, tmp_path, "adapter", "evaluation-*")
    other.config.write_text(other.config.read_text().replace("r: 16", "r: 8", 1))
    report([other, run], tmp_path / "both.html")
    actions = """
      const first = () => document.querySelector("tbody tr").textContent;
      found.heads = [...document.querySelectorAll("th")].map((head) => head.textContent);
      found.best = first();
      document.querySelectorAll("th button")[found.heads.indexOf("lora.r")].click(); found.descending = first();
      document.querySelectorAll("th button")[found.heads.indexOf("lora.r")].click(); found.ascending = first();
      found.lines = document.querySelectorAll("figure.chart .curve").length;
    """
    found = render(tmp_path / "both.html", tmp_path, actions)
    check_rendering(found)
    for state in found.values():
        assert {"run", "lora.r", "accuracy", "questions/s"} <= set(state["heads"])
        assert state["best"].startswith(run.path.name)
        assert state["descending"].startswith(run.path.name)
        assert state["ascending"].startswith("copyunfinished, step 4")
        assert state["lines"] == 2 * 5


def test_browser_shows_a_run_without_results(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / ("long_name_" * 8)  # wider than the narrow page
    folder.mkdir()
    other = copy_run(run, folder, "adapter", "*.jsonl", "*.json")
    report([other])
    found = render(other.report, tmp_path, 'found.text = document.querySelector("main").textContent;')
    for state in found.values():
        assert state["errors"] == []
        assert "pipe train" in state["text"]
        assert state["scrollWidth"] <= state["width"]
