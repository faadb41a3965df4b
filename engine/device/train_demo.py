"""Train the bundled demo model: ``python -m engine.device.train_demo --out DIR``.

Tokenizer and model are made from nothing but ``engine.demo.corpus``.  The module names follow
the Hugging Face Llama, so the state dict is what any Llama loader expects.

Equal seeds give equal text, tokenizer and batches; the weights agree only as far as two
machines agree in floating point.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from engine.demo import corpus

_LOG = logging.getLogger(__name__)

VOCABULARY_SIZE = 1152
CONTEXT_TOKENS = 512
ROWS_PER_STEP = 8
DOCUMENT_COUNT = 60_000
HELD_OUT_DOCUMENT_COUNT = 2_000
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARMUP_STEPS = 30
CLEAR_MARGIN = 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """The Llama hyperparameters; ``config`` spells them as config.json does."""

    vocabulary_size: int
    hidden_size: int = 128
    inner_size: int = 384
    layer_count: int = 4
    head_count: int = 4
    kv_head_count: int = 2
    head_dim: int = 32
    position_count: int = 2048
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6

    def config(self) -> dict[str, object]:
        """Return config.json; rope is given both ways, for readers of either age."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "dtype": "bfloat16",
            "eos_token_id": corpus.SPECIAL_TOKENS.index(corpus.END),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.inner_size,
            "max_position_embeddings": self.position_count,
            "mlp_bias": False,
            "num_attention_heads": self.head_count,
            "num_hidden_layers": self.layer_count,
            "num_key_value_heads": self.kv_head_count,
            "pad_token_id": corpus.SPECIAL_TOKENS.index(corpus.END),
            "rms_norm_eps": self.norm_epsilon,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocabulary_size,
        }


def _linear(input_size: int, output_size: int) -> nn.Linear:
    layer = nn.Linear(input_size, output_size, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) by its angle.

    heads: [row, head, position, head_dim]; angles: [position, head_dim / 2].
    Source: RoFormer (Su et al., 2021), in the half-split layout of the Hugging Face Llama.
    """
    first, second = heads.chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Attention(nn.Module):
    """Causal attention in which several query heads share a key and value head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._head_dim = shape.head_dim
        query_size = shape.head_count * shape.head_dim
        kv_size = shape.kv_head_count * shape.head_dim
        self.q_proj = _linear(shape.hidden_size, query_size)
        self.k_proj = _linear(shape.hidden_size, kv_size)
        self.v_proj = _linear(shape.hidden_size, kv_size)
        self.o_proj = _linear(query_size, shape.hidden_size)

    def _heads(self, flat: Tensor) -> Tensor:
        row_count, position_count, _ = flat.shape
        return flat.view(row_count, position_count, -1, self._head_dim).transpose(1, 2)

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        """Mix positions; hidden: [row, position, hidden_size]."""
        queries = _rotate(self._heads(self.q_proj(hidden)), angles)
        keys = _rotate(self._heads(self.k_proj(hidden)), angles)
        values = self._heads(self.v_proj(hidden))
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """The gated feed-forward half of a layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = _linear(shape.hidden_size, shape.inner_size)
        self.up_proj = _linear(shape.hidden_size, shape.inner_size)
        self.down_proj = _linear(shape.inner_size, shape.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Change each position by itself."""
        changed: Tensor = self.down_proj(
            functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        )
        return changed


class Layer(nn.Module):
    """Attention, then the feed-forward half, each normed before and added after."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        """Return the residual stream after this layer."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), angles)
        changed: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return changed


