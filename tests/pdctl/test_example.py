import dataclasses
from pathlib import Path

from pdctl.example import COMMENT_WIDTH, example
from pdserve.config import ClusterConfig, load

ROOT = Path(__file__).parent.parent.parent


def test_the_example_in_deploy_is_fresh() -> None:
    fresh = (ROOT / "deploy" / "cluster.toml").read_text() == example()
    assert fresh, "write it again: python -m pdctl config example > deploy/cluster.toml"


def test_the_example_says_what_the_defaults_say(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(example())
    assert load(path) == ClusterConfig()


def test_every_setting_stands_under_its_meaning() -> None:
    lines = example().splitlines()
    for section in dataclasses.fields(ClusterConfig):
        for field in dataclasses.fields(getattr(ClusterConfig(), section.name)):
            assert any(line.startswith(f"{field.name} = ") for line in lines), field.name
            assert field.metadata["meaning"][:30] in example(), field.name
    assert max(len(line) for line in lines) <= COMMENT_WIDTH + 2
