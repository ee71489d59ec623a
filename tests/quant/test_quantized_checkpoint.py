"""Test checkpoints with quantized layers: the file says what it holds, both twins load it strictly and agree."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.common.files.safetensors import TensorEntry, TensorFile, array_entry, file_hash, write_tensors
from sa3_mlx.common.model.checkpoint import expected_tensors
from sa3_mlx.common.quant.affine import BITS, dequantize, quantize, round_to
from sa3_mlx.common.quant.format import (
    METADATA_KEY,
    Grid,
    Quantization,
    check_file,
    check_folder,
    read_packed,
    stored_tensors,
)
from sa3_mlx.common.quant.recipes import RECIPES, choose_bits, find_recipe, layer_class, layers_of
from sa3_mlx.common.quant.writer import REPORT_FILE, QuantizeReport, nearest, write_quantized
from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.twins import Twin, relative

CONFIG = TINY["tiny-l"]
# Every width and a few groups in one model.
WIDTHS = {
    path: Grid(bits=BITS[i % len(BITS)], group=(32, 64, 128)[i % 3])
    for i, path in enumerate([*layers_of(CONFIG, "dit"), *layers_of(CONFIG, "same")])
}


def write(source: Path, out: Path, grids: dict[str, Grid], *, force: bool = False) -> QuantizeReport:
    return write_quantized(
        source,
        out,
        recipe="test",
        grids=grids,
        velocity=None,
        force=force,
        quantizers={path: partial(nearest, grid=grid) for path, grid in grids.items()},
    )


@pytest.fixture(scope="module")
def source(random_models: dict[str, Path]) -> Path:
    return random_models["tiny-l"]


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "tiny"
    write(source, out, WIDTHS)
    return out


def test_the_file_says_what_it_holds(source: Path, folder: Path) -> None:
    with TensorFile.open(folder / "model.safetensors") as file:
        found = Quantization.read(file)
        assert found is not None
        assert found.grids() == WIDTHS == check_file(file, CONFIG)
        assert found.source == file_hash(source / "model.safetensors")
    with TensorFile.open(source / "model.safetensors") as file:
        assert Quantization.read(file) is None
        assert check_file(file, CONFIG) == {}


def test_other_tensors_keep_their_bytes(source: Path, folder: Path) -> None:
    """Except single-precision matrices beside quantized ones of the DiT, which become half precision."""
    with TensorFile.open(source / "model.safetensors") as old, TensorFile.open(folder / "model.safetensors") as new:
        for name in old.names():
            if name.removesuffix(".weight") in WIDTHS:
                continue
            half = name.startswith("dit.") and name.endswith(".weight") and len(old.info(name)[1]) == 2
            assert new.info(name)[0] == ("F16" if half else "F32"), name
            wanted = old.raw(name).astype(np.float16) if half else old.raw(name)
            np.testing.assert_array_equal(new.raw(name), wanted)


def test_torch_holds_the_values_of_the_packed_weights(folder: Path) -> None:
    pytest.importorskip("torch")
    with TensorFile.open(folder / "model.safetensors") as file:
        for part in ("dit", "same"):
            module = Twin("torch").load(folder, part)
            for path, grid in WIDTHS.items():
                if path.startswith(part + "."):
                    weight = module.get_submodule(path.removeprefix(part + ".")).weight
                    np.testing.assert_array_equal(weight.numpy(), dequantize(read_packed(file, path, grid), "F32"))


def test_mlx_keeps_the_weights_packed(folder: Path) -> None:
    mx, nn = pytest.importorskip("mlx.core"), pytest.importorskip("mlx.nn")
    module = Twin("mlx").load(folder, "dit")
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.QuantizedLinear)}
    assert {f"dit.{path}" for path in layers} == {path for path in WIDTHS if path.startswith("dit.")}
    for path, layer in layers.items():
        assert layer.weight.dtype == mx.uint32
        assert (layer.bits, layer.group_size) == (WIDTHS[f"dit.{path}"].bits, WIDTHS[f"dit.{path}"].group)
        assert layer.scales.dtype == mx.float32
    half = Twin("mlx").load(folder, "dit", "float16")
    assert half.layers[0].self_attn.to_qkv.scales.dtype == mx.float16


@pytest.mark.parametrize("part", ["dit", "same"])
def test_twins_agree_on_a_quantized_model(folder: Path, part: str) -> None:
    """Compare both networks; measured: 1e-6 (DiT), 2e-6 (SAME)."""
    pytest.importorskip("torch")
    pytest.importorskip("mlx.core")
    rng, found = np.random.default_rng(0), []
    latents = rng.standard_normal((1, 5, 16)).astype(np.float32)
    context, seconds = (rng.standard_normal(s).astype(np.float32) for s in ((1, 7, 48), (1, 48)))
    for twin in (Twin("mlx"), Twin("torch")):
        module = twin.load(folder, part)
        if part == "same":
            found.append(twin.numpy(module.decode(twin.array(latents))))
            continue
        cond = twin.module("dit").Conditioning(
            context=twin.array(context),
            seconds=twin.array(seconds),
            valid=None,
            local=twin.array(np.zeros((1, 1, 17), np.float32)),
        )
        t = twin.times(np.array([0.5], np.float32))
        found.append(twin.numpy(module(twin.array(latents), t, module.prepare(cond))))
    assert relative(*found) < 2e-5


def test_twins_agree_on_a_quantized_text_encoder(tmp_path: Path) -> None:
    """Store it in bfloat16, as the released ones are. Measured: 4e-7."""
    pytest.importorskip("torch")
    pytest.importorskip("mlx.core")
    assert CONFIG.diffusion is not None
    text = dataclasses.replace(CONFIG.diffusion.text_encoder, width=128, intermediate=192, heads=2)
    config = dataclasses.replace(CONFIG, diffusion=dataclasses.replace(CONFIG.diffusion, text_encoder=text))
    single = write_checkpoint(tmp_path / "single", config)
    with TensorFile.open(single / "model.safetensors") as file:
        kinds = {name: "BF16" if name.startswith("text_encoder") else "F32" for name in file.names()}
        entries = [array_entry(name, file.read(name), kinds[name]) for name in file.names()]
        (tmp_path / "source").mkdir()
        write_tensors(tmp_path / "source" / "model.safetensors", entries, {"format": "sa3/1"})
    (tmp_path / "source" / "config.json").write_text(config.to_json())
    grids = {path: Grid(bits=8, group=64) for path in layers_of(config, "text_encoder")}
    assert len(grids) == 7 * text.depth
    report = write(tmp_path / "source", tmp_path / "out", grids)
    assert all(row.weight_error < 0.007 for row in report.classes.values())
    with TensorFile.open(tmp_path / "out" / "model.safetensors") as file:
        assert file.info("text_encoder.layers.0.mlp.down_proj.scales")[0] == "BF16"
        assert file.info("text_encoder.embed_tokens.weight")[0] == "BF16"
    ids, mask = np.array([[3, 5, 7, 0]], np.int32), np.array([[True, True, True, False]])
    found = []
    for twin in (Twin("mlx"), Twin("torch")):
        encoder = twin.load(tmp_path / "out", "text_encoder")
        found.append(twin.numpy(encoder(twin.array(ids), twin.array(mask)))[:, :3])
    assert relative(*found) < 5e-6


@pytest.mark.parametrize("bits", BITS)
def test_quantized_product_equals_the_product_with_the_values(bits: int) -> None:
    """Compare products; measured: 4e-7 relative."""
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(bits)
    weight, x = (rng.standard_normal(s).astype(np.float32) for s in ((24, 128), (5, 128)))
    packed = quantize(round_to(weight, "F16"), bits=bits, group=64, storage="F16")
    with mx.stream(mx.cpu):
        words, scales, biases = (mx.array(a) for a in (packed.words, packed.scales, packed.biases))
        found = mx.quantized_matmul(mx.array(x), words, scales, biases, transpose=True, group_size=64, bits=bits)
        assert relative(np.array(found), x @ dequantize(packed, "F32").T) < 2e-6


def _rewritten(folder: Path, out: Path, change) -> Path:
    """Write the weight file with its entries and metadata changed."""
    out.mkdir()
    with TensorFile.open(folder / "model.safetensors") as file:
        entries = {n: TensorEntry(n, *file.info(n), lambda n=n: file.raw(n)) for n in file.names()}
        metadata = dict(file.metadata)
        change(entries, metadata)
        write_tensors(out / "model.safetensors", entries.values(), metadata)
    return out


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    path = "dit.layers.0.ff.proj_in"

    def check(name: str, change, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_folder(_rewritten(folder, tmp_path / name, change), CONFIG)

    check("missing", lambda entries, _: entries.pop(f"{path}.scales"), rf"missing: {path}\.scales")
    check("no entry", lambda _, metadata: metadata.pop(METADATA_KEY), r"unexpected: dit\.layers\.0\..*\.biases")
    check("json", lambda _, metadata: metadata.update(quantization="{"), "not valid JSON")

    def edit(change):
        def apply(_entries, metadata):
            data = json.loads(metadata[METADATA_KEY])
            change(data)
            metadata[METADATA_KEY] = json.dumps(data)

        return apply

    check("field", edit(lambda d: d.update(mode="mxfp4")), r"unknown field\(s\) mode")
    check("bits", edit(lambda d: d["layers"][0]["grid"].update(bits=7)), "bits is 7: allowed are 2, 3, 4, 5, 6, 8")
    check("other", edit(lambda d: d["layers"][0]["grid"].update(bits=2, group=32)), "wrong shape")
    check("path", edit(lambda d: d["layers"][0].update(path="dit.nothing")), "no linear map 'dit.nothing'")


def test_words_must_be_words(folder: Path, tmp_path: Path) -> None:
    def change(entries, _metadata):
        name = "dit.layers.0.ff.proj_in.scales"
        entry = entries[name]
        entries[name] = TensorEntry(name, "F32", entry.shape, lambda: entry.load().astype(np.float32))

    broken = _rewritten(folder, tmp_path / "wide", change)
    with (
        TensorFile.open(broken / "model.safetensors") as file,
        pytest.raises(ValueError, match="stored as U32, F32, F16, must be U32 and twice F16 or BF16"),
    ):
        check_file(file, CONFIG)


def test_a_quantized_model_is_neither_quantized_again_nor_exported(folder: Path, tmp_path: Path) -> None:
    from sa3_convert import export_official

    with pytest.raises(ValueError, match="is quantized already"):
        write(folder, tmp_path / "again", {})
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="is quantized; export the model that it was made from"):
        export_official(folder, tmp_path / "official", force=False)


def test_an_existing_folder_is_replaced_only_when_asked_to(source: Path, tmp_path: Path) -> None:
    out, some = tmp_path / "out", dict(list(WIDTHS.items())[:2])
    write(source, out, some)
    with pytest.raises(ValueError, match="exists already"):
        write(source, out, some)
    write(source, out, WIDTHS, force=True)
    with TensorFile.open(out / "model.safetensors") as file:
        assert check_file(file, CONFIG) == WIDTHS
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        write(source, other, some, force=True)  # not a model


def test_report_counts_bytes_and_errors(source: Path, folder: Path) -> None:
    report = json.loads((folder / REPORT_FILE).read_text())
    assert report["hash"] == file_hash(folder / "model.safetensors")
    for place, key in ((source, "bytes_before"), (folder, "bytes_after")):
        size = sum(part[key] for part in report["parts"].values())
        assert 0 <= (place / "model.safetensors").stat().st_size - size < 60_000  # the header
    assert report["parts"]["dit"]["quantized_parameters"] == sum(
        np.prod(shape) for path, shape in layers_of(CONFIG, "dit").items()
    )
    assert set(report["classes"]) == {layer_class(path) for path in WIDTHS}
    uniform = {path: Grid(bits=4, group=64) for path in layers_of(CONFIG, "dit")}
    assert report["bits_per_weight"] > 2.5
    found = write(source, folder.parent / "four", uniform)
    assert found.bits_per_weight == 4.5
    for row in found.classes.values():  # Gaussian weights (measured .091 on large matrices)
        assert row.weight_error == pytest.approx(0.091, abs=0.003)
    assert "4.50 bits per weight" in str(found)


def test_recipes_leave_out_what_must_stay_precise() -> None:
    for name, config in TINY.items():
        paths = set(layers_of(config, "dit"))
        assert len(paths) == 8 * config.diffusion.dit.depth, name
        assert not any(word in path for path in paths for word in ("embed.fc1", "project", "modulation", "to_cond"))
        codec = set(layers_of(config, "same"))
        assert not any(word in path for path in codec for word in ("mapping", "project", "embed"))
        assert any("to_qkv" in path for path in codec)  # [Q2.5]
        assert not any(path.startswith(f"same.decoder.layers.{config.same.decoder_depth - 1}.") for path in codec)
        assert layers_of(config, "text_encoder") == {}  # rows of 48 and 96 values
        shapes = expected_tensors(config)
        for part in ("dit", "same"):
            grids = {path: Grid(bits=4, group=64) for path in layers_of(config, part)}
            assert len(stored_tensors(shapes, grids)) == len(shapes) + 2 * len(grids)


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match=f"recipe is '7bit': allowed are {', '.join(RECIPES)}"):
        find_recipe("7bit")


def test_bits_go_where_they_help_most() -> None:
    falls = {3: 8.0, 4: 2.0, 5: 0.5, 6: 0.1, 8: 0.01}
    damage = {"a": falls, "b": {bits: 100 * d for bits, d in falls.items()}, "c": dict.fromkeys(falls, 0.0)}
    sizes = {"a": 100, "b": 100, "c": 100}
    found = choose_bits(damage, sizes, 5.0)
    assert found["b"].bits > found["a"].bits > found["c"].bits == 3
    assert sum(found[path].bits_per_weight * 100 for path in found) / 300 <= 5.0
    assert {grid.bits for grid in choose_bits(damage, sizes, 3.5).values()} == {3}
    with pytest.raises(ValueError, match="3 bits need more"):
        choose_bits(damage, sizes, 3.4)
