"""The page about a run: what is in it, what it says is missing, and that a browser shows it."""

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
from pipeline.commands.report import LOOKS, heat_maps, page, report
from pipeline.commands.train import train_run
from pipeline.config import Config, load_config
from pipeline.runs.gallery import VERDICTS, choose, verdict
from pipeline.runs.jsonl import write_jsonl
from pipeline.runs.run import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAME = "a </script><b> run & \u2028 more"
TOLD = "layers.1.self_attn.q_proj runs away <b>"


def look(step: int) -> dict[str, Any]:
    figures = {"norm": 0.5 * step, "ratio": 0.01 * step, "effective_rank": None, "change": 0.1}
    names = [f"layers.{layer}.self_attn.{kind}" for layer in range(4) for kind in ("q_proj", "v_proj")]
    return {"step": step, "matrices": dict.fromkeys(names, figures), "warnings": [TOLD] if step == 2 else []}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Answers of two types, and runs that are validated."""
    folder = tmp_path_factory.mktemp("reported")
    write_data_set(folder)
    for split in "train", "val":
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["answer_type"] = "place" if "where" in row["question"] else "look"
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = load_config(write_config(folder, validation={"steps": 2}))
    precompute(config)
    return config


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained, watched, and evaluated with and without the adapter."""
    found = Run(tmp_path_factory.mktemp("run") / NAME.replace("/", "_"))
    train_run(config, found)
    write_jsonl(found.lora_updates, [look(step) for step in range(0, 5)])
    for with_adapter in True, False:
        evaluate(found, with_adapter=with_adapter)
    return found


def copied(run: Run, folder: Path, *without: str) -> Run:
    return Run(shutil.copytree(run.path, folder / "copy", ignore=shutil.ignore_patterns(*without)))


