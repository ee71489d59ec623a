"""Checkpoints that cannot be converted are refused in one line, and nothing half-written is left."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from sa3_convert import export_official

from sa3_mlx.common.files.safetensors import TensorFile
from tests.support.foreign.official_checkpoint import (
    TINY,
    TINY_AUTOENCODER,
    run,
    tensors,
    write_arrays,
    write_json,
    write_official,
)


def edit_weights(source: Path, change) -> None:
    arrays = {name: array for name, (_, array) in tensors(source / "model.safetensors").items()}
    change(arrays)
    write_arrays(source / "model.safetensors", arrays, "F32")


def truncate(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_value(source: Path, name: str, value: float) -> None:
    edit_weights(source, lambda arrays: arrays[name].reshape(-1).__setitem__(-1, value))


QKV = "model.model.transformer.layers.1.self_attn.to_qkv.weight"
MAPPING = "pretransform.model.decoder.layers.3.mapping"
TEXT = "t5gemma-b-b-ul2"
BROKEN = {
    "truncated": (truncate, "truncated"),
    "not_safetensors": (lambda s: (s / "model.safetensors").write_bytes(b"<html>Not here</html>"), "not a safetensor"),
    "missing_key": (lambda s: edit_weights(s, lambda a: a.pop(QKV)), f"missing: {re.escape(QKV)}"),
    "extra_key": (
        lambda s: edit_weights(s, lambda a: a.update({"model.model.extra": np.ones(2, np.float32)})),
        r"unexpected: model.model.extra \(2,\)",
    ),
    "wrong_shape": (
        lambda s: edit_weights(s, lambda a: a.update({QKV: a[QKV][:-1]})),
        f"wrong shape: {re.escape(QKV)} is",
    ),
    "nan": (lambda s: set_value(s, QKV, np.nan), f"tensor {re.escape(QKV)} has NaN"),
    "infinity": (lambda s: set_value(s, f"{MAPPING}.bias", np.inf), f"tensor {re.escape(MAPPING)}.bias has NaN"),
    "zero_weight_norm": (lambda s: edit_weights(s, lambda a: a[f"{MAPPING}.weight_v"].fill(0)), "weight_v has NaN"),
    "other_rope": (
        lambda s: edit_weights(s, lambda a: a["model.model.transformer.rotary_pos_emb.inv_freq"].fill(0.5)),
        "other RoPE frequencies",
    ),
    "integer_weights": (
        lambda s: write_arrays(s / "model.safetensors", {QKV: np.ones((640, 128))}, "F64"),
        "missing|dtype",
    ),
    "no_config": (lambda s: (s / "model_config.json").unlink(), "no model_config.json there"),
    "config_not_json": (lambda s: (s / "model_config.json").write_text("{"), "not valid JSON"),
    "config_not_an_object": (lambda s: (s / "model_config.json").write_text("[]"), "expected a JSON object"),
    "no_weights": (lambda s: (s / "model.safetensors").unlink(), "no model.safetensors there"),
    "several_weights": (
        lambda s: [(s / "model.safetensors").rename(s / "a.safetensors"), (s / "b.safetensors").write_bytes(b"")],
        "several other weight files",
    ),
    "no_text_encoder": (lambda s: (s / TEXT / "model.safetensors").unlink(), "the text encoder is missing"),
    "no_text_config": (lambda s: (s / TEXT / "config.json").unlink(), "the text encoder is missing"),
    "no_tokenizer": (lambda s: (s / TEXT / "tokenizer.json").unlink(), "the tokenizer is missing"),
    "tokenizer_not_json": (lambda s: (s / TEXT / "tokenizer.json").write_text("version"), "not valid JSON"),
    "tokenizer_of_another_kind": (lambda s: write_json(s / TEXT / "tokenizer.json", {"a": 1}), "not a tokenizer"),
    "text_encoder_of_another_size": (
        lambda s: write_arrays(s / TEXT / "model.safetensors", {"model.encoder.norm.weight": np.ones(8)}, "BF16"),
        "missing: text|missing: model.encoder|wrong shape: model.encoder.norm.weight",
    ),
    "autoencoder_weights_with_a_full_config": (
        lambda s: edit_weights(
            s, lambda a: [a.update({n.removeprefix("pretransform.model."): a.pop(n)}) for n in list(a)]
        ),
        "unexpected: decoder.layers",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_in_one_line_and_leave_nothing(case, tmp_path):
    change, message = BROKEN[case]
    source = write_official(tmp_path / "source", TINY)
    change(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(source, tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_all_faults_of_a_file_are_listed_in_one_error(tmp_path):
    source = write_official(tmp_path / "source", TINY)

    def change(arrays):
        del arrays[QKV], arrays[f"{MAPPING}.bias"]
        arrays["surprise"] = np.ones(3, np.float32)
        arrays["model.model.preprocess_conv.weight"] = np.ones((6, 6), np.float32)

    edit_weights(source, change)
    with pytest.raises(ValueError, match=r"4 tensor\(s\)") as caught:
        run(source, tmp_path / "ours")
    for word in (QKV, f"{MAPPING}.bias", "surprise", "preprocess_conv"):
        assert word in str(caught.value)


def test_sources_that_are_no_official_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or file; released models are had with 'sa3 get'"):
        run("small-music", tmp_path / "ours")
    source = write_official(tmp_path / "source", TINY_AUTOENCODER)
    (source / "model.ckpt").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="pickled checkpoints"):
        run(source / "model.ckpt", tmp_path / "ours")
    run(source, tmp_path / "ours")
    with pytest.raises(ValueError, match="already in the sa3 format"):
        run(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(ValueError, match="exists already"):
        run(source, tmp_path / "ours")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="exists and is not a converted checkpoint"):
        run(source, tmp_path / "file", force=True)


def test_export_refuses_what_does_not_fit_its_configuration(tmp_path):
    run(write_official(tmp_path / "source", TINY_AUTOENCODER), tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        export_official(tmp_path / "source", tmp_path / "back", force=False)
    with TensorFile.open(tmp_path / "ours" / "model.safetensors") as file:
        arrays = {name: file.raw(name) for name in file.names() if name != "same.encoder.new_token"}
    write_arrays(tmp_path / "ours" / "model.safetensors", arrays, "F32")
    with pytest.raises(ValueError, match=r"missing: same\.encoder\.new_token"):
        export_official(tmp_path / "ours", tmp_path / "back", force=False)
    assert not (tmp_path / "back").exists()


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    source = write_official(tmp_path / "source", TINY_AUTOENCODER)
    monkeypatch.setattr("sa3_convert.official.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="GB needed"):
        run(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interruption_leaves_nothing(tmp_path):
    source = write_official(tmp_path / "source", TINY_AUTOENCODER)

    def interrupt(done, total, name):
        if done > total // 2:
            raise KeyboardInterrupt(name)

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "ours", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
