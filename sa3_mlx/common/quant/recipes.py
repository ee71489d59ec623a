"""Define the recipes of ``sa3 quantize``: which layers of each part get how many bits, by which method.

Adding a recipe is adding a line to RECIPES. What stays as it is, whatever the recipe: embedders of prompt, time and
duration, the modulation, projections in and out of the DiT, norms, memory tokens, the text embedding (rows of it are
gathered), and the ends of the codec [Q2.5].
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sa3_mlx.common.model.checkpoint import Shapes, expected_tensors
from sa3_mlx.common.model.config import ModelConfig

from .format import Grid

GROUP = 64
MIXED_BITS = (3, 4, 5, 6, 8)  # among which a mixed recipe chooses, layer by layer
_LAYERS = {
    "dit": re.compile(
        r"dit\.layers\.\d+\.(self_attn\.(to_qkv|to_out)|cross_attn\.(to_q|to_kv|to_out)"
        r"|ff\.(proj_in|proj_out)|local_embed\.fc2)"
    ),
    "text_encoder": re.compile(r"text_encoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"),
    "same": re.compile(r"same\.(encoder|decoder)\.layers\.\d+\.(self_attn\.(to_qkv|to_out)|ff\.(proj_in|proj_out))"),
}


@dataclass(frozen=True, kw_only=True)
class PartRecipe:
    """Say how the layers of one part are quantized.

    ``bits`` is for every layer; or with ``target`` each gets as many as its measured sensitivity asks for, such that
    the mean over all weights of these layers, scales and biases included, stays below ``target``.
    """

    method: Literal["nearest", "gptq"]
    bits: int
    target: float | None = None

    @property
    def measures(self) -> bool:
        """Return whether calibration runs are needed."""
        return self.method == "gptq" or self.target is not None

    @property
    def grid(self) -> Grid:
        """Return the grid of every layer where there is no target."""
        return Grid(bits=self.bits, group=GROUP)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hold what is done to each part; None keeps a part as it is."""

    dit: PartRecipe | None
    text_encoder: PartRecipe | None
    same: PartRecipe | None

    def parts(self) -> dict[str, PartRecipe]:
        """Return the parts that are quantized."""
        found = {"dit": self.dit, "text_encoder": self.text_encoder, "same": self.same}
        return {part: recipe for part, recipe in found.items() if recipe is not None}


NEAREST_8 = PartRecipe(method="nearest", bits=8)


def _recipe(method: Literal["nearest", "gptq"], bits: int, target: float | None = None) -> Recipe:
    return Recipe(dit=PartRecipe(method=method, bits=bits, target=target), text_encoder=NEAREST_8, same=None)


RECIPES: dict[str, Recipe] = {
    "8bit": _recipe("nearest", 8),
    "6bit": _recipe("nearest", 6),
    "5bit": _recipe("nearest", 5),
    "4bit": _recipe("nearest", 4),
    "3bit": _recipe("nearest", 3),
    "6bit-gptq": _recipe("gptq", 6),
    "5bit-gptq": _recipe("gptq", 5),
    "4bit-gptq": _recipe("gptq", 4),
    "3bit-gptq": _recipe("gptq", 3),
    "mixed-6": _recipe("nearest", MIXED_BITS[0], 6.0),
    "mixed-5": _recipe("nearest", MIXED_BITS[0], 5.0),
    "mixed-4.5": _recipe("nearest", MIXED_BITS[0], 4.5),
    "mixed-4.5-gptq": _recipe("gptq", MIXED_BITS[0], 4.5),
    "8bit-codec": Recipe(dit=NEAREST_8, text_encoder=NEAREST_8, same=NEAREST_8),
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name. Raises ValueError for a name that is not in RECIPES."""
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}: allowed are {', '.join(RECIPES)}")
    return RECIPES[name]


def layers_of(config: ModelConfig, part: str) -> Shapes:
    """Return path and shape (O, I) of the layers of a part that a recipe may quantize.

    Rows that groups do not fill stay as they are, and so does the last block of the codec's decoder.
    """
    shapes = expected_tensors(config, [part])
    last = f"same.decoder.layers.{config.same.decoder_depth - 1}."
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight")
        and _LAYERS[part].fullmatch(name.removesuffix(".weight"))
        and shape[1] % GROUP == 0
        and not name.startswith(last)
    }


def layers_of_recipe(config: ModelConfig, recipe: Recipe) -> dict[str, Shapes]:
    """Return ``layers_of`` every part that the recipe quantizes; none where a part has none, or a model has no such
    part."""
    return {part: layers_of(config, part) if part == "same" or config.diffusion else {} for part in recipe.parts()}


def layer_class(path: str) -> str:
    """Name what a layer does in every block: "dit.layers.3.ff.proj_in" -> "dit ff.proj_in"."""
    part, _, rest = path.partition(".")
    return f"{part} {re.sub(r'^.*?layers[.][0-9]+[.]', '', rest)}"


def choose_bits(damage: dict[str, dict[int, float]], sizes: dict[str, int], target: float) -> dict[str, Grid]:
    """Choose grids with the least total damage within ``target`` bits per weight, scales and biases included.

    ``damage[path][bits]`` is what a layer does to the output by itself, ``sizes[path]`` its number of weights. The
    search is greedy: all start at the fewest bits; the next step goes to the layer whose damage falls most per added
    bit. Raises ValueError for a target below what the fewest bits need.
    """
    bits = dict.fromkeys(damage, min(MIXED_BITS))
    total = sum(sizes.values())
    budget = (target - 32 / GROUP) * total - sum(bits[path] * sizes[path] for path in bits)
    if budget < 0:
        raise ValueError(f"{target} bits per weight cannot be reached: {min(MIXED_BITS)} bits need more")
    while True:
        steps = []
        for path, now in bits.items():
            for more in (b for b in MIXED_BITS if b > now):
                cost = (more - now) * sizes[path]
                if cost <= budget:
                    steps.append(((damage[path][now] - damage[path][more]) / cost, cost, path, more))
        if not steps or max(steps)[0] <= 0:
            return {path: Grid(bits=b, group=GROUP) for path, b in bits.items()}
        _, cost, path, more = max(steps)
        bits[path] = more
        budget -= cost
