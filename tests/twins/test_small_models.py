"""Every network of both twins against outputs kept with the tests: what proves them where no golden folder is near.

The weights follow from the tensor names (``tiny_checkpoint.py``). The outputs were made by the torch twin when it
agreed with the official code on all goldens; ``goldens/make.py`` makes them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import normal, write_checkpoint
from tests.support.twins import Cases, Twin, load_cases, relative

TOLERANCE = 3e-6  # relative L2; measured between mlx and the kept outputs of torch: 4.2e-7 .. 6.4e-7


def run_small_model(twin: Twin, folder: Path) -> dict[str, np.ndarray]:
    """Outputs of every network of a checkpoint on inputs made from names: B 2, T 5, S 13, three tokens padded."""
    seconds, t = np.float32([1.5, 30]), np.float32([0.9, 0.35])
    mask = np.arange(12)[None] < np.array([[12], [9]])
    ids = (np.arange(24).reshape(2, 12) * 5 % 120 + 4) * mask
    hidden = twin.load(folder, "text_encoder")(twin.array(ids), twin.array(mask))
    context, duration = twin.load(folder, "conditioner")(hidden, twin.array(mask), seconds)
    dit, same = twin.load(folder, "dit"), twin.load(folder, "same")
    x, local = twin.array(normal("x", (2, 5, 16))), twin.array(normal("local", (2, 5, 17)))
    out = {"text": twin.numpy(hidden)[mask], "context": twin.numpy(context)}
    for name, valid in (("velocity", None), ("velocity_padded", np.arange(5)[None] < np.array([[5], [3]]))):
        cond: Any = twin.module("dit").Conditioning(
            context=context, seconds=duration, local=local, valid=None if valid is None else twin.array(valid)
        )
        velocity = twin.numpy(dit(x, twin.times(t), dit.prepare(cond)))
        out[name] = velocity if valid is None else velocity[valid]
    z, noise = twin.array(normal("z", (1, 3, 16))), twin.array(normal("noise", (1, 3, 16)))
    tokens = twin.array(normal("tokens", (1, 3, 16, 128)))
    out["latents"] = twin.numpy(same.encode(twin.array(normal("audio", (1, 5 * 512 - 40, 2)))))
    out["audio"] = twin.numpy(same.decode(z))
    out["audio_noise"] = twin.numpy(same.decode(z, noise, tokens))[:, ::4]
    return out


@pytest.fixture(params=["tiny-s", "tiny-l"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


def test_outputs_equal_the_kept_ones(twin: Twin, model: str, tmp_path: Path) -> None:
    kept: Cases = load_cases(Path("nowhere"), f"small-{model}", "outputs")
    found = run_small_model(twin, write_checkpoint(tmp_path, TINY[model]))
    assert set(found) == set(kept.tensors)
    errors = {name: relative(values, kept[name]) for name, values in found.items()}
    assert max(errors.values()) < TOLERANCE, errors
