"""``sa3 push`` against a stand-in for the hub: what is uploaded, what the card says, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.licences import GEMMA, STABILITY
from sa3_mlx.common.origin import Origin, OriginFile, OriginLicence, read_origin
from tests.support.command import Run, ok
from tests.support.foreign.hub import COMMIT, Hub, serving
from tests.support.foreign.official_checkpoint import TINY
from tests.support.tiny import with_clap
from tests.support.tiny_checkpoint import write_checkpoint

TOKEN = {"HF_TOKEN": "hf_somebody"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving({}) as hub:
        yield hub


def write_origin(folder: Path, *licences: tuple[str, str, str]) -> None:
    origin = Origin(
        repository="stabilityai/stable-audio-3-optimized",
        revision=COMMIT,
        files=(OriginFile(name="MLX/dit_sm-music_f16.npz", hash="sha256:" + "a" * 64),),
        licences=tuple(OriginLicence(id=identity, name=name, page=page) for identity, name, page in licences),
    )
    (folder / "origin.json").write_text(json.dumps(origin.stored()))


RELEASED = tuple((licence.id, licence.name, licence.page) for licence in (STABILITY, GEMMA))


def test_a_model_is_uploaded_with_its_card_and_comes_back(hub, tmp_path):
    folder = write_checkpoint(tmp_path / "mine", with_clap(replace(TINY, name="mine")))
    (folder / "notes.txt").write_text("private")
    done = hub.sa3(tmp_path, "push", "mine", "me/Mine", "--licence", "mit", **TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"me/Mine at revision {COMMIT}" in done.stdout and "sa3 get me/Mine" in done.stdout
    files = {"config.json", "model.safetensors", "clap.safetensors", "tokenizer.json", "README.md"}
    assert hub.received.keys() == files
    assert hub.received["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    text = hub.received["README.md"].decode()
    assert f"| latent CLAP | {file_hash(folder / 'clap.safetensors')} |" in text
    assert file_hash(folder / "model.safetensors") in text and 'license_name: "mit"' in text
    assert 'sa3 generate "PROMPT" --model mine' in text
    served = tmp_path / "served"
    served.mkdir()
    for name, data in hub.received.items():
        (served / name).write_bytes(data)
    hub.repositories, hub.licence = {"me/Mine": served}, "mit"
    back = hub.sa3(tmp_path, "get", "me/Mine", "--accept-licence")
    assert back.returncode == 0, back.stderr
    installed = tmp_path / "sa3" / "models" / "mine"
    for name in ("model.safetensors", "clap.safetensors", "config.json"):
        assert file_hash(installed / name) == file_hash(folder / name)


def test_without_a_token_or_with_a_refusing_hub_it_is_one_line(hub, tmp_path):
    write_checkpoint(tmp_path / "mine", TINY)
    done = hub.sa3(tmp_path, "push", "mine", "me/mine", "--licence", "mit")
    assert done.returncode == 2 and "no access token found; log in with 'hf auth login'" in done.stderr
    hub.status = 403
    done = hub.sa3(tmp_path, "push", "mine", "me/mine", "--licence", "mit", **TOKEN)
    last = [line for line in done.stderr.splitlines() if line.startswith("sa3: ")]
    assert done.returncode == 2 and len(last) == 1 and "access refused" in last[0]
    assert hub.received == {}


def test_the_card_names_parents_hashes_and_licences(run: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tuned", TINY)
    write_origin(folder, *RELEASED)
    (folder / "parents.json").write_text(json.dumps({"autoencoder": "sha256:" + "b" * 64}))
    text = ok(run("push", str(folder), "me/tuned", "--card")).out
    for words in (
        'license_name: "stability-ai-community"',
        'base_model: "stabilityai/stable-audio-3-optimized"',
        STABILITY.page,
        GEMMA.page,
        "Powered by Stability AI",
        f"at revision {COMMIT}",
        "MLX/dit_sm-music_f16.npz: sha256:aaaa",
        "autoencoder: sha256:bbbb",
        "sa3 get me/tuned",
    ):
        assert words in text, words
    assert "## Precision" not in text
    front = text.split("---")[1].strip().splitlines()
    assert all(re.fullmatch(r"\w+: .+", line) and json.loads(line.split(": ", 1)[1]) for line in front)


def test_the_card_of_a_quantized_model_has_what_was_measured(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    source = write_checkpoint(tmp_path / "wide", TINY)
    write_origin(source, *RELEASED)
    ok(run("quantize", str(source), str(tmp_path / "small"), "--recipe", "8bit"))
    assert read_origin(tmp_path / "small") == read_origin(source)
    text = ok(run("push", str(tmp_path / "small"), "me/small", "--card")).out
    report = json.loads((tmp_path / "small" / "quantization.json").read_text())
    assert "## Precision" in text and f"quantized by the recipe 8bit from weights {report['source']}" in text
    for name, row in report["classes"].items():
        assert f"| {name} | {row['bits_per_weight']:.2f} | {row['weight_error']:.4f} |" in text


def test_what_may_not_be_passed_on_is_refused_unless_told(run: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tuned", TINY)
    refused = run("push", str(folder), "me/tuned", "--card")
    assert refused.code == 2 and "give --licence NAME, such as mit" in refused.err
    write_origin(folder, ("x cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0", "https://huggingface.co/a/b"))
    refused = run("push", str(folder), "me/tuned", "--card", "--licence", "mit")
    assert refused.code == 2
    assert "cc-by-nc-nd-4.0 (https://huggingface.co/a/b), which is not known to allow" in refused.err
    assert ok(run("push", str(folder), "me/tuned", "--card", "--licence", "mit", "--licence-allows-it")).out
    wrong = run("push", str(folder), "tuned", "--card")
    assert wrong.code == 2 and "expected USER/REPO" in wrong.err
    (folder / "origin.json").write_text('{"format": "sa3-origin/1"}')
    damaged = run("push", str(folder), "me/tuned", "--card")
    assert damaged.code == 2 and "origin.json: missing field(s)" in damaged.err
