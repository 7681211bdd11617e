"""The dispatch record on vLLM's /metrics.

vLLM answers /metrics in its API server, while the model runs in another process. The model's process writes
its record to a small file in a folder that both know by an environment variable, set when the plugin is first
registered and inherited; the API server reads it when asked.
"""

from __future__ import annotations

import atexit
import collections
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from neuronmlp_plugin.serving.trainium import run_after_import

logger = logging.getLogger("vllm.neuronmlp")
FOLDER_VARIABLE = "NEURONMLP_METRICS_DIR"


def prepare() -> None:
    """Name the folder, and have a collector registered as soon as someone imports prometheus_client.
    Idempotent.
    """
    if FOLDER_VARIABLE not in os.environ:
        folder = os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="neuronmlp-metrics-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run_after_import("prometheus_client", _register_collector)


def publish(record: dict[str, Any]) -> None:
    """Write `DispatchRecord.totals()` for the API server: a few hundred bytes, microseconds beside a forward.

    Where that fails (a full disk, a folder that somebody cleaned away) the log says so, once, and serving
    goes on.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is not None:
        path = pathlib.Path(folder) / f"{os.getpid()}.json"
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(record), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            # No folder any more: that is how the next call, at every forward, knows not to try again.
            os.environ.pop(FOLDER_VARIABLE)
            logger.warning(
                "neuronmlp: %s could not be written (%s), so /metrics no longer follows what runs",
                path,
                error,
            )


def records() -> list[dict[str, Any]]:
    """What every model process of this server last published."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return (
        []
        if folder is None
        else [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(pathlib.Path(folder).glob("*.json"))
        ]
    )


class DispatchCollector:
    """Prometheus collector over the records in the folder."""

    # Without it the registry would collect on registering, only to learn names.
    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ["phase", "path", "reason", "weights"]
        layers = GaugeMetricFamily("neuronmlp_mlp_layers", "MLP layers compiled for each path", labels=labels)
        runs = CounterMetricFamily("neuronmlp_mlp_runs", "MLP layer executions by each path", labels=labels)
        for key, family in (("layers", layers), ("runs", runs)):
            # One sample a label set, whatever number of processes.
            totals: collections.Counter[tuple[str, ...]] = collections.Counter()
            for record in records():
                for *label, count in record[key]:
                    totals[tuple(label)] += count
            for label, count in totals.items():
                family.add_metric(label, count)
        yield layers
        yield runs


def _register_collector(prometheus_client: Any) -> None:
    registry = prometheus_client.REGISTRY
    if not any(isinstance(collector, DispatchCollector) for collector in list(registry._collector_to_names)):
        registry.register(DispatchCollector())
