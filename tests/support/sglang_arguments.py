"""SGLang's arguments, as far as the plugin looks at them, without SGLang."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any


def server_args(override: Any = None, *, tp: int = 2, **fields: Any) -> Any:
    """The parts of ServerArgs that the plugin looks at."""
    text = override if isinstance(override, str) else json.dumps(override or {})
    fields = {"device": "cuda", "enforce_disable_flashinfer_allreduce_fusion": False, **fields}
    return SimpleNamespace(json_model_override_args=text, tp_size=tp, **fields)
