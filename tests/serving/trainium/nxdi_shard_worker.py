"""Shard a factored folder by NxDI's own ModelBuilder: `python -m tests.serving.trainium.nxdi_shard_worker
FOLDER TP OUT DTYPE`.
"""

from __future__ import annotations

import os
import sys

from tests.serving.trainium.nxdi_cases import Case


def main(folder: str, tp: str, out: str, dtype: str) -> None:
    import neuronmlp_plugin
    from tests.serving.trainium import neuron_wheels

    # The trace-time path of NxDI, as on a device: it fakes the process group that its CPU mode would open.
    os.environ["NXD_CPU_MODE"] = "0"
    neuron_wheels.install()
    neuronmlp_plugin.register()
    from tests.serving.trainium.nxdi_worker import build

    model = build(Case("shard", "llama", folder, int(tp), 1, {}, {"torch_dtype": dtype}))
    model.get_builder().shard_checkpoint(serialize_path=out)


if __name__ == "__main__":
    main(*sys.argv[1:])