class Stack(nn.Module):
    """Embedding, layers and last norm; its attribute names are those of the weight file."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary_size, shape.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layer_count))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)


class Llama(nn.Module):
    """The model as it is trained: whole sequences, no cache, output tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Stack(shape)
        pairs = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        self._frequencies = shape.rope_theta**-pairs

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [row, position] to logits [row, position, vocabulary_size]."""
        angles = torch.outer(torch.arange(tokens.shape[1]).float(), self._frequencies)
        hidden: Tensor = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            hidden = layer(hidden, angles)
        return functional.linear(self.model.norm(hidden), self.model.embed_tokens.weight)


class Muon:
    """Momentum whose step is made orthogonal, for the weight matrices.

    Matrices of one size are orthogonalised as one batch, in fp32: ``torch.optim.Muon`` works
    in bf16, which is slow on a CPU without matrix units for it.
    Source: Jordan et al., "Muon: an optimizer for hidden layers", 2024 (coefficients too).
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95) -> None:
        self._matrices = matrices
        self._momentum = momentum
        self._averages = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply and clear the gradients."""
        groups: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for matrix, average in zip(self._matrices, self._averages, strict=True):
            assert matrix.grad is not None, "step() comes after backward()"
            average.lerp_(matrix.grad, 1 - self._momentum)
            update = matrix.grad.lerp(average, self._momentum)
            rows, columns = update.shape
            wide = update if rows <= columns else update.mT
            groups.setdefault((min(rows, columns), max(rows, columns)), []).append((matrix, wide))
            matrix.grad = None
        for members in groups.values():
            wides = _orthogonal(torch.stack([wide for _, wide in members]))
            for (matrix, _), wide in zip(members, wides, strict=True):
                rows, columns = matrix.shape
                update = wide if rows <= columns else wide.mT
                matrix.sub_(update, alpha=rate * math.sqrt(max(1.0, rows / columns)))


def _orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values near 1 by five Newton-Schulz steps; [count, rows, columns]."""
    result: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = result @ result.mT
        result = 3.4445 * result + (-4.7750 * square + 2.0315 * square @ square) @ result
    return result


@dataclass(frozen=True, slots=True)
class Text:
    """Encoded documents laid end to end, and where each one starts."""

    tokens: Tensor
    starts: Tensor

    def rows(self, dice: torch.Generator, row_count: int) -> Tensor:
        """Draw rows of ``CONTEXT_TOKENS + 1`` tokens, each from a document's start onwards."""
        fitting = self.starts[self.starts < len(self.tokens) - CONTEXT_TOKENS]
        chosen = fitting[torch.randint(len(fitting), (row_count,), generator=dice)]
        return self.tokens[chosen[:, None] + torch.arange(CONTEXT_TOKENS + 1)]


