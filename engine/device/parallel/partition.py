"""Who computes what when a model is cut in stages of layers and lanes of heads.  Pure.

Rank ``stage * tp + lane``.  A stage has consecutive layers.  A lane has consecutive query heads
with the KV heads they read, a part of the middle of each MLP, and a part of the vocabulary.
Where lanes outnumber KV heads, neighbouring lanes keep copies of one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from engine.device.spec import ModelSpec
from pdserve.errors import InvalidConfig
from pdserve.layout import KvLayout


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part; ranges are of the whole model's, of step 1."""

    rank: int
    stage: int
    lane: int
    layers: range
    heads: range
    kv_heads: range
    middle: range
    vocab: range


@dataclass(frozen=True, slots=True)
class Slice:
    """Part of a tensor of a folder: ``part`` of its dimension ``dim``, or all of it.

    ``name`` and ``shape`` are the folder's.
    """

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    part: range | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the part."""
        if self.part is None:
            return self.shape
        return (*self.shape[: self.dim], len(self.part), *self.shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Partition:
    """A model cut in ``tp`` lanes and ``pp`` stages, every layer and head in at least one share."""

    tp: int
    pp: int
    shares: tuple[Share, ...]

    @classmethod
    def of(cls, spec: ModelSpec, *, tp: int, pp: int, section: str = "") -> "Partition":
        """Cut a model; uneven layers, middles and vocabularies are spread evenly.

        Raises:
            InvalidConfig: naming ``section.tp`` or ``section.pp``.

        """
        _check(spec, tp, pp, f"{section}." if section else "")
        heads, middles = split(spec.head_count, tp), split(spec.intermediate_size, tp)
        vocabs = split(spec.vocab_size, tp)
        shares = [
            Share(
                rank=stage * tp + lane,
                stage=stage,
                lane=lane,
                layers=layers,
                heads=heads[lane],
                kv_heads=_kv_heads(spec.kv_head_count, tp, lane),
                middle=middles[lane],
                vocab=vocabs[lane],
            )
            for stage, layers in enumerate(split(spec.layer_count, pp))
            for lane in range(tp)
        ]
        return cls(tp, pp, tuple(shares))

    @property
    def sampler(self) -> int:
        """The one rank that samples: the last stage's first."""
        return (self.pp - 1) * self.tp

    @property
    def followers(self) -> range:
        """Ranks that embed tokens; all but the sampler must be told what it sampled."""
        return range(self.tp)

    def is_last(self, share: Share) -> bool:
        """Whether the share is of the last stage."""
        return share.stage == self.pp - 1


def split(count: int, parts: int) -> tuple[range, ...]:
    """Cut ``range(count)`` in neighbouring ranges whose sizes differ by at most 1."""
    starts = [count * part // parts for part in range(parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def part_spec(spec: ModelSpec, share: Share) -> ModelSpec:
    """Describe the share as if it were a model; the vocabulary stays whole."""
    return replace(
        spec,
        layer_count=len(share.layers),
        head_count=len(share.heads),
        kv_head_count=len(share.kv_heads),
        intermediate_size=len(share.middle),
        windows=spec.windows[share.layers.start : share.layers.stop],
    )


def part_layout(spec: ModelSpec, share: Share, *, block_tokens: int, dtype: str) -> KvLayout:
    """Describe the pool of one rank."""
    return KvLayout(len(share.layers), block_tokens, len(share.kv_heads), spec.head_dim, dtype)


def part_slices(
    spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], partition: Partition, share: Share
) -> dict[str, Slice]:
    """Name each tensor of the share, as a model of the share's own layers names it.

    ``shapes`` are the whole model's.  A bias after a sum over lanes is the first lane's alone.
    """
    dim = spec.head_dim
    q_rows, kv_rows = _times(share.heads, dim), _times(share.kv_heads, dim)
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows, "gate": share.middle, "up": share.middle}
    columns = {"o": q_rows, "down": share.middle}
    slices: dict[str, Slice] = {}
    for local, layer in enumerate(share.layers):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            if not name.startswith(prefix):
                continue
            rest = name.removeprefix(prefix)
            linear = rest.split(".")[-2].removesuffix("_proj")
            part = Slice(name, shape)
            if linear in rows:
                part = Slice(name, shape, 0, rows[linear])
            elif linear in columns and rest.endswith(".weight"):
                part = Slice(name, shape, 1, columns[linear])
            elif linear in columns and share.lane:
                continue
            slices[f"model.layers.{local}.{rest}"] = part
    head = "model.embed_tokens.weight" if spec.is_tied else "lm_head.weight"
    names = {"model.embed_tokens.weight"} if share.stage == 0 else set()
    if partition.is_last(share):
        names.add(head)
        slices["model.norm.weight"] = Slice("model.norm.weight", shapes["model.norm.weight"])
    for name in sorted(names):
        slices[name] = Slice(name, shapes[name], 0, share.vocab)
    return slices


def _check(spec: ModelSpec, tp: int, pp: int, section: str) -> None:
    if not 1 <= pp <= spec.layer_count:
        raise InvalidConfig(
            f"{section}pp is {pp}; wanted 1 to {spec.layer_count}, the model's layers",
            param=f"{section}pp",
        )
    if tp < 1 or spec.head_count % tp:
        raise InvalidConfig(
            f"{section}tp is {tp}; wanted a divisor of {spec.head_count}, the model's query heads",
            param=f"{section}tp",
        )
    kv = spec.kv_head_count
    if kv % tp and tp % kv:
        raise InvalidConfig(
            f"{section}tp is {tp}; wanted a divisor or a multiple of {kv}, the model's KV heads",
            param=f"{section}tp",
        )
    for name, size in (("intermediate_size", spec.intermediate_size), ("vocab", spec.vocab_size)):
        if size < tp:
            raise InvalidConfig(
                f"{section}tp is {tp}; wanted at most {size}, the model's {name}",
                param=f"{section}tp",
            )


def _kv_heads(count: int, tp: int, lane: int) -> range:
    if tp <= count:
        return split(count, tp)[lane]
    head = lane * count // tp
    return range(head, head + 1)


def _times(heads: range, dim: int) -> range:
    return range(heads.start * dim, heads.stop * dim)
