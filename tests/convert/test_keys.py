"""Our names and the official ones are a bijection, for every published layout."""

from __future__ import annotations

import hashlib
import math
import re

import pytest
from sa3_convert.keys import TABLE, buffers, pairs

from sa3_mlx.common.model.checkpoint import expected_tensors, parts_of
from sa3_mlx.common.model.presets import PRESETS

# sha256 of the sorted "name (shape)" lines of the published key tables, and their numbers of tensors and elements
PUBLISHED = {
    "small": ("small-music", ("conditioner", "dit", "same"), 685, 567_573_761, "45cc1573c4cf9be1"),
    "medium": ("medium", ("conditioner", "dit", "same"), 997, 2_305_495_793, "277c45791729f851"),
    "same-s": ("same-s", ("same",), 244, 108_244_721, "af1a0ab238acb69a"),
    "same-l": ("same-l", ("same",), 472, 852_127_457, "6a61e57670ed78f4"),
    "t5gemma-b-b-ul2": ("medium", ("text_encoder",), 134, 281_580_288, "c8d08ceb89e4c768"),
}


def official_layout(preset: str, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    config = PRESETS[preset]
    layout = buffers(config, parts)
    for pair in pairs(config, parts):
        layout |= dict(zip(pair.official, pair.official_shapes, strict=True))
    if config.diffusion is None:
        return {name.removeprefix("pretransform.model."): shape for name, shape in layout.items()}
    return layout


@pytest.mark.parametrize("table", PUBLISHED)
def test_exported_layout_has_the_published_names_shapes_and_counts(table):
    preset, parts, count, elements, digest = PUBLISHED[table]
    layout = official_layout(preset, parts)
    assert len(layout) == count
    assert sum(map(math.prod, layout.values())) == elements
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(layout.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("preset", "elements"), [("small-music", 459_130_896), ("medium", 1_453_170_192)])
def test_dit_has_the_published_number_of_elements(preset, elements):
    assert sum(map(math.prod, official_layout(preset, ("dit",)).values())) == elements


def test_large_has_the_derived_number_of_elements():
    assert sum(map(math.prod, official_layout("large", ("dit",)).values())) == 2_787_996_160 + 16  # RoPE buffer


@pytest.mark.parametrize("preset", PRESETS)
def test_names_are_a_bijection(preset):
    config = PRESETS[preset]
    found = pairs(config, parts_of(config))
    official = [name for pair in found for name in pair.official]
    assert {pair.ours: pair.shape for pair in found} == expected_tensors(config)
    assert len(set(official)) == len(official)
    assert not set(official) & set(buffers(config, parts_of(config)))


def test_every_row_of_the_table_is_used_by_some_preset():
    used = {re.sub(r"\.layers\.\d+\.", ".layers.{n}.", name) for name in expected_tensors(PRESETS["medium"])}
    no_bias = {f"dit.{name}.{fc}.bias" for name in ("to_cond_embed", "to_global_embed") for fc in ("fc1", "fc2")}
    assert set(TABLE) - used == no_bias
