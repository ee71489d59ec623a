"""Makes the files beside this one: ``python tests/goldens/make.py ../shared/golden`` in the repository root.

``tiny-*``: a few official cases, for tests that need no weights. ``small-*``: outputs of the torch twin with weights
from ``tiny_checkpoint.py``; run this only when both twins pass on the whole golden folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
KEPT = {  # area -> beginnings of tensor names
    "dit": ("timestep_",),
    "guidance": ("apg_", "inputs.padding_mask"),
    "samplers": ("euler_smax0.6.", "pingpong_perelem.", "dpmpp.", "rk4_lin."),
}


def main() -> None:
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    from test_small_models import run_small_model

    from tests.support.tiny import TINY
    from tests.support.tiny_checkpoint import write_checkpoint
    from tests.support.twins import Twin

    golden = Path(sys.argv[1])
    for area, names in KEPT.items():
        tensors = load_file(golden / "tiny-l" / f"{area}.safetensors")
        kept = {name: np.ascontiguousarray(values) for name, values in tensors.items() if name.startswith(names)}
        save_file(kept, HERE / f"tiny-l-{area}.safetensors")
    for name, config in TINY.items():
        with tempfile.TemporaryDirectory() as folder:
            outputs = run_small_model(Twin("torch"), write_checkpoint(Path(folder), config))
        kept = {key: np.ascontiguousarray(array) for key, array in outputs.items()}
        save_file(kept, HERE / f"small-{name}-outputs.safetensors")


if __name__ == "__main__":
    main()
