"""What a user may choose about a compression, checked once."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from neuronmlp_plugin.errors import UsageError

METHODS = ("two-sided", "whitened", "plain", "modegpt")
FORMS = ("compact", "uv", "narrow")
CHANNELS = ("remove", "keep")
ALLOCATIONS = ("global", "measured", "uniform")
DTYPES = ("auto", "bfloat16", "float16", "float32")
_QUALITIES = (
    (re.compile(r"ppl\+(\d+\.?\d*)%"), "perplexity_ratio"),
    (re.compile(r"kl<(\d+\.?\d*)"), "kl_divergence"),
    (re.compile(r"top1>(\d+\.?\d*)%"), "top1_agreement"),
)


def default_allocation(method: str, target: str | None) -> str:
    """The best that a method can have; with a target every probe would need a measuring pass of its own."""
    if method != "two-sided":
        return "uniform"
    return "measured" if target is None else "global"


def default_form(method: str) -> str:
    """The best that a method can have."""
    return "narrow" if method == "modegpt" else "compact"


def per_cent_hint(found: float) -> str:
    """How to write what was perhaps meant by a number from 1 to 99: `2` -> "; for 2 % write 0.02"."""
    return f"; for {found:g} % write {found / 100:g}" if 1 <= found < 100 else ""


def check_seed(seed: int) -> None:
    """UsageError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed: expected a number from 0 to 2^63 - 1, found {seed}.")


@dataclasses.dataclass(frozen=True)
class Target:
    """A quality asked for in place of a size: `ppl+2%`, `kl<0.05`, `top1>95%`. `metric` is a key of
    `Quality.to_json`: agreement has to reach `bound`, a perplexity ratio or KL (nats a token) to stay within.
    """

    metric: str
    bound: float

    def met(self, quality: Mapping[str, float]) -> bool:
        found = quality[self.metric]
        return found >= self.bound if self.metric == "top1_agreement" else found <= self.bound


