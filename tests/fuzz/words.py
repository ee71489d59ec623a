"""Readers of what people type, and of requests: each input is one text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sa3_mlx.assets import DEMO
from sa3_mlx.cli.adapters import parse_lora
from sa3_mlx.cli.options.regions import parse_region
from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.regions import to_regions
from sa3_mlx.common.generation.request import Inpaint, Item, Request
from sa3_mlx.common.memory.prediction import parse_size
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.quant.calibration import read_prompts, requests
from tests.support.command import SMALL, tone

from .target import Given, Target

_INPUT = "input.txt"
_AUDIO = tone(0.5)


def _words(text: str) -> object:
    def make(folder: Path) -> dict[str, str]:
        (folder / _INPUT).write_text(text)
        return {_INPUT: "text"}

    return make


def _text(given: Given) -> str:
    """Return the text as it comes from a command line, where there is no zero byte."""
    return given.path.read_bytes().decode("utf-8", "surrogateescape").replace("\0", "")


def _read_region(given: Given) -> None:
    wanted = map(parse_region, _text(given).splitlines())
    regions = tuple((one.start, 0.5 if one.end is None else one.end) for one in wanted)
    request = Request(items=(Item(prompt="", seconds=0.5, seed=0),), inpaint=Inpaint(audio=_AUDIO, regions=regions))
    to_regions(regions, 8000)
    validate(request, SMALL)
    plan(request, SMALL)


def _read_size(given: Given) -> None:
    assert parse_size(_text(given).strip()) > 0


def _read_seconds(given: Given) -> None:
    """--seconds and --guidance are read by click, as ``float`` does."""
    try:
        seconds, scale = (float(word) for word in _text(given).split(maxsplit=1))
    except ValueError:
        return
    sampling = Sampling.parse(f"euler:4:{scale}")
    request = Request(items=(Item(prompt="low", seconds=seconds, seed=0),), sampling=sampling)
    validate(request, SMALL)
    assert seconds_to_samples(seconds, SMALL.sample_rate) > 0


def _read_options(given: Given) -> None:
    lora, _, sampling = _text(given).partition(" ")
    parse_lora(lora)
    Sampling.parse(sampling).check()


def _read_prompt(given: Given) -> None:
    """Of the demo, whose vocabulary is closed, and of a request."""
    config, prompt = ModelConfig.load(DEMO), _text(given)
    validate(Request(items=(Item(prompt=prompt, seconds=0.5, seed=0),)), config)
    tokenizer = open_tokenizer(DEMO, config)
    ids, mask = tokenizer.encode([prompt])
    assert ids.shape == mask.shape == (1, tokenizer.max_length) and np.all(ids[~mask] == 0)
    tokenizer.unknown(prompt)
    tokenizer.count(prompt)


def _request(folder: Path) -> dict[str, str]:
    request = Request(
        items=(Item(prompt="low kick", seconds=0.5, seed=1), Item(prompt="", seconds=0.4, seed=2)),
        sampling=Sampling.parse("dpmpp:4:3:0.5"),
        inpaint=Inpaint(audio=_AUDIO, regions=((0.1, 0.2), (0.3, 0.5))),
    )
    (folder / "request.json").write_text(request.to_json())
    return {"request.json": "json"}


def _read_request(given: Given) -> None:
    request = Request.from_json(given.path.read_bytes().decode("utf-8", "replace"), audio=_AUDIO)
    request.to_json()
    validate(request, SMALL)
    plan(request, SMALL)


def _calibration(folder: Path) -> dict[str, str]:
    (folder / "prompts.txt").write_text("# prompts\n8 rain on tin\n2.5 low kick\n1 é\n\n20 drone\n3 bell\n")
    return {"prompts.txt": "text"}


def _read_calibration(given: Given) -> None:
    """As ``sa3 quantize`` uses them."""
    path = given.folder / "prompts.txt"
    for held_out in (True, False):
        for request in requests(read_prompts(path), SMALL, held_out=held_out):
            try:
                validate(request, SMALL)
            except ValueError as error:
                raise AssertionError(f"a prompt was read that cannot be made: {error}") from error


_GENERATION = "sa3_mlx/common/generation"
TARGETS = (
    Target(
        "regions",
        _words("0.1:0.2\n0.3:"),
        _read_region,
        (f"{_GENERATION}/regions.py", f"{_GENERATION}/plan.py"),
        names_file=False,
        forms=False,
    ),
    Target(
        "sizes", _words("6.5GB"), _read_size, ("sa3_mlx/common/memory/prediction.py",), names_file=False, forms=False
    ),
    Target(
        "lengths",
        _words("0.5 3"),
        _read_seconds,
        ("sa3_mlx/common/model/lengths.py", "sa3_mlx/common/model/sampling.py"),
        names_file=False,
        forms=False,
    ),
    Target(
        "options",
        _words("dir/bell.safetensors:-0.8:0.2-1 dpmpp:15:3:0"),
        _read_options,
        ("sa3_mlx/cli/adapters.py", "sa3_mlx/common/model/sampling.py"),
        names_file=False,
        forms=False,
    ),
    Target(
        "prompts",
        _words("piano note A4, soft"),
        _read_prompt,
        ("sa3_mlx/common/text/tokenizer.py",),
        names_file=False,
        forms=False,
    ),
    Target(
        "requests",
        _request,
        _read_request,
        (
            f"{_GENERATION}/request.py",
            f"{_GENERATION}/checks.py",
            f"{_GENERATION}/plan.py",
            "sa3_mlx/common/schema.py",
        ),
        names_file=False,
        forms=False,
    ),
    Target("calibration", _calibration, _read_calibration, ("sa3_mlx/common/quant/calibration.py",)),
)
