"""Identity of what a run reads, so that it does not go on with something else."""

from __future__ import annotations

import hashlib
import json

from .latents import LatentSet, shard_path


def latents_identity(latents: LatentSet) -> str:
    """Return "sha256:..." of the hashes that stand beside all shards of latents, in their order.

    Raises OSError and ValueError for a shard without a readable description.
    """
    found = hashlib.sha256()
    for folder in latents.folders:
        shards = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]
        for number in range(shards):
            path = shard_path(folder, number).with_suffix(".json")
            about = json.loads(path.read_text(encoding="utf-8"))
            described = json.dumps([about["hash"], about["items"]], sort_keys=True)
            found.update(described.encode("utf-8"))
    return f"sha256:{found.hexdigest()}"
