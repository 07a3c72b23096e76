"""What the demo must know about each engine: how its server is started, asked, and what its log must say."""

from __future__ import annotations

import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import yaml

from llm_allreduce_plugin.demo.server import DemoError, http, say
from llm_allreduce_plugin.topology import NodeTopology

SETTINGS = Path(__file__).parent / "settings"
# CPU ranks with one thread each, and no look at GPUs.
CPU_RANKS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def two_gpus() -> bool:
    """Whether the demo runs on GPUs. DEMO_DEVICE=cpu: not even where there are two."""
    if os.environ.get("DEMO_DEVICE") == "cpu":
        return False
    return len(NodeTopology.detect().gpus) >= 2  # noqa: PLR2004


class Engine(ABC):
    """One of the engines that the demo can start."""

    name: ClassVar[str]  # on the command line, of its package, and of its files in settings/
    command: ClassVar[str]  # as users know it

    @abstractmethod
    def server_setup(
        self, strategy: str, work: Path, model: Path, port: int, *, compiled: bool
    ) -> tuple[list[str], dict[str, str]]:
        """Command and environment of the server: the YAML of settings/ with the strategy written into it."""

    def missing(self) -> str | None:
        """What must be installed first, if anything."""
        if importlib.util.find_spec(self.name) is not None:
            return None
        return f"{self.name} is not installed in this Python environment ({sys.prefix}): pip install {self.name}"

    @abstractmethod
    def ask(self, url: str, prompt: str, new_tokens: int) -> tuple[str, list[int]]:
        """Text and token ids of a completion, the most likely token each time."""

    @abstractmethod
    def boundaries(self, layers: int, *, compiled: bool) -> int | None:
        """How many layer boundaries must be fused with a model of so many layers; None: nothing must."""

    def _template(self) -> tuple[dict[str, Any], bool]:
        """The demo's settings for this machine, and whether it has two GPUs."""
        gpus = two_gpus()
        path = SETTINGS / f"{self.name}_{'gpu' if gpus else 'cpu'}.yaml"
        say(f"{'two GPUs' if gpus else 'two CPU ranks'}; settings from {path}")
        return yaml.safe_load(path.read_text()), gpus


def _write(settings: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


class Vllm(Engine):
    """``vllm serve``."""

    name = "vllm"
    command = "vllm serve"

    def server_setup(
        self, strategy: str, work: Path, model: Path, port: int, *, compiled: bool
    ) -> tuple[list[str], dict[str, str]]:
        """With ``compiled``, the model is compiled on CPU ranks, too."""
        settings, gpus = self._template()
        ours = {"allreduce_strategy": strategy, "report_dir": str(work / "report")}
        settings["additional-config"]["allreduce"] |= ours
        if compiled:
            settings.pop("enforce-eager", None)
        config = _write(settings, work / "serve.yaml")
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        if not gpus:
            environment |= {**CPU_RANKS, "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            if compiled:
                environment |= {"CPU_OPS_COMPILE": "1", "VLLM_CACHE_ROOT": str(work / "cache")}
            else:
                # Some of vLLM's helpers are compiled in eager mode, too: seconds, for a model that needs none of that.
                environment["TORCHDYNAMO_DISABLE"] = "1"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--config", str(config)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
        return command, environment

    def ask(self, url: str, prompt: str, new_tokens: int) -> tuple[str, list[int]]:
        """By the API of OpenAI's form."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "return_token_ids": True}
        choice = http(f"{url}/v1/completions", body)["choices"][0]
        return choice["text"], choice["token_ids"]

    def boundaries(self, layers: int, *, compiled: bool) -> int | None:
        """In compiled graphs: two a layer, and the sum over the vocabulary's parts before the first norm."""
        return 2 * layers + 1 if compiled or two_gpus() else None


class Sglang(Engine):
    """``sglang.launch_server``."""

    name = "sglang"
    command = "sglang.launch_server"

    def server_setup(
        self, strategy: str, work: Path, model: Path, port: int, *, compiled: bool
    ) -> tuple[list[str], dict[str, str]]:
        """On CPU ranks with SGLang's CPU engine, which compiles nothing."""
        if compiled:
            message = "--compile is for vLLM: SGLang's CPU engine compiles nothing, and on GPUs it captures graphs"
            raise DemoError(message)
        settings, gpus = self._template()
        settings["allreduce-strategy"] = strategy
        settings["allreduce-config"] = {"report_dir": str(work / "report")}
        config = _write(settings, work / "serve.yaml")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if not gpus:
            environment |= {
                **CPU_RANKS,
                "SGLANG_USE_CPU_ENGINE": "1",
                "SGLANG_CPU_OMP_THREADS_BIND": "0|1" if (os.cpu_count() or 1) > 1 else "0|0",
                "TORCHDYNAMO_DISABLE": "1",
            }
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--config", str(config)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
        return command, environment

    def ask(self, url: str, prompt: str, new_tokens: int) -> tuple[str, list[int]]:
        """By SGLang's own API, which all versions answer with token ids."""
        sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        answer = http(f"{url}/generate", {"text": prompt, "sampling_params": sampling})
        return answer["text"], answer["output_ids"]

    def boundaries(self, layers: int, *, compiled: bool) -> int | None:  # noqa: ARG002
        """Two a layer, but for the sum before the last norm, which SGLang does not leave to that."""
        return None if two_gpus() else 2 * layers - 1


ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Vllm(), Sglang())}
