"""Model folders: what is read, and what is said of damaged ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pdserve.errors import InvalidModel, InvalidRequest
from router.chat_template import ChatTemplate
from router.model_folder import ModelFolder, SamplingDefaults, bundled_model

USER = [{"role": "user", "content": "x"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in bundled_model().iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, copy)
    return copy


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_gives_its_name_unless_told_another(folder: Path) -> None:
    assert ModelFolder.load(str(folder), "").name == "tiny"
    assert ModelFolder.load(str(folder), "mine").name == "mine"
    assert ModelFolder.load("", "").path == str(bundled_model())


def test_sampling_advice_is_taken_unless_the_folder_samples_greedily(folder: Path) -> None:
    assert ModelFolder.load(str(folder), "").defaults == SamplingDefaults()
    change(folder, "generation_config.json", temperature=0.6, top_p=0.9, top_k=20)
    advised = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20)
    assert ModelFolder.load(str(folder), "").defaults == advised
    change(folder, "generation_config.json", do_sample=False)
    assert ModelFolder.load(str(folder), "").defaults == SamplingDefaults()


def test_ends_of_text_come_from_the_generation_settings_first(folder: Path) -> None:
    change(folder, "generation_config.json", eos_token_id=[0, 5])
    assert ModelFolder.load(str(folder), "").eos_tokens == {0, 5}
    change(folder, "generation_config.json", eos_token_id=None)
    assert ModelFolder.load(str(folder), "").eos_tokens == {0}


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"vocab_size": "many"}, "config.json: vocab_size"),
        ("config.json", {"vocab_size": True}, "config.json: vocab_size"),
        ("config.json", {"max_position_embeddings": 0}, "max_position_embeddings"),
        ("generation_config.json", {"eos_token_id": 1 << 20}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id"),
        ("generation_config.json", {"temperature": "hot"}, "generation_config.json: temperature"),
        ("generation_config.json", {"top_k": 1.5}, "generation_config.json: top_k"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(
    folder: Path, file: str, values: Any, message: str
) -> None:
    change(folder, file, **values)
    with pytest.raises(InvalidModel, match=message):
        ModelFolder.load(str(folder), "")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(InvalidModel, match=file):
        ModelFolder.load(str(folder), "")


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(InvalidModel, match="no such folder"):
        ModelFolder.load(str(folder / "nothing"), "")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InvalidModel, match=r"tokenizer\.json"):
        ModelFolder.load(str(folder), "")


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    change(folder, "config.json", auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit")
    assert ModelFolder.load(str(folder), "").vocab_size > 0


def test_templates_come_from_the_settings_too(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert ModelFolder.load(str(folder), "").chat_template is None
    change(folder, "tokenizer_config.json", chat_template="{{ eos_token }}!")
    template = ModelFolder.load(str(folder), "").chat_template
    assert template is not None
    assert template.render(USER) == "<|end|>!"
    change(folder, "tokenizer_config.json", chat_template="{% if %}")
    with pytest.raises(InvalidModel, match="chat template"):
        ModelFolder.load(str(folder), "")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[0].missing.more }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
    ],
)
def test_a_template_that_misbehaves_is_the_request_s_fault_and_bounded(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render(USER)


def test_templates_write_json_and_trim_their_blocks() -> None:
    source = "{% for m in messages %}\n{{ m.content | tojson }}\n{% endfor %}\n{{ bos_token }}"
    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "u", "content": "<é>"}])
    assert rendered == '"<é>"\n<s>'
