"""Models without pairs to leave out: their self-attention is linear, no softmax over tokens."""

from __future__ import annotations

from falloff.hosts import Host, latent_grid

_WHY = "its self-attention is linear in the tokens already, there are no pairs to leave out"
HOST = Host(
    family="Sana",
    models=(),
    self_attention=(),
    grid=latent_grid(lambda config: (1, 1, 1)),
    refused={
        "SanaTransformer2DModel": _WHY,
        "SanaVideoTransformer3DModel": _WHY,
        "SanaWMTransformer3DModel": _WHY,
    },
)
