"""The table of few steps: settings, evaluations, and what it says of sounds that are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the measurement needs PyTorch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from click.testing import CliRunner

from benchmarks.quality.few_steps.command import FRONT, few_steps, named
from benchmarks.quality.few_steps.rows import Row, evaluations, parse_setting
from benchmarks.quality.few_steps.table import equal_halves, frechet_intervals, markdown, share, summary
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.schema import ConfigError

DEMO = PRESETS["first"]
PROMPTS = [f"prompt {i % 20}" for i in range(60)]


def row(name: str, seed: int, shift: float = 0.0, right: float = 1.0) -> Row:
    random = np.random.default_rng(seed)
    return Row(
        name=name,
        setting="",
        evaluations=1,
        seconds=0.1,
        clap=None,
        prompts=PROMPTS,
        labels=["note", "chord"] * 30,
        features=(random.standard_normal((60, 4)) + shift).tolist(),
        nearest=(1 + random.random(60)).tolist(),
        tail=[shift] * 60,
        attack=[0.0] * 60,
        verdicts=[{"class": bool(x < right)} for x in random.random(60)],
    )


def test_settings_say_all_of_a_guidance() -> None:
    found = parse_setting("dpmpp:16:3:0,rescale=0.7,interval=0.3-0.95")
    guidance = Guidance(scale=3.0, apg=0.0, rescale=0.7, interval=(0.3, 0.95))
    assert found == Sampling(sampler="dpmpp", steps=16, guidance=guidance)
    with pytest.raises(ValueError, match=r"'apg=1' in .*: allowed are rescale=SHARE and interval=START-END"):
        parse_setting("euler:4:2,apg=1")
    with pytest.raises(ConfigError, match="no effect at guidance scale 1"):
        parse_setting("euler:4:1,rescale=0.5")
    assert all(parse_setting(setting) for setting in FRONT)


@pytest.mark.parametrize(
    ("setting", "count"), [("euler:8:1", 8), ("euler:8:3", 16), ("rk4:2:1", 8), ("euler:8:3,interval=0.99-1", 10)]
)
def test_a_guided_step_counts_twice(setting: str, count: int) -> None:
    """The levels of eight steps begin 1, 0.994, 0.984."""
    assert evaluations(parse_setting(setting), DEMO) == count


def test_models_have_names_and_settings() -> None:
    assert named("few=runs/posttrain/model@pingpong:2:1") == ("few", "runs/posttrain/model", ["pingpong:2:1"])
    assert named("runs/posttrain/model") == ("posttrain", "runs/posttrain/model", [])
    assert named("demo@euler:2:3,rescale=0.5@euler:1:1") == ("demo", "demo", ["euler:2:3,rescale=0.5", "euler:1:1"])


def test_a_shifted_model_is_farther_and_an_equal_one_is_not() -> None:
    real, near, far = row("real", 0), row("near", 1), row("far", 2, shift=1.0)
    own, more = frechet_intervals(far, near, real)
    assert own["low"] < own["value"] < own["high"] and own["value"] == pytest.approx(4.0, abs=1.5)
    assert 0 < more["low"] < more["value"]
    _, none = frechet_intervals(near, near, real)
    assert none == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert equal_halves(near, real) < equal_halves(far, real)


def test_shares_are_compared_by_prompt() -> None:
    good, bad = row("good", 3), row("bad", 4, right=0.5)
    assert share(good, "class") == {"value": 1.0, "low": 1.0, "high": 1.0}
    found = share(bad, "class", good)
    assert found is not None and found["value"] == pytest.approx(-0.5, abs=0.2) and found["high"] < 0
    assert share(good, "tempo") is None


def test_the_table_has_a_star_where_a_difference_is_clear() -> None:
    table = summary([row("first", 1), row("far", 2, shift=1.0, right=0.5)], row("rebuilt", 0), row("real", 5))
    assert [line["model"] for line in table] == ["real", "rebuilt", "first", "far"]
    assert table[1]["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert table[3]["by_class"]["note"] == {"tail": 1.0, "attack": 0.0}
    first, far = (
        line for line in markdown(table).splitlines() if line.startswith(("| first", "| far")) and "(" in line
    )
    assert " *" not in first and far.count(" *") == 2


def test_the_command_goes_on_where_it_was_stopped(workspace: Path, tmp_path: Path) -> None:
    common = ["--backend", "torch", "--data", str(workspace / "clips"), "--seeds", "2", "--out", str(tmp_path)]
    model = str(workspace / "random")
    result = CliRunner().invoke(few_steps, [f"base={model}@euler:1:1", *common])
    assert result.exit_code == 0, result.output
    (stored,) = (path for path in (tmp_path / "rows").iterdir() if "euler" in path.name)
    changed = dataclasses.replace(Row.read(stored), seconds=77.0)
    changed.write(stored)
    result = CliRunner().invoke(few_steps, [f"base={model}@euler:1:1@pingpong:2:1", *common])
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "table.json").read_text())
    assert [line["setting"] for line in table] == ["", "", "euler:1:1", "pingpong:2:1"]
    assert table[2]["seconds"] == 77.0 and table[3]["evaluations"] == 2
    assert (tmp_path / "table.md").read_text().count("base pingpong:2:1") == 2
