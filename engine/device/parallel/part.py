"""One rank's part of a model: its weights read from the folder, its seams to the other parts."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from engine.device.batch import Batch
from engine.device.decoder import Decoder, Norm, tensor_shapes
from engine.device.folder import locate, map_tensors
from engine.device.linear import Linear
from engine.device.parallel.links import Links
from engine.device.parallel.partition import Partition, Share, part_slices, part_spec
from engine.device.spec import ModelSpec


def load_part(
    path: Path, spec: ModelSpec, partition: Partition, share: Share, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read the share's slices as ``dtype``, named as a model of its own layers names them.

    Files are mapped, and only what is copied out of them takes memory.

    Raises:
        InvalidModel: naming the file and the tensor.

    """
    wanted: dict[str, list[str]] = {}
    slices = part_slices(spec, tensor_shapes(spec), partition, share)
    for name, part in slices.items():
        wanted.setdefault(part.name, []).append(name)
    weights: dict[str, Tensor] = {}
    for file, names in locate(path, spec).items():
        mapped = map_tensors(file, [name for name in names if name in wanted], spec)
        for name, tensor in mapped.items():
            for local in wanted[name]:
                part = slices[local]
                piece = tensor
                if part.part is not None:
                    piece = tensor.narrow(part.dim, part.part.start, len(part.part))
                weights[local] = piece.to(dtype, copy=True).contiguous()
    return weights


class PartSeams:
    """Joins a rank's layers to the lanes beside and the stages around it.

    The vocabulary is cut among the lanes at both ends, as embedding and head are the largest
    tensors there are: a token's row is summed with the other lanes' zeros, which is exact, and
    logits are laid side by side on the first lane.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        partition: Partition,
        share: Share,
        links: Links,
    ) -> None:
        """Take what it needs out of ``weights``; ``spec`` is the whole model's."""
        self._spec = spec
        self._links = links
        self._vocab = share.vocab
        self._vocabs = [part.vocab for part in partition.shares[: partition.tp]]
        self._dtype = next(iter(weights.values())).dtype
        self.has_head = partition.is_last(share)
        embedding = weights.pop("model.embed_tokens.weight", None)
        self._embedding = embedding if share.stage == 0 else None
        self._head: tuple[Norm, Linear] | None = None
        if self.has_head:
            norm = Norm(weights.pop("model.norm.weight"), spec.norm_epsilon)
            head = embedding if spec.is_tied else weights.pop("lm_head.weight")
            assert head is not None
            self._head = (norm, Linear(head))

    def enter(self, batch: Batch) -> Tensor:
        """Embed, or take over from the stage before."""
        if self._embedding is None:
            size = (len(batch.tokens), self._spec.hidden_size)
            return self._links.receive(torch.empty(size, dtype=self._dtype))
        if len(self._vocabs) == 1:
            return self._embedding.index_select(0, batch.tokens)
        tokens = batch.tokens - self._vocab.start
        is_foreign = (tokens < 0) | (tokens >= len(self._vocab))
        rows = self._embedding.index_select(0, tokens.masked_fill(is_foreign, 0))
        return self._links.total(rows.masked_fill_(is_foreign.unsqueeze(1), 0))

    def add(self, residual: Tensor, linear: Linear, rows: Tensor) -> Tensor:
        """Add the lanes' products, in the order of the lanes."""
        if len(self._vocabs) == 1:
            return linear.add_to(residual, rows)
        return residual + self._links.total(linear(rows))

    def leave(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hand over to the next stage, or give logits: to all but the first lane, none."""
        nothing = hidden.new_empty((0, self._spec.vocab_size), dtype=torch.float32)
        if self._head is None:
            self._links.send(hidden)
            return nothing
        norm, head = self._head
        logits = head(norm(hidden))[: len(batch.sampled)].float()
        if len(self._vocabs) == 1:
            return logits
        width = max(len(vocab) for vocab in self._vocabs)
        parts = self._links.join(functional.pad(logits, (0, width - len(self._vocab))))
        if parts is None:
            return nothing
        return torch.cat(
            [part[:, : len(vocab)] for part, vocab in zip(parts, self._vocabs, strict=True)], 1
        )


def make_part(
    path: Path,
    spec: ModelSpec,
    partition: Partition,
    share: Share,
    links: Links,
    *,
    dtype: torch.dtype,
    block_tokens: int,
) -> Decoder:
    """Load a share of a folder and join it to the others.

    Raises:
        InvalidModel: naming the file and the field.

    """
    with torch.inference_mode():
        weights = load_part(path, spec, partition, share, dtype)
        seams = PartSeams(spec, weights, partition, share, links)
        model = Decoder(part_spec(spec, share), weights, block_tokens, seams)
    assert not weights, f"nobody took {sorted(weights)}"
    return model
