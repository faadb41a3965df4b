import dataclasses
import math
from pathlib import Path
from typing import get_type_hints

import pytest

from pdserve.config import ClusterConfig, dump, load, reference
from pdserve.errors import InvalidConfig


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return path


def test_no_file_is_all_defaults() -> None:
    assert load(None) == ClusterConfig()


def test_what_is_dumped_loads_back_equal(tmp_path: Path) -> None:
    config = load(None, {"router.port": 9, "model.path": 'a "b" \\ c', "kv.checksum": True})
    assert load(write(tmp_path, dump(config))) == config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[router]\nport = 1\nqueue_max = 3\n")
    config = load(path, {"router.port": 2})
    assert (config.router.port, config.router.queue_max) == (2, 3)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[router]\nprot = 1\n", "router.prot is no setting; did you mean port?"),
        ("[ruoter]\nport = 1\n", "did you mean router?"),
        ("[zzz]\n", "known: "),
        ("router = 3\n", "wanted a table"),
        ("[router]\nport = '1'\n", "router.port is '1'; wanted a whole number"),
        ("[router]\nport = true\n", "router.port is True; wanted a whole number"),
        ("[router]\nport = 70000\n", "wanted 0 to 65535"),
        ("[router]\nqueue_s = nan\n", "router.queue_s is nan"),
        ("[kv]\nchecksum = 1\n", "wanted true or false"),
        ("[model]\ndtype = 'int4'\n", "wanted one of auto, float32, bfloat16"),
        ("[heartbeat]\nsuspect_s = 0.1\n", "interval_s < suspect_s <= dead_s"),
        ("[router\n", "not TOML"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_wanted(
    tmp_path: Path, text: str, wanted: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(write(tmp_path, text))
    assert wanted in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="No such file"):
        load(tmp_path / "none.toml")


def test_every_setting_has_a_meaning_a_sane_default_and_a_row_in_the_reference() -> None:
    text = reference()
    for section, cls in get_type_hints(ClusterConfig).items():
        assert f"## [{section}]" in text
        for field in dataclasses.fields(cls):
            assert field.metadata["meaning"]
            assert f"| `{field.name}` |" in text
            low, high = field.metadata["low"], field.metadata["high"]
            assert low is None or low <= field.default <= high
            assert not isinstance(field.default, float) or math.isfinite(field.default)
