"""The bench of guesses: its figures add up, and it fails where a token changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import speculation
from bench.speculation import Decoded, Figures, main, measure, table, write_first_layers
from engine.device.folder import load_folder
from engine.device.loading import DEMO_FOLDER
from pdserve.config import SpeculationConfig


def test_a_short_run_measures_every_proposer_against_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    options = "--rounds 1 --batches 2 --temperatures 0.8 --output-tokens 12 --json"
    assert main([*options.split(), str(file)]) == 0
    figures = [Figures(**each) for each in json.loads(file.read_text())]
    assert len(figures) == 2 * 5
    by_name = {(each.text, each.proposer): each for each in figures}
    assert by_name["conversation", "naive"].speed_up == 1
    assert by_name["conversation", "draft: itself"].right_share == 1
    again = by_name["asked again", "ngram"]
    assert again.tokens_per_chunk > by_name["asked again", "naive"].tokens_per_chunk
    assert capsys.readouterr().out.count("| yes |") == len(figures)


def test_first_layers_are_a_model_of_the_same_kind(tmp_path: Path) -> None:
    import torch

    write_first_layers(tmp_path / "some", 2)
    whole = load_folder(DEMO_FOLDER, torch.float32, 1).spec
    some = load_folder(tmp_path / "some", torch.float32, 1).spec
    assert some == replace(whole, layer_count=2, windows=whole.windows[:2])


def test_changed_tokens_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(speculation.Decoding):
        """Forgets the last token of everybody, from the second run on."""

        run_count = 0

        def run(self, requests: object) -> Decoded:
            decoded = super().run(requests)  # type: ignore[arg-type]
            Careless.run_count += 1
            if Careless.run_count > 1:
                for tokens in decoded.tokens.values():
                    del tokens[-Careless.run_count % 3 - 1 :]
            return decoded

    monkeypatch.setattr(speculation, "Decoding", Careless)
    proposers = {"naive": SpeculationConfig(), "ngram": SpeculationConfig(proposer="ngram")}
    figures = measure(
        "text", [(5, 6, 7)], proposers, temperature=0.0, rounds=1, output_tokens_max=6
    )
    assert [each.is_exact for each in figures] == [True, False]
    assert "NO" in table(figures)
