"""The rotary position embedding that a config.json describes: what transformers makes of the same keys."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_troll.mcore.shape.fields import Fields, positive


@dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv:2306.15595): every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Scaling of Llama 3.1 (arXiv:2407.21783): frequencies that turn less than `low_freq_factor` times in
    `original_positions` are divided by `factor`, those that turn more than `high_freq_factor` times are kept,
    and those between change linearly from one to the other."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: float


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): frequencies that turn less than `beta_slow` times in `original_positions` are
    divided by `factor`, those that turn more than `beta_fast` times are kept, and those between change
    linearly from one to the other.

    truncate           whether the first and the last dimension between are rounded outwards
    attention_factor   scale of the sines and cosines; None: it follows from the next two, or from `factor`
    attn_factor        known to SGLang only, which multiplies its own attention factor by it
    """

    factor: float
    original_positions: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attn_factor: float = 1.0

    @property
    def scale(self) -> float:
        """Scale of sines and cosines in transformers."""
        return self.inferred if self.attention_factor is None else self.attention_factor

    @property
    def scale_in_sglang(self) -> float:
        """The same in SGLang 0.5.23, which does not know `attention_factor`."""
        return self.inferred * self.attn_factor

    @property
    def inferred(self) -> float:
        """The scale that follows from the other keys."""
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0


RopeScaling = Linear | Llama3 | Yarn

ANY_KIND = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "attn_factor",
    },
}


def settings(fields: Fields) -> Fields:
    """The keys of RoPE: transformers 5 writes all of them to `rope_parameters`; older files have some in
    `rope_scaling`, which it prefers."""
    found = {key: fields.mapping(key) for key in ("rope_scaling", "rope_parameters")}
    key = "rope_scaling" if found["rope_scaling"] else "rope_parameters"
    if nested := [name for name, value in found[key].items() if isinstance(value, dict)]:
        raise fields.error(f"{key}: settings for {nested[0]} layers alone are not supported")
    return Fields(found[key], f"{fields.where}: {key}")


def read_theta(fields: Fields) -> float:
    """The base of the frequencies."""
    theta = settings(fields).config.get("rope_theta", fields.config.get("rope_theta"))
    if theta is None:
        raise fields.error("no rope_theta")
    if not positive(theta):
        raise fields.error(f"rope_theta {theta!r} must be a number above 0")
    return float(theta)


def read_scaling(fields: Fields, max_positions: int) -> RopeScaling | None:
    """The scaling of the frequencies; None if there is none."""
    rope = settings(fields)
    kind: Any = rope.config.get("rope_type", rope.config.get("type", "default"))
    if kind == "default":
        return None
    if kind not in tuple(KEYS):
        raise rope.error(f"rope type {str(kind)[:40]!a} is not supported (default, {', '.join(KEYS)})")
    if unknown := sorted(map(str, rope.config.keys() - KEYS[kind] - ANY_KIND)):
        raise rope.error(f"{unknown[0][:40]!a} is no key of rope type {kind!r} in Hugging Face: remove it")
    if kind == "linear":
        return Linear(rope.number("factor"))
    original = _original(fields, rope, max_positions)
    return _llama3(rope, original) if kind == "llama3" else _yarn(rope, original, max_positions)


def _original(fields: Fields, rope: Fields, max_positions: int) -> float:
    # One beside the settings counts first, as in transformers.
    key = "original_max_position_embeddings"
    return fields.number(key) if key in fields.config else rope.number(key, max_positions)


def _llama3(rope: Fields, original: float) -> Llama3:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.error(f"low_freq_factor {low!r} must be below high_freq_factor {high!r}")
    return Llama3(rope.number("factor"), low, high, original)


def _yarn(rope: Fields, original: float, max_positions: int) -> Yarn:
    given = {key for key, value in rope.config.items() if value is not None}

    def optional(key: str) -> float | None:
        return rope.number(key) if key in given else None

    if "factor" not in rope.config:
        raise rope.error("'factor' is missing")
    yarn = Yarn(
        factor=optional("factor") or max_positions / original,
        original_positions=original,
        beta_fast=optional("beta_fast") or Yarn.beta_fast,
        beta_slow=optional("beta_slow") or Yarn.beta_slow,
        truncate=rope.flag("truncate", Yarn.truncate),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        attn_factor=optional("attn_factor") or Yarn.attn_factor,
    )
    if "attn_factor" in given and "attention_factor" not in given:
        raise rope.error(
            "attn_factor is read by SGLang and ignored by Hugging Face: give attention_factor too, which is "
            f"{yarn.scale_in_sglang:g} to SGLang"
        )
    return yarn


def read_fraction(fields: Fields, head_dim: int, default: float) -> float:
    """The rotated fraction of a head, in families that rotate a part."""
    fraction: Any = settings(fields).config.get(
        "partial_rotary_factor", fields.config.get("partial_rotary_factor", default)
    )
    if not positive(fraction) or fraction > 1 or int(head_dim * fraction) % 2:
        raise fields.error(
            f"partial_rotary_factor {fraction!r} must be above 0, at most 1, and rotate an even number of "
            f"the dimensions of a head (head_dim {head_dim})"
        )
    return float(fraction)


def whole_heads(fields: Fields) -> None:
    """Check that no key asks for a part of a head to be rotated, in families that rotate whole heads."""
    for there in (fields.config, settings(fields).config):
        if there.get("partial_rotary_factor", 1.0) not in (1.0, None):
            raise fields.error(
                f"partial_rotary_factor {there['partial_rotary_factor']!r} is not supported: whole heads "
                f"are rotated in {fields.config['model_type']}"
            )