def content(path: Path) -> dict[str, Any]:
    """The data in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def only_run(path: Path) -> dict[str, Any]:
    (told,) = content(path)["runs"]
    return told


def test_the_verdict_compares_before_and_after() -> None:
    accuracies = [(0.0, 0.0), (100.0, 30.0), (0.0, 60.0), (100.0, 100.0), (0.0, None), (None, 90.0), (None, 0.0)]
    assert [verdict(*pair) for pair in accuracies] == [*VERDICTS, "right", "mistake"]


def test_examples_are_as_many_of_each_verdict_as_there_are_and_the_same_for_a_seed() -> None:
    verdicts = ["right"] * 1000 + ["mistake"] * 50 + ["fixed"] * 30 + ["broken"] * 5
    chosen = [verdicts[place] for place in choose(verdicts, 60, seed=0)]
    assert [chosen.count(kind) for kind in VERDICTS] == [18, 5, 18, 19, 0]
    assert chosen == sorted(chosen, key=VERDICTS.index)
    assert choose(verdicts, 60, seed=0) == choose(verdicts, 60, seed=0) != choose(verdicts, 60, seed=1)
    assert len(set(choose(verdicts, 5000, seed=0))) == len(verdicts)
    assert choose([], 60, seed=0) == []


def test_a_heat_map_has_layers_as_rows_and_looks_as_columns() -> None:
    looks = [look(step) for step in range(150)]
    del looks[-1]["matrices"]["layers.3.self_attn.v_proj"]
    found = heat_maps(looks)
    assert len(found["steps"]) <= LOOKS
    assert found["steps"][-1] == 149
    queries, values = found["maps"]
    assert (queries["module"], values["module"], queries["layers"]) == ("q_proj", "v_proj", ["0", "1", "2", "3"])
    assert queries["values"]["norm"][0] == [0.5 * step for step in found["steps"]]
    assert values["values"]["norm"][3][-1] is None
    assert found["warnings"] == [{"step": 2, "words": TOLD}]


def test_no_text_ends_the_scripts_element() -> None:
    text = page("a <title>", {"runs": [{"name": "</script><script>alert(1)</script><!--"}]})
    assert "<title>a &lt;title></title>" in text
    assert text.count("</script>") == 2
    assert "alert(1)</script>" not in text


def test_the_page_tells_of_the_run(run: Run) -> None:
    summary = report([run])
    assert (summary["report"], summary["runs"], summary["examples"]) == (str(run.report), 1, 18)
    assert summary["pictures"] == 6
    assert summary["missing"] == []
    assert summary["bytes"] == run.report.stat().st_size
    told = only_run(run.report)
    assert told["evaluation"]["after"] == json.loads(run.evaluation("val", True).read_text())
    assert told["metrics"]["step"] == [1, 2, 3, 4]
    assert len(told["validation"]["accuracy"]) == 2
    assert told["training"]["steps"] == 4
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(told["versions"])
    found = told["gallery"]
    assert sum(found["counts"].values()) == 18
    for one in found["examples"]:
        right = one["people"] == [[one["after"]["answer"], 1]]
        assert one["after"]["accuracy"] == (100 if right else 0)
        assert one["verdict"] == verdict(one["before"]["accuracy"], one["after"]["accuracy"])
        assert found["pictures"][str(one["row"])].startswith("data:image/png;base64,")


def test_fewer_pictures_are_chosen_and_none_are_no_lack(run: Run, tmp_path: Path) -> None:
    assert report([run], tmp_path / "new" / "some.html", pictures=5)["examples"] == 5
    summary = report([run], tmp_path / "none.html", pictures=0)
    assert (summary["examples"], summary["missing"]) == (0, [])


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
def test_what_is_missing_is_said_with_the_command_that_makes_it(
    run: Run, tmp_path: Path, without: str, command: str
) -> None:
    other = copied(run, tmp_path, without)
    assert any(line.endswith(": " + command.replace("RUN", str(other.path))) for line in report([other])["missing"])


def test_nothing_but_a_config_is_a_page_too(run: Run, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    shutil.copy(run.config, tmp_path / "begun")
    report([Run(tmp_path / "begun")])
    told = only_run(tmp_path / "begun" / "report.html")
    assert (told["state"], told["last_step"], told["gallery"], told["watch"]) == ("unfinished", 0, None, None)


def test_without_thumbnails_or_the_cache_or_with_other_questions_the_rest_is_there(
    run: Run, config: Config, tmp_path: Path
) -> None:
    other = copied(run, tmp_path)
    moved = config.model_copy(update={"cache": config.cache.model_copy(update={"dir": tmp_path / "cache"})})
    other.config.write_text(moved.to_yaml())
    (missing,) = report([other])["missing"]
    assert f"no cache at {tmp_path}/cache. Run `pipe precompute` first" in missing
    precompute(moved.model_copy(update={"precompute": moved.precompute.model_copy(update={"thumbnail_size": 0})}))
    (missing,) = report([other])["missing"]
    assert re.search(f"no thumbnails.*: pipe precompute {other.config}", missing)
    assert only_run(other.report)["gallery"]["pictures"] == {}
    lines = other.predictions("val", True).read_text().splitlines(keepends=True)
    other.predictions("val", True).write_text("".join(lines[1:]))
    (missing,) = report([other])["missing"]
    assert re.search(f"questions are not those.*: pipe evaluate {other.path}", missing)


def test_several_runs_stand_side_by_side(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copied(run, tmp_path, "adapter", "lora_updates.jsonl")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["report", str(run.path), str(other.path), "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["report"], summary["runs"]) == ("report.html", 2)
    told = content(tmp_path / "report.html")["runs"]
    assert [one["state"] for one in told] == ["finished", "unfinished"]
    assert told[0]["settings"]["lora.r"] == 16
    assert "gallery" not in told[0]


# In a browser. What is done in the page is written into the page around it, and read from there.

PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
addEventListener("load", async () => {
  const images = [...document.images];
  await Promise.all(images.map((image) => image.decode().catch((error) => errors.push(String(error)))));
  const drawn = async () => {
    const wait = () => new Promise((done) => setTimeout(done, 50));
    for (let i = 0; i < 100 && document.querySelector(".plot:empty"); i++) await wait();
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
AROUND = """<!doctype html><script>
addEventListener("message", ({ data }) => {
  document.body.append(Object.assign(document.createElement("pre"), { textContent: data }));
});
</script><body>"""


def shown(path: Path, folder: Path, actions: str) -> dict[int, dict[str, Any]]:
    """What the page is like after `actions`, at a width of 1280 and of 390 pixels."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    (folder / "probed.html").write_text(
        path.read_text().replace("<head>", "<head>" + PROBE.replace("ACTIONS", actions), 1)
    )
    inside = "position:absolute;top:0;left:0;height:900px"  # one upon the other: out of sight nothing is drawn
    frames = [f'<iframe src="probed.html" style="{inside};width:{width}px"></iframe>' for width in (1280, 390)]
    (folder / "around.html").write_text(AROUND + "".join(frames))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=10000 "
    flags += "--window-size=1400,1000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", (folder / "around.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    found = [json.loads(html.unescape(text)) for text in re.findall(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)]
    return {one["width"]: one for one in found}


def check_sound(found: dict[int, dict[str, Any]]) -> None:
    assert sorted(found) == [390, 1280]
    for width, one in found.items():
        assert one["errors"] == []
        assert set(one["requests"]) <= {"data:"}
        assert one["scrollWidth"] <= width
        assert all(one["images"])
        assert one["charts"] > 0


def test_a_browser_shows_a_run_and_filters_its_examples(run: Run, tmp_path: Path) -> None:
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
      found.name = document.querySelector("h1").textContent;
      found.told = document.querySelector(".odd").textContent;
    """
    found = shown(run.report, tmp_path, actions)
    check_sound(found)
    for one in found.values():
        assert len(one["all"]) == len(one["images"]) == 18
        assert one["mistakes"] == [kind for kind in one["all"] if kind in ("mistake", "broken")]
        assert one["fixed"] == [kind for kind in one["all"] if kind == "fixed"]
        assert len(one["mistakes"]) < 18 or not one["fixed"]
        assert len(one["places"]) == 6
        assert one["searched"] == ["what shape is it?"] * 6
        assert "6 of the 18 examples" in one["shown"]
        assert one["cells"] == 2 * 4 * 5
        assert one["hovered"].startswith("step 3: ")
        assert one["name"].startswith(run.path.name)
        assert one["told"] == f"Step 2: {TOLD}"


def test_a_browser_sorts_runs(run: Run, tmp_path: Path) -> None:
    other = copied(run, tmp_path, "adapter", "evaluation-*")
    other.config.write_text(other.config.read_text().replace("r: 16", "r: 8", 1))
    report([other, run], tmp_path / "both.html")
    actions = """
      const first = () => document.querySelector("tbody tr").textContent;
      found.heads = [...document.querySelectorAll("th")].map((head) => head.textContent);
      found.best = first();
      document.querySelectorAll("th button")[found.heads.indexOf("lora.r")].click(); found.most = first();
      document.querySelectorAll("th button")[found.heads.indexOf("lora.r")].click(); found.least = first();
      found.lines = document.querySelectorAll("figure.chart .curve").length;
    """
    found = shown(tmp_path / "both.html", tmp_path, actions)
    check_sound(found)
    for one in found.values():
        assert {"run", "lora.r", "accuracy", "questions/s"} <= set(one["heads"])
        assert one["best"].startswith(run.path.name)
        assert one["most"].startswith(run.path.name)
        assert one["least"].startswith("copyunfinished, step 4")
        assert one["lines"] == 2 * 5


def test_a_browser_shows_a_run_that_has_nothing_yet(run: Run, tmp_path: Path) -> None:
    other = copied(run, tmp_path, "adapter", "*.jsonl", "*.json")
    report([other])
    found = shown(other.report, tmp_path, 'found.text = document.querySelector("main").textContent;')
    for one in found.values():
        assert one["errors"] == []
        assert "pipe train" in one["text"]
        assert one["scrollWidth"] <= one["width"]