def parse_target(text: str) -> Target:
    """Raises UsageError for what is none of the three, or bounds nothing (`kl<0`, `top1>100%`: only the dense
    model would do).
    """
    for pattern, metric in _QUALITIES:
        match = pattern.fullmatch(text.replace(" ", ""))
        if match is None:
            continue
        number = float(match[1])
        bound = {
            "perplexity_ratio": 1 + number / 100,
            "kl_divergence": number,
            "top1_agreement": number / 100,
        }[metric]
        if number > 0 and (metric != "top1_agreement" or bound < 1):
            return Target(metric, bound)
    raise UsageError(
        '--target: expected "ppl+2%", "kl<0.05" or "top1>95%" (numbers above 0, top1 below 100), found '
        f"{text!r}; put it in quotes."
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """One compression. `model` and `text` are local paths; everything but `out` and `analysis` decides the
    bytes of the result.
    """

    model: pathlib.Path
    out: pathlib.Path
    text: pathlib.Path | None  # calibration text (.txt or .jsonl); `plain` needs none
    # The size, exactly one of three:
    remove: float | None = None  # share of the parameters of all gate, up and down matrices to take away
    # As much as keeps this quality on the judge's windows: ppl+2%, kl<0.05 or top1>95%.
    target: str | None = None
    # As little as makes the MLPs this many times faster in decode, simulated (compressor/decode_time.py).
    faster: float | None = None
    form: str = "compact"  # of the factors | "narrow": channels go, and all matrices stay dense
    # Of channels that are factorised apart; None: what makes slices nearest to square.
    groups: int | None = None
    tp: int = 1  # groups are to be a multiple of this
    channels: str = "remove"  # where it pays, beside factors | "keep" all
    # input moment and output metric | input moment alone (SVD-LLM) | neither (plain SVD) | MoDeGPT's MLP step
    method: str = "two-sided"
    # ranks across all matrices, with a dense option | and losses measured in place | the same share of each
    allocation: str = "global"
    rank_multiple: int = 16
    dtype: str = "auto"  # of the factors; auto keeps the model's
    window: int = 1024  # tokens per calibration window
    tokens: int = 98304  # calibration tokens for the input moments
    metric_tokens: int = 16384  # of which the backward pass sees this many
    judge_tokens: int = 8192  # taken from the end of the text, never calibrated on, to report quality
    samples: int = 48  # new tokens of each sample text in the report; 0 makes none
    factors_only: bool = False  # write a factor file for the dense folder instead of a folder
    seed: int = 0  # which windows are drawn when the text has more than needed
    # Where statistics and decompositions stay, to be used again for another size or form.
    analysis: pathlib.Path | None = None

    def __post_init__(self) -> None:
        self._check_size()
        for name, value, allowed in (
            ("form", self.form, FORMS),
            ("method", self.method, METHODS),
            ("channels", self.channels, CHANNELS),
            ("allocation", self.allocation, ALLOCATIONS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in allowed:
                raise UsageError(f"--{name}: expected one of {', '.join(allowed)}, found {value!r}.")
        for name in ("rank_multiple", "window", "tokens", "groups", "tp"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(
                    f"--{name.replace('_', '-')}: expected a positive number, found {getattr(self, name)}."
                )
        for name in ("metric_tokens", "judge_tokens"):
            if getattr(self, name) < 0:
                raise UsageError(
                    f"--{name.replace('_', '-')}: expected a number of tokens, or 0, found "
                    f"{getattr(self, name)}."
                )
        check_seed(self.seed)
        if self.samples < 0:
            raise UsageError(
                f"--samples: expected a number of tokens, or 0 for no sample texts, found {self.samples}."
            )
        if self.text is None and self.method != "plain":
            raise UsageError(
                f"--text: expected calibration text for --method {self.method}, found none; name a .txt or "
                ".jsonl file."
            )
        self._check_form()
        if self.method != "two-sided" and self.allocation != "uniform":
            raise UsageError(
                f"--method {self.method}: expected --allocation uniform, found {self.allocation}; without "
                "the output metric the losses of "
                "different layers cannot be compared (it does worse than uniform)."
            )

    def _check_form(self) -> None:
        narrow = self.form == "narrow"
        if narrow != (self.method == "modegpt") and self.method != "two-sided":
            raise UsageError(
                f"--method {self.method}: expected --form {'narrow' if not narrow else 'compact or uv'}, "
                f"found {self.form}; modegpt removes channels, whitened and plain make factors."
            )
        if narrow and self.channels == "keep":
            raise UsageError(
                "--form narrow: expected --channels remove, found keep; dense matrices of all channels are "
                "the model itself."
            )

    @property
    def removes_channels(self) -> bool:
        """Whether layers may lose channels."""
        mixes = self.method == "two-sided" and self.allocation != "uniform" and self.channels == "remove"
        return self.form == "narrow" or mixes

    def _check_size(self) -> None:
        sizes = {"--remove": self.remove, "--target": self.target, "--faster": self.faster}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) != 1:
            raise UsageError(
                f"size: expected one of {', '.join(sizes)}, found {' and '.join(given) or 'none'}; give "
                "exactly one."
            )
        if self.remove is not None and not 0.0 < self.remove < 1.0:
            raise UsageError(
                f"--remove: expected a share between 0 and 1 (0.20 takes a fifth away), found {self.remove:g}"
                f"{per_cent_hint(self.remove)}."
            )
        if self.target is not None:
            parse_target(self.target)
            if self.text is None or self.judge_tokens < self.window:
                raise UsageError(
                    "--target: expected text to judge on, found none; give --text, and --judge-tokens of a "
                    "window or more."
                )
        if self.faster is not None and not self.faster > 1.0:
            raise UsageError(
                f"--faster: expected a factor above 1 (1.15: decode's MLPs 15 % faster), found {self.faster}."
            )
        if self.faster is not None and self.allocation == "uniform":
            raise UsageError(
                "--faster: expected --allocation global or measured, found uniform; leave the option out."
            )
        if self.target is not None and self.allocation == "measured":
            raise UsageError(
                "--allocation measured: expected --remove or --faster, found --target, which probes many "
                "sizes; leave it out."
            )

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the weights, as JSON: an unfinished run may go on with other `samples`."""
        values = {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key not in ("out", "analysis", "samples")
        }
        return {
            key: str(value) if isinstance(value, pathlib.Path) else value for key, value in values.items()
        }

    def analysis_json(self) -> dict[str, Any]:
        """The part of `to_json` that the analysis depends on, beside the files that are read."""
        names = ("method", "window", "tokens", "metric_tokens", "judge_tokens", "seed")
        return {name: value for name, value in self.to_json().items() if name in names}