def _plain(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for token in corpus.SPECIAL_TOKENS:
            text = text.replace(token, "\n")
        yield text.encode("ascii", "ignore").decode()


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train byte-level BPE on the ASCII part of the texts.

    Characters beyond ASCII so never merge: each stays two to four byte tokens, which is what
    an incremental detokenizer has to be tested with.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(corpus.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_plain(texts), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Text:
    """Encode documents that already carry their special tokens."""
    pieces = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    lengths = torch.tensor([len(piece) for piece in pieces])
    tokens = torch.tensor([token for piece in pieces for token in piece])
    return Text(tokens, lengths.cumsum(0) - lengths)


@dataclass(frozen=True, slots=True)
class Score:
    """What held-out text says; losses in nats per token.

    ``clear_share`` is the part of the answer tokens at which the best logit leads the second
    by ``CLEAR_MARGIN`` or more, so that rounding cannot change the greedy choice.
    """

    loss: float
    answer_loss: float
    clear_share: float


def _answer_mask(inputs: Tensor) -> Tensor:
    """Say for each input token whether the token after it belongs to an answer."""
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    is_special = inputs < len(corpus.SPECIAL_TOKENS)
    latest = torch.where(is_special, positions, 0).cummax(dim=1).values
    return inputs.gather(1, latest) == corpus.SPECIAL_TOKENS.index(corpus.ASSISTANT)


@torch.no_grad()
def evaluate(model: Llama, text: Text) -> Score:
    """Score the model on 64 rows, always the same ones."""
    dice = torch.Generator().manual_seed(0)
    losses, clears, masks = [], [], []
    for _ in range(8):
        rows = text.rows(dice, 8)
        logits = model(rows[:, :-1])
        losses.append(functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none"))
        best = logits.topk(2).values
        clears.append(best[..., 0] - best[..., 1] >= CLEAR_MARGIN)
        masks.append(_answer_mask(rows[:, :-1]))
    loss, clear, mask = torch.cat(losses), torch.cat(clears), torch.cat(masks)
    return Score(
        loss=loss.mean().item(),
        answer_loss=loss[mask].mean().item(),
        clear_share=clear[mask].float().mean().item(),
    )


def _rate_factor(step: int, progress: float) -> float:
    """Warm up, hold, and fall in a line over the second half."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.01, 2 * (1 - progress)))


def train(model: Llama, text: Text, held_out: Text, *, steps: int, limit_s: float) -> int:
    """Train in place until ``steps`` or ``limit_s`` is used up; return the steps made.

    The learning rate follows whichever of the two is nearer its end, so a run that is cut
    short by the clock still ends with its small steps.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    matrix_ids = {id(matrix) for matrix in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    dice = torch.Generator().manual_seed(torch.initial_seed())
    start_s = time.monotonic()
    for step in range(steps):
        elapsed_s = time.monotonic() - start_s
        if elapsed_s >= limit_s:
            return step
        factor = _rate_factor(step, max(step / steps, elapsed_s / limit_s))
        if step % 100 == 0:
            score = evaluate(model, held_out)
            _LOG.info("step %d  %.0f s  rate %.2f  %s", step, elapsed_s, factor, score)
        rows = text.rows(dice, ROWS_PER_STEP)
        loss = functional.cross_entropy(model(rows[:, :-1]).mT, rows[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(MUON_RATE * factor)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * factor
        adam.step()
        adam.zero_grad()
    return steps


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(out: Path, model: Llama, shape: Shape, tokenizer: Tokenizer) -> None:
    """Write what Hugging Face style loaders read: six files, weights as bf16 safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    weight_file = out / "model.safetensors"
    save_file(weights, weight_file, metadata={"format": "pt"})
    weight_file.chmod(0o644)  # save_file leaves 0600, which a server under another user cannot read
    tokenizer.save(str(out / "tokenizer.json"))
    config = shape.config()
    _write_json(out / "config.json", config)
    _write_json(
        out / "generation_config.json",
        {
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": config["pad_token_id"],
        },
    )
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": corpus.END,
            "pad_token": corpus.END,
            "model_max_length": shape.position_count,
        },
    )
    (out / "chat_template.jinja").write_text(corpus.CHAT_TEMPLATE, encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training by then")
    return parser.parse_args()


def main() -> None:
    """Train and write the folder."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.manual_seed(arguments.seed)
    texts = list(corpus.documents(arguments.seed, DOCUMENT_COUNT))
    tokenizer = train_tokenizer(texts)
    text = encode(tokenizer, texts)
    held_out = encode(
        tokenizer, list(corpus.documents(arguments.seed + 1, HELD_OUT_DOCUMENT_COUNT))
    )
    shape = Shape(tokenizer.get_vocab_size())
    model = Llama(shape)
    parameter_count = sum(parameter.numel() for parameter in model.parameters())
    _LOG.info("%s, %d parameters, %d tokens of text", shape, parameter_count, len(text.tokens))
    steps = train(model, text, held_out, steps=arguments.steps, limit_s=60 * arguments.minutes)
    model.load_state_dict({n: t.bfloat16() for n, t in model.state_dict().items()})
    _LOG.info("%d steps, as bf16: %s", steps, evaluate(model, held_out))
    write_folder(arguments.out, model, shape, tokenizer)


if __name__ == "__main__":
    main()
