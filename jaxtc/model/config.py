"""The sizes and constants of a Gemma-2, read from the ``config.json`` of its checkpoint."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtc.errors import ConfigError
from jaxtc.helpers import for_json

# A list of this length is made before any weight is seen.
_MOST_LAYERS = 10_000

SLIDING, FULL = "sliding_attention", "full_attention"


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


# What a field may be, by its type: a predicate, and what messages say is expected.
_TYPES = {
    int: (lambda v: _whole(v, 1), "a whole number of at least 1"),
    float: (_positive, "a finite number above 0"),
    float | None: (lambda v: v is None or _positive(v), "a finite number above 0"),
    int | None: (lambda v: v is None or _whole(v), "the id of a token"),
    int | tuple[int, ...] | None: (
        lambda v: all(map(_whole, v)) if isinstance(v, tuple) else v is None or _whole(v),
        "the id of a token or a list of them",
    ),
    tuple[str, ...] | None: (lambda v: isinstance(v, tuple | None), "a list of names"),
}


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """Everything the forward pass needs to know, under the names of HF's ``config.json``.

    Frozen and hashable, so it can be a static argument of a jitted function. The defaults are those
    that ``transformers`` gives to absent keys (they describe the 2B model). Axis letters used in
    error messages and docs: D ``hidden_size``, F ``intermediate_size``, N ``num_attention_heads``,
    K ``num_key_value_heads``, H ``head_dim``, V ``vocab_size``.

    Raises:
        ConfigError: sizes that contradict each other.
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256
    sliding_window: int = 4096
    layer_types: tuple[str, ...] | None = None  # sliding and full attention alternate
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    bos_token_id: int | None = 2

    def __post_init__(self):
        layers = self.num_hidden_layers
        if self.layer_types is None and _whole(layers) and layers <= _MOST_LAYERS:
            # Even layers slide, odd ones see everything (facts of the released checkpoints).
            kinds = tuple((SLIDING, FULL)[i % 2] for i in range(layers))
            object.__setattr__(self, "layer_types", kinds)
        if problems := self._problems():
            raise ConfigError("This Gemma-2 config cannot be run: " + "; ".join(problems) + ".")

    def _problems(self) -> list[str]:
        found = []
        for field in dataclasses.fields(self):
            value, (fits, expected) = getattr(self, field.name), _TYPES[field.type]
            if not fits(value):
                found.append(f"{field.name} is {value!r}, expected {expected}")
        if _whole(self.num_hidden_layers, _MOST_LAYERS + 1):
            found.append(f"num_hidden_layers is beyond {_MOST_LAYERS}")
        if found:
            return found
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            found.append(f"head_dim ({self.head_dim}) is odd, rotary embedding needs pairs")
        if len(self.layer_types) != self.num_hidden_layers:
            found.append(
                f"layer_types lists {len(self.layer_types)} layers, "
                f"num_hidden_layers says {self.num_hidden_layers}"
            )
        elif odd := [kind for kind in self.layer_types if kind not in (SLIDING, FULL)]:
            found.append(f"layer type {odd[0]!r} is neither {SLIDING!r} nor {FULL!r}")
        return found

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter that the config fixes: D, N, K, H, F, V."""
        return {
            "D": self.hidden_size, "N": self.num_attention_heads, "K": self.num_key_value_heads,
            "H": self.head_dim, "F": self.intermediate_size, "V": self.vocab_size,
        }  # fmt: skip

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text: ``<bos>``, what ends texts, padding."""
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        given = {self.bos_token_id, *ends, self.pad_token_id} - {None}
        return tuple(sorted(given))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> "Gemma2Config":
        """Read the contents of a ``config.json``, as written by ``transformers`` 4.42 up to 5.x.

        ``where`` is what errors call it.

        Raises:
            ConfigError: another architecture, a feature Gemma-2 checkpoints do not use, or
                sizes that contradict each other.
        """
        kind = raw.get("model_type")
        if kind != "gemma2":
            raise ConfigError(
                f"{where} describes model_type {kind!r} (architectures: "
                f"{raw.get('architectures')}), but jaxtc runs Gemma-2 only (model_type 'gemma2'). "
                "Give a Gemma-2 checkpoint, for example google/gemma-2-2b, google/gemma-2-9b or "
                "google/gemma-2-27b."
            )
        rope = {}
        for key in ("rope_scaling", "rope_parameters"):
            given = raw.get(key)
            if not isinstance(given, Mapping | None):
                raise ConfigError(f"{where}: {key} is {given!r}, expected an object or null.")
            rope.update(given or {})
        settings = {"tie_word_embeddings": True} | dict(raw)
        settings["rope_type"] = rope.get("rope_type", rope.get("type"))
        fine = {
            # Only hidden_activation counts: transformers does not read hidden_act for Gemma-2.
            "hidden_activation": (None, "gelu_pytorch_tanh"), "attention_bias": (None, False),
            "use_bidirectional_attention": (None, False), "tie_word_embeddings": (True,),
            "rope_type": (None, "default"),
        }  # fmt: skip
        asked = {key: settings.get(key) for key in fine}
        odd = [f"{key} = {value!r}" for key, value in asked.items() if value not in fine[key]]
        if odd:
            raise ConfigError(
                f"{where} asks for {', '.join(odd)}, which no released Gemma-2 uses and jaxtc "
                "does not implement; running it anyway would give wrong numbers."
            )
        values = {f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw}
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        for key in ("layer_types", "eos_token_id"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "Gemma2Config":
        """Read a ``config.json``. Raises ConfigError as :meth:`from_dict`, or when not JSON."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        # ValueError: not UTF-8, not JSON, integers too long; RecursionError: nested too deep.
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read as a config.json: {error}.") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, expected an object.")
        return cls.from_dict(raw, str(path))

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json`` that ``transformers`` reads back as the same model."""
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            **for_json(dataclasses.asdict(self)),
            # transformers 4.x reads rope_theta itself.
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
        }
