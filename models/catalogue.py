"""What is known about the default models: the hashes that they were measured with."""

from __future__ import annotations

from ..settings import DEFAULT_BASE, DEFAULT_ENCODER

KNOWN_SHA256: dict[str, dict[str, str]] = {
    DEFAULT_ENCODER: {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    DEFAULT_BASE: {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    },
}
"""Model name -> file name -> SHA-256 in hex. A model that is not listed is fetched unchecked and its hash recorded."""
