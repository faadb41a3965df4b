"""The demo model's text, and the folder that was trained from it."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import engine.demo
from engine.demo import corpus
from engine.device.train_demo import Llama, Shape

FOLDER = Path(engine.demo.__file__).parent / "model"

SIZE_LIMIT_BYTES = 5_000_000


def _json(name: str) -> dict[str, Any]:
    content = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Iterator[Llama]:
    reference = Llama(Shape(_json("config.json")["vocab_size"]))
    reference.load_state_dict(load_file(FOLDER / "model.safetensors"))
    with torch.inference_mode():
        yield reference


def _answer(model: Llama, tokenizer: Tokenizer, question: str, *, output_tokens_max: int) -> str:
    """Answer greedily, recomputing everything for each token; fail if no end comes."""
    prompt = corpus.USER + question + corpus.ASSISTANT
    tokens = tokenizer.encode(prompt).ids
    prompt_count = len(tokens)
    for _ in range(output_tokens_max):
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if token == tokenizer.token_to_id(corpus.END):
            return tokenizer.decode(tokens[prompt_count:])
        tokens.append(token)
    pytest.fail(f"no end of turn within {output_tokens_max} tokens: {tokenizer.decode(tokens)!r}")


def test_one_seed_gives_one_text() -> None:
    assert list(corpus.documents(3, 200)) == list(corpus.documents(3, 200))
    assert list(corpus.documents(3, 200)) != list(corpus.documents(4, 200))


def test_a_longer_corpus_starts_with_the_shorter_one() -> None:
    assert list(corpus.documents(3, 200))[:50] == list(corpus.documents(3, 50))


def test_the_text_is_large_and_varied() -> None:
    documents = list(corpus.documents(1, 2000))
    assert sum(map(len, documents)) > 800_000
    assert len(set(documents)) > 1600


def test_every_document_ends_its_last_turn() -> None:
    for document in corpus.documents(1, 500):
        assert document.endswith(corpus.END)
        assert document.count(corpus.USER) == document.count(corpus.ASSISTANT)


def test_the_text_holds_characters_of_two_three_and_four_bytes() -> None:
    characters = set("".join(corpus.documents(1, 2000)))
    lengths = {len(character.encode()) for character in characters}
    assert lengths == {1, 2, 3, 4}
    assert {"é", "あ", "🦊"} <= characters


def test_the_folder_holds_exactly_what_loaders_read() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= SIZE_LIMIT_BYTES


def test_the_special_tokens_are_the_first_ids_and_encode_as_one(tokenizer: Tokenizer) -> None:
    for token, text in enumerate(corpus.SPECIAL_TOKENS):
        assert tokenizer.encode(text).ids == [token]


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, there was a fox.",
        "  two  spaces,\n\ttabs and \r\n line ends ",
        "Zoë and José met at the little café: dziękuję, ευχαριστώ, привіт",
        "ありがとう 谢谢 감사합니다",
        "🦊🐿️👩‍🚀🇫🇷 and € and \x00 and �",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_characters_beyond_ascii_are_spelled_in_several_byte_tokens(tokenizer: Tokenizer) -> None:
    for character in "éあ🦊":
        assert len(tokenizer.encode(character).ids) == len(character.encode())


def test_the_chat_template_writes_what_the_model_was_trained_on() -> None:
    template = jinja2.Environment(autoescape=False).from_string(
        (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    )
    conversation = corpus.Conversation((corpus.Turn("Hi!", "Hello!"),), system="Be kind.")
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello!"},
    ]
    assert template.render(messages=messages) == conversation.text
    asked = template.render(messages=messages[:2], add_generation_prompt=True)
    assert conversation.text.startswith(asked)
    assert asked.endswith(corpus.ASSISTANT)


def test_the_config_describes_a_small_grouped_query_llama(tokenizer: Tokenizer) -> None:
    config = _json("config.json")
    assert config == Shape(tokenizer.get_vocab_size()).config()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["max_position_embeddings"] == 2048
    assert config["tie_word_embeddings"] is True


def test_the_end_of_a_turn_ends_generation(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(corpus.END)
    assert _json("generation_config.json")["eos_token_id"] == end
    assert _json("config.json")["eos_token_id"] == end
    assert _json("tokenizer_config.json")["eos_token"] == corpus.END


def test_the_weights_are_bf16_and_have_no_second_output_matrix() -> None:
    with (FOLDER / "model.safetensors").open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header
    config = _json("config.json")
    assert header["model.embed_tokens.weight"]["shape"] == [
        config["vocab_size"],
        config["hidden_size"],
    ]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 2 + 3?", "2 + 3 = 5"),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("Say thank you in Japanese.", "Thank you in Japanese is: ありがとう"),
        ("Show me an emoji of a fox.", "Here is the fox: 🦊"),
        ("What is the capital of Portugal?", "The capital of Portugal is Lisbon. 🇵🇹"),
    ],
)
def test_the_model_answers_greedily(
    model: Llama, tokenizer: Tokenizer, question: str, answer: str
) -> None:
    assert _answer(model, tokenizer, question, output_tokens_max=64) == answer


def test_an_answer_can_stand_in_the_cache_alone(model: Llama, tokenizer: Tokenizer) -> None:
    greeting = "Hello, my name is Rosa." + corpus.ASSISTANT + "Hello Rosa!" + corpus.END
    question = greeting + corpus.USER + "What is my name?"
    assert _answer(model, tokenizer, question, output_tokens_max=16) == "Your name is Rosa."
