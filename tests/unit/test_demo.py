"""scripts/serve_demo.py: which strategy and engine its words name, and what the servers are started with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scripts import serve_demo
from scripts.demo_engines import ENGINES
from scripts.demo_server import DemoError


@pytest.mark.parametrize(
    ("words", "strategy", "engine"),
    [
        ([], "ONESHOT", "vllm"),
        (["sglang"], "ONESHOT", "sglang"),
        (["twoshot"], "TWOSHOT", "vllm"),
        (["TWOSHOT", "SGLang"], "TWOSHOT", "sglang"),
        (["vllm", "nccl"], "NCCL", "vllm"),
    ],
)
def test_words_come_in_either_order(words: list[str], strategy: str, engine: str) -> None:
    assert serve_demo.choices(words) == (strategy, ENGINES[engine])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["FAST", "sglang"], "'FAST': must be one of AUTO, NCCL.*or an engine: vllm or sglang"),
        (["ONESHOT", "TWOSHOT"], "ONESHOT and TWOSHOT: give one strategy and one engine"),
        (["vllm", "sglang"], "vllm and sglang: give one strategy"),
    ],
)
def test_other_words_are_refused(words: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        serve_demo.choices(words)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_strategy_is_written_into_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, device: str
) -> None:
    monkeypatch.setattr("scripts.demo_engines.two_gpus", lambda: device == "gpu")
    command, environment = serve_demo.server_setup("TWOSHOT", tmp_path, tmp_path / "model", 1234, engine=engine)
    settings = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
    example = yaml.safe_load((serve_demo.ROOT / "configs" / engine / f"demo_{device}.yaml").read_text())
    ours = {"allreduce_strategy": "TWOSHOT", "report_dir": str(tmp_path / "report")}
    if engine == "vllm":
        assert settings.pop("additional-config")["allreduce"] == ours
        example.pop("additional-config")
    else:
        assert settings.pop("allreduce-strategy") == ours.pop("allreduce_strategy")
        assert settings.pop("allreduce-config") == ours
        example.pop("allreduce-strategy")
    assert settings == example
    assert command[command.index("--port") + 1] == "1234"
    assert (environment.get("OMP_NUM_THREADS") == "1") is (device == "cpu")
    if engine == "sglang":
        assert (environment.get("SGLANG_USE_CPU_ENGINE") == "1") is (device == "cpu")


def test_sglangs_cpu_engine_compiles_nothing(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="--compile is for vLLM"):
        serve_demo.server_setup("ONESHOT", tmp_path, tmp_path / "model", 1, compiled=True, engine="sglang")


def test_fewer_fused_boundaries_fail(capsys: pytest.CaptureFixture[str]) -> None:
    line = "INFO all-reduce fusion: 7 layer boundaries fused (7 with RMSNorm)"
    serve_demo.check_fusion(7, f"{line}\n{line}")
    assert capsys.readouterr().out == f"[demo] the log says: {line[5:]}\n", "once"
    serve_demo.check_fusion(None, "")
    for log in ("", "all-reduce fusion: 17 layer boundaries fused (17 with RMSNorm)"):
        with pytest.raises(DemoError, match="not all of the 7 layer boundaries were fused"):
            serve_demo.check_fusion(7, log)
